"""Named maps with axes, units and provenance; Zarr v3 in and out."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gpuem.analyses import Map
from gpuem.axes import Axis
from gpuem.errors import InputError, OutputError
from gpuem.paths import local_path

_MARK = "gpuem"


@dataclass(frozen=True)
class Results(Mapping[str, Map]):
    """Maps by name: ``results["adf"]``, ``results["com/x"]``.

    Parameters
    ----------
    maps : dict of str to Map
        The maps. ``valid`` says which scan positions had a readable frame.
    provenance : dict
        How they came about: recipe, input files, versions, device, timings, what was lost.
    """

    maps: dict[str, Map]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Map:
        if name not in self.maps:
            raise KeyError(f"{name!r}; there are: {', '.join(self.maps)}")
        return self.maps[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.maps)

    def __len__(self) -> int:
        return len(self.maps)

    def __repr__(self) -> str:
        lines = [f"  {name:20} {m.data.shape!s:16} {m.data.dtype!s:8} {m.units}" for name, m in self.maps.items()]
        return "\n".join(["<gpuem.Results", *lines, ">"])

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write all maps as one Zarr v3 folder, whole or not at all.

        Parameters
        ----------
        path : path
            The folder, by convention ``name.zarr``.
        overwrite : bool
            Replace a result that is there.

        Returns
        -------
        Path
            Where it lies.

        Raises
        ------
        OutputError
            It exists, the disk is full, or the folder can't be written.
        """
        target = local_path(path)
        check_writable(target, overwrite=overwrite)
        partial = target.parent / f".{target.name}.partial-{os.getpid()}"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _write(self, partial)
            if target.exists():
                old = target.parent / f".{target.name}.old-{os.getpid()}"
                target.rename(old)
                try:
                    partial.rename(target)
                except OSError:
                    old.rename(target)
                    raise
                shutil.rmtree(old)
            else:
                partial.rename(target)
        except OSError as error:
            reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
            raise OutputError(f"{target}: not written: {reason}; nothing was left behind") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return target


def check_writable(target: Path, *, overwrite: bool) -> None:
    """Raise OutputError where a result can't be written: told before hours of computing, not after."""
    try:
        target.exists()
    except OSError as error:
        # such as a name that is too long
        raise OutputError(f"{target}: {error.strerror}; choose another [output] path") from error
    if not target.name:
        raise OutputError(f"{target}: no name for a result; give a folder that gpuem makes, such as results.zarr")
    if target.exists() and not overwrite:
        raise OutputError(f"{target}: exists; choose another name, or say --overwrite (overwrite=True)")
    if target.exists() and not is_result(target):
        raise OutputError(f"{target}: exists and isn't a gpuem result, so it is never overwritten; choose another name")
    there = next(folder for folder in target.absolute().parents if folder.exists())
    if not there.is_dir():
        raise OutputError(f"{there}: a file; a folder can't be created in it")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OutputError(f"{there}: no permission to write; choose another [output] path")


def is_result(path: Path) -> bool:
    """Whether `path` is a folder that `Results.save` wrote."""
    try:
        meta = json.loads((path / "zarr.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(meta, dict) and _MARK in meta.get("attributes", {})


def load_results(path: str | os.PathLike[str]) -> Results:
    """Read results that `Results.save` wrote.

    Raises
    ------
    InputError
        Not a folder of gpuem results.
    """
    import zarr

    folder = local_path(path)
    if not is_result(folder):
        raise InputError(f"{folder}: not a gpuem result (a folder written by gpuem run or Results.save)")
    try:
        root: Any = zarr.open_group(folder, mode="r")
        maps = {name: _read(root[_array_path(name)]) for name in root.attrs[_MARK]["maps"]}
        return Results(maps, dict(root.attrs[_MARK]["provenance"]))
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise InputError(f"{folder}: a damaged gpuem result ({type(error).__name__}: {error}); run it again") from error


def _read(array: Any) -> Map:
    attributes = dict(array.attrs)
    axes = tuple(Axis(**axis) for axis in attributes.pop("axes"))
    units, description = attributes.pop("units"), attributes.pop("long_name")
    return Map(np.asarray(array[...]), axes, units, description, attributes)


def _array_path(name: str) -> str:
    """``com/x`` lies in group com; a single map ``adf`` in group adf under its own name; ``valid`` at the root."""
    return name if "/" in name or name == "valid" else f"{name}/{name}"


def _write(results: Results, folder: Path) -> None:
    import zarr

    root = zarr.open_group(folder, mode="w", zarr_format=3)
    root.attrs.update({_MARK: {"maps": list(results.maps), "provenance": results.provenance}})
    written: set[str] = set()
    for name, item in results.maps.items():
        path = _array_path(name)
        attributes = {
            "units": item.units,
            "long_name": item.description,
            "axes": [
                {"name": a.name, "size": a.size, "step": a.step, "unit": a.unit, "origin": a.origin} for a in item.axes
            ],
            **item.attributes,
        }
        _add(root, path, np.asarray(item.data), [a.name for a in item.axes], attributes)
        for axis in item.axes:
            coordinate = str(Path(path).parent / axis.name)
            if coordinate not in written:
                _add(root, coordinate, axis.coordinates, [axis.name], {"units": axis.unit})
                written.add(coordinate)


def _add(root: Any, path: str, data: Any, dimensions: list[str], attributes: Mapping[str, Any]) -> None:
    array = root.create_array(path, shape=data.shape, dtype=data.dtype, chunks=data.shape or None,
                              compressors=None, dimension_names=dimensions, attributes=dict(attributes))  # fmt: skip
    array[...] = data
