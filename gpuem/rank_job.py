"""A recipe run by processes that a launcher numbered: rank 0 leads, the others assist."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from gpuem import identity, job, prepared, recipe, run_folder, sampling
from gpuem.errors import InputError
from gpuem.executors import ranks
from gpuem.region import region
from gpuem.results import Results
from gpuem.run_folder import RunFolder


def lead(path: str | os.PathLike[str], rank: ranks.Rank, **options: Any) -> tuple[Results, Path]:
    """`gpuem.job.run_recipe` as rank 0."""
    changes = {name: options[name] for name in ("input", "workers", "scheduler") if name in options}
    folder = run_folder.beside(recipe.load_one(Path(path), **changes)[0].output.path)
    found = job.run_recipe(path, crew=ranks.Collector(rank, folder), **options)
    run_folder.say_launch(folder, rank.launch, over=True)
    return found


def assist(path: str | os.PathLike[str], rank: ranks.Rank, **changes: Any) -> None:
    """Run the share of a rank other than 0.

    Raises
    ------
    ResumableError
        The run ended early; finished shards are kept.
    """
    asked, _ = recipe.load_one(Path(path), **changes)
    folder = run_folder.beside(asked.output.path)
    if not ranks.wait_for_launch(folder, rank, asked.run.patience):
        return
    with RunFolder(folder, rank=rank.number) as kept, ranks.marked(kept, rank):
        ds = job.open_input(asked)
        try:
            wanted = region(ds.scan_shape, asked.input.roi)
            looked = prepared.load(
                folder, asked.analysis, sampling.view_of(ds), lambda some: sampling.look(ds, some, wanted)
            )
            mine = job.prepare(ds, looked, asked.run, asked.input.roi)
        except InputError:
            if ranks.wait_for_launch(folder, rank, asked.run.patience):
                raise
            # all was done before this rank came
            return
        then = (run_folder.description(folder) or {}).get("identity", {})
        now = identity.of_analyses(asked.analysis, identity.version())
        identity.refuse_another(folder, then, {**now, **identity.of_cuts(mine)})
        ranks.assist(mine, rank, kept)
