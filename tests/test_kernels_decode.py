"""The decoder kernels, run on the CPU: against the CPU's decoders, against other writers, and against damage."""

from __future__ import annotations

import json
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
import pytest
from decoder_launch import TOO_LARGE, UNSIGNED, UNTOUCHED, arrange, decode, library
from emulation.build import ORDERS, run_under_sanitizer
from merlin_writer import raw_frame
from test_codecs import as_bytes, bit_planes, bitshuffled, framed, lz4, shuffled

from gpuem.codecs import bitshuffle, merlin
from gpuem.codecs.chunks import decode as decode_chunk
from gpuem.formats.source import Step

SIZES = (1, 2, 4, 8)
BAD_HEADER, BAD_BLOCK, TOO_SHORT, TOO_LONG = -1, -2, -3, -4


def content(kind, count, size, seed=0):
    """Pixels of one kind."""
    rng = np.random.default_rng([seed, count, size])
    if kind == "zeros":
        return np.zeros(count, f"<u{size}")
    if kind == "ones":
        return np.full(count, -1, f"<i{size}").view(f"<u{size}")
    if kind == "noise":
        return rng.integers(0, 256, count * size, np.uint8).view(f"<u{size}")
    if kind == "counts":
        return rng.poisson(0.7, count).astype(f"<u{size}")
    if kind == "hot":
        return np.where(rng.random(count) < 0.01, rng.integers(0, 256, count), 0).astype(f"<u{size}")
    # stretches that repeat from farther and farther away: long matches at every distance
    parts = [np.resize(rng.integers(0, 256, k), 5 * k) for k in range(1, 90)]
    return np.resize(np.concatenate(parts), count).astype(f"<u{size}")


CONTENTS = ("zeros", "ones", "noise", "counts", "hot", "repeats")


def kernel_of(size):
    return f"bitshuffle_lz4<{UNSIGNED[size]}>" if size else "lz4"


def decoded(chunks, nbytes, size, *, launch=None, **layout):
    """Outputs and codes of bitshuffle_lz4, or of lz4 where `size` is 0; guards are checked."""
    batch = arrange(chunks, nbytes, **layout)
    decode(kernel_of(size), batch, **(launch or {}))
    batch.assert_guards_hold()
    return batch.outputs, batch.codes


def check(pixels, chunks, size, **options):
    """The chunks decode to the pixels, given for each."""
    nbytes = pixels[0].nbytes
    out, codes = decoded(chunks, nbytes, size, **options)
    assert not codes.any(), codes
    for k, expected in enumerate(pixels):
        np.testing.assert_array_equal(out[k], expected.reshape(-1).view(np.uint8), err_msg=f"chunk {k}")


# ---- bitshuffle with LZ4 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", [(5, 101, 103), (1, 192, 192), (1, 1, 1), (1, 1, 7), (2, 4, 1), (3, 3, 1)])
def test_bitshuffle_reads_what_the_plugin_wrote(tmp_path, size, shape):
    frames = [content(kind, int(np.prod(shape)), size).reshape(shape) for kind in CONTENTS]
    with h5py.File(tmp_path / "x.h5", "w") as file:
        stored = file.create_dataset(
            "d", (len(frames), *shape), f"<u{size}", chunks=(1, *shape), **hdf5plugin.Bitshuffle(nelems=0, cname="lz4")
        )
        stored[...] = frames
        chunks = [stored.id.read_direct_chunk((k, 0, 0, 0))[1] for k in range(len(frames))]
    parts = -(-frames[0].nbytes // 8192)
    check(frames, chunks, size, launch={"parts": parts})


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("block", [64, 192, 1024, 4160, 8192])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 63, 64, 1000, 5003])
def test_bitshuffle_blocks_of_any_size(size, block, count):
    pixels = [content(kind, count, size) for kind in CONTENTS]
    check(pixels, [bitshuffled(p, block) for p in pixels], size, launch={"parts": 2, "warps": 3})


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("parts,warps", [(1, 1), (1, 4), (3, 2), (40, 1), (7, 6)])
def test_bitshuffle_in_any_order_on_any_grid(order, parts, warps):
    """More warps than blocks and fewer, which then take several; what they find doesn't depend on who comes first."""
    for size in SIZES:
        pixels = [content(kind, 3001, size) for kind in CONTENTS]
        launch = {"parts": parts, "warps": warps, "order": order}
        check(pixels, [bitshuffled(p, 1024) for p in pixels], size, launch=launch)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("step", [1, 2, 3])
