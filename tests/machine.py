"""Where kernels are run in tests: the CPU emulation in a chosen order of threads, or a GPU.

`put` makes a device array of a NumPy array and `get` brings one back, so that a test reads the same for both.
"""

from __future__ import annotations

import numpy as np
from emulation.build import ORDERS, compile_kernels

from gpuem.backends import cuda_compile, cuda_kernels

__all__ = ["ORDERS", "Machine"]


class Machine:
    """The functions of `gpuem.backends.cuda_kernels`, run at once and in one order of threads, or on a GPU."""

    def __init__(self, order, monkeypatch):
        self.order = order
        if order != "gpu":
            # few multiprocessors: small data then make several blocks
            monkeypatch.setattr(cuda_kernels, "_multiprocessors", lambda: 2)
            monkeypatch.setattr(cuda_kernels, "kernel", self._kernel)

    def put(self, array):
        if self.order != "gpu":
            # a copy of its own, in memory that is exactly as long: a byte too far is noticed
            return np.array(array, order="C")
        import cupy

        return cupy.asarray(array)

    def get(self, array):
        return array.get() if self.order == "gpu" else array

    def _kernel(self, name, arguments, *, function=None):
        wanted = cuda_compile.expression(function or name, arguments)
        library = compile_kernels(cuda_compile.source(name), [wanted])

        def launch(grid, block, values, shared_mem=0):
            null = [None if isinstance(v, np.uint64) and v == 0 else v for v in values]
            library.launch(wanted, grid, block, null, shared_mem, self.order)

        return launch
