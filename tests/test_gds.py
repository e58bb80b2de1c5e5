"""GPUDirect without a GPU: kvikio absent, the real one without a driver, a fake one that fails on demand, and the real
one reading real bytes into host memory.

The real kvikio runs in processes of its own: it can't be loaded twice, and its driver is a stub that only they may see.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import weakref

import numpy as np
import pytest

from gpuem.errors import DataError, DeviceError, InputError, RecipeError
from gpuem.formats.source import File
from gpuem.storage import gds

FAKE = {
    "__init__.py": """
        import enum, os, threading, time
        class CompatMode(enum.IntEnum):
            OFF, ON, AUTO = range(3)
        calls, plan = [], {}
        class CuFile:
            def __init__(self, path, flags):
                from kvikio import defaults
                calls.append(("open", str(path), flags, defaults.get("compat_mode").name))
                if "open" in plan:
                    raise plan["open"]
                time.sleep(plan.get("slow to open", 0))
                self.descriptor = os.open(path, os.O_RDONLY)
            def pread(self, target, size=None, file_offset=0, task_size=None):
                calls.append(("pread", size, file_offset, task_size))
                if "pread" in plan:
                    raise plan["pread"]
                return Future(self, target, size, file_offset)
            def close(self):
                calls.append(("close",))
                os.close(self.descriptor)
        class Future:
            def __init__(self, file, target, size, offset):
                # as kvikio does: the address is known to a thread, the object to nobody
                self.address, self.size, self.got = target.ctypes.data, size, None
                self.thread = threading.Thread(target=self.run, args=(file.descriptor, offset))
                self.thread.start()
            def run(self, descriptor, offset):
                import ctypes
                time.sleep(plan.get("slow", 0))
                data = os.pread(descriptor, self.size, offset)[: plan.get("short", self.size)]
                ctypes.memmove(self.address, data, len(data))
                self.got = len(data)
            def done(self):
                return not self.thread.is_alive()
            def get(self):
                self.thread.join()
                calls.append(("get",))
                if "get" in plan:
                    raise plan["get"]
                return self.got
        """,
    "defaults.py": """
        import contextlib, json, os
        from kvikio import CompatMode, calls
        told = json.loads(os.environ["FAKE_KVIKIO"])
        values = {"num_threads": told.get("threads", 1), "compat_mode": CompatMode[told.get("setting", "AUTO")]}
        def get(name):
            return values[name]
        def set(*pair):
            new = pair[0] if len(pair) == 1 else dict([pair])
            calls.append(("set", *new.items()))
            old = {name: values[name] for name in new}
            values.update(new)
            back = contextlib.ExitStack()
            back.callback(values.update, old)
            return back
        def is_compat_mode_preferred():
            return told.get("compatibility", False)
        """,
    "cufile_driver.py": """
        import json, os, time, types
        told = json.loads(os.environ["FAKE_KVIKIO"])
        def driver_open():
            with open(os.environ["FAKE_ASKED"], "a") as file:
                file.write("asked\\n")
            time.sleep(told.get("hangs", 0))
            if "refuses" in told:
                raise RuntimeError(told["refuses"])
            if "dies" in told:
                os._exit(told["dies"])
        def libcufile_version():
            return tuple(told.get("cufile", (1, 20)))
        major, minor = told.get("nvidia_fs", (2, 26))
        properties = types.SimpleNamespace(
            is_gds_available=bool(major or minor), major_version=major, minor_version=minor,
            allow_compat_mode=told.get("may_detour", False))
        """,
}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Put a kvikio in place that tells what it is told to tell; returns the function that does so."""
    package = tmp_path / "fake" / "kvikio"
    package.mkdir(parents=True)
    for name, text in FAKE.items():
        (package / name).write_text(textwrap.dedent(text))
    real = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "kvikio"}
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("FAKE_ASKED", str(tmp_path / "asked"))
    monkeypatch.delenv("KVIKIO_NTHREADS", raising=False)
    (tmp_path / "driver").touch()
    (tmp_path / "udev").mkdir()
    monkeypatch.setattr(gds, "_DRIVER", tmp_path / "driver")
    monkeypatch.setattr(gds, "_UDEV", tmp_path / "udev")

    def install(**told):
        monkeypatch.setenv("FAKE_KVIKIO", json.dumps(told))
        gds._cufile.cache_clear()
        for name in [name for name in sys.modules if name.split(".")[0] == "kvikio"]:
            del sys.modules[name]
        return importlib.import_module("kvikio")

    yield install
    gds._cufile.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "kvikio"]:
        del sys.modules[name]
    sys.modules.update(real)


