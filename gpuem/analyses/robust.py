"""What of a scan is no measurement: noise of a camera without beam, and single frames that contradict the others."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

ABOVE_NOISE = 5.0
"""Counts of a frame over the noise of their sum; less is no beam. Noise alone reaches it once in three million."""

FAR = 10.0
"""Robust standard deviations from which a frame contradicts the others. Of normal errors none ever does."""

LEAST = 0.5
"""In px: what is nearer than this to the others is never left out, however little these scatter."""

MOST = 0.25
"""If more than this part were left out it would be no accident but the specimen: all are kept then."""

_ENOUGH = 100_000


def dark_noise(frames: NDArray[np.generic]) -> float:
    """Noise of a dark pixel, in counts: what the camera adds where no electron arrives.

    The variance of each pixel, from differences of successive frames, so that slow changes don't count; of that the
    lower quartile over all pixels, which lies outside the bright disk, or below most of it. Less than two frames say
    nothing: 0. So do electrons so few that most pixels saw none.
    """
    if len(frames) < 2:
        return 0.0
    flat = frames.reshape(len(frames), -1)
    step = max(1, (1 << 17) // len(frames))
    variance = np.concatenate([
        (np.diff(flat[:, k : k + step].astype(np.float64), axis=0) ** 2).mean(axis=0) / 2
        for k in range(0, flat.shape[1], step)
    ])  # fmt: skip
    return float(np.sqrt(np.quantile(variance, 0.25)))


def spread_of(values: Array) -> float:
    """Standard deviation of normal values, whatever a minority of them is."""
    return 1.4826 * float(np.median(np.abs(values))) if values.size else 0.0


def outliers_of_fit(design: Array, vectors: Array) -> Mask:
    """Which rows a linear fit should leave out: those that are far from the fit of all the others.

    The fit that decides is one of least absolute distances (iteratively re-weighted least squares), which outliers
    hardly move. Far is `FAR` robust standard deviations of the distances and at least `LEAST`. Where nothing is far the
    fit of what is left is the plain one, to the last bit; where more than `MOST` is, nothing is left out.
    """
    thin = slice(None, None, max(1, len(design) // _ENOUGH))
    rows, values = design[thin], vectors[thin]
    solution = np.linalg.lstsq(rows, values, rcond=None)[0]
    for _ in range(30):
        distance = np.hypot(*(values - rows @ solution).T)
        root = 1 / np.sqrt(np.maximum(distance, 1e-3 * LEAST))[:, None]
        before, solution = solution, np.linalg.lstsq(rows * root, values * root, rcond=None)[0]
        if np.abs(solution - before).max() < 1e-9:
            break
    left = vectors - design @ solution
    limit = max(FAR * max(spread_of(left[thin, 0]), spread_of(left[thin, 1])), LEAST)
    far = np.hypot(left[:, 0], left[:, 1]) > limit
    return far if far.mean() <= MOST else np.zeros(len(far), np.bool_)


def lonely(vectors: Array) -> Mask:
    """Positions of an image of vectors (y, x, 2) that differ from all around them: glitches, no specimen.

    From the median of the eight neighbours they differ by more than `FAR` robust standard deviations of such
    differences, by more than `LEAST`, and by more than three times what the neighbours themselves differ from it (the
    third of them: two may be glitches, too); around an atom these differ as much. NaN is unknown. Where more than
    `MOST` would be left out, nothing is.
    """
    height, width = vectors.shape[:2]
    padded = np.full((height + 2, width + 2, 2), np.nan)
    padded[1:-1, 1:-1] = vectors
    around = np.stack(
        [padded[1 + j : 1 + j + height, 1 + i : 1 + i + width] for j in (-1, 0, 1) for i in (-1, 0, 1) if j or i]
    )
    order = np.sort(around, axis=0)
    count = np.isfinite(around).sum(axis=0)
    low = np.take_along_axis(order, np.maximum((count - 1) // 2, 0)[None], axis=0)[0]
    high = np.take_along_axis(order, np.maximum(count // 2, 0)[None] % 8, axis=0)[0]
    middle = (low + high) / 2
    difference = vectors - middle
    apart = np.sort(np.nan_to_num(np.hypot(*np.moveaxis(around - middle, -1, 0)), nan=0.0), axis=0)
    # at edges and corners neighbours lie to one side, where a slope alone makes a difference
    apart = np.where(count[..., 0] == 8, apart[-3], apart[-1])
    known = np.isfinite(difference).all(axis=-1) & (count[..., 0] > 2)
    limit = max(FAR * max(spread_of(difference[known][:, 0]), spread_of(difference[known][:, 1])), LEAST)
    far = known & (np.hypot(difference[..., 0], difference[..., 1]) > np.maximum(limit, 3 * apart))
    return np.asarray(far if far.sum() <= MOST * max(known.sum(), 1) else np.zeros_like(far))
