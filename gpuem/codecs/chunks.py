"""Chunk codecs: the chain of filters that HDF5 and Zarr put a chunk through, undone step by step.

Every step is a row of `_STEPS`: a function that fills a buffer of known size. The sizes are known before anything is
decoded, from the chunk's shape backwards, so a chunk that lies about itself can neither allocate nor write too much.
"""

from __future__ import annotations

import importlib
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.errors import DataError
from gpuem.formats.source import Step

Bytes = NDArray[np.uint8]
_ZSTD, _LZ4 = 3, 2
# steps that keep the size but for a few bytes, which they take off
_SAME_SIZE = {"shuffle": 0, "fletcher32": 4}


def decode(
    steps: tuple[Step, ...], skipped: int, raw: Bytes, nbytes: int, *, out: Bytes | None = None
) -> NDArray[np.uint8]:
    """Undo the filters of one chunk.

    Safe to call from several threads; the decoders run without the interpreter lock.

    Parameters
    ----------
    steps : tuple of Step
        The codec, in the order in which the steps are undone.
    skipped : int
        Bit k set: the step that was applied k-th in writing, ``steps[-1 - k]``, was left out for this chunk.
    raw : (m,) uint8
        The chunk as it is stored.
    nbytes : int
        Bytes of the decoded chunk.
    out : (nbytes,) uint8, optional
        Where the chunk goes; saves the allocation, which for frames of 128 KiB costs as much as the decoding.

    Returns
    -------
    (nbytes,) uint8
        The chunk; `raw` itself where no step was applied.

    Raises
    ------
    DataError
        The bytes are damaged, or they decode to another size.
    """
    applied = [step for k, step in enumerate(steps) if not skipped >> (len(steps) - 1 - k) & 1]
    data = np.ascontiguousarray(raw)
    for k, step in enumerate(applied):
        size = _size(data.size, applied[k:], nbytes)
        target = out if out is not None and k == len(applied) - 1 else np.empty(size, np.uint8)
        try:
            data = _STEPS[step.name](data, target, *step.parameters)
        except _BrokenError as error:
            raise DataError(f"a chunk of {raw.size} bytes can't be decoded by {step.name}: {error}") from None
        except KeyError:
            raise DataError(f"a chunk is stored with {step.name}, which gpuem can't decode") from None
        if data.size != size:
            raise DataError(
                f"a chunk of {raw.size} bytes decodes by {step.name} to {data.size} bytes instead of {size}"
            )
    if data.size != nbytes:
        raise DataError(f"a chunk holds {data.size} bytes instead of {nbytes}")
    if out is not None and data is not out:
        out[:] = data
        return out
    return data


def decode_many(
    steps: tuple[Step, ...],
    skipped: NDArray[np.uint32],
    raw: Bytes,
    at: NDArray[np.int64],
    lengths: NDArray[np.int64],
    out: NDArray[np.uint8],
) -> dict[int, str]:
    """Undo the filters of many chunks that lie in one stretch of bytes.

    Parameters
    ----------
    steps : tuple of Step
        The codec, as for `decode`.
    skipped : (n,) uint32
        Steps left out, per chunk.
    raw : (m,) uint8
        Bytes that hold all the chunks.
    at, lengths : (n,) int64
        Where each chunk lies in `raw`.
    out : (n, nbytes) uint8
        The decoded chunks.

    Returns
    -------
    dict of int to str
        What is wrong with the chunks that can't be decoded, by their index.
    """
    if len(steps) == 1 and steps[0].name == "bitshuffle" and not skipped.any():
        size, _, compression = (*steps[0].parameters, 0, _LZ4)[:3]
        if compression == _LZ4 and size in (1, 2, 4, 8):
            from gpuem.codecs import bitshuffle

            codes = bitshuffle.bitshuffle_lz4_many(raw, at, lengths, out, size)
            return {int(k): f"{lengths[k]} bytes: {bitshuffle.REASONS[int(codes[k])]}" for k in np.flatnonzero(codes)}
    broken = {}
    for k in range(at.size):
        try:
            decode(steps, int(skipped[k]), raw[at[k] : at[k] + lengths[k]], out.shape[1], out=out[k])
        except DataError as error:
            broken[k] = str(error)
    return broken


def known(steps: tuple[Step, ...]) -> list[str]:
    """Names of the steps that `decode` can't undo; empty when it can undo all of them."""
    return [step.name for step in steps if step.name not in _STEPS]


def _size(have: int, left: list[Step], nbytes: int) -> int:
    """Bytes that the first of the steps that are `left` must give, of `have` bytes, for the last to give `nbytes`."""
    if left[0].name in _SAME_SIZE and any(step.name not in _SAME_SIZE for step in left[1:]):
        return max(0, have - _SAME_SIZE[left[0].name])
    return nbytes + sum(_SAME_SIZE[step.name] for step in left[1:] if step.name in _SAME_SIZE)


class _BrokenError(Exception):
    """Why a step can't be undone."""


def _imagecodecs(name: str, **options: Any) -> Callable[..., Bytes]:
    """A decoder of imagecodecs as a step: it is loaded when first used, and its errors say what is broken."""

    def undo(raw: Bytes, out: Bytes, *parameters: int) -> Bytes:
        library = importlib.import_module("imagecodecs")
        try:
            decoded = getattr(library, f"{name}_decode")(raw, out=out, **options)
        except (RuntimeError, ValueError, OverflowError) as error:
            raise _BrokenError(str(error)) from None
        return np.frombuffer(decoded, np.uint8)

    return undo


