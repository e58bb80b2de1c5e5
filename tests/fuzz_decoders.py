"""Damaged chunks for the decoders, to be run under AddressSanitizer: ``fuzz_decoders.py KERNEL CHUNKS SEED``.

Every chunk and every output lies between bytes that must not be touched, so that one byte too far is found. The kernel
and the CPU's decoder must agree whether a chunk is sound, and on its bytes where it is. The last line printed is JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
from collections import Counter

import numpy as np
from decoder_launch import SCRATCH, TOO_LARGE, UNSIGNED, Batch, arrange, decode
from emulation.build import ORDERS
from test_codecs import bitshuffled, framed, lz4

from gpuem.codecs import bitshuffle, chunks
from gpuem.errors import DataError
from gpuem.formats.source import Step

SOUND, DAMAGED_EACH = 12, 150
EXTREMES = (0, 1, 2, 4, 12, 255, 256, 8192, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 5, (1 << 32) - 1)
# lengths and distances around the borders of tokens, of a warp, of the bytes that lengthen a length
LITERALS = (*[0] * 6, *[1] * 4, *[3, 14, 15] * 2, 16, 33, 80, 270, 526)
MATCHES = (4, 5, 8, 18, 19, 20, 31, 32, 33, 64, 65, 100, 273, 274, 1100)
DISTANCES = (1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 33, 64, 90)
BYTES = (0x00, 0x01, 0x0F, 0x10, 0x1F, 0x7F, 0x80, 0xEF, 0xF0, 0xFF)


def pixels(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """Counts, noise, runs and repeated stretches."""
    kind = rng.integers(6)
    if kind == 0:
        return rng.integers(0, 256, count * size, np.uint8).view(f"u{size}")
    if kind == 1:
        return np.full(count, rng.choice([0, 1, 255]), f"u{size}")
    if kind == 2:
        return np.resize(rng.integers(0, 256, rng.integers(1, 40) * size, np.uint8), count * size).view(f"u{size}")
    return rng.poisson(rng.choice([0.02, 0.3, 5]), count).astype(f"u{size}")


def invented(rng: np.random.Generator, count: int) -> bytes:
    """An LZ4 block of `count` bytes made of random sequences: most are sound, and no compressor would write them."""
    block, written = bytearray(), 0

    def number(value: int) -> bytes:
        return b"" if value < 15 else b"\xff" * ((value - 15) // 255) + bytes([(value - 15) % 255])

    while True:
        left = count - written
        literals = min(left, int(rng.choice(LITERALS)))
        if left - literals < 4 or (written + literals and rng.random() < 0.05):
            literals = left
        last = literals == left
        match = 4 if last else min(left - literals, int(rng.choice(MATCHES)))
        block.append(min(literals, 15) << 4 | min(match - 4, 15))
        block += number(literals) + rng.integers(0, 256, literals, np.uint8).tobytes()
        written += literals
        if last:
            return bytes(block)
        near = int(rng.choice([*DISTANCES, max(1, written)]))
        # now and then one that reaches before the beginning
        distance = min(near, max(1, written)) if rng.random() < 0.995 else written + 1
        block += (distance & 0xFFFF).to_bytes(2, "little") + number(match - 4)
        written += match


def sound(rng: np.random.Generator, nbytes: int, size: int) -> bytes:
    """A chunk; `size` bytes of a pixel for bitshuffle, 0 for plain LZ4."""
    group = 8 * size or 1
    block = group * int(rng.integers(1, max(2, nbytes // group + 2)))
    if nbytes > 2000:
        block = max(block, 512)
    if rng.random() < 0.4:
        whole = nbytes // group * group
        parts = [invented(rng, min(block, whole - o)) for o in range(0, whole, block)]
        return framed(parts, nbytes, block) + rng.integers(0, 256, nbytes - whole, np.uint8).tobytes()
    data = pixels(rng, nbytes // (size or 1), size or 1)
    if size:
        return bitshuffled(data, block)
    cuts = [data[o : o + block] for o in range(0, nbytes, block)]
    packed = [(lz4(c), c.tobytes()) for c in cuts]
    return framed([a if len(a) < len(b) else b for a, b in packed], nbytes, block)


def blocks_of(chunk: bytes) -> list[slice]:
    """Where the compressed blocks lie, by their lengths; at least one stretch."""
    found, i = [], 12
    while i + 4 < len(chunk):
        end = i + 4 + int.from_bytes(chunk[i : i + 4], "big")
        found.append(slice(i + 4, min(end, len(chunk))))
        i = end
    return found or [slice(12, len(chunk))]


def hurt(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """One kind of damage."""
    if not data or rng.random() < 0.05:
        return rng.bytes(int(rng.integers(0, len(data) + 8)))
    bad, place, kind = bytearray(data), int(rng.integers(len(data))), rng.integers(6)
    if kind == 0:
        bad[place] ^= 1 << rng.integers(8)
    elif kind == 1:
        bad[place] = rng.choice(BYTES)
    elif kind == 2:
        del bad[place:]
    elif kind == 3:
        bad += rng.bytes(int(rng.integers(1, 20)))
    elif kind == 4:
        del bad[place : place + int(rng.integers(1, 9))]
    else:
        begin = int(rng.integers(0, len(other)))
        bad[place : place + int(rng.integers(0, 9))] = other[begin : begin + int(rng.integers(1, 40))]
    return bytes(bad)


def damaged(rng: np.random.Generator, chunk: bytes, other: bytes, blocks: list[slice]) -> bytes:
    """A block that is damaged but as long as it says, a wrong number among the lengths, or damage anywhere."""
    where = rng.random()
    if where < 0.6:
        block = blocks[int(rng.integers(len(blocks)))]
        inside = chunk[block]
        for _ in range(1 + int(rng.integers(0, 6)) // 3):
            inside = hurt(rng, inside, other)
        return chunk[: block.start - 4] + len(inside).to_bytes(4, "big") + inside + chunk[block.stop :]
    if where < 0.8:
        field = int(rng.choice([0, 4, 8, *(block.start - 4 for block in blocks)]))
        told = int.from_bytes(chunk[field : field + 4], "big")
        value = int(rng.choice(EXTREMES)) if rng.random() < 0.5 else told + int(rng.integers(-3, 4))
        return chunk[:field] + (value & 0xFFFFFFFF).to_bytes(4, "big") + chunk[field + 4 :]
    return hurt(rng, chunk, other)


def many(rng: np.random.Generator, nbytes: int, size: int) -> list[bytes]:
    """Sound chunks, and each of them many times damaged."""
    good = [sound(rng, nbytes, size) for _ in range(SOUND)]
    found = list(good)
    for k, chunk in enumerate(good):
        blocks = blocks_of(chunk)
        found += [damaged(rng, chunk, good[k - 1], blocks) for _ in range(DAMAGED_EACH)]
    return found


class Poison:
    """Everything in a batch that isn't a chunk or an output: whoever touches it ends the process."""

    def __init__(self, batch: Batch) -> None:
        process = ctypes.CDLL(None)
        self._ranges = []
        for array, begins, lengths in (
            (batch.raw, batch.at, batch.length),
            (batch.memory, batch.places, np.full(batch.at.size, batch.nbytes)),
        ):
            edges = np.concatenate([[0], np.stack([begins, begins + lengths], 1).reshape(-1), [array.size]])
            for begin, end in edges.reshape(-1, 2):
                place = ctypes.c_void_p(array.ctypes.data + int(begin)), ctypes.c_size_t(int(end - begin))
                self._ranges.append(place)
        self._on = process["__asan_poison_memory_region"]
        self._off = process["__asan_unpoison_memory_region"]

    def __enter__(self) -> None:
        for place in self._ranges:
            self._on(*place)

    def __exit__(self, *_: object) -> None:
        for place in self._ranges:
            self._off(*place)


