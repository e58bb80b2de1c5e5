"""Chunk codecs against what other libraries wrote, against slow references, and against damage."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import struct
import sys
from concurrent.futures import ThreadPoolExecutor

import imagecodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuem.codecs import bitshuffle, planes
from gpuem.codecs.chunks import decode, known
from gpuem.errors import DataError
from gpuem.formats.source import Step


def bit_planes(pixels: np.ndarray) -> np.ndarray:
    """What bitshuffle makes of a block: a naive transpose of a matrix of single bits, (pixel, bit) to (bit, pixel)."""
    size = pixels.dtype.itemsize
    bits = np.unpackbits(pixels.view(np.uint8).reshape(-1, size), axis=1, bitorder="little")
    return np.packbits(bits.T.copy(), axis=1, bitorder="little").reshape(-1)


def lz4(data: np.ndarray) -> bytes:
    return imagecodecs.lz4_encode(np.ascontiguousarray(data).tobytes(), header=False)


def framed(blocks: list[bytes], total: int, block: int) -> bytes:
    return struct.pack(">QI", total, block) + b"".join(struct.pack(">I", len(b)) + b for b in blocks)


def bitshuffled(pixels: np.ndarray, block: int = 8192, pack=lz4) -> bytes:
    """Bitshuffle with compressed blocks as HDF5 filter 32008 writes it."""
    group = 8 * pixels.dtype.itemsize
    flat = np.ascontiguousarray(pixels).reshape(-1)
    whole = flat.nbytes // group * group
    cuts = [flat.view(np.uint8)[o : min(o + block, whole)] for o in range(0, whole, block)]
    return (
        framed([pack(bit_planes(c.view(flat.dtype))) for c in cuts], flat.nbytes, block)
        + flat.view("u1")[whole:].tobytes()
    )


def shuffled(data: np.ndarray, size: int) -> np.ndarray:
    n = data.size // size
    return np.concatenate([data[: n * size].reshape(n, size).T.reshape(-1), data[n * size :]])


def as_bytes(data: bytes | np.ndarray) -> np.ndarray:
    return np.frombuffer(bytes(data), np.uint8)


def with_checksum(data: bytes) -> bytes:
    return data + struct.pack("<I", int(imagecodecs.h5checksum_fletcher32(as_bytes(data))))


COUNTS = np.random.default_rng(1).poisson(0.7, (41, 53)).astype("<u2")
PLAIN = COUNTS.tobytes()
ENCODED = {
    "bitshuffle-lz4": ((Step("bitshuffle", (2, 0, 2)),), bitshuffled(COUNTS, 1024)),
    "bitshuffle-zstd": (
        (Step("bitshuffle", (2, 0, 3)),),
        bitshuffled(COUNTS, 1024, lambda b: imagecodecs.zstd_encode(b.tobytes())),
    ),
    "lz4": ((Step("lz4"),), framed([lz4(as_bytes(PLAIN[o : o + 999])) for o in range(0, 4346, 999)], 4346, 999)),
    "deflate": ((Step("deflate"),), imagecodecs.zlib_encode(PLAIN)),
    "shuffled": (
        (Step("deflate"), Step("shuffle", (2,))),
        imagecodecs.zlib_encode(shuffled(as_bytes(PLAIN), 2).tobytes()),
    ),
    "zstd": ((Step("zstd"),), imagecodecs.zstd_encode(PLAIN)),
    "lzf": ((Step("lzf"),), imagecodecs.lzf_encode(PLAIN, header=False)),
    "blosc": ((Step("blosc"),), imagecodecs.blosc_encode(PLAIN, typesize=2, shuffle=1, compressor="lz4")),
    "fletcher32": ((Step("fletcher32"),), with_checksum(PLAIN)),
    "checked": ((Step("fletcher32"), Step("deflate")), with_checksum(imagecodecs.zlib_encode(PLAIN))),
    "checksum inside": ((Step("deflate"), Step("fletcher32")), imagecodecs.zlib_encode(with_checksum(PLAIN))),
}
assert len(PLAIN) == 4346


@pytest.mark.parametrize("name", ENCODED)
def test_decodes(name):
    steps, raw = ENCODED[name]
    assert known(steps) == []
    assert decode(steps, 0, as_bytes(raw), len(PLAIN)).tobytes() == PLAIN
    out = np.zeros(len(PLAIN), np.uint8)
    assert decode(steps, 0, as_bytes(raw), len(PLAIN), out=out) is out
    assert out.tobytes() == PLAIN


def test_no_step_hands_the_bytes_through():
    assert decode((), 0, as_bytes(PLAIN), len(PLAIN)).tobytes() == PLAIN
    with pytest.raises(DataError, match="4345 bytes instead of 4346"):
        decode((), 0, as_bytes(PLAIN[:-1]), len(PLAIN))


def test_skipped_steps_count_in_the_order_of_writing():
    # written as shuffle (bit 0), deflate (bit 1), fletcher32 (bit 2)
    steps = (Step("fletcher32"), Step("deflate"), Step("shuffle", (2,)))
    mixed = shuffled(as_bytes(PLAIN), 2).tobytes()
    stored = {
        0b000: with_checksum(imagecodecs.zlib_encode(mixed)),
        0b001: with_checksum(imagecodecs.zlib_encode(PLAIN)),
        0b010: with_checksum(mixed),
        0b100: imagecodecs.zlib_encode(mixed),
        0b110: mixed,
        0b111: PLAIN,
    }
    for skipped, raw in stored.items():
        assert decode(steps, skipped, as_bytes(raw), len(PLAIN)).tobytes() == PLAIN, bin(skipped)


def test_unknown_steps_are_named():
    assert known((Step("szip"), Step("deflate"))) == ["szip"]
    with pytest.raises(DataError, match="szip"):
        decode((Step("szip"),), 0, as_bytes(PLAIN), 10)


def test_old_byte_order_of_the_checksum_is_accepted_and_a_wrong_one_is_not():
    told = struct.unpack("<I", with_checksum(PLAIN)[-4:])[0]
    swapped = (told & 0x00FF00FF) << 8 | told >> 8 & 0x00FF00FF
    steps = (Step("fletcher32"),)
    assert decode(steps, 0, as_bytes(PLAIN + struct.pack("<I", swapped)), len(PLAIN)).tobytes() == PLAIN
    with pytest.raises(DataError, match="checksum"):
        decode(steps, 0, as_bytes(PLAIN + struct.pack("<I", told ^ 1)), len(PLAIN))


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("wrong", [-4346, -1, 1, 2, 1 << 20])
def test_a_length_that_does_not_fit_is_an_error(name, wrong):
    steps, raw = ENCODED[name]
    with pytest.raises(DataError):
        decode(steps, 0, as_bytes(raw), len(PLAIN) + wrong)


@pytest.mark.parametrize("name", ENCODED)
def test_truncated_chunks_are_errors(name):
    steps, raw = ENCODED[name]
    for length in [*range(0, 40), *range(40, len(raw) - 1, 37), len(raw) - 1]:
        try:
            found = decode(steps, 0, as_bytes(raw[:length]), len(PLAIN))
        except DataError:
            continue
        # deflate and zstd end with a checksum that isn't needed to decode
        assert found.tobytes() == PLAIN
        assert length > len(raw) - 8


@pytest.mark.parametrize("name", ENCODED)
def test_damaged_chunks_never_crash(name):
    """Flipped bits, overwritten words and cut-out stretches: an error, or as many bytes as were asked for."""
    steps, raw = ENCODED[name]
    rng = np.random.default_rng(7)
    good = as_bytes(raw)
    for _ in range(500):
        bad = good.copy()
        place = int(rng.integers(bad.size))
        kind = rng.integers(4)
        if kind == 0:
            bad[place] ^= 1 << rng.integers(8)
        elif kind == 1:
            bad[place : place + 4] = rng.choice([0, 255, 128])
        elif kind == 2:
            bad = np.delete(bad, slice(place, place + int(rng.integers(1, 9))))
        else:
            bad[:16] = rng.integers(0, 256, bad[:16].size)
        with contextlib.suppress(DataError):
            assert decode(steps, 0, bad, len(PLAIN)).size == len(PLAIN)


@pytest.mark.parametrize("name", ["fletcher32", "checked"])
def test_a_checksum_finds_every_flipped_bit(name):
    steps, raw = ENCODED[name]
    for place in range(0, len(raw), 13):
        bad = as_bytes(raw).copy()
        bad[place] ^= 1 << place % 8
        with pytest.raises(DataError):
            decode(steps, 0, bad, len(PLAIN))


def test_damaged_lz4_blocks_write_nothing_outside_their_room():
    """Thousands of damaged blocks, decoded into the middle of a guarded buffer."""
    rng = np.random.default_rng(3)
    plain = bit_planes(COUNTS.reshape(-1)[:2048])
    good = as_bytes(lz4(plain))
    room = np.full(plain.size + 256, 0xA5, np.uint8)
    errors = 0
    for _ in range(4000):
        bad = good.copy()
        for _ in range(rng.integers(1, 4)):
            bad[rng.integers(bad.size)] = rng.integers(256)
        room[:] = 0xA5
        inner = room[64 : 64 + plain.size + bitshuffle.SLACK]
        errors += bitshuffle.lz4_block(bad, 0, bad.size, inner, 0, plain.size) != 0
        assert (room[:64] == 0xA5).all()
        assert (room[64 + inner.size :] == 0xA5).all()
    assert errors > 500
    # with no slack at all, the careful path must hold as well
    for _ in range(1000):
        bad = good.copy()
        bad[rng.integers(bad.size)] = rng.integers(256)
        room[:] = 0xA5
        bitshuffle.lz4_block(bad, 0, bad.size, room[64 : 64 + plain.size], 0, plain.size)
        assert (room[:64] == 0xA5).all()
        assert (room[64 + plain.size :] == 0xA5).all()


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"\x00",
        b"\x10a",
        b"\xf0",
        b"\xf0\xff\xff",
        b"\x00\x00\x00",
        b"\x10a\x02\x00",
        b"\x1fa\x01\x00",
        b"\x1fa\x01",
    ],
)
def test_impossible_lz4_blocks(block):
    out = np.zeros(64, np.uint8)
    assert bitshuffle.lz4_block(as_bytes(block), 0, len(block), out, 0, 8) == bitshuffle.BAD_BLOCK


def test_lz4_never_reaches_before_its_own_block():
    """A distance of 0, or one that points before the first byte of this block, even if the buffer goes on there."""
    for distance, good in ((0, False), (1, True), (2, False), (3, False), (65535, False)):
        block = as_bytes(b"\x10a" + distance.to_bytes(2, "little") + b"\x30xyz")
        out = np.full(64, 0xA5, np.uint8)
        assert (bitshuffle.lz4_block(block, 0, block.size, out, 2, 10) == 0) is good, distance
        assert (out[:2] == 0xA5).all()
        if good:
            assert out[2:10].tobytes() == b"aaaaaxyz"


def guarded(size):
    """A buffer whose last byte is the last one that may be touched: the page behind it ends the process."""
    page = mmap.PAGESIZE
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    everything = np.frombuffer(memory, np.uint8)
    behind = ctypes.c_void_p(everything.ctypes.data + pages * page)
    assert ctypes.CDLL(None, use_errno=True).mprotect(behind, ctypes.c_size_t(page), 0) == 0
    return everything[pages * page - size : pages * page]


@pytest.mark.skipif(sys.platform == "win32", reason="mprotect is POSIX")
@pytest.mark.parametrize("dtype", ["u1", "<u2", "<u4", "<u8"])
def test_nothing_is_touched_behind_the_buffers(dtype):
    """Good, damaged and cut-off chunks whose buffers end at a forbidden page."""
    rng = np.random.default_rng(11)
    for count in (9, 256, 1003, 4096):
        pixels = rng.poisson(0.7, count).astype(dtype)
        raw = as_bytes(bitshuffled(pixels, 1024))
        source, out = guarded(raw.size), guarded(pixels.nbytes)
        source[:] = raw
        assert bitshuffle.bitshuffle_lz4(source, out, pixels.itemsize) == 0
        np.testing.assert_array_equal(out.view(dtype), pixels)
        for _ in range(300):
            source[:] = raw
            for place in rng.integers(12, raw.size, rng.integers(1, 4)):
                source[place] = rng.choice([0xFF, 0xF0, 0x0F, rng.integers(256)])
            bitshuffle.bitshuffle_lz4(source, out, pixels.itemsize)
            bitshuffle.lz4_block(source, 16, raw.size, out, 0, out.size)
        for cut in rng.integers(0, raw.size, 50):
            short = source[raw.size - cut :]
            short[:] = raw[:cut]
            assert bitshuffle.bitshuffle_lz4(short, out, pixels.itemsize) < 0


@pytest.mark.skipif(sys.platform == "win32", reason="mprotect is POSIX")
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_transposes_touch_nothing_behind_the_buffers(size):
    for count in (8, 96, 256, 264, 1000, 1032):
        source, out = guarded(count * size), guarded(count * size)
        for value in (0, 3, 255):
            source[:] = value
            planes.unshuffle_bits(source, 0, count * size, out, 0, size)
            planes.unshuffle_bytes(source, out, size)


@pytest.mark.parametrize("distance", [*range(1, 20), 31, 32, 33, 64])
def test_lz4_repeats_at_every_distance(distance):
    pattern = np.random.default_rng(distance).integers(0, 256, distance, np.uint8)
    plain = np.resize(pattern, 700)
    packed = as_bytes(lz4(plain))
    for room in (700, 700 + bitshuffle.SLACK):
        out = np.zeros(room, np.uint8)
        assert bitshuffle.lz4_block(packed, 0, packed.size, out, 0, 700) == 0
        np.testing.assert_array_equal(out[:700], plain)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_lz4_agrees_with_the_library(data):
    seed = data.draw(st.integers(0, 1 << 30))
    rng = np.random.default_rng(seed)
    plain = rng.choice([0, 0, 0, 1, 7, 255], data.draw(st.integers(1, 3000))).astype(np.uint8)
    stretch = np.repeat(plain, rng.integers(1, 5, plain.size))
    packed = as_bytes(lz4(stretch))
    out = np.zeros(stretch.size, np.uint8)
    assert bitshuffle.lz4_block(packed, 0, packed.size, out, 0, out.size) == 0
    np.testing.assert_array_equal(out, stretch)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@given(groups=st.integers(1, 150), seed=st.integers(0, 1 << 30), bits=st.integers(0, 64), big=st.booleans())
@settings(max_examples=60, deadline=None)
def test_bit_planes_turn_back(size, groups, seed, bits, big):
    """Any number of pixels, any number of used bits, both byte orders, any position in the buffers."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 1 << min(bits, 8 * size), 8 * groups, np.uint64, endpoint=not bits)
    pixels = pixels.astype(f"u{size}").astype((">" if big else "<") + f"u{size}")
    stored = bit_planes(pixels)
    src = np.concatenate([np.full(5, 0xEE, np.uint8), stored, np.full(9, 0xEE, np.uint8)])
    dst = np.full(stored.size + 10, 0xA5, np.uint8)
    planes.unshuffle_bits(src, 5, stored.size, dst, 3, size)
    np.testing.assert_array_equal(dst[3:-7].view(pixels.dtype), pixels)
    assert (dst[:3] == 0xA5).all()
    assert (dst[-7:] == 0xA5).all()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 7, 31, 32, 33, 64, 97, 1000, 1021])
