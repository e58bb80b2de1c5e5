"""What a cluster wants in every job script: account, partition, modules, container; a TOML file."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gpuem import messages, toml_file
from gpuem.errors import RecipeError
from gpuem.paths import local_path

USUAL = Path("~/.config/gpuem/site.toml")


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Container(_Table):
    """``[container]``: gpuem and all that it needs in an image."""

    kind: Literal["apptainer", "pyxis"]
    image: str
    mounts: list[str] = Field(default=[], description="outside:inside, as the container's program writes it")
    options: list[str] = Field(default=[], description="of apptainer exec; with pyxis, of srun")


class Site(_Table):
    """A site file."""

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    cpus_per_task: int | None = Field(default=None, ge=1)
    memory: str | None = Field(default=None, description='--mem of sbatch: "200G"; "0" is all of a node')
    gpu_type: str | None = None
    gres: bool = Field(default=False, description="ask for GPUs by --gres=gpu:8 rather than --gpus-per-node=8")
    interface: str | None = Field(default=None, description="network of Dask: ib0")
    modules: list[str] = []
    setup: list[str] = Field(default=[], description="lines of bash, after the modules")
    sbatch: list[str] = Field(default=[], description='further options of sbatch: "--mail-type=END"')
    srun: list[str] = Field(default=[], description='further options of srun: "--mpi=none"')
    container: Container | None = None

    @property
    def steps_only(self) -> bool:
        """Everything must be started by srun, since only it opens the container."""
        return self.container is not None and self.container.kind == "pyxis"

    @property
    def programs(self) -> str:
        """Folder of this Python's programs, gpuem and dask among them."""
        return str(Path(sys.executable).absolute().parent)


def load(path: Path | None = None) -> Site:
    """Read a site file: the one given, that of ``$GPUEM_SITE``, or ``~/.config/gpuem/site.toml`` where it is.

    Raises
    ------
    RecipeError
        It is named but missing, not TOML, or says something unknown: all mistakes at once.
    """
    named = path or (Path(os.environ["GPUEM_SITE"]) if os.environ.get("GPUEM_SITE") else None)
    try:
        where = local_path(named or USUAL)
    except RecipeError:
        # an account without a home folder
        if named is None:
            return Site()
        raise
    if not where.exists():
        if named is None:
            return Site()
        raise RecipeError(f"{where}: no such site file; leave --site and $GPUEM_SITE away to do without")
    return check(toml_file.read(where, "site file")[1], str(where))


def check(raw: dict[str, Any], where: str) -> Site:
    """Check site settings given as a dictionary; raises RecipeError with every mistake."""
    try:
        site = Site.model_validate(raw)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc']))}: {_reason(e)}" for e in error.errors()]
        count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        raise RecipeError(f"{where}: {count}\n" + "\n".join(lines)) from None
    for option in site.sbatch:
        if not option.startswith("-"):
            raise RecipeError(f'{where}: 1 mistake\n  sbatch: {option!r} is no option; write "--mail-type=END"')
    for line in (*site.sbatch, *site.modules, *site.srun):
        if "\n" in line:
            raise RecipeError(f"{where}: 1 mistake\n  {line!r}: one line each, please")
    return site


def _reason(error: Any) -> str:
    known = (Container if error["loc"][0] == "container" else Site).model_fields
    return messages.reason(error, list(known))
