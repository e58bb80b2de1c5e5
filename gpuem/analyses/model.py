"""What all analyses have in common as models: strict fields, a usable name, a centre on the detector."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints

from gpuem.analyses import View
from gpuem.errors import RecipeError

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]


class Model(BaseModel):
    """Base of the analyses' schemas: unknown keys are errors, values don't change."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)


def center_on(view: View, center: tuple[float, float] | None, name: str) -> tuple[float, float]:
    """The centre (y, x) in px, the geometric one by default; raises RecipeError where it lies off the detector."""
    height, width = view.frame_shape
    if center is None:
        return (height - 1) / 2, (width - 1) / 2
    if not (-0.5 <= center[0] <= height - 0.5 and -0.5 <= center[1] <= width - 0.5):
        raise RecipeError(
            f"{name}: centre (y, x) = ({center[0]:g}, {center[1]:g}) px lies outside the detector of "
            f"{height}x{width} pixels (0 to {height - 1}, 0 to {width - 1})"
        )
    return center
