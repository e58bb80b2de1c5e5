"""Frames that follow one another are read a few at a time: the right bytes, few of them, and every fault told apart."""

from __future__ import annotations

import errno
import math
import os
import pickle
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuem
from gpuem import engine, job, recipe, tiles
from gpuem.backends import Block, cpu, cpu_load
from gpuem.errors import ReadError
from gpuem.formats.source import File
from gpuem.storage import host

CHOSEN = [gpuem.Sum(), gpuem.VirtualDetector(name="all", shape="disk", outer=99), gpuem.CenterOfMass()]


def stored(data, header, footer, offset):
    """Bytes of a raw file: frames of `data` with noise around them."""
    noise = np.random.default_rng(1)
    parts = [noise.bytes(offset)]
    for frame in data:
        parts += [noise.bytes(header), frame.tobytes(), noise.bytes(footer)]
    return b"".join(parts)


def collected(ds, piece, box, keep):
    """Frames by their index as `load` hands them out, copied before the next are asked for."""
    found, size = {}, math.prod(ds.frame_shape)
    for item in cpu.load(ds.source, ds.files, piece, box, keep):
        for start, index in zip(item.frames.starts.tolist(), item.indices.tolist(), strict=True):
            found[index] = item.frames.pixels[start : start + size].reshape(ds.frame_shape).copy()
    return found


@settings(max_examples=120)
@given(
    frames=st.integers(1, 60),
    shape=st.sampled_from([(1, 1), (3, 5), (8, 8), (16, 4)]),
    dtype=st.sampled_from(["<u2", ">u2", "u1", "<f4", ">f8", "<f2"]),
    around=st.tuples(st.integers(0, 9), st.sampled_from([0, 1, 2, 8, 500]), st.sampled_from([0, 3, 16, 700])),
    limits=st.tuples(st.sampled_from([1, 64, 300, 2048, 1 << 20]), st.sampled_from([0, 16, 400, 1 << 16])),
    share=st.sampled_from([0.05, 0.5, 0.95, 1.0]),
    seed=st.integers(0, 99),
)
def test_any_frames_of_any_file_are_the_frames_of_the_file(
    tmp_path_factory, frames, shape, dtype, around, limits, share, seed
):
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 200, (frames, *shape)).astype(dtype)
    offset, header, footer = around
    path = tmp_path_factory.mktemp("raw") / "a.raw"
    path.write_bytes(stored(data, header, footer, offset))
    ds = gpuem.open(path, frame=shape, dtype=dtype, offset=offset, header=header, footer=footer)
    keep = rng.random(frames) < share
    keep[rng.integers(frames)] = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "READ_NBYTES", limits[0])
        for module in (tiles, cpu_load):
            patch.setattr(module, "GAP_NBYTES", limits[1])
        (piece,) = ds.source.pieces
        patch.setattr(cpu_load, "_memory", threading.local())
        found = collected(ds, piece, (slice(0, frames),), keep)
        kept = sum(array.size for array in vars(cpu_load._memory).values())
        assert kept <= tiles.scratch_nbytes(piece, (frames,), ds.source)
    assert sorted(found) == np.flatnonzero(keep).tolist()
    for index, frame in found.items():
        assert frame.dtype == ds.dtype
        np.testing.assert_array_equal(frame, data[index].astype(ds.dtype))


def test_blocks_are_whole_fours_and_begin_on_cache_lines():
    reference.planted((1000, 32, 32), "u2").tofile("a.raw")
    ds = gpuem.open("a.raw", frame=(32, 32), dtype="u2")
    (piece,) = ds.source.pieces
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "READ_NBYTES", 100_000)
        sizes = []
        for block in cpu.load(ds.source, ds.files, piece, (slice(0, 1000),), np.ones(1000, bool)):
            assert isinstance(block, Block)
            assert (block.frames.pixels.ctypes.data + 2 * block.frames.starts[0]) % 64 == 0
            sizes.append(block.indices.size)
    assert sum(sizes) == 1000
    assert len(sizes) > 10
    assert all(size % 4 == 0 for size in sizes[:-1])


@pytest.fixture
def read(monkeypatch):
    """Every read of a file: (offset, bytes asked for); `read.fail` may refuse one."""
    original = os.preadv

    class Log(list):
        fail = staticmethod(lambda offset, nbytes: None)

    log = Log()

    def preadv(descriptor, buffers, offset, *more):
        nbytes = sum(len(buffer) for buffer in buffers)
        log.append((offset, nbytes))
        error = log.fail(offset, nbytes)
        if error:
            raise OSError(error, os.strerror(error))
        return original(descriptor, buffers, offset, *more)

    monkeypatch.setattr(os, "preadv", preadv)
    return log


