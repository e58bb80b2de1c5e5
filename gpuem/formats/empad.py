"""EMPAD, first generation: an .xml beside a .raw of 130 x 128 float32 per position.

The last two rows of every frame are the camera's own record, never data. The .xml names the .raw and gives the scan, in
several places that don't always agree (the settings of both modes, "search" and "acquire", are written whatever was
recorded): the scan is the entry with as many positions as the .raw has frames. Of several that fit, the one that the
name of the .raw says is right; without such a name they are an error.
"""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np

from gpuem.axes import Axis, calibrate, detector_axes
from gpuem.errors import InputError, TruncatedError
from gpuem.formats.named import Named, find
from gpuem.formats.remote import Place, beside
from gpuem.formats.source import File, Piece, Runs, Source

FRAME = (128, 128)
_STORED = np.dtype("<f4")
_FRAME_BYTES = 128 * 128 * 4
_STRIDE = 130 * 128 * 4
# real ones have 4 kB; keeps other people's .xml files from being read whole
_LONGEST_XML = 1 << 20

# metadata: name -> where versions 0.5 and 1.2 of the camera's software write it, and the factor to the unit in the name
_FIELDS = {
    "energy_keV": (("source.get_voltage", "high_voltage"), 1e-3),
    "camera_length_m": (("optics.get_cameralength", "nominal_camera_length"), 1.0),
    "screen_current_A": (("source.get_screencurrent",), 1.0),
    "scan_rotation": (("column.get_scanrotation", "scan_rotation"), 1.0),
    "diffraction_step_mrad": (("calibrated_diffraction_angle",), 1e3),
    "exposure_time": (("exposure_time",), 1.0),
}


def claims(path: Place) -> bool:
    """Whether an .xml of EMPAD in the folder of `path` names it as its raw file."""
    return path.suffix.lower() == ".raw" and bool(_naming(path))


def read_header(
    paths: tuple[Place, ...], *, scan: tuple[int, int] | None = None, fit: bool = False, follow_links: bool = False
) -> Source:
    """Describe an EMPAD acquisition.

    Parameters
    ----------
    paths : tuple of Path or Url
        The .xml, or the .raw: that an .xml beside it names, or alone.
    scan : tuple of int
        Scan shape (y, x), where the .xml is wrong or missing.
    fit : bool
        Go on with the whole frames of a file that is too short for the scan, or leave out what it has too many.
    follow_links : bool
        Where no .raw of that name lies beside the .xml, read the one at the whole path that the .xml gives.

    Returns
    -------
    Source
        Frames of 128 x 128 float32. The detector is calibrated in mrad where the .xml has the measured angle of a
        pixel. The scan is not calibrated: software versions disagree on whether the field of view is the camera's; it
        is in the metadata as it stands (m, as text).

    Raises
    ------
    InputError
        The .xml is alien or its scans are ambiguous, its .raw is missing, there is no .xml and no `scan`, or the .raw
        has more frames than the scan.
    TruncatedError
        The .raw ends within a frame or before the scan does.
    """
    (path,) = paths
    root, raw, notes = _open(path, follow_links)
    try:
        file = File.of(raw)
    except OSError as error:
        raise InputError(f"{path}: names {raw.name}, which can't be read beside it ({error.strerror})") from error
    whole, rest = divmod(file.size, _STRIDE)
    # the last frame is whole without its two rows of metadata
    if rest >= _FRAME_BYTES:
        whole, rest = whole + 1, 0
    if whole == 0:
        raise InputError(f"{raw}: {file.size} bytes, not one whole frame of {_STRIDE} bytes")
    shape = scan if scan is not None else _choose_scan(path, root, raw, whole, fit)
    notes += _check(path, file, shape, whole, rest, fit)
    frames = math.prod(shape)
    count = min(whole, frames)
    piece = Piece(0, (count,), Runs.one(0, count, _STRIDE, _FRAME_BYTES), _STORED)
    metadata = _metadata(root, shape) if root is not None else {}
    more: dict[str, Any] = {"detector": _detector(metadata), "metadata": metadata, "notes": tuple(notes)}
    return Source("empad", (file,), (piece,), frames, FRAME, _STORED.newbyteorder("="), shape, **more)


