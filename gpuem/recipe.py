"""Recipes: TOML in, checked models out, every mistake at once with its place and the nearest right word."""

from __future__ import annotations

import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from gpuem.analyses.bragg import Bragg
from gpuem.analyses.com import CenterOfMass
from gpuem.analyses.strain import Strain
from gpuem.analyses.sums import Sum
from gpuem.analyses.virtual import VirtualDetector
from gpuem.errors import RecipeError

# the one list of all kinds: what a recipe may say, and what is said of it where it says something else
AnyAnalysis = Annotated[Sum | VirtualDetector | CenterOfMass | Strain | Bragg, Field(discriminator="kind")]
KINDS: dict[str, type[BaseModel]] = {
    str(model.model_fields["kind"].default): model for model in get_args(get_args(AnyAnalysis)[0])
}

# names that have a meaning of their own in a result
RESERVED = ("valid", "zarr.json", "scan_y", "scan_x", "detector_y", "detector_x", "term", "component", "peak")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Input(_Section):
    """``[input]``: the data, and what the file doesn't say."""

    path: Path | list[Path]
    format: str | None = None
    scan: list[int] | None = None
    frame: tuple[int, int] | None = None
    dtype: str | None = None
    offset: int | None = None
    header: int | None = None
    footer: int | None = None
    dataset: str | None = None
    skip: int = 0
    fit: bool = False
    roi: list[int] | Path | None = Field(
        default=None, description="first and end (excluded) for every scan axis, or a boolean .npy of scan shape"
    )


class Calibration(_Section):
    """``[calibration]``: pixel sizes where the file doesn't give them."""

    scan_step: float | tuple[float, float] | None = None
    scan_unit: str | None = None
    detector_step: float | tuple[float, float] | None = None
    detector_unit: str | None = None


class Correction(_Section):
    """``[correction]``: (pixel - dark) * gain for every frame, then dead pixels from their neighbours."""

    dark: Path | None = Field(default=None, description="a .npy or .tif of detector shape, subtracted")
    gain: Path | None = Field(default=None, description="a .npy or .tif of detector shape, multiplied with then")
    dead: Path | list[tuple[int, int]] | None = Field(
        default=None, description="a .npy or .tif of detector shape, 1 for a dead pixel; or positions [[y, x], ...]"
    )


class Run(_Section):
    """``[run]``: where and how."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    threads: int | None = Field(default=None, ge=1)
    memory: str | StrictInt | None = Field(default=None, description='bytes, or "4 GB"')
    device_memory: str | StrictInt | None = Field(default=None, description='of the GPU: bytes, or "20 GB"')
    transfer: Literal["auto", "pinned", "gds"] = Field(default="auto", description="how bytes reach the GPU")
    on_error: Literal["stop", "mask"] = "stop"


class Output(_Section):
    """``[output]``: where the maps go."""

    path: Path
    previews: bool = True


class Recipe(_Section):
    """A whole recipe."""

    input: Input
    analysis: list[AnyAnalysis] = Field(min_length=1)
    calibration: Calibration = Calibration()
    correction: Correction = Correction()
    run: Run = Run()
    output: Output


def load(path: Path) -> tuple[Recipe, str]:
    """Read a recipe; relative paths in it count from the recipe's folder.

    Returns
    -------
    recipe : Recipe
        The checked recipe with absolute paths.
    text : str
        The file verbatim.

    Raises
    ------
    RecipeError
        The file is missing, not TOML, or says something impossible: all mistakes at once.
    """
    try:
        text = path.read_text(encoding="utf-8")
        raw = tomllib.loads(text)
    except FileNotFoundError:
        there = [p.name for p in path.parent.glob("*.toml")]
        near = get_close_matches(path.name, there, 1)
        raise RecipeError(f"{path.absolute()}: no such recipe{f'; did you mean {near[0]}?' if near else ''}") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: a folder, not a recipe; to look at a result use gpuem info") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not a text file; a recipe is TOML and names the data in [input]") from None
    except OSError as error:
        raise RecipeError(f"{path}: can't be read: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        hint = (
            "; every analysis begins with [[analysis]], in double brackets" if "Cannot overwrite" in str(error) else ""
        )
        raise RecipeError(f"{path}: not TOML: {error}{hint}") from error
    if isinstance(raw.get("analysis"), dict):
        raise RecipeError(f"{path}: every analysis begins with [[analysis]], in double brackets")
    recipe = check(raw, str(path))
    return _absolute(recipe, path.resolve().parent), text


def check(raw: dict[str, Any], where: str) -> Recipe:
    """Check a recipe given as a dictionary; raises RecipeError with every mistake."""
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        lines = [f"  {_place(e, raw)}: {_reason(e)}" for e in error.errors()]
        count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        raise RecipeError(f"{where}: {count}\n" + "\n".join(lines)) from None
    check_names([a.name for a in recipe.analysis])
    return recipe


def run_section(**options: Any) -> Run:
    """The arguments of `gpuem.run` as a checked ``[run]`` section; raises RecipeError."""
    try:
        return Run.model_validate(options)
    except ValidationError as error:
        found = [(e["loc"][0], _reason({**e, "loc": ("run", *e["loc"])})) for e in error.errors()]
        raise RecipeError("; ".join(f"{name}: {reason}" for name, reason in found)) from None


def check_names(names: list[str]) -> None:
    """Raise RecipeError unless the analyses' names differ."""
    for name in names:
        if name in RESERVED or len(name) > 100:
            raise RecipeError(f'analysis name "{name}": this name is taken or too long; choose another')
        if names.count(name) > 1:
            raise RecipeError(
                f'analysis name "{name}" is used {names.count(name)} times; give each its own name = "..."'
            )


