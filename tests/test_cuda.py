"""The whole CUDA path on the stand-in for CuPy: the same bits as the CPU backend, whatever the streams do."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from merlin_writer import write_mib
from standin import SCHEDULES, installed

import gpuem
from gpuem import job, recipe
from gpuem.backends import cuda_load


@pytest.fixture(params=SCHEDULES)
def device(request):
    with installed(request.param) as simulated:
        yield simulated


@pytest.fixture
def late():
    with installed("late") as simulated:
        yield simulated


def analyses():
    return [
        gpuem.Sum(),
        gpuem.VirtualDetector(name="adf", inner=2, outer=7),
        gpuem.VirtualDetector(name="quarters", shape="sectors", sectors=4, outer=8),
        gpuem.CenterOfMass(),
        gpuem.CenterOfMass(name="inside", radius=6, descan="plane"),
    ]


def weights(shape, count, seed=1):
    rng = np.random.default_rng(seed)
    return [gpuem.VirtualDetector(name=f"w{k}", shape="mask", mask=rng.normal(size=shape)) for k in range(count)]


def binary(shape, count, seed=2):
    rng = np.random.default_rng(seed)
    return [gpuem.VirtualDetector(name=f"m{k}", shape="mask", mask=rng.random(shape) < 0.4) for k in range(count)]


def check_same(ds, chosen=None, *, on=None, **options):
    """A run on the GPU gives the bits of a run on the CPU; returns both."""
    chosen = chosen or analyses()
    cpu = gpuem.run(ds, chosen, device="cpu", **options)
    gpu = gpuem.run(ds if on is None else on, chosen, device="cuda", threads=3, **options)
    assert gpu.provenance["device"].startswith("cuda")
    assert list(cpu.maps) == list(gpu.maps)
    for name, item in cpu.maps.items():
        found = gpu[name].data
        assert found.dtype == item.data.dtype, name
        if item.data.dtype.kind == "f" and (name.startswith("w") or ds.dtype.kind == "f"):
            # sums of floats are added in another order
            np.testing.assert_allclose(
                found, item.data, rtol=2e-6, atol=1e-6 * np.nanmax(np.abs(item.data)), err_msg=name
            )
        else:
            np.testing.assert_array_equal(found, item.data, err_msg=name)
    assert cpu.provenance["lost"] == gpu.provenance["lost"]
    return cpu, gpu


def raw(path, frames, stored=None, *, header=0, gap=0, offset=0):
    """A raw file with junk in front of, between and behind frames (n, y, x)."""
    stored = np.dtype(stored or frames.dtype)
    with path.open("wb") as stream:
        stream.write(b"\x5a" * offset)
        for frame in frames:
            stream.write(b"\x5a" * header + frame.astype(stored).tobytes() + b"\x5a" * gap)
    return path


ALL = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8"]


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("order", ["<", ">"])
def test_raw_files_of_every_type(late, tmp_path, dtype, order):
    frames = reference.planted((35, 13, 17), "f4" if dtype == "f2" else dtype)
    stored = np.dtype(order + dtype)
    path = raw(tmp_path / "a.raw", frames, stored, header=5, gap=3, offset=7)
    ds = gpuem.open(path, scan=(5, 7), frame=(13, 17), dtype=stored.str, offset=7, header=5, footer=3)
    check_same(ds)


def test_every_schedule_of_streams(device, tmp_path):
    frames = reference.planted((300, 16, 24), "u2", 1)
    ds = gpuem.open(raw(tmp_path / "a.raw", frames), scan=(15, 20), frame=(16, 24), dtype="u2")
    check_same(ds)


@pytest.fixture
def small_tiles(monkeypatch):
    """Cuts so small that a few frames make many tiles and shards, and the ring goes round."""
    from gpuem.backends import cuda_plan
    from gpuem.tiles import Sizes

    monkeypatch.setattr(cuda_plan, "SIZES", Sizes(runs_tile=4096, tile=4096, shard=16384))
    monkeypatch.setattr("gpuem.tiles.LEAST_FRAMES", 1)
    monkeypatch.setattr("gpuem.storage.pinned.PIECE_NBYTES", 1000)


def test_many_tiles_and_shards_on_every_schedule(device, small_tiles, tmp_path):
    frames = reference.planted((211, 16, 24), "u2", 1)
    ds = gpuem.open(raw(tmp_path / "a.raw", frames), scan=(211,), frame=(16, 24), dtype="u2")
    chosen = [a for a in analyses() if a.name != "inside"]
    assert len(job.prepare(ds, chosen, recipe.run_section(device="cuda")).plan.shards) > 10
    check_same(ds, chosen)


@pytest.mark.parametrize("bits", [1, 6, 12, 24])
@pytest.mark.parametrize("chips", [(1, 1), (2, 2)])
def test_merlin(device, small_tiles, tmp_path, bits, chips):
    shape = (4 * chips[0], 256 * chips[1])
    frames = np.random.default_rng(bits).integers(0, 1 << bits, (12, *shape)).astype(np.int64)
    path = write_mib(tmp_path / "a.mib", frames, kind="R64", bits=bits, chips=chips)
    check_same(gpuem.open(path, scan=(3, 4)))


def hdf5(path, data, chunks, **filters):
    import h5py

    with h5py.File(path, "w") as file:
        file.create_dataset("data", data=data, chunks=chunks, **filters)
    return path


def bitshuffle():
    import hdf5plugin

    return dict(hdf5plugin.Bitshuffle())


def lz4():
    import hdf5plugin

    return dict(hdf5plugin.LZ4())


def shuffled():
    return {"shuffle": True}


def shuffled_lz4():
    return {"shuffle": True, **lz4()}


CHUNKS = [(1, 1, 24, 40), (2, 3, 24, 40), (2, 2, 16, 16), (3, 4, 7, 9)]


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("filters", [bitshuffle, lz4, dict, shuffled, shuffled_lz4])
@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "u4"])
def test_chunked_hdf5(late, small_tiles, tmp_path, chunks, filters, dtype):
    data = reference.planted((5, 7, 24, 40), np.dtype(dtype).newbyteorder("="), 3).astype(dtype)
    ds = gpuem.open(hdf5(tmp_path / "a.h5", data, chunks, **filters()))
    assert all(cuda_load.on_device(ds.source, piece) for piece in ds.source.pieces)
    check_same(ds)


def test_compressed_chunks_on_every_schedule(device, small_tiles, tmp_path):
    data = reference.planted((6, 8, 24, 40), "u2", 3) % 5
    check_same(gpuem.open(hdf5(tmp_path / "a.h5", data, (1, 1, 24, 40), **bitshuffle())))


def test_an_uncompressed_chunk_of_the_wrong_size_is_broken(device, small_tiles, tmp_path):
    """Its length stands in the file's index, which may lie; nothing is read beyond it."""
    from dataclasses import replace

    ds = gpuem.open(hdf5(tmp_path / "a.h5", reference.planted((4, 5, 16, 16), "u2", 9), (1, 1, 16, 16)))
    piece = ds.source.pieces[0]
    length = piece.layout.length.copy()
    length[7] -= 2
    lying = replace(piece, layout=replace(piece.layout, length=length))
    ds = replace(ds, source=replace(ds.source, pieces=(lying,)))
    _, gpu = check_same(ds, [gpuem.Sum()], on_error="mask")
    assert np.flatnonzero(~gpu["valid"].data.ravel()).tolist() == [7]


