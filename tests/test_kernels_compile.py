"""Kernels as NVRTC compiles them for every architecture, without a GPU, and what is kept of that on disk."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import reference
import standin
from emulation import needs_compiler as needs_gcc
from typer.testing import CliRunner

import gpuem
from gpuem.backends import cuda_compile, cuda_correlate, cuda_kernels, cuda_lattice, cuda_report, cuda_stitch
from gpuem.backends.lattice_fit import LatticeFit
from gpuem.backends.peaks import GuidedFit, PeakSearch
from gpuem.correction import corrected_type
from gpuem.errors import DeviceError, RecipeError

REASON = cuda_compile.why_not()
needs_nvrtc = pytest.mark.skipif(bool(REASON), reason=f"kernels can't be compiled: {REASON}")
# NVRTC 12.9 to 13.5 take 64 or 80 registers here, where their limit is 128 or more, and lack a few: bytes of the stack.
# With the limit at one block to a multiprocessor they take what they need, but then fewer threads run at once.
MAY_SPILL = {
    ("image_sums_tensor<u16, 2>", "120"): 32,
    ("image_sums_tensor<u8, 1>", "100"): 16,
    ("image_sums_tensor<u8, 1>", "120"): 24,
    ("mask_sums<u16, 16, 4>", "120"): 8,
}
QUICK = cuda_report.Instance("all_finite", "all_finite<f32>")


# ---- every kernel, every architecture -------------------------------------------------------------------------------


def end_of_machine_code(code):
    """Where the last section, and the last table of an ELF file ends."""
    assert code[:4] == b"\x7fELF"
    program, sections = struct.unpack_from("<QQ", code, 32)
    program_size, programs, section_size, count = struct.unpack_from("<HHHH", code, 54)
    ends = [program + program_size * programs, sections + section_size * count]
    for k in range(count):
        at = sections + k * section_size
        if struct.unpack_from("<I", code, at + 4)[0] != 8:  # it takes no room in the file
            ends.append(sum(struct.unpack_from("<QQ", code, at + 24)))
    return max(ends)


def compiled(job):
    instance, architecture = job
    began = time.perf_counter()
    made = cuda_compile.compile_kernel(instance.file, instance.expression, architecture)
    # a byte more is allowed: CuPy takes one off, and newer versions may not
    assert len(made.code) - end_of_machine_code(made.code) in (0, 1), "the machine code isn't whole"
    seconds = time.perf_counter() - began
    return cuda_report.row(instance, architecture, made.log, len(made.code), seconds)


@pytest.fixture(scope="module")
def pool():
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as made:
        yield made


@pytest.fixture
def compile_many(pool, record_property, request, capsys):
    """Compile instances for one architecture; registers go to the report, and are printed when pytest is verbose."""

    def compile_them(which, architecture):
        rows = list(pool.map(compiled, [(instance, architecture) for instance in which], chunksize=4))
        lines = [f"\nsm_{architecture}: registers, bytes spilled, stack, shared memory, machine code; seconds"]
        for row in rows:
            numbers = (row.registers, row.spilled, row.stack, row.shared, row.code)
            record_property(f"{row.expression} sm_{architecture}", " ".join(map(str, numbers)))
            lines.append(f"{row.expression:<30}" + "".join(f"{n:8}" for n in numbers) + f"{row.seconds:8.2f}")
        if request.config.getoption("verbose") > 0:
            with capsys.disabled():
                print("\n".join(lines))
        return rows

    return compile_them


@needs_nvrtc
@pytest.mark.parametrize("architecture", cuda_compile.ARCHITECTURES)
def test_usual_kernels_compile_and_keep_everything_in_registers(architecture, compile_many):
    rows = compile_many(cuda_report.usual(), architecture)
    assert all(0 < row.registers <= 255 and row.shared <= 48 << 10 for row in rows)
    if int(architecture) >= 80:
        spilling = [row for row in rows if row.stack > MAY_SPILL.get((row.expression, architecture), 0)]
        assert not spilling, spilling


@needs_nvrtc
def test_every_kernel_compiles(compile_many):
    usual, every = set(cuda_report.usual()), cuda_report.instances()
    assert usual < set(every)
    assert {instance.file for instance in every} == set(cuda_compile.names())
    rows = compile_many([instance for instance in every if instance not in usual], "90")
    assert not [row for row in rows if row.spilled or row.stack]


def test_what_the_assembler_says_is_understood():
    said = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z3sumPf' for 'sm_90'
ptxas info    : Function properties for _Z3sumPf
ptxas         .     24 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 63 registers, used 1 barriers, 24 bytes cumulative stack size, 2176 bytes smem
ptxas info    : Function properties for _Z6helperf
ptxas         .     8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
    row = cuda_report.row(cuda_report.Instance("sum", "sum<f32>"), "90", said, 1000, 0.5)
    assert row == cuda_report.Row("sum<f32>", "90", 63, 32, 32, 2176, 1000, 0.5)
    with pytest.raises(DeviceError, match="sum<f32>: NVRTC doesn't say what it takes on sm_90"):
        cuda_report.row(cuda_report.Instance("sum", "sum<f32>"), "90", "warning: nothing", 1000, 0.5)


# ---- which kernels there are ----------------------------------------------------------------------------------------


def ask_for_everything(dtype, shape, aligned):
    """Call every function of `cuda_kernels` that takes frames of this type."""
    nothing = np.zeros(0, np.int64)
    frames = cuda_kernels.DeviceFrames(np.zeros(0, dtype), nothing, 3, shape, aligned)
    columns, codes = np.zeros((3, 4)), np.zeros(3, np.int32)
    for images in (None, (nothing, nothing)):
        for some in (None, columns):
            cuda_kernels.all_sums(frames, (nothing, 1, 1), some, images)
    cuda_kernels.image_sums(frames, cuda_kernels.weight_images([np.ones(shape)], dtype), 1, columns)
    if dtype.str[1:] in ("u1", "u2"):
        cuda_kernels.image_sums_tensor(frames, cuda_kernels.weight_parts([np.ones(shape)]), 1, columns)
        for masks in (1, 16, 17, 100):
            cuda_kernels.mask_sums(frames, np.zeros((masks, 1), np.uint32), masks, columns)
    if dtype.kind == "f":
        cuda_kernels.all_finite(frames, nothing)
    elif dtype.itemsize >= 4:
        cuda_kernels.magnitudes(frames, columns)
    cuda_kernels.patch_dead(frames, nothing, nothing, nothing)
    ask_for_correlations(frames, columns)
    ask_for_lattices(frames, columns)
    pixels = np.zeros((3, 5), dtype)
    for scaled in (False, True):
        for stored in (dtype, dtype.newbyteorder()):
            out = np.zeros((3, 5), corrected_type(dtype, scaled=scaled))
            cuda_kernels.convert(nothing, nothing, stored, (None, None), out)
    bits = np.dtype(f"u{dtype.itemsize}")
    cuda_kernels.convert(nothing, nothing, bits, (None, None), pixels.view(bits))
    cuda_kernels.place_chunks(nothing, np.zeros((4, 3), np.int64), pixels)
    cuda_stitch.place_part(frames, (0, 0, 1, 1), pixels, (0, 0), (1, 5))
    cuda_kernels.bitshuffle_lz4(nothing, nothing, nothing, pixels, codes)
    cuda_kernels.lz4(nothing, nothing, nothing, pixels, codes)
    cuda_kernels.unshuffle(nothing, pixels)
    for depth in {"u1": (1, 6), "u2": (12,), "u4": (24,)}.get(dtype.str[1:], ()):
        cuda_kernels.merlin(nothing, nothing, pixels, depth, (1, 1), (1, 64))


def ask_for_correlations(frames, columns):
    cuda_correlate.level_frames(frames, columns)
    tables = {"spectrum": None, "smoothing": None, "sites": columns, "kernel": np.zeros((3, 3))}
    images = np.zeros((3, *frames.shape))
    for power, subpixel in ((1, "none"), (0.5, "parabola"), (0, "upsample")):
        search = PeakSearch(images[0], power=power, subpixel=subpixel)
        cuda_correlate.multiply_spectra(images, 3, search, tables)
        cuda_correlate.find_peaks(images, search, (columns, columns), columns)
    cuda_correlate.guided(frames, GuidedFit(columns, tables["kernel"], 1), tables, columns, columns)


def ask_for_lattices(frames, columns):
    names = [item.name for item in dataclasses.fields(LatticeFit)]
    fit = LatticeFit(*(np.zeros((289, 16)) for _ in names[:-2]), 1)
    cuda_lattice.lattice_fit(frames, fit, dict.fromkeys(names), (columns, None), columns)


@pytest.fixture
def asked(monkeypatch):
    """What `cuda_kernels` asks for, noted and not run."""
    found = set()

    def kernel(name, arguments, *, function=None):
        found.add(cuda_report.Instance(name, cuda_compile.expression(function or name, arguments)))
        return lambda *_, **__: None

    monkeypatch.setattr(cuda_kernels, "kernel", kernel)
    monkeypatch.setattr(cuda_kernels, "_multiprocessors", lambda: 100)
    return found


@pytest.mark.parametrize("which", ["instances", "usual"])
def test_instances_are_what_the_launching_functions_ask_for(asked, which):
    for dtype in cuda_kernels.PIXELS if which == "instances" else map(np.dtype, cuda_report.USUAL):
        for aligned in (1, 2, 4, 8, 16):
            for width in (1, 2, 4, 8, 16, 15):
                if aligned >= dtype.itemsize:
                    ask_for_everything(dtype, (2, width), aligned)
    listed = getattr(cuda_report, which)()
    assert set(listed) == asked
    assert len(listed) == len(asked)


@needs_gcc
@pytest.mark.parametrize("dtype", ["u1", ">u2", "i4", "f4", "f8"])
def test_a_run_launches_nothing_that_is_not_listed(dtype):
    data = reference.planted((2, 3, 9, 16), np.dtype(dtype).newbyteorder("=")).astype(dtype)
    np.save("data.npy", np.clip(data, 0, 1000).astype(dtype))
    ds = gpuem.open("data.npy").corrected(dark=np.ones((9, 16)), dead=[(2, 2)])
    analyses = [gpuem.Sum(), gpuem.CenterOfMass(), gpuem.VirtualDetector(name="disk", outer=4)]
    with standin.installed() as device:
        gpuem.run(ds, analyses, device="cuda")
        gpuem.run(gpuem.open("data.npy"), analyses, device="cuda")
        launched = {name.removeprefix(standin.kernels.LOWERED) for name in device.launches}
    assert launched
    assert launched <= {instance.expression for instance in cuda_report.instances()}


# ---- sources --------------------------------------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A copy of the kernels' folder, in its place."""
    copy = tmp_path / "kernels"
    shutil.copytree(cuda_compile.folder(), copy)
    monkeypatch.setattr(cuda_compile, "folder", lambda: copy)
    cuda_compile.source.cache_clear()
    yield copy
    cuda_compile.source.cache_clear()


