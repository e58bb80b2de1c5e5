"""Compiles CUDA C++ with g++ and launches it: the kernel's own text, every name expression, arguments checked.

>>> library = compile_kernels(kernel_source("all_sums"), ["all_sums<unsigned short, 16>"])
>>> library.launch("all_sums<unsigned short, 16>", (8,), (256,), [frames, sums, np.int64(frames.size)])
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent
HEADER = FOLDER / "cuda_cpu.h"
# ipa-reference, ipa-modref: a barrier may change every static variable, whatever the compiler finds out about calls
FLAGS = (
    *(
        "-std=c++17",
        "-O1",
        "-g",
        "-fPIC",
        "-w",
        "-fmax-errors=5",
        "-fvisibility=hidden",
        "-fno-gnu-unique",
        "-ffp-contract=off",
    ),
    *(
        "-fno-ipa-reference",
        "-fno-ipa-modref",
        "-U_FORTIFY_SOURCE",
        "-fno-stack-protector",
        "-fdata-sections",
        "-fno-strict-aliasing",
    ),
    "-ftrivial-auto-var-init=pattern",  # a local variable that is read before it is written shows
    "-fsanitize=alignment,bounds,shift-exponent",
)
ADDRESS_SANITIZER = ("-fsanitize=address", "-fno-omit-frame-pointer")
SANITIZER_VARIABLE = "GPUEM_EMULATION_SANITIZER"  # set in processes that run with AddressSanitizer's library
ORDERS = ("ascending", "descending", *(f"random({seed})" for seed in range(3)))
Bound = list[Any]
_ONE_LAUNCH_AT_A_TIME = threading.Lock()


class CompileError(Exception):
    """g++ refused the text; the message holds its log."""


class LaunchError(Exception):
    """The kernel broke a rule of CUDA while it ran, or was launched in a way that the device refuses."""


def kernel_source(name: str, folder: Path = ROOT / "kernels") -> str:
    """The text of NAME.cu with its headers put in where they are first included."""
    included: set[str] = set()

    def text(file: str) -> str:
        lines = [f'#line 1 "{file}"']
        for number, line in enumerate((folder / file).read_text().splitlines(), 1):
            header = re.match(r'\s*#\s*include\s+"([^"]+)"', line)
            if not header:
                lines.append("" if line.strip() == "#pragma once" else line)
                continue
            if header[1] not in included:
                included.add(header[1])
                lines.append(text(header[1]))
            lines.append(f'#line {number + 1} "{file}"')
        return "\n".join(lines)

    return text(f"{name}.cu") + "\n"


def cache_folder() -> Path:
    """Where compiled kernels lie from one test run to the next."""
    return Path(os.environ.get("GPUEM_EMULATION_CACHE") or ROOT / ".pytest_cache" / "emulation")


def compile_library(source: str, expressions: Sequence[str], flags: Sequence[str] = ()) -> Path:
    """One shared library with an entry for every expression; from the cache where the same text was compiled before."""
    flags = (*FLAGS, *flags, *(ADDRESS_SANITIZER if os.environ.get(SANITIZER_VARIABLE) else ()))
    key = hashlib.sha256("\0".join([source, *_headers(), _compiler(), *flags, "", *expressions]).encode())
    library = cache_folder() / f"{key.hexdigest()[:32]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            _compile(source + _entries(expressions), Path(folder), flags).replace(library)
    return library


def compile_kernels(source: str, expressions: Sequence[str], flags: Sequence[str] = ()) -> Library:
    """Compile, or find in the cache, and load."""
    return Library(compile_library(source, expressions, flags))


def run_under_sanitizer(arguments: str | Sequence[str], timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run Python code (a text) or a Python command line (a list) with every kernel under AddressSanitizer.

    The code finds `emulation` on its path. A report of the sanitizer, like any other failure, is an AssertionError
    that shows it.
    """
    found = subprocess.run([_compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    runtime = found.stdout.strip()
    if not Path(runtime).is_absolute():
        raise RuntimeError(f"{_compiler()} has no libasan.so: install its sanitizer library")
    tests = str(ROOT / "tests")
    environment = os.environ | {
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONMALLOC": "malloc",  # every object with a red zone of its own
        "PYTHONPATH": os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH")])),
        SANITIZER_VARIABLE: "address",
    }
    command = [sys.executable, *(["-c", arguments] if isinstance(arguments, str) else arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    if done.returncode or "AddressSanitizer" in done.stderr:
        output = f"{done.stdout[-4000:]}\n{done.stderr[:8000]}"
        raise AssertionError(f"under AddressSanitizer {command[1:]} ended with {done.returncode}:\n{output}")
    return done


def _headers() -> list[str]:
    return [path.read_text() for path in (*sorted(FOLDER.glob("*.h")), FOLDER / "shared.ld", Path(__file__))]


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _entries(expressions: Sequence[str]) -> str:
    rows = ", ".join(f'gpuem_cpu::Describe<&{text}>::entry("{text}")' for text in expressions)
    return f"""
#line 1 "entries"
#define GPUEM_EXPORT extern "C" __attribute__((visibility("default")))
static const gpuem_cpu::Entry gpuem_entries[] = {{{rows}}};
GPUEM_EXPORT unsigned gpuem_entry_count() {{ return {len(expressions)}; }}
GPUEM_EXPORT const gpuem_cpu::Entry* gpuem_entry(unsigned index) {{ return gpuem_entries + index; }}
GPUEM_EXPORT void* gpuem_stacks(void* those) {{
    if (those) gpuem_cpu::shared_stacks = static_cast<gpuem_cpu::Stacks*>(those);
    return gpuem_cpu::stacks();
}}
GPUEM_EXPORT int gpuem_architecture() {{ return __CUDA_ARCH__; }}
GPUEM_EXPORT const char* gpuem_message() {{ return gpuem_cpu::machine.message; }}
GPUEM_EXPORT int gpuem_launch(unsigned index, void** arguments, const unsigned* shape, unsigned long shared_bytes,
                              int order, unsigned long seed) {{
    return gpuem_cpu::launch(gpuem_entries[index].run, arguments, dim3(shape[0], shape[1], shape[2]),
                             dim3(shape[3], shape[4], shape[5]), shared_bytes, order, seed);
}}
"""


def _compile(text: str, folder: Path, flags: Sequence[str]) -> Path:
    compiler = _compiler()
    objects, library = folder / "kernels.o", folder / "kernels.so"
    command = [compiler, *flags, "-include", str(HEADER), "-x", "c++", "-", "-c", "-o", str(objects)]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"{compiler} refused the kernels:\n{done.stderr}")
    # linked without the sanitizer's library for undefined behaviour: the header holds its functions
    address = [flag for flag in flags if flag == "-fsanitize=address"]
    linked = subprocess.run(
        [compiler, "-shared", *address, str(objects), f"-Wl,-T,{FOLDER / 'shared.ld'}", "-o", str(library), "-lm"],
        capture_output=True,
        text=True,
    )
    if linked.returncode:
        raise CompileError(f"{compiler} could not link the kernels:\n{linked.stderr}")
    return library


class _Entry(ctypes.Structure):
    _fields_ = (
        ("expression", ctypes.c_char_p),
        ("run", ctypes.c_void_p),
        ("count", ctypes.c_uint),
        ("sizes", ctypes.POINTER(ctypes.c_uint)),
        ("kinds", ctypes.c_char_p),
    )


class Library:
    """The kernels of one compiled library."""

    _stacks: int | None = None

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._dll = ctypes.CDLL(str(path))
        self._dll.gpuem_entry.restype = ctypes.POINTER(_Entry)
        self._dll.gpuem_message.restype = ctypes.c_char_p
        self._dll.gpuem_stacks.restype = ctypes.c_void_p
        # all libraries run on the stacks of the first
        Library._stacks = self._dll.gpuem_stacks(ctypes.c_void_p(Library._stacks))
        self._entries: dict[str, tuple[int, list[tuple[str, int]]]] = {}
        for index in range(self._dll.gpuem_entry_count()):
            entry = self._dll.gpuem_entry(index).contents
            kinds = entry.kinds.decode()
            parameters = [(kinds[k], int(entry.sizes[k])) for k in range(entry.count)]
            self._entries[entry.expression.decode()] = (index, parameters)

    @property
    def architecture(self) -> int:
        """What __CUDA_ARCH__ was, such as 900."""
        return int(self._dll.gpuem_architecture())

    @property
    def expressions(self) -> list[str]:
        return list(self._entries)

    def parameters(self, expression: str) -> list[tuple[str, int]]:
        """Kind and bytes of every parameter: p pointer, c pointer to const, i, u, f, b scalars, s structure."""
        return self._entry(expression)[1]

    def launch(
        self,
        expression: str,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Any],
        shared_mem: int = 0,
        order: str = "ascending",
    ) -> None:
        """Run a kernel to its end.

        Pointers are NumPy arrays, addresses as int or np.uint64, or None; scalars are NumPy scalars of exactly the
        kernel's type.
        """
        self.run(expression, grid, block, self.bind(expression, args), shared_mem, order)

    def bind(self, expression: str, args: Sequence[Any]) -> Bound:
        """Check arguments and copy their values, as a launch does at once even where the kernel runs later."""
        parameters = self._entry(expression)[1]
        if len(args) != len(parameters):
            raise TypeError(f"{expression} takes {len(parameters)} arguments, not {len(args)}")
        return [
            _argument(value, *parameter, f"argument {k} of {expression}")
            for k, (value, parameter) in enumerate(zip(args, parameters, strict=True))
        ]

    def run(
        self, expression: str, grid: Sequence[int], block: Sequence[int], bound: Bound, shared_mem: int, order: str
    ) -> None:
        """Run a kernel with arguments from `bind`."""
        index = self._entry(expression)[0]
        addresses = (ctypes.c_void_p * max(1, len(bound)))(*(ctypes.addressof(value) for value in bound))
        shape = (ctypes.c_uint * 6)(*_three(grid), *_three(block))
        number, seed = _order(order)
        with _ONE_LAUNCH_AT_A_TIME:
            failed = self._dll.gpuem_launch(
                index, addresses, shape, ctypes.c_ulong(shared_mem), number, ctypes.c_ulong(seed)
            )
            message = self._dll.gpuem_message().decode(errors="replace") if failed else ""
        if failed:
            raise LaunchError(f"{expression}: {message}")

    def _entry(self, expression: str) -> tuple[int, list[tuple[str, int]]]:
        if expression not in self._entries:
            raise KeyError(f"{expression!r} was not compiled; there are {self.expressions}")
        return self._entries[expression]


def _order(order: str) -> tuple[int, int]:
    if order in ("ascending", "descending"):
        return ("ascending", "descending").index(order), 0
    seeded = re.fullmatch(r"random\((\d+)\)", order)
    if not seeded:
        raise ValueError(f"order {order!r}: ascending, descending or random(seed)")
    return 2, int(seeded[1])


def _three(shape: Sequence[int]) -> tuple[int, ...]:
    if not 1 <= len(shape) <= 3 or any(int(n) != n or not 0 <= n < 2**32 for n in shape):
        raise ValueError(f"a grid or block has 1 to 3 sizes, not {shape}")
    return (*(int(n) for n in shape), 1, 1)[:3]


def _argument(value: Any, kind: str, size: int, place: str) -> Any:
    if kind in "pc":
        return ctypes.c_void_p(_address(value, kind, place))
    if not isinstance(value, np.generic):
        raise TypeError(
            f"{place} is a {type(value).__name__}; the kernel takes {_scalar(kind, size)}: pass that NumPy scalar"
        )
    if kind != "s" and (value.dtype.kind != kind or value.itemsize != size):
        raise TypeError(f"{place} is a {value.dtype}; the kernel takes {_scalar(kind, size)}")
    if value.itemsize != size:
        raise TypeError(f"{place} has {value.itemsize} bytes; the kernel takes a structure of {size}")
    return ctypes.create_string_buffer(value.tobytes(), size)


def _address(value: Any, kind: str, place: str) -> int | None:
    if value is None or type(value) is int:
        return value
    if isinstance(value, np.uint64):
        return int(value)
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{place} is a {type(value).__name__}; the kernel takes a pointer: pass an array")
    if not value.flags.c_contiguous:
        raise ValueError(f"{place} is not contiguous: strides {value.strides} of shape {value.shape}")
    if kind == "p" and not value.flags.writeable:
        raise ValueError(f"{place} is read-only; the kernel takes a pointer that it may write through")
    return value.ctypes.data


def _scalar(kind: str, size: int) -> str:
    return "a structure" if kind == "s" else str(np.dtype(f"{kind}{size}"))