@pytest.mark.parametrize("filters", [{"compression": "gzip", "shuffle": True}, {"compression": "lzf"}])
def test_what_the_gpu_can_t_decode_is_decoded_on_the_host(device, small_tiles, tmp_path, filters):
    data = reference.planted((5, 7, 24, 40), "u2", 4) % 9
    check_same(gpuem.open(hdf5(tmp_path / "a.h5", data, (1, 2, 24, 40), **filters)))


def test_arrays_and_fortran_order(device, small_tiles, tmp_path):
    data = reference.planted((5, 6, 9, 11), "i2", 5)
    check_same(gpuem.dataset.of_array(data))
    np.save(tmp_path / "f.npy", np.asfortranarray(data))
    check_same(gpuem.open(tmp_path / "f.npy"))


@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "u4", "f4"])
def test_many_masks_and_weights(late, tmp_path, dtype):
    frames = reference.planted((37, 16, 20), dtype, 6)
    ds = gpuem.open(raw(tmp_path / "a.raw", frames), scan=(37,), frame=(16, 20), dtype=dtype)
    check_same(ds, [*binary((16, 20), 19), gpuem.CenterOfMass(), *weights((16, 20), 3)])
    check_same(ds, [gpuem.Sum(), *weights((16, 20), 17), *binary((16, 20), 4)])


