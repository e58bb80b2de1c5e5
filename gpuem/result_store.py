"""Maps in a Zarr v3 folder, with a record of its files: which ones gpuem wrote, how long they are, their checksums.

The record is ``gpuem-record.json`` beside the ``zarr.json`` of one of the arrays, where Zarr doesn't look for members
of a group; the attributes of the folder say where, and both have the same random id. Attributes alone prove nothing:
tools copy them into other folders.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpuem import atomic, ownership
from gpuem.analyses import Map
from gpuem.axes import Axis
from gpuem.errors import InputError, OutputError

ATTRIBUTE, RECORD = "gpuem", "gpuem-record.json"
FORMAT, VERSION = "gpuem result", 1
# a map of more bytes is stored in several chunks, compressed
CHUNK_NBYTES = 4 << 20
_MOST_NBYTES = 1 << 30
_LONGEST_PART = 200
_DAMAGED, _AGAIN = "a damaged gpuem result:", "run it again"


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a result; None where `folder` isn't exactly a result that gpuem wrote."""
    if not ownership.is_folder(folder):
        return None
    about = _attributes(folder)
    if about is None or not ownership.has_format(about, FORMAT, VERSION) or not ownership.is_name(about.get("record")):
        return None
    name = about["record"]
    if not ownership.is_plain_file(folder, name) or not ownership.is_plain_file(folder, "zarr.json"):
        return None
    found = ownership.read_json(folder / name, _MOST_NBYTES)
    if found is None or found.keys() != {"format", "version", "id", "files", "maps"}:
        return None
    same = ownership.has_format(found, FORMAT, VERSION) and found["id"] == about["id"]
    files, maps = found["files"], found["maps"]
    if not same or not isinstance(files, dict) or not isinstance(maps, dict) or not all(map(ownership.is_name, files)):
        return None
    return {**found, "record": name}


def own_files(record: Mapping[str, Any]) -> list[str]:
    """Names of all files of a result: values first, then descriptions, that of the folder last."""
    return sorted({*record["files"], record["record"]}, key=_turn)


def _turn(name: str) -> tuple[bool, int, str]:
    # no description is there without the values that it describes: Zarr takes missing values for zeros
    return name.rsplit("/", 1)[-1] == "zarr.json", -name.count("/"), name


def describe_unrecorded(folder: Path) -> str:
    """What a folder without a record is: "unrecorded" of a version that kept none, "damaged", or "alien"."""
    about = _attributes(folder)
    if about is None:
        return "alien"
    if about.keys() == {"maps", "provenance"} and isinstance(about["maps"], list):
        return "unrecorded"
    return "damaged" if about.get("format") == FORMAT else "alien"


def _attributes(folder: Path) -> dict[str, Any] | None:
    found = ownership.read_json(folder / "zarr.json", _MOST_NBYTES)
    attributes = found.get("attributes") if found is not None else None
    about = attributes.get(ATTRIBUTE) if isinstance(attributes, dict) else None
    return about if isinstance(about, dict) else None


