"""What analyses have in common as models: strict fields, a usable name, a centre on the detector."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError
from pydantic.json_schema import SkipJsonSchema

from gpuem.analyses import Sample, View
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


Center = tuple[float, float] | Literal["auto"] | None
# more frames than any sample holds
ALL_FRAMES = 1 << 30


class Centered(Model):
    """Base of analyses with a centre that can be measured.

    Parameters
    ----------
    center : tuple of float or "auto"
        Centre (y, x) in px; "auto": the direct beam, measured in a sample of frames.
    measured : dict
        What was measured in the sample, for the attributes of the maps; not for recipes.
    """

    center: Center = None
    measured: SkipJsonSchema[dict[str, float | str]] = {}

    @property
    def center_from(self) -> str:
        """Whose centre it is: geometric, given or measured."""
        if "direct_beam_y" in self.measured or self.center == "auto":
            return "measured"
        return "geometric" if self.center is None else "given"

    def sample_frames(self, view: View) -> int:
        """How many frames it wants to see beforehand."""
        return ALL_FRAMES if self.center == "auto" else 0

    def look(self, view: View, sample: Sample) -> Self:
        """With the direct beam as its centre, where that is to be measured; raises DataError where it can't be."""
        if self.center != "auto":
            return self
        beam = sample.direct_beam
        return self.model_copy(update={"center": beam.center, "measured": {**self.measured, **beam.attributes}})

    def center_in(self, view: View) -> tuple[float, float]:
        """The centre (y, x) in px; a measured one may lie off the detector, where a beam is partly outside."""
        if self.center_from == "measured" and isinstance(self.center, tuple):
            return self.center
        return center_on(view, self.center, str(getattr(self, "name", "")))

    def center_facts(self, view: View) -> dict[str, Any]:
        """The centre in px, where it comes from, and what was measured of the direct beam."""
        y, x = self.center_in(view)
        return {"center_y": float(y), "center_x": float(x), "center_from": self.center_from, **self.measured}


def center_on(view: View, center: Center, name: str) -> tuple[float, float]:
    """The centre (y, x) in px, the geometric one by default; raises RecipeError off the detector, or yet unmeasured."""
    height, width = view.frame_shape
    if center is None:
        return (height - 1) / 2, (width - 1) / 2
    if center == "auto":
        raise RecipeError(f'{name}: center = "auto" is measured in a sample of frames first; use gpuem.run')
    if not (-0.5 <= center[0] <= height - 0.5 and -0.5 <= center[1] <= width - 0.5):
        raise RecipeError(
            f"{name}: centre (y, x) = ({center[0]:g}, {center[1]:g}) px lies outside the detector of "
            f"{height}x{width} pixels (0 to {height - 1}, 0 to {width - 1})"
        )
    return center
