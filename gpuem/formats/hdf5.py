"""HDF5 and what is built on it: plain files, HyperSpy, EMD and py4DSTEM, NeXus, DECTRIS masters with their data files.

The dataset is found by its shape; its bytes are described (`gpuem.formats.hdf5_layout`), never read here.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.axes import Axis, canonical_unit, detector_axes, scan_axes
from gpuem.errors import GpuemError, InputError, RecipeError, TruncatedError
from gpuem.formats import helper
from gpuem.formats.hdf5_check import check_superblock
from gpuem.formats.hdf5_file import Files, located, opened, pixel_type, type_name
from gpuem.formats.hdf5_layout import beside, describe
from gpuem.formats.hdf5_links import Links
from gpuem.formats.hdf5_selection import promised_shape
from gpuem.formats.named import Named, RefusedError
from gpuem.formats.raw import native_type
from gpuem.formats.remote import Place, Url
from gpuem.formats.source import Piece, Source

_SERIES = ("entry/data", "entry")
_COUNTS = "entry/instrument/detector/detectorSpecific"


def read_header(
    paths: tuple[Place, ...], *, dataset: str | None = None, fit: bool = False, follow_links: bool = False
) -> Source:
    """Describe the frames of an HDF5 file: a dataset of shape (nav..., y, x), or a DECTRIS series of datasets.

    HDF5 reads its tables in a helper process (`gpuem.formats.helper`): damaged ones can end or hang it.

    Parameters
    ----------
    paths : tuple of Path or Url
        One file; for a series its master.
    dataset : str
        Name of the dataset, or of the group it lies in. Without it the largest dataset of numbers with at least
        three axes is taken, one with four before one with three.
    fit : bool
        Go on without the frames of missing or cut-off data files.
    follow_links : bool
        Read also files outside the folder of the file, where links, virtual data sets or raw files lead there.

    Raises
    ------
    RecipeError
        The dataset named isn't there, or several are equally likely; the names are listed.
    InputError
        Not HDF5, cut off, no frames in it, a data file is missing or may not be read, pixels that aren't real numbers.
    TruncatedError
        A series, or a file with raw frames, holds fewer frames than promised.
    """
    if len(paths) != 1:
        raise RecipeError(f"{len(paths)} HDF5 files given; name one: a series is read through its master file")
    source: Source = _guarded(read_tables, paths[0], dataset=dataset, fit=fit, follow_links=follow_links)
    return source


def datasets(path: Place) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and type of every dataset with at least two axes, the largest first; raises InputError."""
    found: list[tuple[str, tuple[int, ...], str]] = _guarded(list_tables, path)
    return found


def _guarded(function: Callable[..., Any], path: Place, **options: Any) -> Any:
    """Call a function that lets HDF5 read a file's tables in the helper process; in this one for URLs."""
    if isinstance(path, Url):
        return function(path, **options)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    check_superblock(path)
    return helper.call(function, path, **options)


def read_tables(path: Place, *, dataset: str | None = None, fit: bool = False, follow_links: bool = False) -> Source:
    """As `read_header`, in this process."""
    files = Files()
    with _damage_told(path), opened(path, files) as file, contextlib.ExitStack() as others:
        links = Links(Named(path, follow_links), others, files)
        series = _series(file, dataset, links)
        if series:
            return _read_series(file, [(name, link, _followed(file, name, links)) for name, link in series], links, fit)
        return _read_one(file, _choose(file, dataset, links), links, fit)


def list_tables(path: Place) -> list[tuple[str, tuple[int, ...], str]]:
    """As `datasets`, in this process."""
    files = Files()
    with _damage_told(path), opened(path) as file, contextlib.ExitStack() as others:
        walked = Links(Named(path), others, files).walk(file)[0]
        found = [(name, tuple(d.shape), type_name(d)) for name, d in walked.items() if d.shape and d.ndim > 1]
    return sorted(found, key=lambda entry: (-math.prod(entry[1]), entry[0]))


