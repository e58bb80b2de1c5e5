"""Job scripts: as text, in plain bash with commands that only write down what they are told, and in a real Slurm."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import local_slurm
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from gpuem import cli_slurm, recipe, slurm, slurm_parts, slurm_site
from gpuem.errors import GpuemError, InputError, RecipeError
from gpuem.slurm import Ask
from gpuem.slurm_site import Container, Site

RECIPE = """
[input]
path = {path}
scan = [4, 4]
frame = [8, 8]
dtype = "uint16"

[[analysis]]
kind = "sum"

[output]
path = {output}
previews = false
"""
HOSTILE = ["a b.mib", "it's.mib", 'q"uote.mib', "$HOME `id` $(id).mib", "-n.mib", "*.mib", "é 100%.mib", "a.b.c.mib",
           "none", ".hidden", "back\\slash.mib", "&amp.mib", "{name}.mib", "#1.mib", "[x].mib"]  # fmt: skip
# writes its arguments down, as JSON, and does nothing else
WRITER = """#!{python}
import json, os, sys
with open({log!r}, "a") as log:
    log.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
{more}
"""


def write_recipe(folder: Path, output: str = "scan.results.zarr", name: str = "scan.toml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.arange(4 * 4 * 8 * 8, dtype="u2").tofile(folder / "scan.raw")
    path = folder / name
    path.write_text(RECIPE.format(path=json.dumps("scan.raw"), output=json.dumps(output)))
    return path


def text_of(path: Path, site: Site | None = None, **options) -> str:
    ask = Ask(path, **{"time": "1:00:00", **options})
    return slurm.script(ask, slurm.output_of(ask, recipe.load(path)[0]), site)


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


class Bash:
    """Runs scripts with commands that write down what they are told."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.log = folder / "bin", folder / "log.jsonl"
        for name in ("gpuem", "dask", "apptainer", "srun", "scancel", "squeue"):
            self.add(name)
        self.add("scontrol", 'if "show" in sys.argv: print("JobId=7 JobState=RUNNING Reason=None")')

    def add(self, name: str, more: str = "") -> None:
        program(self.bin / name, WRITER.format(python=sys.executable, log=str(self.log), more=more))

    def run(self, text: str, code: int = 0, **env: str) -> list[list[str]]:
        """Calls in the order in which they were made."""
        self.log.unlink(missing_ok=True)
        # the script puts its own programs first: these stand in for them
        text = text.replace('":$PATH"', "").replace("\nset -u\n", f"\nexport PATH={self.bin}:$PATH\nset -u\n", 1)
        done = subprocess.run(
            ["bash"], input=text, text=True, capture_output=True, timeout=60,
            env={**os.environ, "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1", **env},
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        self.said = done.stdout + done.stderr
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def bash(tmp_path):
    return Bash(tmp_path)


# --- text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, seconds",
    [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-0", 86400), ("1-12", 129600), ("1-2:30", 95400),
     ("1-2:30:05", 95405), ("0:01:00", 60), ("100:00:00", 360000)],
)  # fmt: skip
def test_time_limits_as_slurm_reads_them(text, seconds):
    assert slurm.seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "2h", "1:2:3:4", "-1", "1-", "0:30", "0", "1:00:00 --evil", "１0"])
def test_other_time_limits_are_refused(text):
    with pytest.raises(RecipeError, match="--time"):
        slurm.seconds(text)


@pytest.mark.parametrize("nodes, gpus, mode", [(1, 0, "single"), (1, 1, "single"), (1, 2, "dask"), (4, 0, "dask")])
def test_one_process_where_one_is_enough(nodes, gpus, mode):
    assert slurm.best_mode(nodes, gpus) == mode


def scripts(folder: Path):
    """A script of every sort."""
    places = [folder / "plain", folder / 'it\'s a "place" $x 100%']
    sites = [
        Site(),
        Site(account="a1", partition="gpu,big", qos="q", constraint="a100&ib", modules=["cuda/13", "a b"],
             setup=["source 'my env'/bin/activate"], sbatch=["--mail-type=END"], srun=["--mpi=none"], interface="ib0",
             gpu_type="a100", gres=True, memory="200G", cpus_per_task=3),
        Site(container=Container(kind="apptainer", image="/images/my gpuem.sif", mounts=["/data:/data"])),
        Site(container=Container(kind="pyxis", image="gpuem#1", mounts=["/a b:/c"], options=["--no-container-x"])),
    ]  # fmt: skip
    for place, site, (nodes, gpus), several in itertools.product(
        places, sites, [(1, 0), (1, 1), (4, 8), (3, 0)], [False, True]
    ):
        path = write_recipe(place, "{name}.results.zarr" if several else "scan.results.zarr")
        files = tuple(str(place / name) for name in HOSTILE) if several else ()
        modes = ["rank", "dask"] + ["single"] * ((nodes, gpus) in [(1, 0), (1, 1)])
        for mode in modes:
            yield text_of(path, site, nodes=nodes, gpus=gpus, files=files, mode=mode)


