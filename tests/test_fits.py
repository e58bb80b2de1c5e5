"""Fits: what is found for each frame by itself goes to its scan position, on every backend and however work is cut."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pytest
import reference
from chunk_writer import bitshuffle_lz4, write_hdf5
from standin import SCHEDULES, installed
from test_cuda import raw

import gpuem
from gpuem import job, recipe, tiles
from gpuem.analyses import Map
from gpuem.analyses.model import Model
from gpuem.backends import Weights, cpu, cpu_fits, cuda_fits, cuda_kernels, cuda_plan


@dataclass(frozen=True, eq=False)
class Where:
    """The flat scan position of a frame: the bits of an int64 in two columns."""

    columns: int = 2


@dataclass(frozen=True, eq=False)
class Inside:
    """The sum of a frame of integers inside a mask, likewise; `packed` is the mask as the kernel takes it."""

    mask: np.ndarray
    packed: np.ndarray
    columns: int = 2


def where_on_cpu(fit, frames, positions, out):
    assert positions.dtype == np.int64
    assert positions.shape == frames.starts.shape
    out.view(np.int64)[:, 0] = positions


def inside_on_cpu(fit, frames, positions, out):
    for row, start in zip(out.view(np.int64), frames.starts, strict=True):
        row[0] = frames.pixels[start : start + fit.mask.size][fit.mask.reshape(-1)].sum(dtype=np.int64)


def where_on_gpu(fit, tables, frames, positions, out):
    # nothing waits here: where positions were written anew before they are copied, the result is wrong
    assert tables == {}
    assert positions.shape == (frames.count,)
    out.data.copy_from_device_async(positions.data, positions.nbytes)


def inside_on_gpu(fit, tables, frames, positions, out):
    cuda_kernels.all_sums(frames, (tables["packed"], 1, 0), out.view(np.int64), None)


@pytest.fixture(autouse=True)
def kinds(monkeypatch):
    monkeypatch.setattr(cpu_fits, "KINDS", {Where: where_on_cpu, Inside: inside_on_cpu})
    monkeypatch.setattr(cuda_fits, "KINDS", {Where: where_on_gpu, Inside: inside_on_gpu})


def half(shape):
    mask = np.random.default_rng(3).random(shape) < 0.5
    mask[0, 0] = True
    return mask


class Marks(Model):
    """Positions and sums as fits find them."""

    kind: Literal["marks"] = "marks"
    name: str = "marks"
    sums: bool = True

    def weights(self, view):
        mask = half(view.frame_shape)
        fits = (Where(), Inside(mask, cuda_kernels.mask_bytes([mask], view.frame_shape)))
        return Weights(fits=fits if self.sums else fits[:1])

    def finish(self, view, sums, valid):
        assert all(rows.dtype == np.float32 and rows.shape == (valid.size, 2) for rows in sums.fits)
        assert all(np.isnan(rows[~valid]).all() for rows in sums.fits)
        found = [np.where(valid, rows.view(np.int64)[:, 0], -1).reshape(view.scan_shape) for rows in sums.fits]
        return {
            name: Map(values, view.scan, "", name) for name, values in zip(("where", "inside"), found, strict=False)
        }


def check(ds, data, *, device="cpu", chosen=None, **options):
    """Fits of a run; `data` (positions, y, x) holds what is at each scan position."""
    found = gpuem.run(ds, chosen or [Marks()], device=device, **options)
    valid = found["valid"].data.ravel()
    np.testing.assert_array_equal(found["marks/where"].data.ravel(), np.where(valid, np.arange(valid.size), -1))
    if "marks/inside" in found.maps:
        sums = data[:, half(data.shape[1:])].sum(axis=1).astype(np.int64)
        np.testing.assert_array_equal(found["marks/inside"].data.ravel(), np.where(valid, sums, -1))
    return found


@pytest.fixture(params=["cpu", *SCHEDULES, pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    if request.param in SCHEDULES:
        with installed(request.param):
            yield "cuda"
    else:
        yield "cuda" if request.param == "gpu" else "cpu"


@pytest.fixture
def small(monkeypatch):
    """A few frames make many tiles and shards."""
    monkeypatch.setattr(cuda_plan, "SIZES", tiles.Sizes(runs_tile=4096, tile=4096, shard=16384))
    monkeypatch.setattr(tiles, "TILE_NBYTES", 4096)
    monkeypatch.setattr(tiles, "RUNS_TILE_NBYTES", 4096)
    monkeypatch.setattr(tiles, "SHARD_NBYTES", 16384)
    monkeypatch.setattr(tiles, "LEAST_FRAMES", 1)


def of_raw(path, data, dtype="u2", **options):
    frame = data.shape[1:]
    return gpuem.open(raw(path / "a.raw", data, np.dtype(dtype)), frame=frame, dtype=dtype, **options)


@pytest.mark.parametrize("scan", [(211,), (211, 1), (1,)])
def test_rows_of_many_shards_go_to_their_positions(device, small, tmp_path, scan):
    data = reference.planted((max(scan), 16, 24), "u2", 1)
    ds = of_raw(tmp_path, data, scan=scan)
    if max(scan) > 1:
        assert len(job.prepare(ds, [Marks()], recipe.run_section(device=device)).plan.shards) > 5
    check(ds, data, device=device, threads=3)


def test_region_of_interest(device, small, tmp_path):
    data = reference.planted((15 * 14, 16, 24), ">u2", 2)
    ds = of_raw(tmp_path, data, ">u2", scan=(15, 14))
    found = check(ds, data, device=device, roi=(3, 11, 2, 9))
    assert found["valid"].data.sum() == 8 * 7
    mask = np.random.default_rng(1).random((15, 14)) < 0.1
    assert check(ds, data, device=device, roi=mask)["valid"].data.sum() == mask.sum()


@pytest.mark.parametrize("skip", [-13, 17])
def test_scans_that_begin_elsewhere_than_the_file(device, small, tmp_path, skip):
    data = reference.planted((100, 16, 24), "u2", 3)
    ds = of_raw(tmp_path, data, scan=(9, 10), skip=skip, fit=True)
    padded = np.concatenate(
        [np.zeros((max(0, -skip), 16, 24), "u2"), data[max(0, skip) :], np.zeros((90, 16, 24), "u2")]
    )
    assert check(ds, padded[:90], device=device)["valid"].data.sum() == (77 if skip < 0 else 83)


def test_frames_that_are_lost_are_masked(device, small, tmp_path):
    data = reference.planted((60, 16, 24), "f4", 4)
    data[7, 1, 1], data[33, 0, 0] = np.nan, np.inf
    ds = of_raw(tmp_path, data, "f4", scan=(6, 10))
    found = check(ds, data, device=device, chosen=[Marks(sums=False), gpuem.CenterOfMass()], on_error="mask")
    assert np.flatnonzero(~found["valid"].data.ravel()).tolist() == [7, 33]


def test_chunks_and_broken_ones(device, small, tmp_path):
    data = reference.planted((6, 8, 16, 24), "u2", 5) % 13
    write_hdf5(tmp_path / "a.h5", data, (2, 4, 16, 12), bitshuffle_lz4)
    flat = data.reshape(48, 16, 24)
    check(gpuem.open(tmp_path / "a.h5"), flat, device=device)
    import h5py

    with h5py.File(tmp_path / "a.h5") as file:
        at = file["data"].id.get_chunk_info(4).byte_offset
    content = bytearray((tmp_path / "a.h5").read_bytes())
    content[at + 12 : at + 16] = b"\xff" * 4
    (tmp_path / "a.h5").write_bytes(content)
    found = check(gpuem.open(tmp_path / "a.h5"), flat, device=device, on_error="mask")
    assert 0 < (~found["valid"].data).sum() <= 8


def test_several_analyses_share_a_pass_and_keep_their_columns(device, small, tmp_path):
    data = reference.planted((120, 16, 24), "u2", 6)
    ds = of_raw(tmp_path, data, scan=(10, 12))
    chosen = [Marks(name="first", sums=False), gpuem.Sum(), Marks(), gpuem.CenterOfMass(), Marks(name="last")]
    found = check(ds, data, device=device, chosen=chosen)
    alone = gpuem.run(ds, [gpuem.Sum(), gpuem.CenterOfMass()], device="cpu")
    for name, item in alone.maps.items():
        np.testing.assert_array_equal(found[name].data, item.data, err_msg=name)
    assert "first/inside" not in found.maps
    for name in ("first/where", "last/where"):
        np.testing.assert_array_equal(found[name].data, found["marks/where"].data)
    np.testing.assert_array_equal(found["last/inside"].data, found["marks/inside"].data)


def test_single_patterns_and_corrected_ones(device, tmp_path):
    data = reference.planted((1, 16, 24), "u2", 7)
    check(data[0], data, device=device)
    ds = of_raw(tmp_path, data, scan=(1,)).corrected(dead=[(3, 4)])
    check(ds, ds[...], device=device)


@pytest.mark.parametrize("schedule", ["late", "random(3)"])
def test_data_on_the_gpu(schedule, tmp_path):
    with installed(schedule):
        data = reference.planted((90, 16, 24), "u2", 8)
        check(of_raw(tmp_path, data, scan=(9, 10)).to_device(), data, device="cuda")


def test_fits_alone_leave_the_other_kernels_alone(monkeypatch):
    def never(*given):
        raise AssertionError("nothing linear was asked for")

    monkeypatch.setattr(cpu.kernels, "all_sums", never)
    monkeypatch.setattr(cpu.kernels, "image_sums", never)
    data = reference.planted((5, 8, 9), "u2")
    check(data, data)
    with installed() as simulated:
        check(data, data, device="cuda", chosen=[Marks(sums=False)])
        assert simulated.launches == []


def test_runs_without_fits_launch_and_copy_what_they_did(tmp_path):
    data = reference.planted((30, 16, 24), "u2")
    ds = of_raw(tmp_path, data, scan=(30,))
    with installed():
        from gpuem.backends import cuda

        prepared = job.prepare(ds, [gpuem.Sum()], recipe.run_section(device="cuda")).prepared
        where, _ = cuda.places(prepared, 30)
    assert where["positions"][1] == (0,)


class Counted(Marks):
    """Says how large its maps are."""

    def map_nbytes(self, view):
        return 1000 + view.frame_shape[0]


@pytest.mark.parametrize("on", ["cpu", "cuda"])
def test_the_plan_counts_fits_and_maps(tmp_path, on):
    data = reference.planted((30, 16, 24), "u2")
    ds = of_raw(tmp_path, data, scan=(30,))
    asked = recipe.run_section(device=on)
    with installed():
        default, counted, both = (
            job.prepare(ds, chosen, asked).plan for chosen in ([Marks()], [Counted()], [Counted(), gpuem.Sum()])
        )
        device = [sum(plan.device_nbytes.values()) for plan in (default, job.prepare(ds, [gpuem.Sum()], asked).plan)]
    maps = [plan.nbytes["sums and maps"] for plan in (default, counted, both)]
    assert maps[0] == 30 * (16 + 2 * 8 + tiles.MAPS_NBYTES)
    assert maps[1] == 30 * (16 + 2 * 8 + 1016)
    assert maps[2] == maps[1] + 30 * tiles.MAPS_NBYTES
    if on == "cuda":
        assert default.device_nbytes["masks and weights"] >= half((16, 24)).nbytes
        assert device[0] != device[1]


def test_the_peak_stays_below_the_plan(tmp_path):
    data = reference.planted((300, 64, 64), "u2", 9)
    ds = of_raw(tmp_path, data, scan=(300,))
    with installed("late") as simulated:
        planned = job.prepare(ds, [Marks(), gpuem.Sum()], recipe.run_section(device="cuda")).plan.device_nbytes
        check(ds, data, device="cuda", chosen=[Marks(), gpuem.Sum()])
        assert simulated.peak_bytes <= sum(planned.values())


def test_fits_take_part_when_weights_are_added():
    one, two = Where(), Where()
    assert (Weights(fits=(one,)) + Weights(total=True) + Weights(fits=(two,))).fits == (one, two)
    sums = cpu.new_sums(cpu.prepare(Weights(fits=(one,)), (2, 2), np.dtype("u2")), 3)
    assert [rows.shape for rows in replace(sums).fits] == [(3, 2)]
