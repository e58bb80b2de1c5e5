"""A folder is replaced by another one: all of its files, or none, whatever ends the process in between.

The new folder is written into ``.gpuem-save-ID`` beside the old one, on the same file system:

    owner.json    which folder is to be replaced, by which process of which machine, which keeps this file locked
    new/          the new folder
    plan.json     there while files are exchanged one by one: the names of the old and of the new ones
    replaced/     the old files meanwhile

As long as ``plan.json`` is there the exchange isn't done, and `restore` undoes it; else only the new files count. Files
that nobody named are never touched: neither moved nor removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import platform
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpuem import atomic, ownership
from gpuem.errors import OutputError

FORMAT, VERSION = "gpuem save", 1
PREFIX = ".gpuem-save-"
log = logging.getLogger("gpuem")


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A folder of this process beside `target`; what is left in it at the end is removed.

    Raises
    ------
    OSError
        It can't be written.
    """
    identity = ownership.new_id()
    place = target.parent / f"{PREFIX}{identity}"
    place.mkdir()
    try:
        owner = {"format": FORMAT, "version": VERSION, "id": identity, "target": target.name, **_this_process()}
        # at once under its name: of what is unfinished nobody could tell whose it is
        with (place / "owner.json").open("x", encoding="utf-8") as lock:
            lock.write(json.dumps(owner))
            lock.flush()
            os.fsync(lock.fileno())
            with contextlib.suppress(OSError):
                # some network file systems know no locks; there the process number tells
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield place
    finally:
        if not (place / "plan.json").exists():
            _remove(place)


def exchange(place: Path, target: Path, old: Collection[str], new: Collection[str]) -> None:
    """Put the files of ``new/`` into place instead of the old ones; what else lies in `target` stays as it is.

    Parameters
    ----------
    place : Path
        The staging folder; all in it is on the disk.
    target : Path
        The folder.
    old, new : collection of str
        Names of the files that are replaced, and of those that come; descriptions last, as they are put in this order
        and taken away in the opposite one.

    Raises
    ------
    OutputError
        A file that is none of the old ones is in the way, and nothing was changed; or the old files can't be put back.
    OSError
        Files can't be moved; the old ones are back in their places.
    """
    if not os.path.lexists(target):
        (place / "new").rename(target)
        atomic.sync_folder(target.parent)
        return
    _refuse_in_the_way(target, set(old), new)
    atomic.write_file(place / "plan.json", json.dumps({"old": list(old), "new": list(new)}).encode())
    try:
        for name in reversed(list(old)):
            if ownership.is_plain_file(target, name):
                _move(target, place / "replaced", name)
        for name in new:
            _move(place / "new", target, name)
        _prune(target, set(old) - set(new))
        _sync_folders(target, {*old, *new})
    except BaseException:
        try:
            _undo(place, target)
        except OSError as error:
            raise OutputError(
                f"{target}: only partly replaced, as the disk fails: {error}; the next run puts the old files back, "
                f"which lie in {place / 'replaced'}"
            ) from error
        raise
    # from here on only the new files count
    (place / "plan.json").unlink()
    atomic.sync_folder(place)


def _refuse_in_the_way(target: Path, old: set[str], new: Collection[str]) -> None:
    for name in (*new, *old):
        parts = name.split("/")
        for k in range(1, len(parts)):
            path = target / "/".join(parts[:k])
            if os.path.lexists(path) and not ownership.is_folder(path):
                raise OutputError(f"{path}: not a folder that gpuem made; move it away, or choose another name")
        if os.path.lexists(target / name) and (name not in old or not ownership.is_plain_file(target, name)):
            raise OutputError(f"{target / name}: in the way, and not written by gpuem; move it away")


def _undo(place: Path, target: Path) -> None:
    """Take the new files out again, put the old ones back."""
    plan = _plan(place)
    for name in reversed(plan["new"]):
        # what is no longer here went there
        if not os.path.lexists(place / "new" / name) and ownership.is_plain_file(target, name):
            _move(target, place / "new", name)
    for name in plan["old"]:
        if ownership.is_plain_file(place / "replaced", name):
            _move(place / "replaced", target, name)
    _prune(target, set(plan["new"]) - set(plan["old"]))
    _sync_folders(target, {*plan["old"], *plan["new"]})
    (place / "plan.json").unlink()