def test_bash_reads_every_script(tmp_path):
    count = 0
    for text in scripts(tmp_path):
        count += 1
        done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
        assert not done.returncode, text + done.stderr
        assert not done.stderr, text + done.stderr
    assert count > 100


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_no_complaint(tmp_path):
    # 1091: what the site's lines read; 2016: a name with a dollar, in quotes as it should be; 2317: what a trap calls
    files = []
    for count, text in enumerate(scripts(tmp_path)):
        files.append(tmp_path / f"{count}.sh")
        files[-1].write_text(text)
    done = subprocess.run(["shellcheck", "--exclude=SC1091,SC2016,SC2317", *files], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[:4000]


def test_a_script_reads_well(tmp_path):
    text = text_of(write_recipe(tmp_path), nodes=4, gpus=8, mode="dask", time="2:00:00", name="mine")
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    asked = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert asked == [
        "--job-name=mine", "--nodes=4", "--ntasks-per-node=1", "--cpus-per-task=64", "--gpus-per-node=8",
        "--time=2:00:00", f"--output={tmp_path}/scan.results.slurm-%j.log", "--open-mode=append",
        "--signal=B:TERM@120", "--requeue", "--no-kill",
    ]  # fmt: skip
    # Slurm reads no further than the first command
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:])
    assert "dask cuda worker" in text
    assert "--device-memory-limit 0" in text
    assert "--death-timeout 60" in text
    assert max(map(len, lines)) < 400
    assert len(lines) < 100


def test_the_site_is_heeded(tmp_path):
    site = Site(account="a1", partition="gpu", qos="q", constraint="a&b", memory="200G", gpu_type="h100", gres=True,
                modules=["cuda/13"], setup=["echo set up"], sbatch=["--mail-type=END"], interface="ib0")  # fmt: skip
    text = text_of(write_recipe(tmp_path), site, nodes=2, gpus=4, mode="dask")
    for line in ("--account=a1", "--partition=gpu", "--qos=q", "--constraint='a&b'", "--mem=200G", "--gres=gpu:h100:4",
                 "--mail-type=END"):  # fmt: skip
        assert f"\n#SBATCH {line}\n" in text
    assert "gpus-per-node" not in text
    assert text.index("export PATH=") < text.index("module load cuda/13\necho set up\n") < text.index("set -u")
    assert text.count("--interface ib0") == 2
    assert text.startswith("#!/bin/bash -l\n")


def test_whole_nodes_without_gpus(tmp_path):
    path = write_recipe(tmp_path)
    text = text_of(path, nodes=3, gpus=0, mode="dask")
    assert "\n#SBATCH --exclusive\n" in text
    assert "\n#SBATCH --mem=0\n" in text
    assert "cpus-per-task" not in text
    assert "--gpus" not in text
    assert "dask worker" in text
    text = text_of(path, nodes=3, gpus=0, mode="dask", cpus=5)
    assert "exclusive" not in text
    assert text.count("--cpus-per-task=5") == 2
    assert "--nthreads 5" in text


@pytest.mark.parametrize("time, grace", [("2:00:00", 120), ("0:04:00", 60), ("1", 15)])
def test_a_short_limit_leaves_time_to_work(tmp_path, time, grace):
    assert f"--signal=B:TERM@{grace}\n" in text_of(write_recipe(tmp_path), time=time)


def test_names_that_no_script_can_hold(tmp_path):
    with pytest.raises(RecipeError, match="line breaks"):
        text_of(write_recipe(tmp_path), name="a\nrm -rf x")
    path = write_recipe(tmp_path / "two\nlines")
    with pytest.raises(RecipeError, match="line breaks"):
        text_of(path)


# --- plain bash -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["plain", 'it\'s a "place" $x `id` 100% &'])
def test_paths_survive(tmp_path, bash, place):
    path = write_recipe(tmp_path / place, name="my scan's.toml")
    (call,) = bash.run(text_of(path))
    assert call == ["gpuem", "run", str(path), "--resume"]
    assert (tmp_path / place / "scan.results.run").is_dir()


def test_files_of_an_array_survive(tmp_path, bash):
    path = write_recipe(tmp_path, str(tmp_path / "made of {name}/{name}.results.zarr"))
    files = [str(tmp_path / "da ta" / name) for name in HOSTILE] + ["s3://bucket/key with blank.mib"]
    text = text_of(path, files=tuple(files))
    assert f"\n#SBATCH --array=0-{len(files) - 1}\n" in text
    assert f"#SBATCH --output={tmp_path}/scan.slurm-%A_%a.log" in text
    places = slurm.outputs(tmp_path / "made of {name}/{name}.results.zarr", files)
    for i, file in enumerate(files):
        (call,) = bash.run(text, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID=str(i))
        assert call == ["gpuem", "run", str(path), "--resume", "--input", file]
        # bash makes the same of the name as Python does
        assert slurm.beside(places[file]).is_dir(), file


def test_an_array_needs_a_name_in_its_output(tmp_path):
    with pytest.raises(RecipeError, match=r'\[output\] path.*needs "\{name\}"'):
        text_of(write_recipe(tmp_path), files=("/a/b.mib",))
    path = write_recipe(tmp_path, "{name}.zarr")
    with pytest.raises(RecipeError, match=r"/a/x.mib and /b/x.raw would both be saved as .*/x.zarr"):
        text_of(path, files=("/a/x.mib", "/c/y.mib", "/b/x.raw"))


def test_processors_are_handed_on_to_srun(tmp_path, bash):
    path = write_recipe(tmp_path)
    (call,) = bash.run(text_of(path, nodes=2, gpus=4, mode="rank", cpus=6))
    assert call[:2] == ["srun", "--job-name=client"]
    assert {"--cpus-per-task=6", "--gpus-per-task=1", "--kill-on-bad-exit=0", "--wait=0"} <= set(call)
    assert call[-5:] == ["gpuem", "run", str(path), "--resume", "--rank-from-env"]
    text = text_of(path, nodes=2, gpus=4, mode="rank", cpus=6)
    assert "#SBATCH --ntasks-per-node=4\n" in text


