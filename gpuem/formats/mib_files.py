"""Merlin files one by one: a frame's header, what it says of the image, and which numbered files belong together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from gpuem.errors import InputError
from gpuem.formats.remote import Place, Url, beside
from gpuem.formats.source import File, Step

# a Medipix chip is 256 pixels wide, whatever part of its rows is read
CHIP = 256
_STORED = {"U08": "u1", "U16": ">u2", "U32": ">u4"}
_UNPACKED = {1: "u1", 6: "u1", 12: "u2", 24: "u4"}
# nobody writes longer ones; keeps an alien file from being read whole
_LONGEST_HEADER = 1 << 20
_NUMBERED = re.compile(r"(?P<name>.*?)(?P<digits>[0-9]+)")


@dataclass(frozen=True)
class Header:
    """A frame's header; `depth`, `exposure` (s) and `thresholds` (keV) are absent in files of older software."""

    sequence: int
    size: int
    chips: int
    width: int
    height: int
    kind: str
    layout: str
    depth: int | None
    timestamp: str
    exposure: float | None
    thresholds: tuple[float, ...]

    @property
    def alike(self) -> tuple[Any, ...]:
        """What all files of one acquisition have in common."""
        return self.size, self.chips, self.width, self.height, self.kind, self.layout, self.depth


@dataclass(frozen=True)
class Image:
    """The image of all chips: shape (y, x), bytes as stored, pixel type once unpacked, codec, what to tell the user."""

    shape: tuple[int, int]
    frame_bytes: int
    stored: np.dtype[Any]
    codec: tuple[Step, ...]
    depth: int | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Frames:
    """A file: its first header, its image, its whole frames, the bytes of a cut one, the last frame's number."""

    file: File
    header: Header
    image: Image
    whole: int
    rest: int
    last: int | None

    @property
    def stride(self) -> int:
        """Bytes from one frame to the next, header included."""
        return self.header.size + self.image.frame_bytes

    @property
    def end(self) -> int:
        """Sequence number that the frame after the last one should have."""
        return self.header.sequence + self.whole

    def goes_on_in(self, other: Frames) -> bool:
        """Whether `other` is the next file of the same acquisition; a cut file may have lost frames in between."""
        follows = other.header.sequence > self.end if self.rest else other.header.sequence == self.end
        return follows and self.header.alike == other.header.alike


