"""Data in object stores and on web servers: a real S3 server and a web server that fails on demand, on loopback."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import pickle
import sys
import textwrap
import threading

import h5py
import numpy as np
import pytest
import reference
from merlin_writer import write_mib
from web_server import Web

import gpuem
from gpuem import engine, job, recipe, tiles
from gpuem.backends import cpu_load
from gpuem.errors import DeviceError, InputError, ReadError, RecipeError
from gpuem.formats import remote, stores
from gpuem.formats.remote import Url, place
from gpuem.formats.source import File
from gpuem.storage import gds, gds_remote, host
from gpuem.storage import remote as ahead

pytest.importorskip("obstore", reason="obstore is not installed")
CHOSEN = [gpuem.Sum(), gpuem.VirtualDetector(name="all", shape="disk", outer=99), gpuem.CenterOfMass()]
SHAPE = (6, 50, 64, 64)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Retries without long waits, and clients that know what the environment says now."""
    monkeypatch.setattr(stores, "_WAIT_SECONDS", 0.01)
    for name in list(os.environ):
        if name.startswith("AWS_") or name == "GPUEM_S3_ANONYMOUS":
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", "none")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "none")
    stores._made.cache_clear()
    yield
    stores._made.cache_clear()


@pytest.fixture(scope="module")
def moto():
    server = pytest.importorskip("moto.server", reason="moto is not installed")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    yield "http://{}:{}".format(*running.get_host_and_port())
    running.stop()


@pytest.fixture
def s3(moto, monkeypatch):
    """The S3 server with an empty bucket ``data``; returns a function that puts a file there."""
    boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")
    for name, value in (("ACCESS_KEY_ID", "me"), ("SECRET_ACCESS_KEY", "secret"), ("ENDPOINT_URL", moto)):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.delenv("AWS_CONFIG_FILE")
    monkeypatch.delenv("AWS_SHARED_CREDENTIALS_FILE")
    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket="data")
    for entry in client.list_objects_v2(Bucket="data").get("Contents", []):
        client.delete_object(Bucket="data", Key=entry["Key"])

    def put(name, key=None):
        client.upload_file(str(name), "data", key or f"scans/{name}")
        return f"s3://data/{key or f'scans/{name}'}"

    return put


@pytest.fixture
def web(tmp_path):
    server = Web(tmp_path)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def written(kind):
    """A file of every format; its name, its data and what `gpuem.open` must be told."""
    data = reference.planted(SHAPE, "u2")
    if kind == "npy":
        np.save("a.npy", data)
        return "a.npy", data, {}
    if kind == "raw":
        data.tofile("a.raw")
        return "a.raw", data, {"frame": SHAPE[2:], "dtype": "uint16", "scan": SHAPE[:2]}
    if kind == "big-endian":
        data.astype(">u2").tofile("b.raw")
        return "b.raw", data, {"frame": SHAPE[2:], "dtype": ">u2", "scan": SHAPE[:2]}
    if kind == "mib":
        from pathlib import Path

        data = np.random.default_rng(1).integers(0, 4096, (12, 256, 256)).astype("u2")
        write_mib(Path("a.mib"), data, kind="R64", bits=12)
        return "a.mib", data, {}
    options = {
        "contiguous": {},
        "bslz4": {"chunks": (1, 1, 64, 64)},
        "gzip": {"chunks": (2, 3, 20, 64), "compression": "gzip"},
        "h5py": {"chunks": (1, 5, 64, 64)},
    }[kind]
    if kind in ("bslz4", "h5py"):
        hdf5plugin = pytest.importorskip("hdf5plugin")
        options |= hdf5plugin.Bitshuffle(cname="lz4") if kind == "bslz4" else hdf5plugin.BZip2()
    with h5py.File("a.h5", "w") as file:
        file.create_dataset("entry/data", data=data, **options)
    return "a.h5", data, {}


KINDS = ("npy", "raw", "big-endian", "mib", "contiguous", "bslz4", "gzip", "h5py")


