"""What a strain is measured from, as it was asked for: vectors, another result, or scan positions."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpuem.analyses.deformation import ellipse_matrix
from gpuem.analyses.reference_lattice import check_reference, same_basis
from gpuem.errors import DataError, InputError, RecipeError
from gpuem.formats.array import read_array

if TYPE_CHECKING:
    from gpuem.analyses.strain import Strain

log = logging.getLogger("gpuem")


def reference_of(
    asked: Strain, scan_shape: tuple[int, ...], wanted: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.bool_] | None, NDArray[np.float64] | None]:
    """Scan positions of the reference (positions,), or its vectors; neither for the median of all.

    Raises
    ------
    RecipeError
        The region is empty, beyond the scan or outside the region of interest; the vectors span no lattice.
    InputError
        The other result can't be read, or isn't one.
    """
    given = asked.reference
    if isinstance(given, str):
        return None, None
    if isinstance(given, Path) and given.suffix.lower() not in (".npy", ".tif", ".tiff"):
        return None, _of_result(asked, given)
    if isinstance(given, tuple) and isinstance(given[0], tuple):
        vectors = check_reference(np.array(given, np.float64), f"{asked.name}: reference")
        return None, vectors if asked.reference_frame == "detector" else as_seen(vectors, asked.distortion)
    what = f"{asked.name}: reference"
    axes = " x ".join(map(str, scan_shape)) or "1"
    if isinstance(given, tuple):
        region = np.zeros(scan_shape, np.bool_)
        ends = [int(v) for v in given]
        if len(ends) != 2 * region.ndim:
            raise RecipeError(
                f"{what} {tuple(ends)}: first and end are needed for each scan axis, {2 * region.ndim} numbers for "
                f"this scan of {axes}"
            )
        if min(ends) < 0 or any(end > n for end, n in zip(ends[1::2], scan_shape, strict=True)):
            raise RecipeError(
                f"{what} {tuple(ends)}: first and end (excluded) must lie inside the scan of {axes}; positions count "
                "from 0"
            )
        region[tuple(slice(a, b) for a, b in zip(ends[::2], ends[1::2], strict=True))] = True
        what += f" {tuple(ends)}"
    else:
        region = np.asarray(read_array(given, what) if isinstance(given, Path) else given).astype(np.bool_)
        if region.shape != scan_shape:
            raise RecipeError(
                f"{what}: a mask of the shape {region.shape}, the scan has {scan_shape}; it must be True at the "
                "positions of the reference"
            )
    if not region.any():
        raise RecipeError(
            f"{what} holds none of the {region.size} scan positions ({axes}); give first and end (excluded) of each "
            'axis, such as (y0, y1, x0, x1), inside the scan, or reference = "median"'
        )
    flat = region.reshape(-1)
    if wanted is not None and (flat & ~wanted).any():
        inside = int(np.count_nonzero(flat & wanted))
        if not inside:
            raise RecipeError(
                f"{what}: none of its {int(flat.sum())} scan positions lies in the region of interest (roi), all that "
                f"is read of this scan of {axes}; enlarge roi, or choose a reference inside it"
            )
        log.warning("%s: %d of its %d scan positions lie in the region of interest", what, inside, int(flat.sum()))
    return flat, None


def as_seen(vectors: NDArray[np.float64], distortion: tuple[float, float]) -> NDArray[np.float64]:
    """Vectors (y, x) of the undistorted pattern as the camera shows them."""
    return np.asarray(vectors[:, ::-1] @ np.linalg.inv(ellipse_matrix(*distortion)).T, np.float64)[:, ::-1]


def described_alike(reference: NDArray[np.float64], found: NDArray[np.float64]) -> NDArray[np.float64]:
    """The reference's vectors in the basis (2, 2) in which the lattice is fitted; RecipeError for another lattice."""
    (a, b), (a0, b0) = reference.tolist(), found.tolist()
    try:
        steps = same_basis((a[0], a[1]), (b[0], b[1]), (a0[0], a0[1]), (b0[0], b0[1]))
    except DataError as error:
        raise RecipeError(f"reference: it isn't that of the lattice in the data: {error}") from error
    return np.asarray(steps @ reference, np.float64)


def _of_result(asked: Strain, path: Path) -> NDArray[np.float64]:
    """The reference lattice of another result."""
    import zarr

    try:
        root: Any = zarr.open_group(path, mode="r")
        names = [name for name in root.group_keys() if "exx" in root[name]]
        attributes = root[asked.name if asked.name in names else names[0]]["exx"].attrs
        vectors = np.array([attributes["reference_a"], attributes["reference_b"]], np.float64)
    except Exception as error:
        # whatever zarr says of a folder that isn't one
        why = "it doesn't exist" if not path.exists() else type(error).__name__
        raise InputError(
            f"{asked.name}: reference {path}: no reference lattice in it ({why}); it must be the result of a strain "
            "analysis with one lattice (.zarr), or a mask of the scan (.npy, .tif)"
        ) from error
    return check_reference(vectors, f"{asked.name}: reference {path}")
