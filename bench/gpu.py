"""gpuem on a GPU against the ceilings of the same machine, measured in the same run; see README.md beside this file.

    python bench/gpu.py --tests --out FOLDER

runs the tests that need a GPU, then everything that is measured here, within --minutes, and writes one JSON record to
FOLDER, anew after every section: a run that is ended early leaves what it has found.
"""

from __future__ import annotations

import argparse
import functools
import json
import operator
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# the checkout that this file lies in is what is measured, installed or not
sys.path[:0] = [str(HERE.parent), str(HERE)]

import gpu_kernels  # noqa: E402
import gpu_measure  # noqa: E402
import gpu_peers  # noqa: E402
import gpu_runs  # noqa: E402
import gpu_strain  # noqa: E402
import numpy as np  # noqa: E402
from gpu_data import Bench, NotMeasuredError  # noqa: E402

from gpuem.backends import cuda_device  # noqa: E402

Record = dict[str, Any]
GIB = 1 << 30
# of the time that is left, what the tests may take
TESTS_SHARE = 0.55
MEETS = {">=": operator.ge, "<=": operator.le}


def main(arguments: list[str] | None = None) -> Record:
    given = parse(arguments)
    deadline = time.monotonic() + 60 * given.minutes
    gpu = cuda_device.gpu()
    record: Record = {"machine": machine(given.commit), "arguments": shown(given), "sections": {}, "targets": []}
    slug = re.sub(r"\W+", "-", gpu.name.lower()).strip("-")
    out = given.out / f"gpu-{slug}-{time.strftime('%Y-%m-%d')}.json"
    save(out, record)
    if given.tests:
        record["tests"] = tests(given.out, TESTS_SHARE * (deadline - time.monotonic()))
        save(out, record)
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="gpuem-bench-") as folder:
        bench = make_bench(given, Path(folder), gpu.free)
        record["data"] = {"frames": bench.frames, "frame": bench.shape, "dtype": "uint16", "bytes": bench.nbytes}
        for name, section in sections(bench, given, deadline).items():
            if given.only and name not in given.only:
                continue
            record["sections"][name] = guarded(bench, section, deadline)
            add_ratios(record)
            record["targets"] = targets(record)
            save(out, record)
    print(table(record))
    print(f"record: {out}")
    return record


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-record"), help="folder for the record")
    parser.add_argument("--tests", action="store_true", help="first run pytest -m gpu --require-gpu")
    parser.add_argument("--minutes", type=float, default=9, help="sections that would begin later are skipped")
    parser.add_argument("--gib", type=float, default=16, help="size of the data; at most a quarter of the GPU's memory")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where data are written; default the system's temporary folder")
    parser.add_argument("--commit", help="of the checkout, where there is no .git")
    parser.add_argument("--peer-python", default=sys.executable, help="python that has libertem and py4DSTEM")
    parser.add_argument("--only", action="append", help="a section; may be given several times")
    parser.add_argument("--quick", action="store_true", help="tiny data: tries the benchmark out, measures nothing")
    return parser.parse_args(arguments)


def shown(given: argparse.Namespace) -> Record:
    """The arguments that tell what was measured; where files lay on that machine is nobody's business."""
    return {name: getattr(given, name) for name in ("tests", "minutes", "gib", "repeats", "only", "quick")}


def make_bench(given: argparse.Namespace, folder: Path, free: int) -> Bench:
    """The sizes: whole rows of a scan of 16 positions, an even number of them."""
    if given.quick:
        return Bench(folder, 96, (32, 48), 2)
    frames = int(min(given.gib * GIB, free / 4)) // (2 * 256 * 256) // 32 * 32
    return Bench(folder, frames, (256, 256), given.repeats)


def sections(bench: Bench, given: argparse.Namespace, deadline: float) -> dict[str, Callable[[], Record]]:
    """What is measured, in this order: compiling first, while NVRTC has done nothing yet."""

    def peers() -> Record:
        return gpu_peers.compare(bench, given.peer_python, (deadline - time.monotonic()) / 2)

    on_bench: dict[str, Callable[[Bench], Record]] = {
        "compiling": gpu_runs.compiling,
        "ceilings": gpu_measure.ceilings,
        "resident kernels": gpu_kernels.resident,
        "streamed": gpu_runs.streamed,
        "overlap": gpu_runs.overlap,
        "decoding": gpu_kernels.decoding,
        "resident data set": gpu_runs.on_resident,
        "strain": gpu_strain.strain,
        "GPUDirect": gpu_runs.direct,
    }
    return {**{name: functools.partial(section, bench) for name, section in on_bench.items()}, "peers": peers}


