"""Recipes: TOML in, checked models out, every mistake at once with its place and the nearest right word."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, model_validator

from gpuem import data_sets, messages, toml_file
from gpuem.analyses.bragg import Bragg
from gpuem.analyses.com import CenterOfMass
from gpuem.analyses.strain import Strain
from gpuem.analyses.sums import Sum
from gpuem.analyses.virtual import VirtualDetector
from gpuem.errors import RecipeError
from gpuem.formats.remote import Place
from gpuem.messages import shown
from gpuem.paths import local_path

# the one list of all kinds: what a recipe may say, and what is said of it where it says something else
AnyAnalysis = Annotated[Sum | VirtualDetector | CenterOfMass | Strain | Bragg, Field(discriminator="kind")]
KINDS: dict[str, type[BaseModel]] = {
    str(model.model_fields["kind"].default): model for model in get_args(get_args(AnyAnalysis)[0])
}

# names that have a meaning of their own in a result
RESERVED = ("valid", "zarr.json", "scan_y", "scan_x", "detector_y", "detector_x", "term", "component", "peak")
# of a scheduler: tcp://host:port, or without the first part
_ADDRESS = re.compile(r"[\w+.-]+://.*|[\w.-]+:\d+|\[[0-9a-fA-F:]+\]:\d+")
# in [output] path, what stands for the name of a data set
NAME = "{name}"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Copy(_Section):
    """``[[input.copy]]``: machines that have the files on their own disks, too, and are to read them there."""

    hosts: list[str] = Field(min_length=1, description='patterns of the names of machines: ["node0[1-4]", "gpu*"]')
    folder: Path = Field(description="where the files lie there, under the same names")
    files: list[str] = Field(default=["*"], min_length=1, description="patterns of the names of those files")

    @model_validator(mode="after")
    def _whole_path(self) -> Copy:
        if not self.folder.is_absolute():
            raise ValueError(f"folder {str(self.folder)!r}: give the whole path, as it is on those machines")
        return self


class Input(_Section):
    """``[input]``: the data, and what the file doesn't say."""

    each: data_sets.Each = Field(default=None, description="data sets that are run one by one: files, URLs, patterns")
    path: data_sets.Whole = Field(
        default_factory=list,
        validate_default=True,
        description="a file, several that belong together, or a pattern (*.mib): every match a data set of its own",
    )
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
    follow_links: bool = Field(
        default=False, description="read also files outside the folder of the data where the data names them"
    )
    roi: list[int] | Path | None = Field(
        default=None, description="first and end (excluded) for every scan axis, or a boolean .npy of scan shape"
    )

    copies: list[Copy] = Field(default_factory=list, alias="copy")

    @model_validator(mode="after")
    def _path_or_each(self) -> Input:
        if self.each and self.path != []:
            raise ValueError("path is one data set or a pattern, each is a list of data sets: give one of them")
        return self


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
    workers: Literal["all"] | Annotated[int, Field(ge=1)] | None = Field(
        default=None, description='worker processes to start: a number, or "all" GPUs or processors'
    )
    scheduler: str | None = Field(default=None, description="of Dask workers that are there: an address, or its file")
    patience: float = Field(default=120.0, ge=0.0, description="seconds for which what may pass is tried again")

    @model_validator(mode="after")
    def _one_of_them(self) -> Run:
        if self.workers is not None and self.scheduler is not None:
            raise ValueError("workers are started here, scheduler names workers that are there: give one of them")
        return self


class Output(_Section):
    """``[output]``: where the maps go."""

    path: Path = Field(description='a folder; "{name}" in it stands for the name of the data file without its suffix')
    previews: bool = True


class Recipe(_Section):
    """A whole recipe."""

    input: Input
    analysis: list[AnyAnalysis] = Field(min_length=1)
    calibration: Calibration = Calibration()
    correction: Correction = Correction()
    run: Run = Run()
    output: Output