@pytest.fixture
def data(tmp_path):
    """A file of an odd size whose blocks differ, and its bytes."""
    content = np.random.default_rng(3).integers(0, 256, 1_000_003, np.uint8)
    path = tmp_path / "scan.raw"
    content.tofile(path)
    return File.of(path), content


def asked(tmp_path):
    path = tmp_path / "asked"
    return len(path.read_text().splitlines()) if path.exists() else 0


# whether it works


class Absent:
    """Finder that knows of no kvikio, as Python does where it isn't installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "kvikio":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_without_kvikio(fake, data, monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [Absent, *sys.meta_path])
    now = gds.mode()
    assert (now.available, now.threads) == (False, 0)
    assert now.reason == "kvikio isn't installed; install kvikio-cu13 (CUDA 13) or kvikio-cu12 (CUDA 12)"
    assert gds.choose("auto", (data[0],), True) == ("pinned", f"GPUDirect isn't available: {now.reason}")
    for direct in (True, False):
        with pytest.raises(DeviceError, match="isn't installed"):
            gds.Reader((data[0],), direct=direct)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise ImportError('libkvikio.so: cannot open')", "libkvikio.so: cannot open"),
        ("raise ModuleNotFoundError('No module named rapids_logger', name='rapids_logger')", "rapids_logger"),
        ("raise RuntimeError('KvikIO failure at: /cpp/defaults.hpp:45: unknown config value KVIKIO_NTHREADS=x')", "=x"),
        ("pass", "get"),
    ],
)
def test_a_broken_kvikio(fake, tmp_path, text, reason):
    fake()
    (tmp_path / "fake" / "kvikio" / "defaults.py").write_text(text)
    now = gds.mode()
    assert (now.available, now.threads) == (False, 0)
    assert now.reason.startswith("kvikio can't be used: ")
    assert reason in now.reason
    assert "/cpp/" not in now.reason


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"compatibility": True, "setting": "ON"}, "switched on; unset KVIKIO_COMPAT_MODE"),
        ({"compatibility": True, "cufile": (0, 0)}, "finds no libcufile"),
        ({"compatibility": True}, "Windows Subsystem for Linux"),
        ({"nvidia_fs": (0, 0)}, "neither the nvidia-fs module nor PCI P2PDMA"),
        ({"refuses": "Unable to open GDS file driver: CUDA driver error"}, "can't be opened: RuntimeError: Unable"),
        ({"dies": 139}, "can't be opened: exit code 139"),
    ],
)
def test_why_not(fake, told, reason):
    fake(**told)
    now = gds.mode()
    assert (now.available, now.threads) == (False, 8)
    assert reason in now.reason


def test_without_udev_and_without_a_driver_cufile_is_never_asked(fake, tmp_path, monkeypatch):
    fake(compatibility=True)
    monkeypatch.setattr(gds, "_UDEV", tmp_path / "nowhere")
    assert f"--volume {tmp_path / 'nowhere'}" in gds.mode().reason
    fake()
    monkeypatch.setattr(gds, "_DRIVER", tmp_path / "nowhere")
    assert "there is no NVIDIA driver" in gds.mode().reason
    assert asked(tmp_path) == 0


def test_what_it_works_with(fake, tmp_path, monkeypatch):
    fake(nvidia_fs=(2, 26))
    assert gds.mode() == gds.Mode(True, "cuFile 1.20 with nvidia-fs 2.26", 8)
    gds.mode()
    assert asked(tmp_path) == 1
    fake(threads=12, may_detour=True)
    assert gds.mode().threads == 12
    assert gds.mode().reason.endswith("(allow_compat_mode is on)")
    monkeypatch.setenv("KVIKIO_NTHREADS", "2")
    fake(threads=2)
    assert gds.mode().threads == 2


def test_a_cufile_that_never_answers(fake, monkeypatch):
    fake(hangs=60)
    monkeypatch.setattr(gds, "_PATIENCE_SECONDS", 1.5)
    start = time.perf_counter()
    assert gds.mode() == gds.Mode(False, "cuFile didn't answer within 1.5 s; gdscheck -p says more", 8)
    assert time.perf_counter() - start < 20


def compiled(folder, name, text):
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc")
    folder.mkdir(exist_ok=True)
    (folder / "source.c").write_text(textwrap.dedent(text))
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / name, folder / "source.c"], check=True)
    return folder


@pytest.mark.parametrize(("features", "available"), [(0b10000, True), (0b01111, False)])
def test_p2pdma_without_nvidia_fs(fake, tmp_path, monkeypatch, features, available):
    text = f"""
        struct {{ int error, driver; }} static const fine;
        struct properties {{
            struct {{ unsigned major, minor; unsigned long poll, direct; unsigned status, control; }} module;
            unsigned features, rest[5];
        }};
        long cuFileDriverGetProperties(struct properties *p) {{ p->features = {features}; return *(long *)&fine; }}
        """
    library = compiled(tmp_path / "cufile", "libcufile.so.0", text)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(library))
    fake(nvidia_fs=(0, 0))
    assert gds.mode().available is available
    assert (gds.mode().reason == "cuFile 1.20 with PCI P2PDMA") is available


# reading, with a kvikio that reads into host memory and fails on demand


def test_blocks_arrive(fake, data):
    kvikio = fake()
    file, content = data
    reader = gds.Reader((file,))
    ring = [np.zeros(100_000, np.uint8) for _ in range(4)]
    random = np.random.default_rng(5)
    for _ in range(10):
        places = [(int(random.integers(900_000)), int(random.integers(1, 100_000))) for _ in ring]
        readings = [reader.read(0, *place, target) for place, target in zip(places, ring, strict=True)]
        for reading, (offset, length), target in zip(readings, places, ring, strict=True):
            reading.wait()
            assert reading.done()
            np.testing.assert_array_equal(target[:length], content[offset : offset + length])
    before = ring[0].copy()
    reader.read(0, np.int64(1_000_000), np.int64(3), ring[0]).wait()
    np.testing.assert_array_equal(ring[0][:3], content[-3:])
    np.testing.assert_array_equal(ring[0][3:], before[3:])
    reader.close()
    opened = [call for call in kvikio.calls if call[0] == "open"]
    assert opened == [("open", str(file.path), "r", "OFF")]
    assert kvikio.calls[-1] == ("close",)
    assert ("pread", 3, 1_000_000, 16 << 20) in kvikio.calls


def test_settings_of_the_process(fake, data, monkeypatch):
    kvikio = fake()
    values = importlib.import_module("kvikio.defaults").values
    reader = gds.Reader((data[0],))
    assert values["num_threads"] == 8
    reader.open(0)
    assert values["compat_mode"] is kvikio.CompatMode.AUTO
    detour = gds.Reader((data[0],), direct=False)
    detour.open(0)
    assert [call[3] for call in kvikio.calls if call[0] == "open"] == ["OFF", "AUTO"]
    # the user's word counts
    monkeypatch.setenv("KVIKIO_NTHREADS", "3")
    kvikio = fake(threads=3)
    gds.Reader((data[0],))
    assert not kvikio.calls


def test_a_short_read(fake, data):
    fake().plan["short"] = 11
    reading = gds.Reader((data[0],)).read(0, 4096, 8192, np.zeros(8192, np.uint8))
    for _ in range(2):
        with pytest.raises(DataError, match=r"scan\.raw: only 11 of 8192 bytes at 4096 could be read"):
            reading.wait()


@pytest.mark.parametrize("when", ["get", "pread"])
@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (RuntimeError("KvikIO failure at: /cpp/cuda/posix_io.hpp:173: POSIX error on pread: EOF"), DataError, "EOF"),
        (OSError(5, "Input/output error"), DataError, "Input/output error"),
        (RuntimeError("CUDA error at: /cpp/x.cpp:1: CUDA_ERROR_ILLEGAL_ADDRESS(oh)"), DeviceError, "ILLEGAL_ADDRESS"),
        (RuntimeError(""), DataError, "RuntimeError"),
    ],
)
def test_a_failing_read(fake, data, when, error, kind, words):
    fake().plan[when] = error
    reader = gds.Reader((data[0],))

    def read():
        reader.read(0, 4096, 512, np.zeros(512, np.uint8)).wait()

    with pytest.raises(kind, match=rf"scan\.raw: reading 512 bytes at 4096 through kvikio: .*{words}") as caught:
        read()
    assert "/cpp/" not in str(caught.value)
    assert caught.value.__cause__ is error
    # nothing is left behind that closing would wait for
    assert not reader._under_way


@pytest.mark.parametrize(("offset", "length"), [(-1, 5), (0, -5), (0, 1_000_004), (1_000_003, 1), (2**62, 2**62)])
def test_blocks_outside_the_file(fake, data, offset, length):
    kvikio = fake()
    with pytest.raises(DataError, match=f"{length} bytes at {offset} isn't within its 1000003 bytes"):
        gds.Reader((data[0],)).read(0, offset, length, np.zeros(10, np.uint8))
    assert not [call for call in kvikio.calls if call[0] in ("open", "pread")]


def test_files_that_are_gone_changed_or_refused(fake, data, tmp_path):
    kvikio = fake()
    file, content = data
    other = tmp_path / "other.raw"
    shutil.copy(file.path, other)
    gone = File.of(other)
    other.unlink()
    reader = gds.Reader((file, gone))
    with pytest.raises(InputError, match=r"other\.raw: No such file"):
        reader.read(1, 0, 10, np.zeros(10, np.uint8))
    content[:500].tofile(file.path)
    with pytest.raises(InputError, match=r"scan\.raw: changed .*1000003 bytes then, 500 now"):
        reader.read(0, 0, 10, np.zeros(10, np.uint8))
    assert kvikio.calls[-1] == ("close",)
    kvikio.plan["open"] = RuntimeError("cuFile error at: /cpp/f.cpp:1: CU_FILE_IO_NOT_SUPPORTED")
    with pytest.raises(DeviceError, match=r"scan\.raw: cuFile can't read it straight into a GPU: CU_FILE_IO_NOT_SUPP"):
        gds.Reader((File.of(file.path),)).open(0)
    assert importlib.import_module("kvikio.defaults").values["compat_mode"] is kvikio.CompatMode.AUTO


def test_the_detour_is_not_forbidden_where_cufile_would_hang(fake, data):
    kvikio = fake(nvidia_fs=(0, 0))
    with pytest.raises(DeviceError, match=r"neither the nvidia-fs module nor PCI P2PDMA.*Ask for auto or for pinned"):
        gds.Reader((data[0],))
    gds.Reader((data[0],), direct=False).open(0)
    assert [call[3] for call in kvikio.calls if call[0] == "open"] == ["AUTO"]


def test_closing_waits_for_reads_that_nobody_waited_for(fake, data):
    kvikio = fake()
    kvikio.plan.update(slow=0.3, get=RuntimeError("nobody asks"))
    reader = gds.Reader((data[0],))
    target = np.zeros(1000, np.uint8)
    alive = weakref.ref(target)
    reader.read(0, 0, 1000, target)
    del target
    gc.collect()
    # memory that is being written to must not be freed
    assert alive() is not None
    reader.close()
    assert kvikio.calls[-2:] == [("get",), ("close",)]
    assert alive() is None


def test_a_forgotten_reader_closes_its_files(fake, data):
    kvikio = fake()
    gds.Reader((data[0],)).read(0, 0, 1000, np.zeros(1000, np.uint8))
    gc.collect()
    assert kvikio.calls[-2:] == [("get",), ("close",)]


def test_threads_share_a_reader(fake, data):
    kvikio = fake()
    kvikio.plan["slow to open"] = 0.1
    file, content = data
    reader = gds.Reader((file,))
    wrong = []

    def work(seed):
        target = np.zeros(50_000, np.uint8)
        for offset in np.random.default_rng(seed).integers(0, 950_000, 20):
            reader.read(0, int(offset), target.size, target).wait()
            if (target != content[offset : offset + target.size]).any():
                wrong.append(offset)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len([call for call in kvikio.calls if call[0] == "open"]) == 1


# the choice


def cold(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    if gds.cached_share(path) != 0:
        pytest.skip("the file system keeps pages it was told to drop")
    return File.of(path)


def test_auto_takes_gds_for_cold_large_aligned_blocks_only(fake, data):
    fake()
    file = cold(data[0].path)
    kind, reason = gds.choose("auto", (file,), True)
    assert kind == "gds"
    assert reason == "0% of the files lie in the page cache, and GPUDirect works: cuFile 1.20 with nvidia-fs 2.26"
    kind, reason = gds.choose("auto", (file,), False)
    assert (kind, "multiples of 4096" in reason) == ("pinned", True)
    file.path.read_bytes()
    kind, reason = gds.choose("auto", (file,), True)
    assert (kind, reason) == ("pinned", "100% of the files lie in the page cache, from where pinned memory is faster")


def test_large_files_count_more_than_small_ones(fake, tmp_path):
    fake()
    files = []
    for k, size in enumerate((4_000_000, 100_000, 100_000)):
        path = tmp_path / f"{k}.raw"
        path.write_bytes(np.random.default_rng(k).bytes(size))
        files.append(cold(path))
    for file in files[1:]:
        file.path.read_bytes()
    assert gds.choose("auto", tuple(files), True)[1].startswith("5% of")
    files[0].path.read_bytes()
    assert gds.choose("auto", tuple(files), True)[0] == "pinned"


@pytest.mark.parametrize("share", [None, 0.5, 0.4999])
def test_the_limit_of_cold(fake, data, monkeypatch, share):
    fake()
    monkeypatch.setattr(gds, "cached_share", lambda path: share)
    kind, reason = gds.choose("auto", (data[0],) * 3, True)
    assert kind == ("gds" if share == 0.4999 else "pinned")
    assert ("doesn't say" in reason) is (share is None)


def test_thousands_of_files_are_sampled(fake, data, monkeypatch):
    kvikio = fake()
    monkeypatch.setattr(gds, "cached_share", lambda path: 0.0)
    assert gds.choose("auto", (data[0],) * 5000, True)[0] == "gds"
    assert 16 <= len([call for call in kvikio.calls if call[0] == "open"]) < 32


def test_what_is_asked_for_is_done_or_refused(fake, data):
    fake()
    files = (data[0],)
    data[0].path.read_bytes()
    assert gds.choose("gds", files, False) == ("gds", "GPUDirect was asked for: cuFile 1.20 with nvidia-fs 2.26")
    kvikio = fake()
    kvikio.plan["open"] = RuntimeError("no O_DIRECT here")
    assert gds.choose("auto", files, True)[0] == "pinned"
    assert "no O_DIRECT here" in gds.choose("auto", files, True)[1]
    with pytest.raises(DeviceError, match=r"scan\.raw: cuFile can't .* no O_DIRECT here.*Ask for auto or for pinned"):
        gds.choose("gds", files, True)
    fake(nvidia_fs=(0, 0))
    with pytest.raises(DeviceError, match="load nvidia-fs"):
        gds.choose("gds", files, True)
    assert gds.choose("pinned", files, True) == ("pinned", "pinned memory was asked for")
    with pytest.raises(RecipeError, match="'direct'; auto, pinned and gds"):
        gds.choose("direct", files, True)


def test_a_file_that_is_gone_is_told_by_the_choice(fake, data):
    fake()
    data[0].path.unlink()
    with pytest.raises(InputError, match="No such file"):
        gds.choose("auto", (data[0],), True)


@pytest.mark.parametrize(
    ("offset", "length", "suits"),
    [
        ([0, 4096, 1 << 30], [1 << 20] * 3, True),
        ([0, 4096], [2 << 20, 5], True),
        ([0, 4097], [1 << 20] * 2, False),
        ([2048], [1 << 24], False),
        ([0, 4096], [1 << 20, (1 << 20) - 1], False),
        ([], [], False),
    ],
)
def test_which_blocks_suit(offset, length, suits):
    assert gds.aligned(np.array(offset, np.int64), np.array(length, np.int64)) is suits


# the real kvikio

STUB = """
    /* a CUDA driver that isn't initialised: kvikio takes every pointer for host memory then */
    #define NONE(name) int name(void) { return 3; }
    NONE(cuInit) NONE(cuMemHostAlloc) NONE(cuMemFreeHost) NONE(cuMemHostRegister_v2) NONE(cuMemHostUnregister)
    NONE(cuMemcpyHtoDAsync_v2) NONE(cuMemcpyDtoHAsync_v2) NONE(cuMemcpyAsync) NONE(cuMemcpyBatchAsync)
    NONE(cuMemcpyBatchAsync_v2) NONE(cuPointerGetAttribute) NONE(cuPointerGetAttributes) NONE(cuCtxCreate_v2)
    NONE(cuCtxCreate_v4) NONE(cuCtxDestroy_v2) NONE(cuCtxPushCurrent_v2) NONE(cuCtxPopCurrent_v2) NONE(cuCtxGetCurrent)
    NONE(cuCtxGetDevice) NONE(cuMemGetAddressRange_v2) NONE(cuGetErrorName) NONE(cuGetErrorString) NONE(cuDeviceGet)
    NONE(cuDeviceGetCount) NONE(cuDeviceGetAttribute) NONE(cuDevicePrimaryCtxRetain) NONE(cuDevicePrimaryCtxRelease_v2)
    NONE(cuStreamSynchronize) NONE(cuStreamCreate) NONE(cuStreamDestroy_v2) NONE(cuEventSynchronize) NONE(cuEventCreate)
    NONE(cuEventDestroy_v2) NONE(cuEventRecord) NONE(cuEventQuery) NONE(cuLaunchHostFunc)
    int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
    """

needs_kvikio = pytest.mark.skipif(importlib.util.find_spec("kvikio") is None, reason="kvikio isn't installed")


def run(code, **environment):
    """Run code beside the real kvikio, in a process that is ended should it hang."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KVIKIO_")}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_kvikio