def parse_memory(value: str | int, key: str = "memory") -> int:
    """Bytes from ``4000000000``, ``"4 GB"`` or ``"512 MiB"``; raises RecipeError, which names `key`."""
    units = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    text = str(value).strip().lower()
    number = text.rstrip("bkmgti ")
    unit = text[len(number) :].strip() or "b"
    try:
        nbytes = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        raise RecipeError(f'{key} {value!r}: write bytes, "500 MB" or "4 GB"') from None
    if nbytes <= 0:
        raise RecipeError(f"{key} {value!r}: must be positive")
    return nbytes


def _absolute(recipe: Recipe, folder: Path) -> Recipe:
    def fix(path: Path) -> Path:
        return folder / path.expanduser()

    data = recipe.input
    paths = [fix(p) for p in data.path] if isinstance(data.path, list) else fix(data.path)
    roi = fix(data.roi) if isinstance(data.roi, Path) else data.roi
    analyses = [
        a.model_copy(update={name: fix(value) for name, value in a if isinstance(value, Path)}) for a in recipe.analysis
    ]
    correction = {name: fix(value) if isinstance(value, Path) else value for name, value in recipe.correction}
    return recipe.model_copy(
        update={
            "input": data.model_copy(update={"path": paths, "roi": roi}),
            "correction": Correction(**correction),
            "analysis": analyses,
            "output": recipe.output.model_copy(update={"path": fix(recipe.output.path)}),
        }
    )


def _place(error: Any, raw: dict[str, Any]) -> str:
    """``[[analysis]] 2 (virtual) inner`` for people who look at the file."""
    loc = list(error["loc"])
    if loc and loc[0] == "analysis" and len(loc) > 1 and isinstance(loc[1], int):
        entry = raw["analysis"][loc[1]] if isinstance(raw.get("analysis"), list) else {}
        kind = entry.get("kind", "?") if isinstance(entry, dict) else "?"
        rest = [str(p) for p in loc[2:] if p != kind]
        return f"[[analysis]] {loc[1] + 1} ({kind})" + (f", {'.'.join(rest)}" if rest else "")
    head, *rest = [str(p) for p in loc] or ["recipe"]
    return f"[{head}]" + (f" {rest[0]}" if rest else "")


def _reason(error: Any) -> str:
    kind, loc = error["type"], error["loc"]
    if kind == "extra_forbidden":
        known = _known(loc)
        near = get_close_matches(str(loc[-1]), known, 1, 0.5)
        return "unknown key" + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}")
    if kind == "union_tag_invalid":
        tag, known = error["ctx"]["tag"], list(KINDS)
        near = get_close_matches(str(tag).lower(), known, 1, 0.4)
        return (
            f"kind {tag!r} is unknown"
            + (f"; did you mean {near[0]!r}?" if near else "")
            + f" (kinds: {', '.join(known)})"
        )
    if kind == "union_tag_not_found":
        return 'kind = "..." is missing'
    if kind == "missing":
        return "is missing"
    if kind == "literal_error":
        words = [word.strip("'") for word in str(error["ctx"]["expected"]).replace(" or ", ", ").split(", ")]
        said = str(error["input"]).lower()
        near = ["cuda"] if said == "gpu" and "cuda" in words else get_close_matches(said, words, 1, 0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{error['input']!r} is not one of {', '.join(words)}{hint}"
    message = str(error["msg"]).removeprefix("Value error, ")
    return message if kind == "value_error" else f"{message} (found {error.get('input')!r})"


def _known(loc: tuple[Any, ...]) -> list[str]:
    if len(loc) == 1:
        return list(Recipe.model_fields)
    if loc[0] == "analysis":
        return list(KINDS[loc[2]].model_fields)
    sections: dict[str, type[BaseModel]] = {
        "input": Input, "calibration": Calibration, "correction": Correction, "run": Run, "output": Output
    }  # fmt: skip
    return list(sections[loc[0]].model_fields)