def restore(parent: Path) -> None:
    """Undo what processes left unfinished that no longer live, and remove what they left in this folder."""
    try:
        places = [path for path in parent.iterdir() if path.name.startswith(PREFIX)]
    except OSError:
        return
    for place in places:
        owner = _owner(place)
        if owner is None:
            continue
        if owner["host"] != _host():
            log.warning(
                "%s: process %s on %s saves %s, or was ended meanwhile: the next run on %s removes what it left",
                place, owner["pid"], owner["host"], owner["target"], owner["host"],
            )  # fmt: skip
            continue
        try:
            with (place / "owner.json").open("rb") as lock:
                if _lives(owner) or _is_locked(lock.fileno()):
                    continue
                if (place / "plan.json").exists():
                    log.warning("%s: its replacement was stopped; the old one is restored", parent / owner["target"])
                    _undo(place, parent / owner["target"])
                _remove(place)
        except (OSError, OutputError) as error:
            log.warning("%s: left by a process that was ended, and not removed: %s", place, error)


def _owner(place: Path) -> dict[str, Any] | None:
    """Whose staging folder it is; None where it isn't exactly one of gpuem's."""
    found = ownership.read_json(place / "owner.json")
    if (
        not ownership.is_folder(place)
        or found is None
        or found.keys() != {"format", "version", "id", "target", "host", "boot", "pid", "began"}
    ):
        return None
    exact = ownership.has_format(found, FORMAT, VERSION) and place.name == f"{PREFIX}{found['id']}"
    target = found["target"]
    return found if exact and ownership.is_name(target) and "/" not in target and target != ".." else None


def _plan(place: Path) -> dict[str, list[str]]:
    found = ownership.read_json(place / "plan.json", most_nbytes=1 << 30)
    if found is not None and found.keys() == {"old", "new"}:
        names = [*found["old"], *found["new"]] if all(isinstance(part, list) for part in found.values()) else [None]
        if all(map(ownership.is_name, names)):
            return found
    raise OutputError(f"{place / 'plan.json'}: damaged; the files of {place / 'replaced'} are to be put back by hand")


def _this_process() -> dict[str, Any]:
    return {"host": _host(), "boot": _boot(), "pid": os.getpid(), "began": _began(os.getpid())}


def _host() -> str:
    """The name of this machine; where names are the same on many machines, with its own number."""
    try:
        number = Path("/etc/machine-id").read_text(encoding="ascii").strip()[:8]
    except (OSError, ValueError):
        number = ""
    return f"{platform.node()} ({number})" if number else platform.node()


def _boot() -> str:
    """A word for the time since the machine was started; empty where the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _began(pid: int) -> str:
    """When a process began, as the system counts; empty where it isn't there, or the system doesn't tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError, ValueError):
        return ""


def _lives(owner: dict[str, Any]) -> bool:
    """Whether a process of this machine is still there: numbers are given again, so its beginning is compared."""
    if owner["boot"] != _boot():
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except PermissionError:
        return True
    except (ProcessLookupError, ValueError, TypeError, OverflowError):
        return False
    return bool(owner["began"] == _began(owner["pid"]))


def _is_locked(file: int) -> bool:
    """Whether another process holds the lock: in a container it has another number."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _move(source: Path, destination: Path, name: str) -> None:
    (destination / name).parent.mkdir(parents=True, exist_ok=True)
    (source / name).rename(destination / name)


def _prune(folder: Path, names: Collection[str]) -> None:
    """Remove folders that such files lay in, where they are empty now."""
    parts = {"/".join(name.split("/")[:k]) for name in names for k in range(1, name.count("/") + 1)}
    for part in sorted(parts, reverse=True):
        with contextlib.suppress(OSError):
            (folder / part).rmdir()


def _sync_folders(folder: Path, names: Collection[str]) -> None:
    for path in {folder, *((folder / name).parent for name in names)}:
        if path.is_dir():
            atomic.sync_folder(path)


def _remove(place: Path) -> None:
    """Remove a staging folder; its description last."""
    for name in ("new", "replaced"):
        # never follows symlinks
        shutil.rmtree(place / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        for path in place.glob(".plan.json.partial-*"):
            path.unlink(missing_ok=True)
        (place / "plan.json").unlink(missing_ok=True)
        # somebody else's file keeps its folder, and the folder its description
        if [path.name for path in place.iterdir()] in ([], ["owner.json"]):
            (place / "owner.json").unlink(missing_ok=True)
            place.rmdir()
