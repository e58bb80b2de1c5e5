"""CUDA C++ kernels on the CPU: fibers for threads, in several orders, and under AddressSanitizer.

`build` compiles and launches; cuda_cpu.h is what the compiler sees in front of a kernel's own text.
"""

from __future__ import annotations

import os
import shutil
import sys

import pytest

needs_compiler = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which(os.environ.get("CXX", "g++")) is None,
    reason="kernels run on the CPU through g++ on Linux",
)
