"""Many data sets: which files are one, their names, and that each gets what it would get alone."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import merlin_writer
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

import gpuem
from gpuem import data_sets, executors, many, outputs, recipe, results, run_folder, tiles
from gpuem.errors import DataError, ResumableError
from gpuem.executors import Here
from gpuem.formats.remote import Url

RECIPE = """
[input]
{input}
[[analysis]]
kind = "sum"
[[analysis]]
kind = "com"
[output]
path = "out/{{name}}.results.zarr"
previews = false
"""
XML = '<root><raw_file filename="{raw}"/><pix_x>2</pix_x><pix_y>1</pix_y></root>'


def write_recipe(data, text=RECIPE, name="recipe.toml"):
    Path(name).write_text(text.format(input=data))
    return Path(name).absolute()


def write_scan(path, seed=0, scan=(4, 5)):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    data = reference.planted((*scan, 9, 9), "u2") + np.uint16(seed)
    np.save(path, data)
    return data


def found(*patterns, kind=None):
    return [str(p.relative_to(Path.cwd())) for p in data_sets.expand([Path.cwd() / p for p in patterns], kind)]


def touch(*names):
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"x")


# which files are data sets


def test_patterns_find_sorted_files_each_once_and_nothing_else():
    touch("d/b.npy", "d/a.npy", "d/c.h5", "d/.hidden.npy", "d/._a.npy", "e/x/y/z.npy", "d/notes.txt", "d/summary.json")
    Path("d/folder.npy").mkdir()
    assert found("d/*.npy") == ["d/a.npy", "d/b.npy"]
    assert found("d/*") == ["d/a.npy", "d/b.npy", "d/c.h5"]
    assert found("d/[ab].npy", "d/?.*", "d/../d/a.npy") == ["d/a.npy", "d/b.npy", "d/c.h5"]
    assert found("**/*.npy") == ["d/a.npy", "d/b.npy", "e/x/y/z.npy"]
    assert found("d/*.txt", kind="raw") == ["d/notes.txt"]


def test_a_name_with_brackets_is_a_file_where_it_is_there():
    touch("old [1]/scan[a].npy", "old [1]/scana.npy", "old [1]/scanb.npy")
    assert found("old [1]/scan[a].npy") == ["old [1]/scan[a].npy"]
    assert found("old [1]/scan[ab].npy") == ["old [1]/scana.npy", "old [1]/scanb.npy"]
    assert data_sets.split(Path("/old [1]/*.npy"))[0] == Path("/")
    assert data_sets.split(Path.cwd() / "old [1]" / "none.npy") == (Path.cwd() / "old [1]" / "none.npy", "")


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("dta/*.npy", ["dta: no such folder; did you mean data?"]),
        ("data/*.npz", ["nothing fits in", "did you mean", ".npy"]),
        ("data/B*.npy", ["did you mean b.npy?"]),
        ("data/*.mib", ["nothing fits in", "/data"]),
        ("data/*/x.npy", ["run1", "x.npy"]),
        ("data/run1/*", ["run1; it is empty"]),
        ("data/ru*", ["only folders fit"]),
        ("data/*.txt", ["finds notes.txt, by its name no detector data", 'format = "..."']),
    ],
)
def test_a_pattern_without_a_match_says_where_and_what_is_near(pattern, words):
    touch("data/a.npy", "data/b.npy", "data/notes.txt")
    Path("data/run1").mkdir()
    path = write_recipe(f'path = "{pattern}"')
    with pytest.raises(gpuem.RecipeError) as error:
        recipe.load(path)
    assert pattern in str(error.value)
    for word in words:
        assert word in str(error.value), error.value


def write_mib(name, first, count=2):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    frames = np.arange(count * 16, dtype="u2").reshape(count, 4, 4)
    merlin_writer.write_mib(Path(name), frames, kind="U16", bits=12, first=first)


def test_a_numbered_series_is_one_data_set():
    for k in range(1, 12):
        write_mib(f"s/scan_{k}.mib", 2 * k - 1)
    # alike by name, another acquisition by its frames
    write_mib("s/scan_12.mib", 1)
    write_mib("s/lone_7.mib", 1)
    assert found("s/*.mib") == ["s/lone_7.mib", "s/scan_1.mib", "s/scan_12.mib"]
    # however few of its files are found
    assert found("s/scan_[5-9].mib") == ["s/scan_5.mib"]
    assert found("s/scan_3.mib", "s/scan_1.mib") == ["s/scan_1.mib"]


def test_headers_are_no_data_sets_of_their_own():
    write_mib("m/a.mib", 1)
    merlin_writer.write_hdr(Path("m/a.hdr"))
    for k in range(2):
        write_mib(f"m/b_{k + 1:03d}.mib", 2 * k + 1)
    merlin_writer.write_hdr(Path("m/b.hdr"))
    assert found("m/*") == ["m/a.mib", "m/b_001.mib"]
    assert found("m/*.hdr") == ["m/a.hdr", "m/b.hdr"]
    # another's header beside other data stays to be told
    Path("m/envi.hdr").write_text("ENVI")
    assert found("m/*") == ["m/a.mib", "m/b_001.mib", "m/envi.hdr"]


def test_an_empad_header_and_its_data_are_one():
    for name in ("p", "q"):
        Path(f"{name}_data.raw").write_bytes(bytes(2 * 130 * 128 * 4))
        Path(f"{name}.xml").write_text(XML.format(raw=f"C:\\camera\\{name}_data.raw"))
    Path("r.xml").write_text('<root><raw_file filename="r.raw"/></root>')
    Path("r.raw").write_bytes(bytes(130 * 128 * 4))
    touch("plain.raw")
    assert found("*") == ["p.xml", "plain.raw", "q.xml", "r.xml"]
    assert found("*.raw") == ["p_data.raw", "plain.raw", "q_data.raw", "r.raw"]


def test_files_that_a_master_links_are_not_data_sets():
    touch(
        "s1_master.h5", "s1_data_000001.h5", "s1_data_000002.h5", "s2_data_000001.h5", "s11_master.h5", "my_data_x.h5"
    )
    assert found("*.h5") == ["my_data_x.h5", "s11_master.h5", "s1_master.h5", "s2_data_000001.h5"]


# their names


def test_names_get_folders_where_they_must():
    def names(*places):
        return list(data_sets.named([Url(p) if "://" in p else Path(p) for p in places]))

    assert names("/x/b.mib", "/x/a.mib") == ["b", "a"]
    assert names("/x/run1/b.h5", "/x/run2/b.h5", "/x/run1/c.h5") == ["run1_b", "run2_b", "c"]
    assert names("/a/run/b.h5", "/c/run/b.h5", "/c/run2/b.h5") == ["a_run_b", "c_run_b", "run2_b"]
    assert names("/x/A/s.npy", "/x/b/S.npy") == ["A_s", "b_S"]
    assert names("s3://bucket/one/s.mib", "s3://bucket/two/s.mib", "https://h/s.npy?key=a/b") == [
        "one_s", "two_s", "h_s",
    ]  # fmt: skip
    # a name that a folder makes may be another's own
    assert names("/x/run1/b.h5", "/x/run2/b.h5", "/y/run1_b.h5") == ["x_run1_b", "run2_b", "y_run1_b"]
    for same in (("/x/a.mib", "/x/a.h5"), ("/a.mib", "/a.h5")):
        with pytest.raises(gpuem.RecipeError, match=r"a\.mib and /.*a\.h5 would both be named .a."):
            names(*same)


PARTS = st.sampled_from(["a", "b", "A", "a_b", "run1"])


@given(st.lists(st.lists(PARTS, min_size=1, max_size=4), min_size=1, max_size=6, unique_by=tuple))
def test_names_are_different_or_refused(paths):
    places = [Path("/", *parts[:-1], f"{parts[-1]}.npy") for parts in paths]
    try:
        named = data_sets.named(places)
    except gpuem.RecipeError:
        # only where all that is before two names reads the same
        whole = ["_".join(place.with_suffix("").parts[1:]).casefold() for place in places]
        assert any(a == b or a.endswith(b) or b.endswith(a) for a, b in combinations(whole, 2))
        return
    assert list(named.values()) == places
    assert len({name.casefold() for name in named}) == len(places)
    for name, place in named.items():
        assert "_".join(place.with_suffix("").parts[1:]).endswith(name)
        assert name.endswith(place.stem)


def test_an_address_without_a_name_is_refused():
    with pytest.raises(gpuem.RecipeError, match="has no name"):
        data_sets.named([Url("https://host/")])


# each gets what it would get alone


@pytest.fixture
def three():
    return {name: write_scan(f"data/{name}.npy", k) for k, name in enumerate(("one", "three", "two"))}


def states(path="out/recipe.summary.json"):
    return {row["name"]: row["state"] for row in json.loads(Path(path).read_text())["data sets"]}


def check_maps(maps, data):
    assert np.array_equal(maps["sum/sum"].data, data.sum((0, 1), dtype="u8"))
    assert maps["valid"].data.all()


def test_every_data_set_gets_its_own_result(three):
    path = write_recipe('path = "data/*.npy"')
    got = gpuem.run_recipes(path)
    assert list(got) == ["one", "three", "two"]
    for name, data in three.items():
        maps, where = got[name]
        assert where == path.parent / "out" / f"{name}.results.zarr"
        check_maps(gpuem.load_results(where), data)
        assert [Path(f["path"]).name for f in maps.provenance["input"]["files"]] == [f"{name}.npy"]
        assert maps.provenance["recipe"] == path.read_text()
        alone, _ = gpuem.run_recipe(write_recipe(f'path = "data/{name}.npy"', name=f"{name}.toml"), overwrite=True)
        for key in maps:
            np.testing.assert_array_equal(maps[key].data, alone[key].data)
    summary = json.loads(Path("out/recipe.summary.json").read_text())
    assert summary["counts"] == {"done": 3, "kept": 0, "failed": 0, "not begun": 0}
    assert [row["frames"] for row in summary["data sets"]] == [20] * 3
    assert [row["bytes"] for row in summary["data sets"]] == [20 * 81 * 2] * 3


def test_failures_do_not_stop_the_rest(three):
    broken = three["three"].astype("f4")
    broken[1, 1, 0, 0] = np.nan
    np.save("data/three.npy", broken)
    Path("data/short.npy").write_bytes(Path("data/one.npy").read_bytes()[:-100])
    path = write_recipe('each = ["data/absent.npy", "data/*.npy"]')
    got = gpuem.run_recipes(path)
    assert list(got) == ["absent", "one", "short", "three", "two"]
    assert "no such file" in str(got["absent"])
    assert "frame 6: NaN" in str(got["three"])
    # nothing of the failed runs stays alive by their errors
    assert got["three"].__traceback__ is None
    assert isinstance(got["short"], gpuem.InputError)
    for name in ("one", "two"):
        check_maps(got[name][0], three[name])
    assert states() == {"absent": "failed", "one": "done", "short": "failed", "three": "failed", "two": "done"}
    assert sorted(os.listdir("out")) == [
        "one.results.run", "one.results.zarr", "recipe.summary.json", "two.results.run", "two.results.zarr",
    ]  # fmt: skip
    # mended, only what is missing is run
    np.save("data/three.npy", three["three"])
    stamps = {name: Path(f"out/{name}.results.zarr/zarr.json").stat().st_mtime_ns for name in ("one", "two")}
    again = gpuem.run_recipes(path, resume=True)
    check_maps(again["three"][0], three["three"])
    assert states()["three"] == "done"
    for name, stamp in stamps.items():
        assert Path(f"out/{name}.results.zarr/zarr.json").stat().st_mtime_ns == stamp
        assert again[name][0].provenance["frames"] == got[name][0].provenance["frames"]
    # without resume, what is there is never replaced
    assert "exists" in str(gpuem.run_recipes(path)["one"])
    assert not isinstance(gpuem.run_recipes(path, overwrite=True)["one"], Exception)


def test_an_error_that_nobody_foresaw_stops_only_its_own(three, monkeypatch, caplog):
    caplog.set_level("DEBUG", logger="gpuem")
    run = many.job.run_asked

    def surprising(asked, text, **options):
        if "three" in str(asked.output.path):
            raise ZeroDivisionError("by nobody")
        return run(asked, text, **options)

    monkeypatch.setattr(many.job, "run_asked", surprising)
    got = gpuem.run_recipes(write_recipe('path = "data/*.npy"'))
    assert str(got["three"]).startswith("ZeroDivisionError: by nobody")
    check_maps(got["two"][0], three["two"])
    assert "Traceback" in caplog.text


@contextmanager
def stopping(after):
    """A progress that is stopped by Ctrl-C after some shards."""
    left = [after]

    def advance(frames):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    yield advance


@pytest.mark.parametrize("after", [0, 1, 3, 8])
def test_ctrl_c_ends_all_and_a_resumed_run_goes_on(three, monkeypatch, after):
    for name in ("SHARD_NBYTES", "TILE_NBYTES", "RUNS_TILE_NBYTES", "LEAST_FRAMES"):
        monkeypatch.setattr(tiles, name, 1)
    path = write_recipe('path = "data/*.npy"')
    begun = []

    def watch(ds, frames):
        begun.append(ds.source.files[0].path.stem)
        return stopping(after if len(begun) == 2 else 10**9)

    with pytest.raises(
        ResumableError, match=r"three: .*1 of 3 data sets are done; to go on: the same with resume=True"
    ):
        gpuem.run_recipes(path, watch=watch)
    assert begun == ["one", "three"]
    assert states() == {"one": "done", "three": "kept", "two": "not begun"}
    kept = run_folder.finished_shards(Path("out/three.results.run"))
    assert kept >= after
    got = gpuem.run_recipes(path, resume=True)
    for name, data in three.items():
        check_maps(got[name][0], data)
    assert states() == {"one": "done", "three": "done", "two": "done"}
    events = [json.loads(line) for line in Path("out/three.results.run/events.jsonl").read_text().splitlines()]
    assert [e["done"] for e in events if e["event"] == "start"] == [0, kept]


@pytest.mark.parametrize("where", ["open_input", "save"])
def test_ctrl_c_outside_of_the_shards_ends_all_too(three, monkeypatch, where):
    calls = []

    def interrupted(*arguments, **options):
        calls.append(where)
        if len(calls) == 2:
            raise KeyboardInterrupt("stopped by SIGTERM")
        return whole(*arguments, **options)

    owner = many.job if where == "open_input" else gpuem.Results
    whole = getattr(owner, where)
    monkeypatch.setattr(owner, where, interrupted)
    path = write_recipe('path = "data/*.npy"')
    with pytest.raises(ResumableError, match="three: stopped by SIGTERM"):
        gpuem.run_recipes(path)
    assert states() == {"one": "done", "three": "kept", "two": "not begun"}
    got = gpuem.run_recipes(path, resume=True)
    check_maps(got["three"][0], three["three"])


class Crews:
    """Counts how often workers are started, and ends some data sets early."""

    def __init__(self, early=(), refuse_from=10**9):
        self.early, self.refuse_from = early, refuse_from
        self.started = self.ended = self.runs = 0

    @contextmanager
    def __call__(self, options):
        if self.started >= self.refuse_from:
            raise gpuem.InputError("no scheduler answers")
        self.started += 1
        yield self
        self.ended += 1

    name = "counted"

    def settle(self, job):
        return Here().settle(job)

    def workers(self, job):
        return 1

    def run(self, job, shards, report):
        self.runs += 1
        if self.runs in self.early:
            raise ResumableError("all workers are lost")
        yield from Here().run(job, shards, report)


def test_workers_are_started_once_for_all(three, monkeypatch):
    crews = Crews()
    monkeypatch.setattr(executors, "crew", crews)
    path = write_recipe('path = "data/*.npy"')
    gpuem.run_recipes(path)
    assert (crews.started, crews.ended, crews.runs) == (1, 1, 3)
    # what is finished needs nobody
    gpuem.run_recipes(path, resume=True)
    assert crews.started == 1


def test_workers_that_are_lost_are_started_again(three, monkeypatch):
    crews = Crews(early=(2,))
    monkeypatch.setattr(executors, "crew", crews)
    got = gpuem.run_recipes(write_recipe('path = "data/*.npy"'))
    assert isinstance(got["three"], ResumableError)
    assert states() == {"one": "done", "three": "kept", "two": "done"}
    assert (crews.started, crews.ended) == (2, 2)


def test_nobody_left_ends_it_and_nobody_to_begin_with_is_an_error(three, monkeypatch):
    monkeypatch.setattr(executors, "crew", Crews(early=(1,), refuse_from=1))
    path = write_recipe('path = "data/*.npy"')
    with pytest.raises(ResumableError, match=r"no scheduler answers.*0 of 3"):
        gpuem.run_recipes(path)
    assert states() == {"one": "kept", "three": "not begun", "two": "not begun"}
    monkeypatch.setattr(executors, "crew", Crews(refuse_from=0))
    with pytest.raises(gpuem.InputError, match="no scheduler answers"):
        gpuem.run_recipes(path)


def test_a_summary_that_cannot_be_written_ends_nothing(three, caplog, tmp_path):
    """A disk that is really full: the results, whose folder is a link to elsewhere, fit, the summary doesn't."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    Path("small").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "small"], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system can't be mounted here: {mounted.stderr.decode().strip()}")
    try:
        Path("elsewhere").mkdir()
        Path("small/results").symlink_to(tmp_path / "elsewhere")
        Path("small/filled").write_bytes(bytes(56 * 1024))
        text = RECIPE.replace("out/{{name}}", "small/{{name}}/../results/{{name}}")
        for name in three:
            (Path("small") / name).mkdir()
        Path("small/rest").write_bytes(bytes(os.statvfs("small").f_bavail * os.statvfs("small").f_bsize))
        got = gpuem.run_recipes(write_recipe('path = "data/*.npy"', text))
        for name, data in three.items():
            check_maps(got[name][0], data)
        assert "recipe.summary.json: not written: the disk is full" in caplog.text
        assert not Path("small/recipe.summary.json").exists()
    finally:
        subprocess.run(["umount", "-l", "small"], check=True)


