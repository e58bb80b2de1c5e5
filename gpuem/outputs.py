"""Where a recipe writes, and that nothing of it lies on, in or around what it reads or what another result needs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from gpuem import results, run_folder, staging
from gpuem.dataset import Dataset
from gpuem.errors import OutputError
from gpuem.recipe import Recipe


def previews_folder(result: Path) -> Path:
    """Where the pictures of a result go."""
    folder = result.parent / (result.name.removesuffix(".zarr") + ".previews")
    return result.parent / f"{result.name}.pictures" if folder == result else folder


def places(recipe: Recipe) -> dict[Path, str]:
    """What a recipe of one data set writes, and what that is."""
    path = recipe.output.path
    found = {path: "the result", run_folder.beside(path): "the folder of the run"}
    return found | ({previews_folder(path): "the folder of the pictures"} if recipe.output.previews else {})


def inputs(recipe: Recipe, ds: Dataset | None = None) -> dict[Path, str]:
    """What a recipe reads, as far as it says so; of an open data set all files."""
    data = recipe.input
    named = [*(data.path if isinstance(data.path, list) else [data.path]), *(data.each or []), data.roi]
    tables = [value for _, value in recipe.correction]
    asked = [value for analysis in recipe.analysis for _, value in analysis]
    found = {path: "the input" for path in (*named, *tables, *asked) if isinstance(path, Path)}
    if ds is not None:
        found |= {file.path: "the input" for file in ds.source.files if isinstance(file.path, Path)}
    return found


def begin(recipe: Recipe, path: Path, *, overwrite: bool, resume: bool) -> None:
    """Restore a result whose replacement was cut off, then `check`; one that is there stays where a run is resumed."""
    results.refuse_impossible(recipe.output.path)
    staging.restore(recipe.output.path.parent)
    check(recipe, path, overwrite=overwrite, finished=resume and results.is_result(recipe.output.path))


def check(recipe: Recipe, path: Path | None, *, overwrite: bool, finished: bool = False) -> None:
    """Raise OutputError where a run would find at its end that it can't write, or would replace what isn't gpuem's.

    Parameters
    ----------
    recipe : Recipe
        Of one data set.
    path : Path
        Its file.
    overwrite : bool
        Whether a result that is there is replaced.
    finished : bool
        Whether the result that is there stays.
    """
    for place in places(recipe):
        # the folder of the run and the pictures have longer names
        results.refuse_impossible(place)
    refuse_overlaps(places(recipe), inputs(recipe) | ({} if path is None else {path: "the recipe"}))
    if not finished:
        results.check_writable(recipe.output.path, overwrite=overwrite)
    run_folder.refuse_foreign(run_folder.beside(recipe.output.path))


def check_campaign(alone: Mapping[str, Recipe], path: Path, summary: Path) -> None:
    """Raise OutputError where one of many data sets would write on, in or around what another one reads or writes."""
    read: dict[Path, str] = {path: "the recipe"}
    for recipe in alone.values():
        results.refuse_impossible(recipe.output.path)
        read |= inputs(recipe)
    written = {summary: "the summary"}
    for name, recipe in alone.items():
        own = {place: f"{what} of {name}" for place, what in places(recipe).items()}
        both = [place for place in own if place in written]
        if both:
            raise OutputError(f"{both[0]}: {own[both[0]]} and {written[both[0]]}; choose another [output] path")
        written |= own
    refuse_overlaps(written, read)
    refuse_overlaps(written, written)


def refuse_overlaps(written: Mapping[Path, str], read: Mapping[Path, str]) -> None:
    """Raise OutputError where something that is written is, holds or lies in something that is read.

    Symlinks are looked through: what counts is where files really lie.
    """
    around: dict[str, tuple[Path, str]] = {}
    exact: dict[str, tuple[Path, str]] = {}
    for path, what in read.items():
        for spelling in _spellings(path):
            exact.setdefault(spelling, (path, what))
            for parent in _above(spelling):
                around.setdefault(parent, (path, what))
    for path, what in written.items():
        for spelling in _spellings(path):
            clashes = (
                *(("is", exact.get(spelling)), ("would lie around", around.get(spelling))),
                *(("would lie in", exact.get(parent)) for parent in _above(spelling)),
            )
            for words, other in clashes:
                # a place is no clash with itself
                if other is not None and other != (path, what):
                    raise OutputError(
                        f"{path}: {what} {words} {other[1]}, {other[0]}; nothing was written. Choose another [output] "
                        "path"
                    )


def _spellings(path: Path) -> Iterable[str]:
    """A path as it is written, and where it really is."""
    absolute = os.path.abspath(path)  # noqa: PTH100
    return {absolute, os.path.realpath(absolute)}


def _above(path: str) -> Iterable[str]:
    return map(str, Path(path).parents)
