from __future__ import annotations

import json

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

import gpuem
from gpuem.errors import GpuemError, InputError, RecipeError

PIXELS = ["u1", "<u2", ">u2", "<u4", ">u4", "<i2", ">i4", "<f4", ">f4", "<f8", ">i8", "?", "<f2"]


@given(
    dtype=st.sampled_from(PIXELS),
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    frame=st.sampled_from([(1, 1), (3, 5), (7, 2)]),
    extra=st.tuples(*[st.integers(0, 9)] * 3),
)
def test_raw_reads_what_was_written(tmp_path_factory, dtype, counts, frame, extra):
    offset, header, footer = extra
    folder = tmp_path_factory.mktemp("raw")
    native = np.dtype(dtype).newbyteorder("=")
    data = np.random.default_rng(0).integers(0, 2 if dtype == "?" else 100, (sum(counts), *frame)).astype(dtype)
    paths, at = [], 0
    for k, count in enumerate(counts):
        body = b"".join(b"H" * header + f.tobytes() + b"F" * footer for f in data[at : at + count])
        paths.append(folder / f"part{k}.bin")
        paths[-1].write_bytes(b"O" * offset + body)
        at += count
    ds = gpuem.open(paths, frame=frame, dtype=dtype, offset=offset, header=header, footer=footer)
    expected = data.astype({"?": "u1", "<f2": "f4"}.get(dtype, native))
    assert ds.dtype == expected.dtype
    assert np.array_equal(ds[...], expected)
    assert np.array_equal(ds[-1], expected[-1])
    found = gpuem.run(ds, [gpuem.Sum(), gpuem.VirtualDetector(shape="disk", outer=99)])
    assert np.array_equal(found["sum/sum"].data, reference.frame_sum(expected))
    assert np.array_equal(found["virtual"].data, reference.mask_sums(expected, np.ones(frame, bool)))


@pytest.mark.parametrize("fortran", [False, True])
@pytest.mark.parametrize("dtype", ["<u2", ">u2", ">f4", "u1", "<i4"])
@pytest.mark.parametrize("shape", [(5, 7, 3, 11), (13, 4, 6), (5, 9), (2, 3, 4, 5, 6)])
def test_npy_both_orders(fortran, dtype, shape):
    data = reference.planted(shape, dtype[-2:]).astype(dtype)
    np.save("a.npy", np.asfortranarray(data) if fortran else data)
    ds = gpuem.open("a.npy")
    expected = data.reshape(1, *shape) if len(shape) == 2 else data
    assert ds.shape == expected.shape
    assert np.array_equal(ds[...], expected)
    # signed pixels are noise about 0, which com doesn't take for counts, but where it is as LiberTEM's
    found = gpuem.run(ds, [gpuem.Sum(), gpuem.CenterOfMass(compatible="libertem")])
    frames = expected.reshape(-1, *shape[-2:])
    assert np.array_equal(found["sum/sum"].data, reference.frame_sum(frames))
    center = shape[-2] // 2, shape[-1] // 2
    assert np.array_equal(found["com/shift_x"].data.ravel(), reference.com(frames, center)[:, 1])


def test_indexing_like_an_array():
    data = reference.planted((4, 5, 6, 7), "u2")
    np.save("a.npy", data)
    ds = gpuem.open("a.npy")
    for key in (np.s_[1, 2], np.s_[3], np.s_[1:3, ::2], np.s_[..., 2:4, 1], np.s_[:, 1, 3:5], np.s_[-1, -1, 0, 0]):
        assert np.array_equal(ds[key], data[key])


