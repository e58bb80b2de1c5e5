"""The CUDA kernels as functions of device arrays: which template, which grid, how much shared memory.

Every function enqueues work on the current stream and returns at once. Scalars are given in exactly the width that the
kernel declares: nothing checks that for us.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.backends.cuda_compile import kernel as kernel

Array = Any
NULL = np.uint64(0)
PIXELS = {np.dtype(f"{kind}{size}"): f"{letter}{8 * size}" for kind, letter, sizes in
          (("u", "u", (1, 2, 4, 8)), ("i", "i", (1, 2, 4, 8)), ("f", "f", (4, 8))) for size in sizes}  # fmt: skip
THREADS = 256
# shared memory that every block may have without asking
SHARED_NBYTES = 48 << 10
# blocks of bitshuffle as its library makes them; the kernel keeps one of them in shared memory per warp
BLOCK_NBYTES = 8192
# a grid may be this long in its second direction, and 2^31 - 1 in its first
MOST_ROWS = 65535
# so that 32 bits hold the sum of a 16-bit pixel over the frames of a block
MOST_FRAMES = 1 << 15
# masks and regions of one launch; more are taken in several
COLUMNS = 16
# from here on products of matrices on tensor cores beat adding up pixel by pixel
MANY = 15


@dataclass(frozen=True)
class DeviceFrames:
    """Frames of native pixels in device memory.

    Parameters
    ----------
    pixels : (m,) device array
        Pixels; what lies between frames is skipped.
    starts : (n,) int64 device array
        Index into `pixels` of each frame's first pixel.
    count : int
        Number of frames.
    shape : tuple of int
        Detector shape (y, x).
    aligned : int
        Bytes, a power of two up to 16, that divide the address of every frame's first pixel.
    """

    pixels: Array
    starts: Array
    count: int
    shape: tuple[int, int]
    aligned: int

    @property
    def size(self) -> int:
        """Pixels of a frame."""
        return math.prod(self.shape)

    @property
    def of(self) -> str:
        """Type of a pixel as the kernels name it."""
        return PIXELS[self.pixels.dtype]


@functools.cache
def _multiprocessors() -> int:
    import cupy

    return int(cupy.cuda.Device().attributes["MultiProcessorCount"])


def has_bfloat16() -> bool:
    """Whether the GPU's tensor cores know bfloat16: all but Turing's."""
    import cupy

    return int(cupy.cuda.Device().compute_capability) >= 80


def alignment(*distances: int) -> int:
    """The largest power of two up to 16 that divides all distances, in bytes."""
    return math.gcd(16, *distances)


def _load(aligned: int, itemsize: int) -> int:
    """The alignment to compile for: 16, 4 or that of a pixel, so that few versions of a kernel are needed."""
    return 16 if aligned == 16 else 4 if aligned >= 4 > itemsize else itemsize


def mask_bytes(masks: Sequence[NDArray[np.bool_]], shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Masks for `all_sums`, (masks, groups): bit k of a byte chooses pixel k of a group of eight of a row."""
    packed = [np.packbits(mask, axis=1, bitorder="little").reshape(-1) for mask in masks]
    return np.stack(packed) if packed else np.zeros((0, groups_of(*shape)), np.uint8)


