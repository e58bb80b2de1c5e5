"""What a virtual HDF5 dataset takes from where: its mappings, with names and unlimited selections written out."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.formats.hdf5_file import located
from gpuem.formats.remote import Url

# as many blocks or points of an irregular selection are looked at one by one
MOST_BLOCKS = 1 << 16


@dataclass(frozen=True)
class Selection:
    """The same rows and columns of some frames.

    Parameters
    ----------
    frames : (n,) int64
        Flat indices, in the order in which HDF5 takes them; -1 beyond the dataset.
    rows, columns : (m,) int64
        Ascending.
    """

    frames: NDArray[np.int64]
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]

    @property
    def box(self) -> tuple[int, int, int, int] | None:
        """First row, first column, number of rows and of columns, where these are without gaps."""
        if not (self.rows.size and self.columns.size):
            return None
        y, x, rows, columns = int(self.rows[0]), int(self.columns[0]), self.rows.size, self.columns.size
        close = self.rows[-1] - y == rows - 1 and self.columns[-1] - x == columns - 1
        return (y, x, rows, columns) if close else None


@dataclass(frozen=True)
class Mapping:
    """Where a part of a virtual dataset comes from.

    Parameters
    ----------
    file, dataset : str
        Names as they stand in the file; ``.`` is the file itself.
    target : tuple of Selection
        The part; one selection where it is regular, else several that together are it.
    regular : bool
        Whether it is.
    space : object
        The selection in the source, as HDF5 knows it.
    frames : int, optional
        Number of frames where HDF5 doesn't say how many of the source there are.
    """

    file: str
    dataset: str
    target: tuple[Selection, ...]
    regular: bool
    space: Any


def promised_shape(dset: Any) -> tuple[int, ...]:
    """Shape of a dataset; of a virtual one as it was written, though sources may be missing that HDF5 counts by."""
    shape = tuple(dset.shape or ())
    if not shape or not dset.is_virtual:
        return shape
    most = list(shape)
    for entry in _as_written(dset):
        axis, start, stride, block = _unlimited(entry.vspace)
        if axis is None or len(entry.vspace.shape) != len(most):
            continue
        stored = entry.vspace.shape[axis]
        most[axis] = max(most[axis], stored if stored < 1 << 62 else 0)
        for number in _numbers(dset, entry.file_name):
            most[axis] = max(most[axis], start + number * stride + block)
    return tuple(most)


def _as_written(dset: Any) -> list[Any]:
    """The mappings with the shape that the file says: once HDF5 has looked at the sources, it says theirs instead."""
    import h5py

    path = located(dset.file)
    if not isinstance(path, Url):
        # through a driver of its own, HDF5 takes it for another file
        with contextlib.suppress(OSError, KeyError), path.open("rb") as stream, h5py.File(stream, "r") as file:
            return list(file[dset.name].virtual_sources())
    return list(dset.virtual_sources())


def mappings(dset: Any, shape: tuple[int, ...]) -> Iterator[Mapping]:
    """The mappings of a virtual dataset of this shape, one for each source."""
    for entry in dset.virtual_sources():
        axis, start, stride, block = _unlimited(entry.vspace)
        if axis is None or not (_counted(entry.file_name) or _counted(entry.dset_name)):
            names = _named(entry.file_name, 0), _named(entry.dset_name, 0)
            chosen = selection(entry.vspace, shape)
            target = (chosen,) if chosen is not None else tuple(_pieces(entry.vspace, shape))
            yield Mapping(*names, target, chosen is not None, entry.src_space)
            continue
        axes = _axes(entry.vspace, shape)
        for number in range(max(0, -(-(shape[axis] - start) // stride))):
            low = start + number * stride
            axes[axis] = np.arange(low, min(low + block, shape[axis]))
            names = _named(entry.file_name, number), _named(entry.dset_name, number)
            yield Mapping(*names, (_chosen(axes, shape),), True, entry.src_space)


def selection(space: Any, shape: tuple[int, ...], count: int | None = None) -> Selection | None:
    """What a selection takes from a dataset of this shape; None where it is irregular.

    `count` is the number of elements where the selection has no end, else it ends with the dataset.
    """
    import h5py

    if len(shape) < 2:
        return None
    if space.get_select_type() == h5py.h5s.SEL_ALL:
        return _chosen([np.arange(n) for n in shape], shape)
    if space.get_select_type() != h5py.h5s.SEL_HYPERSLABS or not space.is_regular_hyperslab():
        return None
    return _chosen(_axes(space, shape, count), shape) if len(space.get_regular_hyperslab()[0]) == len(shape) else None


def _chosen(axes: list[NDArray[Any]], shape: tuple[int, ...]) -> Selection:
    nav = shape[:-2] or (1,)
    chosen = axes[:-2] or [np.zeros(1, np.int64)]
    inside = [a < n for a, n in zip(chosen, nav, strict=True)]
    flat = np.ravel_multi_index(np.ix_(*[np.minimum(a, n - 1) for a, n in zip(chosen, nav, strict=True)]), nav)
    there = functools.reduce(np.logical_and.outer, inside)
    frames = np.where(there, flat, -1).reshape(-1).astype(np.int64)
    rows, columns = axes[-2], axes[-1]
    if (rows >= shape[-2]).any() or (columns >= shape[-1]).any():
        frames = np.full_like(frames, -1)
    return Selection(frames, rows.astype(np.int64), columns.astype(np.int64))


def _axes(space: Any, shape: tuple[int, ...], count: int | None = None) -> list[NDArray[Any]]:
    """Indices along every axis of a regular hyperslab."""
    axes = []
    endless: int | None = None
    for k, (start, stride, number, block) in enumerate(zip(*space.get_regular_hyperslab(), strict=True)):
        if number >= 1 << 62 or block >= 1 << 62:
            endless = k
            number, block = (
                (1, max(shape[k] - start, 0)) if block >= 1 << 62 else (-(-(shape[k] - start) // stride), block)
            )
            along = (start + np.arange(max(number, 0))[:, None] * stride + np.arange(block)).reshape(-1)
            axes.append(along[along < shape[k]])
        else:
            axes.append((start + np.arange(number)[:, None] * stride + np.arange(block)).reshape(-1))
    if endless is not None and count is not None:
        others = math.prod(a.size for k, a in enumerate(axes) if k != endless)
        want = count // max(others, 1)
        start, stride, _, block = (v[endless] for v in space.get_regular_hyperslab())
        block = 1 if block >= 1 << 62 else block
        stride = 1 if block == 1 and stride >= 1 << 62 else stride
        steps = np.arange(-(-want // block))[:, None]
        axes[endless] = (start + steps * stride + np.arange(block)).reshape(-1)[:want]
    return axes


def _unlimited(space: Any) -> tuple[int | None, int, int, int]:
    """Axis without an end, and where it starts, its stride and its block; None where there is none."""
    import h5py

    if space.get_select_type() == h5py.h5s.SEL_HYPERSLABS and space.is_regular_hyperslab():
        for k, (start, stride, number, block) in enumerate(zip(*space.get_regular_hyperslab(), strict=True)):
            if number >= 1 << 62 or block >= 1 << 62:
                return k, int(start), int(stride), int(block if block < 1 << 62 else 1)
    return None, 0, 1, 1


def _pieces(space: Any, shape: tuple[int, ...]) -> Iterator[Selection]:
    """An irregular selection, block by block or point by point."""
    import h5py

    if space.get_select_type() == h5py.h5s.SEL_HYPERSLABS:
        corners = space.get_select_hyper_blocklist(0, min(space.get_select_hyper_nblocks(), MOST_BLOCKS))
        for first, last in corners:
            yield _chosen([np.arange(a, b + 1) for a, b in zip(first, last, strict=True)], shape)
    elif space.get_select_type() == h5py.h5s.SEL_POINTS:
        for point in space.get_select_elem_pointlist(0, min(space.get_select_elem_npoints(), MOST_BLOCKS)):
            yield _chosen([np.arange(a, a + 1) for a in point], shape)


def _counted(name: str) -> bool:
    return re.search(r"(?<!%)(%%)*%b", name) is not None


def _named(name: str, number: int) -> str:
    """A name with the number of the block in it."""
    return re.sub(r"%(.)", lambda found: {"b": str(number), "%": "%"}.get(found[1], found[0]), name)


def _numbers(dset: Any, name: str) -> list[int]:
    """Numbers of the files of a numbered mapping that are in its folder."""
    folder = located(dset.file).parent
    if isinstance(folder, Url) or not _counted(name):
        return []
    pattern = "".join(
        r"(0|[1-9]\d{0,8})" if part == "%b" else re.escape(_named(part, 0)) for part in re.split(r"(%[b%])", name)
    )
    where = (folder / _named(name, 0)).parent
    if not where.is_dir() or "%b" in name.rpartition("/")[0]:
        return []
    last = pattern.rpartition("/")[2]
    return [int(found[1]) for path in where.iterdir() if (found := re.fullmatch(last, path.name))]