def _check(path: Place, file: File, shape: tuple[int, ...], whole: int, rest: int, fit: bool) -> list[str]:
    """Compare the .raw with the scan: nothing, a note if `fit`, or an error."""
    frames = math.prod(shape)
    if min(shape) < 1:
        raise InputError(f"{path}: scan {shape} has no positions; give scan = [y, x]")
    if whole == frames and not rest:
        return []
    message = (
        f"{file.path}: {file.size} bytes hold {whole} whole frames of 130x128 float32 and {rest} bytes more, "
        f"the scan {shape} has {frames}"
    )
    if fit:
        return [message]
    if whole < frames or rest:
        raise TruncatedError(f"{message}; copy the file again, give scan = [y, x], or set fit = true", whole)
    raise InputError(f"{message}; give scan = [y, x], or set fit = true to leave out the last {whole - frames}")


def _open(path: Place, follow_links: bool) -> tuple[ET.Element | None, Place, list[str]]:
    """The .xml's root (None where there is no .xml), the .raw, and notes; refuses a .raw that may not be read."""
    if path.suffix.lower() != ".xml":
        named = _naming(path)
        if len(named) > 1:
            found = ", ".join(p.name for p in named)
            raise InputError(f"{path}: {len(named)} .xml files beside it name it ({found}); give the right one")
        if not named:
            return None, path, [f"{path}: no .xml beside it names it: no metadata, no calibration"]
        path = named[0]
    try:
        root = _parse(path)
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from error
    name = _raw_name(root) if root is not None else None
    if root is None or name is None:
        raise InputError(f"{path}: not an EMPAD header: no <raw_file filename=...> in it")
    raw, renamed, whole = path.with_name(name), path.with_suffix(".raw"), _whole_name(root)
    if not raw.is_file() and whole != name and find(path, whole).exists():
        return root, Named(path, follow_links).locate(path, whole), []
    if not raw.is_file() and renamed.is_file():
        return root, renamed, [f"{path}: names {name}, which is missing; {renamed.name} of the same name as it is read"]
    return root, raw, []


def _parse(path: Place) -> ET.Element | None:
    """The root of an .xml, None where it isn't one or is too long for a header."""
    with path.open("rb") as stream:
        text = stream.read(_LONGEST_XML + 1)
    if len(text) > _LONGEST_XML:
        return None
    try:
        # some versions put line breaks before the root
        return ET.fromstring(text.strip())
    except (ET.ParseError, ValueError, LookupError):
        return None


def _raw_name(root: ET.Element) -> str | None:
    """Name of the .raw; what stands before it is a folder of the camera's computer."""
    name = _whole_name(root).rsplit("/", 1)[-1].strip()
    return name if name not in ("", ".", "..") and "\0" not in name else None


def _whole_name(root: ET.Element) -> str:
    """The .raw with its folder, as the .xml gives it."""
    element = root.find("raw_file")
    return "" if element is None else element.get("filename", "").replace("\\", "/").strip()


def _naming(raw: Place) -> list[Place]:
    """The .xml files in the folder of `raw` that name it."""
    found = []
    for path in beside(raw):
        if path.suffix.lower() != ".xml":
            continue
        try:
            root = _parse(path)
        except OSError:
            continue
        if root is not None and _raw_name(root) == raw.name:
            found.append(path)
    return found


def lone_frames(path: Place) -> tuple[int, tuple[int, int] | None]:
    """Frames of a file that has the size of an EMPAD .raw, else 0; and the scan that its name says, if it fits."""
    whole, rest = divmod(path.stat().st_size, _STRIDE)
    named = _scan_of_name(path)
    return (0, None) if rest else (whole, named if named and math.prod(named) == whole else None)