def same_source(a, b):
    """Compare all of two descriptions, arrays by their content."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if dataclasses.is_dataclass(a):
        names = [field.name for field in dataclasses.fields(a)]
        return type(a) is type(b) and all(same_source(getattr(a, n), getattr(b, n)) for n in names)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(same_source(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def assert_same_maps(found, expected):
    assert set(found.maps) == set(expected.maps)
    for name in found.maps:
        assert np.array_equal(found[name].data, expected[name].data, equal_nan=True), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["s3", "http"])
def test_every_format_gives_over_the_network_what_it_gives_from_disk(kind, where, request):
    name, data, options = written(kind)
    url = request.getfixturevalue("s3")(name) if where == "s3" else f"{request.getfixturevalue('web').url}/{name}"
    here, there = gpuem.open(name, **options), gpuem.open(url, **options)
    assert there.source.remote
    assert not here.source.remote
    assert (there.shape, there.dtype, there.metadata) == (here.shape, here.dtype, here.metadata)
    region = np.zeros(there.scan_shape, bool)
    region.reshape(-1)[3:9] = True
    for roi in (None, region):
        assert_same_maps(gpuem.run(there, CHOSEN, roi=roi, threads=2), gpuem.run(here, CHOSEN, roi=roi, threads=2))
    assert np.array_equal(there[...].reshape(data.shape), data)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["disk", "http"])
def test_sources_travel(kind, where, request):
    name, data, options = written(kind)
    url = name if where == "disk" else f"{request.getfixturevalue('web').url}/{name}"
    ds = gpuem.open(url, **options)
    again = pickle.loads(pickle.dumps(ds.source))
    assert same_source(again, ds.source)
    again = dataclasses.replace(ds, source=again)
    assert np.array_equal(again[...].reshape(data.shape), data)


def test_arrays_travel():
    data = reference.planted((3, 4, 8, 8), "u2")
    from gpuem.dataset import of_array

    ds = of_array(data)
    again = dataclasses.replace(ds, source=pickle.loads(pickle.dumps(ds.source)))
    assert np.array_equal(again[...], data)


# how it is asked


def test_a_whole_file_is_asked_for_in_few_large_pieces_many_at_a_time(web):
    data = np.random.default_rng(0).integers(0, 9, (80, 256, 256)).astype("u2")
    data.tofile("a.raw")
    web.delay = 0.02
    ds = gpuem.open(f"{web.url}/a.raw", frame=(256, 256), dtype="u2")
    assert np.array_equal(gpuem.run(ds, CHOSEN, threads=1)["sum/sum"].data, reference.frame_sum(data))
    got = web.gets()
    assert len(got) == -(-data.nbytes // ahead.PIECE_NBYTES)
    assert sum(b - a for a, b in got) == data.nbytes
    # one thread computes, and all pieces are under way at once
    assert web.most >= 2


def test_small_chunks_that_lie_side_by_side_are_asked_for_together(web):
    name, data, _ = written("gzip")
    ds = gpuem.open(f"{web.url}/{name}")
    web.asked.clear()
    assert np.array_equal(gpuem.run(ds, CHOSEN)["sum/sum"].data, reference.frame_sum(data.reshape(-1, 64, 64)))
    assert ds.source.pieces[0].layout.offset.size > 200
    assert len(web.gets()) <= 3


def test_a_region_asks_for_its_own_bytes(web):
    data = np.random.default_rng(0).integers(0, 9, (64, 16, 128, 128)).astype("u2")
    data.tofile("a.raw")
    ds = gpuem.open(f"{web.url}/a.raw", frame=(128, 128), dtype="u2", scan=(64, 16))
    region = np.zeros((64, 16), bool)
    region[3:5, 2:6] = region[40, 3] = True
    found = gpuem.run(ds, CHOSEN, roi=region)
    assert np.array_equal(found["sum/sum"].data, reference.frame_sum(data[region]))
    # two rows are 12 frames apart, less than what is fetched along
    assert sum(b - a for a, b in web.gets()) == (16 + 4 + 1) * 32768
    assert len(web.gets()) == 2


def test_an_index_is_read_in_growing_steps_and_once(web):
    with h5py.File("a.h5", "w") as file:
        data = file.create_dataset("data", (3000, 8, 8), "u2", chunks=(1, 8, 8), compression="gzip")
        data[:] = 1
    ds = gpuem.open(f"{web.url}/a.h5")
    assert ds.source.pieces[0].layout.length.all()
    size = os.path.getsize("a.h5")
    assert sum(b - a for a, b in web.gets()) <= size
    assert len(web.gets()) <= 2 + size // remote._BLOCK


@pytest.mark.parametrize("seed", range(3))
def test_any_reads_in_any_order_by_any_thread_are_the_bytes_of_the_file(web, monkeypatch, seed):
    content = np.random.default_rng(seed).integers(0, 256, 400_000, np.uint8)
    content.tofile("a.raw")
    monkeypatch.setattr(ahead, "GAP_NBYTES", 2000)
    monkeypatch.setattr(ahead, "PIECE_NBYTES", 5000)
    monkeypatch.setattr(ahead, "ROOM_NBYTES", 40_000)
    file = File.of(place(f"{web.url}/a.raw"))
    reader = ahead.Ahead((file,))
    wrong, most = [], []

    def work(number):
        rng = np.random.default_rng((seed, number))
        for _ in range(10):
            at = rng.integers(0, content.size - 1, rng.integers(1, 20))
            length = np.minimum(rng.integers(1, 9000, at.size), content.size - at)
            if rng.random() < 0.7:
                reader.announce(0, at, length)
            for a, n in list(zip(at.tolist(), length.tolist(), strict=True))[: rng.integers(1, 20)]:
                out = np.empty(n, np.uint8)
                reader.read_into(0, a, out)
                if not np.array_equal(out, content[a : a + n]):
                    wrong.append((a, n))
            most.append(reader._held)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    assert max(most) <= 40_000 + 4 * 5000
    reader.forget()
    assert reader._held == 0


def test_what_was_read_is_let_go(web, monkeypatch):
    content = np.random.default_rng(0).integers(0, 256, 400_000, np.uint8)
    content.tofile("a.raw")
    monkeypatch.setattr(ahead, "PIECE_NBYTES", 5000)
    monkeypatch.setattr(ahead, "ROOM_NBYTES", 40_000)
    reader = ahead.Ahead((File.of(place(f"{web.url}/a.raw")),))
    reader.announce(0, np.array([0]), np.array([content.size]))
    out = np.empty(5000, np.uint8)
    for at in range(0, content.size, 5000):
        reader.read_into(0, at, out)
        assert np.array_equal(out, content[at : at + 5000])
        assert reader._held <= 40_000
    assert reader._held == 0
    # gaps that nobody reads hold nothing up: what comes next is under way before it is asked for
    reader.announce(0, np.array([0]), np.array([content.size]))
    for at in range(0, content.size, 5000):
        began = [piece for piece in reader._pieces.values() if piece.data is not None and piece.start > at]
        assert began or at >= content.size - 10_000
        reader.read_into(0, at, out[:10])
        assert reader._held <= 40_000


def test_chunks_of_a_region_are_fetched_many_at_a_time(web, monkeypatch):
    monkeypatch.setattr(ahead, "GAP_NBYTES", 100)
    monkeypatch.setattr(cpu_load, "GAP_NBYTES", 100)
    data = reference.planted((40, 16, 16), "u2")
    with h5py.File("a.h5", "w") as file:
        file.create_dataset("data", data=data, chunks=(1, 16, 16))
    ds = gpuem.open(f"{web.url}/a.h5")
    assert ds.source.pieces[0].layout.__class__.__name__ == "Chunks"
    web.asked.clear()
    web.delay = 0.05
    web.most = 0
    region = np.arange(40) % 2 == 0
    found = gpuem.run(ds, CHOSEN, roi=region, threads=1)
    assert np.array_equal(found["sum/sum"].data, reference.frame_sum(data[region]))
    assert len(web.gets()) == 20
    assert web.most >= 4


def test_what_is_kept_ahead_is_counted(web):
    data = np.zeros((64, 256, 256), "u2")
    data.tofile("a.raw")
    given = {"frame": (256, 256), "dtype": "u2"}
    limits = recipe.run_section(memory="4 GB")
    here = job.prepare(gpuem.open("a.raw", **given), CHOSEN, limits).plan
    there = job.prepare(gpuem.open(f"{web.url}/a.raw", **given), CHOSEN, limits).plan
    assert there.nbytes["read ahead"] == data.nbytes
    assert there.total_nbytes == here.total_nbytes + data.nbytes
    assert ahead.AHEAD_NBYTES == ahead.ROOM_NBYTES + ahead.AT_ONCE * ahead.PIECE_NBYTES
    assert "read ahead" not in here.nbytes


# what goes wrong


def test_a_busy_server_is_asked_again(web):
    name, data, options = written("raw")
    ds = gpuem.open(f"{web.url}/{name}", **options)
    web.busy = 3
    assert np.array_equal(gpuem.run(ds, CHOSEN)["sum/sum"].data, reference.frame_sum(data.reshape(-1, 64, 64)))
    assert web.busy == 0


def test_answers_that_are_cut_short_are_asked_for_again(web):
    name, data, options = written("raw")
    ds = gpuem.open(f"{web.url}/{name}", **options)
    web.cuts = 3
    assert np.array_equal(gpuem.run(ds, CHOSEN)["sum/sum"].data, reference.frame_sum(data.reshape(-1, 64, 64)))
    assert web.cuts == 0


@pytest.mark.parametrize("kind", ["raw", "gzip", "h5py"])
def test_a_server_that_stays_away_is_a_passing_fault(web, monkeypatch, kind):
    monkeypatch.setattr(stores, "RETRIES", 2)
    name, data, options = written(kind)
    ds = gpuem.open(f"{web.url}/{name}", **options)
    made = job.prepare(ds, CHOSEN, recipe.run_section(threads=1, on_error="mask"))
    web.busy = 10**9
    with pytest.raises(ReadError, match=r"127\.0\.0\.1"):
        engine.run_shard(made, 0)
    # the client tries again, nobody else does on top of that
    assert web.refused == 3
    # not one frame comes: that is no reason to mask them all
    with pytest.raises(ReadError, match="not one frame of shard 0"):
        engine.run_shard(made, 0, last_try=True)
    assert web.refused <= 15
    web.busy = 0
    again = engine.run_shard(made, 0)
    assert np.array_equal(again.sums.total, reference.frame_sum(data.reshape(-1, 64, 64)))


@pytest.mark.parametrize("kind", ["raw", "gzip"])
def test_a_server_that_dies_while_a_header_is_read(web, monkeypatch, kind):
    monkeypatch.setattr(stores, "RETRIES", 1)
    name, _, options = written(kind)
    web.busy = 10**9
    with pytest.raises(ReadError, match=r"503|server"):
        gpuem.open(f"{web.url}/{name}", **options)
    original = stores.fetch
    calls = []

    def dying(*arguments):
        calls.append(arguments)
        web.busy = 0 if len(calls) < 2 else 10**9
        return original(*arguments)

    web.busy = 0
    if kind == "gzip":
        with h5py.File(name, "r+") as file:
            file.create_dataset("more", data=np.zeros((2000, 100, 4)), chunks=(1, 10, 4))
        monkeypatch.setattr(stores, "fetch", dying)
        with pytest.raises(ReadError, match="503"):
            gpuem.open(f"{web.url}/{name}", dataset="entry/data")


def test_a_server_that_knows_no_ranges_is_refused(web):
    name, _, options = written("raw")
    ds = gpuem.open(f"{web.url}/{name}", **options)
    web.ranges = False
    with pytest.raises(InputError, match="whole files only"):
        ds[0, 0]


def test_an_object_that_changed_is_refused(web, s3):
    name, _, options = written("raw")
    ds = gpuem.open(f"{web.url}/{name}", **options)
    web.etag = '"two"'
    for ask in (ds.files.check, lambda: ds.files.read(0, 0, 10)):
        with pytest.raises(InputError, match="changed since it was opened"):
            ask()
    url = s3(name)
    ds = gpuem.open(url, **options)
    assert ds.source.files[0].etag
    with open(name, "r+b") as stream:
        stream.write(b"x")
    s3(name)
    with pytest.raises(InputError, match="changed since it was opened"):
        gpuem.run(ds, CHOSEN)


def test_without_tags_size_and_time_tell(web):
    name, _, options = written("raw")
    web.etag = ""
    ds = gpuem.open(f"{web.url}/{name}", **options)
    assert ds.source.files[0].mtime_ns == int(os.stat(name).st_mtime) * 10**9
    ds.files.check()
    os.utime(name, (1, 1))
    with pytest.raises(InputError, match="changed since it was opened"):
        ds.files.check()


def test_what_is_not_there_is_told_with_what_to_do(s3, monkeypatch):
    np.save("a.npy", np.zeros((2, 4, 4)))
    s3("a.npy")
    for url in ("s3://data/scans/b.npy", "s3://nothing/a.npy"):
        with pytest.raises(InputError, match="no such object, or no such bucket"):
            gpuem.open(url)
    for url in ("s3://data/", "s3://data", "https://127.0.0.1"):
        with pytest.raises(InputError, match="names no object; it should look like"):
            gpuem.open(url)
    np.empty(0).tofile("empty.npy")
    with pytest.raises(InputError, match="empty file"):
        gpuem.open(s3("empty.npy"))
    monkeypatch.setenv("GPUEM_S3_ANONYMOUS", "1")
    stores._made.cache_clear()
    with pytest.raises(InputError, match=r"may not be read .* AWS_SKIP_SIGNATURE=true"):
        gpuem.open("s3://data/scans/a.npy")


def test_missing_credentials_are_told(s3, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", os.getcwd())
    # nobody answers where a machine of the cloud would be asked for them
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(stores, "RETRIES", 1)
    stores._made.cache_clear()
    with pytest.raises(gpuem.GpuemError, match="AWS_ACCESS_KEY_ID"):
        gpuem.open("s3://data/scans/a.npy")


def test_credentials_come_from_the_files_of_the_tools_too(s3, moto, monkeypatch):
    np.save("a.npy", np.ones((2, 4, 4), "u2"))
    url = s3("a.npy")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name)
    with open("credentials", "w") as stream:
        stream.write(
            "[default]\naws_access_key_id = wrong\n[lab]\naws_access_key_id = me\naws_secret_access_key = a%b\n"
        )
    with open("config", "w") as stream:
        stream.write(f"[profile lab]\nregion = us-east-1\nendpoint_url = {moto}\n")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    monkeypatch.setenv("AWS_CONFIG_FILE", "config")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "credentials")
    assert stores.s3_options() == {
        "access_key_id": "me", "secret_access_key": "a%b", "region": "us-east-1", "endpoint": moto
    }  # fmt: skip
    stores._made.cache_clear()
    assert gpuem.open(url)[...].sum() == 32


def test_a_web_server_that_forbids(web):
    name, _, options = written("raw")
    web.forbidden = True
    with pytest.raises(InputError, match="may not be read"):
        gpuem.open(f"{web.url}/{name}", **options)


def test_without_obstore_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(InputError, match=r"pip install 'gpuem\[remote\]'"):
        gpuem.open("s3://data/a.npy")


def test_a_frame_in_fortran_order_is_refused(web):
    np.save("a.npy", np.asfortranarray(np.zeros((4, 5, 6, 7))))
    with pytest.raises(InputError, match="Fortran order"):
        gpuem.open(f"{web.url}/a.npy")


# what belongs together


def test_numbered_files_of_a_bucket_are_found(s3, web):
    from pathlib import Path

    data = np.random.default_rng(0).integers(0, 99, (9, 256, 256)).astype("u2")
    for k in range(3):
        write_mib(Path(f"scan_00{k + 1}.mib"), data[3 * k : 3 * k + 3], kind="U16", bits=12, first=3 * k + 1)
        url = s3(f"scan_00{k + 1}.mib")
    ds = gpuem.open(url)
    assert [file.path.name for file in ds.source.files] == ["scan_001.mib", "scan_002.mib", "scan_003.mib"]
    assert np.array_equal(ds[...], data)
    # a web server doesn't tell what it has
    ds = gpuem.open(f"{web.url}/scan_001.mib")
    assert len(ds.source.files) == 1
    assert any("give all paths" in note for note in ds.notes)
    several = gpuem.open([f"{web.url}/scan_00{k}.mib" for k in (1, 2, 3)])
    assert np.array_equal(several[...], data)


@pytest.mark.parametrize("missing", [False, True])
def test_a_series_of_hdf5_files_behind_a_master(web, missing):
    data = reference.planted((7, 8, 9), "u2")
    with h5py.File("x_master.h5", "w") as master:
        for k, part in enumerate((data[:4], data[4:])):
            with h5py.File(f"x_data_{k}.h5", "w") as file:
                file.create_dataset("entry/data/data", data=part, chunks=(1, 8, 9), compression="gzip")
            master[f"entry/data/data_{k + 1:06}"] = h5py.ExternalLink(f"x_data_{k}.h5", "entry/data/data")
    url = f"{web.url}/x_master.h5"
    if not missing:
        ds = gpuem.open(url)
        assert np.array_equal(ds[...], data)
        assert {str(file.path) for file in ds.source.files} == {
            url, f"{web.url}/x_data_0.h5", f"{web.url}/x_data_1.h5"
        }  # fmt: skip
        return
    os.remove("x_data_1.h5")
    with pytest.raises(InputError, match=r"x_data_1\.h5, which is missing"):
        gpuem.open(url)


def test_a_link_to_another_file_is_not_looked_for_in_this_one(web):
    with h5py.File("other.h5", "w") as file:
        file["x/frames"] = reference.planted((3, 8, 9), "u2")
    with h5py.File("a.h5", "w") as file:
        file["x/small"] = np.zeros((2, 4))
        file["x/frames"] = h5py.ExternalLink("other.h5", "x/small")
        file["y"] = h5py.ExternalLink("other.h5", "x/frames")
    ds = gpuem.open(f"{web.url}/a.h5")
    assert {str(file.path) for file in ds.source.files} == {f"{web.url}/a.h5", f"{web.url}/other.h5"}
    assert np.array_equal(ds[...], reference.planted((3, 8, 9), "u2"))
    os.remove("other.h5")
    with pytest.raises(InputError, match=r"lie in other files.*other\.h5"):
        gpuem.open(f"{web.url}/a.h5")


def test_an_error_that_hdf5_hides_is_not_lost(web, monkeypatch):
    from gpuem.formats import hdf5_file

    made = []

    class Watched(remote.Stream):
        def __init__(self, url):
            super().__init__(url)
            made.append(self)

    monkeypatch.setattr(hdf5_file, "Stream", Watched)
    name, _, _ = written("gzip")

    def looked():
        with hdf5_file.opened(place(f"{web.url}/{name}")) as file:
            made[0].error = ReadError("gone away")
            return "entry" in file

    with pytest.raises(ReadError, match="gone away"):
        looked()


def test_a_virtual_dataset_over_the_network(web):
    data = reference.planted((6, 8, 9), "u2")
    layout = h5py.VirtualLayout((6, 8, 9), "u2")
    for k in range(2):
        with h5py.File(f"part{k}.h5", "w") as file:
            file["data"] = data[3 * k : 3 * k + 3]
        layout[3 * k : 3 * k + 3] = h5py.VirtualSource(f"part{k}.h5", "data", (3, 8, 9))
    with h5py.File("all.h5", "w") as file:
        file.create_virtual_dataset("data", layout)
    assert np.array_equal(gpuem.open(f"{web.url}/all.h5")[...], data)
    odd = h5py.VirtualLayout((3, 8, 9), "u2")
    odd[:, :4] = h5py.VirtualSource("part0.h5", "data", (3, 8, 9))[:, 4:]
    with h5py.File("odd.h5", "w") as file:
        file.create_virtual_dataset("data", odd)
    half = gpuem.open(f"{web.url}/odd.h5")
    assert np.array_equal(half[:, :4], data[:3, 4:])
    assert not half[:, 4:].any()
    assert "mapped to no file" in " ".join(half.notes) or "gap" in " ".join(half.notes)
    narrow = h5py.VirtualLayout((3, 8, 9), "u1")
    narrow[...] = h5py.VirtualSource("part0.h5", "data", (3, 8, 9))
    with h5py.File("narrow.h5", "w") as file:
        file.create_virtual_dataset("data", narrow)
    with pytest.raises(InputError, match="copy all of them to a disk"):
        gpuem.open(f"{web.url}/narrow.h5")


# addresses


def test_addresses():
    url = place("s3://bucket/a folder/scan.ä.mib")
    assert (url.name, url.stem, url.suffix, str(url.parent)) == ("scan.ä.mib", "scan.ä", ".mib", "s3://bucket/a folder")
    assert str(url.with_suffix(".hdr")) == "s3://bucket/a folder/scan.ä.hdr"
    assert str(url.parent / "x.h5") == "s3://bucket/a folder/x.h5"
    signed = place("https://host:8/a/b.npy?X=1/2.h5&Y")
    assert (signed.name, signed.with_name("c").text) == ("b.npy", "https://host:8/a/c?X=1/2.h5&Y")
    assert str(place("S3:/bucket/key")) == "s3://bucket/key"
    from pathlib import Path

    # a path that is a URL has lost a slash
    assert place(Path("s3://bucket/key")) == Url("s3://bucket/key")
    assert place(url) is url
    assert place("~/a") == Path("~/a").expanduser()
    for text in ("data/s3://x", "s3:", "c:/x"):
        assert isinstance(place(text), Path)
    with pytest.raises(RecipeError, match="ftp://x/y: not a URL that gpuem reads"):
        place("ftp://x/y")
    assert pickle.loads(pickle.dumps(url)) == url


def test_names_with_blanks_and_umlauts(s3, web):
    data = reference.planted((5, 8, 9), "u2")
    with h5py.File("ä ö+%20.h5", "w") as file:
        file.create_dataset("data", data=data, chunks=(1, 8, 9), compression="gzip")
    np.save("ä ö+%20.npy", data)
    for name in ("ä ö+%20.h5", "ä ö+%20.npy"):
        ds = gpuem.open(s3(name))
        assert np.array_equal(ds[...], data)
        assert ds.source.files[0].path.name == name


def test_a_signed_address(web):
    data = reference.planted((5, 8, 9), "u2")
    np.save("a.npy", data)
    ds = gpuem.open(f"{web.url}/a.npy?signature=abc%2F1&x=y")
    assert np.array_equal(ds[...], data)
    assert all(path == "/a.npy?signature=abc%2F1&x=y" for _, path, _, _ in web.asked)


# on a GPU


def test_which_way_remote_files_take_to_a_gpu(web, monkeypatch):
    np.zeros(100, np.uint8).tofile("a.raw")
    away = (File.of(place(f"{web.url}/a.raw")),)
    monkeypatch.setitem(sys.modules, "kvikio", None)
    kind, why = gds.choose("auto", away, True)
    assert kind == "pinned"
    assert "obstore" in why
    with pytest.raises(DeviceError, match="can't be used"):
        gds.choose("gds", away, True)
    monkeypatch.setitem(sys.modules, "kvikio", type(sys)("kvikio"))
    sys.modules["kvikio"].is_remote_file_available = lambda: True
    assert gds.choose("auto", away, False)[0] == "kvikio"
    assert gds.choose("gds", away, False)[0] == "kvikio"
    assert gds.choose("pinned", away, False)[0] == "pinned"
    assert gds.choose("auto", (*away, File.of(remote.place("a.raw"))), False)[0] == "pinned"
    cloud = (File(Url("gs://bucket/a.raw"), 100, 0),)
    assert "S3 and web servers" in gds.choose("auto", cloud, False)[1]
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    assert gds.choose("auto", (File(Url("s3://bucket/a.raw"), 100, 0),), False)[0] == "pinned"


def test_kvikio_is_told_what_the_environment_says(monkeypatch):
    calls = []

    class RemoteFile:
        @classmethod
        def open_s3(cls, *arguments, **named):
            calls.append((arguments, named))
            return cls()

        @classmethod
        def open_http(cls, url, nbytes):
            if "bad" in url:
                raise RuntimeError("KvikIO failure at: /cpp/x.cpp:4: no such host")
            calls.append((url, nbytes))
            return cls()

    kvikio = type("kvikio", (), {"RemoteFile": RemoteFile})
    monkeypatch.setenv("AWS_REGION", "here")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    gds_remote.open_file(File(Url("s3://bucket/a/b.raw"), 7, 0), kvikio)
    gds_remote.open_file(File(Url("https://host/b.raw"), 8, 0), kvikio)
    assert calls == [
        (("bucket", "a/b.raw", 7), {"aws_region_name": "here"}),
        ("https://host/b.raw", 8),
    ]
    with pytest.raises(InputError, match=r"bad\.raw: kvikio can't open it: no such host; try transfer"):
        gds_remote.open_file(File(Url("https://host/bad.raw"), 8, 0), kvikio)


@pytest.mark.skipif(importlib.util.find_spec("kvikio") is None, reason="kvikio isn't installed")
def test_the_real_kvikio_reads_remote_bytes_into_host_memory(tmp_path, s3, web):
    from test_gds import STUB, compiled, run

    stub = compiled(tmp_path / "stub", "libcuda.so.1", STUB)
    np.random.default_rng(7).integers(0, 256, 9_000_001, np.uint8).tofile("scan.raw")
    code = f"""
        import numpy as np
        from gpuem.errors import DataError, InputError
        from gpuem.formats.remote import place
        from gpuem.formats.source import File
        from gpuem.storage import gds

        content = np.fromfile({str(tmp_path / "scan.raw")!r}, np.uint8)
        for url in ({s3("scan.raw")!r}, {web.url + "/scan.raw"!r}):
            files = (File.of(place(url)),)
            assert gds.choose("auto", files, False)[0] == "kvikio"
            reader = gds.Reader(files)
            for offset, length in [(0, 9_000_001), (4096, 5_000_000), (1, 777), (9_000_000, 1)]:
                target = np.full(length + 3, 7, np.uint8)
                reader.read(0, offset, length, target).wait()
                assert (target[:length] == content[offset : offset + length]).all(), (url, offset, length)
                assert (target[length:] == 7).all()
            reader.close()
            late = gds.Reader((File(files[0].path, files[0].size + 1, files[0].mtime_ns, files[0].etag),))
            try:
                late.open(0)
            except InputError as error:
                assert "changed" in str(error)
            else:
                raise AssertionError("no error")
        print("fine")
        """
    assert run(textwrap.dedent(code), LD_LIBRARY_PATH=str(stub)) == "fine"


def test_seconds_of_fetching_count_as_reading(web):
    np.zeros(1000, np.uint8).tofile("a.raw")
    web.delay = 0.05
    files = host.Files((File.of(place(f"{web.url}/a.raw")),))
    files.read(0, 0, 1000)
    assert files.read_seconds() >= 0.05
    assert tiles.AHEAD_NBYTES == ahead.AHEAD_NBYTES


@pytest.mark.parametrize("kind", KINDS)
def test_remote_bytes_reach_a_gpu_by_way_of_the_host(web, kind):
    standin = pytest.importorskip("standin", reason="the stand-in for a GPU needs its tools")
    name, _, options = written(kind)
    expected = gpuem.run(gpuem.open(name, **options), CHOSEN, device="cpu")
    with standin.installed("late"):
        found = gpuem.run(gpuem.open(f"{web.url}/{name}", **options), CHOSEN, device="cuda", transfer="pinned")
    assert_same_maps(found, expected)
