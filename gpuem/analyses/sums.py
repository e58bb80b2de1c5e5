"""Sum, mean and maximum of all frames."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gpuem.analyses import Map, View
from gpuem.analyses.model import Model, Name
from gpuem.backends import Sums, Weights


class Sum(Model):
    """Sum, mean and maximum of all frames: the position-averaged diffraction pattern.

    Maps, of detector shape (y, x): ``sum`` (exact integers for integer data), ``mean`` (sum divided by the number of
    frames that were read), ``max`` (the data's type).

    Parameters
    ----------
    name : str
        Name of the maps: ``name/sum``, ``name/mean``, ``name/max``.
    """

    kind: Literal["sum"] = "sum"
    name: Name = "sum"

    def weights(self, view: View) -> Weights:
        """Sum and maximum over frames."""
        return Weights(total=True, maximum=True)

    def finish(self, view: View, sums: Sums, valid: NDArray[np.bool_]) -> dict[str, Map]:
        """Maps ``sum``, ``mean`` and ``max``."""
        frames = int(valid.sum())
        mean = sums.total / frames if frames else np.full(view.frame_shape, np.nan)
        read = {"frames": frames}
        return {
            "sum": Map(sums.total, view.detector, "counts", "sum of all frames", read),
            "mean": Map(mean, view.detector, "counts", "mean of all frames", read),
            "max": Map(sums.maximum, view.detector, "counts", "largest value of each pixel over all frames", read),
        }
