"""Small shards, slow ones, and faults on command: for Dask workers a preload, for others a gpuem that has them inside.

    python tests/small_shards.py run scan.toml     # gpuem with them
    dask worker --preload tests/small_shards.py    # a worker with them

What is to happen stands in files of the folder that GPUEM_TEST_FOLDER names, so that it can change while all runs:
seconds (how long every shard takes), fault-*.json (see `Fault`); `started` there lists what was begun, by whom.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
import time
from pathlib import Path

FRAMES = 2
FOLDER = "GPUEM_TEST_FOLDER"


def fault(folder: Path, name: str, kind: str, **where) -> None:
    """Order a fault: on shards (a list), on the worker of that name, so many times; else always, everywhere."""
    (folder / f"fault-{name}.json").write_text(json.dumps({"kind": kind, **where}))


def started(folder: Path) -> list[int]:
    """Shards in the order in which they were begun."""
    path = folder / "started"
    return [int(line.split()[0]) for line in path.read_text().splitlines()] if path.exists() else []


def cuts(frame_nbytes: int) -> dict[str, int]:
    """Constants of `gpuem.tiles` that make shards of so few frames."""
    names = ("TILE_NBYTES", "RUNS_TILE_NBYTES", "SHARD_NBYTES")
    return {**dict.fromkeys(names, FRAMES * frame_nbytes), "LEAST_FRAMES": 1}


def worker_name() -> str:
    from distributed import get_worker

    try:
        return str(get_worker().name)
    except ValueError:
        return os.environ.get("SLURM_PROCID", "")


def happen(folder: Path, shard: int) -> None:
    """What was ordered for this shard and this worker."""
    from gpuem import errors

    for path in sorted(folder.glob("fault-*.json")):
        rule = json.loads(path.read_text())
        if shard not in rule.get("shards", [shard]) or worker_name() != rule.get("worker", worker_name()):
            continue
        marks = [path.with_suffix(f".{k}") for k in range(rule.get("times", 0))]
        if marks and not any(claimed(mark) for mark in marks):
            continue
        kind = rule["kind"]
        if kind == "kill":
            os.kill(os.getpid(), 9)
        while kind == "hang" and path.exists():
            time.sleep(0.05)
        if kind == "hang":
            continue
        if kind == "strange":
            # it can't be pickled
            raise type("StrangeError", (Exception,), {})("strange")
        raise (getattr(errors, kind, None) or getattr(builtins, kind))(f"ordered {kind}")


def claimed(mark: Path) -> bool:
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def run_shard(job, index, **more):
    folder = Path(os.environ[FOLDER])
    with (folder / "started").open("a") as file:
        file.write(f"{index} {os.getpid()}\n")
    happen(folder, index)
    seconds = folder / "seconds"
    if seconds.exists():
        time.sleep(float(seconds.read_text()))
    from gpuem import engine

    return engine.undisturbed(job, index, **more)


def install() -> None:
    """A preload is run by every worker that is started in a process, and perhaps loaded twice."""
    from gpuem import engine, tiles

    if hasattr(engine, "undisturbed"):
        return
    for name, value in cuts(int(os.environ.get("GPUEM_TEST_FRAME_NBYTES", "512"))).items():
        setattr(tiles, name, value)
    engine.undisturbed = engine.run_shard
    engine.run_shard = run_shard
    local = sys.modules.get("gpuem.executors.local")
    if local is not None:
        local.run_shard = run_shard


def uninstall() -> None:
    """Faults no more."""
    from gpuem import engine

    engine.run_shard = sys.modules["gpuem.executors.local"].run_shard = engine.undisturbed
    del engine.undisturbed


if os.environ.get(FOLDER) and "pytest" not in sys.modules:
    install()

if __name__ == "__main__":
    from gpuem.cli import main

    main()