def test_bitshuffle_outputs_at_every_alignment(size, step):
    """Pixels are written in strides of 16, of 8, or one by one."""
    pixels = [content("counts", 333, size, k) for k in range(9)]
    pitch = (pixels[0].nbytes // 16 + 1) * 16 + size * step
    check(pixels, [bitshuffled(p, 512) for p in pixels], size, pitch=pitch, launch={"warps": 2})


def test_bitshuffle_leaves_blocks_larger_than_its_memory_to_the_host():
    pixels = content("counts", 20001, 2)
    for block, expected in ((8192, 0), (8208, TOO_LARGE), (16384, TOO_LARGE), (1 << 20, TOO_LARGE)):
        for launch in ({}, {"parts": 9}):
            _, codes = decoded([bitshuffled(pixels, block)], pixels.nbytes, 2, launch=launch)
            assert codes[0] == expected
    # a header that says more than there is: the block is small
    small = content("counts", 4100, 2)
    check([small, small], [bitshuffled(small, 1 << 20), bitshuffled(small, 8256)], 2)


def rewritten(chunk, field, value):
    return chunk[:field] + struct.pack(">I", value) + chunk[field + 4 :]


def wrong_chunks(pixels, block):
    """Chunks with one thing wrong each, and the code for it."""
    size, good = pixels.itemsize, bitshuffled(pixels, block)
    first = int.from_bytes(good[12:16], "big")
    tail = pixels.size % 8 * size
    return {
        "nothing": (b"", TOO_SHORT),
        "half a header": (good[:11], TOO_SHORT),
        "only a header": (good[:12], TOO_SHORT),
        "half a length": (good[:14], TOO_SHORT),
        "only a length": (good[:16], TOO_SHORT),
        "within the first block": (good[:20], TOO_SHORT),
        "without the last byte": (good[:-1], TOO_SHORT),
        "without the rest": (good[: len(good) - tail], TOO_SHORT),
        "a byte more": (good + b"\0", TOO_LONG),
        "much more": (good + bytes(100), TOO_LONG),
        "another total": (rewritten(good, 4, pixels.nbytes + 1), BAD_HEADER),
        "a huge total": (rewritten(good, 0, 1 << 31), BAD_HEADER),
        "a total of 2^64 - 1": (b"\xff" * 8 + good[8:], BAD_HEADER),
        "a block of nothing": (rewritten(good, 8, 0), BAD_HEADER),
        "half a group": (rewritten(good, 8, block + 4 * size), BAD_HEADER),
        "a pixel more": (rewritten(good, 8, block + 1), BAD_HEADER),
        "the longest block length": (rewritten(good, 12, 0xFFFFFFFF), TOO_SHORT),
        "2^31": (rewritten(good, 12, 0x80000000), TOO_SHORT),
        "an empty block": (rewritten(good[:16], 12, 0) + good[16 + first :], BAD_BLOCK),
        "a wrong token": (good[:16] + b"\xff" + good[17:], BAD_BLOCK),
    }


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("launch", [{}, {"parts": 3, "warps": 2, "order": "descending"}, {"warps": 4}])
def test_bitshuffle_says_what_is_wrong_and_leaves_neighbours_alone(size, launch):
    pixels = content("counts", 1003, size)
    wrong = wrong_chunks(pixels, 1024)
    good = bitshuffled(pixels, 1024)
    chunks = [good]
    for chunk, _ in wrong.values():
        chunks += [chunk, good]
    out, codes = decoded(chunks, pixels.nbytes, size, launch=launch)
    batch = arrange(chunks, pixels.nbytes)
    by_cpu = bitshuffle.bitshuffle_lz4_many(batch.raw, batch.at, batch.length, batch.outputs.copy(), size)
    assert dict(zip(wrong, codes[1::2], strict=True)) == {name: code for name, (_, code) in wrong.items()}
    np.testing.assert_array_equal(codes, by_cpu)
    assert (out[::2] == pixels.view(np.uint8)).all()


def test_bitshuffle_of_several_damages_gives_one_code_in_any_order():
    pixels = content("noise", 4096, 2)
    chunk = bytearray(bitshuffled(pixels, 1024))
    chunk[16] = 0
    chunk = bytes(chunk[:-600])
    found = {
        (parts, order): decoded([chunk], pixels.nbytes, 2, launch={"parts": parts, "order": order})[1][0]
        for parts in (1, 2, 8)
        for order in ORDERS
    }
    for parts in (1, 2, 8):
        assert len({found[parts, order] for order in ORDERS}) == 1
    assert all(code < 0 for code in found.values())


# ---- LZ4 ------------------------------------------------------------------------------------------------------------


def plain_lz4(data, block):
    """HDF5 filter 32004: a block that doesn't become smaller is stored."""
    packed = [(lz4(data[o : o + block]), data[o : o + block].tobytes()) for o in range(0, data.size, block)]
    return framed([a if len(a) < len(b) else b for a, b in packed], data.size, block)


@pytest.mark.parametrize("nbytes", [1, 4, 5, 17, 999, 40000])
def test_lz4_reads_what_the_plugin_wrote(tmp_path, nbytes):
    rows = [content(kind, nbytes, 1) for kind in CONTENTS]
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for block in (0, 512):
            stored = file.create_dataset(
                f"d{block}", (len(rows), nbytes), "u1", chunks=(1, nbytes), **hdf5plugin.LZ4(nbytes=block)
            )
            stored[...] = rows
            chunks = [stored.id.read_direct_chunk((k, 0)) for k in range(len(rows))]
            # what the filter couldn't make smaller, HDF5 stores without it
            kept = [(row, chunk) for row, (skipped, chunk) in zip(rows, chunks, strict=True) if not skipped]
            if kept:
                check([row for row, _ in kept], [chunk for _, chunk in kept], 0, launch={"parts": 2, "warps": 3})


@pytest.mark.parametrize("block", [1, 7, 999, 8192, 65536, 1 << 20])
@pytest.mark.parametrize("order", ORDERS[:3])
def test_lz4_blocks_of_any_size(block, order):
    nbytes = 70 if block < 7 else 20011
    rows = [content(kind, nbytes, 1) for kind in CONTENTS]
    for row in rows:
        assert decode_chunk((Step("lz4"),), 0, as_bytes(plain_lz4(row, block)), nbytes).tobytes() == row.tobytes()
    check(rows, [plain_lz4(row, block) for row in rows], 0, launch={"parts": 3, "warps": 2, "order": order})


def test_lz4_far_matches_in_a_large_block():
    """Distances up to 65535, beyond anything that fits in shared memory."""
    stretch = content("noise", 65535, 1)
    data = np.concatenate([stretch, stretch, stretch[:1000], np.zeros(3000, np.uint8), stretch[5:700]])
    check([data], [plain_lz4(data, data.size)], 0)


def number(value):
    return b"" if value < 15 else b"\xff" * ((value - 15) // 255) + bytes([(value - 15) % 255])


def sequence(literals, match, distance):
    token = min(len(literals), 15) << 4 | min(match - 4, 15)
    return bytes([token]) + number(len(literals)) + literals + struct.pack("<H", distance) + number(match - 4)


def repeated(seed, distance, match):
    for _ in range(match):
        seed += seed[-distance : len(seed) - distance + 1 or None]
    return seed


@pytest.mark.parametrize("order", ORDERS[:3])
@pytest.mark.parametrize("distance", [*range(1, 41), 63, 64, 65, 96, 300])
def test_lz4_repeats_at_every_distance_and_length(distance, order):
    """Overlapping and not, at every alignment, with lengths around every border; in shared memory and in the output."""
    for match in (4, 5, 18, 19, 20, 31, 32, 33, 47, 48, 49, 64, 65, 273, 274, 275, 1000):
        blocks, rows = [], []
        for before in (distance, distance + 1, distance + 14):
            literals = content("noise", before, 1, match).tobytes()
            end = b"Z" * (-(before + match) % 8 or 8)
            blocks.append(sequence(literals, match, distance) + bytes([len(end) << 4]) + end)
            rows.append(as_bytes(repeated(literals, distance, match) + end))
        for block, row in zip(blocks, rows, strict=True):
            if len(block) != row.size:  # it would be taken for a stored one
                check([row], [framed([block], row.size, row.size)], 0, launch={"order": order})
            bits = np.unpackbits(row.reshape(8, -1), axis=1, bitorder="little")
            pixels = np.packbits(bits.T, axis=1, bitorder="little")
            assert bit_planes(pixels.reshape(-1)).tobytes() == row.tobytes()
            check([pixels], [framed([block], row.size, row.size)], 1, launch={"order": order})


@pytest.mark.parametrize("count", [14, 15, 16, 269, 270, 271, 15 + 255 * 31, 15 + 255 * 32, 15 + 255 * 33 + 7])
def test_lz4_long_lengths(count):
    """Lengths whose bytes of 255 end at, before and behind the 32 that are looked at together."""
    literals = content("noise", count, 1).tobytes()
    row = repeated(literals + b"a", 1, count + 4) + b"tail"
    block = sequence(literals + b"a", count + 4, 1) + b"\x40tail"
    check([as_bytes(row)], [framed([block], len(row), len(row))], 0)
    for cut in range(1, len(block)):
        if cut < 80 or cut > count - 40:
            _, codes = decoded([framed([block[:cut]], len(row), len(row))], len(row), 0)
            assert codes[0] == BAD_BLOCK, cut


@pytest.mark.parametrize("size", [0, 1])
def test_impossible_lz4_blocks(size):
    impossible = [
        *(b"", b"\x00", b"\x10a", b"\xf0", b"\xf0\xff\xff", b"\xff" * 300, b"\x00\x00\x00", b"\x10a\x02\x00"),
        *(b"\x1fa\x01\x00", b"\x1fa\x01", b"\x1fa\x01\x00\xff", b"\x1fa\x01\x00" + b"\xff" * 33, b"\x13a\x01\x00"),
        *(b"\x10a\x00\x00\x30xyz", b"\x10a\x02\x00\x30xyz", b"\x10a\xff\xff\x30xyz", b"\x11a\x01\x00\x30xyz"),
        *(b"\x10a\x01\x00\x20xyz", b"\x10a\x01\x00\x40xyz", b"\x90abcdefghi", b"\x80abcdefghi", b"\x10a\x01"),
    ]
    # as long as what they decode to, some would be stored blocks
    chunks = [framed([b], 8, 8) for b in impossible if size or len(b) != 8]
    good = [framed([b], 8, 8) for b in (b"\x11a\x01\x00\x20yz", b"\x80abcdefgh")]
    out, codes = decoded([*chunks, *good], 8, size)
    assert set(codes[:-2]) == {BAD_BLOCK}
    assert not codes[-2:].any()
    if not size:
        assert out[-2:].tobytes() == b"aaaaaayzabcdefgh"


def test_lz4_says_what_is_wrong_and_leaves_neighbours_alone():
    row = content("counts", 5000, 1)
    good = plain_lz4(row, 1024)
    stored = framed([row.tobytes()], row.size, row.size)
    wrong = {
        b"": TOO_SHORT,
        good[:11]: TOO_SHORT,
        good[:15]: TOO_SHORT,
        good[:-1]: TOO_SHORT,
        good + b"\0": TOO_LONG,
        rewritten(good, 4, 4999): BAD_HEADER,
        rewritten(good, 8, 0): BAD_HEADER,
        rewritten(good, 12, 0xFFFFFFFF): TOO_SHORT,
        rewritten(stored, 12, 4999)[:-1]: BAD_BLOCK,
        stored[:-1]: TOO_SHORT,
        stored + b"\0": TOO_LONG,
    }
    chunks = [good]
    for chunk in wrong:
        chunks += [chunk, stored, good]
    for launch in ({}, {"parts": 4, "warps": 2, "order": "descending"}):
        out, codes = decoded(chunks, row.size, 0, launch=launch)
        assert codes[1::3].tolist() == list(wrong.values())
        assert not codes[::3].any()
        assert not codes[2::3].any()
        assert (out[::3] == row).all()
        assert (out[2::3] == row).all()


@pytest.mark.slow
def test_damaged_chunks_by_the_hundred_thousand():
    """Under AddressSanitizer: nothing is touched outside, and the verdict and the bytes are the CPU's."""
    script = str(Path(__file__).with_name("fuzz_decoders.py"))
    jobs = [("bitshuffle_lz4", 100_000, 1), ("lz4", 50_000, 2)]

    def run(job):
        done = run_under_sanitizer([script, *map(str, job)], timeout=1200)
        return json.loads(done.stdout.splitlines()[-1])

    with ThreadPoolExecutor(2) as pool:
        for job, counts in zip(jobs, pool.map(run, jobs), strict=True):
            print(*job, counts, file=sys.stderr)
            assert counts["damaged chunks"] >= job[1]
            # some damage can't be seen; most can
            assert 0.03 < counts["accepted"] / counts["damaged chunks"] < 0.3
            assert min(counts[f"code {code}"] for code in (BAD_HEADER, BAD_BLOCK, TOO_SHORT, TOO_LONG)) > 500


# ---- Merlin ---------------------------------------------------------------------------------------------------------

GRIDS = (("descending", (1, 1), (32,)), ("random(0)", (7, 3), (96,)), ("ascending", (100, 5), (256,)))
PIXELS = {1: np.uint8, 6: np.uint8, 12: np.uint16, 24: np.uint32}


def merlin_frames(images, bits, chips, *, header=384, start=0, pitch=None, order="ascending", grid=(3, 2), block=(64,)):
    """Decode images that the naive writer wrote, each behind a header; the kernel's and the CPU's result."""
    frames, height, width = images.shape
    stored = [raw_frame(image, bits, *chips) for image in images]
    stride = header + len(stored[0])
    raw = np.full(start + stride * frames, 0xEE, np.uint8)
    starts = start + header + stride * np.arange(frames)
    for begin, frame in zip(starts, stored, strict=True):
        raw[begin : begin + len(frame)] = np.frombuffer(frame, np.uint8)
    pitch = pitch or height * width
    out = np.full((frames + 1) * pitch, UNTOUCHED, PIXELS[bits])
    library("merlin").launch(
        f"merlin<{bits}>",
        grid,
        block,
        [raw, starts, np.int32(frames), out, np.int64(pitch), *np.array([height, width, *chips], np.int32)],
        order=order,
    )
    rows = out.reshape(frames + 1, pitch)
    assert (rows[:frames, height * width :] == UNTOUCHED).all()
    assert (rows[frames] == UNTOUCHED).all()
    return rows[:frames, : height * width].reshape(images.shape)


def merlin_images(bits, chips, rows=6, columns=64, frames=3):
    shape = (frames, rows * chips[0], columns * chips[1])
    images = np.random.default_rng(bits).integers(0, 1 << bits, shape).astype(PIXELS[bits])
    # planted: nothing is its own mirror image
    images[:, 0, 0], images[:, -1, -1], images[:, 0, -1], images[:, -1, 0] = (1 << bits) - 1, 0, 1, 0
    return images


@pytest.mark.parametrize("bits", PIXELS)
@pytest.mark.parametrize("chips", [(1, 1), (2, 2), (1, 2), (1, 4), (2, 1)])
@pytest.mark.parametrize("header,start", [(384, 0), (768, 16), (1024, 5), (0, 1), (384, 4), (381, 2)])
def test_merlin_frames_at_any_address(bits, chips, header, start):
    images = merlin_images(bits, chips)
    found = merlin_frames(images, bits, chips, header=header, start=start)
    np.testing.assert_array_equal(found, images)


@pytest.mark.parametrize("bits", PIXELS)
@pytest.mark.parametrize("chips", [(1, 1), (2, 2)])
def test_merlin_agrees_with_the_cpu_on_any_bytes(bits, chips):
    """Also where the unused bits of a pixel are set."""
    height, width = 5 * chips[0], 128 * chips[1]
    length = height * width * {1: 1, 6: 8, 12: 16, 24: 32}[bits] // 8
    raw = np.random.default_rng(5).integers(0, 256, 2 * length, np.uint8)
    starts = np.array([0, length], np.int64)
    expected = np.zeros((2, height, width), PIXELS[bits])
    merlin.decode(raw, starts, expected, bits, *chips)
    found = np.zeros_like(expected)
    library("merlin").launch(
        f"merlin<{bits}>",
        (2, 1),
        (32,),
        [raw, starts, np.int32(2), found, np.int64(height * width), *np.array([height, width, *chips], np.int32)],
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("bits", PIXELS)
@pytest.mark.parametrize("more", [0, 1, 2, 4, 7])
def test_merlin_outputs_at_every_alignment_on_any_grid(bits, more):
    images = merlin_images(bits, (2, 2))
    pitch = images[0].size + more
    for order, grid, block in GRIDS:
        found = merlin_frames(images, bits, (2, 2), pitch=pitch, order=order, grid=grid, block=block)
        np.testing.assert_array_equal(found, images)


# ---- HDF5's shuffle -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("nbytes", [1, 7, 8, 31, 64, 1000, 4096, 4099])
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_unshuffle(size, nbytes, offset):
    """Whole items and a rest, inputs and outputs aligned and not."""
    rows = np.random.default_rng(nbytes).integers(0, 256, (5, nbytes), np.uint8)
    raw_pitch, out_pitch = nbytes + offset, (nbytes // 16 + 1) * 16 + offset
    raw = np.full((5, raw_pitch), 0xEE, np.uint8)
    for k, row in enumerate(rows):
        raw[k, :nbytes] = shuffled(row, size)
    for order, grid, block in GRIDS:
        out = np.full((6, out_pitch), UNTOUCHED, np.uint8)
        scalars = [np.int64(nbytes), np.int64(raw_pitch), np.int64(out_pitch), np.int32(5)]
        library("unshuffle").launch(f"unshuffle<{size}>", grid, block, [raw, out, *scalars], order=order)
        np.testing.assert_array_equal(out[:5, :nbytes], rows)
        assert (out[:5, nbytes:] == UNTOUCHED).all()
        assert (out[5] == UNTOUCHED).all()


def test_fixed_size_decoders_touch_nothing_outside():
    """Merlin and unshuffle under AddressSanitizer, with inputs and outputs as long as they must be."""
    run_under_sanitizer(
        """
import numpy as np
from test_kernels_decode import PIXELS, library, merlin_frames, merlin_images, shuffled
for bits in PIXELS:
    for chips in ((1, 1), (2, 2), (1, 4)):
        for start in (0, 3):
            images = merlin_images(bits, chips, 4, 64, 1)
            assert (merlin_frames(images, bits, chips, header=0, start=start) == images).all()
for size in (1, 2, 3, 4, 8, 16):
    for nbytes in (1, 3, 16, 63, 64, 5000, 5001):
        row = np.arange(nbytes).astype(np.uint8)
        raw, out = shuffled(row, size), np.zeros(nbytes, np.uint8)
        scalars = [np.int64(nbytes), np.int64(nbytes), np.int64(nbytes), np.int32(1)]
        library("unshuffle").launch(f"unshuffle<{size}>", (2, 1), (32,), [raw, out, *scalars])
        assert (out == row).all()
"""
    )
