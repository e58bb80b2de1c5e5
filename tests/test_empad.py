"""EMPAD acquisitions: the real header with its data, the headers of several software versions, broken ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from samples import assert_reads_as, entries, sample_data

import gpuem
from gpuem.errors import InputError, RecipeError, TruncatedError
from gpuem.formats import empad
from gpuem.formats.source import Source

NEW = """
<root name="scan"><timestamp timestamp="1.5" isoformat="2026-03-25T16:47:52"/>
<software_version>1.2.2</software_version><raw_file filename="{raw}"/><exposure_time>1</exposure_time>
<scan_parameters mode="search"><scan_resolution_y>64</scan_resolution_y><scan_resolution_x>64</scan_resolution_x>
</scan_parameters><scan_parameters mode="acquire"><scan_size>0.6</scan_size>
<scan_resolution_y>{y}</scan_resolution_y><scan_resolution_x>{x}</scan_resolution_x></scan_parameters>
<iom_measurements><full_scan_field_of_view><scale_factor>0.72</scale_factor><x>1.27e-06</x><y>1.27e-06</y>
</full_scan_field_of_view><nominal_camera_length>0.369</nominal_camera_length><high_voltage>300000.0</high_voltage>
</iom_measurements></root>"""
OLD = """<root name="scan"><pix_x>{x}</pix_x><pix_y>{y}</pix_y><raw_file filename="{raw}"/>
<scan_parameters mode="acquire"><scan_resolution_x>128</scan_resolution_x><scan_resolution_y>128</scan_resolution_y>
</scan_parameters><iom_measurements><source.get_voltage>80000.0</source.get_voltage>
<calibrated_diffraction_angle>0.0005</calibrated_diffraction_angle></iom_measurements></root>"""
SERIES = """<root name="series"><raw_file filename="{raw}"/><scan_parameters mode="acquire">
<series_count>{x}</series_count></scan_parameters></root>"""


def decode(source: Source) -> np.ndarray:
    (piece,), (file,) = source.pieces, source.files
    runs, raw = piece.layout, np.fromfile(file.path, np.uint8)
    out = np.zeros((source.frames, *source.frame_shape), source.dtype)
    for k in range(runs.frames[0]):
        begin = runs.offset[0] + k * runs.stride[0]
        out[k] = raw[begin : begin + runs.frame_bytes].view(piece.stored).reshape(source.frame_shape)
    return out.reshape(*source.scan_shape, *source.frame_shape)


def write(folder: Path, xml: str, y: int, x: int, frames: int | None = None, raw: str = "data.raw") -> np.ndarray:
    """Write both files; the camera's two rows of metadata are NaN. Returns the frames."""
    count = y * x if frames is None else frames
    stored = np.full((count, 130, 128), np.nan, "<f4")
    stored[:, :128] = np.random.default_rng(1).normal(size=(count, 128, 128))
    stored.tofile(folder / Path(raw).name)
    (folder / "scan.xml").write_text(xml.format(raw=raw, y=y, x=x))
    return stored[:, :128]


@pytest.mark.parametrize("entry", entries("empad"))
def test_reads_real_files_as_independent_readers_do(entry):
    path = sample_data() / entry["path"]
    source = empad.read_header((path,))
    assert source.scan_shape == tuple(entry["shape"][:2])
    assert_reads_as(decode(source), entry)
    expected = np.load(source.files[0].path.with_suffix(".raw.expected.npy"))
    np.testing.assert_array_equal(decode(source).ravel(), expected.ravel())


def test_real_header_calibrates_the_detector_by_the_measured_angle():
    source = empad.read_header((sample_data() / "derived" / "empad" / "map4x4.xml",))
    assert [a.unit for a in source.detector] == ["mrad", "mrad"]
    assert source.detector[0].step == pytest.approx(0.42906574394463665)
    assert source.scan == ()
    assert source.metadata["energy_keV"] == 300.0
    assert source.metadata["camera_length_m"] == 0.7225
    assert source.metadata["timestamp"] == "2019-06-06T13:30:00.164675"


def test_real_raw_is_claimed_by_its_header():
    folder = sample_data() / "derived" / "empad"
    assert empad.claims(folder / "scan_x4_y4.raw")
    assert not empad.claims(folder / "map4x4.xml")


