"""Named maps with axes, units and provenance; Zarr v3 in and out."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpuem import atomic, result_store, staging
from gpuem.analyses import Map
from gpuem.errors import InputError, OutputError
from gpuem.paths import local_path

log = logging.getLogger("gpuem")
# what Zarr and its codecs raise where files are missing or damaged
_DAMAGED = (LookupError, TypeError, ValueError, OSError, RuntimeError, AttributeError, ArithmeticError)


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

        Files are on the disk before they get their names, and nothing that was there is removed before that. Where a
        process is killed in between, the next one that saves into the same folder restores what was there.

        Parameters
        ----------
        path : path
            The folder, by convention ``name.zarr``.
        overwrite : bool
            Replace a result that is there: the files that its own record lists. Whatever else lies in its folder stays.

        Returns
        -------
        Path
            Where it lies.

        Raises
        ------
        OutputError
            It exists, a file that gpuem did not write is in the way, the disk is full, or the folder can't be written.
        """
        target = local_path(path)
        refuse_impossible(target)
        staging.restore(target.parent)
        check_writable(target, overwrite=overwrite)
        self._refuse_input(target)
        try:
            atomic.make_folder(target.parent)
            with staging.staged(target) as place:
                old = result_store.read_record(target)
                new = result_store.write(self.maps, self.provenance, place / "new")
                replaced = [] if old is None else result_store.own_files(old)
                staging.exchange(place, target, replaced, result_store.own_files(new))
        except OSError as error:
            raise OutputError(
                f"{target}: not written: {atomic.format_error(error)}; what was there before is as it was"
            ) from error
        return target

    def _refuse_input(self, target: Path) -> None:
        """Never write into a folder that the data came from."""
        about = self.provenance.get("input")
        files = about.get("files", []) if isinstance(about, dict) else []
        place = os.path.realpath(target)
        for file in files:
            # of an URL it is nonsense, and nowhere near
            data = os.path.realpath(str(file["path"]))
            if f"{data}{os.sep}".startswith(f"{place}{os.sep}"):
                raise OutputError(f"{target}: the data of this result lie there ({data}); choose another name")


@dataclass(frozen=True)
class SavedResults:
    """A result on disk, as ``results, path = saved``: its maps are loaded every time they are asked for, never kept.

    Parameters
    ----------
    path : Path
        Where it was saved.
    """

    path: Path

    def load(self) -> Results:
        """The maps, from the disk.

        Raises
        ------
        InputError
            They are not there any more, or damaged.
        """
        return load_results(self.path)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.load(), self.path))

    def __getitem__(self, index: int) -> Any:
        return self.load() if index in (0, -2) else (None, self.path)[index]

    def __len__(self) -> int:
        return 2


def check_writable(target: Path, *, overwrite: bool) -> None:
    """Raise OutputError where a result can't be written: told before hours of computing, not after."""
    refuse_impossible(target)
    if os.path.lexists(target):
        if not overwrite:
            raise OutputError(f"{target}: exists; choose another name, or say --overwrite (overwrite=True)")
        if not is_result(target):
            raise OutputError(f"{target}: exists and {_what_it_is(target)}, so it is never overwritten; {_REMEDY}")
    there = next(folder for folder in target.absolute().parents if os.path.lexists(folder))
    if not there.is_dir():
        raise OutputError(f"{there}: a file; a folder can't be created in it")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OutputError(f"{there}: no permission to write; choose another [output] path")


_REMEDY = "choose another name, or move it away yourself"


def _what_it_is(target: Path) -> str:
    if target.is_symlink():
        return "is a symbolic link"
    kind = result_store.describe_unrecorded(target)
    if kind == "unrecorded":
        return "is a result of an earlier version of gpuem, which kept no record of its files"
    return "isn't a gpuem result" if kind == "alien" else "is a damaged gpuem result: its record is missing or damaged"


def refuse_impossible(target: Path) -> None:
    """Raise OutputError for a path that no folder can have: no name, a name too long, a NUL."""
    if target.name in ("", "..") or "\0" in str(target):
        raise OutputError(f"{str(target)!r}: not a name for a folder of results; choose another [output] path")
    try:
        os.lstat(target)
    except (FileNotFoundError, NotADirectoryError):
        # the latter is told in other words
        return
    except (OSError, ValueError) as error:
        reason = atomic.format_error(error) if isinstance(error, OSError) else str(error)
        raise OutputError(f"{target}: can't be written: {reason}; choose another [output] path") from error


def is_result(path: Path) -> bool:
    """Whether `path` is a folder that `Results.save` wrote, by the record in it."""
    return result_store.read_record(path) is not None


def is_readable(path: Path) -> bool:
    """Whether `load_results` takes `path` for a result, be it of a version that kept no record, or damaged."""
    return is_result(path) or result_store.describe_unrecorded(path) != "alien"


def load_results(path: str | os.PathLike[str]) -> Results:
    """Read results that `Results.save` wrote; their values are checked against the checksums that it kept.

    Raises
    ------
    InputError
        Not a folder of gpuem results, or a file in it is missing or damaged: which one, of which map.
    """
    folder = local_path(path)
    if not is_result(folder):
        kind = result_store.describe_unrecorded(folder)
        if kind == "alien":
            raise InputError(f"{folder}: not a gpuem result (a folder written by gpuem run or Results.save)")
        if kind == "damaged":
            raise InputError(f"{folder}: a damaged gpuem result: its record is missing or damaged; run it again")
        log.warning("%s: of an earlier version of gpuem, which kept no checksums: its values are not checked", folder)
    try:
        maps, provenance = result_store.read(folder)
        return Results(maps, provenance)
    except _DAMAGED as error:
        raise InputError(f"{folder}: a damaged gpuem result ({type(error).__name__}: {error}); run it again") from error