def test_a_region_reads_its_frames_and_little_else(read):
    data = reference.planted((40, 64, 64, 64), "u2")
    data.tofile("a.raw")
    ds = gpuem.open("a.raw", scan=(40, 64), frame=(64, 64), dtype="u2")
    region = np.zeros((40, 64), bool)
    region[10:14, 20:30] = True
    found = gpuem.run(ds, CHOSEN, roi=region)
    assert np.array_equal(found["sum/sum"].data, reference.frame_sum(data[region]))
    # rows of the region are 54 frames apart, more than what is read along
    assert len(read) == 4
    assert sum(nbytes for _, nbytes in read) == region.sum() * 8192
    read.clear()
    # every other frame: what is between them is read along, in few calls
    region[:] = False
    region[:, ::2] = True
    found = gpuem.run(ds, CHOSEN, roi=region)
    assert np.array_equal(found["sum/sum"].data, reference.frame_sum(data[region]))
    assert len(read) <= 20
    assert sum(nbytes for _, nbytes in read) <= data.nbytes


def test_nothing_is_mapped():
    reference.planted((64, 64, 64), "u2").tofile("a.raw")
    ds = gpuem.open("a.raw", frame=(64, 64), dtype="u2")
    gpuem.run(ds, CHOSEN)
    assert ds.files._maps == {}


def test_a_file_that_shrinks_while_it_is_read_is_an_error_and_not_the_end_of_the_process():
    data = reference.planted((64, 64, 64), "u2")
    data.tofile("a.raw")
    ds = gpuem.open("a.raw", frame=(64, 64), dtype="u2")
    ds.files.read(0, 0, 1)
    os.truncate("a.raw", 40 * 8192 + 5)
    (piece,) = ds.source.pieces
    items = list(cpu.load(ds.source, ds.files, piece, (slice(0, 64),), np.ones(64, bool)))
    lost = [item for item in items if not isinstance(item, Block)]
    assert [int(item.indices[0]) for item in lost] == list(range(40, 64))
    assert all(item.broken and not item.reading and "truncated" in item.message for item in lost)


def shard_of(ds, **options):
    made = job.prepare(ds, CHOSEN, recipe.run_section(threads=1, **options))
    return made, made.plan.shards[0].index


def test_an_error_of_the_device_is_told_apart_from_broken_bytes(read):
    data = reference.planted((64, 64, 64), "u2")
    data.tofile("a.raw")
    ds = gpuem.open("a.raw", frame=(64, 64), dtype="u2")
    bad = 30 * 8192 + 100
    read.fail = lambda offset, nbytes: errno.EIO if offset <= bad < offset + nbytes else 0
    made, index = shard_of(ds, on_error="mask")
    with pytest.raises(ReadError, match=r"a\.raw: reading .* Input/output error"):
        engine.run_shard(made, index)
    partial = engine.run_shard(made, index, last_try=True)
    assert [item.indices.tolist() for item in partial.lost] == [[30]]
    assert partial.lost[0].reading
    assert np.array_equal(partial.sums.total, reference.frame_sum(np.delete(data, 30, axis=0)))
    read.fail = lambda offset, nbytes: 0
    assert np.array_equal(engine.run_shard(made, index).sums.total, reference.frame_sum(data))


def test_an_error_of_the_device_below_chunks():
    h5py = pytest.importorskip("h5py")
    data = reference.planted((16, 64, 64), "u2")
    with h5py.File("a.h5", "w") as file:
        file.create_dataset("data", data=data, chunks=(1, 64, 64), compression="gzip")
    ds = gpuem.open("a.h5")
    chunks = ds.source.pieces[0].layout
    bad = int(chunks.offset[5]) + 3
    original = os.preadv

    def preadv(descriptor, buffers, offset, *more):
        if offset <= bad < offset + sum(len(buffer) for buffer in buffers):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(descriptor, buffers, offset, *more)

    made, index = shard_of(ds, on_error="mask")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        with pytest.raises(ReadError):
            engine.run_shard(made, index)
        partial = engine.run_shard(made, index, last_try=True)
    assert [item.indices.tolist() for item in partial.lost] == [[5]]