def load(path: Path, **changes: Any) -> tuple[Recipe, str]:
    """Read a recipe; relative paths in it count from the recipe's folder.

    Parameters
    ----------
    path : path
        The file.
    **changes
        What is said otherwise on the command line, where paths count from the current folder: ``input`` (path of the
        data), ``workers``, ``scheduler``; None changes nothing.

    Returns
    -------
    recipe : Recipe
        The checked recipe with absolute paths. Where it is of several data sets, ``input.each`` lists them, patterns
        resolved; see `one_by_one`.
    text : str
        The file verbatim.

    Raises
    ------
    RecipeError
        The file is missing, not TOML, or says something impossible: all mistakes at once. Or a pattern finds nothing.
    """
    text, raw = toml_file.read(path)
    if isinstance(raw.get("analysis"), dict):
        raise RecipeError(f"{path}: every analysis begins with [[analysis]], in double brackets")
    recipe = _found(_absolute(check(_changed(raw, **changes), str(path)), path.resolve().parent))
    if not recipe.output.path.name:
        raise RecipeError(f"{path}: [output] path {str(recipe.output.path)!r}: no name for a result, as out.zarr")
    if recipe.input.each and NAME not in str(recipe.output.path):
        example = recipe.output.path.with_name(f"{NAME}.{recipe.output.path.name}").name
        raise RecipeError(
            f"{path}: [input] names data sets to be run one by one ({len(recipe.input.each):,}); [output] path needs "
            f'"{NAME}" in it, which becomes the name of each, as "{example}"; else all results would go to one place'
        )
    return recipe, text


def one_by_one(recipe: Recipe) -> dict[str, Recipe]:
    """Recipes of one data set each, by the name of its data set, which takes the place of ``{name}``.

    Raises
    ------
    RecipeError
        Two data sets can't be told apart by their names.
    """
    data, output = recipe.input, recipe.output
    whole = data.path if isinstance(data.path, list) else [data.path]
    if data.each is None and NAME not in str(output.path):
        return {whole[0].stem: recipe}
    return {
        name: recipe.model_copy(
            update={
                "input": data.model_copy(update={"path": data.path if data.each is None else one, "each": None}),
                "output": output.model_copy(update={"path": Path(str(output.path).replace(NAME, name))}),
            }
        )
        for name, one in data_sets.named(whole[:1] if data.each is None else data.each).items()
    }


def load_one(path: Path, **changes: Any) -> tuple[Recipe, str]:
    """`load` a recipe of one data set, its name in place; raises RecipeError also where there are several."""
    recipe, text = load(path, **changes)
    return only(recipe), text


def only(recipe: Recipe) -> Recipe:
    """The recipe of the one data set, its name in place; raises RecipeError where there are several."""
    if recipe.input.each is not None:
        raise RecipeError(
            f"[input] names data sets to be run one by one ({len(recipe.input.each):,}): gpuem run and "
            "gpuem.run_recipes do that; to run one of them, name it (--input FILE, input=...)"
        )
    return next(iter(one_by_one(recipe).values()))


def _changed(raw: Any, input: Any = None, workers: Any = None, scheduler: Any = None, **others: Any) -> Any:  # noqa: A002
    """A recipe with what the command line says otherwise, where paths count from the current folder."""
    for key in others:
        raise RecipeError(f"{key}: unknown; what may be said otherwise is input, workers, scheduler")
    if scheduler is not None and not isinstance(scheduler, str | os.PathLike):
        raise RecipeError(f"scheduler {shown(scheduler)}: needed is an address, or the path of its file")
    scheduler = None if scheduler is None else _located(os.fspath(scheduler), Path.cwd())
    run = {key: value for key, value in (("workers", workers), ("scheduler", scheduler)) if value is not None}
    if run and isinstance(raw.get("run", {}), dict):
        kept = {key: value for key, value in raw.get("run", {}).items() if key not in ("workers", "scheduler")}
        raw = {**raw, "run": {**kept, **run}}
    if input is not None and isinstance(raw.get("input"), dict):
        path = input if "://" in str(input) else str(Path.cwd() / local_path(input))
        kept = {key: value for key, value in raw["input"].items() if key != "each"}
        raw = {**raw, "input": {**kept, "path": path}}
    return raw


def check(raw: dict[str, Any], where: str) -> Recipe:
    """Check a recipe given as a dictionary; raises RecipeError with every mistake."""
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        # what fits none of several kinds of value is one mistake
        found: dict[str, list[str]] = {}
        for e in error.errors():
            found.setdefault(_place(e, raw), []).append(_reason(e))
        lines = [f"  {place}: {'; or: '.join(reasons)}" for place, reasons in found.items()]
        count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        raise RecipeError(f"{where}: {count}\n" + "\n".join(lines)) from None
    check_names([a.name for a in recipe.analysis])
    return recipe