def test_sources_include_only_headers_that_lie_beside_them():
    """Whatever else is included isn't there where NVRTC compiles, and changes to it wouldn't change the cache's key."""
    files = sorted(cuda_compile.folder().glob("*.cu*"))
    assert {file.suffix for file in files} == {".cu", ".cuh"}
    for file in files:
        for line in file.read_text().splitlines():
            if re.match(r"\s*#\s*include", line):
                header = re.fullmatch(r'#include "(\w+\.cuh)"', line)
                assert header, f"{file.name}: {line}"
                assert (cuda_compile.folder() / header[1]).is_file(), f"{file.name}: {line}"
    for name in cuda_compile.names():
        text = cuda_compile.source(name)
        assert "#include" not in text
        for header in cuda_compile.folder().glob("*.cuh"):
            assert text.count(f'#line 1 "kernels/{header.name}"') <= 1, f"{header.name} is in {name} twice"


def test_only_one_header_knows_the_emulation():
    knowing = {p.name for p in cuda_compile.folder().glob("*.cu*") if "EMULATED" in p.read_text()}
    assert knowing <= {"mma.cuh"}


@needs_nvrtc
@pytest.mark.parametrize(
    ("instance", "file", "broken"),
    [
        (cuda_report.Instance("all_sums", "all_sums<u16, 16, true>"), "all_sums.cu", "raise(largest[r], groups[r]);"),
        (cuda_report.Instance("all_sums", "all_sums<u16, 16, true>"), "group.cuh", "u32 a = largest.words[w]"),
        (cuda_report.Instance("lz4", "lz4"), "lz4.cuh", "if (i == end) return room == 0;"),
        (cuda_report.Instance("magnitudes", "magnitudes<i32>"), "warp.cuh", "return __reduce_add_sync"),
        (cuda_report.Instance("magnitudes", "magnitudes<i32>"), "magnitudes.cu", "sum = warp_sum(sum);"),
    ],
)
def test_errors_name_the_file_and_the_line(sources, instance, file, broken):
    text = (sources / file).read_text()
    assert text.count(broken) == 1
    (sources / file).write_text(text.replace(broken, "this_is_wrong + " + broken))
    line = text[: text.index(broken)].count("\n") + 1
    with pytest.raises(DeviceError) as caught:
        cuda_compile.compile_kernel(instance.file, instance.expression, "90")
    first, *said = str(caught.value).splitlines()
    assert first == f"kernel {instance.expression} doesn't compile for sm_90:"
    assert next(text for text in said if ": error" in text).startswith(f"kernels/{file}({line}): error")


