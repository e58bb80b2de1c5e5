"""How much of a file is cached: against a look at every single page, and against what the test itself put there."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from gpuem.errors import InputError
from gpuem.storage.residency import cached_share

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what it caches")

PAGE = mmap.PAGESIZE


def write(path, size):
    """A file whose pages are all cached and clean."""
    path.write_bytes(np.random.default_rng(size).bytes(size))
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    return path


def drop(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    if every_page(path).any():
        pytest.skip(f"the file system of {path.parent} keeps pages it was told to drop")


def read(path, start, size):
    """Read exactly these bytes: without read-ahead, so that nothing else becomes cached."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(descriptor, size, start)
    os.close(descriptor)


def every_page(path):
    """Naive reference: the whole file mapped at once, and every page asked about."""
    size = path.stat().st_size
    states = np.zeros(-(-size // PAGE), np.uint8)
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
    view = np.frombuffer(mapping, np.uint8)
    pointers = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), ctypes.c_void_p(states.ctypes.data)
    assert ctypes.CDLL(None).mincore(*pointers) == 0
    return (states & 1).astype(bool)


@pytest.mark.parametrize(
    "size", [1, 5, PAGE - 1, PAGE, PAGE + 1, 1_000_003, 64 * 4 * PAGE, 64 * 4 * PAGE + 1, 9_000_011]
)
def test_all_of_a_fresh_file_is_cached_and_nothing_of_a_dropped_one(tmp_path, size):
    path = write(tmp_path / "data", size)
    assert cached_share(path) == 1.0
    drop(path)
    assert cached_share(path) == 0.0
    # asking has fetched nothing
    assert not every_page(path).any()


@pytest.mark.parametrize("part", [0.0, 0.5])
def test_half_of_a_file(tmp_path, part):
    size = 10_000 * PAGE
    path = write(tmp_path / "data", size)
    drop(path)
    read(path, int(part * size), size // 2)
    assert every_page(path).mean() == pytest.approx(0.5, abs=0.001)
    assert cached_share(path) == pytest.approx(0.5, abs=0.02)


def test_small_files_are_looked_at_page_by_page(tmp_path):
    path = write(tmp_path / "data", 61 * PAGE + 7)
    drop(path)
    for page in (0, 3, 4, 31, 61):
        read(path, page * PAGE, 1)
    assert 0 < cached_share(path) < 1
    assert cached_share(path) == every_page(path).mean()


@pytest.mark.parametrize("samples", [1, 2, 7])
def test_the_two_ends_are_looked_at(tmp_path, samples):
    pages = 2_003
    path = write(tmp_path / "data", pages * PAGE - 5)
    drop(path)
    read(path, (pages - 4) * PAGE, 4 * PAGE)
    assert cached_share(path, samples) == (pytest.approx(1 / samples) if samples > 1 else 0.0)
    read(path, 0, 4 * PAGE)
    assert cached_share(path, samples) == pytest.approx(min(1, 2 / samples))


def test_a_descriptor_serves_as_well_and_stays_open(tmp_path):
    path = write(tmp_path / "data", 40 * PAGE)
    drop(path)
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(descriptor, 10 * PAGE, 0)
    assert cached_share(descriptor) == 0.25
    assert os.fstat(descriptor).st_size == 40 * PAGE
    os.close(descriptor)


def test_an_empty_file_is_cached(tmp_path):
    path = tmp_path / "empty"
    path.touch()
    assert cached_share(path) == 1.0


def test_a_large_file_costs_no_more_than_a_small_one(tmp_path):
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(8_000_000_001)
        file.write(bytes(64 * PAGE))
    start = time.perf_counter()
    share = cached_share(path)
    assert time.perf_counter() - start < 1
    # the written pages hold the first sample of 64
    assert share == pytest.approx(1 / 64)


def test_no_descriptor_is_left_open(tmp_path):
    path = write(tmp_path / "data", 300 * PAGE)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        cached_share(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_unknown_where_the_file_belongs_to_someone_else(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can hand a process to another user")
    path = write(tmp_path / "data", 100 * PAGE)
    drop(path)
    descriptor = os.open(path, os.O_RDONLY)
    code = (
        "import os; from gpuem.storage.residency import cached_share\n"
        f"os.setuid(65534); print(cached_share({descriptor}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], pass_fds=[descriptor], capture_output=True, text=True, check=True
    )
    os.close(descriptor)
    assert done.stdout.strip() == "None"


def test_unknown_elsewhere_and_for_what_cannot_be_mapped(tmp_path, monkeypatch):
    path = write(tmp_path / "data", PAGE)
    assert cached_share(path) == 1.0
    assert cached_share(tmp_path) is None
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cached_share(path) is None


def test_a_missing_file_is_an_error_with_its_name(tmp_path):
    with pytest.raises(InputError, match=r"none\.raw: No such file"):
        cached_share(tmp_path / "none.raw")
