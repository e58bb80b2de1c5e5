"""The way from an HDF5 file to others: links, virtual data sets, raw files. Nothing is opened that may not be read.

HDF5 would follow every name by itself, also into a circle, which ends the process.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any

from gpuem.errors import InputError
from gpuem.formats.hdf5_file import Files, located, opened
from gpuem.formats.named import Named, RefusedError
from gpuem.formats.remote import Place, Url

# HDF5's own limit
_MOST_LINKS = 16
_DEEPEST = 32
_BROKEN = (KeyError, OSError, RuntimeError, TypeError, ValueError)
_BLOCK = re.compile(r"%(%|[0-9]*b)")


class Links:
    """Links of an open file and those of the files that they lead to.

    Parameters
    ----------
    named : Named
        Which files may be named.
    stack : contextlib.ExitStack
        Keeps those files open.
    files : Files
        Takes up notes for the user.
    """

    def __init__(self, named: Named, stack: contextlib.ExitStack, files: Files) -> None:
        self.named = named
        self.files = files
        self._stack = stack
        self._open: dict[Place, Any] = {}

    def get(self, group: Any, path: str, depth: int = 0) -> Any:
        """The object at `path` from a group on, as h5py has it; None where there is none.

        Raises
        ------
        RefusedError
            It lies in a file that may not be read.
        InputError
            It lies in a file that HDF5 can't open.
        """
        item = group.file["/"] if path.startswith("/") else group
        for part in path.split("/"):
            if part not in ("", ".") and item is not None:
                item = self.step(item, part, depth)
        return item

    def step(self, group: Any, name: str, depth: int = 0) -> Any:
        """The member `name` of a group, None where there is none; raises like `get`."""
        import h5py

        if depth > _MOST_LINKS or not isinstance(group, h5py.Group):
            return None
        try:
            link = group.get(name, getlink=True)
            if isinstance(link, h5py.HardLink):
                return group[name]
        except _BROKEN:
            return None
        if link is None:
            return None
        if isinstance(link, h5py.SoftLink):
            return self.get(group, link.path, depth + 1)
        target = self.named.locate(located(group.file), link.filename)
        return self.get(self._file(target)["/"], link.path, depth + 1) if target.is_file() else None

    def _file(self, path: Place) -> Any:
        if path not in self._open:
            self._open[path] = self._stack.enter_context(opened(path, self.files))
        return self._open[path]

    def walk(self, file: Any) -> tuple[dict[str, Any], list[str], list[RefusedError]]:
        """All datasets of a file by name, each once; the files that broken links name; links that are not followed."""
        import h5py

        found: dict[str, Any] = {}
        broken: list[str] = []
        refused: list[RefusedError] = []
        seen, groups = set(), [file["/"]]
        while groups:
            group = groups.pop(0)
            for name, link in sorted(_links(group), key=lambda pair: not isinstance(pair[1], h5py.HardLink)):
                try:
                    item = self.step(group, name)
                except RefusedError as error:
                    refused.append(error)
                    continue
                except InputError:
                    item = None
                if item is None:
                    if isinstance(link, h5py.ExternalLink):
                        broken.append(link.filename)
                    continue
                info = h5py.h5o.get_info(item.id)
                if (info.fileno, info.addr) in seen:
                    continue
                seen.add((info.fileno, info.addr))
                if isinstance(item, h5py.Group):
                    groups.append(item)
                elif isinstance(item, h5py.Dataset):
                    # a dataset behind a link to another file goes by the name it has there; keep the way to it
                    here = item.file.filename == file.filename
                    found[item.name if here else f"{group.name.rstrip('/')}/{name}"] = item
        return found, broken, refused

    def check_sources(self, dset: Any) -> None:
        """Raise InputError where what a dataset is put together from may not be read, or maps itself.

        Raises
        ------
        RefusedError
            A source of a virtual data set, or a raw file, lies outside the data set's folder.
        InputError
            A virtual data set takes frames from itself, maybe by way of others.
        """
        self._check(dset, [], set())

    def _check(self, dset: Any, way: list[tuple[Any, str]], done: set[Any]) -> None:
        import h5py

        owner = located(dset.file)
        for name, *_ in dset.external or ():
            self.named.locate(owner, name if isinstance(name, str) else name.decode("utf-8", "surrogateescape"))
        if not dset.is_virtual:
            return
        key, label = _identity(dset, owner), f"{owner}: {dset.name}"
        if key in (place for place, _ in way) or len(way) > _DEEPEST:
            circle = " -> ".join([text for _, text in way] + [label])
            raise InputError(f"{way[0][1]}: this virtual data set takes frames from itself: {circle}; write it anew")
        for target, name in self._sources(dset, owner):
            if (target, name) in done:
                continue
            try:
                source = self.get(self._root(dset, owner, target), name)
            except RefusedError:
                raise
            except InputError:
                # whoever reads it says what is wrong with it
                continue
            if isinstance(source, h5py.Dataset):
                self._check(source, [*way, (key, label)], done)
            done.add((target, name))

    def _root(self, dset: Any, owner: Place, target: Place) -> Any:
        return (dset.file if target == owner else self._file(target))["/"]

    def _sources(self, dset: Any, owner: Place) -> list[tuple[Place, str]]:
        """Files and names of the sources of a virtual dataset; of numbered ones (``%b``) all that exist."""
        found: set[tuple[Place, str]] = set()
        for file_name, name in {(entry.file_name, entry.dset_name) for entry in dset.virtual_sources()}:
            targets = [owner if file_name == "." else self.named.locate(owner, file_name, virtual=True)]
            if "%" in file_name and targets[0].parent.is_dir():
                fits = _numbered(targets[0].name).fullmatch
                targets = [target for target in targets[0].parent.iterdir() if fits(target.name)]
            for target in targets:
                if target.is_file():
                    found |= {(target, one) for one in self._names(dset, owner, target, name)}
        return sorted(found, key=str)

    def _names(self, dset: Any, owner: Place, target: Place, name: str) -> list[str]:
        if "%" not in name:
            return [name]
        folder, _, last = name.rpartition("/")
        try:
            group = self.get(self._root(dset, owner, target), folder)
            return [f"{folder}/{member}" for member in group if _numbered(last).fullmatch(member)]
        except (InputError, *_BROKEN):
            return []


def _links(group: Any) -> list[tuple[str, Any]]:
    """Names of a group's members and the links behind them; those of a kind that h5py doesn't know are left out."""
    found = []
    for name in group:
        with contextlib.suppress(*_BROKEN):
            found.append((name, group.get(name, getlink=True)))
    return found


def _identity(dset: Any, owner: Place) -> tuple[Any, ...]:
    """The same for all names of a dataset."""
    import h5py

    address = h5py.h5o.get_info(dset.id).addr
    if isinstance(owner, Url):
        return owner.text, address
    stat = owner.stat()
    return stat.st_dev, stat.st_ino, address


def _numbered(name: str) -> re.Pattern[str]:
    """What fits a name in which HDF5 puts a number where ``%b`` stands, and a percent sign where ``%%`` does."""
    parts, at = [], 0
    for match in _BLOCK.finditer(name):
        parts += [re.escape(name[at : match.start()]), "%" if match[1] == "%" else "[0-9]+"]
        at = match.end()
    return re.compile("".join([*parts, re.escape(name[at:])]))
