"""Part of bench/gpu.py: kernels on data that is on the GPU already, those that compute and those that decode."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gpu_runs
import numpy as np
from gpu_data import Bench, merlin_12bit, same, upload
from gpu_measure import on_device, row

import gpuem
from gpuem import job, tiles
from gpuem.backends import Sums, Weights, cuda, cuda_plan
from gpuem.backends import cuda_kernels as kernels
from gpuem.backends.cuda_kernels import DeviceFrames

# rounding weights and products of single precision, in units of the sum of their magnitudes
SINGLE = 2e-6


def resident(bench: Bench) -> dict[str, Any]:
    """All kernels that compute, each over all frames; the data are far larger than any cache."""
    found = {name: compute(bench, name, chosen) for name, chosen in cases(bench).items()}
    return {**found, "16 float images, FMA": images_by_fma(bench)}


def cases(bench: Bench) -> dict[str, list[Any]]:
    """Analyses by name."""
    rng = np.random.default_rng(5)
    masks = [rng.random(bench.shape) < 0.3 for _ in range(16)]
    return {
        "sum": [gpuem.Sum()],
        "annulus": [annulus(bench.shape)],
        "com": [gpuem.CenterOfMass()],
        "sum, annulus, com": three(bench.shape),
        "14 binary masks, added up": [detector(k, mask) for k, mask in enumerate(masks[:14])],
        "16 binary masks, tensor cores": [detector(k, mask) for k, mask in enumerate(masks)],
        "16 float images, tensor cores": [detector(k, image) for k, image in enumerate(weight_images(bench))],
    }


def annulus(shape: tuple[int, int]) -> gpuem.VirtualDetector:
    """An annular dark field, in proportion to the detector."""
    return gpuem.VirtualDetector(name="adf", inner=30 * shape[0] / 256, outer=80 * shape[0] / 256)


def three(shape: tuple[int, int]) -> list[Any]:
    """What most people want of a scan."""
    return [gpuem.Sum(), annulus(shape), gpuem.CenterOfMass()]


def detector(number: int, mask: np.ndarray) -> gpuem.VirtualDetector:
    """A virtual detector with a mask."""
    return gpuem.VirtualDetector(name=f"m{number}", shape="mask", mask=mask)


def weight_images(bench: Bench) -> np.ndarray:
    """Weights that no binary mask can take the place of."""
    return np.random.default_rng(6).random((16, *bench.shape)).astype(np.float32)


def device_frames(bench: Bench, most: int) -> list[DeviceFrames]:
    """All frames on the device, in blocks of at most so many."""
    size = bench.shape[0] * bench.shape[1]
    count = min(most, bench.frames)
    starts = upload(np.arange(count, dtype=np.int64) * size)
    aligned = kernels.alignment(bench.frame_nbytes)
    blocks = []
    for first in range(0, bench.frames, count):
        some = min(count, bench.frames - first)
        pixels = bench.pixels[first * size : (first + some) * size]
        blocks.append(DeviceFrames(pixels, starts[:some], some, bench.shape, aligned))
    return blocks


def large_blocks(bench: Bench) -> list[DeviceFrames]:
    """Blocks as runs on resident data have them."""
    return device_frames(bench, max(1, min(tiles.RESIDENT_NBYTES // bench.frame_nbytes, tiles.MOST_FRAMES)))


def adding(blocks: Sequence[DeviceFrames], sums: cuda.DeviceSums) -> Callable[[], None]:
    """A function that enqueues one pass over all frames."""

    def one_pass() -> None:
        at = 0
        for block in blocks:
            cuda.add_device_frames(block, sums, at)
            at += block.count

    return one_pass


def compute(bench: Bench, name: str, chosen: list[Any]) -> dict[str, Any]:
    """One case: the same sums as on the CPU, then timed."""
    view = job.view_of(bench.plain)
    prepared = cuda.prepare(sum((a.weights(view) for a in chosen), Weights()), bench.shape, np.dtype(np.uint16))
    tensor = prepared.tensor_images or any(part.tensor for part in prepared.parts)
    bench.check(f"{name}: the kernel that the name says", tensor == ("tensor" in name))
    sums = cuda.new_sums(prepared, bench.frames)
    one_pass = adding(large_blocks(bench), sums)
    one_pass()
    check_sums(bench, name, cuda.fetch(sums), gpu_runs.on_cpu(bench.plain, chosen).totals.sums)
    return row(on_device(one_pass, bench.repeats), bench.nbytes)


def check_sums(bench: Bench, name: str, found: Sums, expected: Sums) -> None:
    """The same bits for all that is exact."""
    for part in ("masks", "moments", "total", "maximum"):
        bench.check(f"{name}: {part}", np.array_equal(getattr(found, part), getattr(expected, part)))
    # weights and counts are positive: the sum is its own scale
    off = np.abs(found.images - expected.images) - SINGLE * np.abs(expected.images)
    bench.check(f"{name}: images", off.shape == expected.images.shape and (off <= 0).all())


def images_by_fma(bench: Bench) -> dict[str, Any]:
    """The same 16 float images by fused multiply-adds, as fewer than 15 are taken."""
    import cupy

    images = weight_images(bench)
    table = kernels.weight_images(list(images), np.dtype(np.uint16))
    weights = upload(table.reshape(-1)).reshape(table.shape)
    out = cupy.empty((bench.frames, len(images)), np.float64)
    blocks = large_blocks(bench)

    def one_pass() -> None:
        at = 0
        for block in blocks:
            kernels.image_sums(block, weights, len(images), out[at : at + block.count])
            at += block.count

    one_pass()
    expected = gpu_runs.on_cpu(bench.plain, [detector(k, image) for k, image in enumerate(images)]).totals.sums.images
    bench.check("16 float images, FMA", (np.abs(out.get() - expected) <= SINGLE * expected).all())
    return row(on_device(one_pass, bench.repeats), bench.nbytes)


def decoding(bench: Bench) -> dict[str, Any]:
    """Decoders and converters alone, from device memory to device memory; rates count decoded bytes."""
    frames = min(bench.frames // 2, max(1, (2 << 30) // bench.frame_nbytes))
    return {
        "Merlin, 12 bit": merlin(bench, frames),
        "byte order": byte_order(bench, frames),
        "bitshuffle-LZ4": bitshuffle_lz4(bench, frames),
    }


def merlin(bench: Bench, frames: int) -> dict[str, Any]:
    """Raw frames of one chip."""
    import cupy

    images = bench.truth[:frames] & 0xFFF
    stored = upload(merlin_12bit(images))
    starts = upload(np.arange(frames, dtype=np.int64) * bench.frame_nbytes)
    out = cupy.empty((frames, images[0].size), np.uint16)
    kernels.merlin(stored, starts, out, 12, (1, 1), bench.shape)
    bench.check("Merlin, 12 bit", same(out, images.reshape(frames, -1)))
    times = on_device(lambda: kernels.merlin(stored, starts, out, 12, (1, 1), bench.shape), bench.repeats)
    return row(times, images.nbytes)


def byte_order(bench: Bench, frames: int) -> dict[str, Any]:
    """Big-endian pixels to native ones."""
    import cupy

    images = bench.truth[:frames].reshape(frames, -1)
    stored = upload(images.astype(">u2").reshape(-1).view(np.uint8))
    starts = upload(np.arange(frames, dtype=np.int64) * bench.frame_nbytes)
    out = cupy.empty(images.shape, np.uint16)

    def launch() -> None:
        kernels.convert(stored, starts, np.dtype(">u2"), (None, None), out)

    launch()
    bench.check("byte order", same(out, images))
    return row(on_device(launch, bench.repeats), images.nbytes)


@dataclass
class Compressed:
    """The HDF5 file on the device: its bytes, and where each frame's chunk lies in them."""

    data: Any
    at: Any
    lengths: Any
    codes: Any

    def decode(self, frames: slice, out: Any) -> None:
        """Enqueue the decoding of some chunks."""
        kernels.bitshuffle_lz4(self.data, self.at[frames], self.lengths[frames], out, self.codes[frames])


