"""Bit planes and byte planes back to pixels, in vector registers.

Bitshuffle stores bit k of all pixels of a block together, shuffle stores byte k of all pixels together. Undoing either
is a transpose. It is written here as vectors of 32 bytes in LLVM's own terms, which become AVX2, SSE2 or NEON
instructions, whatever the processor has; detectors that count few electrons leave most planes zero, and zero planes
cost nothing.

Positions are byte positions in buffers and aren't checked: callers have compared them with the buffers' sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from gpuem.codecs.compiled import compiled

Bytes = NDArray[np.uint8]
jit = compiled
_BYTE, _WORD, _VECTOR, _HALF = ir.IntType(8), ir.IntType(64), ir.VectorType(ir.IntType(8), 32), 16


def _intrinsic(build: Callable[..., Any]) -> Any:
    """Let compiled code use the instructions that `build` writes; whole numbers known beforehand stay known."""
    return intrinsic(prefer_literal=True)(build)


def _pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any, target: Any = _BYTE) -> Any:
    """Address of byte `index` of a byte array as a pointer to `target`; no bounds, no wrap-around."""
    data = context.make_array(kind)(context, builder, value=array).data
    return builder.bitcast(builder.gep(data, [index]), target.as_pointer())


@_intrinsic
def byte_at(typing: Any, source: Any, index: Any) -> Any:
    """One byte as int64."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.zext(builder.load(_pointer(context, builder, signature.args[0], *args)), _WORD)

    return types.int64(source, types.int64), build


@_intrinsic
def word_at(typing: Any, source: Any, index: Any) -> Any:
    """Eight bytes at any address, in the machine's order, as uint64."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_pointer(context, builder, signature.args[0], args[0], args[1], _WORD), align=1)

    return types.uint64(source, types.int64), build


@_intrinsic
def put_word(typing: Any, target: Any, index: Any, value: Any) -> Any:
    """Write eight bytes at any address."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _pointer(context, builder, signature.args[0], args[0], args[1], _WORD), align=1)
        return context.get_dummy_value()

    return types.void(target, types.int64, types.uint64), build