@pytest.mark.parametrize(
    ("xml", "y", "x", "raw", "shape"),
    [
        (NEW, 2, 3, "data.raw", (2, 3)),
        (NEW, 5, 1, "data.raw", (5, 1)),
        (OLD, 3, 2, "data.raw", (3, 2)),
        (OLD, 4, 1, r"D:\empad\today\data.raw", (4, 1)),
        (SERIES, 1, 5, "/home/empad/series_x5.raw", (5,)),
    ],
)
def test_scan_shape_and_frames_of_every_kind_of_header(tmp_path, xml, y, x, raw, shape):
    expected = write(tmp_path, xml, y, x, raw=raw.replace("\\", "/"))
    (tmp_path / "scan.xml").write_text(xml.format(raw=raw, y=y, x=x))
    source = empad.read_header((tmp_path / "scan.xml",))
    assert source.scan_shape == shape
    assert (source.frames, source.frame_shape, source.dtype) == (y * x, (128, 128), np.float32)
    np.testing.assert_array_equal(decode(source), expected.reshape(*shape, 128, 128))
    assert np.isfinite(decode(source)).all()


def test_the_size_of_the_raw_decides_between_stale_entries(tmp_path):
    write(tmp_path, NEW, 7, 9, frames=6, raw="scan_x3_y2.raw")
    source = empad.read_header((tmp_path / "scan.xml",))
    assert (source.scan_shape, source.notes) == ((2, 3), ())


def test_headers_without_calibration_leave_axes_uncalibrated(tmp_path):
    write(tmp_path, NEW, 2, 2)
    source = empad.read_header((tmp_path / "scan.xml",))
    assert (source.scan, source.detector) == ((), ())
    assert source.metadata["field_of_view_m"] == {"scale_factor": "0.72", "x": "1.27e-06", "y": "1.27e-06"}
    assert source.metadata["camera_length_m"] == 0.369
    assert source.metadata["scan_size"] == "0.6"


def test_raw_may_be_named_instead_of_the_header(tmp_path):
    write(tmp_path, OLD, 2, 3)
    raw = tmp_path / "data.raw"
    (tmp_path / "alien.xml").write_text("<a><b/></a>")
    (tmp_path / "broken.xml").write_text("<root><raw_file filename='data.raw'>")
    assert empad.claims(raw)
    assert empad.read_header((raw,)).scan_shape == (2, 3)
    (tmp_path / "copy.xml").write_text((tmp_path / "scan.xml").read_text())
    with pytest.raises(InputError, match=r"2 \.xml files beside it name it \(copy\.xml, scan\.xml\)"):
        empad.read_header((raw,))
    other = tmp_path / "other.raw"
    other.write_bytes(raw.read_bytes())
    assert not empad.claims(other)
    with pytest.raises(InputError, match=r"6 frames of 130x128 float32, and no \.xml beside it names it: give scan"):
        empad.read_header((other,))


def test_cut_raw(tmp_path):
    expected = write(tmp_path, NEW, 2, 3)
    raw = tmp_path / "data.raw"
    raw.write_bytes(raw.read_bytes()[: 4 * 66560 + 100])
    with pytest.raises(TruncatedError, match=r"4 whole frames .*100 bytes more, the scan .2, 3. has 6") as caught:
        empad.read_header((tmp_path / "scan.xml",))
    assert caught.value.whole == 4
    source = empad.read_header((tmp_path / "scan.xml",), fit=True)
    assert (source.frames, source.scan_shape, source.pieces[0].frames) == (6, (2, 3), 4)
    assert "4 whole frames" in source.notes[0]
    np.testing.assert_array_equal(decode(source).reshape(6, 128, 128)[:4], expected[:4])


def test_last_frame_is_whole_without_its_rows_of_metadata(tmp_path):
    expected = write(tmp_path, NEW, 2, 2)
    raw = tmp_path / "data.raw"
    raw.write_bytes(raw.read_bytes()[:-1024])
    np.testing.assert_array_equal(decode(empad.read_header((tmp_path / "scan.xml",))), expected.reshape(2, 2, 128, 128))


def test_given_scan_wins_and_must_fit(tmp_path):
    write(tmp_path, NEW, 2, 3)
    xml = tmp_path / "scan.xml"
    assert empad.read_header((xml,), scan=(3, 2)).scan_shape == (3, 2)
    with pytest.raises(TruncatedError, match="has 8"):
        empad.read_header((xml,), scan=(2, 4))
    with pytest.raises(InputError, match="leave out the last 2"):
        empad.read_header((xml,), scan=(2, 2))
    with pytest.raises(InputError, match="no positions"):
        empad.read_header((xml,), scan=(0, 2))
    source = empad.read_header((xml,), scan=(2, 2), fit=True)
    assert (source.frames, source.pieces[0].frames, len(source.notes)) == (4, 4, 1)


@pytest.mark.parametrize(
    "xml", ["", "<root/>", "MQ1,000001", "<root><raw_file/></root>", "<root><raw_file filename='..'/></root>"]
)
def test_alien_xml(tmp_path, xml):
    (tmp_path / "a.xml").write_text(xml)
    with pytest.raises(InputError, match=r"a\.xml: not an EMPAD header"):
        empad.read_header((tmp_path / "a.xml",))


