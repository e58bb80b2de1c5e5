"""What a run takes on the GPU and beside it, counted before anything is allocated."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpuem import tiles
from gpuem.backends import cuda_device, cuda_fits, cuda_load, cuda_stitch
from gpuem.errors import DeviceError, PlanError
from gpuem.formats.source import Chunks, Resident, Runs, Source, Stitched, stored_layout
from gpuem.storage import gds
from gpuem.storage.pinned import slot_nbytes
from gpuem.tiles import Limits, Plan, Shard, Sizes

if TYPE_CHECKING:
    from gpuem.backends.cuda import Prepared

# one slot is computed with, one is copied, the others are filled
SLOTS = 4
# shards in work: one adds up while the sums of the one before are copied back
SUMS = 2
# large enough that launching costs nothing beside copying, small enough to stay in the second-level cache when decoded;
# with its tables a slot is a little smaller than 32 MiB: page-locked memory comes in powers of two
SIZES = Sizes(runs_tile=30 << 20, tile=30 << 20, shard=240 << 20)
# so many threads read the page cache faster than the bus takes it
READERS = 16
# the driver's context, loaded kernels, and what the allocator rounds up
CONTEXT_NBYTES = 600 << 20
# of the free memory, what a run takes at most when it isn't told
SHARE = 0.9


def plan(source: Source, prepared: Prepared, limits: Limits) -> Plan:
    """Cut a source into shards and tiles for the GPU, and count the memory.

    Raises
    ------
    PlanError
        It doesn't fit into the GPU's memory, or into that of the host; with the numbers.
    """
    shards, cuts = tiles.cut(source, SIZES)
    slot, scratch = buffers(source, cuts)
    sums = sums_nbytes(source, prepared, shards, cuts)
    readers = min(limits.threads, READERS)
    fixed = {
        "decoding": sum(scratch.values()),
        "sums of shards": SUMS * sums,
        "masks and weights": table_nbytes(source, prepared) + 16 * max((math.prod(c) for c in cuts), default=0),
        "looking again at broken tiles": sums + _largest_tile(source, cuts),
    }
    if prepared.weights.fits:
        # not the largest of them: what cuFFT needs for one frame size stays until the process ends
        scratches = [cuda_fits.scratch_nbytes(fit, source.frame_shape) for fit in prepared.weights.fits]
        fixed["scratch of fits"] = sum(scratches)
    free = cuda_device.gpu().free
    allowed = min(free, limits.device_memory) if limits.device_memory is not None else int(SHARE * free)
    device = {**fixed, f"{SLOTS} slots": SLOTS * slot}
    _refuse("the GPU's memory", device, allowed, f"{free / 1e6:,.1f} MB of it are free", "[run] device_memory")
    per_position = sum(part.width for part in prepared.parts) * 8 + len(prepared.weights.images) * 8 + 8
    fits = sum(4 * fit.columns for fit in prepared.weights.fits)
    host = {
        "Python, libraries, kernels": tiles.BASE_NBYTES + CONTEXT_NBYTES,
        "sums and maps": limits.positions * (2 * per_position + fits + limits.map_nbytes),
        **({"sample of frames": limits.sample_nbytes} if limits.sample_nbytes else {}),
        "images": 3 * _image_nbytes(prepared),
        "page-locked slots": SLOTS * slot + SUMS * sums,
        f"{readers} readers": _reader_nbytes(source, cuts, readers),
    }
    _refuse("memory", host, limits.memory, "", "[run] memory")
    return Plan(shards, cuts, readers, host, device)


def buffers(source: Source, cuts: tuple[tuple[int, ...], ...]) -> tuple[int, dict[str, int]]:
    """Bytes of a slot, and of the scratch of every step of decoding: what is counted here is what a run allocates."""
    needs = cuda_load.needs(source, cuts)
    return slot_nbytes(needs.pop("slot", 0), (needs.pop("tables", 0), 4096)), needs


def _refuse(what: str, needed: dict[str, int], allowed: int, note: str, key: str) -> None:
    total = sum(needed.values())
    if total > allowed:
        parts = ", ".join(f"{name} {n / 1e6:,.1f} MB" for name, n in needed.items())
        raise PlanError(
            f"the run needs {total / 1e6:,.1f} MB of {what} and may take {allowed / 1e6:,.1f} MB"
            f"{f' ({note})' if note else ''}: {parts}. Allow more ({key}), end what else uses it, or store the data in "
            "chunks of fewer frames"
        )


def sums_nbytes(
    source: Source, prepared: Prepared, shards: tuple[Shard, ...], cuts: tuple[tuple[int, ...], ...]
) -> int:
    """Bytes of the accumulators of the largest shard."""
    from gpuem.backends import cuda

    frames = max((shard.frames for shard in shards), default=0)
    return cuda.places(prepared, frames, chunks_of_shard(source, shards, cuts))[1]


def chunks_of_shard(source: Source, shards: tuple[Shard, ...], cuts: tuple[tuple[int, ...], ...]) -> int:
    """Most chunks of a shard that are decoded on the device, each of which reports a code."""
    most = 0
    for shard in shards:
        piece, tile = source.pieces[shard.piece], cuts[shard.piece]
        layout = stored_layout(piece.layout)
        if isinstance(layout, Stitched) and cuda_load.on_device(source, piece):
            most = max(most, (shard.last - shard.first) * cuda_stitch.chunks_of_tile(piece, tile))
        if isinstance(layout, Chunks) and cuda_load.reporting(piece) and cuda_load.on_device(source, piece):
            per_tile = math.prod(-(-t // c) for t, c in zip((*tile, *source.frame_shape), layout.shape, strict=True))
            most = max(most, (shard.last - shard.first) * per_tile)
    return most


def table_nbytes(source: Source, prepared: Prepared) -> int:
    """Bytes of masks, weights, fits and corrections on the device."""
    tables = sum(table.nbytes for table in prepared.host_tables) + _image_nbytes(prepared)
    tables += sum(cuda_fits.table_nbytes(fit) for fit in prepared.weights.fits)
    return tables + (source.correction.nbytes if source.correction is not None else 0)


def _image_nbytes(prepared: Prepared) -> int:
    return 16 * math.prod(prepared.shape) if prepared.with_images else 0


def _largest_tile(source: Source, cuts: tuple[tuple[int, ...], ...]) -> int:
    frame = max(source.frame_nbytes, source.corrected_nbytes)
    return max((min(math.prod(cut), 1 + SIZES.tile // frame) * frame for cut in cuts), default=0)


def _reader_nbytes(source: Source, cuts: tuple[tuple[int, ...], ...], readers: int) -> int:
    """Scratch of the threads that decode on the host what the device can't."""
    most = 0
    for piece, tile in zip(source.pieces, cuts, strict=True):
        if not cuda_load.on_device(source, piece):
            most = max(most, tiles.scratch_nbytes(piece, tile, source))
    return min(readers, SLOTS) * most