@pytest.mark.parametrize("content", ["{}", '{"format": "gpuem summary"}', "notes", None])
def test_a_summary_replaces_nothing_else(three, content):
    path = Path("out/recipe.summary.json")
    path.parent.mkdir()
    path.mkdir() if content is None else path.write_text(content)
    with pytest.raises(gpuem.OutputError, match=r"summary\.json: the summary goes there, but gpuem did not write"):
        gpuem.run_recipes(write_recipe('path = "data/*.npy"'))
    assert os.listdir("out") == ["recipe.summary.json"]
    if content is not None:
        assert path.read_text() == content


def test_a_summary_that_becomes_a_folder_meanwhile_ends_nothing(three, caplog):
    campaign = many.load(write_recipe('path = "data/*.npy"'))
    done = []
    for outcome in many.runs(campaign):
        done.append(outcome.state)
        campaign.summary.unlink(missing_ok=True) if len(done) == 1 else None
        campaign.summary.mkdir(exist_ok=True)
    assert done == ["done"] * 3
    assert "gpuem did not write what is there" in caplog.text


@pytest.mark.parametrize(
    ("output", "names", "words"),
    [
        # a result beside another one's run folder, pictures, input; results in the folder of the data
        ("out/{{name}}", ["a", "a.run"], "the result of a.run and the folder of the run of a"),
        ("out/{{name}}", ["a.zarr", "a.previews"], "the folder of the pictures of a.zarr and the result of a.previews"),
        ("data/{{name}}.npy/r.zarr", ["a", "b"], "would lie in the input"),
        ("out/{{name}}.run/x.zarr", ["a", "a.run"], None),
        ("data/../{{name}}", ["data"], "would lie around the input"),
        ("r/{{name}}.json", ["recipe.summary"], "the result of recipe.summary and the summary"),
    ],
)
def test_results_of_a_campaign_that_would_get_in_each_others_way(output, names, words):
    for name in names:
        write_scan(f"data/{name}.npy")
    text = RECIPE.replace("out/{{name}}.results.zarr", output).replace("previews = false", "")
    path = write_recipe('path = "data/*.npy"', text)
    if words is None:
        outputs.check_campaign(many.load(path).alone, path, many.load(path).summary)
        return
    with pytest.raises(gpuem.OutputError, match=words):
        gpuem.run_recipes(path)
    assert sorted(os.listdir("data")) == sorted(f"{name}.npy" for name in names)
    assert not Path("out").exists()


