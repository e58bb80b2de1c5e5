"""Virtual HDF5 datasets: which file holds which part of which frame, and which frames can't be had.

A fill value is no data. A frame is whole where it is mapped as far as any frame is, and all its sources are there.
Pixels that no frame maps (gaps between the modules of a camera) are the file's own statement: they have its fill value.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.errors import GpuemError, InputError, TruncatedError
from gpuem.formats.hdf5_file import Files, located, opened, pixel_type
from gpuem.formats.hdf5_selection import Mapping, Selection, mappings, promised_shape, selection
from gpuem.formats.remote import Place
from gpuem.formats.source import Part, Piece, Stitched
from gpuem.formats.stitch import cut, merged, stitched, taken, written

# tables of where every frame of every module lies are made for so many of them
_MOST_ENTRIES = 1 << 28
# more pieces than that are slower to read than a table with an entry for every frame
_MOST_PIECES = 1 << 12
Describe = Callable[..., list[Piece]]
Find = Callable[[Any, str], Place]


@dataclass
class _Stock:
    """Datasets that are mapped, each described once: their pieces, by number."""

    pieces: list[Piece] = field(default_factory=list)
    shapes: list[tuple[int, int]] = field(default_factory=list)
    known: dict[tuple[Place, str], _Known | str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Known:
    """A mapped dataset: for every frame the piece it lies in (-1: none), which frame of that, and if it was written."""

    shape: tuple[int, ...]
    piece: NDArray[np.int64]
    local: NDArray[np.int64]
    held: NDArray[np.bool_]
    exact: bool
    path: Place


@dataclass
class _Box:
    """A box of the frame, and for every frame the piece it comes from (-1: none), and which frame of that."""

    piece: NDArray[np.int64]
    local: NDArray[np.int64]
    inside: NDArray[np.int64]


def read(dset: Any, files: Files, *, fit: bool, describe: Describe, beside: Find) -> tuple[list[Piece] | None, Any]:
    """Pieces of a virtual dataset, and which of its frames can't be had.

    Returns
    -------
    list of Piece or None
        None where it is to be read through HDF5.
    (frames,) bool
        Which frames can't be had.

    Raises
    ------
    InputError, TruncatedError
        A source is missing, renamed or too short, and `fit` isn't set.
    """
    me = (located(dset.file), dset.name)
    if me in files.virtual:
        raise InputError(f"{me[0]}: the virtual dataset {dset.name} takes its frames from itself")
    shape = promised_shape(dset)
    frames = math.prod(shape[:-2])
    files.index(me[0])
    files.virtual.append(me)
    try:
        build = _Build(dset, shape, files, fit, describe, beside)
        for mapping in mappings(dset, shape):
            build.add(mapping)
        build.judge()
        pieces = build.pieces() if not build.odd else None
    finally:
        files.virtual.remove(me)
    if pieces is None and shape != dset.shape:
        # HDF5 ends the dataset where the first source is missing
        row = math.prod(shape[1:-2])
        beyond = np.arange(frames) >= dset.shape[0] * row
        if (beyond & ~build.lost).any():
            files.note(f"{dset.name}: HDF5 itself reads only {dset.shape[0] * row} of its {frames} frames")
        build.lost |= beyond
    return pieces, build.lost | build.unwritten


def _as_many(chosen: Selection | None, target: Selection) -> Selection | None:
    """The frames of a source, as many as are mapped: those that it lacks are beyond it."""
    if chosen is None or (chosen.rows.size, chosen.columns.size) != (target.rows.size, target.columns.size):
        return chosen
    lacking = target.frames.size - chosen.frames.size
    return replace(chosen, frames=np.pad(chosen.frames, (0, lacking), constant_values=-1)) if lacking > 0 else chosen


class _Build:
    """What is known of a virtual dataset while its mappings are followed."""

    def __init__(
        self, dset: Any, shape: tuple[int, ...], files: Files, fit: bool, describe: Describe, beside: Find
    ) -> None:
        self.dset, self.shape, self.files, self.fit = dset, shape, files, fit
        self.describe, self.beside = describe, beside
        self.where, self.frame = located(dset.file), (int(shape[-2]), int(shape[-1]))
        self.stored = pixel_type(dset)[0].newbyteorder("=")
        self.count = math.prod(shape[:-2])
        # frames that lie in no file; and those that have a place there in which nothing was ever written
        self.lost, self.unwritten = np.zeros(self.count, np.bool_), np.zeros(self.count, np.bool_)
        self.odd = ""
        self.stock = _Stock()
        self.boxes: dict[tuple[int, int, int, int], _Box] = {}
        self.regions: dict[tuple[bytes, bytes], tuple[NDArray[np.bool_], Selection]] = {}

    def add(self, mapping: Mapping) -> None:
        """Follow one mapping."""
        for part in mapping.target:
            self._cover(part)
        source = self._source(mapping)
        target = mapping.target[0] if mapping.target else None
        if target is None or not target.frames.size:
            return
        chosen = None
        if isinstance(source, _Known):
            elements = target.frames.size * target.rows.size * target.columns.size
            chosen = selection(mapping.space, source.shape, elements) if mapping.regular else None
            chosen = _as_many(chosen, target)
        if isinstance(source, str) or chosen is None or chosen.frames.size != target.frames.size:
            self._irregular(mapping, source)
            return
        assert isinstance(source, _Known)
        self._short(mapping, source, chosen)
        there = chosen.frames >= 0
        piece = np.where(there, source.piece[chosen.frames], -1)
        local = np.where(there, source.local[chosen.frames], -1)
        self.lost[target.frames[piece < 0]] = True
        self.unwritten[target.frames[~np.where(there, source.held[chosen.frames], False)]] = True
        box, inside = target.box, chosen.box
        if box is None or inside is None or box[2:] != inside[2:] or not source.exact:
            self.odd = self.odd or "it doesn't map boxes of frames to boxes of frames of a type that fits"
            return
        self._put(box, target.frames, piece, local, inside)

    def _put(self, box: Any, frames: Any, piece: Any, local: Any, inside: Any) -> None:
        if box not in self.boxes:
            if (len(self.boxes) + 1) * self.count > _MOST_ENTRIES:
                self.odd = "too many modules for so many frames"
                return
            none = np.full(self.count, -1, np.int64)
            self.boxes[box] = _Box(none, none.copy(), np.zeros((self.count, 2), np.int32))
        into = self.boxes[box]
        into.piece[frames], into.local[frames], into.inside[frames] = piece, local, inside[:2]

    def _cover(self, target: Selection) -> None:
        """Note that rows and columns of frames are mapped; twice is for HDF5 to understand."""
        key = (target.rows.tobytes(), target.columns.tobytes())
        if key not in self.regions:
            if (len(self.regions) + 1) * self.count > _MOST_ENTRIES:
                raise InputError(f"{self.where}: {self.dset.name} is mapped in more than {len(self.regions)} parts")
            self.regions[key] = (np.zeros(self.count, np.bool_), target)
        mapped = self.regions[key][0]
        if mapped[target.frames].any():
            self.odd = self.odd or "parts of it are mapped twice"
        mapped[target.frames] = True

    def _source(self, mapping: Mapping) -> _Known | str:
        """The dataset that a mapping names, or why it can't be had."""
        path = self.where if mapping.file == "." else self.beside(self.dset, mapping.file)
        key = (path, mapping.dataset)
        if key not in self.stock.known:
            self.stock.known[key] = self._opened(path, mapping.dataset)
        found = self.stock.known[key]
        if isinstance(found, str):
            frames = {int(k) for target in mapping.target for k in target.frames}
            message = f"{self.where}: {self.dset.name} takes {len(frames)} frames from {found}"
            if not self.fit:
                raise InputError(f"{message}; set fit = true to go on without them")
            self.files.note(message)
        return found

    def _opened(self, path: Place, name: str) -> _Known | str:
        if not path.is_file():
            return f"{path}, which is missing"
        self.files.index(path)
        try:
            with opened(path, self.files) as file:
                source = file.get(name)
                if source is None or not hasattr(source, "dtype"):
                    return f"{path}, which has no dataset {name}"
                return self._known(source, path)
        except TruncatedError:
            raise
        except GpuemError as error:
            if not self.fit:
                raise
            return f"{path}, which can't be used: {error}"

    def _known(self, source: Any, path: Place) -> _Known:
        shape = promised_shape(source)
        if len(shape) < 2 or math.prod(shape) == 0:
            none = np.zeros(0, np.int64)
            return _Known(shape, none, none, none > 0, False, path)
        count = math.prod(shape[:-2])
        which, local, held = np.full(count, -1, np.int64), np.zeros(count, np.int64), np.zeros(count, np.bool_)
        frame = (int(shape[-2]), int(shape[-1]))
        for piece in self.describe(source, self.files, fit=self.fit):
            there = written(piece, frame)
            own = slice(piece.start, piece.start + piece.frames)
            which[own], held[own] = len(self.stock.pieces), True if there is None else there
            local[own] = np.arange(piece.frames)
            self.stock.pieces.append(piece)
            self.stock.shapes.append(frame)
        exact = bool(np.can_cast(pixel_type(source)[0], self.stored, "safe"))
        return _Known(shape, which, local, held, exact, path)

    def _irregular(self, mapping: Mapping, source: _Known | str) -> None:
        """What HDF5 alone can follow: all of its frames hang on all of the source's."""
        if isinstance(source, _Known):
            self.odd = self.odd or "it doesn't map frames to frames"
            if source.held.size and source.held.all():
                return
        for target in mapping.target:
            self.lost[target.frames] = True

    def _short(self, mapping: Mapping, source: _Known, chosen: Selection) -> None:
        beyond = int((chosen.frames < 0).sum())
        if beyond:
            whole = chosen.frames.size - beyond
            message = (
                f"{source.path}: {mapping.dataset} {source.shape} holds {whole} of the {chosen.frames.size} frames "
                f"that {self.dset.name} of {self.where} takes from it"
            )
            if not self.fit:
                raise TruncatedError(f"{message}; set fit = true to go on with them", whole)
            self.files.note(message)

    def judge(self) -> None:
        """Find frames that are mapped in part, or not at all, and parts of the frame that none maps."""
        if not self.regions:
            self.lost[:] = True
            self.files.note(f"{self.dset.name}: none of its {self.count} frames is mapped to a file")
            return
        name, size = self.dset.name, math.prod(self.frame)
        ever = np.zeros(self.frame, np.bool_)
        images = []
        for _, target in self.regions.values():
            image = np.zeros(self.frame, np.bool_)
            image[np.ix_(target.rows, target.columns)] = True
            images.append(image)
            ever |= image
        # a number for every set of regions that frames have
        code = np.zeros(self.count, np.int64)
        for k, (mapped, _) in enumerate(self.regions.values()):
            code = 2 * (np.unique(code, return_inverse=True)[1] if k % 32 == 31 else code) + mapped
        _, examples, which = np.unique(code, return_index=True, return_inverse=True)
        patterns = [[bool(mapped[example]) for mapped, _ in self.regions.values()] for example in examples]
        partly, nowhere = 0, 0
        for k, pattern in enumerate(patterns):
            mine = which.reshape(-1) == k
            sums = np.zeros(self.frame, np.int64)
            for image in itertools.compress(images, pattern):
                sums += image
            if np.max(sums) > 1:
                self.odd = self.odd or "parts of it are mapped twice"
            if not any(pattern):
                nowhere += int(mine.sum())
            elif not np.array_equal(sums > 0, ever):
                partly += int(mine.sum())
            if not any(pattern) or not np.array_equal(sums > 0, ever):
                self.lost |= mine
        if nowhere:
            self.files.note(f"{name}: {nowhere} of its frames are mapped to no file")
        if partly:
            self.files.note(f"{name}: {partly} of its frames are mapped to files only in part, and left out")
        if ever.any() and not ever.all():
            self.files.note(
                f"{name}: {size - int(ever.sum())} of the {size} pixels of every frame are mapped to no file; "
                f"they have the dataset's fill value, {self.fill}"
            )

    @property
    def fill(self) -> float:
        """What the file says that pixels have which are stored nowhere."""
        return float(self.stored.type(self.dset.fillvalue)) if self.stored.kind == "f" else int(self.dset.fillvalue)

    def pieces(self) -> list[Piece] | None:
        """The frames as byte extents: ranges of frames where these follow one another, else a table of them."""
        none = self.lost.copy()
        change = np.zeros(max(self.count - 1, 0), np.bool_) | (none[1:] != none[:-1])
        for box in self.boxes.values():
            moved = (box.piece[1:] != box.piece[:-1]) | (box.inside[1:] != box.inside[:-1]).any(axis=1)
            change |= ~none[1:] & (moved | ((box.local[1:] != box.local[:-1] + 1) & (box.piece[1:] >= 0)))
        edges = [0, *(np.flatnonzero(change) + 1).tolist(), self.count]
        # frames in an order of their own
        if len(edges) > min(_MOST_PIECES, 16 + 4 * len(self.stock.pieces)):
            return self._table()
        found = []
        for first, stop in itertools.pairwise(edges):
            if not none[first]:
                piece = self._range(first, stop - first)
                if piece is None:
                    return None
                found.append(piece)
        return found

    def _range(self, first: int, frames: int) -> Piece | None:
        """Frames whose parts follow one another in their sources, as one piece."""
        made: list[Stitched] = []
        for (y, x, rows, columns), box in self.boxes.items():
            if box.piece[first] < 0:
                continue
            piece, shape = self.stock.pieces[box.piece[first]], self.stock.shapes[box.piece[first]]
            local, inside = int(box.local[first]), (int(box.inside[first, 0]), int(box.inside[first, 1]))
            if (rows, columns) == self.frame == shape and (y, x) == (0, 0) == inside:
                part = cut(replace(piece, start=0), local, local + frames)
                if part is not None:
                    return replace(part, start=first)
            wanted = Part(piece, shape, 0, inside, (rows, columns), (y, x))
            one = taken(piece, shape, local, frames, wanted)
            if one.gaps and one.fill != self.fill:
                self.odd = "a source is stitched itself, with another fill value"
                return None
            made.append(one)
        return stitched(first, frames, made, self.frame, self.fill, self.stored)

    def _table(self) -> list[Piece] | None:
        """All frames as one piece, each part of which has an entry for every frame; None where chunks forbid it."""
        made = []
        for (y, x, rows, columns), box in self.boxes.items():
            used = np.flatnonzero(~self.lost & (box.piece >= 0))
            numbers = np.unique(box.piece[used]).tolist()
            shapes = {self.stock.shapes[k] for k in numbers}
            if len(shapes) != 1 or (box.inside[used] != box.inside[used[:1]]).any():
                return None
            shape, inside = shapes.pop(), (int(box.inside[used[0], 0]), int(box.inside[used[0], 1]))
            which = np.where(self.lost, -1, box.piece)
            piece = merged({k: self.stock.pieces[k] for k in numbers}, shape, which, box.local)
            if piece is None:
                return None
            made.append(taken(piece, shape, 0, self.count, Part(piece, shape, 0, inside, (rows, columns), (y, x))))
        made.append(Stitched((), missing=self.lost))
        piece = stitched(0, self.count, made, self.frame, self.fill, self.stored)
        return None if piece is None else [piece]