def test_apptainer(tmp_path, bash):
    box = Container(kind="apptainer", image="/im age.sif", mounts=["/a b:/c"], options=["--cleanenv"])
    path = write_recipe(tmp_path)
    inside = ["apptainer", "exec", "--nv", "--bind", "/a b:/c", "--cleanenv", "/im age.sif"]
    text = text_of(path, Site(container=box))
    assert "export PATH" not in text
    assert bash.run(text) == [[*inside, "gpuem", "run", str(path), "--resume"]]
    (call,) = bash.run(text_of(path, Site(container=box), nodes=2, gpus=2, mode="rank"))
    assert call[call.index("apptainer") :] == [*inside, "gpuem", "run", str(path), "--resume", "--rank-from-env"]


def test_pyxis_starts_everything_by_srun(tmp_path, bash):
    box = Container(kind="pyxis", image="my image#1", mounts=["/a b:/c", "/d"], options=["--container-writable"])
    path = write_recipe(tmp_path)
    (call,) = bash.run(text_of(path, Site(container=box)))
    assert call == [
        "srun", "--job-name=client", "--overlap", "--nodes=1", "--ntasks=1", "--nodelist=n1",
        "--container-image=my image#1", "--container-mounts=/a b:/c,/d", "--container-writable",
        "gpuem", "run", str(path), "--resume",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "ends, state, shards, asked, said",
    [
        (75, "RUNNING", 2, True, "in the queue again"),
        (75, "RUNNING", 0, False, "not one more shard"),
        (75, "COMPLETING", 2, False, "cancelled"),
        (0, "RUNNING", 2, False, ""),
        (2, "RUNNING", 2, False, ""),
        (143, "RUNNING", 2, False, ""),
    ],
)
def test_what_is_run_again(tmp_path, bash, ends, state, shards, asked, said):
    path = write_recipe(tmp_path)
    bash.add(
        "gpuem",
        f"""
for i in range({shards}):
    open("events.jsonl", "a").write(json.dumps({{"t": 1.5, "event": "shard", "shard": i}}) + "\\n")
sys.exit({ends})""",
    )
    bash.add("scontrol", f'if "show" in sys.argv: print("JobId=7 JobState={state} Reason=None")')
    calls = bash.run(text_of(path), ends)
    assert (["scontrol", "requeue", "7"] in calls) == asked
    assert said in bash.said
    # and what an earlier job finished is not what this one did
    bash.add("gpuem", f"sys.exit({ends})")
    assert ["scontrol", "requeue", "7"] not in bash.run(text_of(path), ends)


def test_a_task_of_an_array_alone_is_run_again(tmp_path, bash):
    path = write_recipe(tmp_path, "{name}.zarr")
    bash.add("gpuem", 'open("events-3.jsonl", "a").write(\'{"event": "shard"}\\n\'); sys.exit(75)')
    calls = bash.run(text_of(path, files=("/a", "/b")), 75, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="1")
    # the last task of an array has the array's own number: that would run all of them again
    assert ["scontrol", "requeue", "7_1"] in calls


def test_slurm_that_runs_nothing_again(tmp_path, bash):
    bash.add("gpuem", 'open("events.jsonl", "a").write(\'{"event":"shard"}\\n\'); sys.exit(75)')
    bash.add("scontrol", 'print("JobState=RUNNING") if "show" in sys.argv else sys.exit(1)')
    bash.run(text_of(write_recipe(tmp_path)), 75)
    assert "submit it again" in bash.said


SAVES = """
import signal, time
def stop(*_):
    open("saved", "w").close()
    time.sleep({seconds})
    open("events.jsonl", "a").write('{{"event": "shard"}}\\n')
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
open("ready", "w").close()
for _ in range(600): time.sleep(0.1)
"""


@pytest.mark.parametrize("signals", [1, 2])
def test_sigterm_is_passed_on_and_waited_for(tmp_path, bash, signals):
    path = write_recipe(tmp_path)
    # the second signal comes while gpuem saves, and is no reason to leave it
    bash.add(
        "gpuem",
        SAVES.format(seconds=1).replace("def stop(*_):", "def stop(*_):\n    signal.signal(15, lambda *_: None)"),
    )
    text = text_of(path).replace("\nset -u\n", f"\nexport PATH={bash.bin}:$PATH\nset -u\n", 1)
    with subprocess.Popen(
        ["bash", "-c", text], env={**os.environ, "SLURM_JOB_ID": "7"}, stdout=subprocess.PIPE, text=True
    ) as job:
        run = tmp_path / "scan.results.run"
        local_slurm.eventually((run / "ready").exists, 30, "gpuem runs")
        job.terminate()
        if signals == 2:
            local_slurm.eventually((run / "saved").exists, 30, "gpuem saves")
            job.terminate()
        assert job.wait(60) == 75
        assert "in the queue again" in job.stdout.read()


def test_a_scheduler_that_does_not_start(tmp_path, bash):
    bash.add("dask", 'print("no dask here"); sys.exit(3)')
    calls = bash.run(text_of(write_recipe(tmp_path), nodes=2, gpus=2, mode="dask"), 1)
    assert [call[0] for call in calls] == ["dask"]
    assert "did not start" in bash.said
    assert "no dask here" in bash.said


def test_dask_is_told_what_it_must_know(tmp_path, bash):
    path = write_recipe(tmp_path)
    bash.add(
        "dask", 'import time; open(sys.argv[sys.argv.index("--scheduler-file") + 1], "w").write("{}"); time.sleep(1)'
    )
    calls = bash.run(text_of(path, nodes=2, gpus=4, mode="dask"), SLURM_RESTART_COUNT="3")
    scheduler, workers, client = sorted(calls, key=lambda call: ["dask", "srun", "gpuem"].index(call[0]))
    file = str(tmp_path / "scan.results.run/scheduler-7-3.json")
    assert scheduler[:2] == ["dask", "scheduler"]
    assert scheduler[3] == file
    assert workers[workers.index("dask") : workers.index("dask") + 5] == [
        "dask", "cuda", "worker", "--scheduler-file", file,
    ]  # fmt: skip
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=32", "--no-kill"} <= set(workers)
    assert client == ["gpuem", "run", str(path), "--resume", "--scheduler", file]
    assert not Path(file).exists()


