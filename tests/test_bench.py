"""The benchmarks run and check what they measure, so that they don't rot; and --require-gpu does what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import standin
from emulation import needs_compiler
from merlin_writer import raw_frame

import gpuem
from gpuem.backends import cuda_device, cuda_kernels

pytest_plugins = ["pytester"]
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))
import gpu  # noqa: E402
import gpu_data  # noqa: E402
import gpu_measure  # noqa: E402
import gpu_peers  # noqa: E402
import gpu_runs  # noqa: E402

standin_device = standin.standin_device


# ---- the benchmark on the stand-in


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The record of a quick run, and as it was written."""
    out = tmp_path_factory.mktemp("record")
    with standin.installed("late"):
        record = gpu.main(["--quick", "--out", str(out), "--commit", "abc1234"])
    (path,) = out.glob("*.json")
    return record, json.loads(path.read_text())


@needs_compiler
def test_every_section_runs_and_checks_what_it_measures(quick):
    record, _ = quick
    for name, section in record["sections"].items():
        wanted = {"ok", "not measured"} if name == "GPUDirect" else {"ok"}
        assert section["status"] in wanted, f"{name}: {section.get('traceback', section)}"
        assert section["checks_passed"] or name in ("GPUDirect", "peers"), name
    assert len(record["sections"]) == 10


@needs_compiler
def test_the_record_holds_what_a_reader_needs(quick):
    record, written = quick
    assert json.loads(json.dumps(record)) == written
    keys = "device driver cuda_driver cuda_runtime nvrtc cupy numpy python commit date processors"
    assert set(keys.split()) <= record["machine"].keys()
    assert record["machine"]["commit"] == "abc1234"
    kernels = record["sections"]["resident kernels"]["results"]
    assert len(kernels) == 8
    for one in kernels.values():
        assert one["seconds"] > 0
        assert one["of_device_read"] > 0
        assert one["bytes"] == record["data"]["bytes"]
    compiling = record["sections"]["compiling"]["results"]
    assert compiling["cold"]["kernels"] >= 4
    assert compiling["warm"]["kernels"] == 0


@needs_compiler
def test_targets_are_found_and_tiny_data_meet_none(quick):
    record, _ = quick
    found = {one["what"]: one["found"] for one in record["targets"]}
    assert len(found) == 16
    assert {what for what, value in found.items() if value is None} == {
        f"times as fast as {name}" for name, one in record["sections"]["peers"]["results"].items() if "ratio" not in one
    }
    assert all(one["met"] is None for one in record["targets"])
    memory = [value for what, value in found.items() if "memory" in what]
    assert len(memory) == 2
    assert all(0.1 < value <= 1 for value in memory)
    # the same numbers from large data are judged
    judged = gpu.targets({**record, "arguments": {"quick": False}})
    assert {one["met"] for one in judged if "times as fast" not in one["what"]} == {True, False}
    assert "NOT MET" in gpu.table({**record, "targets": judged})


@needs_compiler
def test_a_wrong_result_is_not_timed_and_the_rest_goes_on(tmp_path, monkeypatch):
    real = cuda_kernels.all_sums

    def forgets_the_last_frame(frames, *arguments):
        real(cuda_kernels.DeviceFrames(frames.pixels, frames.starts, frames.count - 1, frames.shape, 2), *arguments)

    monkeypatch.setattr(cuda_kernels, "all_sums", forgets_the_last_frame)
    with standin.installed("early"):
        only = [word for name in ("resident kernels", "decoding") for word in ("--only", name)]
        record = gpu.main(["--quick", "--out", str(tmp_path), *only])
    failed = record["sections"]["resident kernels"]
    assert failed["status"] == "failed"
    assert failed["reason"] == "AssertionError: wrong result: sum: total"
    assert "gpu_kernels.py" in failed["traceback"]
    assert record["sections"]["decoding"]["status"] == "ok"


