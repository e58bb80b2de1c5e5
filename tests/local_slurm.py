"""A real Slurm on this machine, for tests: some slurmd as nodes with GPUs that are none.

Needs Debian's slurm-wlm and munge; no root, no systemd, no cgroups. All its files lie in one folder, its ports are free
ones, so that several may run side by side.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
SEARCH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
# Slurm wants character devices as GPUs
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")

CONFIG = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
TmpFS={folder}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_min_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
GresTypes=gpu
ReturnToService=2
MailProg=/bin/true
SlurmdTimeout=60
KillWait=5
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory={memory} Gres=gpu:{gpus} State=UNKNOWN"
)


def is_installed() -> bool:
    return all(shutil.which(tool, path=SEARCH) for tool in TOOLS)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def eventually(true, seconds: float, what: str):
    """Ask again until the answer is true; returns it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        answer = true()
        if answer:
            return answer
        time.sleep(0.1)
    raise TimeoutError(f"not within {seconds:g} s: {what}")


class LocalSlurm:
    """Daemons, and what a user of Slurm does.

    Parameters
    ----------
    folder : Path
        Everything of it goes there.
    nodes, gpus, cpus : int
        How many, and what each has.
    """

    def __init__(self, folder: Path, nodes: int = 2, gpus: int = 4, cpus: int = 8) -> None:
        assert gpus <= len(DEVICES)
        self.folder, self.gpus, self.cpus = folder, gpus, cpus
        self.names = [f"n{i + 1}" for i in range(nodes)]
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        self.env |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": SEARCH}

    def run(self, *command: object, check: bool = True, **more) -> str:
        done = subprocess.run([str(c) for c in command], env=self.env, text=True, capture_output=True, **more)
        if check and done.returncode:
            raise RuntimeError(f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def start(self) -> None:
        for name in ("state", "log", "munge", *(f"spool-{n}" for n in self.names)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        # munged and slurmd look at who may enter the folders above their files
        self.folder.chmod(0o711)
        munge = self.folder / "munge"
        munge.chmod(0o711)
        key = munge / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        files = (f"--{kind}-file={munge / kind}" for kind in ("key", "pid", "log", "seed"))
        self.run("munged", "--force", f"--socket={munge / 'socket'}", *files)
        self._configure()
        self.run("slurmctld", "-i")
        for name in self.names:
            self.run("slurmd", "-N", name)
        idle = ["idle"] * len(self.names)
        eventually(
            lambda: self.run("sinfo", "-h", "-N", "-o", "%T", check=False).split() == idle, 60, "all nodes are idle"
        )

    def _configure(self) -> None:
        host = socket.gethostname().split(".")[0]
        found = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
        assert found
        nodes = "\n".join(
            NODE.format(
                name=name, host=host, port=free_port(), cpus=self.cpus, memory=int(found[1]) // 2048, gpus=self.gpus
            )
            for name in self.names
        )
        text = CONFIG.format(host=host, port=free_port(), user=getpass.getuser(), folder=self.folder, nodes=nodes)
        (self.folder / "slurm.conf").write_text(text)
        gres = (f"NodeName={n} Name=gpu File={f}\n" for n in self.names for f in DEVICES[: self.gpus])
        (self.folder / "gres.conf").write_text("".join(gres))

    def stop(self) -> None:
        self.run("scancel", "--user", getpass.getuser(), check=False)
        with suppress(TimeoutError):
            eventually(lambda: not self.run("squeue", "-h", check=False).strip(), 20, "no jobs are left")
        self.run("scontrol", "shutdown", check=False)
        for file in (self.folder / "munge/pid", *self.folder.glob("slurm*.pid")):
            with suppress(OSError, ValueError):
                os.kill(int(file.read_text()), 15)

    def submit(self, script: str | Path, *options: object) -> str:
        """Job id of a file, or of the text of one."""
        if isinstance(script, Path):
            return self.run("sbatch", "--parsable", *options, script).strip()
        return self.run("sbatch", "--parsable", *options, input=script).strip()

    def facts(self, job: object) -> dict[str, str]:
        text = self.run("scontrol", "show", "job", job, "--oneliner", check=False)
        return dict(re.findall(r"(\w+)=(\S*)", text.splitlines()[0])) if text.strip() else {}

    def state(self, job: object) -> str:
        return self.facts(job).get("JobState", "")

    def running(self, job: object, seconds: float = 60) -> None:
        eventually(lambda: self.state(job) == "RUNNING", seconds, f"job {job} runs")

    def wait(self, job: object, seconds: float = 120) -> tuple[str, int]:
        """State and exit code of a job that has ended (``sbatch --wait`` would look every ten seconds only)."""
        state = eventually(lambda: self.state(job) in ENDED and self.state(job), seconds, f"job {job} has ended")
        return state, int(self.facts(job)["ExitCode"].split(":")[0])

    def requeued(self, job: object, seconds: float = 60) -> None:
        """Wait until a job was put into the queue again, and let it start: Slurm would wait for two minutes."""
        eventually(lambda: int(self.facts(job).get("Restarts", 0)) > 0, seconds, f"job {job} is in the queue again")

        def started() -> bool:
            # the nodes refuse a job that they are still clearing away, and its end sets the two minutes anew
            time.sleep(1.5)
            if self.state(job) == "PENDING":
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
            return self.state(job) not in ("PENDING", "COMPLETING")

        eventually(started, seconds, f"job {job} runs again")


@contextmanager
def local_slurm(folder: Path, **options: int):
    """A `LocalSlurm` that is up, and stopped in the end."""
    slurm = LocalSlurm(folder, **options)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()
