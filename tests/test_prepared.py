"""Analyses after their look at a sample, on disk: data that comes back as it was, never code."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from crystal import planted
from killing import assert_same, ints, shrink, stopping

import gpuem
from gpuem import errors, job, prepared
from gpuem.analyses import Map
from gpuem.analyses.model import Model
from gpuem.backends import Weights
from gpuem.regular_files import open_regular, read_regular


@pytest.fixture(scope="module")
def crystal(tmp_path_factory):
    _, frames, _ = planted((2, 16))
    folder = tmp_path_factory.mktemp("crystal")
    np.save(folder / "crystal.npy", frames)
    return gpuem.open(folder / "crystal.npy")


def looked(ds, asked):
    return job.look(ds, asked, np.ones(ds.positions, bool))


def never(some):
    raise AssertionError("nobody looks again")


def round_trip(ds, asked, folder, again=never):
    view = job.view_of(ds)
    before = looked(ds, asked)
    prepared.save(folder, asked, before, view)
    return before, prepared.load(folder, asked, view, again)


def assert_equal(one, other):
    """The same in every field, bit for bit."""
    assert type(one) is type(other)
    if isinstance(one, np.ndarray):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    elif hasattr(one, "__dataclass_fields__"):
        for name in one.__dataclass_fields__:
            assert_equal(getattr(one, name), getattr(other, name))
    elif isinstance(one, tuple | list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        assert_equal(list(one.values()), list(other.values()))
    else:
        assert one == other or (one != one and other != other)


@pytest.mark.parametrize("registration", ["lattice", "correlation", "guided", "blobfinder"])
def test_strain_comes_back_bit_for_bit(crystal, tmp_path, registration):
    asked = [gpuem.Strain(registration=registration, reference=(0, 1, 0, 8), a=(0, 17), b=(17, 0)), gpuem.Sum()]
    before, after = round_trip(crystal, asked, tmp_path)
    assert_equal(before[0], after[0])
    assert after[1] is asked[1]
    assert {entry["state"] for entry in json.loads((tmp_path / "prepared.json").read_text())["analyses"]} == {
        "kept", "as given"
    }  # fmt: skip


def test_what_was_not_given_comes_back_too(crystal, tmp_path):
    asked = [gpuem.Strain(name="all", distortion=(1.0, 30.0)), gpuem.Bragg(), gpuem.Bragg(name="given", radius=5.0)]
    before, after = round_trip(crystal, asked, tmp_path)
    assert_equal(before[0], after[0])
    assert before[1] == after[1]
    assert after[1].model_fields_set == before[1].model_fields_set
    assert after[2] is asked[2]


def test_files_hold_no_objects(crystal, tmp_path):
    round_trip(crystal, [gpuem.Strain()], tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".gpuem-files.json", "prepared.json", "prepared.npz"]
    with np.load(tmp_path / "prepared.npz", allow_pickle=False) as file:
        assert all(not file[name].dtype.hasobject for name in file.files)


# ---- other people's analyses


@dataclass(frozen=True)
class Pixel:
    """A prepared analysis of a class that gpuem doesn't know."""

    name: str
    where: tuple[int, int]

    def weights(self, view):
        mask = np.zeros(view.frame_shape, bool)
        mask[self.where] = True
        return Weights(masks=(mask,))

    def finish(self, view, sums, valid):
        return {"": Map(view.scan_map(sums.masks[:, 0], valid), view.scan, "counts", "a pixel")}


class Brightest(Model):
    """Looks for a pixel, and becomes something else."""

    kind: Literal["brightest"] = "brightest"
    name: str = "brightest"

    def look(self, view, sample):
        mean = sample.frames.mean(axis=0)
        return Pixel(self.name, np.unravel_index(int(mean.argmax()), mean.shape))