def test_dask_is_set_alike_at_both_ends():
    config = pytest.importorskip("dask.config")
    pytest.importorskip("distributed")
    from gpuem.executors import dask_workers

    lines = [line for line in slurm_parts.DASK_SETTINGS.splitlines() if not line.startswith("#")]
    said = config.collect_env(dict(line.removeprefix("export ").split("=", 1) for line in lines))
    assert len(lines) == len(dask_workers.SETTINGS)
    for name, value in dask_workers.SETTINGS.items():
        assert config.get(name, config=said) == value, name


# --- site -----------------------------------------------------------------------------------------------------------


def test_site_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("GPUEM_SITE", raising=False)
    assert slurm_site.load() == Site()
    usual = tmp_path / ".config/gpuem/site.toml"
    usual.parent.mkdir(parents=True)
    usual.write_text('account = "usual"\n[container]\nkind = "pyxis"\nimage = "x"')
    assert slurm_site.load().account == "usual"
    (tmp_path / "b.toml").write_text('account = "env"')
    monkeypatch.setenv("GPUEM_SITE", str(tmp_path / "b.toml"))
    assert slurm_site.load().account == "env"
    (tmp_path / "c.toml").write_text('account = "named"')
    assert slurm_site.load(tmp_path / "c.toml").account == "named"
    monkeypatch.setenv("GPUEM_SITE", str(tmp_path / "gone.toml"))
    with pytest.raises(RecipeError, match=r"gone\.toml: no such site file"):
        slurm_site.load()


@pytest.mark.parametrize(
    "text, said",
    [
        (
            'acount = "x"\nfoo = 1',
            "2 mistakes(.|\n)*acount: unknown key; did you mean 'account'(.|\n)*foo: unknown key; known",
        ),
        ('[container]\nimage = "x"\nkind = "docker"', "'docker' is not one of apptainer, pyxis"),
        ('[container]\nkind = "pyxis"', "container.image: is missing"),
        (
            '[container]\nkind = "pyxis"\nimage = "x"\nmount = ["a:b"]',
            "container.mount: unknown key; did you mean 'mounts'",
        ),
        ('modules = "cuda"', "modules: "),
        ("cpus_per_task = 0", "cpus_per_task: "),
        ('sbatch = ["mail-type=END"]', "is no option"),
        ("account = ", "not TOML"),
    ],
)
def test_mistakes_in_a_site_file(tmp_path, text, said):
    (tmp_path / "site.toml").write_text(text)
    with pytest.raises(RecipeError, match=said):
        slurm_site.load(tmp_path / "site.toml")


def test_the_documented_sites_are_good():
    import re
    import tomllib

    text = (Path(__file__).parents[1] / "docs/slurm.md").read_text()
    blocks = re.findall(r"```toml\n(# site.*?)```", text, re.S)
    assert len(blocks) >= 2
    named = set()
    for block in blocks:
        named |= set(tomllib.loads(block))
        slurm_site.check(tomllib.loads(block), "docs/slurm.md")
        # what is commented out is good as well
        given = re.sub(r"(?m)^# (?=[a-z_]+ = |\[)", "", block)
        named |= set(tomllib.loads(given))
        slurm_site.check(tomllib.loads(given), "docs/slurm.md")
    assert named == set(Site.model_fields)


# --- command --------------------------------------------------------------------------------------------------------


def command(*args: object):
    app = typer.Typer()
    app.command()(cli_slurm.slurm)
    return CliRunner().invoke(app, [str(a) for a in args])


def test_the_command_prints_a_script_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write_recipe(tmp_path)
    done = command(path, "--nodes", 2, "--gpus-per-node", 4, "--mode", "rank", "--cpus-per-task", 3, "--name", "mine")
    assert done.exit_code == 0, done.exception
    assert done.stdout == text_of(path, nodes=2, gpus=4, mode="rank", cpus=3, name="mine")
    assert not (tmp_path / "scan.results.run").exists()


def test_files_of_an_array_in_quotes_and_as_the_shell_gives_them(tmp_path, monkeypatch):
    path = write_recipe(tmp_path, "{name}.zarr")
    data = tmp_path / "data"
    data.mkdir()
    for name in ("b.raw", "a.raw", "[1].raw", "c.txt"):
        shutil.copy(tmp_path / "scan.raw", data / name)
    wanted = tuple(str(data / name) for name in ("[1].raw", "a.raw", "b.raw"))
    monkeypatch.chdir(tmp_path)
    assert slurm.find_files(["data/*.raw"]) == wanted
    assert slurm.find_files([str(data / "*.raw"), "data/a.raw"]) == wanted
    assert slurm.find_files(["data/[1].raw", "s3://b/k.mib"]) == (wanted[0], "s3://b/k.mib")
    with pytest.raises(InputError, match="no such file"):
        slurm.find_files(["data/d.raw"])
    with pytest.raises(RecipeError, match="nothing fits"):
        slurm.find_files(["data/*.mib"])
    quoted = command(path, "--array", "data/*.raw")
    split = command(path, "--array", *sorted(str(p.relative_to(tmp_path)) for p in data.glob("*.raw")), "--nodes", 1)
    assert quoted.exit_code == 0, quoted.exception
    assert quoted.stdout == split.stdout == text_of(path, files=wanted, name="scan")