def integer(fields: Mapping[str, str], key: str) -> int | None:
    """A whole number of the .hdr, None where it isn't there or isn't one."""
    text = fields.get(key, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None


def parse_hdr(path: Place) -> dict[str, str]:
    """Keys and values of an acquisition's .hdr; raises InputError where it isn't Merlin's."""
    try:
        with path.open("rb") as stream:
            text = stream.read(_LONGEST_HEADER).decode("utf-8", "replace")
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from error
    if not text.startswith("HDR"):
        raise InputError(f"{path}: not a Merlin header; it should begin with HDR and begins with {text[:8]!r}")
    pairs = (line.partition("\t") for line in text.splitlines()[1:])
    return {key.strip().removesuffix(":"): value.strip() for key, tab, value in pairs if tab}


def hdr_beside(mib: Place) -> Place | None:
    """The .hdr of a .mib file: of the same name, or of a series' name without its number."""
    numbered = _NUMBERED.fullmatch(mib.stem)
    stems = [mib.stem, *([numbered["name"], numbered["name"].rstrip("_-. ")] if numbered else [])]
    candidates = (mib.with_name(stem + suffix) for stem in stems if stem for suffix in (".hdr", ".HDR"))
    return next((path for path in candidates if path.is_file()), None)


def mib_beside(hdr: Place) -> Place:
    """The .mib file of a .hdr: of the same name, or the first of the series of that name."""
    for suffix in (".mib", ".MIB"):
        if (path := hdr.with_suffix(suffix)).is_file():
            return path
    series = [
        (int(match["digits"]), len(path.name), path.name, path)
        for path in beside(hdr)
        if path.suffix.lower() == ".mib"
        and (match := _NUMBERED.fullmatch(path.stem))
        and match["name"].rstrip("_-. ") == hdr.stem.rstrip("_-. ")
    ]
    if not series:
        raise InputError(f"{hdr}: no {hdr.stem}.mib and no {hdr.stem}_000001.mib beside it; give the .mib file")
    return min(series)[-1]


def listed(paths: tuple[Place, ...], depth: int | None) -> list[Frames]:
    """The files as given; raises InputError unless they are of one kind."""
    files = [read_file(path, depth) for path in paths]
    for f in files[1:]:
        if f.header.alike != files[0].header.alike:
            a, b = files[0].header, f.header
            raise InputError(
                f"{f.file.path}: {b.width}x{b.height} {b.kind} {b.layout}, counter depth {b.depth}, but "
                f"{files[0].file.path} has {a.width}x{a.height} {a.kind} {a.layout}, {a.depth}; open them one by one"
            )
    return files


def around(path: Place, depth: int | None) -> tuple[list[Frames], list[str]]:
    """The file and those before and after it in its series: numbered on, alike, sequence numbers without a gap.

    Many files end in a number without being a series; the frames' own numbers tell. What is named alike but left out is
    told in a note.
    """
    files = [read_file(path, depth)]
    numbered = _NUMBERED.fullmatch(path.stem)
    if not numbered:
        return files, []
    named = _named_alike(path, numbered["name"], numbered["digits"])
    if not named and isinstance(path, Url):
        return files, [f"{path}: its server doesn't list its files; give all paths if it is one of a series"]
    number = int(numbered["digits"])
    used = {number}
    for step in (1, -1):
        k = number + step
        while k in named:
            try:
                found = read_file(named[k], depth)
            except InputError:
                break
            if not (files[-1].goes_on_in(found) if step > 0 else found.goes_on_in(files[0])):
                break
            files.insert(len(files) if step > 0 else 0, found)
            used.add(k)
            k += step
    left = sorted(set(named) - used)
    if not left:
        return files, []
    return files, [
        f"{len(left)} files named alike don't continue {path.name} by their numbers and are not read "
        f"({named[left[0]].name}{', ...' if len(left) > 1 else ''}); give all paths to read them as one"
    ]


def _named_alike(path: Place, name: str, digits: str) -> dict[int, Place]:
    """Files beside `path` whose names differ in the last number only, by that number."""
    found: dict[int, Place] = {}
    for other in sorted(beside(path), key=lambda p: len(p.stem) != len(path.stem)):
        match = _NUMBERED.fullmatch(other.stem)
        if not match or match["name"] != name or other.suffix != path.suffix:
            continue
        # 7 and 007 are names of different series
        padded = "0" in (digits[0], match["digits"][0])
        if len(match["digits"]) == len(digits) or not padded:
            found.setdefault(int(match["digits"]), other)
    return found


def read_file(path: Place, depth: int | None = None) -> Frames:
    """Read a file's first header and count its frames.

    Parameters
    ----------
    path : Path or Url
        The .mib file.
    depth : int or None
        Counter depth from the .hdr, for raw files of older software whose frames don't say it.

    Raises
    ------
    InputError
        The file is missing, empty or alien, or its second or last frame isn't where the first header puts it.
    """
    try:
        file = File.of(path)
        with path.open("rb") as stream:
            header = _parse(path, stream)
            image = _image(path, header, header.depth or depth)
            stride = header.size + image.frame_bytes
            whole, rest = divmod(file.size, stride)
            last = None
            for k in {1, whole - 1} - {0, -1}:
                stream.seek(k * stride)
                begin = stream.read(64).split(b",")
                if begin[0] != b"MQ1" and len(begin[0]) > 3:
                    raise InputError(
                        f"{path}: the header says {header.width}x{header.height} {header.kind}, so frame {k} should "
                        f"begin at byte {k * stride} of {file.size}, and doesn't; the file is damaged or was edited"
                    )
                if k == whole - 1 and begin[1].isdigit():
                    last = int(begin[1])
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from error
    return Frames(file, header, image, whole, rest, last)


def read_exposure(frames: Frames, k: int) -> float | None:
    """Exposure time of frame `k` of a file in s, as its header says; None where it doesn't."""
    with frames.file.path.open("rb") as stream:
        stream.seek(k * frames.stride)
        fields = stream.read(min(frames.header.size, 256)).split(b"\0")[0].decode("latin-1").split(",")
    exposure = _numbers(fields[10:11])
    return exposure[0] if exposure else None


def _parse(path: Place, stream: BinaryIO) -> Header:
    """The first frame's header, at the beginning of `stream`."""
    begin = stream.read(64)
    if not begin.startswith(b"MQ1,"):
        what = "is empty" if not begin else f"begins with {begin[:8]!r}"
        raise InputError(f"{path}: not a Merlin file; a frame begins with MQ1, this file {what}")
    try:
        sequence, size = (int(text) for text in begin.split(b",")[1:3])
        if not 64 <= size <= _LONGEST_HEADER or sequence < 0:
            raise ValueError(f"frame {sequence} with a header of {size} bytes")
        text = (begin + stream.read(size - 64))[:size].decode("latin-1").split("\0")[0]
        fields = [field.strip() for field in text.split(",")]
        chips, width, height = (int(field) for field in fields[3:6])
        if not (0 < chips <= 64 and 0 < width <= 1 << 15 and 0 < height <= 1 << 15):
            raise ValueError(f"{chips} chips, {width}x{height} pixels")
        extension = fields.index("MQ1A") if "MQ1A" in fields else None
        # MQ1A, time in UTC, exposure in ns, counter depth
        depth = int(fields[extension + 3]) if extension is not None else None
        timestamp = fields[extension + 1] if extension is not None else fields[9]
        kind, layout = fields[6].upper(), fields[7]
    except (ValueError, IndexError) as error:
        raise InputError(f"{path}: its first frame's header is damaged ({error})") from error
    exposure = _numbers(fields[10:11])
    return Header(
        sequence, size, chips, width, height, kind, layout, depth, timestamp,
        exposure[0] if exposure else None, _numbers(fields[14:22]),
    )  # fmt: skip


def _numbers(fields: list[str]) -> tuple[float, ...]:
    """The fields as numbers; empty where one isn't."""
    try:
        return tuple(float(field) for field in fields)
    except ValueError:
        return ()


def _arrangement(header: Header) -> tuple[int, int]:
    """Chips from top to bottom and from left to right; (0, 0) where the layout isn't understood."""
    # a chip alone may be read out of a larger assembly
    if header.chips == 1:
        return 1, 1
    # G stands for gaps between chips, which raw frames don't have
    match = re.fullmatch(r"([0-9]{1,2})x([0-9]{1,2})G?", header.layout)
    return (int(match[2]), int(match[1])) if match else (0, 0)


def _image(path: Place, header: Header, depth: int | None) -> Image:
    """What the header says of the image."""
    if header.kind in _STORED:
        stored = np.dtype(_STORED[header.kind])
        shape = (header.height, header.width)
        return Image(shape, header.height * header.width * stored.itemsize, stored, (), depth)
    if header.kind != "R64":
        raise InputError(f"{path}: data of type {header.kind!r}; gpuem reads {', '.join(_STORED)} and R64")
    if depth not in _UNPACKED:
        raise InputError(
            f"{path}: raw data (R64) of counter depth {depth}; known: 1, 6, 12, 24. A .hdr beside it may say"
        )
    chips_y, chips_x = _arrangement(header)
    # 24 bits come as two frames of 12, side by side in the header's width
    widths = (CHIP * header.chips, CHIP * header.chips * 2) if depth == 24 else (CHIP * header.chips,)
    if chips_x * chips_y != header.chips or chips_y not in (1, 2) or header.width not in widths:
        raise InputError(
            f"{path}: raw data of {header.chips} chips, layout {header.layout}, {header.width} pixels wide; gpuem "
            f"knows 1x1, 2x2 and Nx1 with all chips read, {CHIP} pixels each; record without raw mode"
        )
    notes = []
    if chips_x * chips_y > 1 and (depth == 24 or (chips_y, chips_x) != (2, 2)):
        notes.append(f"raw {depth}-bit frames of layout {header.layout}: the arrangement of the chips is not confirmed")
    frame_bytes = header.height * CHIP * header.chips * {1: 1, 6: 8, 12: 16, 24: 32}[depth] // 8
    shape = (header.height * chips_y, CHIP * chips_x)
    codec = (Step("merlin", (depth, chips_y, chips_x)),)
    return Image(shape, frame_bytes, np.dtype(_UNPACKED[depth]), codec, depth, tuple(notes))