@needs_nvrtc
def test_kernels_that_are_not_there_are_errors_too():
    for instance in (QUICK.expression.replace("f32", "f32, 3"), "none<f32>"):
        with pytest.raises(DeviceError, match="doesn't compile for sm_90"):
            cuda_compile.compile_kernel(QUICK.file, instance, "90")
    with pytest.raises(DeviceError, match=r"doesn't compile for sm_12345:\n.*architecture"):
        cuda_compile.compile_kernel(QUICK.file, QUICK.expression, "12345")


# ---- the cache ------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    where = tmp_path / "cache"
    monkeypatch.setenv("GPUEM_KERNEL_CACHE", str(where))
    return where


@pytest.fixture
def calls(monkeypatch):
    """What NVRTC is asked to compile."""
    from cupy.cuda import nvrtc

    found, real = [], nvrtc.compileProgram

    def compile_program(program, options):
        found.append(options)
        real(program, options)

    monkeypatch.setattr(nvrtc, "compileProgram", compile_program)
    return found


def anew(code, **more):
    """Run code in a process of its own; what it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | more)
    assert done.returncode == 0, done.stderr
    return done.stdout


KEEP = f"print(cuda_compile.kept({QUICK.file!r}, {QUICK.expression!r}, '90'))"


@needs_nvrtc
def test_what_was_compiled_once_is_not_compiled_again(cache, calls):
    which = [QUICK, cuda_report.Instance("lz4", "lz4")]
    rows = cuda_report.compile_all(["80", "90"], which)
    assert [(row.expression, row.architecture) for row in rows] == [
        (instance.expression, architecture) for architecture in ("80", "90") for instance in which
    ]
    assert {options[-1] for options in calls} == {"-arch=sm_80", "-arch=sm_90"}
    calls.clear()
    again = cuda_report.compile_all(["80", "90"], which)
    assert [vars(row) | {"seconds": 0} for row in again] == [vars(row) | {"seconds": 0} for row in rows]
    path, symbol = cuda_compile.kept(QUICK.file, QUICK.expression, "90")
    assert not calls
    assert path.parent == cache
    assert symbol.encode() in path.read_bytes()
    other = anew(
        "from cupy.cuda import nvrtc; nvrtc.compileProgram = None; from gpuem.backends import cuda_compile; " + KEEP
    )
    assert other.strip() == repr((path, symbol))


@needs_nvrtc
def test_half_of_an_entry_is_compiled_again(cache, calls):
    path, _ = cuda_compile.kept(QUICK.file, QUICK.expression, "90")
    for lost in (path, path.with_suffix(".symbol")):
        lost.unlink()
        calls.clear()
        assert cuda_compile.kept(QUICK.file, QUICK.expression, "90")[0] == path
        assert len(calls) == 1
        assert lost.is_file()


@needs_nvrtc
def test_every_change_of_a_header_changes_the_key(sources, cache, monkeypatch):
    compiled_for = []

    def compile_kernel(name, wanted, architecture):
        compiled_for.append((name, wanted, architecture))
        return cuda_compile.Compiled(b"code", "symbol", "")

    monkeypatch.setattr(cuda_compile, "compile_kernel", compile_kernel)

    def keys():
        cuda_compile.source.cache_clear()
        return {name: cuda_compile.kept(name, name, "90")[0].name for name in cuda_compile.names()}

    before = keys()
    assert keys() == before
    assert len(compiled_for) == len(before)
    for file in sorted(sources.glob("*.cu*")):
        with file.open("a") as stream:
            stream.write("// changed\n")
        after = keys()
        changed = {name for name in before if after[name] != before[name]}
        using = {name for name in before if f'"kernels/{file.name}"' in cuda_compile.source(name)}
        assert changed == using, file.name
        assert using, f"nothing includes {file.name}"
        before = after
    key = cuda_compile.kept("lz4", "lz4", "90")[0]
    assert cuda_compile.kept("lz4", "lz4", "80")[0] != key
    assert cuda_compile.kept("lz4", "lz4<1>", "90")[0] != key
    monkeypatch.setattr(cuda_compile, "OPTIONS", (*cuda_compile.OPTIONS, "-DX"))
    assert cuda_compile.kept("lz4", "lz4", "90")[0] != key


@needs_nvrtc
def test_processes_that_compile_at_once_all_get_whole_kernels(cache):
    code = f"""
