"""gpuem on the CPU against the machine's read ceiling, LiberTEM and h5py + hdf5plugin + NumPy, in one run.

    python bench/cpu.py --peer /path/to/libertem-env/bin/python --gib 2 --out bench/records/cpu.json

All files lie in the page cache. Results are checked before anything is timed. The peers run in between runs of gpuem
and of the ceiling, so that all see the same machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numba
import numpy as np

import gpuem

HERE = Path(__file__).parent
FRAME = (256, 256)


@numba.njit(nogil=True)
def add_up(words):
    total = np.uint64(0)
    for i in range(words.size):
        total += words[i]
    return total


def read_ceiling(path, threads):
    """Seconds to add up all bytes of a mapped file, 8 at a time, in threads: nothing can read it faster."""
    words = np.memmap(path, np.uint64, "r")
    parts = np.array_split(words, threads)
    workers = [threading.Thread(target=add_up, args=(part,)) for part in parts]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - start


def best(run, repeats):
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def counts(frames, seed):
    return np.random.default_rng(seed).poisson(0.7, (frames, *FRAME)).astype(np.uint16)


def write_raw(path, frames):
    block = counts(256, 1)
    with path.open("wb") as stream:
        for k in range(0, frames, 256):
            # no two blocks are alike
            stream.write((block + np.uint16(k % 7)).tobytes())


def write_mib(path, frames):
    sys.path.insert(0, str(HERE.parent / "tests"))
    from merlin_writer import frame_header

    block = counts(256, 2)
    packed = np.ascontiguousarray(block.reshape(256, 256, 64, 4)[..., ::-1]).astype(">u2")
    with path.open("wb") as stream:
        for k in range(frames):
            stream.write(frame_header(k + 1, "R64", 12, FRAME, (1, 1)))
            stream.write(packed[k % 256].tobytes())
    return block


def write_hdf5(path, frames):
    import h5py
    import hdf5plugin

    block = counts(256, 3)
    with h5py.File(path, "w") as file:
        data = file.create_dataset("data", (frames, *FRAME), np.uint16, chunks=(1, *FRAME), **hdf5plugin.Bitshuffle())
        for k in range(0, frames, 256):
            data[k : k + 256] = block


def analyses():
    return {
        "sum": [gpuem.Sum()],
        "annulus": [gpuem.VirtualDetector(name="adf", inner=30, outer=80)],
        "com": [gpuem.CenterOfMass()],
        "three": [gpuem.Sum(), gpuem.VirtualDetector(name="adf", inner=30, outer=80), gpuem.CenterOfMass()],
        "masks16": [
            gpuem.VirtualDetector(name=f"m{k}", shape="mask", mask=mask)
            for k, mask in enumerate(np.random.default_rng(16).random((16, *FRAME)))
        ],
    }


def h5py_three(path):
    """What a careful NumPy user writes: blocks of frames, exact sums, one pass."""
    import h5py
    import hdf5plugin  # noqa: F401

    y, x = np.indices(FRAME)
    d2 = (y - 127.5) ** 2 + (x - 127.5) ** 2
    ring = ((d2 <= 80**2) & (d2 > 30**2)).astype(np.float32).ravel()
    weights = np.stack([ring, np.ones(ring.size, np.float32), y.ravel(), x.ravel()], axis=1).astype(np.float32)
    total = np.zeros(FRAME, np.uint64)
    found = []
    with h5py.File(path) as file:
        data = file["data"]
        for k in range(0, len(data), 64):
            block = data[k : k + 64]
            total += block.sum(axis=0, dtype=np.uint64)
            found.append(block.reshape(len(block), -1).astype(np.float32) @ weights)
    return total, np.concatenate(found)


def peer(python, path, format_, scan, repeats, which):
    command = [
        python,
        str(HERE / "peer_libertem.py"),
        str(path),
        format_,
        str(scan[0]),
        str(scan[1]),
        str(repeats),
        ",".join(which),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line[4:] for line in done.stdout.splitlines() if line.startswith("JSON")]
    if not lines:
        raise SystemExit(f"the peer failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(lines[0])


def fastest(found, job):
    times = {name: jobs[job]["seconds"] for name, jobs in found.items() if job in jobs}
    name = min(times, key=times.get)
    return name, times[name]


def compare(record, label, nbytes, ours, ceiling, theirs=None):
    row = {"gpuem_GB_s": nbytes / ours / 1e9, "of_ceiling": ceiling / ours if ceiling else None}
    if theirs:
        row.update(peer=theirs[0], peer_GB_s=nbytes / theirs[1] / 1e9, ratio=theirs[1] / ours)
    record["results"][label] = row
    shown = ", ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
    print(f"{label:10} {shown}", flush=True)


def bench_raw(record, folder, frames, repeats, python):
    path, scan = folder / "frames.raw", (frames // 128, 128)
    write_raw(path, frames)
    nbytes = path.stat().st_size
    ds = gpuem.open(path, scan=scan, frame=FRAME, dtype="uint16")
    threads = len(os.sched_getaffinity(0))
    theirs = peer(python, path, "raw", scan, repeats, list(analyses())) if python else {}
    for label, chosen in analyses().items():
        found = gpuem.run(ds, chosen)
        if label == "three" and theirs:
            check = next(jobs["three"]["check"] for jobs in theirs.values() if "three" in jobs)
            assert abs(check[0] / float(found["sum/sum"].data.sum()) - 1) < 1e-4, "sums differ"
            assert abs(check[1] / float(found["adf"].data.sum()) - 1) < 1e-4, "annuli differ"
        ceilings, ours = [], []
        for _ in range(repeats):
            ceilings.append(best(lambda: read_ceiling(path, threads), 1))
            ours.append(best(lambda chosen=chosen: gpuem.run(ds, chosen), 1))
        record["ceiling_GB_s"] = max(record.get("ceiling_GB_s", 0), nbytes / min(ceilings) / 1e9)
        compare(record, label, nbytes, min(ours), min(ceilings), fastest(theirs, label) if theirs else None)
    path.unlink()


def bench_mib(record, folder, frames, repeats, python):
    path, scan = folder / "frames.mib", (frames // 128, 128)
    block = write_mib(path, frames)
    ds = gpuem.open(path, scan=scan)
    assert np.array_equal(ds[0, 3], block[3]), "packed frames differ"
    theirs = peer(python, path, "mib", scan, repeats, ["three"]) if python else {}
    ours = best(lambda: gpuem.run(ds, analyses()["three"]), repeats)
    compare(record, "mib12", ds.source.nbytes, ours, None, fastest(theirs, "three") if theirs else None)
    path.unlink()


def bench_hdf5(record, folder, frames, repeats):
    path = folder / "frames.h5"
    write_hdf5(path, frames)
    ds = gpuem.open(path)
    found = gpuem.run(ds, analyses()["three"])
    total, sums = h5py_three(path)
    assert np.array_equal(found["sum/sum"].data, total), "sums differ"
    assert np.array_equal(found["adf"].data, sums[:, 0]), "annuli differ"
    theirs = best(lambda: h5py_three(path), repeats)
    ours = best(lambda: gpuem.run(ds, analyses()["three"]), repeats)
    compare(record, "bslz4", ds.source.nbytes, ours, None, ("h5py + hdf5plugin + NumPy", theirs))
    path.unlink()


def machine():
    model = next(
        (s.split(":")[1].strip() for s in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in s), "?"
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "cpu": model, "processors": len(os.sched_getaffinity(0)), "python": platform.python_version(),
        "numba": numba.__version__, "numpy": np.__version__, "commit": commit, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="python of an environment with libertem 0.16")
    parser.add_argument("--gib", type=float, default=2.0, help="size of the raw file; the others are half of it")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=["raw", "mib", "hdf5"], action="append")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    frames = max(128, int(given.gib * 2**30 / (2 * FRAME[0] * FRAME[1])) // 128 * 128)
    half = max(128, frames // 256 * 128)
    chosen = given.only or ["raw", "mib", "hdf5"]
    record = {"machine": machine(), "frames": frames, "results": {}}
    with tempfile.TemporaryDirectory() as folder:
        if "raw" in chosen:
            bench_raw(record, Path(folder), frames, given.repeats, given.peer)
        if "mib" in chosen:
            bench_mib(record, Path(folder), half, given.repeats, given.peer)
        if "hdf5" in chosen:
            bench_hdf5(record, Path(folder), half, given.repeats)
    print(f"read ceiling {record.get('ceiling_GB_s', 0):.1f} GB/s")
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    main()