def mask_bits(masks: Sequence[NDArray[np.bool_]], shape: tuple[int, int]) -> NDArray[np.uint32]:
    """Masks for `mask_sums`, (masks rounded up to 32, words): bit k of word w chooses pixel 32 w + k."""
    words = -(-math.prod(shape) // 32)
    out = np.zeros((-(-len(masks) // 32) * 32, 4 * words), np.uint8)
    for row, mask in zip(out, masks, strict=False):
        packed = np.packbits(mask.reshape(-1), bitorder="little")
        row[: packed.size] = packed
    return out.view(np.uint32)


def weight_images(images: Sequence[NDArray[Any]], dtype: np.dtype[Any]) -> NDArray[np.floating[Any]]:
    """Weights for `image_sums`, (images rounded up to 8, pitch): in single precision where that holds every pixel."""
    real = np.float32 if dtype.itemsize <= 2 or dtype == np.float32 else np.float64
    size = images[0].size
    out = np.zeros((-(-len(images) // 8) * 8, -(-size // 8) * 8), real)
    for row, image in zip(out, images, strict=False):
        row[:size] = image.reshape(-1)
    return out


def weight_parts(images: Sequence[NDArray[Any]]) -> NDArray[np.uint16]:
    """Weights for `image_sums_tensor`, (3, images rounded up to 16, pitch): three bfloat16 that add up to a float32."""
    size = images[0].size
    rest = np.zeros((-(-len(images) // 16) * 16, -(-size // 8) * 8), np.float32)
    for row, image in zip(rest, images, strict=False):
        row[:size] = image.reshape(-1)
    parts = []
    for _ in range(3):
        # the upper half of a float is a bfloat16; rounding adds half of what is cut off
        bits = rest.view(np.uint32)
        upper = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        parts.append(upper.astype(np.uint16))
        rest = rest - (upper << 16).view(np.float32)
    return np.stack(parts)


def maximum_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type in which maxima are kept: there are no atomics below 32 bits."""
    dtype = np.dtype(dtype)
    return np.dtype(f"{dtype.kind}4") if dtype.itemsize < 4 else dtype


def groups_of(height: int, width: int) -> int:
    """Groups of eight pixels of a row in a frame."""
    return height * (-(-width // 8))


def all_sums(
    frames: DeviceFrames,
    masks: tuple[Array | None, int, int],
    columns: Array | None,
    images: tuple[Array, Array] | None,
) -> None:
    """Add masks, regions and images of frames.

    Parameters
    ----------
    frames : DeviceFrames
        The frames.
    masks : tuple
        Mask bytes (masks + regions, groups), number of masks, number of regions.
    columns : (frames, masks + 3 * regions) device array, or None
        Added to.
    images : tuple of device arrays, or None
        Sum (y*x,) and maximum (y*x,) over frames, added to and raised.
    """
    floats = frames.pixels.dtype.kind == "f"
    if floats and images is not None and columns is not None:
        # one owner for every result: the order of additions is then fixed
        all_sums(frames, (None, 0, 0), None, images)
        images = None
    table, number, regions = masks
    width_columns = number + 3 * regions
    itemsize = frames.pixels.dtype.itemsize
    strip = THREADS * (4 if itemsize <= 2 else 2 if frames.of in ("u32", "i32") else 1)
    strips = -(-groups_of(*frames.shape) // strip)
    per_block = _per_block(frames.count, strips, width_columns, number + regions)
    if floats:
        strips, per_block = (strips, frames.count) if images is not None else (1, -(-frames.count // MOST_ROWS))
    shared = per_block * 8 * width_columns * 8 + (number + regions) * THREADS * 4
    aligned = _load(alignment(frames.aligned, frames.shape[1] * itemsize), itemsize)
    total, maximum = images if images is not None else (NULL, NULL)
    kernel("all_sums", (frames.of, aligned, images is not None))(
        (strips, -(-frames.count // per_block)), (THREADS,),
        (frames.pixels, frames.starts, np.int32(frames.count), np.int32(per_block), *map(np.int32, frames.shape),
         NULL if table is None else table, np.int32(number), np.int32(regions),
         NULL if columns is None else columns, total, maximum),
        shared_mem=shared,
    )  # fmt: skip


def _per_block(count: int, strips: int, width_columns: int, tables: int) -> int:
    """Frames of a block: as many as shared memory holds, fewer where multiprocessors would have nothing to do."""
    room = (SHARED_NBYTES - tables * THREADS * 4) // max(64 * width_columns, 1) if width_columns else MOST_FRAMES
    # two blocks run on a multiprocessor at once; eight rounds of them leave a short tail
    share = count * strips // (16 * _multiprocessors())
    return max(1, min(count, room, MOST_FRAMES, max(share, 16)))


def mask_sums(frames: DeviceFrames, bits: Array, masks: int, columns: Array) -> None:
    """Add sums inside many masks, on tensor cores; for pixels of u8 and u16.

    Parameters
    ----------
    frames : DeviceFrames
        The frames.
    bits : (masks rounded up to 32, words) uint32 device array
        Bit k of word w chooses pixel 32 w + k.
    masks : int
        Number of masks.
    columns : (frames, width) device array
        Its first `masks` columns are added to.
    """
    tiles = 2 if masks <= 16 else 4
    rows = -(-frames.count // 16)
    # enough warps for every multiprocessor; few enough that each has work
    parts = min(max(1, 16 * _multiprocessors() // rows), -(-frames.size // 512))
    per_warp = -(-frames.size // (parts * 128)) * 128
    kernel("mask_sums", (frames.of, _load(frames.aligned, frames.pixels.dtype.itemsize), tiles))(
        (-(-frames.size // (4 * per_warp)), rows, -(-masks // (8 * tiles))), (128,),
        (frames.pixels, frames.starts, np.int32(frames.count), np.int32(frames.size), np.int32(per_warp), bits,
         np.int32(bits.shape[1]), np.int32(masks), columns, np.int32(columns.shape[1])),
    )  # fmt: skip


def image_sums(frames: DeviceFrames, images: Array, count: int, out: Array) -> None:
    """Sums of pixel times weight; fused multiply-adds.

    Parameters
    ----------
    frames : DeviceFrames
        The frames.
    images : (count rounded up to 8, pitch) device array
        Weights in float32 or float64, zero beyond the last.
    count : int
        Number of weight images.
    out : (frames, count) float64 device array
        Overwritten.
    """
    kernel("image_sums", (frames.of, PIXELS[images.dtype], _load(frames.aligned, frames.pixels.dtype.itemsize)))(
        (-(-frames.count // 16), -(-count // 8)), (256,),
        (frames.pixels, frames.starts, np.int32(frames.count), np.int32(frames.size), images,
         np.int64(images.shape[1]), np.int32(count), out),
    )  # fmt: skip


def image_sums_tensor(frames: DeviceFrames, parts: Array, count: int, out: Array) -> None:
    """`image_sums` on tensor cores, for pixels of u8 and u16; `parts` (3, count rounded up to 16, pitch) bfloat16."""
    aligned = _load(frames.aligned, frames.pixels.dtype.itemsize)
    kernel("image_sums", (frames.of, aligned), function="image_sums_tensor")(
        (-(-frames.count // 16), -(-count // 16)), (512,),
        (frames.pixels, frames.starts, np.int32(frames.count), np.int32(frames.size), parts,
         np.int32(parts.shape[1]), np.int64(parts.shape[2]), np.int32(count), out),
    )  # fmt: skip


def all_finite(frames: DeviceFrames, good: Array) -> None:
    """good[i]: frame i holds neither NaN nor infinity."""
    arguments = (frames.pixels, frames.starts, np.int32(frames.size), good)
    kernel("all_finite", (frames.of,))((frames.count,), (256,), arguments)


def magnitudes(frames: DeviceFrames, found: Array) -> None:
    """found[i]: the largest distance from zero in frame i, and the sum of all distances, as float64."""
    arguments = (frames.pixels, frames.starts, np.int32(frames.size), found)
    kernel("magnitudes", (frames.of,))((frames.count,), (256,), arguments)


def convert(
    data: Array, at: Array, stored: np.dtype[Any], dark_gain: tuple[Array | None, Array | None], out: Array
) -> None:
    """Stored pixels to native ones, with dark and gain where they are given.

    Parameters
    ----------
    data : (m,) uint8 device array
        Bytes; frame i begins at byte ``at[i]``, at any alignment.
    at : (n,) int64 device array
        Where the frames begin.
    stored : numpy.dtype
        Type and byte order of the stored pixels.
    dark_gain : tuple of device arrays (y*x,) or None
        In the type of `out`.
    out : (n, pixels of a frame) device array
        Overwritten.
    """
    frames, size = out.shape
    dark, gain = (NULL if array is None else array for array in dark_gain)
    native = stored.newbyteorder("=")
    kernel("convert", (PIXELS[native], PIXELS[out.dtype], stored != native))(
        (frames, max(1, min(-(-size // 1024), 64))), (256,),
        (data, at, np.int64(size), dark, gain, out, np.int64(size)),
    )  # fmt: skip


def place_chunks(chunks: Array, geometry: Array, out: Array) -> None:
    """Decoded chunks of a tile to frames.

    Parameters
    ----------
    chunks : (n, pixels of a chunk) device array
        In C order of their grid.
    geometry : (4, axes) int64 device array
        For each axis (scan..., y, x): extent of the tile, extent of a chunk, number of chunks, and where the tile
        begins inside its first chunk.
    out : (frames, pixels of a frame) device array
        Overwritten, in C order of the tile.
    """
    frames, size = out.shape
    kernel("place_chunks", (f"u{8 * out.dtype.itemsize}",))(
        (frames, max(1, min(-(-size // 1024), 64))), (256,),
        (chunks, geometry, np.int32(geometry.shape[1]), out, np.int64(size)),
    )  # fmt: skip


def patch_dead(frames: DeviceFrames, dead: Array, offsets: Array, neighbours: Array) -> None:
    """Replace dead pixels by the mean of their good neighbours, ``neighbours[offsets[k]:offsets[k + 1]]``."""
    kernel("patch_dead", (frames.of,))(
        (frames.count, min(-(-dead.size // 256), MOST_ROWS)), (256,),
        (frames.pixels, frames.starts, dead, np.int32(dead.size), offsets, neighbours),
    )  # fmt: skip


def bitshuffle_lz4(data: Array, at: Array, lengths: Array, out: Array, codes: Array) -> None:
    """Decode chunks of bitshuffle with LZ4.

    Parameters
    ----------
    data : (m,) uint8 device array
        Bytes that hold all the chunks; nothing in them is believed.
    at, lengths : (n,) int64 device arrays
        Where each chunk lies in `data`.
    out : (n, pixels of a chunk) device array
        Overwritten.
    codes : (n,) int32 device array, zero
        For each chunk 0, or a negative code: `gpuem.codecs.bitshuffle.REASONS`, or a block too large for this kernel.
    """
    chunks, nbytes = out.shape[0], out.shape[1] * out.dtype.itemsize
    # shared memory then holds 27 warps on a multiprocessor of an H100
    warps = 3
    parts = min(-(-nbytes // (warps * BLOCK_NBYTES)), MOST_ROWS)
    kernel("bitshuffle_lz4", (f"u{8 * out.dtype.itemsize}",))(
        (chunks, parts), (32 * warps,),
        (data, at, lengths, np.int32(chunks), out, np.int64(nbytes), np.int64(nbytes), codes),
        shared_mem=warps * BLOCK_NBYTES,
    )  # fmt: skip


def lz4(data: Array, at: Array, lengths: Array, out: Array, codes: Array) -> None:
    """Decode chunks of HDF5's own LZ4 filter; parameters as for `bitshuffle_lz4`."""
    chunks, nbytes = out.shape[0], out.shape[1] * out.dtype.itemsize
    # how many blocks a chunk has only it itself says; often it is one
    parts = min(-(-nbytes // (1 << 20)), 64)
    kernel("lz4", ())(
        (chunks, parts), (128,),
        (data, at, lengths, np.int32(chunks), out, np.int64(nbytes), np.int64(nbytes), codes),
    )  # fmt: skip


def merlin(data: Array, starts: Array, out: Array, bits: int, chips: tuple[int, int], shape: tuple[int, int]) -> None:
    """Unpack raw Merlin frames.

    Parameters
    ----------
    data : (m,) uint8 device array
        Stored bytes.
    starts : (n,) int64 device array
        Where each frame's data begin.
    out : (n, pixels of a frame) device array
        Overwritten: u8 for 1 and 6 bits, u16 for 12, u32 for 24.
    bits : int
        Counter depth: 1, 6, 12 or 24.
    chips : tuple of int
        How the chips are arranged (y, x).
    shape : tuple of int
        Detector shape (y, x).
    """
    frames, size = out.shape
    kernel("merlin", (bits,))(
        (max(1, min(-(-size // 2048), 64)), min(frames, MOST_ROWS)), (256,),
        (data, starts, np.int32(frames), out, np.int64(size), *map(np.int32, shape), *map(np.int32, chips)),
    )  # fmt: skip


def unshuffle(shuffled: Array, out: Array) -> None:
    """Undo HDF5's shuffle: in a row of `shuffled` (chunks, pixels of a chunk) byte k of all pixels lies together."""
    chunks, nbytes = out.shape[0], out.shape[1] * out.dtype.itemsize
    kernel("unshuffle", (out.dtype.itemsize,))(
        (max(1, min(-(-out.shape[1] // 1024), 1024)), min(chunks, MOST_ROWS)), (256,),
        (shuffled, out, np.int64(nbytes), np.int64(nbytes), np.int64(nbytes), np.int32(chunks)),
    )  # fmt: skip