import time
from pathlib import Path
from gpuem.backends import cuda_compile
Path(f"ready{{__import__('os').getpid()}}").touch()
while not Path("go").exists():
    time.sleep(0.001)
path, symbol = cuda_compile.kept({QUICK.file!r}, {QUICK.expression!r}, "90")
assert symbol.encode() in path.read_bytes()
print(path, len(path.read_bytes()))
"""
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    while sum(name.startswith("ready") for name in os.listdir()) < 4:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    open("go", "w").close()
    said = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    assert len(said) == 1
    assert sorted({path.suffix for path in cache.iterdir()} - {".log"}) == [".cubin", ".symbol"]
    assert len(list(cache.glob("*.cubin"))) == len(list(cache.glob("*.symbol"))) == 1


@needs_nvrtc
def test_a_folder_that_can_t_be_written_is_told_and_does_no_harm(tmp_path, monkeypatch, caplog):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for where in (file, file / "below"):
        monkeypatch.setenv("GPUEM_KERNEL_CACHE", str(where))
        with caplog.at_level("INFO"):
            path, symbol = cuda_compile.kept(QUICK.file, QUICK.expression, "90")
        assert symbol.encode() in path.read_bytes()
        assert f"compiled kernels can't be kept in {where}" in caplog.text
        assert "set GPUEM_KERNEL_CACHE" in caplog.text
        path.unlink()
        # compiling ahead is in vain then
        with pytest.raises(DeviceError, match=r"can't be kept in .*GPUEM_KERNEL_CACHE"):
            cuda_report.compile_all(["90"], [QUICK])
    assert os.listdir(tmp_path) == ["file"]


@needs_nvrtc
def test_what_one_user_compiled_others_can_read(cache):
    """A cluster's shared folder, filled by whoever administers it."""
    before = os.umask(0o022)
    try:
        cuda_report.compile_all(["90"], [QUICK])
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in cache.iterdir()} == {"0o644"}


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("GPUEM_KERNEL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cuda_compile.cache_folder() == tmp_path / ".cache" / "gpuem" / "kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    assert cuda_compile.cache_folder() == tmp_path / "c" / "gpuem" / "kernels"
    monkeypatch.setenv("GPUEM_KERNEL_CACHE", str(tmp_path / "d"))
    assert cuda_compile.cache_folder() == tmp_path / "d"


# ---- gpuem devices --------------------------------------------------------------------------------------------------


def devices(*arguments, code=0):
    from gpuem.cli import app

    done = CliRunner().invoke(app, ["devices", *arguments])
    if code == 0:
        assert done.exit_code == 0, done.output
        return done.output
    # `main` makes a message of it
    assert isinstance(done.exception, code), done.output
    return str(done.exception)


def test_devices_without_a_gpu_is_no_error(cache, monkeypatch):
    monkeypatch.setattr("gpuem.backends.cuda_device.why_not", lambda: "the [driver] is missing")
    said = devices()
    assert re.search(r"^cpu +\S.*processors", said, re.MULTILINE)
    assert "none can be used: the [driver] is missing" in said
    assert re.search(r"^gpudirect +(not used|can be used): \S", said, re.MULTILINE)
    assert f"kernels          0 compiled (0.0 MB), kept in {cache}" in said
    assert "there is no GPU to compile for: the [driver] is missing" in devices("--compile", code=DeviceError)


def test_devices_tells_of_the_gpu():
    with standin.installed(compute_capability="86", memory_nbytes=3_000_000_000):
        said = devices()
        assert "Stand-in for a GPU, 3.0 of 3.0 GB free, compute capability 8.6" in said
        assert re.search(r"^cuda +13.0; the driver knows versions up to 13.0", said, re.MULTILINE)
        assert cuda_report.architectures() == ["86"]


@needs_nvrtc
def test_devices_compiles_ahead(cache, monkeypatch, calls):
    monkeypatch.setattr(cuda_report, "usual", lambda: [QUICK, cuda_report.Instance("lz4", "lz4")])
    said = devices("--architectures", "80, 90,80")
    assert re.search(r"kernel +\S sm_80 +\S sm_90", said)
    assert re.search(r"all_finite<f32> +\S \d+ +\S \d+", said)
    assert "4 kernels compiled or found in" in said
    assert len(list(cache.glob("*.cubin"))) == 4
    calls.clear()
    assert "4 compiled" in devices("--compile", "--architectures", "90")
    assert not calls


def test_devices_says_what_is_missing_for_compiling(cache, monkeypatch):
    for asked in ("70", "sm_90", "9.0", "80,", "٩٠"):
        message = devices("--architectures", asked, code=RecipeError)
        assert "is no compute capability that gpuem runs on" in message
        assert "75,80,86,89,90,100,120" in message
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    assert "CuPy is not installed: pip install" in devices("--architectures", "90", code=DeviceError)


@needs_nvrtc
def test_devices_says_how_to_get_a_compiler(cache, monkeypatch):
    from cupy.cuda import nvrtc

    def missing():
        raise RuntimeError('Failure finding "libnvrtc.so": No such file: libnvrtc.so*\nlooked everywhere')

    monkeypatch.setattr(nvrtc, "getVersion", missing)
    message = devices("--architectures", "90", code=DeviceError)
    assert 'Failure finding "libnvrtc.so"' in message
    assert "looked" not in message
    assert "pip install 'nvidia-cuda-nvrtc==13.*'" in message
