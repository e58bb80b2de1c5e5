"""Dark, gain and dead pixels on the CPU: corrected copies of a few frames, which stay in the cache until they are used.

Every step is rounded to the type of the copies; nothing is fused or reordered, so that every device gives these bits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.backends import Frames
from gpuem.codecs.compiled import compiled
from gpuem.formats.source import Correction

kernel = compiled


def correct(frames: Frames, correction: Correction, out: NDArray[Any]) -> Frames:
    """Corrected copies of frames.

    Parameters
    ----------
    frames : Frames
        Native pixels before the correction.
    correction : Correction
        What becomes of them.
    out : (n, y * x) array
        Written to, in the corrected type.
    """
    dark, gain = (None if image is None else image.reshape(-1) for image in (correction.dark, correction.gain))
    _subtract_and_multiply(frames.pixels, frames.starts, dark, gain, out)
    if correction.neighbours[0].size and out.dtype.kind == "f":
        _replace_floats(out, *correction.neighbours)
    elif correction.neighbours[0].size:
        wide = np.zeros(1, np.uint64 if out.dtype.kind == "u" else np.int64)
        _replace_integers(out, *correction.neighbours, wide)
    size = math.prod(frames.shape)
    return Frames(out.reshape(-1), np.arange(frames.starts.size, dtype=np.int64) * size, frames.shape)


@kernel  # type: ignore[untyped-decorator, unused-ignore]
def _subtract_and_multiply(pixels: Any, starts: Any, dark: Any, gain: Any, out: Any) -> None:
    """Write (pixel - dark) * gain to `out`; what is None is left out."""
    cast = out.dtype.type
    for i in range(starts.size):
        frame = pixels[starts[i] : starts[i] + out.shape[1]]
        corrected = out[i]
        for p in range(corrected.size):
            value = cast(frame[p])
            if dark is not None:
                value = cast(value - dark[p])
            if gain is not None:
                value = cast(value * gain[p])
            corrected[p] = value


@kernel  # type: ignore[untyped-decorator, unused-ignore]
def _replace_floats(out: Any, dead: Any, offsets: Any, neighbours: Any) -> None:
    """Each dead pixel becomes the mean of its neighbours, added in float64 one after the other."""
    cast = out.dtype.type
    for i in range(out.shape[0]):
        for k in range(dead.size):
            total = 0.0
            for j in range(offsets[k], offsets[k + 1]):
                total += np.float64(out[i, neighbours[j]])
            out[i, dead[k]] = cast(total / np.float64(offsets[k + 1] - offsets[k]))


@kernel  # type: ignore[untyped-decorator, unused-ignore]
def _replace_integers(out: Any, dead: Any, offsets: Any, neighbours: Any, wide: Any) -> None:
    """Each dead pixel becomes the mean of its neighbours, rounded half up; `wide` has the type to compute in.

    Quotients and remainders are added separately: the sum itself could be too large for 64 bits.
    """
    cast, count = out.dtype.type, wide.dtype.type
    for i in range(out.shape[0]):
        for k in range(dead.size):
            n = count(offsets[k + 1] - offsets[k])
            mean = count(0)
            rest = count(0)
            for j in range(offsets[k], offsets[k + 1]):
                value = count(out[i, neighbours[j]])
                mean += value // n
                rest += value % n
            out[i, dead[k]] = cast(mean + (count(2) * rest + n) // (count(2) * n))