@pytest.mark.parametrize(("count", "many"), [(14, False), (15, True)])
def test_many_masks_and_weights_go_to_tensor_cores(late, tmp_path, count, many):
    frames = reference.planted((5, 16, 20), "u2", 6)
    ds = gpuem.open(raw(tmp_path / "a.raw", frames), scan=(5,), frame=(16, 20), dtype="u2")
    gpuem.run(ds, [*binary((16, 20), count), *weights((16, 20), count)])
    launched = {name.partition("<")[0] for name in late.launches}
    assert {"mask_sums", "image_sums_tensor"} <= launched if many else launched == {"all_sums", "image_sums"}


def test_a_scattered_region_of_small_frames_fits_its_slot(late, small_tiles, tmp_path):
    frames = reference.planted((900, 5, 7), "u1", 6)
    ds = gpuem.open(raw(tmp_path / "a.raw", frames, header=30), scan=(900,), frame=(5, 7), dtype="u1", header=30)
    for step in (2, 3, 5):
        check_same(ds, [gpuem.Sum()], roi=np.arange(900) % step == 0)


def test_more_frames_in_a_chunk_than_a_grid_is_high(late, tmp_path):
    data = reference.planted((70000, 2, 4), ">f4", 6).astype(">f4")
    ds = gpuem.open(hdf5(tmp_path / "a.h5", data, (70000, 2, 4)))
    check_same(ds, [gpuem.CenterOfMass(), gpuem.VirtualDetector(outer=1.5)])


def test_region_skip_and_positions_without_frames(device, small_tiles, tmp_path):
    frames = reference.planted((50, 12, 14), "u2", 7)
    path = raw(tmp_path / "a.raw", frames)
    ds = gpuem.open(path, scan=(8, 7), frame=(12, 14), dtype="u2", skip=-3, fit=True)
    check_same(ds, analyses()[:4], roi=(1, 6, 2, 7))
    mask = np.random.default_rng(1).random((8, 7)) < 0.3
    check_same(ds, analyses()[:4], roi=mask)


@pytest.mark.parametrize("filters", [bitshuffle, lz4, dict], ids=["bitshuffle", "lz4", "plain"])
def test_chunks_that_were_never_written(late, small_tiles, tmp_path, filters):
    import h5py

    data = reference.planted((4, 5, 16, 16), "u2", 8)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        made = file.create_dataset("data", data.shape, "u2", chunks=(1, 2, 16, 16), **filters())
        made[0], made[2:] = data[0], data[2:]
    _, gpu = check_same(gpuem.open(tmp_path / "a.h5"), [gpuem.Sum(), gpuem.CenterOfMass()])
    assert not gpu["valid"].data[1].any()
    assert gpu.provenance["frames"]["masked"] == 5


def gzip():
    return {"compression": "gzip"}


def checksum():
    return {"fletcher32": True}


def shuffle_checksum():
    return {"fletcher32": True, "shuffle": True}


def bitshuffle_checksum():
    return {**bitshuffle(), "fletcher32": True}


# behind a checksum the damaged bytes decode, to other pixels
@pytest.mark.parametrize("filters", [bitshuffle, lz4, gzip, checksum, shuffle_checksum, bitshuffle_checksum])
def test_broken_chunks_are_told_or_masked(device, small_tiles, tmp_path, filters):
    import h5py

    data = reference.planted((6, 5, 16, 16), "u2", 9) % 7
    path = hdf5(tmp_path / "a.h5", data, (1, 1, 16, 16), **filters())
    with h5py.File(path) as file:
        at = file["data"].id.get_chunk_info(11)
    content = bytearray(path.read_bytes())
    content[at.byte_offset + 12 : at.byte_offset + 20] = b"\xff" * 8
    path.write_bytes(content)
    ds = gpuem.open(path)
    with pytest.raises(gpuem.DataError, match=r"frame 11.*on_error"):
        gpuem.run(ds, analyses(), device="cuda")
    _, gpu = check_same(ds, [gpuem.Sum(), gpuem.CenterOfMass()], on_error="mask")
    assert np.flatnonzero(~gpu["valid"].data.ravel()).tolist() == [11]


def test_frames_with_nan_and_too_large_counts(device, small_tiles, tmp_path):
    frames = reference.planted((40, 12, 14), "f4", 10)
    frames[7, 3, 3], frames[30, 0, 0] = np.nan, np.inf
    ds = gpuem.open(raw(tmp_path / "a.raw", frames), scan=(5, 8), frame=(12, 14), dtype="f4")
    with pytest.raises(gpuem.DataError, match="frame 7: NaN"):
        gpuem.run(ds, analyses(), device="cuda")
    _, gpu = check_same(ds, on_error="mask")
    assert np.flatnonzero(~gpu["valid"].data.ravel()).tolist() == [7, 30]
    big = np.full((6, 4, 4), 3, np.uint64)
    big[2, 1, 1] = 1 << 40
    check_same(gpuem.dataset.of_array(big), [gpuem.Sum(), gpuem.CenterOfMass(name="c")], on_error="mask")


