"""Files that a file names: where they lie, and whether they may be read.

A header can name any file of the machine. What it names must lie in the data set's folder, unless the user allows more.
"""

from __future__ import annotations

import os
import posixpath
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from gpuem.errors import InputError
from gpuem.formats import stores
from gpuem.formats.remote import Place, Url, place


class RefusedError(InputError):
    """A file names another one that lies outside the data set's folder."""


@dataclass(frozen=True)
class Named:
    """Which files the files of a data set may name.

    Parameters
    ----------
    top : Path or Url
        The file that the user named.
    follow : bool
        Whether files anywhere may be named (``follow_links``).
    """

    top: Place
    follow: bool = False

    def locate(self, owner: Place, name: str, *, virtual: bool = False) -> Place:
        """The file that `owner` names, as `find` finds it; it may be missing.

        Raises
        ------
        RefusedError
            It lies outside the data set's folder, and `follow` is not set.
        """
        found = find(owner, name, virtual=virtual)
        # folders in the environment are the user's own
        if virtual and found in _prefixed(owner, name):
            return found
        if self.follow or (_inside_url if isinstance(owner, Url) else self._inside)(owner, name, found):
            return found
        at = "" if str(found) == name else f" ({found})"
        raise RefusedError(
            f"{owner}: names the file {name!r}{at}, which lies outside the folder of {self.top}; if you trust this "
            "data set, allow files anywhere: follow_links = true in [input], or gpuem.open(..., follow_links=True)"
        )

    def _inside(self, owner: Place, name: str, found: Place) -> bool:
        """Whether a file lies in the folder of the data set, or of what a symbolic link in it leads to.

        Symbolic links are the user's own doing, so their targets count only where ``..`` would step out of one.
        """
        if isinstance(found, Url) or isinstance(self.top, Url) or isinstance(owner, Url):
            return False
        folders = {self.top.absolute().parent, Path(os.path.realpath(self.top)).parent}
        if owner.is_symlink():
            folders.add(Path(os.path.realpath(owner)).parent)
        if ".." in Path(name).parts:
            real = Path(os.path.realpath(found))
            return any(real.is_relative_to(os.path.realpath(folder)) for folder in folders)
        whole = found.absolute()
        return any(whole.is_relative_to(folder) for folder in folders)


def find(owner: Place, name: str, *, virtual: bool = False) -> Place:
    """Where a file lies that `owner` names; it may be missing, and need not be allowed.

    It is looked for as HDF5 does: at its whole path or, where nothing is there, by its name alone; sources of virtual
    data sets in the folders of HDF5_VDS_PREFIX; beside the owner; beside the file that the owner is a symbolic link
    to; from the working directory only what lies with the owner: another file of that name may be of other data.
    """
    if isinstance(owner, Url):
        if "://" in name:
            return place(name)
        root, key, _ = stores.parts(owner.text)
        return Url(f"{root}/{posixpath.normpath(posixpath.join('/', posixpath.dirname(key), name)).lstrip('/')}")
    given = Path(name)
    prefixed = _prefixed(owner, name) if virtual else []
    near = [folder / _short(name) for folder in _folders(owner)]
    here = [given] if Path(os.path.realpath(given)).is_relative_to(os.path.realpath(owner.parent)) else []
    places = [given, *prefixed, *near] if given.is_absolute() else [*prefixed, *near, *here]
    return next((path for path in places if path.exists()), given if given.is_absolute() else near[0])


def _prefixed(owner: Place, name: str) -> list[Path]:
    """Where HDF5_VDS_PREFIX puts a source of a virtual data set."""
    if isinstance(owner, Url):
        return []
    prefixes = os.environ.get("HDF5_VDS_PREFIX", "").split(os.pathsep)
    return [Path(prefix.replace("${ORIGIN}", str(owner.parent))) / _short(name) for prefix in prefixes if prefix]


def _short(name: str) -> Path:
    """A relative path as it is, of an absolute one the name alone."""
    return Path(Path(name).name) if Path(name).is_absolute() else Path(name)


def _folders(owner: Path) -> list[Path]:
    return [owner.parent, Path(os.path.realpath(owner)).parent] if owner.is_symlink() else [owner.parent]


def _inside_url(owner: Place, name: str, found: Place) -> bool:
    """Whether a name stays in the folder of the URL it stands in, also to a server that decodes or turns slashes."""
    plain = unquote(unquote(name)).replace("\\", "/")
    return not (plain.startswith("/") or "://" in plain or ".." in plain.split("/"))