def run_section(**options: Any) -> Run:
    """The arguments of `gpuem.run` as a checked ``[run]`` section; raises RecipeError."""
    try:
        return Run.model_validate(options)
    except ValidationError as error:
        found: dict[str, list[str]] = {}
        for e in error.errors():
            found.setdefault(str(e["loc"][0]) if e["loc"] else "", []).append(_reason({**e, "loc": ("run", *e["loc"])}))
        raise RecipeError(
            "; ".join(f"{name}: {'; or: '.join(why)}".removeprefix(": ") for name, why in found.items())
        ) from None


def check_names(names: list[str]) -> None:
    """Raise RecipeError unless the analyses' names differ."""
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) or name in RESERVED or len(name) > 100:
            raise RecipeError(
                f"analysis name {shown(name)}: this name is taken or too long, or holds other signs than letters, "
                "digits, _ . - (it becomes the name of a folder); choose another"
            )
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
        raise RecipeError(f'{key} {shown(value)}: write bytes, "500 MB" or "4 GB"') from None
    if nbytes <= 0:
        raise RecipeError(f"{key} {shown(value)}: must be positive")
    return nbytes


def _absolute(recipe: Recipe, folder: Path) -> Recipe:
    def fix(path: Path) -> Path:
        return folder / local_path(path, folder)

    def locate(place: Place) -> Place:
        return fix(place) if isinstance(place, Path) else place

    data = recipe.input
    paths = [locate(p) for p in data.path] if isinstance(data.path, list) else locate(data.path)
    each = None if data.each is None else [locate(p) for p in data.each]
    roi = fix(data.roi) if isinstance(data.roi, Path) else data.roi
    analyses = [
        a.model_copy(update={name: fix(value) for name, value in a if isinstance(value, Path)}) for a in recipe.analysis
    ]
    correction = {name: fix(value) if isinstance(value, Path) else value for name, value in recipe.correction}
    scheduler = None if recipe.run.scheduler is None else _located(recipe.run.scheduler, folder)
    return recipe.model_copy(
        update={
            "input": data.model_copy(update={"path": paths, "each": each, "roi": roi}),
            "correction": Correction(**correction),
            "run": recipe.run.model_copy(update={"scheduler": scheduler}),
            "analysis": analyses,
            "output": recipe.output.model_copy(update={"path": fix(recipe.output.path)}),
        }
    )


def _located(scheduler: str, folder: Path) -> str:
    """A scheduler by its address, or by its file, whose path is then whole."""
    return scheduler if _ADDRESS.fullmatch(scheduler) else str(folder / local_path(scheduler, folder))


def _found(recipe: Recipe) -> Recipe:
    """The recipe with the data sets that its patterns find."""
    data = recipe.input
    if data.each is not None:
        each = data_sets.expand(data.each, data.format, follow_links=data.follow_links)
    elif isinstance(data.path, Path) and data_sets.split(data.path)[1]:
        each = data_sets.expand([data.path], data.format, follow_links=data.follow_links)
    else:
        return recipe
    return recipe.model_copy(update={"input": data.model_copy(update={"path": [], "each": each})})


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
    kind = error["type"]
    if kind == "extra_forbidden":
        return messages.reason(error, _known(error["loc"]))
    if kind == "union_tag_invalid":
        tag, known = shown(error["ctx"]["tag"]), list(KINDS)
        near = messages.nearest(str(error["ctx"]["tag"]).lower()[:100], known, 0.4)
        return f"kind {tag} is unknown{near} (kinds: {', '.join(known)})"
    if kind == "union_tag_not_found":
        return 'kind = "..." is missing'
    return messages.reason(error)


def _known(loc: tuple[Any, ...]) -> list[str]:
    if len(loc) == 1:
        return list(Recipe.model_fields)
    if loc[0] == "analysis":
        # what a look at the data adds is not for recipes
        return [name for name in KINDS[loc[2]].model_fields if name != "measured"]
    sections: dict[str, type[BaseModel]] = {
        "input": Input, "calibration": Calibration, "correction": Correction, "run": Run, "output": Output
    }  # fmt: skip
    if loc[:2] == ("input", "copy") and len(loc) > 3:
        return list(Copy.model_fields)
    return [field.alias or name for name, field in sections[loc[0]].model_fields.items()]
