"""A data set: frames with a scan, looked at like an array or handed to `gpuem.run`."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem import arguments, correction, tiles
from gpuem.axes import Axis, calibrate, detector_axes, scan_axes
from gpuem.backends import Block, cpu
from gpuem.correction import Dead, Image
from gpuem.engine import describe
from gpuem.errors import DataError, InputError, PlanError, PositionError, RecipeError
from gpuem.formats import array, read_header
from gpuem.formats.remote import Url
from gpuem.formats.source import Source
from gpuem.messages import shown
from gpuem.storage.host import Files


@dataclass(frozen=True)
class Dataset:
    """Detector frames arranged as a scan; nothing but headers has been read.

    Parameters
    ----------
    source : Source
        Where the frames are.
    scan, detector : tuple of Axis
        The axes.
    skip : int
        Frames at the start of the file that don't belong to the scan; negative where the scan began before the file.
    notes : tuple of str
        What a user should know about this data.
    """

    source: Source
    scan: tuple[Axis, ...]
    detector: tuple[Axis, ...]
    skip: int = 0
    notes: tuple[str, ...] = ()

    @property
    def scan_shape(self) -> tuple[int, ...]:
        """Shape of the scan."""
        return tuple(axis.size for axis in self.scan)

    @property
    def frame_shape(self) -> tuple[int, int]:
        """Detector shape (y, x)."""
        return self.source.frame_shape

    @property
    def shape(self) -> tuple[int, ...]:
        """Scan shape and detector shape."""
        return (*self.scan_shape, *self.frame_shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of a pixel, in native byte order; once corrected where it is."""
        return self.source.dtype

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Scan and detector axes."""
        return (*self.scan, *self.detector)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the header says."""
        return self.source.metadata

    @functools.cached_property
    def files(self) -> Files:
        """The open files; mappings stay, so that a second run finds its pages at once."""
        return Files(self.source.files)

    @property
    def positions(self) -> int:
        """Number of scan positions."""
        return math.prod(self.scan_shape)

    def __repr__(self) -> str:
        kind = f"{self.source.format}{'' if self.source.correction is None else ', corrected,'}"
        return f"<gpuem.Dataset {kind} scan {self.scan_shape} frame {self.frame_shape} {self.dtype}>"

    def corrected(self, dark: Image = None, gain: Image = None, dead: Dead = None) -> Dataset:
        """The same data with every frame corrected whenever it is read: (pixel - dark) * gain, then dead pixels.

        With dark or gain, pixels of up to 16 bits become float32 (as float32 itself stays), all others float64. With
        dead pixels alone the type stays; the mean that replaces them is rounded half up.

        Parameters
        ----------
        dark : path or (y, x) array
            Subtracted from each pixel: a .npy or .tif file, or an array.
        gain : path or (y, x) array
            What the difference is multiplied with.
        dead : path, (y, x) array or list of (y, x)
            Pixels that are replaced by the mean of their good neighbours, once those are corrected: all that lie in
            the smallest square (3x3, 5x5, ...) around it that holds any. True or 1 marks a dead pixel.

        Raises
        ------
        RecipeError
            Nothing is given, it doesn't fit the detector, or the data is corrected already.
        """
        if self.source.correction is not None:
            raise RecipeError("corrected: this data is corrected already; give dark, gain and dead together")
        made = correction.of(dark, gain, dead, self.frame_shape, self.dtype)
        return replace(self, source=replace(self.source, dtype=made.dtype, correction=made))

    def to_device(self, *, packed: bool = False) -> Dataset:
        """The same data, kept in the memory of the GPU: runs on it read nothing but that.

        Parameters
        ----------
        packed : bool
            Keep it as it is stored (compressed, packed bits) where the GPU can decode that: smaller, and decoded in
            every run. Otherwise pixels are kept in their native type.

        Returns
        -------
        Dataset
            What is on the device stays there for as long as this lives.

        Raises
        ------
        PlanError
            It doesn't fit; with the numbers.
        DataError
            A frame can't be read.
        DeviceError
            There is no GPU that can be used.
        """
        from gpuem import resident

        return replace(self, source=resident.bring(self.source, self.files, packed=packed))

    def __getitem__(self, index: Any) -> NDArray[Any]:
        """Frames as NumPy arrays, in file order and native type: ``ds[3, 5]``, ``ds[0]``, ``ds[..., 10:20, 10:20]``.

        Raises
        ------
        DataError
            A frame asked for is missing or broken.
        """
        key = index if isinstance(index, tuple) else (index,)
        if len(key) > len(self.shape) + sum(item is Ellipsis for item in key):
            raise PositionError(f"{len(key)} indices for data of {len(self.shape)} axes {self.shape}")
        dots = [k for k, item in enumerate(key) if item is Ellipsis]
        if dots:
            at = dots[0]
            key = (*key[:at], *[slice(None)] * (len(self.shape) - len(key) + 1), *key[at + 1 :])
        scan, detector = key[: len(self.scan)], key[len(self.scan) :]
        try:
            chosen = np.arange(self.positions).reshape(self.scan_shape)[scan]
            # no bytes are behind this: what is wrong with the detector's part is told before frames are read
            empty = np.broadcast_to(np.int8(0), (*np.shape(chosen), *self.frame_shape))
            _ = empty[(*[slice(None)] * np.ndim(chosen), *detector)].shape
        except (IndexError, TypeError, ValueError) as error:
            raise PositionError(f"{self!r}[{shown(index)}]: {error}") from None
        frames = self._read(np.ravel(chosen) + self.skip).reshape(*np.shape(chosen), *self.frame_shape)
        return frames[(*[slice(None)] * np.ndim(chosen), *detector)]

    def _read(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Frames by their flat index in file order."""
        try:
            out = np.empty((indices.size, *self.frame_shape), self.dtype)
        except MemoryError:
            nbytes = indices.size * self.dtype.itemsize * math.prod(self.frame_shape)
            raise PlanError(
                f"{indices.size:,} frames are {nbytes / 1e9:,.1f} GB, more than there is memory: take fewer, or let "
                "gpuem.run stream them"
            ) from None
        found = np.zeros(indices.size, np.bool_)
        order = np.argsort(indices, kind="stable")
        ordered, size = indices[order], math.prod(self.frame_shape)
        if self.source.in_files:
            self.files.check()
        for piece in self.source.pieces:
            mine = indices[(indices >= piece.start) & (indices < piece.start + piece.frames)]
            tile = tiles.tile_shape(piece, self.source.frame_nbytes)
            for number in np.unique(tiles.tile_of(piece, tile, mine)).tolist():
                box = tiles.box(piece, tile, number)
                keep = np.isin(tiles.frames_of(piece, box), mine)
                for item in cpu.load(self.source, self.files, piece, box, keep):
                    if not isinstance(item, Block):
                        raise DataError(f"{describe(item.indices)}: {item.message}", tuple(item.indices.tolist()))
                    firsts, ends = (np.searchsorted(ordered, item.indices, side) for side in ("left", "right"))
                    for start, first, end in zip(item.frames.starts, firsts, ends, strict=True):
                        rows = order[first:end]
                        out[rows] = item.frames.pixels[start : start + size].reshape(self.frame_shape)
                        found[rows] = True
        if not found.all():
            raise DataError(f"{describe(indices[~found])} not in the file", tuple(indices[~found].tolist()))
        return out


def open(  # noqa: A001
    path: str | os.PathLike[str] | Url | Sequence[str | os.PathLike[str] | Url],
    *,
    scan: Sequence[int] | None = None,
    skip: int = 0,
    fit: bool = False,
    calibration: Mapping[str, Any] | None = None,
    format: str | None = None,  # noqa: A002
    copies: Sequence[Mapping[str, Any]] = (),
    follow_links: bool = False,
    **options: Any,
) -> Dataset:
    """Open detector data; only headers are read.

    Parameters
    ----------
    path : path, URL or sequence of them
        A file, or several that belong together in this order. ``s3://``, ``gs://``, ``az://``, ``https://`` and
        ``http://`` are read over the network, by ranges.
    scan : sequence of int
        Shape of the scan where the file doesn't say, or to reshape it.
    skip : int
        Frames at the start of the file that don't belong to the scan; negative: the first positions have no frame.
    fit : bool
        Go on where file and scan disagree: positions without a frame are masked, frames beyond it left out, and said.
    calibration : mapping
        ``scan_step``, ``scan_unit``, ``detector_step``, ``detector_unit``.
    format : str
        mib, npy, hdf5, empad or raw; by default found by the file's name.
    copies : sequence of mapping
        Machines that have the files on their own disks, too, and are to read them there: ``hosts`` (patterns of their
        names), ``folder``, and ``files`` (patterns of file names) where it isn't all.
    follow_links : bool
        Read also files outside the folder that a file of `path` names (HDF5, EMPAD); else they are refused.
    **options
        What the format needs to be told, such as ``frame``, ``dtype``, ``offset``, ``header``, ``footer`` for raw and
        ``dataset`` for HDF5.

    Returns
    -------
    Dataset
        The data set.

    Raises
    ------
    InputError
        The file is missing, alien, truncated, or has another number of frames than the scan.
    RecipeError
        An option is unknown or impossible.
    """
    paths = arguments.paths(path)
    scan, skip = arguments.scan_shape(paths[0], scan), arguments.whole("skip", skip)
    options = {key: value for key, value in {**options, "fit": fit or None}.items() if value is not None}
    source = read_header(paths, format, scan, follow_links=follow_links, **options)
    if copies != ():
        source = replace(source, copies=arguments.copies(copies))
    return arrange(source, scan, skip, fit, calibration)


def of_array(data: Any) -> Dataset:
    """A data set of an array (scan..., y, x) in memory: NumPy, CuPy, Dask or anything that slices."""
    return arrange(array.describe(data), None, 0, False, None)


def arrange(
    source: Source,
    scan: tuple[int, ...] | None,
    skip: int,
    fit: bool,
    calibration: Mapping[str, Any] | None,
) -> Dataset:
    """Arrange the frames of a source as a scan.

    Raises
    ------
    InputError
        The numbers of frames and positions differ, and `fit` is False.
    RecipeError
        The scan or the calibration is impossible.
    """
    name = source.files[0].path if source.files else "array"
    there = source.frames - skip
    if skip >= source.frames:
        raise RecipeError(f"{name}: skip = {skip} leaves out all of its {source.frames} frames")
    shape = scan if scan is not None else (source.scan_shape if skip == 0 else (there,))
    positions = math.prod(shape)
    if min(shape) < 1 or positions > arguments.MOST_POSITIONS:
        raise InputError(
            f"{name}: its scan {' x '.join(map(str, shape))} has {positions:,} positions; "
            f"gpuem takes 1 to {arguments.MOST_POSITIONS:,}"
        )
    if skip <= -positions:
        raise RecipeError(f"{name}: skip = {skip} leaves none of the {positions} scan positions a frame")
    notes = list(source.notes)
    if there != positions:
        less = there < positions
        message = (
            f"{name}: {source.frames} frames{f', {skip} of them skipped,' if skip else ''} for a scan of "
            f"{' x '.join(map(str, shape))} = {positions} positions, "
            f"{abs(there - positions)} too {'few' if less else 'many'}"
        )
        if not fit:
            remedy = "mask the positions without a frame" if less else "leave out the frames beyond the scan"
            raise InputError(f"{message}. Give the right scan or skip, or set fit = true to {remedy}")
        notes.append(message)
    if scan is not None and len(source.scan_shape) > 1 and shape != source.scan_shape:
        there_is = " x ".join(map(str, source.scan_shape))
        notes.append(f"{name}: the file says a scan of {there_is}; it is read as {' x '.join(map(str, shape))}")
    if scan is None and skip and len(source.scan_shape) > 1:
        there_is = " x ".join(map(str, source.scan_shape))
        notes.append(f"{name}: the file says a scan of {there_is}; with skip it is read as {there} in a row: give scan")
    if skip < 0:
        notes.append(f"the first {-skip} positions have no frame (skip = {skip})")
    axes = source.scan if source.scan and tuple(a.size for a in source.scan) == shape else scan_axes(shape)
    detector = source.detector or detector_axes(source.frame_shape)
    return Dataset(source, *_calibrate(axes, detector, arguments.calibration(calibration or {})), skip, tuple(notes))


def _calibrate(
    scan: tuple[Axis, ...], detector: tuple[Axis, ...], given: dict[str, Any]
) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
    """Scan and detector axes with the pixel sizes that are given."""
    if given.get("scan_step") is not None:
        scan = calibrate(scan, arguments.steps(given["scan_step"]), given.get("scan_unit") or "nm")
    if given.get("detector_step") is not None:
        detector = calibrate(detector, arguments.steps(given["detector_step"]), given.get("detector_unit") or "mrad")
    return scan, detector
