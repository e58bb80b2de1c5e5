"""The stand-in for CuPy: what it offers is CuPy's, and the mistakes that it is there to show do show."""

from __future__ import annotations

import gc
import importlib.util
import inspect
import re
import sys
import threading
import time

import numpy as np
import pytest
import standin
from emulation import needs_compiler
from emulation.build import LaunchError
from standin import SCHEDULES, installed
from standin.device import Operation

from gpuem.backends import cuda_correlate

pytestmark = needs_compiler
standin_device = standin.standin_device

SOURCE = """
typedef unsigned char u8;
template <typename T> __global__ void scaled(const T* from, T* to, long long count, int factor) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) to[i] = factor * from[i];
}
__global__ void fill_shared(u8* out, int count) {
    DYNAMIC_SHARED(u8, shared);
    for (int k = threadIdx.x; k < count; k += blockDim.x) shared[k] = 1;
    __syncthreads();
    if (threadIdx.x == 0) out[0] = shared[count - 1];
}
__global__ void half_barrier() { if (threadIdx.x < 3) __syncthreads(); }
__global__ void architecture(int* out) { *out = __CUDA_ARCH__; }
"""


@pytest.fixture(params=SCHEDULES)
def device(request):
    with installed(request.param) as simulated:
        yield simulated


@pytest.fixture
def late():
    with installed("late") as simulated:
        yield simulated


def kernel(expression, architecture="90"):
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(SOURCE, "source.cu", (), ())
    nvrtc.addNameExpression(program, expression)
    nvrtc.compileProgram(program, ("-std=c++17", f"-arch=sm_{architecture}"))
    code, name = nvrtc.getCUBIN(program), nvrtc.getLoweredName(program, expression)
    nvrtc.destroyProgram(program)
    with open("code.cubin", "wb") as file:
        file.write(code)
    import cupy

    return cupy.RawModule(path="code.cubin").get_function(name)


