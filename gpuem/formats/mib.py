"""Quantum Detectors Merlin (.mib, .hdr): Medipix frames, each behind a header of its own, in one file or a series.

The header is text: ``MQ1,sequence number,header bytes,chips,width,height,type,layout,chip select,time,exposure,...``.
Pixels are big-endian (U08, U16, U32) or as the readout sent them (R64, see `gpuem.codecs.merlin`). Rows are in file
order, which is the detector's: a hot pixel that the vendor names x, y lies at [y, x].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuem.errors import InputError, TruncatedError
from gpuem.formats import mib_files
from gpuem.formats.mib_files import Frames, integer, parse_hdr
from gpuem.formats.mib_scan import Lines, find_scan
from gpuem.formats.remote import Place
from gpuem.formats.source import Piece, Runs, Source


@dataclass(frozen=True)
class _Hdr:
    """The acquisition's .hdr file: its path, and whether the user named it."""

    path: Place | None
    named: bool
    fields: Mapping[str, str]


def read_header(paths: tuple[Place, ...], *, scan: tuple[int, ...] | None = None, fit: bool = False) -> Source:
    """Describe Merlin frames.

    Parameters
    ----------
    paths : tuple of Path or Url
        A .mib file or its .hdr: the numbered files of the same acquisition are found. Several .mib files are taken as
        they are, in their order; a .hdr may stand among them.
    scan : tuple of int
        Scan shape, where the .hdr doesn't say; with a position for every frame, flyback frames are kept.
    fit : bool
        Go on with the whole frames of an acquisition that ends early; the rest of what the .hdr promises is missing.

    Returns
    -------
    Source
        `frame_shape` is the image of all chips (y, x). `scan_shape` comes from the .hdr: ScanY and ScanX, or lines of
        'Frames per Trigger'; (frames,) where it doesn't say. Where a line has more frames than ScanX, the frames of
        the flyback are left out, and a note says which (see `gpuem.formats.mib_scan`).

    Raises
    ------
    InputError
        A file is missing, empty or alien; header and size disagree; files of several kinds are given together.
    TruncatedError
        A file ends within a frame, or the files hold fewer frames than the .hdr promises.
    """
    hdr, mibs = _find(paths)
    depth = integer(hdr.fields, "Counter Depth (number)")
    series = len(mibs) == 1
    files, notes = mib_files.around(mibs[0], depth) if series else (mib_files.listed(mibs, depth), [])
    first = files[0]
    if first.header.depth is not None and depth not in (None, first.header.depth):
        message = f"{hdr.path}: counter depth {depth}, but {first.file.path} has {first.header.depth}"
        if hdr.named:
            raise InputError(f"{message}; is it the .hdr of another acquisition?")
        hdr, notes = _Hdr(None, False, {}), [*notes, f"{message}: not used"]
    notes += _check_ends(files, fit)
    if sum(f.whole for f in files) == 0:
        raise InputError(f"{first.file.path}: {first.file.size} bytes, not one whole frame of {first.stride} bytes")
    starts, frames = _starts(files, series)
    scan_shape, lines, more = find_scan(hdr.path, hdr.fields, files, frames, scan, fit=fit)
    pieces = _pieces(files, starts, lines)
    frames = frames if lines is None else lines.positions(frames)
    image = first.image
    notes += [*image.notes, *more]
    return Source(
        "mib",
        tuple(f.file for f in files),
        pieces,
        max(frames, math.prod(scan_shape)),
        image.shape,
        image.stored.newbyteorder("="),
        scan_shape,
        metadata=_metadata(first, hdr.fields),
        notes=tuple(notes),
    )


def _find(paths: tuple[Place, ...]) -> tuple[_Hdr, tuple[Place, ...]]:
    """The acquisition's .hdr, where there is one, and the .mib files to begin with."""
    named = [p for p in paths if p.suffix.lower() == ".hdr"]
    mibs = tuple(p for p in paths if p.suffix.lower() != ".hdr")
    if len(named) > 1:
        raise InputError(f"{named[1]}: a second .hdr beside {named[0]}; open one acquisition at a time")
    if not named:
        path = mib_files.hdr_beside(mibs[0])
        try:
            return _Hdr(path, False, parse_hdr(path) if path else {}), mibs
        except InputError:
            # ENVI and others write .hdr files too
            return _Hdr(None, False, {}), mibs
    hdr = _Hdr(named[0], True, parse_hdr(named[0]))
    return hdr, mibs or (mib_files.mib_beside(named[0]),)


