"""Tiles on the device: which bytes have to go there, and how they become native, corrected frames when they arrive."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gpuem import tiles
from gpuem.backends import Lost, cpu_load
from gpuem.backends import cuda_kernels as kernels
from gpuem.backends.chunk_grid import chunk_grid
from gpuem.backends.cuda_kernels import DeviceFrames
from gpuem.formats.source import Box, Chunks, Piece, Resident, Runs, Source, Stitched, part_of, stored_layout
from gpuem.storage.host import Files
from gpuem.storage.pinned import ALIGNED, Arrived, Extent, Load

Array = Any
# reading over a small gap is cheaper than another read
GAP_NBYTES = 1 << 16
_LZ4 = 2


class Workspace(Protocol):
    """What decoding may use on the device."""

    def scratch(self, purpose: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array of undefined content in memory that is kept for this purpose."""

    def even(self, frame: int) -> Array:
        """Where frames begin that follow one another at a distance of `frame`."""

    def tables(self) -> dict[str, Array]:
        """Dark, gain and dead pixels as far as they are given."""


@dataclass
class Tile:
    """One tile on its way to the device.

    Parameters
    ----------
    load : Load
        Its bytes.
    indices : (n,) int64
        Frames that arrive, in file order; known once the load is there.
    decode : callable
        Makes frames of what arrived; the codes of chunks that can't be decoded go to its last argument.
    lost : list of Lost
        Frames that won't arrive.
    chunks : int
        Chunks that report a code.
    """

    load: Load
    indices: NDArray[np.int64]
    decode: Callable[[Arrived, Workspace, Array], DeviceFrames]
    lost: list[Lost] = field(default_factory=list)
    chunks: int = 0


def on_device(source: Source, piece: Piece) -> bool:
    """Whether the bytes of a piece are decoded on the device; else on the processor, then copied as frames."""
    layout = stored_layout(piece.layout)
    if piece.stored.newbyteorder("=") not in kernels.PIXELS:
        return False
    if isinstance(layout, Stitched):
        return all(on_device(*part_of(source, piece, part)) for part in layout.parts)
    if isinstance(layout, Runs):
        return not piece.codec or piece.codec[0].name == "merlin"
    return isinstance(layout, Chunks) and _chunk_codec(piece) != ""


def _chunk_codec(piece: Piece) -> str:
    """The decoder of a piece's chunks: a kernel's name, ``plain``, or empty where there is none."""
    steps = piece.codec[:-1] if _shuffled(piece) else piece.codec
    if not steps:
        return "plain"
    if len(steps) == 1 and steps[0].name == "lz4":
        return "lz4"
    size, _, compression = (*steps[0].parameters, 0, _LZ4)[:3] if steps[0].name == "bitshuffle" else (0, 0, 0)
    alone = len(piece.codec) == 1 and compression == _LZ4 and size == piece.stored.itemsize
    return "bitshuffle_lz4" if alone else ""


def _shuffled(piece: Piece) -> bool:
    """Whether the last step gathers the bytes of pixels."""
    return (
        bool(piece.codec)
        and piece.codec[-1].name == "shuffle"
        and piece.codec[-1].parameters[0] == piece.stored.itemsize
    )


def describe(
    source: Source, files: Files, piece: Piece, box: Box, keep: NDArray[np.bool_], *, copy: bool = False
) -> Tile:
    """What has to be read for the wanted frames of a tile, and how it is decoded.

    Parameters are those of `gpuem.backends.cpu_load.load`; at least one frame must be wanted. With `copy` frames end in
    the scratch for ``pixels`` even where they could be used as they are.
    """
    indices = tiles.frames_of(piece, box)
    layout = stored_layout(piece.layout)
    if not on_device(source, piece):
        return by_host(source, files, piece, box, keep, copy)
    if isinstance(layout, Stitched):
        from gpuem.backends import cuda_stitch

        return cuda_stitch.describe(source, files, piece, box, keep, copy)
    if isinstance(layout, Runs):
        return of_runs(source, piece, layout, indices[keep], copy)
    assert isinstance(layout, Chunks)
    return of_chunks(source, files, piece, layout, (box, keep), copy)