@pytest.mark.parametrize(
    "args, error, said",
    [
        (["extra.toml"], RecipeError, "one recipe, please"),
        (["--mode", "mpi"], RecipeError, "--mode mpi"),
        (["--mode", "single", "--nodes", "2"], RecipeError, "--mode single"),
        (["--time", "soon"], RecipeError, "--time soon"),
        (["--array", "scan.raw"], RecipeError, "{name}"),
        (["--site", "gone.toml"], RecipeError, "gone.toml"),
    ],
)
def test_mistakes_are_told_at_once(tmp_path, monkeypatch, args, error, said):
    path = write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    done = command(path, *args)
    assert isinstance(done.exception, error), done.output
    assert said in str(done.exception)
    assert not done.stdout


def test_the_data_is_looked_at_now(tmp_path):
    path = write_recipe(tmp_path)
    (tmp_path / "scan.raw").write_bytes(b"short")
    done = command(path)
    assert isinstance(done.exception, InputError)
    assert "--no-check" in str(done.exception)
    assert command(path, "--no-check").exit_code == 0


def test_the_folder_of_the_log_is_made(tmp_path):
    path = write_recipe(tmp_path, "a/{name}/b.zarr")
    assert command(path, "--array", tmp_path / "scan.raw").exit_code == 0
    # what is below is made by the runs
    assert list((tmp_path / "a").iterdir()) == []
    assert command(path).exit_code == 0
    assert (tmp_path / "a/scan").is_dir()
    path = write_recipe(tmp_path, "scan.raw/b.zarr")
    done = command(path)
    assert done.exit_code == 0
    assert "can't be made" in done.stderr
    assert "can't be made" in str(command(path, "--submit").exception)


