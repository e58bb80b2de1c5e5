"""Correlation on the GPU: whole frames by cuFFT, disks near expected sites by products; `cpu_correlate`, `cpu_guided`.

Whole frames are taken in batches of one size, the last one filled up with nothing: cuFFT's plans and its scratch are
then those of one size, and rounding doesn't depend on how many frames came together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.backends import cuda_kernels as kernels
from gpuem.backends.cuda_device import INSTALL
from gpuem.backends.cuda_kernels import DeviceFrames
from gpuem.backends.peaks import GuidedFit, PeakSearch
from gpuem.errors import DeviceError

Array = Any
# scratch of a batch of frames, and of a launch that finds disks near sites
SCRATCH_NBYTES = 256 << 20
MOST_FRAMES = 1024
# cuFFT's scratch for a plan, in complex numbers per pixel: the least and the most that its manual tells (Plan
# configuration). The most is taken where a side has factors that it has no fast code for.
WORK, MOST_WORK = 1, 8
FAST_FACTORS = (2, 3, 5, 7)
# what the allocator may round up for the arrays of a batch
ROUNDED_NBYTES = 16 * 512
# warps of a block of `find_peaks` and of `guided`
PEAK_WARPS, GUIDED_WARPS = 8, 4
MOST_INT = 2**31 - 1


def why_not() -> str:
    """Why frames can't be transformed on this machine's GPU, in words; empty where they can."""
    try:
        from cupy.cuda import cufft

        cufft.getVersion()
    except (ImportError, RuntimeError, OSError) as error:
        first = str(error).strip().partition("\n")[0]
        return (
            f"cuFFT, the library for Fourier transforms on the GPU, can't be loaded ({first}). Install it: {INSTALL}, "
            "or nvidia-cufft for CUDA 13 and nvidia-cufft-cu12 for CUDA 12 beside your CuPy"
        )
    return ""


def search_tables(search: PeakSearch) -> dict[str, NDArray[Any]]:
    """What a search multiplies spectra with: conjugate spectrum of its kernel, smoothing."""
    return {"spectrum": search.spectrum, "smoothing": search.smoothing}


def run_search(
    search: PeakSearch, tables: Mapping[str, Array], frames: DeviceFrames, positions: Array, out: Array
) -> None:
    """Peaks of frames; see `cpu_correlate.find_peaks`. Where in the scan they are makes no difference."""
    import cupy

    batch = batch_frames(search, frames.shape)
    for first in range(0, frames.count, batch):
        rows = slice(first, min(first + batch, frames.count))
        some = DeviceFrames(frames.pixels, frames.starts[rows], rows.stop - first, frames.shape, frames.aligned)
        images = correlate(some, tables, search, batch)
        candidates = cupy.empty((batch, _candidates(frames.shape)), np.uint64)
        scratch = cupy.empty((batch, _peak_floats(search, frames.shape)), np.float32)
        find_peaks(images, search, (candidates, scratch), out[rows])


def correlate(frames: DeviceFrames, tables: Mapping[str, Array], search: PeakSearch, batch: int) -> Array:
    """Correlations (batch, y, x) float32 of frames with the kernel; those beyond the last frame are undefined."""
    import cupy

    real = cupy.empty((batch, *frames.shape), np.float32)
    level_frames(frames, real)
    try:
        spectra = cupy.fft.rfft2(real)
        # its memory becomes that of the correlation
        del real
        multiply_spectra(spectra, frames.count, search, tables)
        # not scaled: that would be a kernel of CuPy's own, and one more pass over memory
        return cupy.fft.irfft2(spectra, s=frames.shape, norm="forward")
    except cupy.cuda.cufft.CuFFTError as error:
        raise DeviceError(
            f"cuFFT failed on {batch} frames of {frames.shape[0]}x{frames.shape[1]} px: {error}. Compute on the "
            'processor: device = "cpu"'
        ) from error


def level_frames(frames: DeviceFrames, out: Array) -> None:
    """Frames in single precision minus their mean; `out` (at least frames, y, x) float32 is overwritten."""
    kernels.kernel("find_peaks", (frames.of,), function="level_frames")(
        (frames.count,), (256,), (frames.pixels, frames.starts, np.int32(frames.size), out)
    )


def multiply_spectra(spectra: Array, frames: int, search: PeakSearch, tables: Mapping[str, Array]) -> None:
    """Turn transforms of frames into those of their correlations, in place.

    Parameters
    ----------
    spectra : (n, y, x // 2 + 1) complex64 device array
        Transforms as cuFFT leaves them; those of the correlations are divided by the number of pixels, which
        cuFFT's way back doesn't do.
    frames : int
        How many of them.
    search : PeakSearch
        Power, size of a frame.
    tables : mapping
        See `search_tables`, on the device.
    """
    size = math.prod(spectra.shape[1:])
    kernels.kernel("find_peaks", (search.power != 1,), function="multiply_spectra")(
        (frames, max(1, min(-(-size // 1024), 64))), (256,),
        (spectra, tables["spectrum"], tables["smoothing"], np.int32(size), np.float32(search.power),
         np.float32(1 / search.kernel.size)),
    )  # fmt: skip


def find_peaks(images: Array, search: PeakSearch, scratch: tuple[Array, Array], out: Array) -> None:
    """List the peaks of correlations.

    Parameters
    ----------
    images : (n, y, x) float32 device array
        Correlations; at least as many as there are rows in `out`.
    search : PeakSearch
        Filters.
    scratch : tuple of device arrays
        (n, a quarter of the pixels) uint64 and (n, enough) float32.
    out : (n, search.columns) float32 device array
        Overwritten: number of peaks, then (y, x, height) of each, brightest first; NaN where there are fewer.
    """
    how = {"none": 0, "parabola": 1, "upsample": search.factor}[search.subpixel]
    kernels.kernel("find_peaks", (how > 1,))(
        (out.shape[0],), (32 * PEAK_WARPS,),
        (images, *map(np.int32, images.shape[1:]), np.int32(search.edge),
         np.float32(max(np.float32(search.min_absolute), np.float32(0))), np.float32(search.min_relative),
         np.int32(min(search.relative_to, MOST_INT)), np.float64(search.spacing), np.int32(search.max_peaks),
         np.int32(how), *scratch, np.int64(scratch[1].shape[1]), out),
    )  # fmt: skip


def batch_frames(search: PeakSearch, shape: tuple[int, int]) -> int:
    """Frames that are transformed at once: a power of two, so that full tiles of frames leave little over."""
    most = min(MOST_FRAMES, max(1, SCRATCH_NBYTES // _search_nbytes(search, shape)))
    return int(1 << (most.bit_length() - 1))


def search_scratch_nbytes(search: PeakSearch, shape: tuple[int, int]) -> int:
    """Bytes on the device beside frames and results while a search runs, whatever the number of frames."""
    return batch_frames(search, shape) * _search_nbytes(search, shape) + ROUNDED_NBYTES


def _search_nbytes(search: PeakSearch, shape: tuple[int, int]) -> int:
    """The same for each frame of a batch: what is there at once, and the scratch of both of cuFFT's plans."""
    height, width = shape
    real, spectrum = 4 * height * width, 8 * height * (width // 2 + 1)
    work = (WORK if all(_is_fast(n) for n in shape) else MOST_WORK) * 8 * height * width
    peaks = 8 * _candidates(shape) + 4 * _peak_floats(search, shape)
    # forth; back, for which CuPy copies the transforms; and then peaks
    return max(real + spectrum, spectrum + spectrum + real, real + peaks) + 2 * work


def _is_fast(n: int) -> bool:
    for factor in FAST_FACTORS:
        while n % factor == 0:
            n //= factor
    return n == 1


def _candidates(shape: tuple[int, int]) -> int:
    """Most maxima of a frame: no two neighbours are both maxima."""
    return -(-shape[0] // 2) * -(-shape[1] // 2)


def _peak_floats(search: PeakSearch, shape: tuple[int, int]) -> int:
    """Numbers that `find_peaks` keeps of each frame: peaks, and weights and columns of every warp's climb."""
    climb = PEAK_WARPS * (3 * shape[1] + 6 * shape[0]) if search.subpixel == "upsample" else 0
    return 3 * min(search.max_peaks, _candidates(shape)) + climb


def run_guided(fit: GuidedFit, tables: Mapping[str, Array], frames: DeviceFrames, positions: Array, out: Array) -> None:
    """Disks near the fit's sites; see `cpu_guided.guided`. Where in the scan frames are makes no difference."""
    import cupy

    launch = guided_frames(fit)
    scratch = cupy.empty((min(launch, frames.count), _guided_floats(fit)), np.float32)
    for first in range(0, frames.count, launch):
        rows = slice(first, min(first + launch, frames.count))
        some = DeviceFrames(frames.pixels, frames.starts[rows], rows.stop - first, frames.shape, frames.aligned)
        guided(some, fit, tables, scratch, out[rows])


def guided(frames: DeviceFrames, fit: GuidedFit, tables: Mapping[str, Array], scratch: Array, out: Array) -> None:
    """Find the disks of frames near their sites.

    Parameters
    ----------
    frames : DeviceFrames
        The frames; computed in single precision.
    fit : GuidedFit
        Search and what is made of pixels.
    tables : mapping
        Its sites (k, 2) float64 and kernel (m, m) float32 on the device.
    scratch : (n, enough) float32 device array
        A window and a map of shifts for every warp of a block.
    out : (n, 4 k) float32 device array
        Overwritten: (y, x, height, elevation) of each site.
    """
    sites, kernel = tables["sites"], tables["kernel"]
    size = kernel.shape[0]
    if kernel.shape != (size, size) or size % 2 == 0:
        raise ValueError(f"kernel of {kernel.shape} px; must be square with an odd number of pixels")
    if not sites.shape[0]:
        return
    kernels.kernel("guided", (frames.of,))(
        (frames.count,), (32 * GUIDED_WARPS,),
        (frames.pixels, frames.starts, *map(np.int32, frames.shape), sites, np.int32(sites.shape[0]), kernel,
         np.int32(size), np.int32(fit.search), np.int32(fit.normalised), np.int32(fit.logarithm), scratch, out),
    )  # fmt: skip


def guided_frames(fit: GuidedFit) -> int:
    """Frames of a launch."""
    return min(max(1, SCRATCH_NBYTES // (4 * _guided_floats(fit))), MOST_INT)


def guided_scratch_nbytes(fit: GuidedFit, shape: tuple[int, int]) -> int:
    """Most bytes on the device beside frames and results while disks are found."""
    return max(SCRATCH_NBYTES, 4 * _guided_floats(fit)) + ROUNDED_NBYTES


def _guided_floats(fit: GuidedFit) -> int:
    side, shifts = len(fit.kernel) + 2 * fit.search, 2 * fit.search + 1
    return GUIDED_WARPS * (side * side + shifts * shifts)