def gather(
    file: NDArray[np.int64], at: NDArray[np.int64], length: NDArray[np.int64], apart: NDArray[np.bool_], gap: int
) -> tuple[tuple[Extent, ...], NDArray[np.int64], int]:
    """Byte ranges as few extents side by side in a slot; where each range then begins, and the bytes in all.

    Ranges of one file with at most `gap` bytes between them are read together, unless they are `apart`.
    """
    ends = at + length
    cut = apart | (file[1:] != file[:-1]) | (at[1:] < ends[:-1]) | (at[1:] - ends[:-1] > gap)
    firsts = np.concatenate([[0], np.flatnonzero(cut) + 1])
    lasts = np.concatenate([firsts[1:], [at.size]]) - 1
    low, sizes = at[firsts], ends[lasts] - at[firsts]
    slots = np.concatenate([[0], np.cumsum(-(-sizes // ALIGNED) * ALIGNED)])
    group = np.repeat(np.arange(firsts.size), lasts - firsts + 1)
    extents = zip(file[firsts].tolist(), low.tolist(), sizes.tolist(), slots.tolist(), strict=False)
    return tuple(Extent(*extent) for extent in extents), slots[group] + at - low[group], int(slots[-1])


def of_runs(source: Source, piece: Piece, runs: Runs, indices: NDArray[np.int64], copy: bool) -> Tile:
    """Frames that follow one another, as `describe` returns them."""
    ends = np.cumsum(runs.frames)
    local = indices - piece.start
    run = np.searchsorted(ends, local, side="right")
    first = np.asarray(ends - runs.frames, np.int64)
    at = np.asarray(runs.offset[run] + (local - first[run]) * runs.stride[run], np.int64)
    extents: tuple[Extent, ...] = ()
    positions, nbytes = at, 0
    if not isinstance(piece.layout, Resident):
        length = np.full(at.size, runs.frame_bytes, np.int64)
        # a slot is made for at most twice the bytes of its frames
        gap = min(GAP_NBYTES, runs.frame_bytes)
        extents, positions, nbytes = gather(runs.file[run], at, length, run[1:] != run[:-1], gap)
    if piece.codec:
        bits, chips_y, chips_x = piece.codec[0].parameters

        def unpack(arrived: Arrived, work: Workspace, codes: Array) -> DeviceFrames:
            shape = (indices.size, math.prod(source.frame_shape))
            pixels = work.scratch("unpacked", shape, source.raw_dtype)
            kernels.merlin(
                _bytes(piece, arrived), arrived.tables[0], pixels, bits, (chips_y, chips_x), source.frame_shape
            )
            return finish_even(source, work, pixels, copy)

        return Tile(Load(extents, nbytes, (positions,)), indices, unpack)
    finish, table = _finish(source, piece.stored, positions, copy, _base(piece))
    return Tile(
        Load(extents, nbytes, (table,)),
        indices,
        lambda arrived, work, codes: finish(_bytes(piece, arrived), arrived.tables[0], work),
    )


def _base(piece: Piece) -> int:
    """Address to which positions are added, as far as alignment goes: arrays of a user begin anywhere, slots don't."""
    return int(piece.layout.data.data.ptr) if isinstance(piece.layout, Resident) else 0


def _bytes(piece: Piece, arrived: Arrived) -> Array:
    return piece.layout.data if isinstance(piece.layout, Resident) else arrived.data


def is_direct(source: Source, stored: np.dtype[Any]) -> bool:
    """Whether stored pixels are used as they are."""
    return source.correction is None and stored == source.dtype


Finish = Callable[[Array, Array, Workspace], DeviceFrames]


def _finish(
    source: Source, stored: np.dtype[Any], positions: NDArray[np.int64], copy: bool, base: int = 0
) -> tuple[Finish, NDArray[np.int64]]:
    """The last step to native, corrected frames that begin at byte `positions` from address `base`; its table."""
    item, count = stored.itemsize, positions.size
    if is_direct(source, stored) and not copy and not ((positions | base) % item).any():
        # the lowest bit of any of them counts: for many frames a loop would take longer than the bus
        aligned = kernels.alignment(base, int(np.bitwise_or.reduce(positions)))

        def use(data: Array, starts: Array, work: Workspace) -> DeviceFrames:
            pixels = data[: data.size // item * item].view(source.dtype)
            return DeviceFrames(pixels, starts, count, source.frame_shape, aligned)

        return use, positions // item

    def convert(data: Array, at: Array, work: Workspace) -> DeviceFrames:
        size = math.prod(source.frame_shape)
        pixels = work.scratch("pixels", (count, size), source.dtype)
        tables = work.tables()
        kernels.convert(data, at, stored, (tables.get("dark"), tables.get("gain")), pixels)
        aligned = kernels.alignment(size * source.dtype.itemsize)
        frames = DeviceFrames(pixels.reshape(-1), work.even(size)[:count], count, source.frame_shape, aligned)
        if "dead" in tables:
            kernels.patch_dead(frames, tables["dead"], tables["offsets"], tables["neighbours"])
        return frames

    return convert, positions


def finish_even(source: Source, work: Workspace, pixels: Array, copy: bool) -> DeviceFrames:
    """The last step for native frames (n, pixels) that follow one another, all of them wanted."""
    (count, size), stored = pixels.shape, source.raw_dtype
    finish, _ = _finish(source, stored, np.arange(count, dtype=np.int64) * size * stored.itemsize, copy)
    step = size if is_direct(source, stored) and not copy else size * stored.itemsize
    return finish(pixels.reshape(-1).view(np.dtype(np.uint8)), work.even(step)[:count], work)


def of_chunks(
    source: Source, files: Files, piece: Piece, chunks: Chunks, which: tuple[Box, NDArray[np.bool_]], copy: bool
) -> Tile:
    """Frames in chunks, as `describe` returns them."""
    box, keep = which
    grid = chunk_grid(source, piece, chunks, box, keep)
    index, wanted = grid.index, grid.needed & grid.written
    if odd_chunks(piece, chunks, index[wanted]):
        return by_host(source, files, piece, box, keep, copy)
    lost = [Lost(frames, "chunk was never written", broken=False) for frames in grid.unwritten()]
    left = keep.copy()
    for item in lost:
        left &= ~np.isin(tiles.frames_of(piece, box), item.indices)
    indices = tiles.frames_of(piece, box)[left]
    rows = np.flatnonzero(wanted)
    if rows.size == 0:
        return Tile(Load(), indices, nothing, lost)
    length = chunks.length[index[rows]]
    extents: tuple[Extent, ...] = ()
    positions, nbytes = chunks.offset[index[rows]], 0
    if not isinstance(piece.layout, Resident):
        apart = np.zeros(rows.size - 1, np.bool_)
        extents, positions, nbytes = gather(
            chunks.file[index[rows]], chunks.offset[index[rows]], length, apart, gap=int(length.min())
        )
    # chunks that nobody asked for repeat one that was read: a tile's grid has no holes
    fill = np.clip(np.searchsorted(rows, np.arange(index.size)), 0, rows.size - 1)
    geometry = grid.geometry()
    frame_nbytes = math.prod(source.frame_shape) * piece.stored.itemsize
    finish, table = _finish(source, piece.stored, np.flatnonzero(left) * frame_nbytes, copy)
    shape = (index.size, math.prod(chunks.shape))

    def decode(arrived: Arrived, work: Workspace, codes: Array) -> DeviceFrames:
        at, lengths, placing, frames_table = arrived.tables
        decoded = _decode_chunks(piece, (_bytes(piece, arrived), at, lengths), shape, work, codes)
        if not grid.follow_one_another:
            placed = work.scratch("placed", (left.size, math.prod(source.frame_shape)), piece.stored)
            kernels.place_chunks(decoded, placing, placed)
            decoded = placed
        return finish(decoded.reshape(-1).view(np.dtype(np.uint8)), frames_table, work)

    tables = (positions[fill], length[fill], geometry, table)
    return Tile(Load(extents, nbytes, tables), indices, decode, lost, reporting(piece) * index.size)


def odd_chunks(piece: Piece, chunks: Chunks, rows: NDArray[np.int64] | slice) -> bool:
    """Whether the processor must look at some of these: a filter was left out, or the size isn't that of the pixels."""
    length, nbytes = chunks.length[rows], math.prod(chunks.shape) * piece.stored.itemsize
    wrong = _chunk_codec(piece) == "plain" and ((length != nbytes) & (length > 0)).any()
    return bool(wrong or chunks.skipped[rows].any())


def reporting(piece: Piece) -> bool:
    """Whether the chunks of a piece report a code when they are decoded on the device."""
    return isinstance(stored_layout(piece.layout), Chunks) and _chunk_codec(piece) in ("bitshuffle_lz4", "lz4")


def nothing(arrived: Arrived, work: Workspace, codes: Array) -> DeviceFrames:
    """Stand for the decoding of a tile in which no frame is left."""
    raise AssertionError("a tile without frames is not decoded")


def _decode_chunks(
    piece: Piece, raw: tuple[Array, Array, Array], shape: tuple[int, int], work: Workspace, codes: Array
) -> Array:
    """Decode chunks (bytes, positions, lengths) into rows of scratch, `shape` (chunks, pixels of a chunk)."""
    data, at, lengths = raw
    out = work.scratch("decoded", shape, piece.stored)
    target = work.scratch("shuffled", shape, piece.stored) if _shuffled(piece) else out
    codec = _chunk_codec(piece)
    if codec == "bitshuffle_lz4":
        kernels.bitshuffle_lz4(data, at, lengths, target, codes)
    elif codec == "lz4":
        kernels.lz4(data, at, lengths, target, codes)
    else:
        bits = np.dtype(f"u{piece.stored.itemsize}")
        kernels.convert(data, at, bits, (None, None), target.view(bits))
    if _shuffled(piece):
        kernels.unshuffle(target, out)
    return out


def by_host(source: Source, files: Files, piece: Piece, box: Box, keep: NDArray[np.bool_], copy: bool) -> Tile:
    """Decode on the processor, in a reader thread; frames cross the bus in their native type."""
    raw = source if source.correction is None else replace(source, dtype=source.raw_dtype, correction=None)
    size = math.prod(source.frame_shape)
    nbytes = int(keep.sum()) * source.frame_nbytes

    def fill(buffer: NDArray[np.uint8]) -> None:
        frames = buffer.view(source.raw_dtype).reshape(-1, size)
        found: list[NDArray[np.int64]] = []
        count = 0
        for item in cpu_load.load(raw, files, piece, box, keep):
            if isinstance(item, Lost):
                tile.lost.append(item)
                continue
            for start in item.frames.starts.tolist():
                frames[count] = item.frames.pixels[start : start + size]
                count += 1
            found.append(item.indices)
        tile.indices = np.concatenate(found) if found else np.empty(0, np.int64)

    def decode(arrived: Arrived, work: Workspace, codes: Array) -> DeviceFrames:
        pixels = arrived.data.view(source.raw_dtype).reshape(-1, size)[: tile.indices.size]
        return finish_even(source, work, pixels, copy)

    tile = Tile(Load(nbytes=nbytes, fill=fill), np.empty(0, np.int64), decode)
    return tile


def needs(source: Source, cuts: Sequence[tuple[int, ...]]) -> dict[str, int]:
    """Bytes of the device by purpose: what one slot must hold, and the scratch of every step of decoding."""
    found: dict[str, int] = {}
    for piece, tile in zip(source.pieces, cuts, strict=True):
        for purpose, nbytes in needs_of(source, piece, tile).items():
            found[purpose] = max(found.get(purpose, 0), nbytes)
    return found


def needs_of(source: Source, piece: Piece, tile: tuple[int, ...]) -> dict[str, int]:
    """What `needs` counts, for tiles of one piece."""
    found: dict[str, int] = {}

    def want(purpose: str, nbytes: int) -> None:
        found[purpose] = max(found.get(purpose, 0), nbytes)

    layout, frames = stored_layout(piece.layout), math.prod(tile)
    resident = isinstance(piece.layout, Resident)
    want("tables", frames * 8)
    # what the last step finds: the file's own pixels, or native ones
    stored = source.raw_dtype
    if not on_device(source, piece):
        want("slot", frames * source.frame_nbytes)
    elif isinstance(layout, Stitched):
        from gpuem.backends import cuda_stitch

        for purpose, nbytes in cuda_stitch.needs(source, piece, tile).items():
            want(purpose, nbytes)
    elif isinstance(layout, Runs):
        stride = np.clip(layout.stride, layout.frame_bytes, 2 * layout.frame_bytes).max(initial=0)
        want("slot", 0 if resident else frames * (int(stride) + ALIGNED))
        if piece.codec:
            want("unpacked", frames * source.frame_nbytes)
        else:
            stored = piece.stored
            places = layout.stride | layout.offset | _base(piece) if resident else layout.stride
            if (places % stored.itemsize).any():
                want("pixels", frames * source.corrected_nbytes)
    elif isinstance(layout, Chunks):
        stored = piece.stored
        around = [-(-t // c) * c for t, c in zip((*tile, *source.frame_shape), layout.shape, strict=True)]
        number = math.prod(around) // math.prod(layout.shape)
        want("tables", frames * 8 + number * 16 + 1024)
        # two reads that are close are one, with what lies between
        want("slot", 0 if resident else number * (2 * int(layout.length.max(initial=0)) + ALIGNED))
        want("slot", frames * source.frame_nbytes if odd_chunks(piece, layout, slice(None)) else 0)
        want("decoded", math.prod(around) * piece.stored.itemsize)
        want("shuffled", math.prod(around) * piece.stored.itemsize if _shuffled(piece) else 0)
        want("placed", frames * math.prod(source.frame_shape) * piece.stored.itemsize)
    if not is_direct(source, stored):
        want("pixels", frames * source.corrected_nbytes)
    return found