def scale(from_, to, factor):
    kernel("scaled<int>")((-(-to.size // 64),), (64,), (from_, to, np.int64(to.size), np.int32(factor)))


def pinned(values):
    import cupy

    memory = np.frombuffer(cupy.cuda.alloc_pinned_memory(values.nbytes), values.dtype, values.size)
    memory[:] = values
    return memory


def on_device(values):
    """A device array that holds values before the test begins."""
    import cupy

    array = cupy.empty(values.shape, values.dtype)
    array.set(values)
    cupy.cuda.Device().synchronize()
    return array


def streams(count=2):
    import cupy

    return [cupy.cuda.Stream(non_blocking=True) for _ in range(count)]


def event():
    import cupy

    return cupy.cuda.Event(disable_timing=True)


# ---- what it offers


def offered():
    """Every (path, object) that the stand-in offers."""
    todo = [("cupy", standin.modules()["cupy"])]
    while todo:
        path, thing = todo.pop()
        yield path, thing
        inside = vars(thing) if inspect.ismodule(thing) else {}
        if inspect.isclass(thing):
            inside = {n: inspect.getattr_static(thing, n) for n in dir(thing) if n not in dir(BaseException)}
        todo += [(f"{path}.{name}", value) for name, value in inside.items() if not name.startswith("_")]
        todo += [(f"{path}.{n}", None) for n in ("__version__", "__cuda_array_interface__") if n in inside]


INSTANCES = {
    "ndarray": "shape dtype size nbytes ndim itemsize data",
    "cuda.MemoryPointer": "ptr copy_from_host_async copy_to_host_async memset_async copy_from_device_async",
    "cuda.PinnedMemoryPointer": "ptr",
    "cuda.MemoryPool": "used_bytes total_bytes free_all_blocks",
    "RawKernel": "__call__ num_regs local_size_bytes max_dynamic_shared_size_bytes",
}


def real_cupy():
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("CuPy is not installed: nothing to compare the stand-in with")
    import cupy

    return cupy


def can_be_had(path):
    """Of cuFFT's module nothing is known where its library isn't installed."""
    return not path.startswith("cupy.cuda.cufft") or not cuda_correlate.why_not()


def found(root, path):
    for name in path.split(".")[1:]:
        root = getattr(root, name)
    return root


def parameter_names(function):
    """Names of a function's parameters; of a compiled one from the first line of its documentation."""
    try:
        names = [p.name for p in inspect.signature(function).parameters.values()]
        if names and "kwargs" not in names:
            return names
    except (TypeError, ValueError):
        pass
    lines = [line for line in (function.__doc__ or "").splitlines() if re.match(r"[\w.]+\(.*\)", line)]
    if not lines:
        return None
    inside = re.match(r"[\w.]+\((.*)\)", lines[-1])[1]
    return [re.sub(r"=.*", "", part).split()[-1].lstrip("*\\") for part in inside.split(",") if part.split()]


def test_everything_offered_is_in_cupy():
    cupy = real_cupy()
    paths = [path for path, _ in offered() if can_be_had(path)]
    assert len(paths) > 40
    for path in paths:
        found(cupy, path)
    for place, names in INSTANCES.items():
        for name in names.split():
            assert hasattr(found(cupy, f"cupy.{place}"), name), f"{place}.{name}"


def test_parameters_have_cupys_names():
    cupy, compared = real_cupy(), 0
    from standin import kernels, memory

    pairs = [(path, thing) for path, thing in offered() if inspect.isfunction(thing) or inspect.isclass(thing)]
    pairs = [(path, thing) for path, thing in pairs if can_be_had(path)]
    pairs += [
        (f"cupy.cuda.MemoryPointer.{name}", getattr(memory.MemoryPointer, name))
        for name in INSTANCES["cuda.MemoryPointer"].split()[1:]
    ]
    pairs += [("cupy.RawKernel.__call__", kernels.RawKernel.__call__)]
    for path, ours in pairs:
        theirs = parameter_names(found(cupy, path))
        mine = [name for name in inspect.signature(ours).parameters if name not in ("self", "data")]
        if not theirs or path in ("cupy.ndarray", "cupy.cuda.runtime.getDeviceProperties"):
            continue
        compared += 1
        assert set(mine) <= set(theirs), path
        kept = [name for name in theirs if name in mine]
        assert kept == mine, f"{path}: {mine}, CuPy has {theirs}"
    assert compared > 25


def test_errors_read_as_cupys():
    cupy = real_cupy()
    for status in (1, 2, 35, 100, 209, 400, 500, 600, 700):
        assert str(standin.CUDARuntimeError(status)) == str(cupy.cuda.runtime.CUDARuntimeError(status))
    assert str(standin.OutOfMemoryError(1024, 5, 2048)) == str(cupy.cuda.memory.OutOfMemoryError(1024, 5, 2048))
    for ours, theirs in [
        (standin.CUDARuntimeError, cupy.cuda.runtime.CUDARuntimeError),
        (standin.CUDADriverError, cupy.cuda.driver.CUDADriverError),
        (standin.OutOfMemoryError, cupy.cuda.memory.OutOfMemoryError),
    ]:
        assert ours.__name__ == theirs.__name__
        assert ours.__bases__ == theirs.__bases__


def test_what_is_not_offered_is_named(late):
    import cupy

    for thing, name in [
        *((cupy, "asarray"), (cupy, "sum"), (cupy.cuda, "using_allocator"), (cupy.cuda.nvrtc, "getPTX")),
        *((cupy.empty(3), "sum"), (cupy.empty(3).data, "copy_from_host"), (cupy.cuda.Stream.null, "launch_host_func")),
    ]:
        with pytest.raises(AttributeError, match=rf"{name} is not among"):
            getattr(thing, name)
    with pytest.raises(TypeError, match="non_blocking"):
        cupy.cuda.Stream()


def test_it_comes_and_goes():
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "cupy"}
    with installed("late"):
        import cupy
        import cupy.cuda.memory
        from cupy.cuda.runtime import CUDARuntimeError

        assert cupy.__version__ == standin.VERSION
        assert CUDARuntimeError is standin.CUDARuntimeError
    after = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "cupy"}
    assert after == before


@pytest.mark.parametrize("standin_device", ["early", {"schedule": "random(3)", "multiprocessors": 9}], indirect=True)
def test_the_fixture_takes_a_schedule_or_knobs(standin_device):
    import cupy

    expected = 9 if standin_device.schedule == "random(3)" else 4
    assert cupy.cuda.Device().attributes["MultiProcessorCount"] == expected


def test_the_fixture_alone(standin_device):
    assert standin_device.schedule == "late"


# ---- arrays


def test_arrays(device):
    import cupy

    values = np.arange(60, dtype=np.int32).reshape(5, 4, 3)
    array = on_device(values)
    assert isinstance(array, cupy.ndarray)
    assert (array.shape, array.dtype, array.size, array.ndim) == ((5, 4, 3), np.int32, 60, 3)
    assert (array.nbytes, array.itemsize) == (240, 4)
    np.testing.assert_array_equal(array.get(), values)
    np.testing.assert_array_equal(array[1:3].get(), values[1:3])
    np.testing.assert_array_equal(array[-2:].reshape(2, -1).view(np.uint8).get(), values[-2:].reshape(2, -1).view("u1"))
    np.testing.assert_array_equal(array[1:].reshape((16, 3))[2:4].get(), values[1:].reshape(16, 3)[2:4])
    assert array[4:2].shape == (0, 4, 3)
    assert array[1:].data.ptr == array.data.ptr + 48
    assert array.data.ptr % 512 == 0
    assert array.__cuda_array_interface__["data"] == (array.data.ptr, False)
    out = np.zeros((5, 4, 3), np.int32)
    assert array.get(out=out) is out
    np.testing.assert_array_equal(out, values)
    np.testing.assert_array_equal(cupy.zeros((2, 3), np.float64).get(), np.zeros((2, 3)))
    assert set(cupy.empty(7, np.uint8).get()) == {0xCB}
    assert cupy.empty((0, 3)).data.ptr == 0


@pytest.mark.parametrize("use", [
    lambda a: a[::2], lambda a: a[1], lambda a: a.view("u8"), lambda a: a.reshape(7), lambda a: a.reshape(-1, 7),
    lambda a: a.get(out=np.zeros((10, 4), np.int32)), lambda a: a.get(out=np.zeros((10, 3), np.uint32)),
    lambda a: a.set(np.zeros((10, 3), np.int64)), lambda a: a.set(np.zeros(30, np.int32)),
    lambda a: a.set([[1] * 3] * 10),
])  # fmt: skip
def test_arrays_refuse(late, use):
    with pytest.raises((TypeError, ValueError)):
        use(on_device(np.zeros((10, 3), np.int32)))


def test_copies_end_where_memory_ends(late):
    import cupy

    array, host = cupy.empty(10, np.uint8), pinned(np.zeros(512, np.uint8))
    for copy in (
        lambda: array.data.copy_from_host_async(host.ctypes.data, 11),
        lambda: array[5:].data.copy_to_host_async(host.ctypes.data, 6),
        lambda: array.data.memset_async(0, 11),
        lambda: array.data.copy_from_device_async(array[1:].data, 10),
        lambda: cupy.empty(600, np.uint8).data.copy_from_host_async(host.ctypes.data, 600),
    ):
        with pytest.raises(standin.CUDARuntimeError, match="InvalidValue"):
            copy()


# ---- copies and events


def test_pinned_memory_is_read_when_the_copy_runs(late):
    (stream,) = streams(1)
    import cupy

    host, array, copied = pinned(np.arange(100)), cupy.empty(100, np.int64), event()
    array.data.copy_from_host_async(host.ctypes.data, host.nbytes, stream)
    copied.record(stream)
    host[:] = -1  # too early
    assert set(array.get(stream=stream)) == {-1}
    host[:] = np.arange(100)
    array.data.copy_from_host_async(host.ctypes.data, host.nbytes, stream)
    copied.record(stream)
    copied.synchronize()
    host[:] = -1
    np.testing.assert_array_equal(array.get(stream=stream), np.arange(100))
    assert late.pageable_bytes == 2 * 800  # both get() went to memory that isn't pinned


def test_pinned_memory_is_written_when_the_copy_runs(late):
    (stream,) = streams(1)
    array, host, copied = on_device(np.arange(100)), pinned(np.zeros(100, int)), event()
    array.data.copy_to_host_async(host.ctypes.data, host.nbytes, stream)
    copied.record(stream)
    assert not host.any()
    copied.synchronize()
    np.testing.assert_array_equal(host, np.arange(100))


def test_other_memory_is_copied_during_the_call(device):
    (stream,) = streams(1)
    import cupy

    host, array = np.arange(100), cupy.empty(100, np.int64)
    array.set(host, stream=stream)
    host[:] = -1
    np.testing.assert_array_equal(array.get(stream=stream), np.arange(100))


def test_pinned_memory_that_died_is_garbage(late):
    (stream,) = streams(1)
    import cupy

    host, array = pinned(np.arange(1000)), cupy.empty(1000, np.int64)
    assert late.pinned_bytes == 8192
    array.data.copy_from_host_async(host.ctypes.data, host.nbytes, stream)
    del host
    gc.collect()
    assert late.pinned_bytes == 0
    assert set(array.view(np.uint8).get(stream=stream)) == {0xDD}


def test_fresh_pinned_memory_is_garbage_and_longer_than_asked_for(late):
    import cupy

    memory = cupy.cuda.alloc_pinned_memory(1025)
    assert set(np.frombuffer(memory, np.uint8)) == {0xCB}
    assert np.frombuffer(memory, np.uint8).size == 2048
    assert np.frombuffer(memory, np.uint8, 9).ctypes.data == memory.ptr


@pytest.mark.parametrize("waits", [False, True])
def test_a_kernel_in_another_stream_needs_the_event(late, waits):
    copy, compute = streams()
    import cupy

    host, array, out = pinned(np.arange(64, dtype=np.int32)), on_device(np.full(64, 5, np.int32)), cupy.empty(64, "i4")
    array.data.copy_from_host_async(host.ctypes.data, host.nbytes, copy)
    copied = copy.record(event())
    if waits:
        compute.wait_event(copied)
    with compute:
        scale(array, out, 2)
        result = out.get()
    np.testing.assert_array_equal(result, 2 * np.arange(64) if waits else np.full(64, 10))


def test_zeros_belong_to_their_stream(late):
    (compute,) = streams(1)
    import cupy

    array = cupy.zeros(64, np.uint8)  # in the null stream
    with compute:
        assert set(array.get()) == {0xCB}
        assert set(cupy.zeros(64, np.uint8).get()) == {0}


def test_an_event_stands_for_its_last_record(late):
    first, second = streams()
    import cupy

    array, out, mark = on_device(np.full(8, 1, np.int32)), cupy.empty(8, np.int32), event()
    assert mark.done
    first.wait_event(mark)  # never recorded: holds nobody up
    with first:
        scale(array, out, 2)
    mark.record(first)
    second.wait_event(mark)  # means the record above
    with first:
        scale(out, out, 10)
    mark.record(first)
    with second:
        np.testing.assert_array_equal(out.get(), np.full(8, 2))
    assert not mark.done
    mark.synchronize()
    assert mark.done
    with second:
        np.testing.assert_array_equal(out.get(), np.full(8, 20))


def test_events_tell_how_long_it_took(device):
    import cupy

    first, second = streams()
    array = on_device(np.zeros(8, np.int32))
    marks = [cupy.cuda.Event() for _ in range(3)]
    marks[0].record(first)
    with first:
        scale(array, array, 1)
        standin.device().enqueue(first._queue, Operation(lambda: time.sleep(0.05)))
    marks[1].record(first)
    first.synchronize()
    second.wait_event(marks[1])
    marks[2].record(second)
    second.synchronize()
    elapsed = cupy.cuda.get_elapsed_time
    assert elapsed(marks[0], marks[1]) >= 49
    assert elapsed(marks[1], marks[2]) >= 0
    # as CUDA has it: later minus earlier, whatever the order
    assert elapsed(marks[1], marks[0]) == -elapsed(marks[0], marks[1])


def test_events_that_tell_no_time(late):
    import cupy

    (stream,) = streams(1)
    done, never, pending = cupy.cuda.Event(), cupy.cuda.Event(), cupy.cuda.Event()
    done.record(stream)
    stream.synchronize()
    pending.record(stream)
    untimed = event()
    untimed.record(stream)
    for mark, message in ((never, "InvalidResourceHandle"), (untimed, "InvalidResourceHandle"), (pending, "NotReady")):
        with pytest.raises(standin.CUDARuntimeError, match=message):
            cupy.cuda.get_elapsed_time(done, mark)


def test_who_asks_again_and_again_gets_there(device):
    (stream,) = streams(1)
    array, mark = on_device(np.zeros(8, np.int32)), event()
    with stream:
        for _ in range(5):
            scale(array, array, 1)
    mark.record(stream)
    for _ in range(1000):
        if mark.done:
            break
    assert mark.done


@pytest.mark.parametrize("seed", range(20))
def test_random_schedules_keep_what_must_be_in_order(seed):
    with installed(f"random({seed})"):
        import cupy

        copy, compute = streams()
        count, rng = 40, np.random.default_rng(seed)
        ring = [(pinned(np.zeros(256, np.int32)), cupy.empty(256, np.int32), event(), event()) for _ in range(3)]
        sums, expected = on_device(np.zeros(256 * count, np.int32)), []
        for k in range(count):
            host, array, copied, used = ring[k % 3]
            copied.synchronize()
            host[:] = rng.integers(0, 1000, 256)
            expected.append(3 * host)
            copy.wait_event(used)
            array.data.copy_from_host_async(host.ctypes.data, host.nbytes, copy)
            copied.record(copy)
            compute.wait_event(copied)
            with compute:
                scale(array, sums[256 * k : 256 * k + 256], 3)
            used.record(compute)
        np.testing.assert_array_equal(sums.get(stream=compute), np.concatenate(expected))


@pytest.mark.parametrize("missing", ["copied.synchronize", "copy.wait_event", "compute.wait_event"])
def test_every_missing_wait_of_a_ring_shows(missing):
    outcomes = []
    for schedule in (*SCHEDULES, *(f"random({seed})" for seed in range(2, 12))):
        with installed(schedule):
            import cupy

            copy, compute = streams()
            ring = [(pinned(np.zeros(64, np.int32)), on_device(np.zeros(64, np.int32)), event(), event()) for _ in "ab"]
            sums = cupy.empty(64 * 12, np.int32)
            for k in range(12):
                host, array, copied, used = ring[k % 2]
                if missing != "copied.synchronize":
                    copied.synchronize()
                host[:] = k
                if missing != "copy.wait_event":
                    copy.wait_event(used)
                array.data.copy_from_host_async(host.ctypes.data, host.nbytes, copy)
                copied.record(copy)
                if missing != "compute.wait_event":
                    compute.wait_event(copied)
                with compute:
                    scale(array, sums[64 * k : 64 * k + 64], 1)
                used.record(compute)
            outcomes.append(np.array_equal(sums.get(stream=compute), np.repeat(np.arange(12), 64)))
    assert outcomes[1]  # early: everything in the order of the calls
    assert not all(outcomes)


def test_threads_may_wait(device):
    (stream,) = streams(1)
    import cupy

    host, array, copied = pinned(np.zeros(4096, np.uint8)), cupy.empty(4096, np.uint8), event()
    problems = []

    def reader():
        for value in range(20):
            copied.synchronize()
            host[:] = value
            ready.release()
            if not taken.acquire(timeout=60):
                problems.append("the main thread is stuck")

    ready, taken = threading.Semaphore(0), threading.Semaphore(0)
    thread = threading.Thread(target=reader)
    thread.start()
    results = []
    for _ in range(20):
        assert ready.acquire(timeout=60)
        array.data.copy_from_host_async(host.ctypes.data, host.nbytes, stream)
        copied.record(stream)
        time.sleep(0.001)
        taken.release()
        results.append(set(array.get(stream=stream)))
    thread.join()
    assert not problems
    # get() may come after the reader has written anew only if the copy had run by then
    assert results == [{value} for value in range(20)]


def test_the_current_stream_belongs_to_a_thread(late):
    (stream,) = streams(1)
    from standin.streams import current_stream

    seen = []
    with stream:
        thread = threading.Thread(target=lambda: seen.append(current_stream()))
        thread.start()
        thread.join()
        assert current_stream() == stream
    import cupy

    assert seen == [cupy.cuda.Stream.null]
    assert current_stream() == cupy.cuda.Stream.null
    assert cupy.cuda.Stream.null.ptr == 0
    assert stream.ptr != 0


# ---- memory


def test_memory_is_counted_and_limited():
    with installed("late", memory_nbytes=10_240) as device:
        import cupy

        pool = cupy.get_default_memory_pool()
        first, second = cupy.empty(4000, np.uint8), cupy.empty(5000, np.uint8)
        assert device.live_bytes == pool.used_bytes() == 4096 + 5120
        assert cupy.cuda.Device().mem_info == (1024, 10_240)
        with pytest.raises(
            cupy.cuda.memory.OutOfMemoryError, match=r"allocating 1,536 bytes \(allocated so far: 9,216"
        ):
            cupy.empty(1025, np.uint8)
        view = second[10:]
        del second
        assert device.live_bytes == 9216
        del view
        assert device.live_bytes == pool.used_bytes() == 4096
        assert pool.total_bytes() == 9216
        pool.free_all_blocks()
        assert pool.total_bytes() == 4096
        assert device.peak_bytes == 9216
        del first


def test_memory_freed_while_its_stream_uses_it_is_safe(device):
    (stream,) = streams(1)
    out = on_device(np.zeros(64, np.int32))
    with stream:
        import cupy

        temporary = cupy.empty(64, np.int32)
        temporary.set(np.arange(64, dtype=np.int32))
        scale(temporary, out, 3)
        del temporary  # CuPy's pool gives it out again only to this stream
        assert device.live_bytes == 512
        np.testing.assert_array_equal(out.get(), 3 * np.arange(64))


@pytest.mark.parametrize("kept", [False, True])
def test_memory_freed_while_another_stream_uses_it_is_garbage(late, kept):
    (stream,) = streams(1)
    array, out = on_device(np.arange(64, dtype=np.int32)), on_device(np.zeros(64, np.int32))
    references = [array] if kept else []
    with stream:
        scale(array, out, 1)
    del array
    expected = np.arange(64) if kept else np.full(64, 0xDDDDDDDD - (1 << 32))
    np.testing.assert_array_equal(out.get(stream=stream), expected)
    assert len(references) == kept


def test_memory_freed_after_its_stream_waits_for_the_other_is_safe(late):
    import cupy

    (stream,) = streams(1)
    array, out = on_device(np.arange(64, dtype=np.int32)), on_device(np.zeros(64, np.int32))
    with stream:
        scale(array, out, 1)
    cupy.cuda.Stream.null.wait_event(stream.record(event()))
    del array
    np.testing.assert_array_equal(out.get(stream=stream), np.arange(64))


# ---- kernels and failures


def test_arguments_are_checked_and_copied_at_the_call(late):
    import cupy

    array, count, null = on_device(np.arange(8, dtype=np.int32)), np.int64(8), np.uint64(0)
    run, out = kernel("scaled<int>"), cupy.empty(8, np.int32)
    for bad, message in [
        ((array, out, np.int32(8), np.int32(1)), "argument 2 of scaled<int> is a int32; the kernel takes int64"),
        ((array, out, count, 1), "argument 3 of scaled<int> is a builtins.int: pass"),
        ((array, out, count), "takes 4 arguments, not 3"),
        ((array, None, count, np.int32(1)), r"np.uint64\(0\) is the null pointer"),
        ((array, np.zeros(8, "i4"), count, np.int32(1)), "is a numpy.ndarray"),
    ]:
        with pytest.raises(TypeError, match=message):
            run((1,), (8,), bad)
    with pytest.raises(TypeError, match="tuples"):
        run(1, 8, (array, out, count, np.int32(1)))
    with pytest.raises(ValueError, match="takes 0 for 1"):
        run((0,), (8,), (array, out, count, np.int32(1)))
    run((1,), (8,), (array, null, np.int64(0), np.int32(1)))
    run((1,), (8,), (array, out, count, np.int32(2)))
    np.testing.assert_array_equal(out.get(), 2 * np.arange(8))
    assert late.launches == ["scaled<int>"] * 2


def test_kernels_that_break_rules_are_found_when_they_run(late):
    import cupy

    kernel("half_barrier")((1,), (32,), ())
    with pytest.raises(LaunchError, match="only a part of the block"):
        cupy.cuda.Device().synchronize()


def test_dynamic_shared_memory_must_be_asked_for(late):
    import cupy

    run, out = kernel("fill_shared"), cupy.empty(1, np.uint8)
    assert run.max_dynamic_shared_size_bytes == 48 << 10
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="INVALID_VALUE"):
        run((1,), (32,), (out, np.int32(100_000)), shared_mem=100_000)
    run.max_dynamic_shared_size_bytes = 100_000
    run((1,), (32,), (out, np.int32(100_000)), shared_mem=100_000)
    assert out.get()[0] == 1
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="INVALID_VALUE"):
        run.max_dynamic_shared_size_bytes = (227 << 10) + 1