def test_a_file_that_ends_too_early_or_changes(late, tmp_path):
    frames = reference.planted((40, 12, 14), "u2", 11)
    path = raw(tmp_path / "a.raw", frames)
    ds = gpuem.open(path, scan=(5, 8), frame=(12, 14), dtype="u2")
    with path.open("r+b") as stream:
        stream.truncate(5000)
    with pytest.raises(gpuem.InputError, match="changed since it was opened"):
        gpuem.run(ds, analyses(), device="cuda")


def test_reads_that_fail_are_told_frame_by_frame(device, small_tiles, tmp_path, monkeypatch):
    from gpuem.storage import host

    data = reference.planted((6, 5, 16, 16), "u2", 9) % 7
    path = hdf5(tmp_path / "a.h5", data, (1, 1, 16, 16), **bitshuffle())
    import h5py

    with h5py.File(path) as file:
        bad = file["data"].id.get_chunk_info(7).byte_offset
    original = host.Files.read_into

    def failing(self, k, offset, out):
        if offset <= bad < offset + out.size:
            raise gpuem.DataError(f"{self.path(k)}: reading {out.size} bytes at {offset}: Input/output error")
        original(self, k, offset, out)

    monkeypatch.setattr(host.Files, "read_into", failing)
    with pytest.raises(gpuem.DataError, match=r"frame 7.*Input/output error"):
        gpuem.run(gpuem.open(path), [gpuem.Sum()], device="cuda")
    _, gpu = check_same(gpuem.open(path), [gpuem.Sum()], on_error="mask")
    assert np.flatnonzero(~gpu["valid"].data.ravel()).tolist() == [7]


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "f4", "<i4"])
@pytest.mark.parametrize("which", ["dark", "dead", "all"])
def test_corrections(late, small_tiles, tmp_path, dtype, which):
    frames = reference.planted((30, 12, 14), np.dtype(dtype).newbyteorder("="), 12)
    rng = np.random.default_rng(12)
    given = {
        "dark": rng.normal(3, 1, (12, 14)),
        "gain": rng.normal(1, 0.1, (12, 14)),
        "dead": [[0, 0], [5, 6], [5, 7], [11, 13]],
    }
    chosen = given if which == "all" else {which: given[which]}
    ds = gpuem.open(raw(tmp_path / "a.raw", frames, dtype), scan=(5, 6), frame=(12, 14), dtype=dtype).corrected(
        **chosen
    )
    com = gpuem.CenterOfMass(compatible="libertem")
    cpu, gpu = check_same(ds, [gpuem.Sum(), gpuem.VirtualDetector(name="adf", inner=2, outer=7), com])
    # the largest pixel shows the bits of corrected pixels, whatever sums do
    np.testing.assert_array_equal(cpu["sum/max"].data, gpu["sum/max"].data)


def test_corrections_of_packed_data(device, small_tiles, tmp_path):
    frames = np.random.default_rng(1).integers(0, 4096, (12, 4, 256)).astype(np.int64)
    path = write_mib(tmp_path / "a.mib", frames, kind="R64", bits=12)
    dark = np.random.default_rng(2).normal(10, 1, (4, 256))
    cpu, gpu = check_same(gpuem.open(path, scan=(3, 4)).corrected(dark=dark, dead=[[1, 1]]))
    np.testing.assert_array_equal(cpu["sum/max"].data, gpu["sum/max"].data)


