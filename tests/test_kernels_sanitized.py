"""The kernels' own tests once more, in one order of threads, with every kernel under AddressSanitizer.

A read or a write outside an array that happens to do no harm passes any comparison; here it ends the process.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from emulation import needs_compiler
from emulation.build import run_under_sanitizer

pytestmark = needs_compiler
HERE = Path(__file__).parent
# tests in other orders, and those that run under a sanitizer themselves
OTHER = "not descending and not random and not touch_nothing_outside"


# most of the time is compiling: seconds where the cache holds the kernels
@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "least"),
    [
        ("test_kernels.py", 85),
        ("test_kernels_decode.py", 500),
        ("test_kernels_larger.py", 55),
        ("test_kernels_peaks.py", 150),
        ("test_kernels_lattice.py", 60),
    ],
)
def test_kernels_touch_nothing_outside(file, least):
    pytest_command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu and not slow", "-k", OTHER]
    done = run_under_sanitizer([*pytest_command, str(HERE / file)], timeout=1500)
    last = done.stdout.splitlines()[-1]
    passed = re.match(r"(\d+) passed", last)
    assert passed, last
    assert int(passed[1]) >= least, last
    assert "skipped" not in last


@pytest.mark.parametrize("too_far", [0, 1])
def test_one_pixel_too_far_would_be_noticed(too_far):
    """The same way to memory as in the tests above, and an array that ends where the frame does, or a pixel before."""
    code = f"""
import numpy as np, pytest
from machine import Machine
from gpuem.backends import cuda_kernels
with pytest.MonkeyPatch.context() as patch:
    machine = Machine("ascending", patch)
    pixels, starts, good = machine.put(np.ones(77 - {too_far}, "f4")), machine.put(np.zeros(1, "i8")), np.zeros(1, "u1")
    cuda_kernels.all_finite(cuda_kernels.DeviceFrames(pixels, starts, 1, (7, 11), 4), good)
    print(good)
"""
    if too_far:
        with pytest.raises(AssertionError, match=r"heap-buffer-overflow(.|\n)*all_finite\.cu:\d+"):
            run_under_sanitizer(code)
    else:
        assert run_under_sanitizer(code).stdout == "[1]\n"