@_intrinsic
def copy16(typing: Any, target: Any, at: Any, source: Any, index: Any) -> Any:
    """Copy 16 bytes, all read before any is written."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        half = ir.VectorType(_BYTE, _HALF)
        value = builder.load(_pointer(context, builder, signature.args[2], args[2], args[3], half), align=1)
        builder.store(value, _pointer(context, builder, signature.args[0], args[0], args[1], half), align=1)
        return context.get_dummy_value()

    return types.void(target, types.int64, source, types.int64), build


def _splat(value: int) -> ir.Constant:
    return ir.Constant(_VECTOR, [value] * 32)


def _interleave(builder: Any, vectors: list[Any]) -> list[Any]:
    """Turn n vectors of lanes g into the order (g, n), within each half of 16 lanes.

    Each round writes two vectors' lanes alternately, which turns the address bits (vector, lane) by one place.
    """
    low = [k for h in (0, 16) for g in range(8) for k in (h + g, 32 + h + g)]
    masks = [ir.Constant(ir.VectorType(ir.IntType(32), 32), [k + s for k in low]) for s in (0, 8)]
    half = len(vectors) // 2
    for _ in range(len(vectors).bit_length() - 1):
        pairs = zip(vectors[:half], vectors[half:], strict=True)
        vectors = [builder.shuffle_vector(a, b, mask) for a, b in pairs for mask in masks]
    return vectors


def _butterfly(builder: Any, planes: list[Any]) -> list[Any]:
    """Transpose bits: from 8 planes (bit j of byte g belongs to pixel 8 g + j) to 8 vectors, one for each j."""
    planes = list(planes)
    for distance, mask in ((1, 0x55), (2, 0x33), (4, 0x0F)):
        keep, shift = _splat(mask), _splat(distance)
        for k in (k for k in range(8) if not k & distance):
            a, b = planes[k], planes[k + distance]
            swap = builder.and_(builder.xor(builder.lshr(a, shift), b), keep)
            planes[k + distance] = builder.xor(b, swap)
            planes[k] = builder.xor(a, builder.shl(swap, shift))
    return planes


def _store_halves(builder: Any, vectors: list[Any], base: Any) -> None:
    """Write the lower halves of all vectors one after another, then the upper halves."""
    for h in (0, 1):
        mask = ir.Constant(ir.VectorType(ir.IntType(32), _HALF), list(range(h * _HALF, (h + 1) * _HALF)))
        for k, vector in enumerate(vectors):
            place = builder.gep(base, [ir.Constant(_WORD, (h * len(vectors) + k) * _HALF)])
            half = builder.shuffle_vector(vector, vector, mask)
            builder.store(half, builder.bitcast(place, half.type.as_pointer()), align=1)


@_intrinsic
def _pixels(typing: Any, src: Any, at: Any, plane: Any, dst: Any, to: Any, size: Any, used: Any) -> Any:
    """256 pixels of `size` bytes from 32 bytes of each bit plane; planes not among the bits `used` count as zero."""
    if not isinstance(size, types.IntegerLiteral) or not isinstance(used, types.IntegerLiteral):
        return None
    itemsize, mask = size.literal_value, used.literal_value

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base = _pointer(context, builder, signature.args[0], args[0], args[1])
        columns: list[list[Any]] = []
        for k in range(itemsize):
            planes = []
            for bit in range(8 * k, 8 * k + 8):
                place = builder.gep(base, [builder.mul(args[2], ir.Constant(_WORD, bit))])
                load = mask >> bit & 1
                vector = builder.load(builder.bitcast(place, _VECTOR.as_pointer()), align=1) if load else _splat(0)
                planes.append(vector)
            columns.append(_butterfly(builder, planes) if mask >> 8 * k & 0xFF else planes)
        vectors = _interleave(builder, [columns[k][j] for j in range(8) for k in range(itemsize)])
        _store_halves(builder, vectors, _pointer(context, builder, signature.args[3], args[3], args[4]))
        return context.get_dummy_value()

    return types.void(src, types.int64, types.int64, dst, types.int64, size, used), build


@_intrinsic
def _items(typing: Any, src: Any, at: Any, plane: Any, dst: Any, to: Any, size: Any) -> Any:
    """32 items of `size` bytes from 32 bytes of each byte plane."""
    if not isinstance(size, types.IntegerLiteral):
        return None
    itemsize = size.literal_value

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base = _pointer(context, builder, signature.args[0], args[0], args[1])
        vectors = []
        for k in range(itemsize):
            place = builder.gep(base, [builder.mul(args[2], ir.Constant(_WORD, k))])
            vectors.append(builder.load(builder.bitcast(place, _VECTOR.as_pointer()), align=1))
        target = _pointer(context, builder, signature.args[3], args[3], args[4])
        _store_halves(builder, _interleave(builder, vectors), target)
        return context.get_dummy_value()

    return types.void(src, types.int64, types.int64, dst, types.int64, size), build


@jit
def _used(src: Bytes, at: int, end: int) -> bool:
    """Whether any byte of ``src[at:end]`` isn't zero."""
    while end - at >= 64:
        found = np.uint64(0)
        for k in range(8):
            found |= word_at(src, at + 8 * k)
        if found:
            return True
        at += 64
    found = np.uint64(0)
    for k in range(at, end):
        found |= np.uint64(byte_at(src, k))
    return bool(found != 0)


@jit
def _few(src: Bytes, at: int, plane: int, dst: Bytes, to: int, size: int) -> None:
    """A block too small for vectors: one 8x8 bit transpose in a 64-bit word at a time."""
    for g in range(plane):
        for k in range(size):
            word = np.uint64(0)
            for j in range(8):
                word |= np.uint64(byte_at(src, at + (8 * k + j) * plane + g)) << np.uint64(8 * j)
            for shift, mask in ((7, 0x00AA00AA00AA00AA), (14, 0x0000CCCC0000CCCC), (28, 0x00000000F0F0F0F0)):
                swap = (word ^ (word >> np.uint64(shift))) & np.uint64(mask)
                word ^= swap ^ (swap << np.uint64(shift))
            for j in range(8):
                dst[np.uintp(to + (8 * g + j) * size + k)] = np.uint8(word >> np.uint64(8 * j))