def test_pickled_npy_is_refused():
    np.save("a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(gpuem.InputError, match="never unpickles"):
        gpuem.open("a.npy")


def test_truncated_files_say_how_many_frames_are_whole():
    data = reference.planted((10, 8, 8), "u2")
    np.save("a.npy", data)
    with open("a.npy", "r+b") as stream:
        stream.truncate(128 + 7 * 128 + 5)
    with pytest.raises(gpuem.TruncatedError, match="hold 7 of the 10 frames") as error:
        gpuem.open("a.npy")
    assert error.value.whole == 7
    found = gpuem.run(gpuem.open("a.npy", fit=True), [gpuem.Sum()])
    assert found["valid"].data.tolist() == [True] * 7 + [False] * 3
    assert np.array_equal(found["sum/sum"].data, reference.frame_sum(data[:7]))
    with open("a.raw", "wb") as stream:
        stream.write(data.tobytes()[:-1])
    with pytest.raises(gpuem.TruncatedError, match="9 whole frames"):
        gpuem.open("a.raw", frame=(8, 8), dtype="u2")
    assert gpuem.open("a.raw", frame=(8, 8), dtype="u2", fit=True).shape == (9, 8, 8)


def test_bad_files():
    open("empty.npy", "w").close()
    with pytest.raises(gpuem.InputError, match="empty file"):
        gpuem.open("empty.npy")
    with open("alien.npy", "wb") as stream:
        stream.write(b"\x93NUMPY\x01\x00garbage" * 9)
    with pytest.raises(gpuem.InputError, match=r"not a \.npy file"):
        gpuem.open("alien.npy")
    np.save("scan_01.npy", np.ones((2, 2, 2)))
    with pytest.raises(gpuem.InputError, match=r"did you mean scan_01\.npy"):
        gpuem.open("scan_1.npy")
    with open("a.xyz", "w") as stream:
        stream.write("x")
    with pytest.raises(gpuem.InputError, match="not supported"):
        gpuem.open("a.xyz")
    with pytest.raises(gpuem.InputError, match="a folder"):
        gpuem.open(".")
    np.save("c.npy", np.ones((2, 2, 2), complex))
    with pytest.raises(gpuem.InputError, match="integers or floats"):
        gpuem.open("c.npy")
    np.save("v.npy", np.ones(4))
    with pytest.raises(gpuem.InputError, match="no frames"):
        gpuem.open("v.npy")
    with open("a.raw", "wb") as stream:
        stream.write(bytes(64))
    with pytest.raises(gpuem.RecipeError, match="says nothing of itself"):
        gpuem.open("a.raw")
    with pytest.raises(gpuem.RecipeError, match="no option 'frame'"):
        gpuem.open("scan_01.npy", frame=(2, 2))
    with pytest.raises(gpuem.RecipeError, match="did you mean 'npy'"):
        gpuem.open("scan_01.npy", format="nyp")
    with pytest.raises(gpuem.RecipeError, match="not a type"):
        gpuem.open("a.raw", frame=(2, 2), dtype="unit16")


def test_a_file_that_changes_under_the_run_is_refused():
    np.save("a.npy", np.ones((4, 3, 3), "u1"))
    ds = gpuem.open("a.npy")
    np.save("a.npy", np.ones((5, 3, 3), "u1"))
    with pytest.raises(gpuem.InputError, match="changed since it was opened"):
        gpuem.run(ds, [gpuem.Sum()])


def test_a_cut_frame_between_files_keeps_its_place():
    data = reference.planted((16, 8, 8), "u2")
    with open("a.raw", "wb") as stream:
        stream.write(data[:8].tobytes()[:-60])
    with open("b.raw", "wb") as stream:
        stream.write(data[8:].tobytes())
    ds = gpuem.open(["a.raw", "b.raw"], frame=(8, 8), dtype="u2", scan=(4, 4), fit=True)
    found = gpuem.run(ds, [gpuem.VirtualDetector(shape="disk", outer=99)])
    assert found["valid"].data.ravel().tolist() == [k != 7 for k in range(16)]
    assert np.array_equal(np.delete(found["virtual"].data.ravel(), 7), np.delete(data.sum(axis=(1, 2)), 7))


def test_header_and_size_disagree():
    np.save("a.npy", np.ones((4, 3, 3), "u2"))
    with open("a.npy", "ab") as stream:
        stream.write(bytes(100))
    with pytest.raises(gpuem.InputError, match="100 bytes more than its header"):
        gpuem.open("a.npy")
    assert gpuem.open("a.npy", fit=True).notes


def test_what_the_file_says_of_the_scan_is_not_dropped_silently():
    np.save("a.npy", np.ones((4, 5, 3, 3), "u2"))
    assert "4 x 5" in gpuem.open("a.npy", scan=(5, 4)).notes[0]
    assert "4 x 5" in gpuem.open("a.npy", skip=1).notes[0]
    assert not gpuem.open("a.npy", scan=(4, 5)).notes


def test_half_precision_of_both_byte_orders():
    data = np.arange(2 * 4 * 4).reshape(2, 4, 4).astype(">f2")
    assert gpuem.run(data, [gpuem.Sum()])["sum/sum"].data.sum() == data.astype("f8").sum()


def test_mistakes_of_the_python_interface():
    data = np.ones((4, 3, 3), "u2")
    np.save("a.npy", data)
    for call, message in (
        (lambda: gpuem.run("a.npy", [gpuem.Sum()]), "open the file first"),
        (lambda: gpuem.run(data, [gpuem.Sum()], device="gpu"), "'gpu' is not one of auto, cuda, cpu"),
        (lambda: gpuem.run(data, [gpuem.Sum()], on_error="Stop"), "did you mean 'stop'"),
        (lambda: gpuem.run(data, [gpuem.Sum()], threads=0), "threads"),
        (lambda: gpuem.run(data, [gpuem.Sum(name="valid")]), "taken"),
        (lambda: gpuem.open("a.npy", calibration={"scan_unit": "nm"}), "scan_unit needs scan_step"),
        (lambda: gpuem.open(["a.npy", "a.npy"]), "one at a time"),
        (lambda: gpuem.open("a.npy", scan="ab"), "whole numbers"),
        (lambda: gpuem.CenterOfMass(rotation=float("nan")), "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for wrong in ([[1, 2], [3, 4]], np.ma.masked_array(data, data > 2)):
        with pytest.raises(gpuem.InputError):
            gpuem.run(wrong, [gpuem.Sum()])
    assert gpuem.run(data, gpuem.Sum())["sum/sum"].data.sum() == 36
    mask = np.array([True, False, True, False])
    assert np.array_equal(gpuem.run(data, gpuem.Sum(), roi=mask)["valid"].data, mask)
    assert np.array_equal(gpuem.open("a.npy")[mask], data[mask])


# absurd numbers: refused before anything is allocated


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": ","}, "not a type"),
        ({"dtype": "(-1,)u1"}, "not a type"),
        ({"dtype": "(2,)u1"}, "pixels must be"),
        ({"dtype": "99999999999999999999u1"}, "not a type"),
        ({"dtype": "u1,f4"}, "pixels must be"),
        ({"dtype": 5}, "not a type"),
        ({"dtype": "(" * 3000}, "not a type"),
        ({"dtype": "object"}, "pixels must be"),
        ({"frame": (2**40, 2**40)}, "each axis needs 1 to"),
        ({"frame": (0, 4)}, "each axis needs 1 to"),
        ({"frame": (True, 4)}, "two whole numbers"),
        ({"frame": (4.0, 4)}, "two whole numbers"),
        ({"frame": (4,)}, "two whole numbers"),
        ({"frame": "44"}, "two whole numbers"),
        ({"frame": 4}, "two whole numbers"),
        ({"offset": 2**63}, "offset"),
        ({"offset": -1}, "offset"),
        ({"header": 2**64}, "header"),
        ({"footer": 1.5}, "footer"),
        ({"header": True}, "header"),
        ({"scan": (2**61, 2)}, "4,611,686,018,427,387,904 positions; gpuem takes up to 1,073,741,824"),
        ({"scan": (2**62, 2), "fit": True}, "whole number"),
        ({"scan": (2**31,), "fit": True}, "positions; gpuem takes up to"),
        ({"scan": ()}, "at least one position"),
        ({"scan": 4}, "whole numbers"),
        ({"scan": "44"}, "whole numbers"),
        ({"scan": (True, 4)}, "whole number"),
        ({"scan": (-4, -1)}, "at least one position"),
        ({"skip": 2**60, "fit": True}, "leaves out all of its 4 frames"),
        ({"skip": -(2**60), "fit": True}, "positions"),
        ({"skip": -4, "scan": (4,), "fit": True}, "leaves none of the 4"),
        ({"skip": 1.5}, "whole number"),
    ],
)
def test_absurd_options_are_refused(tmp_path, options, message):
    np.zeros((4, 4, 4), "u2").tofile(tmp_path / "a.raw")
    with pytest.raises(GpuemError, match=message):
        gpuem.open(tmp_path / "a.raw", **{"frame": (4, 4), "dtype": "u2", **options})


@pytest.mark.parametrize(
    "shape", ["(3, -4, -5)", "(True, 4, 5)", "(2**70, 4, 5)".replace("2**70", str(2**70)), "(-1,)", "(3, -1, 4)"]
)
def test_npy_of_impossible_shape(tmp_path, shape):
    header = f"{{'descr': '<u2', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    path = tmp_path / "a.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(120))
    for fit in (False, True):
        with pytest.raises(InputError, match=r"a\.npy: its header is damaged: shape"):
            gpuem.open(path, fit=fit)


