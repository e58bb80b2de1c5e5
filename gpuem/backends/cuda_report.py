"""Which kernels there are, compiled ahead of their first use; registers and spills as the compiler tells them.

None of it needs a GPU: NVRTC compiles for any architecture that it knows.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpuem.backends import cuda_compile, cuda_device
from gpuem.backends import cuda_kernels as kernels
from gpuem.errors import DeviceError, RecipeError
from gpuem.storage import gds

# what most detectors write and what corrected pixels become
USUAL = ("u1", "u2", "f4")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"Used .*?(\d+) bytes smem")


@dataclass(frozen=True)
class Instance:
    """A kernel with its template arguments.

    Parameters
    ----------
    file : str
        File of the kernel, without its ending.
    expression : str
        The kernel as C++ writes it, such as ``all_sums<u16, 16, true>``.
    """

    file: str
    expression: str


@dataclass(frozen=True)
class Row:
    """What one kernel takes on one architecture.

    Parameters
    ----------
    expression : str
        The kernel.
    architecture : str
        Compute capability, without the point.
    registers : int
        Of a thread.
    spilled : int
        Bytes that are put into a thread's memory and taken back for want of registers.
    stack : int
        Bytes of a thread's memory, for spills and for arrays that can't be kept in registers.
    shared : int
        Bytes of shared memory that every block takes; what a launch asks for comes on top.
    code : int
        Bytes of the file with the machine code.
    seconds : float
        Time it took; next to nothing where it was compiled before.
    """

    expression: str
    architecture: str
    registers: int
    spilled: int
    stack: int
    shared: int
    code: int
    seconds: float


def instances() -> list[Instance]:
    """Every kernel that `cuda_kernels` can ask for, with all template arguments."""
    return _together(kernels.PIXELS)


def usual() -> list[Instance]:
    """Kernels for the pixels that most data have: u8, u16, f32."""
    return _together(np.dtype(name) for name in USUAL)


def _together(dtypes: Iterable[np.dtype[np.generic]]) -> list[Instance]:
    found = {Instance("lz4", "lz4"): None}
    for flag in (False, True):
        found[_instance("find_peaks", flag)] = None
        found[_instance("find_peaks", flag, function="multiply_spectra")] = None
    for dtype in dtypes:
        found |= dict.fromkeys(_converting(dtype))
        found |= dict.fromkeys(_summing(dtype))
    return sorted(found, key=lambda instance: (instance.file, instance.expression))


def _instance(file: str, *arguments: str | int | bool, function: str = "") -> Instance:
    return Instance(file, cuda_compile.expression(function or file, arguments))


def _summing(dtype: np.dtype[np.generic]) -> Iterator[Instance]:
    """What computes on native frames of a type."""
    of, item = kernels.PIXELS[dtype], dtype.itemsize
    alignments = {kernels._load(aligned, item) for aligned in (1, 2, 4, 8, 16) if aligned >= item}
    real = kernels.PIXELS[kernels.weight_images([np.zeros((1, 1))], dtype).dtype]
    for aligned in alignments:
        for images in (False, True):
            yield _instance("all_sums", of, aligned, images)
        yield _instance("image_sums", of, real, aligned)
        if of in ("u8", "u16"):
            yield _instance("image_sums", of, aligned, function="image_sums_tensor")
            for tiles in (2, 4):
                yield _instance("mask_sums", of, aligned, tiles)
    if dtype.kind == "f":
        yield _instance("all_finite", of)
    elif item >= 4:
        yield _instance("magnitudes", of)
    yield _instance("patch_dead", of)
    yield _instance("find_peaks", of, function="level_frames")
    yield _instance("guided", of)
    yield _instance("lattice_fit", of)


def _converting(dtype: np.dtype[np.generic]) -> Iterator[Instance]:
    """What makes native or corrected frames of stored pixels of a type."""
    of, item = kernels.PIXELS[dtype], dtype.itemsize
    bits = f"u{8 * item}"
    scaled = "f32" if item <= 2 or of == "f32" else "f64"
    # chunks that are stored as they are are gathered as bits
    yield _instance("convert", bits, bits, False)
    for out in (of, scaled):
        for swapped in (False, True)[: 1 if item == 1 else 2]:
            yield _instance("convert", of, out, swapped)
    yield _instance("unshuffle", item)
    yield _instance("place_chunks", bits)
    yield _instance("place_part", bits)
    yield _instance("bitshuffle_lz4", bits)
    for depth in {"u8": (1, 6), "u16": (12,), "u32": (24,)}.get(of, ()):
        yield _instance("merlin", depth)


def architectures(asked: str = "") -> list[str]:
    """Compute capabilities in a list such as ``80,90``; of this machine's GPU where nothing is asked for.

    Raises
    ------
    RecipeError
        Something else stands in the list, or a GPU that is too old.
    DeviceError
        Nothing is asked for and there is no GPU.
    """
    if not asked:
        reason = cuda_device.why_not()
        if reason:
            raise DeviceError(f"there is no GPU to compile for: {reason}. Or name some: --architectures 80,90")
        return [cuda_device.gpu().capability]
    words = list(dict.fromkeys(word.strip() for word in asked.split(",")))
    for word in words:
        if not word.isascii() or not word.isdigit() or int(word) < cuda_device.OLDEST:
            raise RecipeError(
                f"architectures: {word!r} is no compute capability that gpuem runs on: give them without the point, "
                f"separated by commas, {cuda_device.OLDEST} (Turing) or newer; "
                f"all that are tested: {','.join(cuda_compile.ARCHITECTURES)}"
            )
    return words


def compile_all(architectures: Sequence[str], which: Sequence[Instance]) -> list[Row]:
    """Compile kernels into the cache, as far as they aren't there yet.

    Parameters
    ----------
    architectures : sequence of str
        Compute capabilities without the point, such as ``90``.
    which : sequence of Instance
        The kernels.

    Raises
    ------
    DeviceError
        There is no compiler, a kernel doesn't compile, or the results can't be kept.
    """
    reason = cuda_compile.why_not()
    if reason:
        raise DeviceError(f"kernels can't be compiled: {reason}")
    return [compile_one(instance, architecture) for architecture in architectures for instance in which]


def compile_one(instance: Instance, architecture: str) -> Row:
    """Compile one kernel into the cache, or find it there."""
    began = time.perf_counter()
    path, _ = cuda_compile.kept(instance.file, instance.expression, architecture)
    where = cuda_compile.cache_folder()
    if path.parent != where:
        path.unlink()
        raise DeviceError(
            f"compiled kernels can't be kept in {where}: it can't be written to. Name a folder in the environment "
            "variable GPUEM_KERNEL_CACHE, the same for all processes that are to use them"
        )
    said = _said(instance, architecture, path.with_suffix(".log"))
    return row(instance, architecture, said, path.stat().st_size, time.perf_counter() - began)


def _said(instance: Instance, architecture: str, path: Path) -> str:
    """What the compiler said of a kernel: kept beside its machine code, where it is written when first asked for."""
    if path.is_file():
        return path.read_text(encoding="utf-8")
    said = cuda_compile.compile_kernel(instance.file, instance.expression, architecture).log
    cuda_compile._put(path, said.encode())
    return said


def row(instance: Instance, architecture: str, said: str, code: int, seconds: float) -> Row:
    """The numbers in what the assembler said of one kernel."""
    used = _USED.search(said)
    if used is None:
        raise DeviceError(
            f"kernel {instance.expression}: NVRTC doesn't say what it takes on sm_{architecture}:\n{said}"
        )
    functions = [[int(number) for number in found] for found in _STACK.findall(said)]
    shared = _SHARED.search(said)
    return Row(
        instance.expression,
        architecture,
        int(used[1]),
        sum(stores + loads for _, stores, loads in functions),
        sum(stack for stack, _, _ in functions),
        int(shared[1]) if shared else 0,
        code,
        seconds,
    )


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for every kernel: its name, then its registers, and bytes spilled, on each architecture."""
    lines: dict[str, list[str]] = {}
    for one in rows:
        spilled = f" ({one.spilled} spilled)" if one.spilled else ""
        lines.setdefault(one.expression, [one.expression]).append(f"{one.registers}{spilled}")
    return list(lines.values())


def facts() -> list[tuple[str, str]]:
    """What there is to compute on, to read with and to begin with, in words: a label and a sentence each."""
    reason = cuda_device.why_not()
    if reason:
        found = [("gpu", f"none can be used: {reason}")]
    else:
        gpu = cuda_device.gpu()
        found = [
            ("gpu", f"{gpu}, compute capability {gpu.capability[:-1]}.{gpu.capability[-1]}"),
            ("cuda", f"{gpu.runtime}; the driver knows versions up to {gpu.driver}"),
        ]
    direct = gds.mode()
    found.append(("gpudirect", f"{'can be used' if direct.available else 'not used'}: {direct.reason}"))
    where = cuda_compile.cache_folder()
    sizes = [path.stat().st_size for path in where.glob("*.cubin")]
    found.append(("kernels", f"{len(sizes):,} compiled ({sum(sizes) / 1e6:.1f} MB), kept in {where}"))
    return found
