"""The GPU of this process: whether there is one that can be used, what it is, and its errors in words.

There is one GPU for each process, the first that the process sees; which that is, is said by CUDA_VISIBLE_DEVICES or
the scheduler, never by gpuem.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gpuem.errors import DeviceError

# Turing; older ones lack the instructions that the kernels are built on
OLDEST = 75
INSTALL = "pip install 'gpuem[cuda13]' (or cuda12 for drivers before 580)"


@dataclass(frozen=True)
class Gpu:
    """What is known of the GPU.

    Parameters
    ----------
    name : str
        As the driver names it.
    capability : str
        Compute capability, without the point.
    free, total : int
        Bytes of its memory.
    driver, runtime, cupy : str
        Newest CUDA version that the driver knows, the one in use, and CuPy's version.
    """

    name: str
    capability: str
    free: int
    total: int
    driver: str
    runtime: str
    cupy: str

    def __str__(self) -> str:
        return f"{self.name}, {self.free / 1e9:.1f} of {self.total / 1e9:.1f} GB free"


def why_not() -> str:
    """Why no GPU can be used, in words; empty where one can."""
    try:
        import cupy
    except ModuleNotFoundError:
        return f"CuPy is not installed: {INSTALL}"
    except ImportError as error:
        return f"CuPy can't be loaded: {error}"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
    try:
        if cupy.cuda.runtime.getDeviceCount() == 0:
            return f"the driver shows no GPU to this process{shown}"
        capability = str(cupy.cuda.Device().compute_capability)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no NVIDIA driver that works, or no GPU{shown}: {error}"
    if int(capability) < OLDEST:
        return (
            f"the GPU is too old: compute capability {_dotted(capability)}, needed is {_dotted(str(OLDEST))} (Turing, "
            "2018) or newer"
        )
    return ""


def gpu() -> Gpu:
    """The GPU of this process; raises DeviceError where there is none."""
    reason = why_not()
    if reason:
        raise DeviceError(f'device = "cuda": {reason}. Or compute on the processor: device = "cpu"')
    import cupy

    with explained():
        device, runtime = cupy.cuda.Device(), cupy.cuda.runtime
        free, total = device.mem_info
        # what CuPy keeps of memory that was freed is used again, or given back when there is too little
        pool = cupy.get_default_memory_pool()
        free += pool.total_bytes() - pool.used_bytes()
        name = runtime.getDeviceProperties(device.id)["name"].decode()
        driver, used = _version(runtime.driverGetVersion()), _version(runtime.runtimeGetVersion())
        capability = str(device.compute_capability)
        return Gpu(name, capability, int(free), int(total), driver, used, cupy.__version__)


@contextmanager
def explained() -> Iterator[None]:
    """Turn errors of the GPU into DeviceErrors that say what happened and what to do."""
    import cupy

    try:
        yield
    except cupy.cuda.memory.OutOfMemoryError as error:
        free = ""
        try:
            free = f"; {cupy.cuda.Device().mem_info[0] / 1e9:.2f} GB of it are free"
        except cupy.cuda.runtime.CUDARuntimeError:
            free = "; how much is free can't be asked any more"
        raise DeviceError(
            f"the GPU's memory is full{free} ({error}). Another process may have taken it since the run was planned: "
            "see nvidia-smi, or give less with [run] device_memory"
        ) from error
    except (cupy.cuda.runtime.CUDARuntimeError, cupy.cuda.driver.CUDADriverError) as error:
        raise DeviceError(
            f"the GPU failed: {error}. Nothing of this run was kept. If it happens again, look at nvidia-smi and at "
            "the system's log for Xid messages"
        ) from error


def _dotted(capability: str) -> str:
    return f"{capability[:-1]}.{capability[-1]}"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
