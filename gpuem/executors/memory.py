"""How much memory this process may take: what the machine has free, and what batch systems and services allow."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

# of what is free, so much: the rest is for the interpreter, libraries and what others begin meanwhile
SHARE = 0.8
_MIB = 1 << 20
# version 1 of control groups writes a huge number for "no limit"
_NO_LIMIT = 1 << 60


def available_memory(
    processes: int | None = None, root: Path = Path("/"), environment: Mapping[str, str] = os.environ
) -> int:
    """80 % of the memory that this process may still take, in bytes.

    The smallest of: what the machine has free (MemAvailable); the limit less the use of every control group above this
    process, version 1 and 2 (Slurm, systemd, containers); what Slurm grants to the job on this machine, less what this
    process uses; each shared by `processes`. And the limits of ``ulimit -v`` and ``ulimit -d``.

    Parameters
    ----------
    processes : int
        Processes of the run on this machine; by default as many as Slurm started there for this job step.
    root : Path
        Where ``proc`` and ``sys`` are mounted.
    environment : mapping
        Slurm's variables.
    """
    shared = [_free_on_machine(root), *_left_in_groups(root), *_left_of_slurm(root, environment)]
    free = min(shared) // (processes or _tasks_here(environment))
    return int(SHARE * max(0, min([free, *_left_of_ulimit(root)])))


def _free_on_machine(root: Path) -> int:
    fields = _fields(root / "proc/meminfo")
    if "MemAvailable" in fields:
        return fields["MemAvailable"] * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _left_in_groups(root: Path) -> Iterator[int]:
    """Limit less use of the control groups of this process and of all groups around them."""
    for folder, top in _groups(root):
        for group in (folder, *folder.parents):
            yield from _left_in(group)
            if group == top:
                break


def _left_in(group: Path) -> Iterator[int]:
    stat = _fields(group / "memory.stat")
    for limits, use, prefix in (
        # above memory.high the kernel throttles, above memory.max it kills
        (("memory.max", "memory.high"), "memory.current", ""),
        (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_"),
    ):
        allowed = [n for name in limits if (n := _number(group / name)) is not None and n < _NO_LIMIT]
        used = _number(group / use)
        if allowed and used is not None:
            # pages of files are counted as used, and given back when they are needed
            cached = stat.get(f"{prefix}inactive_file", 0) + stat.get(f"{prefix}active_file", 0)
            yield min(allowed) - max(0, used - cached)


def _groups(root: Path) -> Iterator[tuple[Path, Path]]:
    """Folders of the memory control groups of this process, each with the folder where its hierarchy is mounted."""
    mounts = _mounts(root)
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = ([*line.split(":", 2), "", ""])[:3]
        kind = "cgroup2" if number == "0" and not controllers else "cgroup"
        if kind == "cgroup" and "memory" not in controllers.split(","):
            continue
        for mounted, point in mounts.get(kind, []):
            # within a namespace the path may lie outside of what is mounted: then the mount is the group
            inside = path == mounted or path.startswith(f"{mounted.rstrip('/')}/")
            relative = path[len(mounted.rstrip("/")) :].strip("/") if inside else ""
            top = root / point.strip("/")
            folder = top / relative
            yield (folder if folder.is_dir() else top), top


def _mounts(root: Path) -> dict[str, list[tuple[str, str]]]:
    """For ``cgroup2``, and ``cgroup`` with the memory controller: which part of it is mounted where."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, more = before.split(), after.split()
        if len(fields) < 5 or not more or more[0] not in ("cgroup", "cgroup2"):
            continue
        if more[0] == "cgroup2" or "memory" in more[-1].split(","):
            found.setdefault(more[0], []).append((_unescape(fields[3]), _unescape(fields[4])))
    return found


def _unescape(text: str) -> str:
    """Undo the octal escapes of mountinfo, such as 040 for a space."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _left_of_slurm(root: Path, environment: Mapping[str, str]) -> Iterator[int]:
    """What Slurm grants to the job on this machine (in MiB; 0 is all of it), less what this process uses.

    Slurm doesn't enforce it everywhere by control groups, but may end the job for it.
    """
    granted = [_whole(environment.get("SLURM_MEM_PER_NODE"))]
    for each, count in (("SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"), ("SLURM_MEM_PER_GPU", "SLURM_GPUS_ON_NODE")):
        granted.append(_whole(environment.get(each)) * _whole(environment.get(count)))
    granted = [n for n in granted if n > 0]
    if granted:
        yield min(granted) * _MIB - _used(root, "VmRSS")


def _tasks_here(environment: Mapping[str, str]) -> int:
    """Processes of this job step on this machine, from ``SLURM_STEP_TASKS_PER_NODE`` such as ``2(x3),1``."""
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if found := re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", part.strip()):
            counts += [int(found[1])] * int(found[2] or 1)
    node = environment.get("SLURM_NODEID", "0")
    return max(1, counts[int(node)] if node.isdigit() and int(node) < len(counts) else 1)


def _left_of_ulimit(root: Path) -> Iterator[int]:
    try:
        import resource
    except ImportError:
        return
    for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft = resource.getrlimit(limit)[0]
        if soft not in (resource.RLIM_INFINITY, -1):
            yield soft - _used(root, used)


def _used(root: Path, name: str) -> int:
    """Bytes that this process uses, by the kernel's name for them."""
    return _fields(root / "proc/self/status").get(name, 0) * 1024


def _fields(path: Path) -> dict[str, int]:
    """Lines of a name and a number, as the kernel writes them."""
    pairs = (line.replace(":", " ").split() for line in _lines(path))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) > 1 and pair[1].isdigit()}


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _whole(text: str | None) -> int:
    return int(text) if text and text.isascii() and text.isdigit() else 0


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return []
