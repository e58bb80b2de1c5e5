"""Takes the place of CuPy in tests: gpuem's whole CUDA path on a machine without a GPU.

    with standin.installed("late") as device:   # or the fixture `standin_device`
        import cupy                             # is the stand-in
        ...
        assert device.peak_bytes < 1 << 20

It offers the few calls of CuPy that gpuem uses and names whatever else is asked for. Kernels are compiled by g++ and
run on the CPU (`emulation`); streams run as late as they may; memory is garbage before it is written and after it is
freed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

from standin import fft, kernels, memory, streams
from standin.device import CUDADriverError, CUDARuntimeError, Device, OutOfMemoryError
from standin.streams import Strict, device

__all__ = ["SCHEDULES", "Device", "installed", "modules", "standin_device"]

SCHEDULES = ("late", "early", "random(0)", "random(1)")
VERSION = "14.2.0"


class StandInModule(ModuleType):
    """A module that names what it doesn't offer."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{self.__name__}.{name} is not among the few calls of CuPy that the stand-in offers")


class CupyDevice(Strict):
    """cupy.cuda.Device."""

    def __init__(self, device: int | None = None) -> None:
        self._device = streams.device()
        self._device.require()
        if device not in (None, 0) or not self._device.devices:
            raise CUDARuntimeError(100)

    @property
    def id(self) -> int:
        return 0

    @property
    def compute_capability(self) -> str:
        return self._device.compute_capability

    @property
    def mem_info(self) -> tuple[int, int]:
        with self._device.locked():
            return self._device.memory_nbytes - self._device.pool_bytes, self._device.memory_nbytes

    @property
    def attributes(self) -> dict[str, int]:
        return {"MultiProcessorCount": self._device.multiprocessors}

    def synchronize(self) -> None:
        self._device.synchronize()


def _get_device_count() -> int:
    device().require()
    return device().devices


def _get_device_properties(device: int) -> dict[str, Any]:
    CupyDevice(device)
    return {"name": b"Stand-in for a GPU", "multiProcessorCount": streams.device().multiprocessors}


def _driver_version() -> int:
    return 0 if device().driver_error == 35 else 13000


def modules() -> dict[str, StandInModule]:
    """The modules of the stand-in by their names; those that are no modules of their own in CuPy are attributes."""

    def module(name: str, **content: Any) -> StandInModule:
        made = StandInModule(name)
        vars(made).update(content)
        return made

    nvrtc_names = (
        *("NVRTCError", "addNameExpression", "compileProgram", "createProgram", "destroyProgram", "getCUBIN"),
        *("getLoweredName", "getProgramLog", "getVersion"),
    )
    nvrtc = module("cupy.cuda.nvrtc", **{name: getattr(kernels, name) for name in nvrtc_names})
    runtime = module(
        "cupy.cuda.runtime",
        CUDARuntimeError=CUDARuntimeError,
        getDeviceCount=_get_device_count,
        getDeviceProperties=_get_device_properties,
        driverGetVersion=_driver_version,
        runtimeGetVersion=lambda: 13000,
    )
    driver = module("cupy.cuda.driver", CUDADriverError=CUDADriverError)
    memory_module = module("cupy.cuda.memory", OutOfMemoryError=OutOfMemoryError)
    cufft = module("cupy.cuda.cufft", CuFFTError=fft.CuFFTError, getVersion=fft.getVersion)
    fft_module = module("cupy.fft", rfft2=fft.rfft2, irfft2=fft.irfft2)
    cuda = module(
        "cupy.cuda",
        __path__=[],
        nvrtc=nvrtc,
        runtime=runtime,
        driver=driver,
        memory=memory_module,
        cufft=cufft,
        Stream=streams.Stream,
        Event=streams.Event,
        get_elapsed_time=streams.get_elapsed_time,
        Device=CupyDevice,
        alloc_pinned_memory=memory.alloc_pinned_memory,
    )
    cupy = module(
        "cupy",
        __path__=[],
        __version__=VERSION,
        cuda=cuda,
        fft=fft_module,
        ndarray=memory.ndarray,
        empty=memory.empty,
        zeros=memory.zeros,
        RawModule=kernels.RawModule,
        get_default_memory_pool=memory.get_default_memory_pool,
    )
    return {m.__name__: m for m in (cupy, cuda, memory_module, runtime)}


@contextmanager
def installed(schedule: str = "late", **knobs: Any) -> Iterator[Device]:
    """Put the stand-in in CuPy's place, with a new device; afterwards all is as it was.

    Compiled kernels are kept in a folder of their own, and what gpuem has cached of a device is forgotten at both ends.
    """
    simulated = Device(schedule, **knobs)
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "cupy"}
    folder = os.environ.get("GPUEM_KERNEL_CACHE")
    streams.installed.append(simulated)
    sys.modules.update(modules())
    forget()
    try:
        with tempfile.TemporaryDirectory(prefix="gpuem-kernels-") as temporary:
            os.environ["GPUEM_KERNEL_CACHE"] = temporary
            yield simulated
    finally:
        forget()
        streams.installed.remove(simulated)
        for name in [name for name in sys.modules if name.split(".")[0] == "cupy"]:
            del sys.modules[name]
        sys.modules.update(kept)
        os.environ.pop("GPUEM_KERNEL_CACHE")
        if folder is not None:
            os.environ["GPUEM_KERNEL_CACHE"] = folder


def forget() -> None:
    """Clear what gpuem's modules keep of a device: results of cached functions, and kernels that were loaded.

    The modules themselves stay: other modules hold their classes.
    """
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != "gpuem":
            continue
        for value in list(vars(module).values()):
            if hasattr(value, "cache_clear") and getattr(value, "__module__", "") == name:
                value.cache_clear()
        if name.startswith("gpuem.backends.cuda") and isinstance(getattr(module, "_loaded", None), dict):
            module._loaded.clear()


@pytest.fixture
def standin_device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """The stand-in for one test; a parameter is the schedule, or a dict of the device's knobs."""
    given = getattr(request, "param", "late")
    with installed(**given if isinstance(given, dict) else {"schedule": given}) as simulated:
        yield simulated