def guarded(bench: Bench, section: Callable[[], Record], deadline: float) -> Record:
    """A section's results, or why there are none; the next one goes on in any case."""
    if time.monotonic() > deadline:
        return {"status": "skipped", "reason": "the time was used up"}
    import cupy

    # what the last section left in the pool would count as taken in the plans of this one
    cupy.get_default_memory_pool().free_all_blocks()
    started, before = time.monotonic(), len(bench.checks)
    found: Record = {}
    try:
        found = {"status": "ok", "results": section()}
    except NotMeasuredError as reason:
        found = {"status": "not measured", "reason": str(reason)}
    except Exception as error:  # noqa: BLE001 - one broken section must not take the others along
        found = {"status": "failed", "reason": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    return {**found, "section_seconds": time.monotonic() - started, "checks_passed": bench.checks[before:]}


def tests(out: Path, patience: float, *which: str) -> Record:
    """The tests that need a GPU, all or some, in a process of their own; what they print goes to a file."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "pytest.txt"
    # files without such tests may import what isn't here; conftest.py sees to it that the others say mark.gpu
    files = [str(f.relative_to(HERE.parent)) for f in sorted(HERE.parent.glob("tests/test_*.py"))
             if "mark.gpu" in f.read_text(encoding="utf-8")]  # fmt: skip
    # one that can't be imported must not keep the others from running
    options = ["-m", "gpu", "--require-gpu", "--continue-on-collection-errors", "--durations=10"]
    command = [sys.executable, "-m", "pytest", *options, *(which or files)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    started, code = time.monotonic(), "timed out"
    with path.open("w") as stream:
        try:
            done = subprocess.run(
                command, cwd=HERE.parent, env=environment, stdout=stream, stderr=subprocess.STDOUT, timeout=patience
            )
            code = str(done.returncode)
        except subprocess.TimeoutExpired:
            pass
    lines = path.read_text(errors="replace").splitlines()
    return {
        "command": " ".join(["python", *command[1:]]), "exit": code, "passed": code == "0", "last_lines": lines[-25:],
        "seconds": time.monotonic() - started,
    }  # fmt: skip


def machine(commit: str | None) -> Record:
    """What everything ran on."""
    import cupy
    from cupy.cuda import nvrtc

    gpu = cuda_device.gpu()
    model = [s.split(":")[1].strip() for s in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in s]
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    described = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() if which("git") else ""
    return {
        "device": gpu.name, "capability": gpu.capability, "device_bytes": gpu.total, "driver": driver(),
        "cuda_driver": gpu.driver, "cuda_runtime": gpu.runtime, "nvrtc": ".".join(map(str, nvrtc.getVersion())),
        "cupy": cupy.__version__, "numpy": np.__version__, "python": platform.python_version(), "cpu": (*model, "?")[0],
        "processors": len(os.sched_getaffinity(0)), "system": platform.platform(),
        "commit": commit or described or "unknown", "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }  # fmt: skip


def which(program: str) -> bool:
    return shutil.which(program) is not None


def driver() -> str:
    """Version of NVIDIA's driver."""
    if not which("nvidia-smi"):
        return "unknown: no nvidia-smi"
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.split()
    return said[0] if said else "unknown"


def results(record: Record, section: str, *path: str) -> Any:
    """A value of the record, or None where it isn't."""
    value = record["sections"].get(section, {}).get("results")
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def add_ratios(record: Record) -> None:
    """Put beside each rate how much of its ceiling it is."""
    bus, file = (results(record, "ceilings", name, "GB_s") for name in ("pinned to device", "file read"))
    ceilings = {
        "of_device_read": (
            results(record, "ceilings", "device read", "GB_s"),
            ("resident kernels", "resident data set"),
        ),
        "of_device_copy": (results(record, "ceilings", "device copy", "GB_s"), ("decoding",)),
        "of_slower_wire": (min(bus, file) if bus and file else None, ("streamed",)),
    }
    for key, (ceiling, sections) in ceilings.items():
        for one in (one for name in sections for one in (results(record, name) or {}).values()):
            rate = one["stored_bytes"] / one["seconds"] / 1e9 if key == "of_slower_wire" else one["GB_s"]
            one[key] = rate / ceiling if ceiling else None


def targets(record: Record) -> list[Record]:
    """What was promised, what was found, and whether it is met; None where it was not measured."""
    get = functools.partial(results, record)
    found = [
        (f"resident {name}, of the device's read rate", get("resident kernels", name, "of_device_read"), ">=", wanted)
        for name, wanted in (("sum", 0.8), ("annulus", 0.8), ("com", 0.8), ("sum, annulus, com", 0.6))
    ]
    found += [
        ("streamed plain uint16, of pinned copy or file read", get("streamed", "plain uint16", "of_slower_wire"),
         ">=", 0.85),
        ("streamed bitshuffle-LZ4, GB/s decoded", get("streamed", "bitshuffle-LZ4", "GB_s"), ">=", 60),
        ("compiling on a fresh machine, seconds", get("compiling", "cold", "compile_seconds"), "<=", 10),
        ("kernels compiled by the next process", get("compiling", "warm", "kernels"), "<=", 0),
        ("strain, patterns/s resident", get("strain", "resident", "patterns_per_s"), ">=", 100_000),
        ("strain, patterns/s streamed", get("strain", "streamed", "patterns_per_s"), ">=", 50_000),
    ]  # fmt: skip
    for name in ("plain uint16", "bitshuffle-LZ4"):
        found.append((f"wall time of longest stage, {name}", get("overlap", name, "wall_to_longest"), "<=", 1.15))
        peak, planned = (get("streamed", name, key) for key in ("peak_device_bytes", "planned_device_bytes"))
        found.append((f"peak device memory of plan, {name}", peak / planned if planned else None, "<=", 1))
    found += [(f"times as fast as {name}", get("peers", name, "ratio"), ">=", 20) for name in gpu_peers.MODULES]
    return [
        # tiny data measure nothing
        {"what": what, "wanted": f"{sign} {wanted}", "found": value,
         "met": None if value is None or record["arguments"]["quick"] else MEETS[sign](value, wanted)}
        for what, value, sign, wanted in found
    ]  # fmt: skip


def save(path: Path, record: Record) -> None:
    """Write the record whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(record, indent=1) + "\n")
    beside.replace(path)


def table(record: Record) -> str:
    """The record for people."""
    device = record["machine"]
    lines = [f"{device['device']}, driver {device['driver']}, CuPy {device['cupy']}, commit {device['commit']}"]
    if "tests" in record:
        lines.append(f"tests: exit {record['tests']['exit']}: {(record['tests']['last_lines'] or ['nothing'])[-1]}")
    for name, section in record["sections"].items():
        lines.append(f"\n{name}: {section['status']}{', ' + section['reason'] if 'reason' in section else ''}")
        for label, one in section.get("results", {}).items():
            lines.append(f"  {label:<34}{describe(one)}")
    words = {True: "met", False: "NOT MET", None: "not measured"}
    lines.append("\ntargets")
    for one in record["targets"]:
        value = "" if one["found"] is None else f"{one['found']:.3g}"
        lines.append(f"  {one['what']:<56}{one['wanted']:>8}{value:>10}  {words[one['met']]}")
    return "\n".join(lines)


def describe(one: Record) -> str:
    """One result in a line: its rate, and the other numbers that say something."""
    words = [f"{one['GB_s']:10.2f} GB/s" if "GB_s" in one else ""]
    words += [
        f"{one[key]:.1%} {key.replace('_', ' ')}" for key in one if key.startswith("of_") and one[key] is not None
    ]
    said = (
        "compile_seconds",
        "kernels",
        "wall_to_longest",
        "ratio",
        "encoder",
        "gpuem_GB_s",
        "not installed",
        "failed",
    )
    words += [
        f"{key} {one[key]:.3g}" if isinstance(one[key], float) else f"{key} {one[key]}" for key in said if key in one
    ]
    return "  ".join(word for word in words if word)


if __name__ == "__main__":
    done = main()
    failed = [name for name, section in done["sections"].items() if section["status"] == "failed"]
    sys.exit(1 if failed or not done.get("tests", {}).get("passed", True) else 0)