def test_many_runs_leave_no_open_files():
    for k in range(12):
        write_scan(f"data/{k:02d}.npy", k)
    Path("data/05.npy").write_bytes(b"no array")
    path = write_recipe('path = "data/*.npy"')
    campaign = many.load(path)
    counts = []
    for _ in many.runs(campaign):
        counts.append(len(os.listdir("/proc/self/fd")))
        del _
    assert max(counts[4:]) <= min(counts[:4]) + 4


def test_one_data_set_by_its_name(three):
    path = write_recipe('path = "data/*.npy"')
    with pytest.raises(gpuem.RecipeError, match=r"names data sets to be run one by one \(3\).*run_recipes"):
        gpuem.run_recipe(path)
    maps, where = gpuem.run_recipe(path, input="data/two.npy")
    assert where == path.parent / "out/two.results.zarr"
    check_maps(maps, three["two"])
    assert list(gpuem.run_recipes(path, input="data/t*.npy", overwrite=True)) == ["three", "two"]
    assert list(gpuem.run_recipes(write_recipe('path = "data/one.npy"', name="single.toml"))) == ["one"]
    assert not Path("out/single.summary.json").exists()


# as a user meets it


def command(*arguments, code=0):
    done = subprocess.run([sys.executable, "-m", "gpuem.cli", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def test_the_command_says_what_became_of_each(three):
    write_recipe('path = "data/*.npy"')
    out, err = command("check", "recipe.toml")
    assert "3 data sets" in out
    assert all(name in out for name in three)
    assert "nothing was streamed" in out
    # pictures of where the beam is, but no result
    assert not list(Path("out").glob("*.zarr"))
    out, err = command("run", "recipe.toml")
    assert "2 of 3: three" in err
    assert "one: done, 20 frames" in err
    assert out.count("done") == 3
    assert "recipe.summary.json" in out
    out, _ = command("run", "recipe.toml", "--resume")
    assert out.count("done before") == 3
    Path("data/four.npy").write_bytes(b"no array")
    out, err = command("check", "recipe.toml", code=2)
    assert "1 of 4 data sets can't be opened" in err
    assert "its result is there" in out
    out, err = command("run", "recipe.toml", "--resume", code=2)
    assert "error: 1 of 4 data sets failed" in err
    assert "failed:" in out
    assert out.count("done before") == 3
    out, _ = command("run", "recipe.toml", "--input", "data/two.npy", "--overwrite")
    assert "read             20 frames" in out


def test_sigterm_ends_all_and_says_how_to_go_on(three):
    with open("data/0.raw", "wb") as stream:
        stream.truncate(64 * 256 * 256 * 2)
    with open("data/1.raw", "wb") as stream:
        stream.truncate(40 << 30)
    with open("data/2.raw", "wb") as stream:
        stream.truncate(64 * 256 * 256 * 2)
    write_recipe('path = "data/*.raw"\nframe = [256, 256]\ndtype = "<u2"')
    words = [sys.executable, "-m", "gpuem.cli", "run", "recipe.toml"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not run_folder.finished_shards(Path("out/1.results.run")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, (out, err)
    assert "--resume" in err
    assert states() == {"0": "done", "1": "kept", "2": "not begun"}
    assert "not begun" in out
    assert "stopped by SIGTERM" in json.loads(Path("out/recipe.summary.json").read_text())["data sets"][1]["why"]


@pytest.mark.parametrize(
    ("becomes", "code"),
    [
        ({}, 0),
        ({"two": ResumableError("storage is away")}, 75),
        ({"one": ResumableError("storage is away"), "two": DataError("broken")}, 2),
        # who was stopped goes on, whatever failed before
        ({"one": DataError("broken"), "two": KeyboardInterrupt()}, 75),
        ({"one": DataError("broken"), "three": KeyboardInterrupt()}, 75),
    ],
)
def test_the_exit_code_says_try_again_where_that_helps(three, monkeypatch, becomes, code):
    import typer

    from gpuem import cli

    path = write_recipe('path = "data/*.npy"')
    run = many.job.run_asked

    def ending(asked, text, **options):
        name = asked.output.path.name.partition(".")[0]
        if name in becomes:
            raise becomes[name]
        return run(asked, text, **options)

    monkeypatch.setattr(many.job, "run_asked", ending)
    monkeypatch.setattr(cli.interrupts, "install", lambda: None)
    ended = 0
    try:
        cli._run_many(many.load(path), overwrite=False, resume=False)
    except typer.Exit as error:
        ended = error.exit_code
    assert ended == code


def test_maps_of_a_batch_are_loaded_when_asked_for(three, monkeypatch):
    """No more than those of one data set are in memory at a time."""
    refs, alive, save = [], [], results.Results.save

    def saving(found, path, **options):
        refs.append(weakref.ref(found))
        gc.collect()
        alive.append(sum(ref() is not None for ref in refs))
        return save(found, path, **options)

    monkeypatch.setattr(results.Results, "save", saving)
    got = gpuem.run_recipes(write_recipe('path = "data/*.npy"'))
    assert alive == [1, 1, 1]
    monkeypatch.undo()
    saved = got["two"]
    maps, where = saved
    check_maps(maps, three["two"])
    assert where == saved.path == saved[1] == saved[-1]
    assert len(saved) == 2
    check_maps(saved[0], three["two"])
    assert saved.load() is not saved.load()
    assert "two.results.zarr" in repr(saved)
    with pytest.raises(IndexError):
        saved[2]
    shutil.rmtree(where)
    with pytest.raises(gpuem.InputError, match="not a gpuem result"):
        saved.load()