def _bits(size: int) -> Callable[[Bytes, int, int, Bytes, int], None]:
    """Compile the transpose of one block of `size`-byte pixels; see `unshuffle_bits`."""
    # planes that can be left out: the upper half of a counter's lowest byte, all but its lowest byte, all but its last
    # byte (the lowest one in big-endian order)
    group, every, last = 8 * size, (1 << 8 * size) - 1, 0xFF << 8 * (size - 1)

    def transpose(src: Bytes, at: int, nbytes: int, dst: Bytes, to: int) -> None:
        plane = nbytes // group
        if plane < 32:
            _few(src, at, plane, dst, to, size)
        elif size > 1 and _used(src, at + 8 * plane, at + nbytes):
            if _used(src, at, at + (group - 8) * plane):
                for g in range(0, plane, 32):
                    # the last vector overlaps the one before, so no rest remains
                    k = min(g, plane - 32)
                    _pixels(src, at + k, plane, dst, to + group * k, size, every)
            else:
                for g in range(0, plane, 32):
                    k = min(g, plane - 32)
                    _pixels(src, at + k, plane, dst, to + group * k, size, last)
        elif _used(src, at + 4 * plane, at + 8 * plane):
            for g in range(0, plane, 32):
                k = min(g, plane - 32)
                _pixels(src, at + k, plane, dst, to + group * k, size, 0xFF)
        else:
            for g in range(0, plane, 32):
                k = min(g, plane - 32)
                _pixels(src, at + k, plane, dst, to + group * k, size, 0xF)

    # a name for each size: Numba keeps compiled functions by name
    transpose.__qualname__ = f"transpose_bits{size}"
    return jit(transpose)


def _bytes(size: int) -> Callable[[Bytes, int, Bytes], None]:
    """Compile the transpose of n >= 32 items from `size` byte planes."""

    def transpose(src: Bytes, n: int, dst: Bytes) -> None:
        for g in range(0, n, 32):
            k = min(g, n - 32)
            _items(src, k, n, dst, size * k, size)

    transpose.__qualname__ = f"transpose_bytes{size}"
    return jit(transpose)


# one compiled function for each size, compiled when first used; a function made from a function couldn't be cached
bits1, bits2, bits4, bits8 = _bits(1), _bits(2), _bits(4), _bits(8)
_BITS = {1: bits1, 2: bits2, 4: bits4, 8: bits8}
_BYTES = {2: _bytes(2), 4: _bytes(4), 8: _bytes(8)}


def unshuffle_bits(src: Bytes, at: int, nbytes: int, dst: Bytes, to: int, size: int) -> None:
    """Turn the bit planes ``src[at:at + nbytes]`` of one block into pixels at ``dst[to:to + nbytes]``.

    Parameters
    ----------
    src, dst : (n,) uint8
        The buffers; `nbytes` is a multiple of 8 * `size`.
    size : int
        Bytes of a pixel: 1, 2, 4 or 8. Bit k of byte b of a pixel lies in plane 8 b + k, pixels from the lowest bit up.
    """
    _BITS[size](src, at, nbytes, dst, to)


def unshuffle_bytes(raw: Bytes, out: Bytes, size: int) -> None:
    """Undo HDF5's shuffle: byte k of all items lies together, bytes that fill no item follow as they are."""
    n = raw.size // size
    whole = n * size
    if size in _BYTES and n >= 32:
        _BYTES[size](raw, n, out)
    else:
        out[:whole].reshape(n, size)[...] = raw[:whole].reshape(size, n).T
    out[whole:] = raw[whole:]