def test_npy_that_promises_more_positions_than_can_be(tmp_path):
    header = f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({2**32}, 2, 2), }}".encode().ljust(117) + b"\n"
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(120))
    with pytest.raises(InputError, match="4,294,967,296 positions; gpuem takes 1 to 1,073,741,824"):
        gpuem.open(tmp_path / "a.npy", fit=True)


# names of files


NAMES = [
    *("scan[1].npy", "[ab].npy", "100%.npy", "a#b.npy", "Größe µ.npy", "~x.npy", "~.npy", "-x.npy", "what?.npy"),
    *("star*.npy", "s3:bucket.npy", " lead.npy", "two\nlines.npy", "dir [1]/scan.npy", "~dir/a.npy", "$HOME.npy"),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_exactly_that_name_is_opened(tmp_path, monkeypatch, name):
    data = np.arange(3 * 4 * 8 * 8, dtype="u2").reshape(3, 4, 8, 8)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    np.save(tmp_path / name, data)
    body = (
        f'[input]\npath = {json.dumps(name)}\n[[analysis]]\nkind = "sum"\n[output]\npath = "o.zarr"\npreviews = false\n'
    )
    (tmp_path / "r.toml").write_text(body, encoding="utf-8")
    for folder, path in ((tmp_path, name), (tmp_path.parent, str(tmp_path / name))):
        monkeypatch.chdir(folder)
        np.testing.assert_array_equal(gpuem.open(path)[...], data)
        results, _ = gpuem.run_recipe(tmp_path / "r.toml", overwrite=True)
        np.testing.assert_array_equal(results["sum/sum"].data, data.sum((0, 1)))


def test_the_home_folder_of_nobody(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"~nosuchuser/x\.npy': there is no user 'nosuchuser'"):
        gpuem.open("~nosuchuser/x.npy")
    (tmp_path / "r.toml").write_text(
        '[input]\npath="~nosuchuser/x.npy"\n[[analysis]]\nkind="sum"\n[output]\npath="o.zarr"'
    )
    with pytest.raises(RecipeError, match="no user 'nosuchuser'"):
        gpuem.run_recipe(tmp_path / "r.toml")
