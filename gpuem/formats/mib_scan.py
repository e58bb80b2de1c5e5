"""The scan of a Merlin acquisition: its shape as the .hdr gives it, and the frames of the flyback between its lines.

A trigger starts a line of 'Frames per Trigger' frames. Where that is more than ScanX, the detector went on recording
while the beam flew back to the start of the next line; those frames belong to no scan position. They follow the line,
unless the exposure times in the frames' headers show that they precede it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpuem.errors import InputError, TruncatedError
from gpuem.formats.mib_files import Frames, integer, read_exposure
from gpuem.formats.remote import Place

# lines in which exposure times are compared, and by which factor a flyback frame's differs at least
_LINES = 8
_RATIO = 1.25
_INCOMPLETE = "are files missing, was the acquisition stopped? Set fit = true to go on without the rest"


@dataclass(frozen=True)
class Lines:
    """How recorded frames make up the lines of a scan.

    Parameters
    ----------
    recorded : int
        Frames from the start of one line to the start of the next.
    first : int
        Flyback frames before the scan positions of a line.
    columns : int
        Scan positions of a line.
    """

    recorded: int
    first: int
    columns: int

    def positions(self, frames: int) -> int:
        """Number of scan positions among the first `frames` recorded frames."""
        lines, rest = divmod(frames, self.recorded)
        return lines * self.columns + min(max(rest - self.first, 0), self.columns)

    def runs(self, begin: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The scan positions among recorded frames ``[begin, begin + count)``, as one run per line.

        Returns
        -------
        position, offset, length : (n,) int64
            Flat scan position of a run's first frame, that frame's number counted from `begin`, frames in the run.
        """
        line = np.arange(begin // self.recorded, -(-(begin + count) // self.recorded), dtype=np.int64)
        start = line * self.recorded + self.first
        low, high = np.maximum(start, begin), np.minimum(start + self.columns, begin + count)
        used = high > low
        return (line * self.columns + low - start)[used], (low - begin)[used], (high - low)[used]


def find_scan(
    path: Place | None,
    fields: Mapping[str, str],
    files: Sequence[Frames],
    frames: int,
    scan: tuple[int, ...] | None,
    *,
    fit: bool,
) -> tuple[tuple[int, ...], Lines | None, list[str]]:
    """The scan that the .hdr promises, checked against the frames that are there.

    Parameters
    ----------
    path : Path or Url or None
        The .hdr, for messages.
    fields : mapping
        Its entries.
    files : sequence of Frames
        The files, in order.
    frames : int
        Recorded frames, holes of a series with cut files included.
    scan : tuple of int or None
        The scan that the user gives: one of as many positions as there are frames keeps the flyback.
    fit : bool
        Go on where frames are missing.

    Returns
    -------
    shape : tuple of int
        Shape of the scan; (frames,) where the .hdr doesn't say.
    lines : Lines or None
        Which frames are flyback, where any are.
    notes : list of str
        What to tell the user.

    Raises
    ------
    InputError
        The user's scan has neither the number of frames with the flyback nor that without it.
    TruncatedError
        The files hold fewer frames than the .hdr promises.
    """
    shape, skipped = _promised(fields, frames)
    if skipped:
        return _without_flyback(path, files, frames, (shape[0], shape[1]), skipped, scan, fit=fit)
    promised = math.prod(shape)
    if promised == frames or promised <= 0:
        return (shape if promised > 0 else (frames,)), None, []
    if promised < frames:
        return (frames,), None, [f"{path}: promises {promised} frames {shape}, the files hold {frames}: give the scan"]
    whole = sum(f.whole for f in files)
    message = f"{path}: promises {promised} frames {shape}, the files hold {whole} whole ones"
    if not fit:
        raise TruncatedError(f"{message}; {_INCOMPLETE}", whole)
    return shape, None, [message]


def _promised(fields: Mapping[str, str], frames: int) -> tuple[tuple[int, ...], int]:
    """Shape of the scan as the .hdr gives it, (0,) where it doesn't; flyback frames of a line."""
    rows, columns = integer(fields, "ScanY"), integer(fields, "ScanX")
    total = integer(fields, "Frames in Acquisition (Number)") or 0
    line = integer(fields, "Frames per Trigger (Number)") or 0
    skip = integer(fields, "LineSkip") or 0
    if not (rows and columns):
        if not (1 < line < total and total % line == 0):
            return (total,), 0
        # without ScanX only LineSkip tells a line's positions from its flyback
        rows, columns = total // line, line - skip if skip < line else line
    # one trigger may also start a whole scan, and LineSkip may be a setting that was not used: the number of frames
    # tells; the last flyback may be missing
    for skipped in (line - columns, skip):
        recorded = rows * (columns + skipped)
        if skipped > 0 and recorded - skipped <= (total or frames) <= recorded:
            return (rows, columns), skipped
    return (rows, columns), 0


def _without_flyback(
    path: Place | None,
    files: Sequence[Frames],
    frames: int,
    shape: tuple[int, int],
    skipped: int,
    scan: tuple[int, ...] | None,
    *,
    fit: bool,
) -> tuple[tuple[int, ...], Lines | None, list[str]]:
    """The scan without its flyback frames, unless the user's scan has a position for each of them."""
    rows, columns = shape
    recorded = columns + skipped
    if frames < rows * recorded - skipped and not fit:
        raise TruncatedError(
            f"{path}: promises {rows} lines of {columns} positions and {skipped} flyback frames, {rows * recorded} "
            f"frames; the files hold {frames}; {_INCOMPLETE}",
            frames,
        )
    if scan is not None and (math.prod(scan) == frames or (fit and scan[-1] == recorded)):
        return (
            scan,
            None,
            [f"{path}: {skipped} of every {recorded} frames are flyback; kept, as scan {scan} wants them"],
        )
    if scan is not None and math.prod(scan) != rows * columns and not fit:
        raise InputError(
            f"{path}: {frames} frames, {rows * columns} of them scan positions {shape} and the others flyback "
            f"({skipped} of every {recorded}); scan {list(scan)} has {math.prod(scan)} positions. Give a scan of "
            f"{rows * columns} positions, of {frames} to keep the flyback, or none"
        )
    first = skipped if _flyback_precedes(files, recorded, skipped) else 0
    lines = Lines(recorded, first, columns)
    numbers = ", ".join(str(n) for n in range(0 if first else columns, recorded * 2, recorded))
    note = (
        f"{path}: lines of {recorded} frames for {columns} scan positions: {skipped} flyback "
        f"{'frame' if skipped == 1 else 'frames'} at the {'start' if first else 'end'} of each line left out "
        f"(from frames {numbers}, ...); the scan is {rows} x {columns}. scan = [{rows}, {recorded}] keeps them"
    )
    missing = rows * columns - lines.positions(frames)
    more = [f"{path}: the files end early: {missing} of {rows * columns} scan positions have no frame"]
    return scan or shape, lines, [note, *(more if missing > 0 else [])]


def _flyback_precedes(files: Sequence[Frames], recorded: int, skipped: int) -> bool:
    """Whether exposure times say that a line's first frames are its flyback; False where they don't tell."""
    first = files[0]
    lines = min(_LINES, first.whole // recorded)
    times = np.array(
        [[read_exposure(first, line * recorded + k) or np.nan for k in range(recorded)] for line in range(lines)]
    )
    if lines == 0 or recorded < 2 * skipped + 1 or np.isnan(times).any():
        return False
    body = np.median(times[:, skipped : recorded - skipped], axis=1)[:, None]
    start, end = times[:, :skipped] / body, times[:, recorded - skipped :] / body
    return bool(_differs(start).all() and not _differs(end).any())


def _differs(ratio: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.asarray((ratio > _RATIO) | (ratio < 1 / _RATIO))