@needs_compiler
def test_without_time_nothing_runs_and_that_is_recorded(tmp_path):
    with standin.installed("early"):
        record = gpu.main(["--quick", "--minutes", "0", "--out", str(tmp_path)])
    assert {one["status"] for one in record["sections"].values()} == {"skipped"}
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_tests_are_run_and_an_empty_run_or_a_late_one_has_not_passed(tmp_path):
    found = gpu.tests(tmp_path, 300, "tests/test_kernels.py", "-k", "no_such_test")
    assert found["exit"] == "4"
    assert not found["passed"]
    assert any("no test marked gpu was collected" in line for line in found["last_lines"])
    late = gpu.tests(tmp_path, 0.01, "tests/test_kernels.py", "-k", "no_such_test")
    assert (late["exit"], late["passed"]) == ("timed out", False)


@needs_compiler
def test_time_on_the_device_is_that_between_events(standin_device, monkeypatch):
    import cupy

    monkeypatch.setattr(cupy.cuda, "get_elapsed_time", lambda first, last: 5.0, raising=False)
    calls = []
    assert gpu_measure.on_device(lambda: calls.append(1), 3) == [0.005] * 3
    # one to warm up, one that keeps the GPU busy while the host enqueues the others
    assert len(calls) == 5


@needs_compiler
def test_peers_are_checked_before_they_are_compared(standin_device, tmp_path, monkeypatch):
    bench = gpu_data.Bench(tmp_path, 32, (16, 24), 1)
    chosen = [gpuem.Sum(), gpuem.VirtualDetector(name="adf", inner=30 / 16, outer=5), gpuem.CenterOfMass()]
    maps = gpu_runs.on_cpu(bench.plain, chosen).maps
    answers = {
        "libertem": {"check": {"sum/sum": float(maps["sum/sum"].data.sum()), "adf": float(maps["adf"].data.sum())}},
        "py4dstem": {"check": {"com/y": float(maps["com/y"].data.reshape(-1)[:16].mean())}, "frames": 16},
    }
    monkeypatch.setattr(
        gpu_peers, "ask", lambda bench, python, name, _: {"frames": 32, "seconds": 1.0, "GB_s": 2.0} | answers[name]
    )
    found = gpu_peers.compare(bench, "python", 1)
    assert all(one["ratio"] == one["gpuem_GB_s"] / 2 for one in found.values())
    answers["py4dstem"]["check"]["com/y"] *= 1.01
    with pytest.raises(AssertionError, match="wrong result: py4dstem: com/y"):
        gpu_peers.compare(bench, "python", 1)


def test_a_peer_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_peers.MODULES, "libertem", "no_such_package")
    monkeypatch.setattr(sys, "argv", ["gpu_peers.py", "libertem", "file", "1", "2", "3", "1"])
    lines = []
    monkeypatch.setattr("builtins.print", lines.append)
    gpu_peers.main()
    assert "no_such_package isn't there" in json.loads(lines[0][4:])["not installed"]


# ---- its parts


ENCODE = """
import sys
for name in {"hdf5plugin", "imagecodecs", "numcodecs.lz4", "pyarrow"} - {sys.argv[1]}:
    sys.modules[name] = None
import gpu_data, numpy as np, pathlib
for path in map(pathlib.Path, sys.argv[2:]):
    print(gpu_data.write_bitshuffle_lz4(path.with_suffix(".h5"), np.load(path)))
"""


def counts(shape):
    frames = np.random.default_rng(3).poisson(1.5, shape).astype(np.uint16)
    frames[-1, 0, -1] = 65535
    return frames