def test_missing_empty_and_silent_files(tmp_path):
    with pytest.raises(InputError, match="can't be read"):
        empad.read_header((tmp_path / "none.xml",))
    write(tmp_path, NEW, 2, 3)
    (tmp_path / "data.raw").write_bytes(bytes(100))
    with pytest.raises(InputError, match="not one whole frame of 66560"):
        empad.read_header((tmp_path / "scan.xml",))
    (tmp_path / "data.raw").unlink()
    with pytest.raises(InputError, match=r"names data\.raw, which can't be read"):
        empad.read_header((tmp_path / "scan.xml",))
    write(tmp_path, "<root><raw_file filename='{raw}'/></root>", 2, 3)
    with pytest.raises(InputError, match=r"says nothing of the scan; its \.raw holds 6 frames"):
        empad.read_header((tmp_path / "scan.xml",))


BOTH = """<root><raw_file filename="{raw}"/><scan_parameters mode="search"><scan_resolution_x>{x}</scan_resolution_x>
<scan_resolution_y>{y}</scan_resolution_y><scan_size>1.0</scan_size></scan_parameters><scan_parameters mode="acquire">
<scan_resolution_x>OTHER_X</scan_resolution_x><scan_resolution_y>OTHER_Y</scan_resolution_y><scan_size>0.6</scan_size>
</scan_parameters></root>"""


def both(y: int, x: int) -> str:
    return BOTH.replace("OTHER_Y", str(y)).replace("OTHER_X", str(x))


def test_the_entry_that_fits_is_the_scan_whatever_its_mode(tmp_path):
    expected = write(tmp_path, both(4, 4), 6, 2)
    source = empad.read_header((tmp_path / "scan.xml",))
    assert (source.scan_shape, source.metadata["scan_size"]) == ((6, 2), "1.0")
    np.testing.assert_array_equal(decode(source), expected.reshape(6, 2, 128, 128))
    write(tmp_path, both(4, 4), 3, 3, frames=16)
    source = empad.read_header((tmp_path / "scan.xml",))
    assert (source.scan_shape, source.metadata["scan_size"]) == ((4, 4), "0.6")


def test_two_entries_that_fit_are_an_error_unless_the_name_of_the_raw_decides(tmp_path):
    write(tmp_path, both(3, 4), 6, 2)
    both_named = r"12 frames, which fit 2 of its scans: \[3, 4\] \(.*=acquire\) and \[6, 2\] \(.*=search\)"
    with pytest.raises(InputError, match=both_named):
        empad.read_header((tmp_path / "scan.xml",))
    assert empad.read_header((tmp_path / "scan.xml",), scan=(6, 2)).scan_shape == (6, 2)
    write(tmp_path, both(3, 4), 6, 2, raw="scan_x2_y6.raw")
    assert empad.read_header((tmp_path / "scan.xml",)).scan_shape == (6, 2)
    # the same scan twice is one
    write(tmp_path, both(6, 2), 6, 2)
    assert empad.read_header((tmp_path / "scan.xml",)).scan_shape == (6, 2)


def test_raw_without_its_xml(tmp_path):
    expected = write(tmp_path, NEW, 2, 3, raw="mine.raw")
    (tmp_path / "scan.xml").unlink()
    raw = tmp_path / "mine.raw"
    with pytest.raises(RecipeError, match=r'6 EMPAD frames .*format = "empad" and scan = \[y, x\] of 6 positions'):
        gpuem.open(raw)
    with pytest.raises(InputError, match=r"6 frames of 130x128 float32.*give scan = \[y, x\]"):
        gpuem.open(raw, format="empad")
    ds = gpuem.open(raw, format="empad", scan=(2, 3))
    np.testing.assert_array_equal(ds[...], expected.reshape(2, 3, 128, 128))
    assert "no .xml" in ds.notes[0]
    named = raw.rename(tmp_path / "scan_x3_y2.raw")
    with pytest.raises(RecipeError, match=r"scan = \[2, 3\] as its name says"):
        gpuem.open(named)
    assert gpuem.open(named, format="empad").scan_shape == (2, 3)
    wrong = named.rename(tmp_path / "scan_x4_y2.raw")
    with pytest.raises(InputError, match=r"its name says 2 x 4 = 8 positions"):
        gpuem.open(wrong, format="empad")


def test_renamed_raw_of_the_same_name_as_its_xml(tmp_path):
    expected = write(tmp_path, NEW, 2, 3, raw="scan_x3_y2.raw")
    (tmp_path / "scan_x3_y2.raw").rename(tmp_path / "scan.raw")
    source = empad.read_header((tmp_path / "scan.xml",))
    np.testing.assert_array_equal(decode(source), expected.reshape(2, 3, 128, 128))
    assert "scan_x3_y2.raw, which is missing; scan.raw" in source.notes[0]
