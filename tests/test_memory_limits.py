"""How much memory a run takes by default: limits of control groups, of Slurm and of ulimit."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path

import pytest

from gpuem.executors.memory import available_memory

MIB = 1 << 20
FREE = 64 * 1024 * MIB


def machine(root, cgroup="0::/", mountinfo="", files=None, rss=0):
    """A tree of proc and sys with 64 GiB free."""
    contents = {
        "proc/meminfo": f"MemTotal: 90000000 kB\nMemFree: 1000 kB\nMemAvailable: {FREE // 1024} kB\n",
        "proc/self/cgroup": cgroup + "\n",
        "proc/self/mountinfo": mountinfo,
        "proc/self/status": f"Name: python\nVmRSS:\t{rss // 1024} kB\n",
        **(files or {}),
    }
    for name, text in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(text))
    return root


V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "29 23 0:25 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    "31 23 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)


def share(nbytes):
    return int(0.8 * nbytes)


def test_what_is_free_where_there_is_no_limit(tmp_path):
    assert available_memory(root=machine(tmp_path), environment={}) == share(FREE)
    files = {"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": 5 * MIB}
    assert available_memory(root=machine(tmp_path / "b", "0::/", V2, files), environment={}) == share(FREE)


def test_systemd_service_has_its_limit_on_a_parent(tmp_path):
    group = "sys/fs/cgroup/system.slice/beam.service"
    files = {
        f"{group}/memory.max": 4096 * MIB,
        f"{group}/memory.current": 3000 * MIB,
        f"{group}/memory.stat": f"anon 1\ninactive_file {1500 * MIB}\nactive_file {500 * MIB}\n",
        f"{group}/worker/memory.max": "max",
        f"{group}/worker/memory.current": 10 * MIB,
    }
    root = machine(tmp_path, "0::/system.slice/beam.service/worker", V2, files)
    assert available_memory(root=root, environment={}) == share((4096 - 1000) * MIB)
    (root / group / "memory.high").write_text(str(2048 * MIB))
    assert available_memory(root=root, environment={}) == share((2048 - 1000) * MIB)


def test_slurm_job_of_version_1(tmp_path):
    job = "sys/fs/cgroup/memory/slurm/uid_7/job_12"
    files = {
        f"{job}/memory.limit_in_bytes": 8192 * MIB,
        f"{job}/memory.usage_in_bytes": 6192 * MIB,
        f"{job}/memory.stat": f"inactive_file 7\ntotal_inactive_file {200 * MIB}\ntotal_active_file {300 * MIB}\n",
        f"{job}/step_0/memory.limit_in_bytes": (1 << 63) - 4096,
        f"{job}/step_0/memory.usage_in_bytes": 5 * MIB,
    }
    cgroup = "5:cpu:/\n4:memory:/slurm/uid_7/job_12/step_0\n0::/"
    assert available_memory(root=machine(tmp_path, cgroup, V1, files), environment={}) == share(2500 * MIB)


def test_container_that_sees_its_own_group_only(tmp_path):
    # in a namespace of its own, or with a mount that begins at its group
    files = {"sys/fs/cgroup/memory/memory.limit_in_bytes": 512 * MIB, "sys/fs/cgroup/memory/memory.usage_in_bytes": 0}
    inner = V1.replace("0:27 / ", "0:27 /docker/abc ")
    for k, (cgroup, mounts) in enumerate((("4:memory:/docker/abc", inner), ("4:memory:/../../abc", V1))):
        root = machine(tmp_path / str(k), cgroup, mounts, files)
        assert available_memory(root=root, environment={}) == share(512 * MIB)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SLURM_MEM_PER_NODE": "4000"}, 4000 - 100),
        ({"SLURM_MEM_PER_NODE": "0"}, FREE // MIB),
        ({"SLURM_MEM_PER_CPU": "2000", "SLURM_CPUS_ON_NODE": "3"}, 6000 - 100),
        ({"SLURM_MEM_PER_GPU": "1000", "SLURM_GPUS_ON_NODE": "2"}, 2000 - 100),
        ({"SLURM_MEM_PER_CPU": "2000"}, FREE // MIB),
        ({"SLURM_MEM_PER_NODE": "4000", "SLURM_STEP_TASKS_PER_NODE": "4(x2),1"}, (4000 - 100) / 4),
        ({"SLURM_MEM_PER_NODE": "4000", "SLURM_STEP_TASKS_PER_NODE": "4(x2),1", "SLURM_NODEID": "2"}, 3900),
        ({"SLURM_STEP_TASKS_PER_NODE": "8"}, FREE // MIB / 8),
        ({"SLURM_MEM_PER_NODE": "junk", "SLURM_STEP_TASKS_PER_NODE": "x(y", "SLURM_NODEID": "-"}, FREE // MIB),
    ],
)
def test_what_slurm_grants(tmp_path, environment, expected):
    root = machine(tmp_path, rss=100 * MIB)
    assert available_memory(root=root, environment=environment) == share(int(expected * MIB))


def test_dask_workers_of_a_machine_share_it(tmp_path):
    environment = {"SLURM_STEP_TASKS_PER_NODE": "8"}
    assert available_memory(4, root=machine(tmp_path), environment=environment) == share(FREE // 4)


def test_nothing_is_left(tmp_path):
    files = {"sys/fs/cgroup/memory.max": MIB, "sys/fs/cgroup/memory.current": 5 * MIB}
    assert available_memory(root=machine(tmp_path, "0::/", V2, files), environment={}) == 0


def test_ulimit():
    code = "from gpuem.executors.memory import available_memory; print(available_memory())"

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))

    done = subprocess.run([sys.executable, "-c", code], preexec_fn=limit, capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < share(6 << 30)


def _own_group():
    """A folder in which this process may make a memory control group, and its file for the limit."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if controllers == "memory":
            return Path("/sys/fs/cgroup/memory") / path.lstrip("/"), "memory.limit_in_bytes"
        if number == "0" and Path("/sys/fs/cgroup/cgroup.controllers").exists():
            return Path("/sys/fs/cgroup") / path.lstrip("/"), "memory.max"
    return None


@pytest.fixture
def group():
    """A real control group of 600 MiB, within which a child has none of its own."""
    where = _own_group()
    if where is None:
        pytest.skip("no memory control groups here")
    parent, name = where
    made = parent / f"gpuem-test-{uuid.uuid4().hex[:8]}"
    try:
        (made / "child").mkdir(parents=True)
        (made / name).write_text(str(600 * MIB))
    except OSError as error:
        for path in (made / "child", made):
            if path.exists():
                path.rmdir()
        pytest.skip(f"no memory control group can be made here ({error.strerror})")
    yield made / "child"
    (made / "child").rmdir()
    made.rmdir()


RUN = """
import numpy as np, os, sys
open(os.path.join(sys.argv[1], "cgroup.procs"), "w").write(str(os.getpid()))
import gpuem
from gpuem.executors.memory import available_memory
allowed = available_memory()
ds = gpuem.open("big.raw", frame=(256, 256), dtype="u2")
found = gpuem.run(ds, [gpuem.Sum(), gpuem.CenterOfMass()], device="cpu")
print(allowed, found.provenance["frames"]["read"])
"""


def test_a_run_in_a_real_control_group_stays_within_it(group):
    frames = 8000
    with open("big.raw", "wb") as stream:
        stream.truncate(frames * 256 * 256 * 2)
    command = [sys.executable, "-c", textwrap.dedent(RUN), str(group)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    allowed, read = map(int, done.stdout.split())
    assert 0 < allowed < share(600 * MIB)
    assert read == frames