class TestResident:
    def test_a_second_run_reads_nothing(self, device, small_tiles, tmp_path):
        frames = reference.planted((60, 12, 14), ">u2", 13)
        path = raw(tmp_path / "a.raw", frames.astype(">u2"), ">u2", header=3)
        ds = gpuem.open(path, scan=(6, 10), frame=(12, 14), dtype=">u2", header=3)
        there = ds.to_device()
        check_same(ds, on=there)
        expected = ds[...]
        path.unlink()
        found = gpuem.run(there, [gpuem.Sum()])
        np.testing.assert_array_equal(found["sum/sum"].data, reference.frame_sum(expected.reshape(60, 12, 14)))
        np.testing.assert_array_equal(there[2, 3:5], expected[2, 3:5])

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("kind", ["merlin", "bitshuffle", "gzip", "plain", "fortran"])
    def test_every_way_of_storing(self, late, small_tiles, tmp_path, kind, packed):
        if kind == "merlin":
            frames = np.random.default_rng(1).integers(0, 4096, (12, 4, 256)).astype(np.int64)
            ds = gpuem.open(write_mib(tmp_path / "a.mib", frames, kind="R64", bits=12), scan=(3, 4))
        elif kind == "fortran":
            np.save(tmp_path / "f.npy", np.asfortranarray(reference.planted((5, 6, 9, 11), "i2", 5)))
            ds = gpuem.open(tmp_path / "f.npy")
        else:
            filters = {"bitshuffle": bitshuffle, "gzip": lambda: {"compression": "gzip"}, "plain": dict}[kind]()
            data = reference.planted((5, 7, 24, 40), "u2", 3) % 11
            ds = gpuem.open(hdf5(tmp_path / "a.h5", data, (2, 3, 16, 40), **filters))
        there = ds.to_device(packed=packed)
        check_same(ds, on=there)
        check_same(ds, on=there, roi=(1, 3, 1, 4))
        np.testing.assert_array_equal(there[...], ds[...])

    def test_holes_stay_holes_and_broken_chunks_are_refused(self, late, small_tiles, tmp_path):
        import h5py

        data = reference.planted((4, 5, 16, 16), "u2", 8) % 9
        with h5py.File(tmp_path / "a.h5", "w") as file:
            made = file.create_dataset("data", data.shape, "u2", chunks=(1, 1, 16, 16), **bitshuffle())
            made[0], made[2:] = data[0], data[2:]
            file.flush()
            at = made.id.get_chunk_info(3).byte_offset
        ds = gpuem.open(tmp_path / "a.h5")
        for packed in (False, True):
            gpu = gpuem.run(ds.to_device(packed=packed), [gpuem.Sum()])
            assert not gpu["valid"].data[1].any()
            assert gpu["valid"].data.sum() == 15
        content = bytearray((tmp_path / "a.h5").read_bytes())
        content[at + 12 : at + 20] = b"\xff" * 8
        (tmp_path / "b.h5").write_bytes(content)
        with pytest.raises(gpuem.DataError, match="can't be decoded"):
            gpuem.open(tmp_path / "b.h5").to_device()
        # kept as it is stored nothing is decoded yet; the run says which it is
        with pytest.raises(gpuem.DataError, match="frame 3: "):
            gpuem.run(gpuem.open(tmp_path / "b.h5").to_device(packed=True), [gpuem.Sum()], device="cuda")

    def test_what_is_there_already_stays(self, late, tmp_path):
        frames = reference.planted((20, 12, 14), "u2", 14)
        ds = gpuem.open(raw(tmp_path / "a.raw", frames), scan=(4, 5), frame=(12, 14), dtype="u2").to_device()
        live = late.live_bytes
        for packed in (False, True):
            again = ds.to_device(packed=packed)
            assert again.source.pieces[0].layout is ds.source.pieces[0].layout
        assert late.live_bytes < live + 1000

    def test_correction_is_applied_in_every_run(self, late, tmp_path):
        frames = reference.planted((20, 12, 14), "u2", 14)
        ds = gpuem.open(raw(tmp_path / "a.raw", frames), scan=(4, 5), frame=(12, 14), dtype="u2").corrected(
            gain=np.linspace(0.5, 2, 168).reshape(12, 14)
        )
        check_same(ds, on=ds.to_device())

    def test_cupy_arrays_are_used_where_they_are(self, late):
        import cupy

        data = reference.planted((4, 5, 12, 14), "u2", 15)
        array = cupy.empty(data.shape, data.dtype)
        array.set(data)
        before = late.peak_bytes
        found = gpuem.run(array, [gpuem.Sum()])
        assert found.provenance["device"].startswith("cuda")
        np.testing.assert_array_equal(found["sum/sum"].data, reference.frame_sum(data.reshape(-1, 12, 14)))
        assert late.peak_bytes - before < 1 << 30

    def test_a_cupy_array_may_begin_anywhere(self, late):
        import cupy

        data = reference.planted((6, 8, 16), "u2", 15)
        array = cupy.empty(3 + data.size, data.dtype)
        array.set(np.concatenate([np.zeros(3, "u2"), data.ravel()]))
        found = gpuem.run(array[3:].reshape(data.shape), [gpuem.Sum()])
        np.testing.assert_array_equal(found["sum/sum"].data, reference.frame_sum(data))

    def test_more_than_fits_is_refused_with_numbers(self, small_tiles, tmp_path):
        (tmp_path / "a.raw").write_bytes(bytes(4096 * 64 * 64 * 2))
        ds = gpuem.open(tmp_path / "a.raw", scan=(4096,), frame=(64, 64), dtype="u2")
        with (
            installed("late", memory_nbytes=20 << 20),
            pytest.raises(gpuem.PlanError, match=r"0\.03 GB of the GPU's memory and .* GB while.* 0\.02 GB are free"),
        ):
            ds.to_device()