def _blosc(raw: Bytes, out: Bytes, *parameters: int) -> Bytes:
    """Blosc 1: its header says both sizes, which are compared before the library sees the chunk."""
    if raw.size < 16:
        raise _BrokenError("it is shorter than its header")
    nbytes, _, stored = struct.unpack("<4xIII", raw[:16].tobytes())
    if nbytes != out.size or stored != raw.size:
        raise _BrokenError(
            f"its header says {stored} bytes that hold {nbytes}; there are {raw.size} to hold {out.size}"
        )
    return _imagecodecs("blosc", numthreads=1)(raw, out)


def _bitshuffle(raw: Bytes, out: Bytes, itemsize: int, block: int = 0, compression: int = _LZ4) -> Bytes:
    """Bitshuffle; `block` in pixels (0: 8 KiB), `compression` 0 none, 2 LZ4, 3 zstd; the last two say it themselves."""
    from gpuem.codecs import bitshuffle

    if itemsize not in (1, 2, 4, 8):
        raise _BrokenError(f"pixels of {itemsize} bytes; 1, 2, 4 and 8 are known")
    if compression == _LZ4:
        return _checked(bitshuffle.bitshuffle_lz4(raw, out, itemsize), out)
    if compression == _ZSTD:
        return _bitshuffle_zstd(raw, out, itemsize)
    if compression:
        raise _BrokenError(f"compression {compression} of bitshuffle is unknown")
    # the library's own default: 8 KiB, in whole groups of 8 pixels
    return _checked(bitshuffle.unbitshuffle(raw, out, itemsize, (block or 8192 // itemsize) * itemsize), out)


def _bitshuffle_zstd(raw: Bytes, out: Bytes, itemsize: int) -> Bytes:
    """Bitshuffle whose blocks are zstd frames."""
    from gpuem.codecs import planes

    zstd = _imagecodecs("zstd")

    def block(part: Bytes, target: Bytes) -> int:
        shuffled = zstd(part, np.empty(target.size, np.uint8))
        if shuffled.size == target.size:
            planes.unshuffle_bits(shuffled, 0, target.size, target, 0, itemsize)
        return shuffled.size

    return _framed(raw, out, 8 * itemsize, block)


def _lz4(raw: Bytes, out: Bytes, *parameters: int) -> Bytes:
    """The HDF5 lz4 filter: a block that LZ4 couldn't make smaller is stored as it is."""
    from gpuem.codecs import bitshuffle

    def block(part: Bytes, target: Bytes) -> int:
        if part.size == target.size:
            target[:] = part
            return part.size
        return bitshuffle.BAD_BLOCK if bitshuffle.lz4_block(part, 0, part.size, target, 0, target.size) else target.size

    return _framed(raw, out, 1, block)


def _framed(raw: Bytes, out: Bytes, group: int, block: Callable[[Bytes, Bytes], int]) -> Bytes:
    """Blocks behind a header (u64 bytes in all, u32 bytes of a block) and u32 lengths, all big-endian.

    `block` decodes one and returns how many bytes it gave. All but the last have the same size; the last ends with a
    whole `group` of bytes, and what remains follows as it is.
    """
    from gpuem.codecs import bitshuffle

    size = int(bitshuffle.frame_header(raw, out.size, group))
    _checked(size, out)
    i, o = 12, 0
    while out.size - o >= group:
        count = min(size, (out.size - o) // group * group)
        stop = i + 4 + int.from_bytes(raw[i : i + 4].tobytes(), "big")
        if stop > raw.size or i + 4 > raw.size:
            return _checked(bitshuffle.TOO_SHORT, out)
        if block(raw[i + 4 : stop], out[o : o + count]) != count:
            return _checked(bitshuffle.BAD_BLOCK, out)
        i, o = stop, o + count
    if raw.size - i != out.size - o:
        return _checked(bitshuffle.TOO_SHORT if raw.size - i < out.size - o else bitshuffle.TOO_LONG, out)
    out[o:] = raw[i:]
    return out


def _shuffle(raw: Bytes, out: Bytes, itemsize: int) -> Bytes:
    from gpuem.codecs import planes

    if itemsize < 1:
        raise _BrokenError(f"elements of {itemsize} bytes")
    if raw.size != out.size:
        raise _BrokenError(f"{raw.size} bytes instead of {out.size}")
    planes.unshuffle_bytes(raw, out, itemsize)
    return out


def _fletcher32(raw: Bytes, out: Bytes, *parameters: int) -> Bytes:
    """Compare the checksum that follows the data, then drop it."""
    library = importlib.import_module("imagecodecs")
    if raw.size < 4:
        raise _BrokenError("it is shorter than its checksum")
    data = raw[:-4]
    told, found = int.from_bytes(raw[-4:].tobytes(), "little"), int(library.h5checksum_fletcher32(data))
    # HDF5 up to 1.6.2 wrote the bytes of each half the other way round
    if found not in (told, (told & 0x00FF00FF) << 8 | told >> 8 & 0x00FF00FF):
        raise _BrokenError(f"its checksum is {found:08x}, the file says {told:08x}")
    return data


def _checked(code: int, out: Bytes) -> Bytes:
    """The decoded bytes, or the reason that a decoder of `gpuem.codecs.bitshuffle` gave."""
    from gpuem.codecs import bitshuffle

    if code < 0:
        raise _BrokenError(bitshuffle.REASONS[code])
    return out


_STEPS: dict[str, Callable[..., Bytes]] = {
    "deflate": _imagecodecs("deflate"),
    "zstd": _imagecodecs("zstd"),
    "lzf": _imagecodecs("lzf"),
    "blosc": _blosc,
    "lz4": _lz4,
    "bitshuffle": _bitshuffle,
    "shuffle": _shuffle,
    "fletcher32": _fletcher32,
}
