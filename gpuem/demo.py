"""A small 4D-STEM file with known truth: what `gpuem demo` writes and checks."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpuem import atomic, ownership, run_folder
from gpuem.errors import OutputError
from gpuem.results import Results, load_results

SCAN, FRAME = (48, 64), (64, 64)
RADIUS = 14.0
RECIPE = """\
# A recipe for gpuem. Run it with:  gpuem run demo.toml --overwrite

[input]
path = "demo.raw"            # big-endian 16-bit counts with a 32-byte header per frame, as some detectors write
scan = [48, 64]
frame = [64, 64]
dtype = ">u2"
header = 32

[calibration]
scan_step = 0.02
scan_unit = "nm"
detector_step = 1.2
detector_unit = "mrad"

[[analysis]]
kind = "sum"

[[analysis]]
kind = "virtual"
name = "bf"
shape = "disk"
outer = 15.0
unit = "mrad"

[[analysis]]
kind = "virtual"
name = "adf"
inner = 24.0
outer = 38.0
unit = "mrad"

[[analysis]]
kind = "com"
descan = "plane"

[output]
path = "demo.results.zarr"
"""


def truth() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Deflection (y, x, 2) in px and scattered fraction (y, x): three atom columns that attract the beam."""
    y, x = np.mgrid[: SCAN[0], : SCAN[1]].astype(float)
    shift = np.zeros((*SCAN, 2))
    scattered = np.full(SCAN, 0.05)
    for cy, cx, width, strength in ((14, 16, 5.0, 1.0), (32, 30, 7.0, 1.4), (18, 48, 6.0, 0.8)):
        bell = strength * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * width**2))
        shift += np.stack([-(y - cy) * bell, -(x - cx) * bell], axis=-1) * 2.0 / width
        scattered += 0.25 * bell
    return shift, scattered


def write(folder: Path) -> Path:
    """Write ``demo.raw`` and ``demo.toml``; returns the recipe's path.

    Raises
    ------
    OutputError
        Something else is there under these names, or under those of the results; nothing was changed.
    """
    recipe = folder / "demo.toml"
    contents = {folder / "demo.raw": _frames(), recipe: RECIPE.encode()}
    for path, content in contents.items():
        if os.path.lexists(path) and not (ownership.is_plain_file(folder, path.name) and path.read_bytes() == content):
            raise OutputError(f"{path}: exists and isn't what the demo writes, so it is not replaced; {_REMEDY}")
    _refuse_other_runs(folder)
    try:
        atomic.make_folder(folder)
    except OSError as error:
        raise OutputError(f"{folder}: not created: {atomic.format_error(error)}; {_REMEDY}") from error
    for path, content in contents.items():
        if not path.exists():
            atomic.write_file(path, content)
    return recipe


_REMEDY = "give the demo another folder"


def _refuse_other_runs(folder: Path) -> None:
    """Results and runs are replaced without being asked for only where they are the demo's own."""
    result = folder / "demo.results.zarr"
    about = run_folder.description(run_folder.beside(result))
    recipes = [about.get("recipe")] if about is not None else []
    if os.path.lexists(result):
        recipes.append(load_results(result).provenance.get("recipe"))
    if any(recipe != RECIPE for recipe in recipes):
        raise OutputError(f"{result}: the result or the run that is there is not of the demo; {_REMEDY}")


def _frames() -> bytes:
    """The content of ``demo.raw``."""
    rng = np.random.default_rng(2026)
    shift, scattered = truth()
    center = np.array([(FRAME[0] - 1) / 2, (FRAME[1] - 1) / 2])
    y, x = np.mgrid[: FRAME[0], : FRAME[1]]
    ring = np.exp(-(((np.hypot(y - center[0], x - center[1]) - 26) / 3.0) ** 2))
    parts = []
    for index in np.ndindex(*SCAN):
        cy, cx = center + shift[index]
        disk = np.clip(RADIUS + 0.5 - np.hypot(y - cy, x - cx), 0, 1)
        mean = 40.0 * (1 - scattered[index]) * disk + 12.0 * scattered[index] * ring
        frame = rng.poisson(mean).astype(">u2")
        parts += [f"frame {np.ravel_multi_index(index, SCAN):06d}".encode().ljust(32), frame.tobytes()]
    return b"".join(parts)


def compare(results: Results) -> list[tuple[str, str, str, bool]]:
    """What was found against the truth.

    Returns
    -------
    list of (str, str, str, bool)
        Quantity, truth, found, whether they agree within what counting noise allows.
    """
    shift, scattered = truth()
    descan = shift - shift.mean(axis=(0, 1))
    found = np.stack([results["com/shift_y"].data, results["com/shift_x"].data], axis=-1)
    error = float(np.sqrt(np.mean((found - shift) ** 2)))
    # a disk of radius R with N counts, seen over background: R / (2 sqrt(N)) per axis, and the ring's own noise
    expected = 0.15
    dark_field = float(np.corrcoef(results["adf"].data.ravel(), scattered.ravel())[0, 1])
    brightest = np.unravel_index(int(results["adf"].data.argmax()), SCAN)
    divergence = results["com/divergence"].data
    deepest = np.unravel_index(int(divergence.argmin()), SCAN)
    total = int(results["sum/sum"].data.sum())
    counted = float(results["com/counts"].data.sum())
    return [
        ("frames read", f"{SCAN[0] * SCAN[1]}", f"{int(results['valid'].data.sum())}",
         bool(results["valid"].data.all())),
        ("deflection, RMS error (px)", f"< {expected}", f"{error:.3f}", error < expected),
        ("largest deflection (px)", f"{np.hypot(*np.moveaxis(descan, -1, 0)).max():.2f}",
         f"{np.nanmax(results['com/magnitude'].data):.2f}",
         abs(np.hypot(*np.moveaxis(descan, -1, 0)).max() - np.nanmax(results["com/magnitude"].data)) < 0.5),
        ("correlation of dark field and scattering", "> 0.95", f"{dark_field:.3f}", dark_field > 0.95),
        ("brightest column (y, x)", "(32, 30)", f"({brightest[0]}, {brightest[1]})",
         bool(np.hypot(brightest[0] - 32, brightest[1] - 30) < 5)),
        ("deepest divergence at an atom (y, x)", "within 5 px", f"({deepest[0]}, {deepest[1]})",
         bool(min(np.hypot(deepest[0] - cy, deepest[1] - cx) for cy, cx in ((14, 16), (32, 30), (18, 48))) < 5)),
        ("counts, sum against com", f"{total:,}", f"{counted:,.0f}", total == counted),
    ]  # fmt: skip