def test_the_host_runs_ahead_of_the_gpu(late, small_tiles, tmp_path, monkeypatch):
    """Nothing but a full ring makes the host wait for a kernel: reading, copying and computing overlap."""
    from emulation.build import Library

    from gpuem.backends import cuda_session
    from gpuem.storage import pinned

    executed, seen = [], []
    run, add = Library.run, cuda_session.Session.add
    monkeypatch.setattr(Library, "run", lambda self, name, *rest: executed.append(name) or run(self, name, *rest))
    monkeypatch.setattr(cuda_session.Session, "add", lambda self, *rest: seen.append(len(executed)) or add(self, *rest))
    filled, ahead = [], []
    fill, arrive = pinned.Ring._fill, pinned.Ring._arrive
    monkeypatch.setattr(pinned.Ring, "_fill", lambda self, *rest: filled.append(1) or fill(self, *rest))
    monkeypatch.setattr(pinned.Ring, "_arrive", lambda self, *rest: ahead.append(len(filled)) or arrive(self, *rest))
    frames = reference.planted((211, 16, 24), "u2", 1)
    ds = gpuem.open(raw(tmp_path / "a.raw", frames), scan=(211,), frame=(16, 24), dtype="u2")
    plan = job.prepare(ds, [gpuem.Sum()], recipe.run_section(device="cuda")).plan
    gpuem.run(ds, [gpuem.Sum()], device="cuda")
    tiles_of_two_shards = sum(shard.last - shard.first for shard in plan.shards[:2])
    assert tiles_of_two_shards > 6
    # a kernel is run only when its slot is wanted again: four tiles later
    assert all(kernels <= max(0, tile - 4) for tile, kernels in enumerate(seen[:tiles_of_two_shards]))
    assert seen[-1] > 0
    # when a tile is waited for, the three after it are being read
    assert ahead[:-3] == [tile + 4 for tile in range(len(ahead) - 3)]


@pytest.mark.parametrize("kind", ["raw", "merlin", "bitshuffle"])
def test_reads_that_go_straight_to_the_device(device, small_tiles, tmp_path, monkeypatch, kind):
    """A reader like kvikio's: it writes at once, in no stream, so that a slot reused too early shows."""
    import ctypes

    from gpuem.storage import gds

    class Reader:
        def __init__(self, files):
            self.files = files

        def read(self, file, offset, length, target):
            content = self.files[file].path.read_bytes()[offset : offset + length]
            ctypes.memmove(target.data.ptr, content, length)
            return self

        def wait(self):
            pass

        def close(self):
            pass

    monkeypatch.setattr(gds, "choose", lambda *asked: ("gds", "a test"))
    monkeypatch.setattr(gds, "Reader", Reader)
    if kind == "raw":
        path = raw(tmp_path / "a.raw", reference.planted((211, 16, 24), "u2", 1), header=2)
        ds = gpuem.open(path, scan=(211,), frame=(16, 24), dtype="u2", header=2)
    elif kind == "merlin":
        frames = np.random.default_rng(1).integers(0, 4096, (24, 4, 256)).astype(np.int64)
        ds = gpuem.open(write_mib(tmp_path / "a.mib", frames, kind="R64", bits=12), scan=(4, 6))
    else:
        data = reference.planted((9, 8, 24, 40), "u2", 3) % 5
        ds = gpuem.open(hdf5(tmp_path / "a.h5", data, (1, 1, 24, 40), **bitshuffle()))
    _, gpu = check_same(ds, [gpuem.Sum(), gpuem.CenterOfMass()])
    assert gpu.provenance["transfer"] == {"kind": "gds", "reason": "a test"}
    check_same(ds, [gpuem.Sum()], on=ds.to_device(packed=True))
