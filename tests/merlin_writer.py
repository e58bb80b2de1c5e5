"""A naive writer of Merlin files: slow, pixel by pixel, the layout as the vendor describes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

PIXELS_PER_WORD = {1: 64, 6: 8, 12: 4}
KINDS = {"U08": ">u1", "U16": ">u2", "U32": ">u4"}


def raw_frame(image: np.ndarray, bits: int, chips_y: int, chips_x: int) -> bytes:
    """One raw frame: rows of all chips side by side, the last chip first, words with their pixels in reverse order."""
    if bits == 24:
        upper, lower = image >> 12, image & 0xFFF
        return raw_frame(upper, 12, chips_y, chips_x) + raw_frame(lower, 12, chips_y, chips_x)
    rows, columns = image.shape[0] // chips_y, image.shape[1] // chips_x
    chips = []
    for y in range(chips_y):
        for x in range(chips_x):
            chip = image[y * rows : (y + 1) * rows, x * columns : (x + 1) * columns]
            if y == 1:
                chip = np.rot90(chip, 2)
            chips.append(chip)
    per_word = PIXELS_PER_WORD[bits]
    stored = b""
    for row in range(rows):
        for chip in reversed(chips):
            for begin in range(0, columns, per_word):
                word = 0
                for k in range(per_word):
                    word |= int(chip[row, begin + k]) << (k * 64 // per_word)
                stored += word.to_bytes(8, "big")
    return stored


def frame_header(
    sequence: int, kind: str, bits: int, shape: tuple[int, int], chips: tuple[int, int], *, old: bool = False
) -> bytes:
    """A frame's header; `old` leaves out what newer software appends, the counter depth among it."""
    count = chips[0] * chips[1]
    width, height = shape[1], shape[0]
    if kind == "R64":
        width, height = 256 * count * (2 if bits == 24 else 1), shape[0] // chips[0]
    size = 384 if count == 1 else 768 if count == 4 else 1024
    dacs = ["3RX", *["511"] * 27]
    fields = ["MQ1", f"{sequence:06d}", f"{size:05d}", f"{count:02d}", f"{width:04d}", f"{height:04d}", kind]
    fields += [f"{chips[1]}x{chips[0]}".rjust(6), f"{2**count - 1:02X}", "2021-04-15 14:44:17.125075", "0.001000"]
    fields += ["0", "0", "0", "2.000000E+0", "5.110000E+2", *["0.000000E+0"] * 6, *(dacs * min(count, 4))]
    if not old:
        fields += ["MQ1A", "2021-04-15T13:44:17.125075631Z", "1000000ns", str(bits)]
    return (",".join(fields) + ",").encode().ljust(size, b"\0")


def write_mib(
    path: Path,
    frames: np.ndarray,
    *,
    kind: str,
    bits: int,
    chips: tuple[int, int] = (1, 1),
    first: int = 1,
    old: bool = False,
) -> Path:
    """Write images (n, y, x), assembled from `chips` (y, x), with sequence numbers from `first`."""
    content = []
    for k, image in enumerate(frames):
        content.append(frame_header(first + k, kind, bits, image.shape, chips, old=old))
        content.append(raw_frame(image, bits, *chips) if kind == "R64" else image.astype(KINDS[kind]).tobytes())
    path.write_bytes(b"".join(content))
    return path


def write_hdr(path: Path, **fields: object) -> Path:
    """Write an acquisition's .hdr; a key's underscores stand for spaces."""
    lines = [f"{key.replace('_', ' ')}:\t{value}" for key, value in fields.items()]
    path.write_text("\n".join(["HDR,\t", "Chip ID:\tW556_B4, - , - , - ", *lines, "End\t   "]))
    return path


def scan_fields(frames: int, line: int) -> dict[str, object]:
    """The .hdr's entries that give the scan."""
    return {"Frames in Acquisition (Number)": frames, "Frames per Trigger (Number)": line}