def way(source: Source, asked: str) -> tuple[str, str]:
    """How bytes reach the device, and why: ``gds``, ``pinned``, or ``resident`` where they are there already.

    Raises
    ------
    DeviceError
        GPUDirect was asked for and isn't available, or nothing is read that it could bring.
    """
    if all(isinstance(piece.layout, Resident) for piece in source.pieces):
        return "resident", "the data lies in the memory of the GPU"
    offset, length = _extents(source)
    if offset.size:
        return gds.choose(asked, source.files, gds.aligned(offset, length))
    why = "frames are put together on the processor" if source.files else "the data is an array in memory"
    if asked == "gds":
        raise DeviceError(f'transfer = "gds": nothing can come straight from the disk, {why}; use "auto" or "pinned"')
    return "pinned", why


def _extents(source: Source) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Byte offset and length of the blocks that are read at once and decoded on the device."""
    offsets, lengths = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    whole = [piece for piece in source.pieces if cuda_load.on_device(source, piece)]
    parts = [[p.piece for p in w.layout.parts] if isinstance(w.layout, Stitched) else [w] for w in whole]
    for piece in itertools.chain.from_iterable(parts):
        layout = piece.layout
        if isinstance(layout, Runs):
            offsets.append(layout.offset)
            lengths.append(np.minimum(layout.frames * layout.stride, SIZES.runs_tile))
        elif isinstance(layout, Chunks):
            offsets.append(layout.offset[layout.length > 0])
            lengths.append(layout.length[layout.length > 0])
    return np.concatenate(offsets), np.concatenate(lengths)
