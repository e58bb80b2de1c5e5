"""The CUDA backend: what `cpu` does, on the GPU of this process; functions of the same names.

Work is enqueued on the current stream. What streams whole runs through it, with reading, copying and computing
overlapped, is `gpuem.stream`; the functions here also serve one block at a time, checked frame by frame.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.backends import Block, Frames, Lost, Sums, Weights, cpu_load, cuda_fits, reason_unusable, sums_fit
from gpuem.backends import cuda_kernels as kernels
from gpuem.backends.cuda_kernels import DeviceFrames
from gpuem.backends.cuda_plan import plan
from gpuem.formats.source import Box, Piece, Source
from gpuem.storage.host import Files

__all__ = ["NAME", "Prepared", "add_frames", "fetch", "load", "new_sums", "plan", "prepare", "usable"]

NAME = "cuda"
# every kernel is a function of `cuda_kernels`, or of the module of what is computed with it, such as `cuda_correlate`;
# has a twin in `cpu.TWINS` and a naive reference in the tests
KERNELS = (
    *(
        "all_finite",
        "all_sums",
        "bitshuffle_lz4",
        "convert",
        "find_peaks",
        "guided",
        "image_sums",
        "lattice_fit",
        "lz4",
    ),
    *("magnitudes", "mask_sums", "merlin", "patch_dead", "place_chunks", "place_part", "unshuffle"),
)
Array = Any


@dataclass(frozen=True)
class Part:
    """Columns that one launch adds to: masks by number, then regions by number."""

    masks: tuple[int, ...]
    regions: tuple[int, ...]
    tensor: bool = False

    @property
    def width(self) -> int:
        """Number of columns."""
        return len(self.masks) + 3 * len(self.regions)


@dataclass(frozen=True, eq=False)
class Prepared:
    """`Weights` in the form in which the kernels use them; tables go to the device when they are first used."""

    weights: Weights
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    wide: np.dtype[Any]
    parts: tuple[Part, ...]

    @property
    def with_images(self) -> bool:
        """Whether sum or maximum over frames are wanted."""
        return self.weights.total or self.weights.maximum

    @property
    def tensor_images(self) -> bool:
        """Whether weight images are taken to tensor cores."""
        many = self.dtype.str[1:] in ("u1", "u2") and len(self.weights.images) >= kernels.MANY
        return many and kernels.has_bfloat16()

    @functools.cached_property
    def host_tables(self) -> tuple[NDArray[Any], ...]:
        """Masks of every part, then the weight images if there are any."""
        everywhere = np.ones(self.shape, np.bool_)
        tables: list[NDArray[Any]] = []
        for part in self.parts:
            masks = [self.weights.masks[k] for k in part.masks]
            regions = [self.weights.moments[k] for k in part.regions]
            if part.tensor:
                tables.append(kernels.mask_bits(masks, self.shape))
            else:
                whole = [everywhere if mask is None else mask for mask in regions]
                tables.append(kernels.mask_bytes([*masks, *whole], self.shape))
        if self.weights.images:
            given = self.weights.images
            tables.append(
                kernels.weight_parts(given) if self.tensor_images else kernels.weight_images(given, self.dtype)
            )
        return tuple(tables)

    @functools.cached_property
    def tables(self) -> tuple[Array, ...]:
        """`host_tables` on the device, and the value that maxima begin with."""
        import cupy

        lowest = -np.inf if self.dtype.kind == "f" else np.iinfo(self.dtype).min
        first = np.full(math.prod(self.shape), lowest, kernels.maximum_type(self.dtype))
        on_device = []
        for table in (*self.host_tables, first if self.with_images else first[:0]):
            array = cupy.empty(table.shape, table.dtype)
            array.set(table)
            on_device.append(array)
        return tuple(on_device)

    @functools.cached_property
    def fit_tables(self) -> tuple[dict[str, Array], ...]:
        """The arrays of every fit on the device."""
        return tuple(cuda_fits.tables(fit) for fit in self.weights.fits)


def prepare(weights: Weights, shape: tuple[int, int], dtype: np.dtype[Any]) -> Prepared:
    """Decide which kernel takes which masks and weights.

    Parameters
    ----------
    weights : Weights
        What to compute of each frame.
    shape : tuple of int
        Detector shape (y, x).
    dtype : numpy.dtype
        Native type of the pixels.

    Raises
    ------
    DeviceError
        There is a fit that can't be computed on this machine's GPU.
    """
    cuda_fits.check(weights.fits)
    wide = np.dtype(np.float64 if dtype.kind == "f" else np.int64)
    masks, regions = tuple(range(len(weights.masks))), tuple(range(len(weights.moments)))
    parts = []
    if len(masks) >= kernels.MANY and dtype.str[1:] in ("u1", "u2"):
        parts.append(Part(masks, (), tensor=True))
        masks = ()
    while masks or regions:
        some = masks[: kernels.COLUMNS]
        more = regions[: kernels.COLUMNS - len(some)]
        parts.append(Part(some, more))
        masks, regions = masks[len(some) :], regions[len(more) :]
    if (weights.total or weights.maximum) and all(part.tensor for part in parts):
        parts.append(Part((), ()))
    return Prepared(weights, shape, dtype, wide, tuple(parts))


@dataclass
class DeviceSums:
    """Accumulators of a shard on the device: one buffer, and the arrays in it by name.

    `good` and `codes` hold what was found wrong: frames with NaN or too large counts, chunks that can't be decoded.
    `positions`, the flat scan position of every row, is there where there are fits.
    """

    prepared: Prepared
    frames: int
    buffer: Array
    places: dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]]
    chunks: int = 0
    checked: int = 0
    arrays: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (at, shape, dtype) in self.places.items():
            nbytes = math.prod(shape) * dtype.itemsize
            self.arrays[name] = self.buffer[at : at + nbytes].view(dtype).reshape(shape)


def places(
    prepared: Prepared, frames: int, chunks: int = 0
) -> tuple[dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]], int]:
    """Where the accumulators of a shard lie in one buffer: offset, shape and type of each; and the buffer's size."""
    size = math.prod(prepared.shape) if prepared.with_images else 0
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        f"part{k}": ((frames, part.width), prepared.wide) for k, part in enumerate(prepared.parts)
    }
    shapes["images"] = ((frames, len(prepared.weights.images)), np.float64)
    shapes["total"] = ((size,), prepared.wide)
    shapes["maximum"] = ((size,), kernels.maximum_type(prepared.dtype))
    shapes["codes"] = ((chunks,), np.int32)
    shapes["good"] = ((frames if prepared.dtype.kind == "f" else 0,), np.uint8)
    shapes["magnitudes"] = ((frames if needs_magnitudes(prepared) else 0, 2), np.float64)
    fits = prepared.weights.fits
    shapes |= {f"fit{k}": ((frames, fit.columns), np.float32) for k, fit in enumerate(fits)}
    shapes["positions"] = ((frames if fits else 0,), np.int64)
    found, at = {}, 0
    for name, (shape, dtype) in shapes.items():
        found[name] = (at, shape, np.dtype(dtype))
        at += -(-math.prod(shape) * np.dtype(dtype).itemsize // 16) * 16
    return found, max(at, 16)


def needs_magnitudes(prepared: Prepared) -> bool:
    """Whether sums of such pixels could exceed 64 bits."""
    dtype, shape = prepared.dtype, prepared.shape
    wide = dtype.itemsize == 8 or math.prod(shape) * max(shape) >= 2**31
    return dtype.kind != "f" and dtype.itemsize >= 4 and wide


def new_sums(prepared: Prepared, frames: int) -> DeviceSums:
    """Empty accumulators for a shard of `frames` frames."""
    import cupy

    where, nbytes = places(prepared, frames)
    sums = DeviceSums(prepared, frames, cupy.empty(nbytes, np.uint8), where)
    clear(sums)
    return sums


def clear(sums: DeviceSums) -> None:
    """Set accumulators back to nothing."""
    sums.buffer.data.memset_async(0, sums.buffer.nbytes)
    maximum = sums.arrays["maximum"]
    if maximum.size and sums.prepared.dtype.kind != "u":
        maximum.data.copy_from_device_async(sums.prepared.tables[-1].data, maximum.nbytes)


def add_device_frames(frames: DeviceFrames, sums: DeviceSums, at: int) -> None:
    """Add frames to the accumulators of a shard; rows `at` to `at` + n belong to them.

    Where there are fits, the frames' scan positions are in these rows of ``positions`` already.
    """
    prepared = sums.prepared
    rows = slice(at, at + frames.count)
    images = (sums.arrays["total"], sums.arrays["maximum"]) if prepared.with_images else None
    for k, part in enumerate(prepared.parts):
        table, columns = prepared.tables[k], sums.arrays[f"part{k}"]
        if part.tensor:
            kernels.mask_sums(frames, table, len(part.masks), columns[rows])
        else:
            some = columns[rows] if part.width else None
            kernels.all_sums(frames, (table if part.width else None, len(part.masks), len(part.regions)), some, images)
            images = None
    count = len(prepared.weights.images)
    if count:
        take = kernels.image_sums_tensor if prepared.tensor_images else kernels.image_sums
        take(frames, prepared.tables[len(prepared.parts)], count, sums.arrays["images"][rows])
    for k, fit in enumerate(prepared.weights.fits):
        positions, out = sums.arrays["positions"][rows], sums.arrays[f"fit{k}"][rows]
        cuda_fits.run(fit, prepared.fit_tables[k], frames, positions, out)


def check_device_frames(frames: DeviceFrames, sums: DeviceSums, at: int) -> None:
    """Note which frames can't be summed exactly, to be looked at when the shard is done."""
    rows = slice(at, at + frames.count)
    if sums.arrays["good"].size:
        kernels.all_finite(frames, sums.arrays["good"][rows])
    elif sums.arrays["magnitudes"].size:
        kernels.magnitudes(frames, sums.arrays["magnitudes"][rows])
    sums.checked = at + frames.count


def add_frames(frames: Frames, prepared: Prepared, sums: DeviceSums, at: int, positions: NDArray[np.int64]) -> None:
    """Add a block of frames, whose pixels are on the device, to the accumulators of a shard."""
    if frames.starts.size:
        if prepared.weights.fits:
            sums.arrays["positions"][at : at + positions.size].set(np.ascontiguousarray(positions, np.int64))
        add_device_frames(_on_device(frames), sums, at)


def usable(frames: Frames) -> tuple[NDArray[np.bool_], str]:
    """Which frames can be summed exactly, and what is wrong with the others: NaN, infinity, overflow."""
    import cupy

    dtype, shape = np.dtype(frames.pixels.dtype), frames.shape
    nothing = prepare(Weights(), shape, dtype)
    good = np.ones(frames.starts.size, np.bool_)
    if dtype.kind == "f" and good.size:
        found = cupy.empty(good.size, np.uint8)
        kernels.all_finite(_on_device(frames), found)
        good = found.get().astype(np.bool_)
    elif needs_magnitudes(nothing) and good.size:
        found = cupy.empty((good.size, 2), np.float64)
        kernels.magnitudes(_on_device(frames), found)
        good = sums_fit(found.get(), shape)
    return good, reason_unusable(dtype)


def _on_device(frames: Frames) -> DeviceFrames:
    import cupy

    starts = cupy.empty(frames.starts.size, np.int64)
    starts.set(frames.starts)
    item = frames.pixels.dtype.itemsize
    aligned = kernels.alignment(*(int(start) * item for start in frames.starts))
    return DeviceFrames(frames.pixels, starts, frames.starts.size, frames.shape, aligned)


def load(source: Source, files: Files, piece: Piece, box: Box, keep: NDArray[np.bool_]) -> Iterator[Block | Lost]:
    """Read and decode the wanted frames of one tile on the processor, and bring them to the device.

    The careful way, for what the fast one found something wrong with: every frame and every chunk is checked.
    """
    import cupy

    for item in cpu_load.load(source, files, piece, box, keep):
        if isinstance(item, Lost):
            yield item
            continue
        if not item.indices.size:
            # all frames of this tile are lost
            continue
        frames = item.frames
        size = math.prod(frames.shape)
        together = np.concatenate([frames.pixels[start : start + size] for start in frames.starts])
        pixels = cupy.empty(together.size, together.dtype)
        pixels.set(together)
        starts = np.arange(frames.starts.size, dtype=np.int64) * size
        yield Block(replace(frames, pixels=pixels, starts=starts), item.indices)


def fetch(sums: DeviceSums) -> Sums:
    """The accumulators of a shard in host memory."""
    return unpack(sums, sums.buffer.get())


def unpack(sums: DeviceSums, content: NDArray[np.uint8]) -> Sums:
    """Copies of the accumulators out of the bytes of their buffer."""
    prepared, frames = sums.prepared, sums.frames

    def array(name: str) -> NDArray[Any]:
        at, shape, dtype = sums.places[name]
        nbytes = math.prod(shape) * dtype.itemsize
        return content[at : at + nbytes].view(dtype).reshape(shape)

    weights, shape = prepared.weights, prepared.shape
    masks = np.zeros((frames, len(weights.masks)), prepared.wide)
    moments = np.zeros((frames, len(weights.moments), 3), prepared.wide)
    for k, part in enumerate(prepared.parts):
        columns = array(f"part{k}")
        masks[:, list(part.masks)] = columns[:, : len(part.masks)]
        moments[:, list(part.regions)] = columns[:, len(part.masks) :].reshape(frames, -1, 3)
    nowhere = np.zeros((0, 0))
    total = array("total").reshape(shape).copy() if weights.total else nowhere.astype(prepared.wide)
    maximum = array("maximum").reshape(shape) if weights.maximum else nowhere
    fits = tuple(array(f"fit{k}").copy() for k in range(len(weights.fits)))
    return Sums(masks, array("images").copy(), moments, total, maximum.astype(prepared.dtype), fits)