def by_cpu(batch: Batch, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and outputs of the CPU's decoders."""
    out = np.zeros((batch.at.size, batch.nbytes), np.uint8)
    if size:
        return bitshuffle.bitshuffle_lz4_many(batch.raw, batch.at, batch.length, out, size), out

    def block(part: np.ndarray, target: np.ndarray) -> int:
        if part.size == target.size:
            target[:] = part
            return part.size
        return 0 if bitshuffle.lz4_block(part, 0, part.size, target, 0, target.size) else target.size

    codes = np.zeros(batch.at.size, np.int64)
    for k, (begin, length) in enumerate(zip(batch.at, batch.length, strict=True)):
        part = batch.raw[begin : begin + length]
        try:
            chunks._framed(part, out[k], 1, block)
        except chunks._BrokenError:
            codes[k] = -1
        # liblz4's verdict differs on blocks that no compressor writes: it takes a distance of 0 for something, and
        # refuses a match in the last 12 bytes. Where both find a block sound, the bytes must be the same
        with contextlib.suppress(DataError):
            by_library = chunks.decode((Step("lz4"),), 0, part, batch.nbytes)
            assert codes[k] or (by_library == out[k]).all(), f"liblz4 differs on {part.tobytes().hex()}"
    return codes, out


def compare(batch: Batch, size: int, counts: Counter[str]) -> None:
    """The same verdict and the same bytes."""
    codes, expected = by_cpu(batch, size)
    for k in np.flatnonzero((batch.codes == 0) != (codes == 0)):
        chunk = batch.raw[batch.at[k] : batch.at[k] + batch.length[k]].tobytes()
        if batch.codes[k] == TOO_LARGE and size and int.from_bytes(chunk[8:12], "big") > SCRATCH < batch.nbytes:
            counts["left to the CPU"] += 1
            continue
        found = f"kernel {batch.codes[k]}, CPU {codes[k]}"
        raise AssertionError(f"{found}: {batch.nbytes} bytes, pixels of {size}, from {chunk.hex()}")
    sound_ones = batch.codes == 0
    np.testing.assert_array_equal(batch.outputs[sound_ones], expected[sound_ones])
    counts["accepted"] += int(sound_ones[SOUND:].sum())
    counts["damaged chunks"] += int(sound_ones.size - SOUND)
    counts.update(f"code {code}" for code in batch.codes[SOUND:])
    counts["same code"] += int((batch.codes[SOUND:] == codes[SOUND:]).sum())


def fuzz(kernel: str, least: int, seed: int) -> Counter[str]:
    """Decode at least so many damaged chunks."""
    rng = np.random.default_rng(seed)
    counts: Counter[str] = Counter()
    round_ = 0
    while counts["damaged chunks"] < least:
        size = 0 if kernel == "lz4" else (1, 2, 4, 8)[round_ % 4]
        nbytes = int(rng.integers(1, 900)) if round_ % 16 else int(rng.integers(8000, 20000))
        nbytes = max(1, nbytes // (size or 1)) * (size or 1)
        pitch = nbytes // 16 * 16 + 32 + (size or 1) * int(rng.integers(0, 16)) * (round_ % 2)
        batch = arrange(many(rng, nbytes, size), nbytes, align=8 if round_ % 3 else 1, gap=16, pitch=pitch)
        with Poison(batch):
            decode(
                f"bitshuffle_lz4<{UNSIGNED[size]}>" if size else "lz4",
                batch,
                parts=1 + int(rng.integers(3)) // 2,
                warps=1 + int(rng.integers(3)) // 2,
                order=ORDERS[round_ % len(ORDERS)],
            )
        compare(batch, size, counts)
        round_ += 1
    return counts


if __name__ == "__main__":
    print(json.dumps(fuzz(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
