"""Kernels: NVRTC is g++, machine code is a shared library, a launch is an operation in the current stream."""

from __future__ import annotations

import hashlib
import itertools
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from emulation.build import CompileError, Library, cache_folder, compile_library

from standin.device import CUDADriverError, Operation
from standin.memory import ndarray
from standin.streams import Strict, current_stream, device

LOWERED = "lowered:"
# dynamic shared memory that a block may ask for at most, by compute capability
MOST_SHARED_NBYTES = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
SHARED_NBYTES = 48 << 10


class NVRTCError(RuntimeError):
    """An error of the compiler; `status` is its number."""

    _names = {5: "INVALID_OPTION", 6: "COMPILATION", 10: "NAME_EXPRESSION_NOT_VALID"}  # noqa: RUF012

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"NVRTC_ERROR_{self._names[status]} ({status})")


@dataclass
class _Program:
    source: str
    name: str
    expressions: list[str] = field(default_factory=list)
    library: Path | None = None
    log: str = ""


_programs: dict[int, _Program] = {}
_handles = itertools.count(1)


def createProgram(src: str, name: str, headers: Sequence[str], include_names: Sequence[str]) -> int:  # noqa: N802
    if len(headers) or len(include_names):
        raise TypeError("the stand-in compiles one text: put the headers into it")
    handle = next(_handles)
    _programs[handle] = _Program(src, name)
    return handle


def destroyProgram(prog: int) -> None:  # noqa: N802
    del _programs[prog]


def addNameExpression(prog: int, name: str) -> None:  # noqa: N802
    _programs[prog].expressions.append(name)


def compileProgram(prog: int, options: Sequence[str]) -> None:  # noqa: N802
    program = _programs[prog]
    found = [re.fullmatch(r"(?:-arch|--gpu-architecture)=sm_(\d+)", option) for option in options]
    architectures = [match[1] for match in found if match]
    if len(architectures) != 1:
        program.log = f"one -arch=sm_NN is needed, not {list(options)}"
        raise NVRTCError(5)
    defined = [option for option in options if option.startswith("-D")]
    try:
        program.library = compile_library(
            program.source, program.expressions, [f"-D__CUDA_ARCH__={architectures[0]}0", *defined]
        )
    except CompileError as error:
        program.log = str(error)
        raise NVRTCError(6) from None


def getCUBIN(prog: int) -> bytes:  # noqa: N802
    library = _programs[prog].library
    if library is None:
        raise RuntimeError("cubin is requested, but nothing was compiled")
    return library.read_bytes()


def getLoweredName(prog: int, name: str) -> str:  # noqa: N802
    if _programs[prog].library is None or name not in _programs[prog].expressions:
        raise NVRTCError(10)
    return LOWERED + name


def getProgramLog(prog: int) -> str:  # noqa: N802
    return _programs[prog].log


def getVersion() -> tuple[int, int]:  # noqa: N802
    return (13, 0)


_libraries: dict[str, Library] = {}


def _load(code: bytes) -> Library:
    """A library from its bytes. Loaded is a copy: the file that held them may be replaced."""
    key = hashlib.sha256(code).hexdigest()[:32]
    if key not in _libraries:
        path = cache_folder() / f"loaded-{key}.so"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                file.write(code)
            Path(file.name).replace(path)
        _libraries[key] = Library(path)
    return _libraries[key]


class RawModule(Strict):
    """Compiled kernels from a file."""

    def __init__(self, *, path: str) -> None:
        device().require()
        self._library = _load(Path(path).read_bytes())
        capability, architecture = int(device().compute_capability), self._library.architecture // 10
        # machine code runs on the same major architecture, from its minor one on
        if architecture // 10 != capability // 10 or architecture > capability:
            raise CUDADriverError(209)

    def get_function(self, name: str) -> RawKernel:
        expression = name.removeprefix(LOWERED)
        if not name.startswith(LOWERED) or expression not in self._library.expressions:
            raise CUDADriverError(500)
        return RawKernel(self._library, expression)


class RawKernel(Strict):
    """A kernel: called with grid, block and arguments, it is enqueued in the current stream."""

    def __init__(self, library: Library, expression: str) -> None:
        self._library, self._expression = library, expression
        self._shared_nbytes = SHARED_NBYTES
        self.num_regs, self.local_size_bytes = 32, 0

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self._shared_nbytes

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, nbytes: int) -> None:
        if nbytes > MOST_SHARED_NBYTES.get(int(device().compute_capability), 48) << 10:
            raise CUDADriverError(1)
        self._shared_nbytes = nbytes

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: Sequence[Any], *, shared_mem: int = 0
    ) -> None:
        here, library, expression = device(), self._library, self._expression
        here.require()
        if not isinstance(grid, tuple) or not isinstance(block, tuple):
            raise TypeError(f"grid and block are tuples, not {grid!r} and {block!r}")
        if min(grid) < 1 or min(block) < 1:
            raise ValueError(f"{expression}: grid {grid}, block {block}: CuPy takes 0 for 1 and launches")
        if shared_mem > self._shared_nbytes:
            raise CUDADriverError(1)
        bound = library.bind(expression, [_argument(value, k, expression) for k, value in enumerate(args)])
        touched = tuple(storage for value in args if isinstance(value, ndarray) for storage in value.data._storages)
        order = f"random({here.random.randrange(1 << 30)})" if here.random else here.order
        here.note_launch(expression)
        here.enqueue(
            current_stream()._queue,
            Operation(lambda: library.run(expression, grid, block, bound, shared_mem, order), touched),
        )


def _argument(value: Any, number: int, expression: str) -> Any:
    if isinstance(value, ndarray):
        return value.data.ptr
    if isinstance(value, np.generic):
        return value
    kind = f"{type(value).__module__}.{type(value).__name__}"
    raise TypeError(
        f"argument {number} of {expression} is a {kind}: pass device arrays and NumPy scalars of exactly the kernel's "
        "width; np.uint64(0) is the null pointer"
    )