def write(maps: Mapping[str, Map], provenance: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write maps into a new folder, bring them to the disk; returns the record.

    Raises
    ------
    OutputError
        The name of a map can't be that of a file, or two maps would be one.
    OSError
        The folder can't be written.
    """
    import zarr

    paths = array_paths(maps)
    names = _dimensions(maps, paths)
    identity = ownership.new_id()
    place = paths.get("valid") or next(iter(paths.values()), "")
    record_name = f"{place}/{RECORD}".lstrip("/")
    root = zarr.open_group(folder, mode="w-", zarr_format=3)
    about: dict[str, Any] = {"format": FORMAT, "version": VERSION, "id": identity, "record": record_name}
    root.attrs.update({ATTRIBUTE: {**about, "maps": list(maps), "provenance": dict(provenance)}})
    sums: dict[str, Any] = {}
    written: set[str] = set()
    for name, item in maps.items():
        path, dimensions = paths[name], names[name]
        data = np.asarray(item.data)
        # Zarr knows no byte order of a type
        data = data.astype(data.dtype.newbyteorder("="), copy=False)
        add(root, path, data, dimensions, _described(item))
        sums[name] = {"array": path, **_checksum(data)}
        for axis, dimension in zip(item.axes, dimensions, strict=True):
            coordinate = "/".join([*path.split("/")[:-1], dimension])
            if coordinate not in written:
                add(root, coordinate, axis.coordinates, [dimension], {"units": axis.unit})
                written.add(coordinate)
    record = {"format": FORMAT, "version": VERSION, "id": identity, "files": _sync_files(folder), "maps": sums}
    _write_synced(folder / record_name, json.dumps(record).encode())
    return {**record, "record": record_name}


def _described(item: Map) -> dict[str, Any]:
    axes = [{"name": a.name, "size": a.size, "step": a.step, "unit": a.unit, "origin": a.origin} for a in item.axes]
    return {"units": item.units, "long_name": item.description, "axes": axes, **item.attributes}


def add(root: Any, path: str, data: Any, dimensions: list[str], attributes: Mapping[str, Any]) -> None:
    """Add an array to a Zarr group."""
    from zarr.codecs import BloscCodec

    chunks = chunk_shape(data.shape, data.dtype.itemsize)
    compressor = BloscCodec(cname="zstd", clevel=3) if data.nbytes > CHUNK_NBYTES else None
    # every chunk is written: one that is missing is then told from one of zeros, also by other readers
    array = root.create_array(
        path, shape=data.shape, dtype=data.dtype, chunks=chunks, compressors=compressor, dimension_names=dimensions,
        attributes=dict(attributes), config={"write_empty_chunks": True},
    )  # fmt: skip
    array[...] = data


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Shape of the chunks of an array: the longest side is halved until a chunk has no more than `CHUNK_NBYTES`."""
    chunks = [max(1, size) for size in shape]
    while math.prod(chunks) * itemsize > CHUNK_NBYTES and max(chunks) > 1:
        longest = chunks.index(max(chunks))
        chunks[longest] = -(-chunks[longest] // 2)
    return tuple(chunks)


def _array_path(name: str) -> str:
    """``com/x`` lies in group com; a single map ``adf`` in group adf under its own name; ``valid`` at the root."""
    return name if "/" in name or name == "valid" else f"{name}/{name}"


def array_paths(maps: Mapping[str, Map]) -> dict[str, str]:
    """Where each map lies.

    Raises
    ------
    OutputError
        A name can't be that of a file, or two maps would be one.
    """
    paths: dict[str, str] = {}
    for name in maps:
        path = _array_path(name)
        for part in (*path.split("/"), *(axis.name for axis in maps[name].axes)):
            if not _is_part(part):
                raise OutputError(f"map {name!r}: {part!r} can't be the name of a folder of the result; rename it")
        paths[name] = path
    taken = {path: name for name, path in paths.items()}
    for name, path in paths.items():
        parts = path.split("/")
        around = next((taken[p] for k in range(1, len(parts)) if (p := "/".join(parts[:k])) in taken), taken[path])
        if around != name:
            raise OutputError(f"maps {around!r} and {name!r} would lie in one place of the result; rename one")
    return paths


def _is_part(part: str) -> bool:
    try:
        short = len(os.fsencode(part)) <= _LONGEST_PART
    except UnicodeEncodeError:
        return False
    return short and part not in ("", ".", "..", "zarr.json", RECORD) and not {"/", "\0"} & set(part)


def _dimensions(maps: Mapping[str, Map], paths: Mapping[str, str]) -> dict[str, list[str]]:
    """Names of the dimensions of every map: those of its axes, numbered where an axis differs from one above or beside.

    Coordinates are shared by all maps of a group, and xarray wants them to fit those of the groups above.
    """
    axes: dict[str, dict[str, Axis]] = {}
    taken = set(paths.values()) | {"/".join(path.split("/")[:k]) for path in paths.values() for k in range(1, 9)}
    found: dict[str, list[str]] = {}
    for name in sorted(maps, key=lambda name: paths[name].count("/")):
        parts = paths[name].split("/")[:-1]
        groups = ["/".join(parts[:k]) for k in range(len(parts) + 1)]
        own: list[str] = []
        for axis in maps[name].axes:
            number, dimension = 1, axis.name
            while (
                dimension in own
                or "/".join([*parts, dimension]) in taken
                or any(axes.get(group, {}).get(dimension, axis) != axis for group in groups)
            ):
                number += 1
                dimension = f"{axis.name}_{number}"
            axes.setdefault(groups[-1], {})[dimension] = axis
            own.append(dimension)
        found[name] = own
    return found


def _sync_files(folder: Path) -> dict[str, list[int]]:
    """Bring all files below a folder to the disk; returns size and checksum of each."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            content = path.read_bytes()
            found[path.relative_to(folder).as_posix()] = [len(content), zlib.crc32(content)]
    atomic.sync_tree(folder)
    return dict(sorted(found.items()))


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    atomic.sync_folder(path.parent)


def read(folder: Path) -> tuple[dict[str, Map], dict[str, Any]]:
    """The maps of a result and how they came about, every value checked against the record.

    Raises
    ------
    InputError
        A file is missing, short or changed: which one, of which map.
    """
    import zarr

    record = read_record(folder)
    root: Any = zarr.open_group(folder, mode="r")
    about = root.attrs[ATTRIBUTE]
    paths = {name: _array_path(name) for name in about["maps"]}
    if record is not None and {name: sums["array"] for name, sums in record["maps"].items()} != paths:
        raise InputError(f"{folder}: {_DAMAGED} it lists other maps than its record; {_AGAIN}")
    maps = {}
    for name, path in paths.items():
        if record is not None:
            _refuse_missing(folder, name, path, record["files"])
        maps[name] = _read(root[path])
        data = maps[name].data
        if record is not None and {"array": path, **_checksum(data)} != record["maps"][name]:
            raise InputError(f"{folder}: {_DAMAGED} map {name!r}: {_changed(folder, path, record['files'])}; {_AGAIN}")
    return maps, dict(about["provenance"])


def _read(array: Any) -> Map:
    attributes = dict(array.attrs)
    axes = tuple(Axis(**axis) for axis in attributes.pop("axes"))
    units, description = attributes.pop("units"), attributes.pop("long_name")
    return Map(np.asarray(array[...]), axes, units, description, attributes)


def _refuse_missing(folder: Path, name: str, path: str, files: Mapping[str, Any]) -> None:
    for file, (size, _) in files.items():
        if file.startswith(f"{path}/c/") or file == f"{path}/c":
            try:
                there = (folder / file).stat().st_size
            except OSError as error:
                raise InputError(f"{folder}: {_DAMAGED} map {name!r}: {file}: {error.strerror}; {_AGAIN}") from error
            if there != size:
                raise InputError(f"{folder}: {_DAMAGED} map {name!r}: {file}: {there:,} bytes of {size:,}; {_AGAIN}")


def _changed(folder: Path, path: str, files: Mapping[str, Any]) -> str:
    """Which file of a map isn't as it was written."""
    for file, (_, check) in files.items():
        if file.startswith(f"{path}/") and zlib.crc32((folder / file).read_bytes()) != check:
            return f"{file} is not as it was written (checksum)"
    return f"{path} doesn't hold the values that were written (checksum)"


def _checksum(data: Any) -> dict[str, Any]:
    values = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return {"shape": list(data.shape), "dtype": data.dtype.str, "crc32": zlib.crc32(values.data)}
