"""What an HDF5 file's superblock promises, read and compared with the file before HDF5 itself sees it.

HDF5 trusts its superblock: a file cut off behind it may end in an endless wait, not in an error.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import BinaryIO

from gpuem.errors import InputError
from gpuem.formats.remote import Place

SIGNATURE = b"\x89HDF\r\n\x1a\n"
# signature, versions, sizes, flags and four addresses of 8 bytes
_LONGEST = 100
_WRITING, _SWMR = 1, 4
_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Superblock:
    """What the superblock says: where it lies, its version, the end of the file, whether a writer has marked it."""

    at: int
    version: int
    end: int
    writing: bool
    swmr: bool


def check_superblock(path: Place, stream: BinaryIO | None = None) -> Superblock:
    """Read a file's superblock and compare it with the file.

    Parameters
    ----------
    path : Path or Url
        The file.
    stream : file object
        The file where it is open already.

    Raises
    ------
    InputError
        There is none, its version or its sizes are unknown, its checksum is wrong, or the file ends before its
        promised end.
    """
    try:
        with contextlib.nullcontext(stream) if stream is not None else path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size == 0:
                raise InputError(f"{path}: the file is empty (0 bytes)")
            at, head = _find(file, size)
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from error
    if not head:
        raise InputError(
            f"{path}: not an HDF5 file, or its first bytes are damaged ({size} bytes; there is no HDF5 signature at "
            "byte 0, 512, 1024, ...)"
        )
    block = _parse(path, head, at)
    if size < block.end:
        raise InputError(
            f"{path}: the file is cut off: it has {size} bytes, its header promises {block.end}; HDF5 keeps its "
            "tables anywhere in the file, so nothing of it can be trusted: copy it again"
        )
    return block


def _find(file: BinaryIO, size: int) -> tuple[int, bytes]:
    """Where the superblock is, and its bytes; empty where there is none."""
    # HDF5 looks at 0, then at 512 and its doubles: what stands before is a user block
    at = 0
    while at + len(SIGNATURE) <= size:
        file.seek(at)
        head = file.read(_LONGEST)
        if head.startswith(SIGNATURE):
            return at, head
        at = 2 * at or 512
    return 0, b""


def _parse(path: Place, head: bytes, at: int) -> Superblock:
    """The fields of a superblock at byte `at`."""
    version = head[8] if len(head) > 8 else -1
    if version not in (0, 1, 2, 3):
        raise _damaged(path, at, f"version {version} is unknown; 0 to 3 are known")
    old = version < 2
    width, lengths = (
        (head[13], head[14]) if old and len(head) > 14 else (head[9], head[10]) if len(head) > 10 else (0, 0)
    )
    if width not in (2, 4, 8) or lengths not in (2, 4, 8):
        raise _damaged(path, at, f"addresses of {width} bytes and lengths of {lengths}; 2, 4 and 8 are known")
    first = (24 if version == 0 else 28) if old else 12
    stop = first + 4 * width
    if len(head) < stop + (0 if old else 4):
        raise InputError(f"{path}: the file is cut off within its header ({at + len(head)} bytes)")
    if not old and checksum(head[:stop]) != int.from_bytes(head[stop : stop + 4], "little"):
        raise _damaged(path, at, "its checksum is wrong")
    base, _, third, fourth = (
        int.from_bytes(head[first + k * width : first + (k + 1) * width], "little") for k in range(4)
    )
    # versions 0 and 1: base, free space, end, driver; 2 and 3: base, extension, end, root
    end, undefined = third, (1 << 8 * width) - 1
    if end == undefined or (not old and fourth == undefined):
        raise _damaged(path, at, "it gives no end of the file" if end == undefined else "it gives no root group")
    if not old and fourth >= end - base:
        raise _damaged(path, at, f"its root group lies at byte {fourth}, beyond the end at {end - base}")
    flags = head[11] if version == 3 else 0
    # who put a block before a finished file shifted all of it
    return Superblock(at, version, end + at - base, bool(flags & _WRITING), bool(flags & _SWMR))


def _damaged(path: Place, at: int, why: str) -> InputError:
    return InputError(f"{path}: its HDF5 superblock at byte {at} is damaged: {why}; copy the file again")


def checksum(data: bytes) -> int:
    """HDF5's checksum of its own tables: Bob Jenkins' lookup3, hashlittle with initial value 0."""
    a = b = c = (0xDEADBEEF + len(data)) & _MASK
    words = [int.from_bytes(data[k : k + 4], "little") for k in range(0, len(data), 4)]
    words += [0] * (-len(words) % 3)
    last = max(0, len(words) - 3)
    for k in range(0, last, 3):
        a, b, c = (a + words[k]) & _MASK, (b + words[k + 1]) & _MASK, (c + words[k + 2]) & _MASK
        for shift in ((4, 6, 8), (16, 19, 4)):
            a = ((a - c) & _MASK) ^ _turn(c, shift[0])
            c = (c + b) & _MASK
            b = ((b - a) & _MASK) ^ _turn(a, shift[1])
            a = (a + c) & _MASK
            c = ((c - b) & _MASK) ^ _turn(b, shift[2])
            b = (b + a) & _MASK
    if not words:
        return c
    a, b, c = (a + words[last]) & _MASK, (b + words[last + 1]) & _MASK, (c + words[last + 2]) & _MASK
    for shift in ((14, 11, 25), (16, 4, 14)):
        c = ((c ^ b) - _turn(b, shift[0])) & _MASK
        a = ((a ^ c) - _turn(c, shift[1])) & _MASK
        b = ((b ^ a) - _turn(a, shift[2])) & _MASK
    return ((c ^ b) - _turn(b, 24)) & _MASK


def _turn(value: int, bits: int) -> int:
    return (value << bits | value >> 32 - bits) & _MASK
