"""Damaged HDF5 files in great number: small files of every layout, mutated by a seeded generator, opened under guard.

`python tests/fuzz_hdf5.py COUNT SEED FOLDER` prints what became of them.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import h5py
import numpy as np

from gpuem.formats.hdf5_check import checksum

FRAMES = (3, 4, 8, 8)
_MARKS = b"TREE HEAP SNOD OHDR FRHP FHDB BTHD BTLF GCOL EAHD EAIB EADB FAHD FADB OCHK \x89HDF".split()
# of the harness, not of gpuem: what takes longer hangs
GUARD_SECONDS = float(os.environ.get("FUZZ_GUARD_SECONDS", "60"))


def write_seeds(folder: Path) -> dict[str, Path]:
    """Small files by name, each in a folder of its own with the files that it needs."""
    data = np.random.default_rng(0).integers(0, 900, FRAMES, dtype=np.uint16)
    found = {}
    for libver in ("earliest", "v110", "latest"):
        for name, options in {
            "contiguous": {},
            "compact": {},
            "chunked": {"chunks": (1, 2, 8, 8)},
            "gzip": {"chunks": (1, 1, 8, 8), "compression": "gzip", "shuffle": True, "fletcher32": True},
            "growing": {"chunks": (1, 1, 8, 8), "maxshape": (None, 4, 8, 8)},
            "growing2": {"chunks": (1, 1, 8, 8), "maxshape": (None, None, 8, 8)},
        }.items():
            path = _new(folder, f"{name}-{libver}")
            with h5py.File(path, "w", libver=libver, userblock_size=512 if name == "chunked" else 0) as file:
                group = file.create_group("entry/data")
                _create(group, name, data, options)
                group.attrs.update({"units": "counts", "step": 0.1, "many": np.arange(9)})
                for k in range(20):
                    file[f"entry/other/value{k}"] = k
            found[path.parent.name] = path
    path = _new(folder, "swmr")
    with h5py.File(path, "w", libver="latest") as file:
        dset = file.create_dataset("data", FRAMES, "<u2", chunks=(1, 1, 8, 8), maxshape=(None, 4, 8, 8))
        file.swmr_mode = True
        dset[...] = data
        dset.flush()
    found["swmr"] = path
    found |= _of_several_files(folder, data)
    return found


def _new(folder: Path, name: str) -> Path:
    (folder / name).mkdir(parents=True)
    return folder / name / "scan_master.h5"


def _create(group: h5py.Group, name: str, data: np.ndarray, options: dict) -> None:
    if name != "compact":
        group.create_dataset("frames", data=data, **options)
        return
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.COMPACT)
    space = h5py.h5s.create_simple(data.shape)
    dset = h5py.h5d.create(group.id, b"frames", h5py.h5t.NATIVE_UINT16, space, plist)
    dset.write(h5py.h5s.ALL, h5py.h5s.ALL, data)


def _of_several_files(folder: Path, data: np.ndarray) -> dict[str, Path]:
    """A virtual data set, a master with external links, external raw files."""
    found = {}
    for libver in ("earliest", "latest"):
        path = _new(folder, f"virtual-{libver}")
        layout = h5py.VirtualLayout(data.shape, data.dtype)
        for k in range(len(data)):
            with h5py.File(path.with_name(f"part{k}.h5"), "w", libver=libver) as file:
                file["data"] = data[k]
            layout[k] = h5py.VirtualSource(f"part{k}.h5", "data", data[k].shape)
        with h5py.File(path, "w", libver=libver) as file:
            file.create_virtual_dataset("data", layout)
        found[path.parent.name] = path
        path = _new(folder, f"linked-{libver}")
        with h5py.File(path, "w", libver=libver) as file:
            for k in range(len(data)):
                with h5py.File(path.with_name(f"scan_data_{k}.h5"), "w", libver=libver) as target:
                    target.create_dataset("entry/data/data", data=data[k], chunks=(1, 8, 8))
                file[f"entry/data/data_{k:06d}"] = h5py.ExternalLink(f"scan_data_{k}.h5", "entry/data/data")
            file["entry/soft"] = h5py.SoftLink("/entry/data")
        found[path.parent.name] = path
        path = _new(folder, f"external-{libver}")
        data.tofile(path.with_name("frames.raw"))
        with h5py.File(path, "w", libver=libver) as file:
            file.create_dataset("data", data.shape, "<u2", external=[("frames.raw", 0, data.nbytes)])
        found[path.parent.name] = path
    return found


def mutate(whole: bytes, rng: np.random.Generator) -> bytes:
    """One mutant: cut off, or with damaged bytes, addresses, sizes."""
    data = bytearray(whole)
    size = len(data)
    # where HDF5's own tables are, mostly
    marks = [k for mark in _MARKS for k in _all(whole, mark)]

    def place() -> int:
        near = marks and rng.random() < 0.7
        return min(size - 9, int(rng.choice(marks)) + int(rng.integers(0, 200)) if near else int(rng.integers(size)))

    kind = int(rng.integers(9))
    if kind == 0:
        return bytes(data[: size * int(rng.integers(1, 32)) // 32])
    if kind == 1:
        return bytes(data[: int(rng.integers(8, size))])
    if kind == 2:
        # cut off, and the superblock agrees
        stop = int(rng.integers(size // 4, size))
        for at in _all(whole, size.to_bytes(8, "little")):
            data[at : at + 8] = stop.to_bytes(8, "little")
        return bytes(data[:stop])
    for _ in range(int(rng.integers(1, 4))):
        at = max(0, place())
        if kind in (3, 4):
            data[at] = int(rng.integers(256))
        elif kind == 5:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 6:
            values = (0, 1, size, size - 1, 2**63, 2**64 - 1, 2**32, 2**31, int(rng.choice(marks or [0])))
            width = int(rng.choice([1, 2, 4, 8]))
            value = values[int(rng.integers(len(values)))] % 256**width
            at = at // 2 * 2
            data[at : at + width] = value.to_bytes(width, "little")
        elif kind == 7:
            other, count = int(rng.integers(size)), int(rng.integers(1, 64))
            data[at : at + count] = data[other : other + count]
        else:
            count = int(rng.integers(1, 40))
            data[at : at + count] = bytes(min(count, size - at))
    return bytes(seal(data) if rng.random() < 0.5 else data)


def seal(data: bytearray) -> bytearray:
    """Make the checksums of the superblock and of object headers right again: who damages on purpose would."""
    if data[:8] == b"\x89HDF\r\n\x1a\n" and data[8] > 1:
        data[44:48] = checksum(bytes(data[:44])).to_bytes(4, "little")
    for at in _all(bytes(data), b"OHDR"):
        flags = data[at + 5] if at + 5 < len(data) else 0
        start = at + 6 + 16 * bool(flags & 0x20) + 4 * bool(flags & 0x10)
        width = 1 << (flags & 3)
        stop = start + width + int.from_bytes(data[start : start + width], "little")
        if stop + 4 <= len(data):
            data[stop : stop + 4] = checksum(bytes(data[at:stop])).to_bytes(4, "little")
    return data


def _all(whole: bytes, mark: bytes) -> list[int]:
    found, at = [], whole.find(mark)
    while at >= 0:
        found.append(at)
        at = whole.find(mark, at + 1)
    return found


def worker() -> None:
    """Open the files named on standard input and say what became of each."""
    import gpuem

    for line in sys.stdin:
        path, fit = line.rstrip("\n").rsplit(" ", 1)
        try:
            ds = gpuem.open(path, fit=fit == "True")
            outcome = "opened"
            if ds.source.nbytes < 1 << 26:
                ds[...]
                outcome = "read"
        except gpuem.GpuemError as error:
            outcome = f"refused {type(error).__name__}"
        except BaseException as error:  # noqa: BLE001
            outcome = f"UNEXPECTED {type(error).__name__}: {error}".replace("\n", " ")
        print(outcome, flush=True)


class Guard:
    """A worker process that is started anew when it ends or hangs."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def open(self, path: Path, fit: bool) -> str:
        """What became of one file: read, opened, refused NAME, UNEXPECTED NAME, SIGNAL n, HANGS."""
        if self.process is None:
            self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.process.stdin.write(f"{path} {fit}\n".encode())
        self.process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(GUARD_SECONDS):
                self.close()
                return "HANGS"
        line = self.process.stdout.readline().decode()
        if line:
            return line.strip()
        code = self.process.wait()
        self.process = None
        return f"SIGNAL {-code}" if code < 0 else f"UNEXPECTED end with {code}"

    def close(self) -> None:
        """End the worker."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None


def fuzz(count: int, seed: int, folder: Path, keep: Path | None = None) -> Counter:
    """Mutate and open so many files: how often each outcome was seen, what must not be with the mutant's number."""
    seeds = list(write_seeds(folder).items())
    rng = np.random.default_rng(seed)
    seen: Counter = Counter()
    with contextlib.closing(Guard()) as guard:
        for number in range(count):
            name, path = seeds[int(rng.integers(len(seeds)))]
            whole, fit = path.read_bytes(), bool(rng.integers(2))
            mutant = path.with_name("mutant.h5")
            mutant.write_bytes(mutate(whole, rng))
            outcome = guard.open(mutant, fit)
            bad = outcome.startswith(("UNEXPECTED", "SIGNAL", "HANGS"))
            seen[f"{outcome} (number {number}, {name}, fit={fit})" if bad else outcome] += 1
            if bad and keep:
                (keep / f"{seed}-{number}-{name}.h5").write_bytes(mutant.read_bytes())
    return seen


if __name__ == "__main__":
    if len(sys.argv) == 1:
        worker()
    else:
        kept = Path(sys.argv[3])
        kept.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            for outcome, times in sorted(fuzz(int(sys.argv[1]), int(sys.argv[2]), Path(scratch), kept).items()):
                print(times, outcome)
