"""CUDA kernels: their sources, compiled when first used, kept on disk.

CuPy's own cache does not see included files, so headers are put in place of their ``#include`` before anything is
compiled: the key is the whole text. Nothing here runs at import.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuem.backends.cuda_device import INSTALL
from gpuem.errors import DeviceError

log = logging.getLogger("gpuem")

# the oldest is Turing: there are no tensor cores for bytes before it
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
# every rounding step is written down in the sources: fused where they say fma, nowhere else
OPTIONS = ("-std=c++17", "--fmad=false", "--ptxas-options=-v")
_INCLUDE = re.compile(r'^#include "([\w.]+)"$')


@dataclass(frozen=True)
class Compiled:
    """Machine code of one kernel, the name it has in it, and what the compiler said (registers, spills)."""

    code: bytes
    symbol: str
    log: str


def folder() -> Path:
    """Where the sources lie: inside the package once installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / "kernels" if (package / "kernels").is_dir() else package.parent / "kernels"


def names() -> list[str]:
    """All kernels, by the names of their files."""
    return sorted(path.stem for path in folder().glob("*.cu"))


@functools.cache
def source(name: str) -> str:
    """The text of ``kernels/NAME.cu``, every header in its place; ``#line`` lets messages name the real file."""
    done: set[str] = set()

    def inline(file: str) -> list[str]:
        done.add(file)
        out = [f'#line 1 "kernels/{file}"']
        for number, line in enumerate((folder() / file).read_text(encoding="utf-8").splitlines(), 1):
            header = _INCLUDE.match(line)
            if not header:
                out.append(line)
            elif header[1] in done:
                # an empty line in its place: line numbers go on as in the file
                out.append("")
            else:
                out += [*inline(header[1]), f'#line {number + 1} "kernels/{file}"']
        return out

    return "\n".join(inline(f"{name}.cu")) + "\n"


def expression(kernel: str, arguments: Sequence[str | int | bool]) -> str:
    """The kernel with its template arguments, as C++ writes it."""
    words = [str(a).lower() if isinstance(a, bool) else str(a) for a in arguments]
    return f"{kernel}<{', '.join(words)}>" if words else kernel


def why_not() -> str:
    """Why kernels can't be compiled here, in words; empty where they can."""
    try:
        from cupy.cuda import nvrtc
    except ModuleNotFoundError:
        return f"CuPy is not installed: {INSTALL}"
    except ImportError as error:
        return f"CuPy can't be loaded: {error}"
    try:
        nvrtc.getVersion()
    except (RuntimeError, OSError) as error:
        first = str(error).strip().partition("\n")[0]
        return (
            f"NVRTC, the library that compiles kernels, can't be loaded ({first}). Install it for the CUDA version of "
            "CuPy: pip install 'nvidia-cuda-nvrtc==13.*', or nvidia-cuda-nvrtc-cu12 beside cupy-cuda12x"
        )
    return ""


def compile_kernel(name: str, wanted: str, architecture: str) -> Compiled:
    """Compile one kernel with NVRTC; needs no GPU.

    Parameters
    ----------
    name : str
        File of the kernel, without its ending.
    wanted : str
        The kernel with its template arguments, such as ``all_sums<u16, 16, true>``.
    architecture : str
        Compute capability without the point, such as ``90``.

    Raises
    ------
    DeviceError
        It doesn't compile; with the compiler's messages.
    """
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(source(name), f"{name}.cu", (), ())
    try:
        nvrtc.addNameExpression(program, wanted)
        try:
            nvrtc.compileProgram(program, (*OPTIONS, f"-arch=sm_{architecture}"))
        except nvrtc.NVRTCError:
            said = nvrtc.getProgramLog(program)
            raise DeviceError(f"kernel {wanted} doesn't compile for sm_{architecture}:\n{said}") from None
        # CuPy takes the last byte off, as if it were the end of a text; a file without it can't be loaded
        code = nvrtc.getCUBIN(program) + b"\0"
        return Compiled(code, nvrtc.getLoweredName(program, wanted), nvrtc.getProgramLog(program))
    finally:
        nvrtc.destroyProgram(program)


def cache_folder() -> Path:
    """Where machine code is kept: GPUEM_KERNEL_CACHE, or the user's cache folder."""
    named = os.environ.get("GPUEM_KERNEL_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(named) if named else (Path(base) if base else Path.home() / ".cache") / "gpuem" / "kernels"


def kept(name: str, wanted: str, architecture: str) -> tuple[Path, str]:
    """The file with a kernel's machine code and its name in it; compiled now where it isn't there yet.

    Processes that compile at once each write their own file and put it in place whole.
    """
    reason = why_not()
    if reason:
        raise DeviceError(reason)
    from cupy.cuda import nvrtc

    what = (source(name), wanted, architecture, *OPTIONS, str(nvrtc.getVersion()))
    key = hashlib.sha256("\0".join(what).encode()).hexdigest()[:32]
    where = cache_folder()
    code, symbol = where / f"{name}-{key}.cubin", where / f"{name}-{key}.symbol"
    with contextlib.suppress(OSError):
        # a file that is damaged is noticed when it is loaded
        if code.is_file():
            return code, symbol.read_text(encoding="ascii")
    made = compile_kernel(name, wanted, architecture)
    try:
        where.mkdir(parents=True, exist_ok=True)
        _put(symbol, made.symbol.encode("ascii"))
        _put(code, made.code)
    except OSError as error:
        log.info("compiled kernels can't be kept in %s (%s); set GPUEM_KERNEL_CACHE", where, error.strerror)
        with tempfile.NamedTemporaryFile("wb", prefix=f"gpuem-{name}-", suffix=".cubin", delete=False) as file:
            file.write(made.code)
        return Path(file.name), made.symbol
    return code, made.symbol


def _put(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; others may read it, as folders of kernels are shared."""
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            Path(file.name).replace(path)
        except OSError:
            Path(file.name).unlink(missing_ok=True)
            raise


_loaded: dict[tuple[str, str], Any] = {}


def kernel(name: str, arguments: Sequence[str | int | bool], *, function: str | None = None) -> Any:
    """A kernel ready to be launched on this process's GPU: ``kernel(grid, block, arguments, shared_mem=0)``.

    Parameters
    ----------
    name : str
        File of the kernel.
    arguments : sequence
        Template arguments.
    function : str
        Name of the function where it isn't that of the file.
    """
    import cupy

    wanted = expression(function or name, arguments)
    architecture = str(cupy.cuda.Device().compute_capability)
    if (wanted, architecture) not in _loaded:
        _loaded[wanted, architecture] = _load(name, wanted, architecture)
    return _loaded[wanted, architecture]


def _load(name: str, wanted: str, architecture: str) -> Any:
    import cupy

    path, symbol = kept(name, wanted, architecture)
    try:
        return cupy.RawModule(path=str(path)).get_function(symbol)
    except (cupy.cuda.driver.CUDADriverError, OSError) as error:
        if path.parent != cache_folder():
            raise
        log.info("the compiled kernel %s can't be loaded (%s) and is compiled again", path, error)
        path.unlink(missing_ok=True)
        path, symbol = kept(name, wanted, architecture)
        return cupy.RawModule(path=str(path)).get_function(symbol)
    finally:
        if path.parent != cache_folder():
            path.unlink(missing_ok=True)
