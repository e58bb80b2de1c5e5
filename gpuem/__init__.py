"""gpuem streams detector frames once, from storage through a GPU or the processor, and leaves maps behind.

>>> import gpuem
>>> ds = gpuem.open("scan.mib", scan=(256, 256))                              # doctest: +SKIP
>>> res = gpuem.run(ds, [gpuem.Sum(), gpuem.CenterOfMass()])                  # doctest: +SKIP
>>> res["com/x"].data                                                         # doctest: +SKIP

Importing this package loads nothing heavy: names are fetched when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpuem.analyses import Map
    from gpuem.analyses.bragg import Bragg
    from gpuem.analyses.com import CenterOfMass
    from gpuem.analyses.strain import Strain
    from gpuem.analyses.sums import Sum
    from gpuem.analyses.virtual import VirtualDetector
    from gpuem.dataset import Dataset, open  # noqa: A004
    from gpuem.errors import (
        DataError,
        DeviceError,
        GpuemError,
        InputError,
        OutputError,
        PlanError,
        RecipeError,
        TruncatedError,
    )
    from gpuem.job import run, run_recipe
    from gpuem.many import run_recipes
    from gpuem.results import Results, load_results

_WHERE = {
    "Bragg": "analyses.bragg",
    "CenterOfMass": "analyses.com",
    "DataError": "errors",
    "Dataset": "dataset",
    "DeviceError": "errors",
    "GpuemError": "errors",
    "InputError": "errors",
    "Map": "analyses",
    "OutputError": "errors",
    "PlanError": "errors",
    "RecipeError": "errors",
    "Results": "results",
    "Strain": "analyses.strain",
    "Sum": "analyses.sums",
    "TruncatedError": "errors",
    "VirtualDetector": "analyses.virtual",
    "load_results": "results",
    "open": "dataset",
    "run": "job",
    "run_recipe": "job",
    "run_recipes": "many",
}

__all__ = [
    "Bragg",
    "CenterOfMass",
    "DataError",
    "Dataset",
    "DeviceError",
    "GpuemError",
    "InputError",
    "Map",
    "OutputError",
    "PlanError",
    "RecipeError",
    "Results",
    "Strain",
    "Sum",
    "TruncatedError",
    "VirtualDetector",
    "load_results",
    "open",
    "run",
    "run_recipe",
    "run_recipes",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"gpuem.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'gpuem' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