@contextlib.contextmanager
def _damage_told(path: Place) -> Iterator[None]:
    """What HDF5, h5py and NumPy raise where tables contradict each other, as an InputError."""
    try:
        yield
    except GpuemError:
        raise
    except (OSError, LookupError, ValueError, TypeError, ArithmeticError, AttributeError, RuntimeError, MemoryError,
            SystemError, AssertionError) as error:  # fmt: skip
        raise InputError(f"{path}: its HDF5 structure is damaged ({type(error).__name__}: {error})") from error


def _source(files: Files, pieces: list[Piece], shape: tuple[int, ...], stored: np.dtype[Any], **more: Any) -> Source:
    """A Source of these pieces for an array of shape (nav..., y, x)."""
    native = native_type(stored)
    nav = shape[:-2] or (1,)
    met = tuple(files.met.values())
    notes = tuple(files.notes)
    return Source("hdf5", met, tuple(pieces), math.prod(nav), (shape[-2], shape[-1]), native, nav, notes=notes, **more)


def _read_one(file: Any, dset: Any, links: Links, fit: bool) -> Source:
    """A single dataset."""
    files, shape = links.files, promised_shape(dset)
    if math.prod(shape) == 0:
        raise InputError(f"{file.filename}: {dset.name} has shape {shape} and holds no pixels")
    if {"Data", "Version"} <= set(file) and dset.name.startswith("/Data/Image/"):
        raise InputError(
            f"{file.filename}: a Velox file; it stores frames along the last axis, which gpuem doesn't read"
        )
    stored, _ = pixel_type(dset)
    files.index(located(file))
    links.check_sources(dset)
    pieces = describe(dset, files, fit=fit)
    scan, detector = _axes(dset, links)
    metadata = {"dataset": dset.name, **_attributes(dset)}
    return _source(files, pieces, shape, stored, scan=scan, detector=detector, metadata=metadata)


def _choose(file: Any, dataset: str | None, links: Links) -> Any:
    """The dataset that is meant."""
    import h5py

    if dataset is not None and isinstance(named := links.get(file["/"], dataset), h5py.Dataset):
        if named.shape is None or named.ndim < 2:
            raise RecipeError(f"{file.filename}: {dataset} has shape {named.shape}; a frame needs two axes (y, x)")
        return named
    found, broken, refused = links.walk(file)
    within = found if dataset is None else {n: d for n, d in found.items() if n.startswith(f"/{dataset.strip('/')}/")}
    if dataset is not None and not within:
        if refused:
            raise refused[0]
        names = [name for name, d in found.items() if d.shape and d.ndim > 1]
        near = difflib.get_close_matches(f"/{dataset.strip('/')}", names, 3, 0.3) or names[:8]
        listed = ", ".join(f"{n} {found[n].shape}" for n in near) or "none"
        raise RecipeError(f"{file.filename}: no dataset {dataset!r}; nearest: {listed}")
    fits = {
        name: d for name, d in within.items() if d.shape and d.ndim > 2 and math.prod(promised_shape(d)) and _numbers(d)
    }
    if refused:
        _tell_refused(links.files, refused)
    if not fits:
        if refused:
            raise refused[0]
        raise InputError(_nothing(file, within, broken))
    deepest = {name: d for name, d in fits.items() if d.ndim > 3} or fits
    largest = max(math.prod(d.shape) for d in deepest.values())
    best = [name for name, d in deepest.items() if math.prod(d.shape) == largest]
    if len(best) > 1:
        listed = ", ".join(f"{name} {fits[name].shape}" for name in best[:8])
        raise RecipeError(f'{file.filename}: several datasets may be meant; say dataset = "{best[0]}": {listed}')
    return fits[best[0]]


def _tell_refused(files: Files, refused: list[RefusedError]) -> None:
    """Say which links were not followed."""
    files.note(f"{refused[0]}{f' ({len(refused) - 1} more links like it)' if refused[1:] else ''}")


def _numbers(dset: Any) -> bool:
    """Whether a dataset's elements are real numbers."""
    try:
        pixel_type(dset)
    except InputError:
        return False
    return True