@pytest.mark.skipif(gds._DRIVER.exists(), reason="this machine has a driver")
@pytest.mark.parametrize("setting", ["AUTO", "ON", "OFF"])
def test_the_real_kvikio_without_a_driver(setting):
    code = "from gpuem.storage import gds; print(gds.mode())"
    told = run(code, KVIKIO_NTHREADS="3", KVIKIO_COMPAT_MODE=setting)
    assert told.startswith("Mode(available=False, reason='there is no NVIDIA driver")
    assert told.endswith("threads=3)")


@needs_kvikio
@pytest.mark.parametrize("threads", ["", "1"])
def test_the_real_kvikio_reads_real_bytes_into_host_memory(tmp_path, threads):
    stub = compiled(tmp_path / "stub", "libcuda.so.1", STUB)
    content = np.random.default_rng(7).integers(0, 256, 70_000_001, np.uint8)
    content.tofile(tmp_path / "scan.raw")
    code = """
        import contextlib, os
        from pathlib import Path
        import numpy as np
        from gpuem.errors import DataError, DeviceError, InputError
        from gpuem.formats.source import File
        from gpuem.storage import gds

        def told(kind, act):
            try:
                act()
            except kind as error:
                return str(error)
            raise AssertionError("no error")

        path = Path("scan.raw").absolute()
        content = np.fromfile(path, np.uint8)
        files = (File.of(path), File(path.with_name("gone"), 10, 0))
        told(DeviceError, lambda: gds.Reader(files))
        reader = gds.Reader(files, direct=False)
        import kvikio.defaults
        assert kvikio.defaults.get("num_threads") == int(os.environ.get("KVIKIO_NTHREADS", 8))

        # aligned and not, one task and several, below and above kvikio's limit for threads, the very end
        places = [(0, 70_000_001), (4096, 33_554_432), (1, 16_777_217), (12_345, 1), (8, 16_383), (69_999_998, 3)]
        targets = [np.full(length + 3, 7, np.uint8) for _, length in places]
        readings = [reader.read(0, *place, target) for place, target in zip(places, targets)]
        for reading, (offset, length), target in zip(readings, places, targets):
            reading.wait()
            assert (target[:length] == content[offset : offset + length]).all(), (offset, length)
            assert (target[length:] == 7).all()

        # into part of a larger buffer, typed and of two dimensions
        ring = np.zeros((4, 1000, 50), np.uint16)
        reader.read(0, 4097, 99_999, ring[2]).wait()
        assert (ring[2].reshape(-1).view(np.uint8)[:-1] == content[4097 : 4097 + 99_999]).all()
        assert not ring[:2].any() and not ring[3].any() and not ring[2].reshape(-1).view(np.uint8)[-1]

        assert "gone: No such file" in told(InputError, lambda: reader.read(1, 0, 10, targets[0]))
        os.truncate(path, 20_000_000)
        late = reader.read(0, 0, 70_000_001, targets[0])
        assert "scan.raw: reading 70000001 bytes at 0 through kvikio: POSIX error on pread: EOF" in told(
            DataError, late.wait)
        assert "changed since it was opened (70000001 bytes then, 20000000 now)" in told(
            InputError, lambda: gds.Reader(files, direct=False).open(0))
        # nobody waits for these: closing has to
        for k in range(50):
            reader.read(0, k, 5_000_000, np.empty(5_000_000, np.uint8))
        reader.close()
        print("fine")
        """
    environment = {"KVIKIO_NTHREADS": threads} if threads else {}
    assert (
        run(
            f"import os; os.chdir({str(tmp_path)!r})\n" + textwrap.dedent(code),
            LD_LIBRARY_PATH=str(stub),
            **environment,
        )
        == "fine"
    )
