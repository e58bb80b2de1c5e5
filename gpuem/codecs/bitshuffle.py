"""Bitshuffle with LZ4 (HDF5 filter 32008), as DECTRIS detectors write it, and bitshuffle alone.

A detector that counts few electrons leaves most bits of a pixel zero. Bitshuffle gathers bit k of all pixels of a block
in one bit plane, so LZ4 sees long runs. Decoding goes block by block (8 KiB): LZ4 into a scratch block that stays in
the first-level cache, then the planes back to pixels, straight to where they belong.

Every decoder takes untrusted bytes: no length is believed before it was compared with both buffers. They return a
negative code instead of raising, run without the interpreter lock and keep no state.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuem.codecs.planes import (
    Bytes,
    bits1,
    bits2,
    bits4,
    bits8,
    byte_at,
    copy16,
    jit,
    put_word,
    unshuffle_bits,
    word_at,
)

BAD_HEADER, BAD_BLOCK, TOO_SHORT, TOO_LONG = -1, -2, -3, -4
REASONS = {
    BAD_HEADER: "its header promises another size or an impossible block",
    BAD_BLOCK: "a compressed block is damaged",
    TOO_SHORT: "it ends within a block",
    TOO_LONG: "bytes are left over behind the last block",
}
# how far a copy in strides of 16 bytes may reach beyond the bytes it is asked for
SLACK = 32
# for a pattern of 1 to 7 bytes in the low end of a 64-bit word: its bits, what repeats it, bytes of whole repeats
_PATTERN = np.array([0] + [(1 << 8 * d) - 1 for d in range(1, 8)], np.uint64)
_TIMES = np.array([0] + [sum(1 << s for s in range(0, 64, 8 * d)) for d in range(1, 8)], np.uint64)
_STRIDE = np.array([1] + [8 // d * d for d in range(1, 8)], np.int64)


@jit
def _length(src: Bytes, i: int, end: int, first: int) -> tuple[int, int]:
    """A length of LZ4: 15 in the token means that more bytes follow; the next position, or -1 at the end."""
    total = first
    if first == 15:
        more = 255
        while more == 255:
            if i >= end:
                return -1, 0
            more = byte_at(src, i)
            total += more
            i += 1
    return i, total


@jit
def _literals(src: Bytes, i: int, dst: Bytes, o: int, count: int, room: int) -> None:
    """Copy `count` bytes; in strides of 16 where reading and writing too far stays within both buffers."""
    if count + 16 <= src.size - i and count + 16 <= room - o:
        for k in range(0, count, 16):
            copy16(dst, o + k, src, i + k)
    else:
        for k in range(count):
            dst[np.uintp(o + k)] = src[np.uintp(i + k)]


@jit
def _spelled(dst: Bytes, o: int, distance: int) -> tuple[np.uint64, int]:
    """The last `distance` < 8 bytes repeated in one word, and how many bytes of it are whole repeats (5 or more)."""
    return (word_at(dst, o - distance) & _PATTERN[distance]) * _TIMES[distance], _STRIDE[distance]


@jit
def _match(dst: Bytes, o: int, distance: int, count: int, room: int) -> None:
    """Repeat what was written `distance` bytes ago; source and target may overlap."""
    if count + SLACK > room - o:
        for k in range(o, o + count):
            dst[np.uintp(k)] = dst[np.uintp(k - distance)]
    elif distance >= 16:
        for k in range(0, count, 16):
            copy16(dst, o + k, dst, o + k - distance)
    elif distance >= 8:
        for k in range(0, count, 8):
            put_word(dst, o + k, word_at(dst, o + k - distance))
    else:
        word, stride = _spelled(dst, o, distance)
        stop = o + count
        # no range(): its length would cost a division
        while o < stop:
            put_word(dst, o, word)
            o += stride


@jit
def lz4_block(src: Bytes, i: int, end: int, dst: Bytes, start: int, stop: int) -> int:
    """Decode the LZ4 block ``src[i:end]`` into ``dst[start:stop]``, which it must fill to the byte.

    Bytes of `dst` behind `stop` may be overwritten (never beyond its end), as the next block writes them anyway.

    Returns
    -------
    int
        0, or `BAD_BLOCK`.
    """
    o, room = start, dst.size
    while i < end:
        token = byte_at(src, i)
        i += 1
        count = token >> 4
        if count < 15 and src.size - i >= 16 and room - o >= 16:
            # most stretches are short: one copy of 16 bytes, however many are meant
            copy16(dst, o, src, i)
            if count > end - i or count > stop - o:
                return BAD_BLOCK
        else:
            i, count = _length(src, i, end, count)
            if i < 0 or count > end - i or count > stop - o:
                return BAD_BLOCK
            _literals(src, i, dst, o, count, room)
        i += count
        o += count
        if i == end:
            return 0 if o == stop else BAD_BLOCK
        if end - i < 2:
            return BAD_BLOCK
        distance = byte_at(src, i) | byte_at(src, i + 1) << 8
        i, count = i + 2, token & 15
        if count == 15:
            i, count = _length(src, i, end, count)
        count += 4
        if i < 0 or distance == 0 or distance > o - start or count > stop - o:
            return BAD_BLOCK
        if count > 18 or room - o < SLACK:
            _match(dst, o, distance, count, room)
        elif distance >= 16:
            copy16(dst, o, dst, o - distance)
            copy16(dst, o + 16, dst, o + 16 - distance)
        elif distance >= 8:
            for k in (0, 8, 16):
                put_word(dst, o + k, word_at(dst, o + k - distance))
        else:
            word, stride = _spelled(dst, o, distance)
            put_word(dst, o, word)
            put_word(dst, o + stride, word)
            put_word(dst, o + 2 * stride, word)
        o += count
    return BAD_BLOCK


@jit
def _length_at(src: Bytes, at: int) -> int:
    """The length of a block: 4 bytes, most significant first."""
    value = 0
    for k in range(at, at + 4):
        value = value << 8 | byte_at(src, k)
    return value


@jit
def _next(raw: Bytes, i: int, scratch: Bytes, count: int) -> int:
    """Decode the block whose length stands at `i` to `count` bytes; the next position or a negative code."""
    if raw.size - i < 4:
        return TOO_SHORT
    stop = i + 4 + _length_at(raw, i)
    if stop > raw.size:
        return TOO_SHORT
    return BAD_BLOCK if lz4_block(raw, i + 4, stop, scratch, 0, count) else stop


@jit
def _rest(raw: Bytes, i: int, out: Bytes, o: int) -> int:
    """Copy the bytes that were stored as they are; they must fill the chunk exactly."""
    if raw.size - i != out.size - o:
        return TOO_SHORT if raw.size - i < out.size - o else TOO_LONG
    for k in range(out.size - o):
        out[np.uintp(o + k)] = raw[np.uintp(i + k)]
    return 0


# one function for each size of a pixel, here and below: one that is handed another couldn't be cached
@jit
def _chunk1(raw: Bytes, out: Bytes, block: int, scratch: Bytes) -> int:
    i, o = 12, 0
    while out.size - o >= 8:
        count = min(block, (out.size - o) // 8 * 8)
        i = _next(raw, i, scratch, count)
        if i < 0:
            return i
        bits1(scratch, 0, count, out, o)
        o += count
    return _rest(raw, i, out, o)


@jit
def _chunk2(raw: Bytes, out: Bytes, block: int, scratch: Bytes) -> int:
    i, o = 12, 0
    while out.size - o >= 16:
        count = min(block, (out.size - o) // 16 * 16)
        i = _next(raw, i, scratch, count)
        if i < 0:
            return i
        bits2(scratch, 0, count, out, o)
        o += count
    return _rest(raw, i, out, o)


@jit
def _chunk4(raw: Bytes, out: Bytes, block: int, scratch: Bytes) -> int:
    i, o = 12, 0
    while out.size - o >= 32:
        count = min(block, (out.size - o) // 32 * 32)
        i = _next(raw, i, scratch, count)
        if i < 0:
            return i
        bits4(scratch, 0, count, out, o)
        o += count
    return _rest(raw, i, out, o)


@jit
def _chunk8(raw: Bytes, out: Bytes, block: int, scratch: Bytes) -> int:
    i, o = 12, 0
    while out.size - o >= 64:
        count = min(block, (out.size - o) // 64 * 64)
        i = _next(raw, i, scratch, count)
        if i < 0:
            return i
        bits8(scratch, 0, count, out, o)
        o += count
    return _rest(raw, i, out, o)


@jit
def frame_header(raw: Bytes, nbytes: int, group: int) -> int:
    """Bytes of a block after the header of filters 32004 and 32008, or a negative code of `REASONS`.

    The header must promise `nbytes` in all, in blocks of a multiple of `group` bytes.
    """
    if raw.size < 12:
        return TOO_SHORT
    total, block = _length_at(raw, 0) << 32 | _length_at(raw, 4), _length_at(raw, 8)
    return block if total == nbytes and block > 0 and block % group == 0 else BAD_HEADER


@jit
def _many1(raw: Bytes, at: Any, lengths: Any, out: Any, codes: Any, scratch: Bytes) -> None:
    for k in range(at.size):
        part = raw[at[k] : at[k] + lengths[k]]
        block = frame_header(part, out.shape[1], 8)
        codes[k] = _chunk1(part, out[k], block, scratch) if block > 0 else block


@jit
def _many2(raw: Bytes, at: Any, lengths: Any, out: Any, codes: Any, scratch: Bytes) -> None:
    for k in range(at.size):
        part = raw[at[k] : at[k] + lengths[k]]
        block = frame_header(part, out.shape[1], 16)
        codes[k] = _chunk2(part, out[k], block, scratch) if block > 0 else block


@jit
def _many4(raw: Bytes, at: Any, lengths: Any, out: Any, codes: Any, scratch: Bytes) -> None:
    for k in range(at.size):
        part = raw[at[k] : at[k] + lengths[k]]
        block = frame_header(part, out.shape[1], 32)
        codes[k] = _chunk4(part, out[k], block, scratch) if block > 0 else block


@jit
def _many8(raw: Bytes, at: Any, lengths: Any, out: Any, codes: Any, scratch: Bytes) -> None:
    for k in range(at.size):
        part = raw[at[k] : at[k] + lengths[k]]
        block = frame_header(part, out.shape[1], 64)
        codes[k] = _chunk8(part, out[k], block, scratch) if block > 0 else block


_MANY = {1: _many1, 2: _many2, 4: _many4, 8: _many8}


def bitshuffle_lz4(raw: Bytes, out: Bytes, size: int) -> int:
    """Undo bitshuffle with LZ4 (HDF5 filter 32008) for pixels of `size` bytes.

    The chunk: u64 bytes in all, u32 bytes of a block (both big-endian), then for every block a u32 length and an LZ4
    block. The last block is cut to whole groups of 8 pixels, fewer than 8 pixels follow as they are.

    Returns
    -------
    int
        0, or a negative code of `REASONS`.
    """
    whole = np.zeros(1, np.int64), np.full(1, raw.size, np.int64)
    return int(bitshuffle_lz4_many(raw, *whole, out.reshape(1, -1), size)[0])


def bitshuffle_lz4_many(raw: Bytes, at: Any, lengths: Any, out: Any, size: int) -> Any:
    """`bitshuffle_lz4` for many chunks in one call, without the interpreter in between.

    Parameters
    ----------
    raw : (m,) uint8
        Bytes that hold all the chunks.
    at, lengths : (n,) int64
        Where each chunk lies in `raw`.
    out : (n, nbytes) uint8
        The decoded chunks.
    size : int
        Bytes of a pixel.

    Returns
    -------
    (n,) int64
        For each chunk 0, or a negative code of `REASONS`.
    """
    codes = np.zeros(at.size, np.int64)
    _MANY[size](raw, at, lengths, out, codes, np.empty(out.shape[1] + SLACK, np.uint8))
    return codes


def unbitshuffle(raw: Bytes, out: Bytes, size: int, block: int) -> int:
    """Undo bitshuffle without compression: blocks of `block` bytes, then the rest as in `bitshuffle_lz4`."""
    o, group = 0, 8 * size
    if raw.size != out.size:
        return TOO_SHORT if raw.size < out.size else TOO_LONG
    if block <= 0 or block % group:
        return BAD_HEADER
    while out.size - o >= group:
        count = min(block, (out.size - o) // group * group)
        unshuffle_bits(raw, o, count, out, o, size)
        o += count
    out[o:] = raw[o:]
    return 0