def _nothing(file: Any, found: dict[str, Any], broken: list[str]) -> str:
    """Why a file has no frames."""
    if broken:
        missing = ", ".join(str(located(file).parent / name) for name in broken[:4])
        return f"{file.filename}: its frames lie in other files, which are missing or unreadable: {missing}"
    listed = [f"{name} {d.shape} {type_name(d)}" for name, d in found.items() if d.shape and d.ndim > 1][:8]
    if not listed:
        return f"{file.filename}: holds no dataset with two axes or more"
    return (
        f"{file.filename}: holds no dataset of real numbers with three axes or more, but {', '.join(listed)}; "
        'a single frame must be named: dataset = "..."'
    )


def _series(file: Any, dataset: str | None, links: Links) -> list[tuple[str, Any]]:
    """The data_000001, data_000002, ... of a DECTRIS master, as (name, link); empty where there are none."""
    for name in _SERIES if dataset is None else (dataset.strip("/"),):
        group = links.get(file["/"], name)
        if group is not None and hasattr(group, "keys"):
            members = sorted((m for m in group if re.fullmatch(r"data_[0-9]{1,18}", m)), key=lambda m: int(m[5:]))
            if members:
                return [(f"{group.name}/{m}", group.get(m, getlink=True)) for m in members]
    return []


def _followed(file: Any, name: str, links: Links) -> Any:
    """The dataset that a link of a master leads to; None where there is none, the error where it can't be opened."""
    try:
        return links.get(file["/"], name)
    except RefusedError:
        raise
    except InputError as error:
        return error


def _read_series(file: Any, series: list[tuple[str, Any, Any]], links: Links, fit: bool) -> Source:
    """All datasets of a master (name, link, dataset), one after another along the first axis."""
    import h5py

    files = links.files
    path = located(file)
    files.index(path)
    pieces: list[Piece] = []
    first: Any = None
    start, usual, gap = 0, 0, False
    for name, link, dset in series:
        if dset is None or isinstance(dset, InputError):
            target = beside(file["/"], link.filename) if hasattr(link, "filename") else getattr(link, "path", name)
            why = "damaged or without the dataset" if not isinstance(target, str) and target.is_file() else "missing"
            why += f" ({dset})" if dset is not None else ""
            message = f"{path}: {name} lies in {target}, which is {why}"
            if not fit:
                raise InputError(f"{message}; set fit = true to go on without its frames")
            files.note(message)
            start, gap = start + usual, True
            continue
        if not isinstance(dset, h5py.Dataset):
            raise InputError(f"{path}: {name} is a group; a data set of frames was expected")
        links.check_sources(dset)
        if gap and "image_nr_low" in dset.attrs:
            start = max(start, int(dset.attrs["image_nr_low"]) - 1)
        if dset.ndim != 3 or (first and (dset.shape[1:], dset.dtype) != (first.shape[1:], first.dtype)):
            like = f"; the first one {first.shape} {first.dtype}" if first else "; (frames, y, x) was expected"
            raise InputError(f"{path}: {name} has shape {dset.shape} {dset.dtype}{like}")
        first = first or dset
        pieces += [replace(piece, start=piece.start + start) for piece in describe(dset, files, fit=fit)]
        frames = promised_shape(dset)[0]
        start, usual, gap = start + frames, usual or frames, False
    if first is None:
        raise InputError(f"{path}: none of its {len(series)} data files is there, {series[0][0]} for one")
    frames, counts = _promised(file, start, links, fit)
    metadata = {"dataset": str(Path(series[0][0]).parent), **counts}
    return _source(files, pieces, (frames, *first.shape[1:]), pixel_type(first)[0], metadata=metadata)


def _promised(file: Any, there: int, links: Links, fit: bool) -> tuple[int, dict[str, int]]:
    """Number of frames, and what the master says of them: images per trigger and triggers."""
    path, files, counts = located(file), links.files, {}
    for key in ("nimages", "ntrigger"):
        value = _values(links, file["/"], f"{_COUNTS}/{key}")
        if value is not None and value.size == 1:
            counts[key] = int(value.reshape(-1)[0])
    promised = math.prod(counts.values()) if counts else there
    if there < promised:
        message = f"{path}: its data files hold {there} of the {promised} frames that were asked of the detector"
        if not fit:
            raise TruncatedError(f"{message}; set fit = true to go on with them", there)
        files.note(message)
    elif there > promised:
        files.note(
            f"{path}: its data files hold {there} frames, {there - promised} more than were asked of the detector"
        )
    return max(there, promised), counts


