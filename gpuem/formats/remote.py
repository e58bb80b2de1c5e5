"""Objects of a store and files of a web server, by their URL, as if they were files.

A `Url` answers what readers of headers ask of a `Path`. Nothing here keeps bytes but `Stream`, which header readers use
and close.
"""

from __future__ import annotations

import fnmatch
import io
import os
import re
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from gpuem.errors import GpuemError, RecipeError
from gpuem.formats import stores
from gpuem.formats.stores import Facts
from gpuem.messages import shown
from gpuem.paths import local_path
from gpuem.redaction import holds_secrets, redact

# headers are small; an index of chunks is read on and on, in growing steps
_BLOCK = 1 << 18
_MOST_BLOCKS = 16
_KEPT_BLOCKS = 256
_OTHER = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# of every signed URL that was opened in this process
_NUMBERS: dict[str, int] = {}
_URL = re.compile(rf"({'|'.join(stores.EXAMPLES)}):/+(?=[^/])", re.IGNORECASE)


@dataclass(frozen=True, order=True)
class Url:
    """The place of an object: ``s3://bucket/key``, ``https://host/path``; asked like a `Path`.

    `text` is the address; as a text for people and files it is without what signs it (`gpuem.redaction`).
    """

    text: str

    def __str__(self) -> str:
        return redact(self.text)

    def __repr__(self) -> str:
        return f"Url({str(self)!r})"

    @property
    def name(self) -> str:
        """What stands behind the last slash."""
        return self._parts[1].rsplit("/", 1)[-1]

    @property
    def suffix(self) -> str:
        """The name's ending, with its dot."""
        return Path(self.name).suffix

    @property
    def stem(self) -> str:
        """The name without its ending."""
        return Path(self.name).stem

    @property
    def parent(self) -> Url:
        """The folder."""
        root, key, _ = self._parts
        return Url(f"{root}/{key.rpartition('/')[0]}")

    @property
    def _parts(self) -> tuple[str, str, str]:
        return stores.parts(self.text)

    def with_name(self, name: str) -> Url:
        """Another object in the same folder."""
        root, key, query = self._parts
        folder, slash, _ = key.rpartition("/")
        return Url(f"{root}/{folder}{slash}{name}{query}")

    def with_suffix(self, suffix: str) -> Url:
        """The object of the same name with another ending."""
        return self.with_name(self.stem + suffix)

    def __truediv__(self, name: str) -> Url:
        root, key, query = self._parts
        return Url(f"{root}/{key.rstrip('/')}/{name}{query}" if key else f"{root}/{name}{query}")

    def absolute(self) -> Url:
        """The URL itself."""
        return self

    def stat(self) -> Facts:
        """Size, time and tag; raises FileNotFoundError, InputError or ReadError."""
        return stores.facts(self.text)

    def exists(self) -> bool:
        """Whether it is there; raises InputError where one may not ask, ReadError where nobody answers."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def is_file(self) -> bool:
        """Whether it is there."""
        return self.exists()

    def is_dir(self) -> bool:
        """Stores have no folders."""
        return False

    def open(self, mode: str = "rb") -> BinaryIO:
        """A file-like object for reading, which keeps what it has read."""
        return cast(BinaryIO, Stream(self))

    def iterdir(self) -> Iterator[Url]:
        """What lies in the same folder; nothing where the server doesn't tell."""
        return (Url(found) for found in stores.listed(self.text))

    def glob(self, pattern: str) -> Iterator[Url]:
        """What lies in the same folder under a name that fits."""
        return (url for url in self.iterdir() if fnmatch.fnmatchcase(url.name, pattern))


Place = Path | Url


def beside(path: Place) -> list[Place]:
    """What lies in the same folder, by name; nothing where a server doesn't tell."""
    return sorted(path.parent.iterdir(), key=str)


def place(path: str | os.PathLike[str] | Url) -> Place:
    """Where data lies: a path, or a URL of a known kind.

    Raises
    ------
    RecipeError
        It is neither.
    """
    if isinstance(path, Url):
        return path
    if not isinstance(path, str | os.PathLike):
        raise RecipeError(f"path {shown(path)}: needed is a path or a URL")
    found = url_of(os.fspath(path))
    if found is None and isinstance(path, str) and _OTHER.match(path) and not os.path.lexists(path):
        raise RecipeError(f"{path}: not a URL that gpuem reads; it may begin with {', '.join(stores.EXAMPLES)}")
    return found or local_path(path)


def url_of(text: str) -> Url | None:
    """A URL of a known kind; None for anything else."""
    # a URL that went through a Path has lost a slash
    found = _URL.match(text) if isinstance(text, str) else None
    return Url(f"{found[1].lower()}://{text[found.end() :]}") if found else None


def address(place: Place) -> str:
    """Where to read: a path, or a URL with all that signs it. Not to be shown or saved."""
    return place.text if isinstance(place, Url) else str(place)


class Stream(io.RawIOBase):
    """An object as a file to read from, for headers and indexes; `error` is the last one that reading met."""

    def __init__(self, url: Url) -> None:
        super().__init__()
        self.url = url
        self.facts = url.stat()
        self.error: GpuemError | None = None
        self._at = 0
        self._blocks: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()
        self._next, self._step = -1, 1

    def __repr__(self) -> str:
        # what h5py takes for the file's name; it must be ASCII, and tell apart what differs only in what isn't shown
        text = "".join(c if c.isascii() else "".join(f"%{b:02X}" for b in c.encode()) for c in str(self.url))
        if not holds_secrets(self.url.text):
            return text
        return f"{text} ({_NUMBERS.setdefault(self.url.text, len(_NUMBERS))})"

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a byte."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.facts.st_size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, as far as the object reaches."""
        out = np.frombuffer(memoryview(buffer).cast("B"), np.uint8)
        count = max(0, min(out.size, self.facts.st_size - self._at))
        done = 0
        while done < count:
            block, inside = divmod(self._at + done, _BLOCK)
            part = self._block(block)[inside : inside + count - done]
            out[done : done + part.size] = part
            done += part.size
        self._at += count
        return count

    def _block(self, k: int) -> NDArray[np.uint8]:
        if k not in self._blocks:
            # who goes on reading gets more and more at once
            self._step = min(2 * self._step, _MOST_BLOCKS) if k == self._next else 1
            last = -(-self.facts.st_size // _BLOCK)
            stop = next(
                (n for n in range(k + 1, min(k + self._step, last)) if n in self._blocks), min(k + self._step, last)
            )
            try:
                data = stores.fetch(self.url.text, k * _BLOCK, min(stop * _BLOCK, self.facts.st_size), self.facts)
            except GpuemError as error:
                self.error = error
                raise
            for n in range(k, stop):
                self._blocks[n] = data[(n - k) * _BLOCK : (n - k + 1) * _BLOCK]
            self._next = stop
            while len(self._blocks) > _KEPT_BLOCKS:
                self._blocks.popitem(last=False)
        return self._blocks[k]