def _check_ends(files: list[Frames], fit: bool) -> list[str]:
    """Say of every file that ends within a frame; raise TruncatedError unless `fit`."""
    notes = []
    for f in files:
        if f.rest:
            message = (
                f"{f.file.path}: {f.file.size} bytes hold {f.whole} whole frames of {f.stride} bytes "
                f"({f.header.width}x{f.header.height} {f.header.kind}) and {f.rest} bytes more"
            )
            if not fit:
                whole = sum(g.whole for g in files)
                raise TruncatedError(f"{message}; the file is cut short: copy it again, or set fit = true", whole)
            notes.append(message)
        elif f.last is not None and f.last != f.end - 1:
            notes.append(
                f"{f.file.path}: its last frame is number {f.last}, not {f.end - 1}: frames were lost while it was "
                "recorded, and positions after them are shifted"
            )
    return notes


def _starts(files: list[Frames], series: bool) -> tuple[list[int], int]:
    """Number of each file's first frame, and frames in all; in a series, a cut file leaves a hole behind it."""
    starts, start = [], 0
    for k, f in enumerate(files):
        start += f.header.sequence - files[k - 1].end if series and k else 0
        starts.append(start)
        start += f.whole
    return starts, start


def _pieces(files: list[Frames], starts: list[int], lines: Lines | None) -> tuple[Piece, ...]:
    """Frames of scan positions in file order: runs, and a new piece where positions have no frame."""
    image = files[0].image
    runs = []
    for k, (f, start) in enumerate(zip(files, starts, strict=True)):
        if lines is None:
            position, first, length = (np.array([value], np.int64) for value in (start, 0, f.whole))
        else:
            position, first, length = lines.runs(start, f.whole)
        used = length > 0
        position, first, length = position[used], first[used], length[used]
        file, stride = np.full(length.size, k, np.int64), np.full(length.size, f.stride, np.int64)
        runs.append(np.array([position, length, file, f.header.size + first * f.stride, stride]))
    position, length, file, offset, stride = np.concatenate(runs, axis=1)
    holes = np.flatnonzero(position[1:] != position[:-1] + length[:-1]) + 1
    pieces = []
    for own in np.split(np.arange(position.size), holes):
        if own.size:
            layout = Runs(file[own], offset[own], length[own], stride[own], image.frame_bytes)
            pieces.append(Piece(int(position[own[0]]), (int(length[own].sum()),), layout, image.stored, image.codec))
    return tuple(pieces)


_HDR_FIELDS = {
    "Chip ID": "chip_id",
    "Chip Type (Medipix 3.0, Medipix 3.1, Medipix 3RX)": "chip_type",
    "Chip Mode  (SPM, CSM, CM, CSCM)": "chip_mode",
    "Gain": "gain",
    "Active Counters": "active_counters",
    "Gap Fill Mode": "gap_fill",
    "Flat Field File": "flat_field",
    "Sensor Bias (V)": "sensor_bias",
    "Software Version": "software_version",
}


def _metadata(first: Frames, hdr: Mapping[str, str]) -> dict[str, Any]:
    """What the first frame's header and the .hdr say, as plain values."""
    header = first.header
    found: dict[str, Any] = {
        "data_type": header.kind,
        "counter_depth": header.depth or first.image.depth,
        "layout": header.layout,
        "chips": header.chips,
        "first_sequence_number": header.sequence,
        "timestamp": header.timestamp,
        "exposure_s": header.exposure,
        "thresholds_keV": list(header.thresholds),
    }
    found |= {name: hdr[key] for key, name in _HDR_FIELDS.items() if hdr.get(key)}
    return {key: value for key, value in found.items() if value not in (None, "", [])}