def compressed(bench: Bench) -> Compressed:
    """All chunks of the HDF5 file."""
    source = bench.compressed[0].source
    layout = source.pieces[0].layout
    data = upload(np.fromfile(source.files[0].path, np.uint8))
    codes = upload(np.zeros(layout.offset.size, np.int32))
    return Compressed(data, upload(layout.offset), upload(layout.length), codes)


def bitshuffle_lz4(bench: Bench, frames: int) -> dict[str, Any]:
    """Chunks of one frame, all of them at once."""
    import cupy

    there, some = compressed(bench), slice(0, frames)
    out = cupy.empty((frames, bench.frame_nbytes // 2), np.uint16)
    there.decode(some, out)
    bench.check("bitshuffle-LZ4: no chunk reports damage", not there.codes.get().any())
    bench.check("bitshuffle-LZ4", same(out, bench.truth[:frames].reshape(frames, -1)))
    nbytes = frames * bench.frame_nbytes
    ratio = nbytes / int(bench.compressed[0].source.pieces[0].layout.length[:frames].sum())
    times = on_device(lambda: there.decode(some, out), bench.repeats)
    return row(times, nbytes, ratio=ratio, encoder=bench.compressed[1])


def tile_by_tile(bench: Bench, ds: gpuem.Dataset, *, packed: bool) -> float:
    """Seconds of all kernels of a run, launched for tiles as a run does, on data that is on the device already."""
    import cupy

    per_tile = max(1, cuda_plan.SIZES.tile // bench.frame_nbytes)
    frames = ds.positions
    view, chosen = job.view_of(ds), three(bench.shape)
    prepared = cuda.prepare(sum((a.weights(view) for a in chosen), Weights()), bench.shape, ds.dtype)
    sums = cuda.new_sums(prepared, frames)
    blocks = device_frames(bench, per_tile)
    there = compressed(bench) if packed else None
    # as in a run, decoded frames go where the last ones were: they stay in the second-level cache
    out = cupy.empty((min(per_tile, frames) if packed else 0, bench.frame_nbytes // 2), np.uint16)

    def one_pass() -> None:
        for block, at in zip(blocks, range(0, frames, per_tile), strict=False):
            count = min(per_tile, frames - at)
            if there is not None:
                there.decode(slice(at, at + count), out[:count])
                block = replace(block, pixels=out.reshape(-1), starts=block.starts[:count], count=count)
            cuda.add_device_frames(block, sums, at)

    one_pass()
    check_sums(bench, "tile by tile", cuda.fetch(sums), gpu_runs.on_cpu(ds, chosen).totals.sums)
    return statistics.median(on_device(one_pass, bench.repeats))