def _values(links: Links, group: Any, path: str) -> NDArray[Any] | None:
    """A short dataset of numbers that lies in the file itself; None where there is none."""
    dset = _member(links, group, path)
    if not hasattr(dset, "is_virtual") or dset.is_virtual or dset.external or not dset.size or dset.size > 1 << 24:
        return None
    return np.asarray(dset[()]) if dset.dtype.kind in "fiu" else None


def _member(links: Links, group: Any, path: str) -> Any:
    """What says more about the frames; None where it isn't there or can't be had."""
    try:
        return links.get(group, path)
    except InputError:
        return None


def _attributes(dset: Any) -> dict[str, Any]:
    """Attributes that are plain values: numbers, strings, short lists of numbers."""
    plain: dict[str, Any] = {}
    for name, value in dset.attrs.items():
        if isinstance(value, str | bool | int | float):
            plain[name] = value
        elif isinstance(value, np.generic | np.ndarray) and value.dtype.kind in "biuf" and value.size <= 16:
            plain[name] = value.tolist()
    return plain


def _axes(dset: Any, links: Links) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
    """Scan and detector axes with their calibration; empty where the file gives none or one that isn't certain."""
    if dset.ndim < 3:
        return (), ()
    group = dset.parent
    if "axis-0" in group.keys():  # noqa: SIM118
        found = [_hyperspy(_member(links, group, f"axis-{k}")) for k in range(dset.ndim)]
    elif f"dim{dset.ndim - 1}" in group.keys():  # noqa: SIM118
        base = 0 if "dim0" in group.keys() else 1  # noqa: SIM118
        found = [_vector(links, group, f"dim{k + base}", n) for k, n in enumerate(dset.shape)]
    else:
        return (), ()
    return _calibrated(scan_axes(dset.shape[:-2]), found[:-2]), _calibrated(detector_axes(dset.shape[-2:]), found[-2:])


def _calibrated(axes: tuple[Axis, ...], found: list[tuple[float, float, str] | None]) -> tuple[Axis, ...]:
    """Axes with (step, origin, unit), or none unless all of them are known, in one unit other than pixels."""
    done = []
    for axis, entry in zip(axes, found, strict=True):
        if entry is None:
            return ()
        step, origin, name = entry
        try:
            unit, factor = canonical_unit(re.sub(r"[\[\]_ ]", "", name))
        except RecipeError:
            return ()
        if not (step > 0 and math.isfinite(step) and math.isfinite(origin)):
            return ()
        done.append(replace(axis, step=step * factor, origin=origin * factor, unit=unit))
    return tuple(done) if len({axis.unit for axis in done}) == 1 and done[0].unit != "px" else ()


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _hyperspy(axis: Any) -> tuple[float, float, str] | None:
    """Step, origin and unit of an axis of HyperSpy."""
    if axis is None or not {"scale", "units"} <= set(axis.attrs):
        return None
    return float(axis.attrs["scale"]), float(axis.attrs.get("offset", 0.0)), _text(axis.attrs["units"])


def _vector(links: Links, group: Any, name: str, size: int) -> tuple[float, float, str] | None:
    """Step, origin and unit of an EMD dim vector: all coordinates, or the first two."""
    values = _values(links, group, name)
    if values is None or values.ndim != 1 or values.shape[0] not in (2, size) or values.shape[0] < 2:
        return None
    values = values.astype(np.float64)
    step = (values[-1] - values[0]) / (len(values) - 1)
    if not np.allclose(np.diff(values), step, rtol=1e-3, atol=0):
        return None
    return float(step), float(values[0]), _text(_member(links, group, name).attrs.get("units", ""))