def _choose_scan(path: Place, root: ET.Element | None, raw: Place, whole: int, fit: bool) -> tuple[int, ...]:
    """The scan that fits the number of whole frames; of a .raw that is cut, the likeliest one.

    Raises
    ------
    InputError
        There is none, or more than one that fits.
    """
    named = _scan_of_name(raw)
    if root is None:
        if named and (math.prod(named) == whole or fit):
            return named
        raise InputError(
            f"{path}: {whole} frames of 130x128 float32, and no .xml beside it names it: give scan = [y, x]"
            + (f" (its name says {named[0]} x {named[1]} = {math.prod(named)} positions)" if named else "")
        )
    entries = _scans(root)
    if named:
        entries.setdefault(named, "its name")
    if not entries:
        raise InputError(f"{path}: says nothing of the scan; its .raw holds {whole} frames: give scan = [y, x]")
    fitting = [shape for shape in entries if math.prod(shape) == whole]
    if named in fitting:
        return named
    if len(fitting) > 1:
        listed = " and ".join(f"{list(shape)} ({entries[shape]})" for shape in fitting)
        raise InputError(
            f"{path}: {raw.name} has {whole} frames, which fit {len(fitting)} of its scans: {listed}; "
            "give the right one as scan = [y, x]"
        )
    return fitting[0] if fitting else next(iter(entries))


def _scan_of_name(raw: Place) -> tuple[int, int] | None:
    """The scan (y, x) in the name that the camera's software gives its files: ``scan_x16_y128.raw``."""
    match = re.fullmatch(r".*_x([0-9]{1,6})_y([0-9]{1,6})", raw.stem)
    shape = (int(match[2]), int(match[1])) if match else (0, 0)
    return shape if min(shape) > 0 else None


def _scans(root: ET.Element) -> dict[tuple[int, ...], str]:
    """Scan shapes that the .xml gives, each with its place in it, the likeliest first."""
    parameters = root.findall("scan_parameters")
    # of a file that is cut, the mode for recording is likelier than the one for looking
    parameters.sort(key=lambda p: p.get("mode") not in (None, "acquire"))
    found: dict[tuple[int, ...], str] = {}
    places = [(f"scan_parameters mode={p.get('mode', 'none')}", p) for p in parameters]
    for where, p in places:
        if n := _count(p, "series_count"):
            found.setdefault((n,), f"series_count of {where}")
    for where, p, tags in [
        ("pix_y, pix_x", root, ("pix_y", "pix_x")),
        # a series was recorded at one place, whatever the scan was set to
        *((w, p, ("scan_resolution_y", "scan_resolution_x")) for w, p in places if not _count(p, "series_count")),
    ]:
        y, x = (_count(p, tag) for tag in tags)
        if y and x:
            found.setdefault((y, x), where)
    return found


def _count(element: ET.Element, tag: str) -> int | None:
    """A whole number in the .xml, None where it isn't there or isn't one."""
    text = (element.findtext(tag) or "").strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _metadata(root: ET.Element, shape: tuple[int, ...]) -> dict[str, Any]:
    """What the .xml says, as plain values; lengths in m, energy in keV, the exposure as the camera counts it (ms)."""
    texts = {element.tag: element.text.strip() for element in root.iter() if element.text}
    found: dict[str, Any] = {}
    for name, (tags, factor) in _FIELDS.items():
        for tag in tags:
            try:
                found[name] = float(texts[tag]) * factor
            except (KeyError, ValueError):
                continue
    view = root.find("iom_measurements/full_scan_field_of_view")
    if view is not None:
        found["field_of_view_m"] = {child.tag: child.text for child in view}
    elif "optics.get_full_scan_field_of_view" in texts:
        found["field_of_view_m"] = texts["optics.get_full_scan_field_of_view"]
    for p in root.findall("scan_parameters"):
        if (_count(p, "scan_resolution_y"), _count(p, "scan_resolution_x")) == shape and p.findtext("scan_size"):
            found["scan_size"] = p.findtext("scan_size")
    timestamp = root.find("timestamp")
    found["timestamp"] = timestamp.get("isoformat") if timestamp is not None else None
    found["software_version"] = texts.get("software_version")
    return {key: value for key, value in found.items() if value is not None}


def _detector(metadata: dict[str, Any]) -> tuple[Axis, ...]:
    """The detector's axes in mrad, where the angle of a pixel was measured and is a small one; else none.

    <calibrated_pixelsize> is no such thing: it is a length in the image plane, though others read it as 1/nm.
    """
    step = metadata.get("diffraction_step_mrad", 0.0)
    # from Lorentz STEM's microradians to more than any camera takes in; beyond that the entry is a placeholder
    return calibrate(detector_axes(FRAME), step, "mrad") if 1e-4 < step < 10.0 else ()