@pytest.mark.parametrize("library", ["hdf5plugin", "imagecodecs", "numcodecs.lz4", "pyarrow"])
def test_every_encoder_writes_what_gpuem_reads(tmp_path, library):
    """In a process of its own: where hdf5plugin was imported, HDF5 knows the filter ever after."""
    pytest.importorskip(library)
    given = {tmp_path / f"{k}.npy": counts(shape) for k, shape in enumerate([(3, 96, 100), (2, 8, 3)])}
    for path, frames in given.items():
        np.save(path, frames)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "bench"), str(ROOT)])}
    command = [sys.executable, "-c", ENCODE, library, *map(str, given)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(library in line for line in done.stdout.splitlines())
    for path, frames in given.items():
        np.testing.assert_array_equal(gpuem.open(path.with_suffix(".h5"))[...], frames)


def test_its_own_encoder_where_hdf5_knows_the_filter(tmp_path):
    pytest.importorskip("hdf5plugin")
    frames = counts((2, 100, 100))
    assert gpu_data._write_with_own_encoder(tmp_path / "x.h5", frames).startswith("the encoder of this benchmark")
    np.testing.assert_array_equal(gpuem.open(tmp_path / "x.h5")[...], frames)
    with h5py.File(tmp_path / "x.h5") as file:
        np.testing.assert_array_equal(file["data"][...], frames)


def test_without_lz4_nothing_is_claimed(tmp_path, monkeypatch):
    for name in ("hdf5plugin", "imagecodecs", "numcodecs.lz4", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(gpu_data.NotMeasuredError, match="install hdf5plugin"):
        gpu_data.write_bitshuffle_lz4(tmp_path / "x.h5", np.zeros((1, 8, 8), np.uint16))


def test_merlin_frames_are_those_of_the_naive_writer():
    frames = np.random.default_rng(5).integers(0, 4096, (3, 5, 12)).astype(np.uint16)
    expected = b"".join(raw_frame(frame, 12, 1, 1) for frame in frames)
    assert gpu_data.merlin_12bit(frames).tobytes() == expected


def test_no_two_blocks_are_alike(tmp_path):
    gpu_data.write_counts(tmp_path / "x", 3 * gpu_data.BLOCK - 7, (8, 8))
    data = np.fromfile(tmp_path / "x", np.uint16).reshape(-1, 8, 8)
    assert len(data) == 3 * gpu_data.BLOCK - 7
    blocks = [data[k * 256 : k * 256 + 249] for k in range(3)]
    assert not any(np.array_equal(blocks[a], blocks[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert 0.2 < data.mean() < 10


@pytest.mark.parametrize("threads", [1, 3])
def test_a_file_is_read_whole_through_the_slots(tmp_path, monkeypatch, threads):
    monkeypatch.setattr(gpu_measure, "PIECE", 7)
    content = np.random.default_rng(6).integers(0, 256, 95, np.uint8)
    content.tofile(tmp_path / "x")
    slots = [np.zeros(30, np.uint8) for _ in range(4)]
    gpu_measure.read_file(tmp_path / "x", 95, threads, slots)
    np.testing.assert_array_equal(np.concatenate(slots)[:95], content)
    with pytest.raises(EOFError, match="ends at byte 95, 101 were to be read"):
        gpu_measure.read_file(tmp_path / "x", 101, threads, slots)


def test_bench_cpu_runs(capsys):
    pytest.importorskip("hdf5plugin")
    import cpu

    record = cpu.main(["--gib", "0.0625", "--repeats", "1"])
    assert set(record["results"]) == {"sum", "annulus", "com", "three", "masks16", "mib12", "bslz4"}
    assert all(one["gpuem_GB_s"] > 0 for one in record["results"].values())


# ---- pytest -m gpu --require-gpu


PLANTED = """
import pytest

def test_needs_none():
    pass

def test_skips_and_may():
    pytest.skip("unmarked")

@pytest.mark.gpu
def test_needs_one():
    pass
"""
SKIPS = """
import pytest

@pytest.fixture
def library():
    pytest.importorskip("no_such_library", reason="no library")

@pytest.mark.gpu
def test_in_a_fixture(library):
    pass

@pytest.mark.gpu
def test_inside():
    pytest.skip("inside")

@pytest.mark.gpu
@pytest.mark.skipif(True, reason="by a mark")
def test_by_a_mark():
    pass

@pytest.mark.gpu
@pytest.mark.xfail(run=False, reason="not even run")
def test_not_even_run():
    pass

@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(request):
    if request.param == "gpu":
        pytest.skip("by a parameter")

def test_by_a_parameter(machine):
    pass
"""


@pytest.fixture
def project(pytester):
    """A project with this one's conftest, on a machine where no GPU can be used, or where one can."""
    pytester.makeini("[pytest]\naddopts = -ra\nmarkers = gpu: needs a CUDA device\n")

    def make(why, **files):
        text = (ROOT / "tests" / "conftest.py").read_text()
        pytester.makeconftest(f"{text}\n\ndef pytest_configure(config):\n    config.why_no_gpu = {why!r}\n")
        pytester.makepyfile(**files)
        return pytester

    return make


def test_without_a_gpu_marked_tests_are_skipped_and_say_why(project):
    made = project("the driver is too old", test_planted=PLANTED)
    found = made.runpytest("-m", "gpu")
    found.assert_outcomes(skipped=1, deselected=2)
    found.stdout.fnmatch_lines(["*no GPU can be used: the driver is too old*"])
    made.runpytest().assert_outcomes(passed=1, skipped=2)


def test_a_gpu_that_is_required_and_not_there_is_a_failure(project):
    made = project("the driver is too old", test_planted=PLANTED)
    found = made.runpytest("-m", "gpu", "--require-gpu")
    found.assert_outcomes(errors=1, deselected=2)
    found.stdout.fnmatch_lines(["*--require-gpu: a skip is a failure.*no GPU can be used: the driver is too old*"])
    made.runpytest("--require-gpu").assert_outcomes(passed=1, skipped=1, errors=1)


def test_with_a_gpu_marked_tests_run(project):
    made = project("", test_planted=PLANTED)
    for arguments in ((), ("--require-gpu",)):
        made.runpytest("-m", "gpu", *arguments).assert_outcomes(passed=1, deselected=2)
        made.runpytest(*arguments).assert_outcomes(passed=2, skipped=1)


def test_every_skip_of_a_marked_test_is_a_failure(project):
    made = project("", test_skips=SKIPS)
    made.runpytest().assert_outcomes(passed=1, skipped=4, xfailed=1)
    found = made.runpytest("--require-gpu")
    found.assert_outcomes(passed=1, failed=1, errors=4)
    for reason in ("no library", "inside", "by a mark", "by a parameter"):
        found.stdout.fnmatch_lines([f"*--require-gpu: a skip is a failure. Skipped: {reason}*"])


def test_a_file_skipped_as_a_whole_fails_where_it_may_hold_marked_tests(project):
    skip = "import pytest\npytest.importorskip('no_such_library')\n"
    files = {"test_gone": skip + "pytestmark = pytest.mark.gpu\n", "test_other": skip, "test_planted": PLANTED}
    made = project("", **files)
    made.runpytest("-m", "gpu").assert_outcomes(passed=1, skipped=2, deselected=2)
    options = ("-m", "gpu", "--require-gpu", "--continue-on-collection-errors")
    found = made.runpytest(*options)
    found.assert_outcomes(passed=1, skipped=1, errors=1, deselected=2)
    found.stdout.fnmatch_lines(["*--require-gpu: a skip is a failure.*no_such_library*"])


def test_no_marked_test_at_all_is_a_failure(project):
    made = project("", test_planted="def test_needs_none():\n    pass\n")
    for arguments in (("-m", "gpu"), ()):
        found = made.runpytest("--require-gpu", *arguments)
        assert found.ret == pytest.ExitCode.USAGE_ERROR
        found.stderr.fnmatch_lines(["*--require-gpu: no test marked gpu was collected*"])


def test_gpuem_itself_is_asked_for_the_gpu(project, monkeypatch):
    made = project("", test_planted=PLANTED)
    made.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    monkeypatch.setattr(cuda_device, "why_not", lambda: "gpuem says so")
    made.runpytest("-m", "gpu").stdout.fnmatch_lines(["*no GPU can be used: gpuem says so*"])


def test_a_file_with_marked_tests_names_the_marker(project):
    planted = PLANTED.replace("@pytest.mark.gpu", "@getattr(pytest.mark, 'gp' + 'u')")
    found = project("", test_planted=planted).runpytest()
    assert found.ret == pytest.ExitCode.USAGE_ERROR
    found.stderr.fnmatch_lines(["*test_planted.py: its tests are marked gpu; say mark.gpu in the file*"])