def test_submitting_needs_sbatch(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = command(write_recipe(tmp_path), "--submit")
    assert isinstance(done.exception, GpuemError)
    assert "no sbatch here" in str(done.exception)


def test_what_sbatch_says_is_told(tmp_path, monkeypatch):
    program(tmp_path / "bin/sbatch", "#!/bin/sh\ncat > /dev/null\necho 'sbatch: error: invalid account' >&2\nexit 1\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    done = command(write_recipe(tmp_path / "x"), "--submit")
    assert "invalid account" in str(done.exception)


# --- a real Slurm ---------------------------------------------------------------------------------------------------

needs_slurm = pytest.mark.skipif(not local_slurm.is_installed(), reason="slurm-wlm and munge are not installed")

# stands in for gpuem: shards that take their time, a SIGTERM that it heeds, and what it was told
SHARDS = """#!{python}
import json, os, signal, sys, time
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
rank = os.environ.get("SLURM_PROCID", "0") if "--rank-from-env" in sys.argv else None
name = "events.jsonl" if rank is None else f"events-{{rank}}.jsonl"
done = open(name).read().count('"event": "shard"') if os.path.exists(name) else 0
with open(name, "a") as log:
    def report(**facts):
        log.write(json.dumps(facts) + "\\n")
        log.flush()
    report(event="start", argv=sys.argv[1:], node=os.environ["SLURMD_NODENAME"],
           gpus=os.environ.get("CUDA_VISIBLE_DEVICES"), cpus=os.environ.get("SLURM_CPUS_PER_TASK"),
           again=os.environ.get("SLURM_RESTART_COUNT", "0"), done=done)
    for shard in range(done, {shards}):
        time.sleep({seconds})
        report(event="shard", shard=shard)
        if told:
            report(event="stop")
            sys.exit(75)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with local_slurm.local_slurm(tmp_path_factory.mktemp("slurm")) as slurm:
        yield slurm


def with_stand_in(folder: Path, shards: int, seconds: float) -> Site:
    program(folder / "bin/gpuem", SHARDS.format(python=sys.executable, shards=shards, seconds=seconds))
    return Site(setup=[f"export PATH={shlex.quote(str(folder / 'bin'))}:$PATH"])


def events(run: Path) -> list[dict]:
    return [json.loads(line) for file in sorted(run.glob("events*.jsonl")) for line in file.read_text().splitlines()]


def some(run: Path, event: str, count: int = 1):
    return lambda: sum(item["event"] == event for item in events(run)) >= count


def log_of(folder: Path) -> str:
    return "\n".join(file.read_text() for file in sorted(folder.glob("*.slurm-*.log")))


@needs_slurm
def test_stopped_before_its_limit_a_job_goes_on(cluster, tmp_path):
    place = tmp_path / 'it\'s a "place" 100%j'
    path, run = write_recipe(place), place / "scan.results.run"
    job = cluster.submit(text_of(path, with_stand_in(tmp_path, 40, 0.1), gpus=2, cpus=3))
    local_slurm.eventually(some(run, "shard", 3), 60, "three shards are done")
    # what --signal=B:TERM@120 does
    cluster.run("scancel", "--signal=TERM", "--batch", job)
    cluster.requeued(job)
    assert cluster.wait(job) == ("COMPLETED", 0), log_of(place)
    starts = [item for item in events(run) if item["event"] == "start"]
    (stopped,) = [i for i, item in enumerate(events(run)) if item["event"] == "stop"]
    first = sum(item["event"] == "shard" for item in events(run)[:stopped])
    assert 3 <= first < 40
    assert [(start["again"], start["done"]) for start in starts] == [("0", 0), ("1", first)]
    assert [item["shard"] for item in events(run) if item["event"] == "shard"] == list(range(40))
    assert starts[0]["gpus"] == "0,1"
    # both jobs wrote the one log
    assert "in the queue again" in log_of(place)


@needs_slurm
def test_a_cancelled_job_stays_cancelled_and_goes_on_when_submitted_again(cluster, tmp_path):
    path, run = write_recipe(tmp_path), tmp_path / "scan.results.run"
    text = text_of(path, with_stand_in(tmp_path, 30, 0.1), gpus=0)
    job = cluster.submit(text)
    local_slurm.eventually(some(run, "shard"), 60, "a shard is done")
    cluster.run("scancel", job)
    assert cluster.wait(job)[0] == "CANCELLED"
    assert cluster.facts(job)["Restarts"] == "0"
    assert some(run, "stop")()
    assert "cancelled; what is finished is saved" in log_of(tmp_path)
    assert cluster.wait(cluster.submit(text)) == ("COMPLETED", 0)
    assert [item["shard"] for item in events(run) if item["event"] == "shard"] == list(range(30))


@needs_slurm
@pytest.mark.slow
def test_the_time_limit_itself(cluster, tmp_path):
    path, run = write_recipe(tmp_path), tmp_path / "scan.results.run"
    # Slurm looks at its clocks every half minute: the signal comes 0 to 45 s after the start
    job = cluster.submit(text_of(path, with_stand_in(tmp_path, 700, 0.1), gpus=0, time="1"))
    local_slurm.eventually(some(run, "stop"), 120, "the limit is near")
    cluster.requeued(job)
    local_slurm.eventually(some(run, "start", 2), 60, "the job runs again")
    assert [item["again"] for item in events(run) if item["event"] == "start"] == ["0", "1"]
    cluster.run("scancel", job)
    assert cluster.wait(job)[0] == "CANCELLED"


@needs_slurm
def test_a_job_that_gets_nowhere_is_not_run_again(cluster, tmp_path):
    program(tmp_path / "bin/gpuem", "#!/bin/sh\nexit 75\n")
    site = Site(setup=[f"export PATH={tmp_path}/bin:$PATH"])
    job = cluster.submit(text_of(write_recipe(tmp_path), site))
    assert cluster.wait(job) == ("FAILED", 75)
    assert cluster.facts(job)["Restarts"] == "0"


@needs_slurm
def test_an_array_where_one_task_fails_and_one_is_stopped(cluster, tmp_path):
    path = write_recipe(tmp_path, "{name}.results.zarr")
    site = with_stand_in(tmp_path, 20, 0.1)
    program(tmp_path / "bin/gpuem", (tmp_path / "bin/gpuem").read_text().replace(
        "told = []", "told = []\nif 'broken' in sys.argv[-1]: sys.exit(2)"))  # fmt: skip
    files = tuple(str(tmp_path / name) for name in ("a b.raw", "broken.raw", "it's.raw"))
    job = cluster.submit(text_of(path, site, files=files, gpus=1))
    runs = [tmp_path / f"{slurm.stem(file)}.results.run" for file in files]
    # the last task has the array's own number
    local_slurm.eventually(some(runs[2], "shard", 2), 60, "two shards are done")
    cluster.run("scancel", "--signal=TERM", "--batch", f"{job}_2")
    cluster.requeued(f"{job}_2")
    assert cluster.wait(f"{job}_0") == ("COMPLETED", 0), log_of(tmp_path)
    assert cluster.wait(f"{job}_1") == ("FAILED", 2)
    assert cluster.wait(f"{job}_2") == ("COMPLETED", 0)
    assert [cluster.facts(f"{job}_{i}")["Restarts"] for i in range(3)] == ["0", "0", "1"]
    for i in (0, 2):
        assert [item["shard"] for item in events(runs[i]) if item["event"] == "shard"] == list(range(20))
        start = events(runs[i])[0]
        assert start["argv"] == ["run", str(path), "--resume", "--input", files[i]]


@needs_slurm
def test_ranks_have_a_gpu_each_and_are_stopped_together(cluster, tmp_path):
    path, run = write_recipe(tmp_path), tmp_path / "scan.results.run"
    job = cluster.submit(text_of(path, with_stand_in(tmp_path, 30, 0.1), nodes=2, gpus=4, mode="rank", cpus=2))
    local_slurm.eventually(some(run, "shard", 16), 60, "shards are done")
    # a signal to srun would kill the ranks before they have saved
    cluster.run("scancel", "--signal=TERM", "--batch", job)
    cluster.requeued(job)
    assert sum(item["event"] == "stop" for item in events(run)) == 8, log_of(tmp_path)
    assert cluster.wait(job) == ("COMPLETED", 0), log_of(tmp_path)
    starts = [item for item in events(run) if item["event"] == "start"]
    assert len(starts) == 16
    assert {(s["node"], s["gpus"]) for s in starts} == {(n, str(g)) for n in ("n1", "n2") for g in range(4)}
    assert {s["cpus"] for s in starts} == {"2"}
    assert sum(item["event"] == "shard" for item in events(run)) == 8 * 30


# a client of Dask alone: what the script started, seen from gpuem's place
CLIENT = """#!{python}
import json, os, sys, time
from distributed import Client
def seen(dask_worker):
    return os.environ["SLURMD_NODENAME"], os.environ.get("CUDA_VISIBLE_DEVICES"), dask_worker.state.nthreads
with Client(scheduler_file=sys.argv[sys.argv.index("--scheduler") + 1]) as client:
    client.wait_for_workers({workers}, timeout=100)
    found = sorted(client.run(seen).values())
    memory = client.run(lambda dask_worker: dask_worker.memory_manager.memory_limit)
with open("events.jsonl", "a") as log:
    log.write(json.dumps({{"event": "shard", "found": found, "memory": list(memory.values())}}) + "\\n")
sys.exit({code} if os.environ.get("SLURM_RESTART_COUNT", "0") == "0" else 0)
"""


def dask_site(folder: Path, workers: int, code: int = 0, more: tuple[str, ...] = ()) -> Site:
    pytest.importorskip("distributed")
    program(folder / "bin/gpuem", CLIENT.format(python=sys.executable, workers=workers, code=code))
    return Site(setup=[f"export PATH={shlex.quote(str(folder / 'bin'))}:$PATH", *more])


@needs_slurm
def test_a_dask_worker_on_every_node(cluster, tmp_path):
    site = dask_site(tmp_path, 2)
    job = cluster.submit(text_of(write_recipe(tmp_path), site, nodes=2, gpus=0, mode="dask", cpus=3))
    assert cluster.wait(job) == ("COMPLETED", 0), log_of(tmp_path)
    run = tmp_path / "scan.results.run"
    (seen,) = events(run)
    assert seen["found"] == [["n1", None, 3], ["n2", None, 3]]
    assert set(seen["memory"]) == {None}
    # named by the machine, which is both nodes here
    (log,) = run.glob("workers-*.log")
    assert log.read_text().count("Start worker at") == 2
    assert "Start scheduler" not in log.read_text()
    assert (run / "scheduler.log").exists()
    assert not list(run.glob("scheduler-*.json"))


@pytest.fixture(scope="module")
def nvml(tmp_path_factory):
    """Folder with a libnvidia-ml.so.1 that knows four GPUs."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    folder = tmp_path_factory.mktemp("nvml")
    source = Path(__file__).parent / "stubs/fake_nvml.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "libnvidia-ml.so.1", source], check=True)
    return folder


@needs_slurm
def test_dask_cuda_gives_every_gpu_a_worker_and_comes_back(cluster, nvml, tmp_path):
    pytest.importorskip("dask_cuda")
    # dask-cuda has this switch for its own tests: no CUDA context is made
    fake = (f"export LD_LIBRARY_PATH={nvml}:${{LD_LIBRARY_PATH:-}}", "export DASK_CUDA_TEST_SINGLE_GPU=1")
    site = dask_site(tmp_path, 4, 75, fake)
    text = text_of(write_recipe(tmp_path), site, nodes=2, gpus=2, mode="dask", cpus=4)
    job = cluster.submit(text)
    # ended early, something was finished: once more, with a scheduler of its own
    cluster.requeued(job, 120)
    assert cluster.wait(job) == ("COMPLETED", 0), log_of(tmp_path)
    for seen in events(tmp_path / "scan.results.run"):
        assert [(node, visible.split(",")[0]) for node, visible, _ in seen["found"]] == [
            (node, str(gpu)) for node in ("n1", "n2") for gpu in range(2)
        ]
        assert set(seen["memory"]) == {None}
    assert len(events(tmp_path / "scan.results.run")) == 2


@needs_slurm
def test_submit_says_how_to_follow(cluster, tmp_path, monkeypatch):
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.env[name])
    path = write_recipe(tmp_path, "made/{name}/maps.zarr")
    with_stand_in(tmp_path, 2, 0.01)
    (tmp_path / "site.toml").write_text(f"setup = [\"export PATH='{tmp_path}/bin':$PATH\"]")
    args = [path, "--gpus-per-node", 0, "--site", tmp_path / "site.toml", "--submit"]
    done = command(*args, "--array", tmp_path / "scan.raw")
    assert done.exit_code == 0, done.exception
    job = done.stdout.split("job ")[1].split(",")[0]
    assert cluster.wait(f"{job}_0") == ("COMPLETED", 0)
    assert f"squeue --jobs={job}\n" in done.stdout
    assert f"{tmp_path}/made/scan.slurm-{job}_0.log" in done.stdout
    assert (tmp_path / f"made/scan.slurm-{job}_0.log").exists()
    assert f"gpuem status {path}\n" in done.stdout
    assert some(tmp_path / "made/scan/maps.run", "shard", 2)()


# --- gpuem itself in a real Slurm -----------------------------------------------------------------------------------

BIG = """
[input]
path = {path}
scan = [32, 32]
frame = [512, 512]
dtype = "uint16"

[[analysis]]
kind = "sum"

[[analysis]]
kind = "com"

[run]
device = "cpu"
threads = 2

[output]
path = {output}
previews = false
"""
# in every Python of a job: reading takes its time
SLOW = """
import os, time
read = os.preadv
def slowly(*args):
    time.sleep({seconds})
    return read(*args)
os.preadv = slowly
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """Folder with 512 MB of frames, most of them holes in the file, and the maps of a run without Slurm."""
    folder = tmp_path_factory.mktemp("big")
    rng = np.random.default_rng(5)
    with (folder / "big.raw").open("wb") as file:
        file.truncate(32 * 32 * 512 * 512 * 2)
        for k in range(32 * 32):
            file.seek(k * 512 * 512 * 2 + 1024 * int(rng.integers(500)))
            file.write(rng.integers(0, 1000, 300).astype("u2").tobytes())
    return folder, recipe_of_big(folder, "local.zarr")


def recipe_of_big(folder: Path, output: str) -> Path:
    path = folder / f"{Path(output).name}.toml"
    path.write_text(BIG.format(path=json.dumps(str(folder / "big.raw")), output=json.dumps(output)))
    return path


@pytest.fixture(scope="module")
def truth(big):
    import gpuem

    return gpuem.run_recipe(big[1])[0]


def slow_site(folder: Path, seconds: float, *more: str) -> Site:
    (folder / "slow").mkdir(exist_ok=True)
    (folder / "slow/sitecustomize.py").write_text(SLOW.format(seconds=seconds))
    return Site(setup=[f"export PYTHONPATH={folder}/slow", *more])


def same(found, truth) -> None:
    assert set(found.maps) == set(truth.maps)
    for name, item in truth.maps.items():
        assert item.data.tobytes() == found.maps[name].data.tobytes(), name


MODES = {
    "single": {"gpus": 0},
    "rank": {"nodes": 2, "gpus": 2, "mode": "rank", "cpus": 2},
    "dask": {"nodes": 2, "gpus": 0, "mode": "dask", "cpus": 2},
    "dask cuda": {"nodes": 2, "gpus": 2, "mode": "dask", "cpus": 4},
}


@needs_slurm
@pytest.mark.parametrize("how", MODES)
def test_gpuem_is_stopped_goes_on_and_finds_the_same_bits(cluster, big, truth, nvml, tmp_path, how):
    import gpuem

    fake: tuple[str, ...] = ()
    if how.startswith("dask"):
        pytest.importorskip("distributed")
    if how == "dask cuda":
        pytest.importorskip("dask_cuda")
        fake = (f"export LD_LIBRARY_PATH={nvml}:${{LD_LIBRARY_PATH:-}}", "export DASK_CUDA_TEST_SINGLE_GPU=1")
    path = recipe_of_big(big[0], str(tmp_path / "scan.results.zarr"))
    run = tmp_path / "scan.results.run"
    job = cluster.submit(text_of(path, slow_site(tmp_path, 0.03, *fake), **MODES[how]))
    local_slurm.eventually(
        lambda: some(run, "shard", 4)() or cluster.state(job) in local_slurm.ENDED, 180, "four shards"
    )
    assert cluster.state(job) == "RUNNING", log_of(tmp_path)
    cluster.run("scancel", "--signal=TERM", "--batch", job)
    cluster.requeued(job)
    assert cluster.wait(job, 200) == ("COMPLETED", 0), log_of(tmp_path)
    assert cluster.facts(job)["Restarts"] == "1"
    same(gpuem.load_results(tmp_path / "scan.results.zarr"), truth)
    said = events(run)
    starts = [item for item in said if item["event"] == "start"]
    assert [start["executor"] for start in starts] == [{"single": "local", "rank": "ranks"}.get(how, "dask")] * 2
    assert starts[1]["done"] >= 4
    assert starts[0]["workers"] == {"single": 2, "rank": 4, "dask": 4, "dask cuda": 4}[how]
    # what is finished is not done again
    assert sum(item["event"] == "stop" for item in said) >= 1
    shards = [item["shard"] for item in said if item["event"] == "shard"]
    assert set(shards) <= set(range(starts[0]["shards"]))
    assert len(shards) - len(set(shards)) <= 4


@needs_slurm
def test_gpuem_that_was_cancelled_goes_on_when_submitted_again(cluster, big, truth, tmp_path):
    import gpuem

    path = recipe_of_big(big[0], str(tmp_path / "scan.results.zarr"))
    run = tmp_path / "scan.results.run"
    text = text_of(path, slow_site(tmp_path, 0.03), gpus=0)
    job = cluster.submit(text)
    local_slurm.eventually(some(run, "shard", 2), 120, "some shards are done")
    # gpuem gets this one twice, from Slurm and from the script
    cluster.run("scancel", job)
    assert cluster.wait(job)[0] == "CANCELLED"
    assert some(run, "stop")(), log_of(tmp_path)
    assert cluster.wait(cluster.submit(text)) == ("COMPLETED", 0), log_of(tmp_path)
    assert events(run)[-1]["event"] == "finish"
    assert [item["done"] for item in events(run) if item["event"] == "start"][1] >= 2
    same(gpuem.load_results(tmp_path / "scan.results.zarr"), truth)


@needs_slurm
def test_an_array_of_gpuem(cluster, big, truth, tmp_path):
    import gpuem

    data = tmp_path / "da ta"
    data.mkdir()
    for name in ("it's.raw", "b.raw"):
        (data / name).symlink_to(big[0] / "big.raw")
    (data / "short.raw").write_bytes(b"123")
    path = recipe_of_big(big[0], str(tmp_path / "maps/{name}.zarr"))
    job = command_submits(cluster, path, data)
    assert [cluster.wait(f"{job}_{i}", 200) for i in range(3)] == [("COMPLETED", 0), ("COMPLETED", 0), ("FAILED", 2)]
    for name in ("it's", "b"):
        same(gpuem.load_results(tmp_path / f"maps/{name}.zarr"), truth)
    assert "short.raw" in (tmp_path / f"maps/{path.stem}.slurm-{job}_2.log").read_text()


def command_submits(cluster, path: Path, data: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SLURM_CONF", "PATH"):
            patch.setenv(name, cluster.env[name])
        done = command(path, "--gpus-per-node", 0, "--cpus-per-task", 2, "--submit", "--array", data / "*.raw")
    assert done.exit_code == 0, done.exception
    return done.stdout.split("job ")[1].split(",")[0]


@needs_slurm
def test_several_data_sets_in_one_job(cluster, tmp_path):
    path = write_recipe(tmp_path / "x y", "maps/{name}.zarr")
    for name in ("a", "b"):
        shutil.copy(tmp_path / "x y/scan.raw", tmp_path / f"x y/{name}.raw")
    path.write_text(path.read_text().replace('path = "scan.raw"', 'each = ["a.raw", "b.raw"]'))
    with pytest.raises(RecipeError, match="--array"):
        text_of(path, mode="rank")
    text = command(path, "--gpus-per-node", 0).stdout
    assert 'grep -h \'"event": *"shard"\' ' + shlex.quote(f"{tmp_path}/x y/maps/") + "*.run/events*.jsonl" in text
    assert cluster.wait(cluster.submit(text)) == ("COMPLETED", 0), log_of(tmp_path / "x y")
    assert (tmp_path / "x y/maps/a.zarr").is_dir()
    assert (tmp_path / "x y/maps/b.zarr").is_dir()
