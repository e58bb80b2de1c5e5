"""Copies of the data on the disks of machines: who reads which files where, and whether they are the same files."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from gpuem import tiles
from gpuem.engine import Job
from gpuem.errors import GpuemError, InputError
from gpuem.formats.source import (
    Calls,
    Chunks,
    Copy,
    File,
    Resident,
    Runs,
    Source,
    Stitched,
    Strided,
    layouts,
    stored_layout,
)
from gpuem.identity import of_ends
from gpuem.storage.host import Files

# checksums of both ends of files, by their number
Ends = dict[int, str]


def ends(source: Source, files: Files) -> Ends:
    """Checksums of the ends of all files that are said to lie elsewhere, too."""
    wanted = sorted({k for copy in source.copies for k in _covered(copy, source)})
    return {k: of_ends(files, k, source.files[k].size) for k in wanted}


def found_here(source: Source, known: Ends, host: str) -> Source:
    """The source with the files that this machine has on its own disks.

    Raises
    ------
    InputError
        A copy isn't there, or is not a copy; both files are named.
    """
    files = list(source.files)
    for copy in source.copies:
        if _matches(copy, host):
            for k in _covered(copy, source):
                if files[k] is source.files[k]:
                    files[k] = _checked(source.files[k], copy.folder / source.files[k].path.name, known[k], host)
    return replace(source, files=tuple(files)) if tuple(files) != source.files else source


def at_home(job: Job) -> Job:
    """The job with the files that this machine has on its own disks; raises like `found_here`."""
    if not job.source.copies:
        return job
    source = found_here(job.source, ends(job.source, job.files), platform.node())
    return job if source is job.source else replace(job, source=source, files=Files(source.files))


def place_of(source: Source, host: str) -> str:
    """What machines that hold the same files have in common, as `near` names it; empty for those that hold none."""
    return next((_name(copy) for copy in source.copies if _matches(copy, host)), "")


def near(source: Source, shards: Iterable[tiles.Shard], cuts: tuple[tuple[int, ...], ...]) -> dict[int, set[str]]:
    """By shard, the places that hold all of its files."""
    holding = [(_name(copy), set(_covered(copy, source))) for copy in source.copies]
    out: dict[int, set[str]] = {}
    for shard in shards if holding else ():
        needed = _files_of(source, shard, cuts[shard.piece])
        places = {name for name, held in holding if needed and needed <= held}
        if places:
            out[shard.index] = places
    return out


def _name(copy: Copy) -> str:
    return " ".join(copy.hosts)


def _matches(copy: Copy, host: str) -> bool:
    """By the name of a machine, with or without its domain."""
    names = (host, host.partition(".")[0])
    return any(fnmatchcase(name, pattern) for pattern in copy.hosts for name in names)


def _covered(copy: Copy, source: Source) -> list[int]:
    """Numbers of the files that a copy has."""
    # what answers for itself has the paths of its own
    if any(isinstance(layout, Calls | Resident) for piece in source.pieces for layout in layouts(piece)):
        return []
    return [
        k for k, file in enumerate(source.files) if any(fnmatchcase(file.path.name, pattern) for pattern in copy.files)
    ]


def _checked(original: File, path: Path, known: str, host: str) -> File:
    """The file that a machine has on its own disks, once it is known to be the same."""
    told = f"{path} on {host} is not a copy of {original.path}"
    try:
        found = File.of(path)
    except OSError as error:
        raise InputError(
            f"{path} on {host}, said to be a copy of {original.path}: {error.strerror}; copy it there, or change "
            "[[input.copy]]"
        ) from error
    if found.size != original.size:
        raise InputError(f"{told}: {found.size} bytes there, {original.size} here; copy it again")
    if found.mtime_ns != original.mtime_ns:
        try:
            same = of_ends(Files((found,)), 0, found.size) == known
        except GpuemError as error:
            raise InputError(f"{told}, it can't be read: {error}") from error
        if not same:
            raise InputError(f"{told}: as long, but its beginning or its end differ; copy it again")
    return found


def _files_of(source: Source, shard: tiles.Shard, cut: tuple[int, ...]) -> set[int]:
    """Numbers of the files that a shard reads."""
    piece = source.pieces[shard.piece]
    layout = stored_layout(piece.layout)
    if isinstance(layout, Strided):
        return {layout.file}
    if isinstance(layout, Stitched):
        # more than the shard reads, perhaps: that costs nothing but a chance
        tables = [inner for inner in layouts(piece) if isinstance(inner, Runs | Chunks)]
        return {int(k) for inner in tables for k in np.unique(inner.file)}
    if isinstance(layout, Runs):
        stops = np.cumsum(layout.frames)
        first, last = shard.first * cut[0], min(shard.last * cut[0], piece.frames)
        run, end = np.searchsorted(stops, first, "right"), np.searchsorted(stops, last, "left")
        return set(layout.file[run : end + 1].tolist())
    if isinstance(layout, Chunks):
        grid = [-(-n // c) for n, c in zip((*piece.nav, *source.frame_shape), layout.shape, strict=True)]
        numbers = np.arange(layout.file.size).reshape(grid)
        found: set[int] = set()
        for box in tiles.boxes(piece, cut, shard):
            some = tuple(slice(s.start // c, -(-s.stop // c)) for s, c in zip(box, layout.shape, strict=False))
            chosen = numbers[some].reshape(-1)
            found |= set(layout.file[chosen[layout.length[chosen] > 0]].tolist())
        return found
    return set()