class Own(Model):
    """Looks, and stays what it is."""

    kind: Literal["own"] = "own"
    name: str = "own"
    where: tuple[int, int] | None = None
    _seen: Any = None

    def look(self, view, sample):
        made = self.model_copy(update={"where": (2, 3)})
        made._seen = sample.frames.mean(axis=0)
        return made

    def weights(self, view):
        assert self._seen is not None
        return Pixel(self.name, self.where).weights(view)

    def finish(self, view, sums, valid):
        return Pixel(self.name, self.where).finish(view, sums, valid)


def test_one_that_stays_its_own_class_is_kept(tmp_path):
    ds = ints(tmp_path)
    before, after = round_trip(ds, [Own()], tmp_path)
    assert type(after[0]) is Own
    assert after[0].where == before[0].where
    assert_equal(after[0]._seen, before[0]._seen)


def test_one_that_can_not_be_kept_says_so_and_looks_again(tmp_path, caplog, monkeypatch):
    shrink(monkeypatch, 8 * 6 * 7 * 2)
    ds, asked = ints(tmp_path), [gpuem.Sum(), Brightest(), Own()]
    expected = gpuem.run(ds, asked, device="cpu")
    with pytest.raises(errors.ResumableError):
        gpuem.run(ds, asked, device="cpu", folder=tmp_path / "run", progress=stopping(4))
    assert "brightest: what it found in the sample can't be kept (type test_prepared:Pixel)" in caplog.text
    assert_same(gpuem.run(ds, asked, device="cpu", folder=tmp_path / "run", resume=True), expected)


def test_one_that_finds_something_else_the_second_time_is_refused(tmp_path, monkeypatch):
    ds = ints(tmp_path)
    monkeypatch.setattr(Brightest, "look", lambda self, view, sample: Pixel(self.name, (1, 1)))
    prepared.save(tmp_path, [Brightest()], looked(ds, [Brightest()]), job.view_of(ds))
    monkeypatch.setattr(Brightest, "look", lambda self, view, sample: Pixel(self.name, (1, 2)))
    with pytest.raises(errors.RecipeError, match=r"brightest looked .* again and found something else .*--overwrite"):
        prepared.load(tmp_path, [Brightest()], job.view_of(ds), lambda some: looked(ds, some))


# ---- what somebody else put there


def sealed(folder, change):
    """Change what is kept and make all checksums fit again."""
    path = folder / "prepared.json"
    content = json.loads(path.read_text())
    change(content["analyses"])
    content["checksum"] = hashlib.sha256(json.dumps(content["analyses"]).encode()).hexdigest()
    content["arrays"] = hashlib.sha256((folder / "prepared.npz").read_bytes()).hexdigest()
    path.write_text(json.dumps(content))


class Trap:
    """What a pickle may do."""

    def __reduce__(self):
        return Path.write_text, (Path("trapped"), "code ran")


def refused(folder, ds, asked=None):
    with pytest.raises(errors.InputError, match=r"begin anew with --overwrite"):
        prepared.load(folder, asked or [gpuem.Bragg()], job.view_of(ds), never)
    assert not Path("trapped").exists()