@pytest.mark.parametrize("device_has, compiled_for, runs", [
    ("90", "90", True), ("89", "80", True), ("86", "89", False), ("90", "80", False), ("120", "100", False),
])  # fmt: skip
def test_machine_code_runs_where_it_was_made_for(device_has, compiled_for, runs):
    with installed("late", compute_capability=device_has):
        import cupy

        if runs:
            out = cupy.empty(1, np.int32)
            kernel("architecture", compiled_for)((1,), (1,), (out,))
            assert out.get()[0] == 10 * int(compiled_for)
        else:
            with pytest.raises(cupy.cuda.driver.CUDADriverError, match="NO_BINARY_FOR_GPU"):
                kernel("architecture", compiled_for)


def test_the_compiler_tells_what_is_wrong(late):
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram('#line 3 "kernels/none.cu"\n__global__ void none() { int x = y; }', "none.cu", (), ())
    nvrtc.addNameExpression(program, "none")
    with pytest.raises(nvrtc.NVRTCError, match="COMPILATION"):
        nvrtc.compileProgram(program, ("-arch=sm_90",))
    assert "kernels/none.cu:3" in nvrtc.getProgramLog(program)
    with pytest.raises(nvrtc.NVRTCError, match="NAME_EXPRESSION"):
        nvrtc.getLoweredName(program, "none")
    with pytest.raises(nvrtc.NVRTCError, match="INVALID_OPTION"):
        nvrtc.compileProgram(program, ())


