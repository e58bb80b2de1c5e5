"""Merlin raw frames (R64): packed pixels of one chip or of several, unpacked and put together into images.

A raw frame is what the readout sends: 64-bit big-endian words whose pixels stand in reverse order, the first pixel in
the lowest bits (64 pixels of 1 bit, 8 of 6 bits in a byte each, 4 of 12 bits in 16 bits each). A stored row runs
through one row of every chip, the last chip first; chips of the lower half of a quad look the other way and are turned
by 180 degrees in the image. 24-bit counts are two 12-bit frames one after the other, the upper bits first.

To reverse the bytes of a word is to put its pixels in order, little-endian: most of the work is that one operation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from gpuem.codecs.compiled import compiled

kernel = compiled

# constants are unsigned 64-bit: Numba would make floats of unsigned with signed numbers
_BYTES = np.uint64(0x00FF00FF00FF00FF)
_BYTE = np.uint64(0xFF)
_8 = np.uint64(8)


def _build_reverse(typing: Any, word: Any) -> Any:
    """The word with its eight bytes in reverse order, as LLVM's own instruction: it knows how to vectorise that."""
    return types.uint64(types.uint64), lambda context, builder, signature, args: builder.bswap(args[0])


_reverse: Any = intrinsic(_build_reverse)
_bits = np.arange(256, dtype=np.uint8)[:, None] >> np.arange(8, dtype=np.uint8) & 1
# eight pixels of one byte each, for every value of eight packed ones: lowest bit first, and highest bit first
_LOW_FIRST = np.ascontiguousarray(_bits).view(np.uint64)[:, 0].copy()
_HIGH_FIRST = np.ascontiguousarray(_bits[:, ::-1]).view(np.uint64)[:, 0].copy()


@kernel  # type: ignore[untyped-decorator, unused-ignore]
def decode(raw: Any, starts: Any, out: Any, bits: int, chips_y: int, chips_x: int) -> None:
    """Unpack raw frames into images.

    Parameters
    ----------
    raw : (bytes,) uint8
        Stored bytes, contiguous.
    starts : (n,) int64
        Where each frame's data begin in `raw`, the header left behind.
    out : (n, y, x) uint8, uint16 or uint32
        The images, contiguous; uint8 for 1 and 6 bits, uint16 for 12, uint32 for 24.
    bits : int
        Counter depth: 1, 6, 12 or 24.
    chips_y, chips_x : int
        How the chips are arranged; y is divisible by `chips_y`, x / `chips_x` by 64.
    """
    height, width = out.shape[1:]
    rows, columns = height // chips_y, width // chips_x
    chips = chips_y * chips_x
    if chips == 1 and bits != 24:
        # the rows of a single chip follow one another: one long row
        rows, columns = 1, height * width
    # words of one chip's row: stored (in one of the two frames that 24 bits take), and as pixels
    span = columns // 64 if bits == 1 else columns // 8 if bits == 6 else columns // 4
    plane = rows * chips * span
    length = 8 * plane * (2 if bits == 24 else 1)
    halves = np.empty((2, columns), np.uint16)
    upper, lower = halves[0].view(np.uint64), halves[1].view(np.uint64)
    for i in range(out.shape[0]):
        packed = raw[starts[i] : starts[i] + length].view(np.uint64)
        words = out[i].reshape(height * width).view(np.uint64)
        step = columns * words.size // (height * width)
        for row in range(rows):
            for slot in range(chips):
                chip_y, chip_x = divmod(chips - 1 - slot, chips_x)
                turned = chip_y > 0
                y = height - 1 - row if turned else row
                begin = (row * chips + slot) * span
                target = (y * chips_x + chip_x) * step
                if bits == 24:
                    _unpack(packed, begin, upper, 0, span, 12, turned)
                    _unpack(packed, begin + plane, lower, 0, span, 12, turned)
                    _join(halves, out[i, y], chip_x * columns)
                else:
                    _unpack(packed, begin, words, target, step, bits, turned)


@kernel  # type: ignore[untyped-decorator, unused-ignore]
def _unpack(packed: Any, begin: int, words: Any, target: int, n: int, bits: int, turned: bool) -> None:
    """Unpack one chip's row from `begin` into `n` words of pixels from `target`; `turned` from right to left."""
    if bits == 1:
        for k in range(n // 8):
            # a word's highest byte stands first and holds its last eight pixels
            word = _reverse(packed[begin + k])
            for j in range(8):
                byte = (word >> np.uint64(8 * j)) & _BYTE
                if turned:
                    words[target + n - 1 - 8 * k - j] = _HIGH_FIRST[byte]
                else:
                    words[target + 8 * k + j] = _LOW_FIRST[byte]
    elif not turned:
        for k in range(n):
            words[target + k] = _reverse(packed[begin + k])
    elif bits == 6:
        for k in range(n):
            words[target + k] = packed[begin + n - 1 - k]
    else:
        for k in range(n):
            word = packed[begin + n - 1 - k]
            words[target + k] = ((word & _BYTES) << _8) | ((word >> _8) & _BYTES)


@kernel  # type: ignore[untyped-decorator, unused-ignore]
def _join(halves: Any, line: Any, start: int) -> None:
    """Put 24-bit counts together from their upper and lower 12 bits."""
    for x in range(halves.shape[1]):
        line[start + x] = np.uint32(np.uint32(halves[0, x]) << np.uint32(12)) + np.uint32(halves[1, x])
