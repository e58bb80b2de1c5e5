"""Merlin files: real ones as independent readers read them, written ones in every type and layout, broken ones."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from merlin_writer import frame_header, scan_fields, write_hdr, write_mib
from samples import assert_reads_as, entries, sample_data

import gpuem
from gpuem.codecs import merlin
from gpuem.errors import InputError, TruncatedError
from gpuem.formats import mib
from gpuem.formats.source import Runs, Source

NATIVE = {1: np.uint8, 6: np.uint8, 12: np.uint16, 24: np.uint32}
PLAIN = {1: "U08", 6: "U08", 12: "U16", 24: "U32"}


def decode(source: Source) -> np.ndarray:
    """All frames in file order; what no piece covers stays zero."""
    out = np.zeros((source.frames, *source.frame_shape), source.dtype)
    for piece in source.pieces:
        assert isinstance(piece.layout, Runs)
        runs, k = piece.layout, piece.start
        for file, offset, frames, stride in zip(runs.file, runs.offset, runs.frames, runs.stride, strict=True):
            raw = np.fromfile(source.files[file].path, np.uint8)
            starts = offset + stride * np.arange(frames)
            if piece.codec:
                (step,) = piece.codec
                assert step.name == "merlin"
                merlin.decode(raw, starts, out[k : k + frames], *step.parameters)
            else:
                for i, start in enumerate(starts):
                    frame = raw[start : start + runs.frame_bytes].view(piece.stored)
                    out[k + i] = frame.reshape(source.frame_shape)
            k += frames
    return out


def images(n: int, shape: tuple[int, int], bits: int, seed: int = 0) -> np.ndarray:
    """Noise over the whole range of counts: no two chips, rows or pixels can be exchanged unseen."""
    return np.random.default_rng(seed).integers(0, 2**bits, (n, *shape)).astype(NATIVE[bits])


# real files


@pytest.mark.parametrize("entry", entries("mib"))
def test_reads_real_files_as_independent_readers_do(entry):
    source = mib.read_header((sample_data() / entry["path"],))
    frames = decode(source)
    # rosettasciio and fpd turn images upside down; libertem keeps the order of the file
    assert_reads_as(frames if entry["reader"].startswith("libertem") else np.flip(frames, -2), entry)


def test_reads_raw_6_bit_frames_of_known_content():
    folder = sample_data() / "derived" / "mib_r64"
    source = mib.read_header((folder / "single_9_frames_R64_6bit.hdr",))
    expected = np.load(folder / "single_9_frames_R64_6bit.encoder_input.npy")
    np.testing.assert_array_equal(decode(source), expected.reshape(9, 256, 256))
    assert source.scan_shape == (9,)
    assert source.metadata["sensor_bias"] == "120 V"


def test_real_quad_raw_frame_lies_as_the_processed_one_does():
    """The same beam, recorded twice: only the right arrangement of chips makes the two alike."""
    folder = sample_data() / "mib" / "Merlin_Single_Quad"
    raw, processed = (
        decode(mib.read_header((folder / f"Quad_1_Frame_CounterDepth_{name}.mib",)))[0].astype(float)
        for name in ("1_Rows_256RAW", "1_Rows_256")
    )

    def alike(a, b):
        a, b = (x.reshape(64, 8, 64, 8).sum((1, 3)).ravel() for x in (a, b))
        return np.corrcoef(a, b)[0, 1]

    right = alike(raw, processed)
    assert right > 0.9
    others = [np.rot90(raw, 2), raw[::-1], raw[:, ::-1], np.roll(raw, 256, 0), np.roll(raw, 256, 1)]
    assert all(alike(other, processed) < right - 0.05 for other in others)


def test_real_files_that_end_in_a_number_are_no_series():
    folder = sample_data() / "mib" / "Merlin_Single_Quad"
    for path in sorted(folder.glob("*.mib")):
        assert len(mib.read_header((path,)).files) == 1


def test_hot_pixel_of_the_vendors_files_is_where_they_name_it():
    found = sorted(sample_data().glob("mib/**/*hot_pixel_52x_39y*.mib"))
    if not found:
        pytest.skip("no hot_pixel_52x_39y files among the sample data")
    for path in found:
        frame = decode(mib.read_header((path,)))[0]
        assert np.unravel_index(frame.argmax(), frame.shape) == (39, 52)


# round trips


@pytest.mark.parametrize(
    ("rows", "chips"), [(256, (1, 1)), (256, (2, 2)), (5, (1, 1)), (5, (2, 2)), (5, (1, 2)), (3, (1, 4))]
)
@pytest.mark.parametrize("bits", [1, 6, 12, 24])
@pytest.mark.parametrize("raw", [True, False])
def test_round_trip(tmp_path, raw, bits, chips, rows):
    shape = (rows * chips[0], 256 * chips[1])
    expected = images(1 if rows == 256 else 5, shape, bits)
    # a pixel at each chip's first corner, of a count of its own
    for chip in range(chips[0] * chips[1]):
        y, x = divmod(chip, chips[1])
        expected[0, y * rows, x * 256 : x * 256 + 2] = (1, 0)
    kind = "R64" if raw else PLAIN[bits]
    source = mib.read_header((write_mib(tmp_path / "scan.mib", expected, kind=kind, bits=bits, chips=chips),))
    assert source.frame_shape == shape
    assert source.dtype == NATIVE[bits]
    assert source.dtype.isnative
    assert source.pieces[0].stored == (NATIVE[bits] if raw else np.dtype(NATIVE[bits]).newbyteorder(">"))
    assert source.metadata["counter_depth"] == bits
    np.testing.assert_array_equal(decode(source), expected)
    assert bool(source.notes) == (raw and chips != (1, 1) and (bits == 24 or chips != (2, 2)))


@pytest.mark.parametrize("bits", [1, 6, 12, 24])
def test_decoder_takes_frames_from_any_byte_and_in_any_order(tmp_path, bits):
    expected = images(3, (4, 512), bits)
    path = write_mib(tmp_path / "a.mib", expected, kind="R64", bits=bits, chips=(2, 2))
    source = mib.read_header((path,))
    runs = source.pieces[0].layout
    raw = np.concatenate([np.zeros(3, np.uint8), np.fromfile(path, np.uint8)])
    raw.flags.writeable = False
    starts = 3 + runs.offset[0] + runs.stride[0] * np.array([2, 0, 1])
    out = np.empty_like(expected)
    merlin.decode(raw, starts, out, bits, 2, 2)
    np.testing.assert_array_equal(out, expected[[2, 0, 1]])


def test_hot_pixel_stays_where_it_is(tmp_path):
    frames = np.zeros((1, 64, 256), np.uint16)
    frames[0, 39, 52] = 4095
    for kind in ("U16", "R64"):
        found = decode(mib.read_header((write_mib(tmp_path / f"{kind}.mib", frames, kind=kind, bits=12),)))
        assert np.argwhere(found[0]).tolist() == [[39, 52]]


# several files


def write_series(folder, names, counts, *, kind="R64", first=1):
    expected = images(sum(counts), (2, 512), 12)
    begin = 0
    for name, count in zip(names, counts, strict=True):
        part = expected[begin : begin + count]
        write_mib(folder / name, part, kind=kind, bits=12, chips=(2, 2), first=first + begin)
        begin += count
    return expected


@pytest.mark.parametrize(
    "names",
    [
        ["scan_000009.mib", "scan_000010.mib", "scan_000011.mib"],
        ["scan9.mib", "scan10.mib", "scan11.mib"],
        ["a256_1.mib", "a256_2.mib", "a256_3.mib"],
    ],
)
@pytest.mark.parametrize("kind", ["R64", "U16"])
def test_series_is_found_from_any_of_its_files(tmp_path, names, kind):
    expected = write_series(tmp_path, names, [3, 1, 5], kind=kind, first=7)
    write_mib(tmp_path / "other.mib", expected[:1], kind=kind, bits=12, chips=(2, 2))
    for name in names:
        source = mib.read_header((tmp_path / name,))
        assert [f.path.name for f in source.files] == names
        assert source.notes == ()
        np.testing.assert_array_equal(decode(source), expected)


def test_series_is_found_from_its_hdr_and_the_hdr_from_the_series(tmp_path):
    names = ["scan_000001.mib", "scan_000002.mib"]
    expected = write_series(tmp_path, names, [5, 7])
    hdr = write_hdr(tmp_path / "scan.hdr", **scan_fields(12, 4))
    for path in (hdr, tmp_path / names[1]):
        source = mib.read_header((path,))
        assert source.scan_shape == (3, 4)
        np.testing.assert_array_equal(decode(source), expected)


def test_files_that_do_not_continue_are_left_out_and_told(tmp_path):
    expected = images(2, (4, 256), 12)
    for name in ("scan1.mib", "scan2.mib"):
        write_mib(tmp_path / name, expected, kind="U16", bits=12)
    write_mib(tmp_path / "scan3.mib", expected, kind="R64", bits=12, first=3)
    write_mib(tmp_path / "scan2RAW.mib", expected, kind="R64", bits=12, first=3)
    source = mib.read_header((tmp_path / "scan2.mib",))
    assert [f.path.name for f in source.files] == ["scan2.mib"]
    assert "2 files named alike" in source.notes[0]
    assert "scan1.mib" in source.notes[0]


def test_padded_and_plain_numbers_are_different_series(tmp_path):
    expected = images(1, (4, 256), 12)
    for name, first in (("s9.mib", 9), ("s10.mib", 10), ("s010.mib", 10), ("s009.mib", 9)):
        write_mib(tmp_path / name, expected, kind="U16", bits=12, first=first)
    assert [f.path.name for f in mib.read_header((tmp_path / "s010.mib",)).files] == ["s009.mib", "s010.mib"]
    assert [f.path.name for f in mib.read_header((tmp_path / "s9.mib",)).files] == ["s9.mib", "s10.mib"]


def test_several_paths_are_taken_in_their_order(tmp_path):
    expected = write_series(tmp_path, ["b.mib", "a.mib"], [2, 3])
    source = mib.read_header((tmp_path / "a.mib", tmp_path / "b.mib"))
    np.testing.assert_array_equal(decode(source), np.concatenate([expected[2:], expected[:2]]))
    write_mib(tmp_path / "c.mib", expected, kind="U16", bits=12)
    with pytest.raises(InputError, match="R64 2x2, 12; open them one by one"):
        mib.read_header((tmp_path / "a.mib", tmp_path / "c.mib"))


# the scan


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        (scan_fields(6, 3), (2, 3)),
        (scan_fields(6, 6), (6,)),
        (scan_fields(6, 1), (6,)),
        (scan_fields(6, 4), (6,)),
        ({**scan_fields(6, 1), "ScanX": 2, "ScanY": 3}, (3, 2)),
        ({"Frames in Acquisition (Number)": "many"}, (6,)),
    ],
)
def test_scan_shape_comes_from_the_hdr(tmp_path, fields, shape):
    path = write_mib(tmp_path / "a.mib", images(6, (4, 256), 12), kind="U16", bits=12)
    write_hdr(tmp_path / "a.hdr", **fields)
    source = mib.read_header((path,))
    assert source.scan_shape == shape
    assert source.frames == 6
    assert source.metadata["chip_id"] == "W556_B4, - , - , -"


def test_no_hdr_no_scan_and_plain_metadata(tmp_path):
    source = mib.read_header((write_mib(tmp_path / "a.mib", images(3, (4, 256), 12), kind="U16", bits=12),))
    assert source.scan_shape == (3,)
    assert source.metadata["timestamp"] == "2021-04-15T13:44:17.125075631Z"
    assert source.metadata["exposure_s"] == 0.001
    assert source.metadata["thresholds_keV"][:2] == [2.0, 511.0]
    assert source.metadata["layout"] == "1x1"


def test_more_frames_than_the_hdr_promises_are_kept_and_told(tmp_path):
    write_mib(tmp_path / "a.mib", images(7, (4, 256), 12), kind="U16", bits=12)
    source = mib.read_header((write_hdr(tmp_path / "a.hdr", **scan_fields(6, 3)),))
    assert source.scan_shape == (7,)
    assert "promises 6 frames (2, 3), the files hold 7" in source.notes[0]


def test_old_raw_frames_take_their_depth_from_the_hdr(tmp_path):
    expected = images(2, (4, 512), 6)
    path = write_mib(tmp_path / "a.mib", expected, kind="R64", bits=6, chips=(2, 2), old=True)
    with pytest.raises(InputError, match="counter depth None"):
        mib.read_header((path,))
    write_hdr(tmp_path / "a.hdr", **{"Counter Depth (number)": 6})
    np.testing.assert_array_equal(decode(mib.read_header((path,))), expected)


def test_hdr_of_another_acquisition(tmp_path):
    path = write_mib(tmp_path / "a.mib", images(2, (4, 256), 12), kind="U16", bits=12)
    hdr = write_hdr(tmp_path / "a.hdr", **{"Counter Depth (number)": 6}, **scan_fields(100, 10))
    with pytest.raises(InputError, match=r"a\.hdr: counter depth 6, but .*a\.mib has 12"):
        mib.read_header((hdr,))
    source = mib.read_header((path,))
    assert source.scan_shape == (2,)
    assert "not used" in source.notes[0]


# cut and broken files


def test_cut_file(tmp_path):
    expected = images(5, (4, 512), 12)
    path = write_mib(tmp_path / "a.mib", expected, kind="R64", bits=12, chips=(2, 2))
    stride = path.stat().st_size // 5
    path.write_bytes(path.read_bytes()[: 3 * stride + 800])
    with pytest.raises(TruncatedError, match=r"a\.mib: 15392 bytes hold 3 whole frames of 4864 .*800 bytes") as caught:
        mib.read_header((path,))
    assert caught.value.whole == 3
    source = mib.read_header((path,), fit=True)
    assert (source.frames, source.scan_shape) == (3, (3,))
    assert "800 bytes more" in source.notes[0]
    np.testing.assert_array_equal(decode(source), expected[:3])


def test_fewer_frames_than_the_hdr_promises(tmp_path):
    expected = images(4, (4, 256), 12)
    path = write_mib(tmp_path / "a.mib", expected, kind="U16", bits=12)
    write_hdr(tmp_path / "a.hdr", **scan_fields(6, 3))
    with pytest.raises(TruncatedError, match=r"promises 6 frames \(2, 3\), the files hold 4") as caught:
        mib.read_header((path,))
    assert caught.value.whole == 4
    source = mib.read_header((path,), fit=True)
    assert (source.frames, source.scan_shape) == (6, (2, 3))
    assert [p.frames for p in source.pieces] == [4]
    np.testing.assert_array_equal(decode(source)[:4], expected)


def test_a_cut_file_within_a_series_leaves_a_hole_where_it_is(tmp_path):
    names = ["s1.mib", "s2.mib", "s3.mib"]
    expected = write_series(tmp_path, names, [3, 3, 2])
    cut = tmp_path / "s2.mib"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 3 + 1000])
    with pytest.raises(TruncatedError, match=r"s2\.mib") as caught:
        mib.read_header((tmp_path / "s1.mib",))
    assert caught.value.whole == 6
    for name in names:
        source = mib.read_header((tmp_path / name,), fit=True)
        assert [(p.start, p.frames) for p in source.pieces] == [(0, 4), (6, 2)]
        assert source.frames == 8
        found = decode(source)
        np.testing.assert_array_equal(found[[0, 1, 2, 3, 6, 7]], expected[[0, 1, 2, 3, 6, 7]])
        assert not found[4:6].any()


def test_frames_lost_while_recording_are_told(tmp_path):
    frames = images(2, (4, 256), 12)
    a = write_mib(tmp_path / "a.mib", frames, kind="U16", bits=12)
    b = write_mib(tmp_path / "b.mib", frames, kind="U16", bits=12, first=5)
    a.write_bytes(a.read_bytes() + b.read_bytes())
    assert "last frame is number 6, not 4" in mib.read_header((a,)).notes[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"MQ1", "begins with b'MQ1'"),
        (b"\x93NUMPY\x01\0" + bytes(200), "begins with b'.x93NUMPY"),
        (b"MQ1,000001", "header is damaged"),
        (b"MQ1,000001,99999999999,01,0256,0256,U16" + bytes(500), "header is damaged"),
        (frame_header(1, "U16", 12, (4, 256), (1, 1)).replace(b"U16", b"F32") + bytes(2048), "type 'F32'"),
        (frame_header(1, "U16", 12, (4, 256), (1, 1)).replace(b",0256,", b",abcd,") + bytes(2048), "damaged"),
        (frame_header(1, "R64", 12, (4, 256), (1, 1)).replace(b",12,", b",13,") + bytes(2048), "counter depth 13"),
        (
            frame_header(1, "R64", 12, (4, 512), (2, 2)).replace(b"   2x2", b"   4x2") + bytes(8192),
            "4 chips, layout 4x2",
        ),
        (frame_header(1, "R64", 12, (4, 512), (2, 2)).replace(b",1024,", b",1000,") + bytes(8192), "1000 pixels wide"),
        (frame_header(1, "U16", 12, (4, 256), (1, 1)) + bytes(100), "not one whole frame of 2432 bytes"),
    ],
)
def test_alien_and_broken_files(tmp_path, content, message):
    path = tmp_path / "a.mib"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        mib.read_header((path,), fit=True)
    assert str(path) in str(caught.value)


def test_header_and_size_disagree(tmp_path):
    path = write_mib(tmp_path / "a.mib", images(4, (4, 256), 12), kind="U16", bits=12)
    path.write_bytes(path.read_bytes().replace(b",0004,U16", b",0003,U16"))
    with pytest.raises(InputError, match="256x3 U16, so frame 1 should begin at byte 1920"):
        mib.read_header((path,))


def test_missing_files(tmp_path):
    for name, message in (("none.mib", "can't be read"), ("none.hdr", "can't be read")):
        with pytest.raises(InputError, match=message):
            mib.read_header((tmp_path / name,))
    with pytest.raises(InputError, match=r"no a\.mib and no a_000001\.mib"):
        mib.read_header((write_hdr(tmp_path / "a.hdr"),))
    (tmp_path / "envi.hdr").write_text("ENVI\nsamples = 3")
    with pytest.raises(InputError, match="not a Merlin header"):
        mib.read_header((tmp_path / "envi.hdr",))


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=24), st.integers(0, 300), st.integers(0, 3000))
def test_any_damage_is_read_or_refused(patch, where, length):
    """Whatever happens to a header, the answer is a source that fits the file, or an InputError."""
    content = bytearray(frame_header(1, "R64", 6, (4, 256), (1, 1)) + bytes(1024)) * 2
    content[where : where + len(patch)] = patch
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a1.mib"
        path.write_bytes(bytes(content[:length]))
        try:
            source = mib.read_header((path,), fit=True)
        except InputError:
            return
        runs = source.pieces[0].layout
        assert runs.offset[0] + runs.stride[0] * (runs.frames[0] - 1) + runs.frame_bytes <= length


# lines with flyback


def flyback_file(folder, lines, columns, skipped, *, first=0, rng=5, frames=None):
    """Frames (line, position and flyback, y, x) in one file; exposures of flyback frames differ where `first`."""
    recorded = columns + skipped
    data = np.random.default_rng(rng).integers(0, 4096, (lines, recorded, 4, 256), np.uint16)
    path = write_mib(folder / "a.mib", data.reshape(-1, 4, 256)[:frames], kind="U16", bits=12)
    if first:
        stored = bytearray(path.read_bytes())
        stride = len(stored) // (lines * recorded)
        for k in range(lines * recorded):
            if k % recorded < first:
                at = stored.index(b"0.001000", k * stride)
                stored[at : at + 8] = b"0.020000"
        path.write_bytes(bytes(stored))
    return path, data


def hdr_fields(lines, columns, recorded, **more):
    return {**scan_fields(lines * recorded, recorded), "ScanX": columns, "ScanY": lines, **more}


@pytest.mark.parametrize(("lines", "columns", "skipped"), [(3, 5, 1), (4, 3, 2), (2, 7, 3), (1, 5, 1)])
def test_flyback_frames_at_the_end_of_lines_are_left_out_and_told(tmp_path, lines, columns, skipped):
    path, data = flyback_file(tmp_path, lines, columns, skipped)
    write_hdr(tmp_path / "a.hdr", **hdr_fields(lines, columns, columns + skipped))
    source = mib.read_header((path,))
    assert (source.scan_shape, source.frames) == ((lines, columns), lines * columns)
    assert [(p.start, p.frames) for p in source.pieces] == [(0, lines * columns)]
    np.testing.assert_array_equal(decode(source), data[:, :columns].reshape(-1, 4, 256))
    assert f"{skipped} flyback frame" in source.notes[0]
    assert "at the end" in source.notes[0]


def test_flyback_that_exposure_times_show_at_the_start_of_lines(tmp_path):
    path, data = flyback_file(tmp_path, 3, 5, 1, first=1)
    write_hdr(tmp_path / "a.hdr", **hdr_fields(3, 5, 6))
    source = mib.read_header((path,))
    np.testing.assert_array_equal(decode(source), data[:, 1:].reshape(-1, 4, 256))
    assert "at the start" in source.notes[0]


def test_flyback_in_a_series_whose_files_end_within_lines(tmp_path):
    data = np.random.default_rng(2).integers(0, 4096, (4, 7, 4, 256), np.uint16)
    flat, first = data.reshape(-1, 4, 256), 0
    for k, count in enumerate((3, 11, 6, 8), start=1):
        part = flat[first : first + count]
        write_mib(tmp_path / f"s{k}.mib", part, kind="U16", bits=12, first=first + 1)
        first += count
    source = mib.read_header((write_hdr(tmp_path / "s.hdr", **hdr_fields(4, 6, 7)),))
    ds = gpuem.open(tmp_path / "s.hdr")
    assert source.scan_shape == ds.scan_shape == (4, 6)
    np.testing.assert_array_equal(ds[...], data[:, :6])
    total = gpuem.run(ds, [gpuem.Sum()], device="cpu")["sum/sum"].data
    np.testing.assert_array_equal(total, data[:, :6].sum((0, 1), dtype=np.int64))


def test_a_scan_of_all_frames_keeps_the_flyback(tmp_path):
    path, data = flyback_file(tmp_path, 3, 5, 1)
    write_hdr(tmp_path / "a.hdr", **hdr_fields(3, 5, 6))
    np.testing.assert_array_equal(gpuem.open(path, scan=(3, 6))[...], data)
    np.testing.assert_array_equal(gpuem.open(path, scan=(15,))[...], data[:, :5].reshape(15, 4, 256))
    with pytest.raises(InputError, match=r"18 frames, 15 of them scan positions .*scan \[4, 4\] has 16 positions"):
        gpuem.open(path, scan=(4, 4))


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        # the LineSkip of a continuous acquisition
        ({"Frames in Acquisition (Number)": 18, "ScanX": 5, "ScanY": 3, "LineSkip": 1}, (3, 5)),
        ({**scan_fields(18, 6), "LineSkip": 1}, (3, 5)),
        # one trigger for all, and a LineSkip that was not used
        ({**scan_fields(18, 18), "ScanX": 6, "ScanY": 3}, (3, 6)),
        ({**scan_fields(18, 6), "ScanX": 6, "ScanY": 3, "LineSkip": 1}, (3, 6)),
        ({**scan_fields(18, 1), "ScanX": 6, "ScanY": 3, "LineSkip": 2}, (3, 6)),
    ],
)
def test_the_number_of_frames_tells_whether_lines_have_flyback(tmp_path, fields, shape):
    path, data = flyback_file(tmp_path, 3, 5, 1)
    write_hdr(tmp_path / "a.hdr", **fields)
    np.testing.assert_array_equal(gpuem.open(path)[...], data[:, : shape[1]])


def test_acquisition_with_flyback_that_ends_early(tmp_path):
    path, data = flyback_file(tmp_path, 4, 5, 1, frames=15)
    write_hdr(tmp_path / "a.hdr", **hdr_fields(4, 5, 6))
    with pytest.raises(TruncatedError, match=r"4 lines of 5 positions and 1 flyback frames, 24 frames; .* hold 15"):
        gpuem.open(path)
    ds = gpuem.open(path, fit=True)
    valid = gpuem.run(ds, [gpuem.Sum()], device="cpu")["valid"].data
    assert valid.ravel().tolist() == [True] * 13 + [False] * 7
    assert "7 of 20 scan positions have no frame" in " ".join(ds.notes)
    np.testing.assert_array_equal(ds[2, :3], data[2, :3])


def test_the_last_flyback_may_be_missing(tmp_path):
    path, data = flyback_file(tmp_path, 4, 5, 1, frames=23)
    write_hdr(tmp_path / "a.hdr", **hdr_fields(4, 5, 6))
    np.testing.assert_array_equal(gpuem.open(path)[...], data[:, :5])
