"""What all analyses have in common as models: strict fields, a usable name, a centre on the detector."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from gpuem.analyses import View
from gpuem.errors import RecipeError
from gpuem.messages import reason, shown

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]


class Model(BaseModel):
    """Base of the analyses' schemas: unknown keys are errors, values don't change."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)

    def __init__(self, *args: Any, **fields: Any) -> None:
        kind = type(self).__name__
        if args:
            raise RecipeError(
                f"{kind}({', '.join(map(shown, args))}): give fields by their names, {kind}(name=..., ...); "
                f"they are {', '.join(type(self).model_fields)}"
            )
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise RecipeError(_mistakes(type(self), error)) from None

    # recipes are checked without coming through here, so that each mistake keeps its place
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except ValidationError:
            raise RecipeError(
                f"{type(self).__name__}.{name}: an analysis doesn't change; make another: "
                f"model_copy(update={{{name!r}: ...}})"
            ) from None


def _mistakes(model: type[BaseModel], error: ValidationError) -> str:
    """All mistakes of the arguments of an analysis in one line."""
    found: dict[str, list[str]] = {}
    for item in error.errors():
        found.setdefault(str(item["loc"][0]) if item["loc"] else "", []).append(reason(item, list(model.model_fields)))
    return f"{model.__name__}: " + "; ".join(
        f"{name}: {'; or: '.join(reasons)}" if name else "; or: ".join(reasons) for name, reasons in found.items()
    )


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