def test_no_code_runs(crystal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    round_trip(crystal, [gpuem.Bragg()], tmp_path)
    whole = (tmp_path / "prepared.json").read_bytes()
    (tmp_path / "looked.pkl").write_bytes(pickle.dumps(Trap()))
    prepared.load(tmp_path, [gpuem.Bragg()], job.view_of(crystal), never)
    # an array of objects
    made = io.BytesIO()
    np.savez(made, a0=np.array([Trap()], object))
    (tmp_path / "prepared.npz").write_bytes(made.getvalue())
    sealed(tmp_path, lambda entries: entries[0].update(value={"array": "a0"}))
    refused(tmp_path, crystal)
    # a class, a function, a module of any kind
    np.savez(tmp_path / "prepared.npz")
    for name in (
        "os:system", "pathlib:Path", "builtins:eval", "gpuem.engine:Job", "gpuem.analyses.bragg:Path", "", ":", 5, None,
        "subprocess:Popen", "gpuem.executors.local:run", "gpuem.analyses.bragg:vector_map", "gpuem.backends.absent:X",
    ):  # fmt: skip
        for kind in ("model", "dataclass"):
            (tmp_path / "prepared.json").write_bytes(whole)
            sealed(tmp_path, lambda entries: entries[0].update(value={kind: name, "fields": {}}))  # noqa: B023
            refused(tmp_path, crystal)


@pytest.mark.parametrize("value", [
    None, 5, [], {}, {"dict": 5}, {"tuple": None}, {"path": 3}, {"array": "none"}, {"float": "x"}, {"kind": 1},
    {"model": "gpuem.analyses.bragg:Bragg"}, {"model": "gpuem.analyses.bragg:Bragg", "fields": {"radius": "x"}},
    {"model": "gpuem.analyses.bragg:Bragg", "fields": {"nothing": 1}}, {"dict": [1, 2]}, {"dict": [[[], 1]]},
    {"model": "gpuem.analyses.sums:Sum", "fields": {}}, {"dataclass": "gpuem.analyses.probe:Disk", "fields": 5},
    {"model": "gpuem.analyses.bragg:Bragg", "fields": {}, "private": {"__class__": 1}},
    {"dataclass": "gpuem.analyses.probe:Disk", "fields": {"radius": 1, "edge": 1}},
])  # fmt: skip
def test_values_that_were_never_kept(crystal, tmp_path, value):
    round_trip(crystal, [gpuem.Bragg()], tmp_path)
    sealed(tmp_path, lambda entries: entries[0].update(value=value))
    refused(tmp_path, crystal)


def test_damage_and_absence_are_told(crystal, tmp_path):
    round_trip(crystal, [gpuem.Strain()], tmp_path)
    whole = {name: (tmp_path / name).read_bytes() for name in prepared.NAMES}
    for name, content in whole.items():
        for at in (0, 40, len(content) // 2, len(content) - 2):
            changed = bytearray(content)
            changed[at] ^= 1
            (tmp_path / name).write_bytes(changed)
            refused(tmp_path, crystal, [gpuem.Strain()])
        for odd in (b"", b"{", b"[]", b"null", b"[" * 100_000, content[: len(content) // 2]):
            (tmp_path / name).write_bytes(odd)
            refused(tmp_path, crystal, [gpuem.Strain()])
        (tmp_path / name).unlink()
        refused(tmp_path, crystal, [gpuem.Strain()])
        (tmp_path / name).mkdir()
        refused(tmp_path, crystal, [gpuem.Strain()])
        (tmp_path / name).rmdir()
        (tmp_path / name).write_bytes(content)
    # of other analyses
    refused(tmp_path, crystal, [gpuem.Strain(name="other")])
    refused(tmp_path, crystal, [gpuem.Strain(), gpuem.Sum()])
    sealed(tmp_path, lambda entries: entries[0].update(state="as given"))
    with pytest.raises(errors.InputError):
        prepared.load(tmp_path, [gpuem.Strain()], job.view_of(crystal), never)


def test_bombs_are_not_unpacked(crystal, tmp_path):
    """An array of which the file says that it is huge."""
    round_trip(crystal, [gpuem.Bragg()], tmp_path)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 50,)})
    with zipfile.ZipFile(tmp_path / "prepared.npz", "w") as file:
        file.writestr("a0.npy", header.getvalue() + bytes(100))
    sealed(tmp_path, lambda entries: None)
    refused(tmp_path, crystal)


# ---- files


def test_only_regular_files_are_opened(tmp_path):
    (tmp_path / "file").write_bytes(b"0123456789")
    assert read_regular(tmp_path / "file", 4) == b"456789"
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "folder", "pipe", "absent", "file/x"):
        with pytest.raises(OSError, match=r"."):
            read_regular(tmp_path / name)
        with pytest.raises(OSError, match=r"."):
            os.close(open_regular(tmp_path / name, os.O_RDWR))
