"""The GPU as it can go wrong: absent, too old, full, lost; what is chosen, what is said, what it takes."""

from __future__ import annotations

import logging
import sys

import numpy as np
import pytest
import reference
from standin import installed

import gpuem
from gpuem import backends, job, recipe
from gpuem.backends import cuda_device, cuda_plan
from gpuem.tiles import Sizes


@pytest.fixture
def ds(tmp_path):
    frames = reference.planted((200, 16, 24), "u2", 1)
    (tmp_path / "a.raw").write_bytes(frames.tobytes())
    return gpuem.open(tmp_path / "a.raw", scan=(10, 20), frame=(16, 24), dtype="u2")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(cuda_plan, "SIZES", Sizes(runs_tile=8192, tile=8192, shard=32768))
    monkeypatch.setattr("gpuem.tiles.LEAST_FRAMES", 1)


CHOSEN = [gpuem.Sum(), gpuem.VirtualDetector(outer=6), gpuem.CenterOfMass()]


def absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)


class TestWithoutAGpu:
    @pytest.mark.parametrize(
        ("knobs", "said"),
        [
            ({"driver_error": 35}, "no NVIDIA driver that works.*driver version is insufficient"),
            ({"driver_error": 100}, "no CUDA-capable device"),
            ({"devices": 0}, "shows no GPU to this process"),
            ({"compute_capability": "70"}, r"too old: compute capability 7\.0, needed is 7\.5"),
        ],
    )
    def test_cuda_is_refused_and_auto_says_why_it_takes_the_cpu(self, ds, caplog, knobs, said):
        with installed("late", **knobs):
            with pytest.raises(gpuem.DeviceError, match=f'{said}.*device = "cpu"'):
                gpuem.run(ds, CHOSEN, device="cuda")
            with caplog.at_level(logging.INFO, "gpuem"):
                found = gpuem.run(ds, CHOSEN, device="auto")
        assert found.provenance["device"] == "cpu"
        (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("device:")]
        assert line.startswith("device: cpu (")

    def test_without_cupy(self, ds, monkeypatch):
        absent(monkeypatch)
        with pytest.raises(gpuem.DeviceError, match=r"CuPy is not installed: pip install 'gpuem\[cuda13\]'"):
            gpuem.run(ds, CHOSEN, device="cuda")
        assert gpuem.run(ds, CHOSEN).provenance["device"] == "cpu"
        with pytest.raises(gpuem.DeviceError, match="CuPy is not installed"):
            ds.to_device()

    def test_the_gpu_that_is_hidden_is_named(self, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        with installed("late", devices=0):
            assert "CUDA_VISIBLE_DEVICES is ''" in cuda_device.why_not()


class TestWithOne:
    def test_auto_takes_it_and_says_so(self, ds, caplog):
        with installed("late"), caplog.at_level(logging.INFO, "gpuem"):
            found = gpuem.run(ds, CHOSEN)
        facts = found.provenance
        assert facts["device"] == "cuda"
        assert facts["gpu"]["name"] == "Stand-in for a GPU"
        assert facts["transfer"]["kind"] == "pinned"
        assert facts["transfer"]["reason"]
        assert any(r.getMessage().startswith("device: cuda (Stand-in") for r in caplog.records)

    def test_cpu_is_still_the_cpu(self, ds):
        with installed("late") as device:
            assert gpuem.run(ds, CHOSEN, device="cpu").provenance["device"] == "cpu"
            assert device.peak_bytes == 0

    def test_gpudirect_that_isn_t_there_is_refused(self, ds):
        with installed("late"), pytest.raises(gpuem.DeviceError, match="GPUDirect"):
            gpuem.run(ds, CHOSEN, transfer="gds")

    @pytest.mark.parametrize("kind", ["gzip", "array", "resident"])
    def test_what_no_disk_brings_is_not_said_to_come_by_gpudirect(self, ds, tmp_path, monkeypatch, kind):
        import h5py

        from gpuem.storage import gds

        def never(*asked):
            raise AssertionError("nothing is read that GPUDirect could bring")

        monkeypatch.setattr(gds, "choose", never)
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file.create_dataset("data", data=ds[...], chunks=(1, 5, 16, 24), compression="gzip")
        with installed("late"):
            data = {"gzip": gpuem.open(tmp_path / "a.h5"), "array": ds[...]}.get(kind)
            if kind == "resident":
                monkeypatch.setattr(gds, "choose", lambda *asked: ("pinned", "a test"))
                data = ds.to_device()
                monkeypatch.setattr(gds, "choose", never)
            found = gpuem.run(data, CHOSEN).provenance["transfer"]
            assert found["kind"] == ("resident" if kind == "resident" else "pinned")
            if kind != "resident":
                with pytest.raises(gpuem.DeviceError, match="nothing can come straight from the disk"):
                    gpuem.run(data, CHOSEN, transfer="gds")

    def test_options_of_a_gpu_are_not_dropped_silently_on_a_cpu(self, ds, caplog):
        with caplog.at_level(logging.INFO, "gpuem"):
            gpuem.run(ds, CHOSEN, device="cpu", transfer="gds")
        assert "transfer and device_memory mean nothing on the CPU" in caplog.text

    def test_importing_touches_no_device(self):
        with installed("late") as device:
            import gpuem.stream  # noqa: F401

            backends.select("cpu")
            assert not device.launches
            assert device.peak_bytes == 0

    def test_compiled_once_for_all_runs(self, ds, monkeypatch):
        from gpuem.backends import cuda_compile

        compiled = []
        original = cuda_compile.compile_kernel
        monkeypatch.setattr(cuda_compile, "compile_kernel", lambda *a: compiled.append(a[1]) or original(*a))
        with installed("late"):
            gpuem.run(ds, CHOSEN)
            first = len(compiled)
            gpuem.run(ds, CHOSEN)
        assert 0 < first == len(compiled) == len(set(compiled))


class TestMemory:
    @pytest.mark.parametrize("kind", ["plain", "swapped", "corrected", "chunks", "host"])
    def test_the_peak_stays_below_the_plan(self, tmp_path, small, kind):
        import h5py
        import hdf5plugin

        data = reference.planted((8, 25, 16, 24), "u2", 2) % 50
        if kind in ("chunks", "host"):
            filters = dict(hdf5plugin.Bitshuffle()) if kind == "chunks" else {"compression": "gzip"}
            with h5py.File(tmp_path / "a.h5", "w") as file:
                file.create_dataset("data", data=data, chunks=(2, 3, 9, 24), **filters)
            ds = gpuem.open(tmp_path / "a.h5")
        else:
            stored = ">u2" if kind == "swapped" else "<u2"
            (tmp_path / "a.raw").write_bytes(data.astype(stored).tobytes())
            ds = gpuem.open(tmp_path / "a.raw", scan=(8, 25), frame=(16, 24), dtype=stored)
        if kind == "corrected":
            ds = ds.corrected(dark=np.ones((16, 24)), gain=np.ones((16, 24)), dead=[[3, 3]])
        masks = [gpuem.VirtualDetector(name=f"m{k}", shape="sectors", sectors=20, outer=9) for k in range(2)]
        weights = [
            gpuem.VirtualDetector(name=f"w{k}", shape="mask", mask=np.random.default_rng(k).normal(size=(16, 24)))
            for k in range(17)
        ]
        chosen = [*CHOSEN, *masks, *weights]
        with installed("late") as device:
            planned = sum(job.prepare(ds, chosen, recipe.run_section(device="cuda")).plan.device_nbytes.values())
            device_before = device.peak_bytes
            gpuem.run(ds, chosen, device="cuda", threads=2)
            peak = device.peak_bytes
        assert device_before <= planned
        # all that is counted is allocated; a little is rounded up
        assert 0.3 * planned < peak <= planned + 64 * 512, (peak, planned)

    def test_nothing_stays_behind(self, ds, small):
        with installed("late") as device:
            gpuem.run(ds, CHOSEN)
            first = device.live_bytes
            for _ in range(3):
                gpuem.run(ds, CHOSEN)
            assert device.live_bytes <= first <= 1 << 16

    def test_nothing_is_allocated_once_it_runs(self, ds, small, monkeypatch):
        from gpuem.backends import cuda_session

        with installed("late") as device:
            during = []
            original = cuda_session.Session.add

            def add(self, *arguments):
                original(self, *arguments)
                during.append((device.live_bytes, device.pinned_bytes))

            monkeypatch.setattr(cuda_session.Session, "add", add)
            gpuem.run(ds, CHOSEN)
            assert len(during) > 5
            assert len(set(during)) == 1

    def test_a_gpu_that_is_too_small_is_refused_with_numbers(self, ds):
        said = r"MB of the GPU's memory and may take 0\.2 MB \(0\.3 MB of it are free\).*slots"
        with installed("late", memory_nbytes=1 << 18), pytest.raises(gpuem.PlanError, match=said):
            gpuem.run(ds, CHOSEN)

    def test_device_memory_limits_it(self, ds):
        with installed("late"), pytest.raises(gpuem.PlanError, match=r"may take 0\.1 MB"):
            gpuem.run(ds, CHOSEN, device_memory="100 kB")


class TestKernelCache:
    def test_files_can_be_read_by_others_and_damaged_ones_are_made_anew(self, ds, tmp_path, monkeypatch, caplog):
        from gpuem.backends import cuda_compile

        with installed("late"):
            monkeypatch.setenv("GPUEM_KERNEL_CACHE", str(tmp_path / "kernels"))
            gpuem.run(ds, CHOSEN)
            kept = list((tmp_path / "kernels").iterdir())
            assert kept
            assert all(path.stat().st_mode & 0o777 == 0o644 for path in kept)
            assert {path.suffix for path in kept} == {".cubin", ".symbol"}
            for path in kept:
                if path.suffix == ".cubin":
                    path.write_bytes(path.read_bytes()[:100])
            cuda_compile._loaded.clear()
            with caplog.at_level(logging.INFO, "gpuem"):
                gpuem.run(ds, CHOSEN)
        assert "is compiled again" in caplog.text

    def test_a_folder_that_can_t_be_written_leaves_nothing_behind(self, ds, tmp_path, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        with installed("late"):
            (tmp_path / "file").write_text("in the way")
            monkeypatch.setenv("GPUEM_KERNEL_CACHE", str(tmp_path / "file" / "kernels"))
            gpuem.run(ds, CHOSEN)
            assert not list(tmp_path.glob("gpuem-*.cubin"))


class TestFailures:
    def test_without_the_compiler_s_library(self, ds, monkeypatch):
        with installed("late"):
            from cupy.cuda import nvrtc

            def missing():
                raise RuntimeError('Failure finding "libnvrtc.so.13"')

            monkeypatch.setattr(nvrtc, "getVersion", missing)
            with pytest.raises(gpuem.DeviceError, match=r"NVRTC.*can't be loaded.*libnvrtc.*pip install"):
                gpuem.run(ds, CHOSEN)

    def test_page_locked_memory_that_the_host_hasn_t(self, ds, monkeypatch):
        with installed("late"):
            import cupy

            def refused(nbytes):
                raise cupy.cuda.runtime.CUDARuntimeError(2)

            monkeypatch.setattr(cupy.cuda, "alloc_pinned_memory", refused)
            with pytest.raises(gpuem.DeviceError, match="MB of page-locked host memory can't be had"):
                gpuem.run(ds, CHOSEN)

    @pytest.mark.parametrize("schedule", ["late", "early"])
    @pytest.mark.parametrize("after", [0, 1, 7])
    def test_a_launch_that_fails_ends_the_run_in_words(self, ds, small, schedule, after):
        with installed(schedule) as device:
            device.fail_launch(after=after)
            with pytest.raises(gpuem.DeviceError, match=r"the GPU failed: .*nvidia-smi"):
                gpuem.run(ds, CHOSEN)

    @pytest.mark.parametrize("after", [0, 3, 7])
    def test_memory_that_another_process_took_meanwhile(self, ds, small, after):
        with installed("late") as device:
            device.fail_allocation(after=after)
            with pytest.raises(
                gpuem.DeviceError, match=r"the GPU's memory is full; .* GB of it are free.*device_memory"
            ):
                gpuem.run(ds, CHOSEN)

    def test_after_a_failure_the_next_run_works(self, ds, small):
        with installed("late") as device:
            device.fail_allocation(after=4)
            with pytest.raises(gpuem.DeviceError):
                gpuem.run(ds, CHOSEN)
        with installed("late"):
            found = gpuem.run(ds, CHOSEN)
        np.testing.assert_array_equal(found["sum/sum"].data, reference.frame_sum(ds[...].reshape(-1, 16, 24)))

    def test_stopping_leaves_no_thread_behind(self, ds, small):
        import threading

        def stop(frames):
            raise KeyboardInterrupt

        with installed("late"), pytest.raises(KeyboardInterrupt):
            gpuem.run(ds, CHOSEN, progress=stop)
        assert not [t for t in threading.enumerate() if t.name.startswith("gpuem-read")]

    def test_kernels_that_don_t_compile_name_their_file(self, ds, monkeypatch):
        from gpuem.backends import cuda_compile

        text = cuda_compile.source("all_sums").replace("WARPS = THREADS / 32", "WARPS = nonsense")
        monkeypatch.setattr(cuda_compile, "source", lambda name: text)
        with (
            installed("late"),
            pytest.raises(gpuem.DeviceError, match=r"(?s)all_sums<u16, 16, true> doesn't compile.*all_sums\.cu:\d+"),
        ):
            gpuem.run(ds, CHOSEN)
