"""What signs a URL is used to read, and is nowhere to be seen: in results, logs, run folders, messages, scripts."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest
import reference
from web_server import Web

import gpuem
from gpuem.errors import GpuemError, InputError, RecipeError
from gpuem.formats import stores
from gpuem.redaction import holds_secrets, redact

SECRET = "c0ffee5ecret"
QUERY = f"X-Amz-Credential=me&X-Amz-Signature={SECRET}"
RECIPE = """[input]
path = "{url}"
[[analysis]]
kind = "sum"
[output]
path = "out.zarr"
[run]
device = "cpu"
"""


@pytest.fixture
def web(monkeypatch):
    pytest.importorskip("obstore", reason="obstore is not installed")
    monkeypatch.setattr(stores, "_WAIT_SECONDS", 0.01)
    server = Web(Path.cwd())
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    stores._made.cache_clear()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("https://u:p@h/x.npy?sig=a&b#c", "https://REDACTED@h/x.npy?REDACTED"),
        ("see (http://h/x?t=1), now", "see (http://h/x?REDACTED), now"),
        ("""a = 'http://h/x?t="1'\n""", "a = 'http://h/x?REDACTED'\n"),
        ("""b = "s3://k:s@b/x y?z"\n""", """b = "s3://REDACTED@b/x y?REDACTED"\n"""),
        ("https:/h/x?sig=1", "https:/h/x?REDACTED"),
        ("HTTPS://h/x#token and http://h/y?q", "HTTPS://h/x#REDACTED and http://h/y?REDACTED"),
        ("ftp://user:pass@h/x", "ftp://REDACTED@h/x"),
        ("/data/what?.npy and a@b.org, tcp://1.2.3.4:8786, http://h/a@b.npy", None),
    ],
)  # fmt: skip
def test_secrets_of_urls(text, wanted):
    assert redact(text) == (text if wanted is None else wanted)
    assert redact(redact(text)) == redact(text)
    assert holds_secrets(text) == (wanted is not None)


def everything():
    """All that was written, but the data."""
    return {path: path.read_bytes() for path in Path.cwd().rglob("*") if path.is_file() and path.suffix != ".npy"}


def test_a_run_of_a_signed_address_leaves_no_secret(web, caplog):
    data = reference.planted((3, 4, 9, 9), "u2")
    np.save("a.npy", data)
    Path("r.toml").write_text(RECIPE.format(url=f"{web.url}/a.npy?{QUERY}"))
    caplog.set_level("DEBUG")
    found, where = gpuem.run_recipe("r.toml")
    assert (found["sum/sum"].data == data.sum((0, 1), dtype=np.int64)).all()
    assert all(SECRET in path for _, path, _, _ in web.asked)
    Path("r.toml").unlink()
    written = everything()
    assert any(path.name == "run.json" for path in written)
    for path, content in written.items():
        assert SECRET.encode() not in content, path
    assert SECRET not in caplog.text + repr(found) + str(found.provenance)
    assert found.provenance["input"]["files"][0]["path"] == f"{web.url}/a.npy?REDACTED"
    assert gpuem.load_results(where).provenance["recipe"] == RECIPE.format(url=f"{web.url}/a.npy?REDACTED")


def test_a_new_signature_is_no_other_file(web):
    np.save("a.npy", reference.planted((3, 4, 9, 9), "u2"))
    for signature in ("one", "two"):
        Path("r.toml").write_text(RECIPE.format(url=f"{web.url}/a.npy?sig={signature}"))
        gpuem.run_recipe("r.toml", resume=True)


def test_addresses_that_differ_in_their_query_are_different_files(web):
    with h5py.File("a.h5", "w") as file:
        file["data"] = np.ones((2, 3, 8, 8), "u2")
    for k in range(2):
        ds = gpuem.open(f"{web.url}/a.h5?file={k}")
        web.asked.clear()
        assert ds[0, 0].sum() == 64
        assert all(path.endswith(f"file={k}") for _, path, _, _ in web.asked)


def spoil(web, ds, trouble):
    """The data set, after which something happens to its file."""
    web.forbidden = trouble == "gone"
    if trouble == "cut":
        Path("a.npy").write_bytes(Path("a.npy").read_bytes()[:500])
    return ds


@pytest.mark.parametrize("trouble", ["forbidden", "missing", "cut", "gone"])
def test_errors_tell_no_secret(web, trouble):
    np.save("a.npy", reference.planted((3, 4, 9, 9), "u2"))
    url = f"{web.url}/{'b' if trouble == 'missing' else 'a'}.npy?{QUERY}"
    web.forbidden = trouble == "forbidden"
    with pytest.raises(GpuemError) as caught:
        gpuem.run(spoil(web, gpuem.open(url), trouble), gpuem.Sum(), patience=0.0)
    error: BaseException | None = caught.value
    assert "REDACTED" in str(error)
    while error is not None:
        assert SECRET not in str(error) + repr(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_places_and_mistakes_show_no_secret():
    url = f"https://me:{SECRET}@host/a.unknown?{QUERY}"
    for call in (
        lambda: gpuem.open(f"gopher://me:{SECRET}@host/a"),
        lambda: gpuem.open(url, format="mip"),
        lambda: gpuem.run(url, gpuem.Sum()),
        lambda: gpuem.VirtualDetector(shape="mask", mask=url.encode()),
    ):
        with pytest.raises(GpuemError) as caught:
            call()
        assert SECRET not in str(caught.value)
    assert SECRET not in f"{gpuem.formats.remote.place(url)} {gpuem.formats.remote.place(url)!r}"


def test_arguments_of_the_process_are_not_saved():
    np.save("a.npy", np.ones((2, 3, 8, 8), "u2"))
    code = "import gpuem; gpuem.run(gpuem.open('a.npy'), gpuem.Sum(), device='cpu').save('o.zarr')"
    subprocess.run([sys.executable, "-c", code, "--token", SECRET], check=True)
    for path, content in everything().items():
        assert SECRET.encode() not in content, path


def test_a_signed_address_does_not_go_into_a_job_script():
    from gpuem import slurm

    with pytest.raises(RecipeError, match="signed address") as caught:
        slurm.find_files([f"https://host/a.npy?{QUERY}"])
    assert SECRET not in str(caught.value)
    assert slurm.find_files(["https://host/a.npy"]) == ("https://host/a.npy",)


def test_what_a_run_reports_has_no_secrets(tmp_path):
    import json

    from gpuem.run_folder import RunFolder

    with RunFolder(tmp_path / "a.run") as folder:
        folder.report("start")
        folder.report("retry", why=f"http://host/a?{QUERY}: slow")
        lines = (tmp_path / "a.run/events.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["why"].startswith("http://host/a?REDACTED")
    assert SECRET not in "".join(lines)
    assert isinstance(InputError(f"http://h/?{SECRET}"), Exception)