def test_byte_planes_turn_back(size, count):
    data = np.random.default_rng(count).integers(0, 256, count, np.uint8)
    out = np.zeros(count, np.uint8)
    planes.unshuffle_bytes(shuffled(data, size), out, size)
    np.testing.assert_array_equal(out, data)


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "<u4", ">u4", "<u8", ">f8", "<f4"])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 255, 4096, 4099, 9001])
def test_bitshuffle_blocks_and_rests(dtype, count):
    rng = np.random.default_rng(count)
    for pixels in (rng.poisson(0.3, count), rng.poisson(200, count), rng.integers(0, 1 << 60, count)):
        pixels = pixels.astype(dtype) if np.dtype(dtype).kind == "f" else pixels.astype(np.uint64).astype(dtype)
        raw = as_bytes(bitshuffled(pixels))
        step = (Step("bitshuffle", (pixels.dtype.itemsize, 0, 2)),)
        assert decode(step, 0, raw, pixels.nbytes).tobytes() == pixels.tobytes()


def test_bitshuffle_of_unknown_kind_is_an_error():
    for parameters in ((3, 0, 2), (2, 0, 9), (2, 3, 0)):
        with pytest.raises(DataError):
            decode((Step("bitshuffle", parameters),), 0, as_bytes(PLAIN), len(PLAIN))


def test_bytes_behind_the_last_block_are_an_error():
    for name in ("bitshuffle-lz4", "bitshuffle-zstd", "lz4"):
        steps, raw = ENCODED[name]
        with pytest.raises(DataError, match="left over"):
            decode(steps, 0, as_bytes(raw + b"\0"), len(PLAIN))


def test_several_threads_decode_at_once():
    jobs = list(ENCODED.values()) * 40
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda job: decode(job[0], 0, as_bytes(job[1]), len(PLAIN)).tobytes(), jobs):
            assert found == PLAIN