def test_names_that_a_module_does_not_hold(late):
    import cupy

    kernel("architecture")
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="NOT_FOUND"):
        cupy.RawModule(path="code.cubin").get_function("architecture")


@pytest.mark.parametrize("status, message", [(35, "InsufficientDriver"), (100, "NoDevice")])
def test_without_driver_or_device_every_call_fails(status, message):
    with installed("late", driver_error=status):
        import cupy

        for call in (
            *(cupy.cuda.runtime.getDeviceCount, cupy.cuda.Device, lambda: cupy.empty(3), lambda: event()),
            *(lambda: streams(1), lambda: cupy.cuda.alloc_pinned_memory(3), lambda: cupy.zeros(3)),
            *(lambda: cupy.cuda.runtime.getDeviceProperties(0), cupy.get_default_memory_pool),
            lambda: cupy.cuda.Stream.null.synchronize(),
        ):
            with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match=message):
                call()
        assert cupy.cuda.runtime.driverGetVersion() == (0 if status == 35 else 13000)


def test_what_the_device_says():
    with installed("late", compute_capability="70", multiprocessors=7, memory_nbytes=1 << 20):
        import cupy

        assert cupy.cuda.runtime.getDeviceCount() == 1
        assert cupy.cuda.Device().compute_capability == "70"
        assert cupy.cuda.Device().attributes["MultiProcessorCount"] == 7
        assert cupy.cuda.Device().mem_info == (1 << 20, 1 << 20)
        assert isinstance(cupy.cuda.runtime.getDeviceProperties(0)["name"], bytes)
        assert cupy.cuda.runtime.driverGetVersion() >= 12000
    with installed("late", devices=0):
        import cupy

        assert cupy.cuda.runtime.getDeviceCount() == 0
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="NoDevice"):
            cupy.cuda.Device()


def test_failures_on_demand(late):
    import cupy

    late.fail_allocation(after=1)
    array = on_device(np.zeros(8, np.int32))
    with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
        cupy.empty(8, np.int32)
    out = cupy.empty(8, np.int32)
    late.fail_launch(after=1)
    scale(array, out, 1)
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        scale(array, out, 1)
    scale(array, out, 1)