SHIM = r"""
    #define _GNU_SOURCE
    #include <dlfcn.h>
    #include <errno.h>
    #include <stdlib.h>
    #include <sys/uio.h>
    /* a disk that can't read the byte at BAD_BYTE */
    static int bad(const struct iovec *to, int count, off_t at) {
        long end = at, where = atol(getenv("BAD_BYTE"));
        for (int k = 0; k < count; k++) end += to[k].iov_len;
        return at <= where && where < end;
    }
    #define READ(name) ssize_t name(int file, const struct iovec *to, int count, off_t at) { \
        static ssize_t (*real)(int, const struct iovec *, int, off_t); \
        if (!real) real = dlsym(RTLD_NEXT, #name); \
        if (bad(to, count, at)) { errno = EIO; return -1; } \
        return real(file, to, count, at); }
    READ(preadv)
    READ(preadv64)
    #define READ2(name) ssize_t name(int file, const struct iovec *to, int count, off_t at, int flags) { \
        static ssize_t (*real)(int, const struct iovec *, int, off_t, int); \
        if (!real) real = dlsym(RTLD_NEXT, #name); \
        if (bad(to, count, at)) { errno = EIO; return -1; } \
        return real(file, to, count, at, flags); }
    READ2(preadv2)
    READ2(preadv64v2)
    """


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="preloads a library")
def test_a_disk_that_fails_below_the_system_call(tmp_path):
    (tmp_path / "shim.c").write_text(textwrap.dedent(SHIM))
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", "shim.so", "shim.c", "-ldl"], check=True)
    reference.planted((64, 64, 64), "u2").tofile("a.raw")
    code = """
        import gpuem
        ds = gpuem.open("a.raw", frame=(64, 64), dtype="u2")
        ds[3]
        try:
            ds[...]
        except gpuem.DataError as error:
            print(error.frames, error)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"LD_PRELOAD": str(tmp_path / "shim.so"), "BAD_BYTE": str(17 * 8192)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("(17,) frame 17: ")
    assert "Input/output error" in done.stdout


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ENOTCONN])
def test_a_server_that_is_away_when_a_file_is_opened(monkeypatch, code):
    reference.planted((4, 8, 8), "u2").tofile("a.raw")
    ds = gpuem.open("a.raw", frame=(8, 8), dtype="u2")
    original = os.open

    def away(path, *more):
        if str(path).endswith("a.raw"):
            raise OSError(code, os.strerror(code))
        return original(path, *more)

    monkeypatch.setattr(os, "open", away)
    with pytest.raises(ReadError, match="can't be opened"):
        ds.files.read(0, 0, 8)
    monkeypatch.setattr(os, "open", original)
    assert ds.files.read(0, 0, 8).size == 8


def test_files_that_are_gone_or_changed_are_wrong_input_and_not_a_passing_fault():
    reference.planted((4, 8, 8), "u2").tofile("a.raw")
    ds = gpuem.open("a.raw", frame=(8, 8), dtype="u2")
    os.rename("a.raw", "b.raw")
    with pytest.raises(gpuem.InputError, match="is gone"):
        ds.files.read(0, 0, 8)
    with pytest.raises(gpuem.InputError, match="is gone"):
        ds.files.check()
    os.rename("b.raw", "a.raw")
    assert ds.files.read(0, 0, 8).size == 8
    os.utime("a.raw", ns=(1, 1))
    ds.files.reopen()
    with pytest.raises(gpuem.InputError, match="changed"):
        ds.files.read(0, 0, 8)


def test_reopening_while_others_read_reads_no_other_file():
    # a number of a closed file may be given to the next that is opened
    for name, value in (("a.raw", 1), ("b.raw", 2)):
        np.full(1 << 20, value, np.uint8).tofile(name)
    files = host.Files(tuple(File.of(path) for path in map(gpuem_path, ("a.raw", "b.raw"))))
    done, wrong = threading.Event(), []

    def work(k):
        while not done.is_set():
            if (files.read(k, 0, 1 << 20) != k + 1).any():
                wrong.append(k)

    workers = [threading.Thread(target=work, args=(k,)) for k in (0, 1, 0, 1)]
    for worker in workers:
        worker.start()
    for _ in range(300):
        files.reopen()
    done.set()
    for worker in workers:
        worker.join()
    assert not wrong
    files.reopen()
    assert not [name for name in os.listdir("/proc/self/fd") if linked(name).endswith(("a.raw", "b.raw"))]


def gpuem_path(name):
    from pathlib import Path

    return Path(name).absolute()


def linked(name):
    try:
        return os.readlink(f"/proc/self/fd/{name}")
    except OSError:
        return ""


def test_seconds_of_reading_belong_to_the_thread_that_read(read):
    np.zeros(1 << 20, np.uint8).tofile("a.raw")
    files = host.Files((File.of(gpuem_path("a.raw")),))
    assert files.read_seconds() == 0
    files.read(0, 0, 1 << 20)
    first = files.read_seconds()
    assert first > 0
    others = []
    other = threading.Thread(target=lambda: others.append(files.read_seconds()))
    other.start()
    other.join()
    assert others == [0]
    read.fail = lambda offset, nbytes: errno.EIO
    with pytest.raises(ReadError):
        files.read(0, 0, 10)
    # what ended in an error took time as well
    assert files.read_seconds() > first


def test_open_files_travel_as_what_they_are_files_of():
    reference.planted((4, 8, 8), "u2").tofile("a.raw")
    ds = gpuem.open("a.raw", frame=(8, 8), dtype="u2")
    assert ds[1].sum() == pickle.loads(pickle.dumps(ds))[1].sum()
    again = pickle.loads(pickle.dumps(ds.files))
    assert np.array_equal(again.read(0, 0, 8), ds.files.read(0, 0, 8))
