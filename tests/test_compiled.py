"""Compiled functions are kept on disk; what is kept is never another version's machine code."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numba
import pytest

from gpuem.codecs import compiled as module

MODULE = """
from gpuem.codecs.compiled import compiled

@compiled
def answer(x):
    return x + {number}
"""


def ask(folder):
    code = "import sys; sys.path.insert(0, '.'); import mod; print(mod.answer(0))"
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_an_index_without_its_file_compiles_again_instead_of_running_older_code(tmp_path):
    source = tmp_path / "mod.py"
    source.write_text(MODULE.format(number=1))
    assert ask(tmp_path) == 1
    assert ask(tmp_path) == 1
    old = {p.name: p.read_bytes() for p in (tmp_path / "__pycache__").glob("*.nbc")}
    assert len(old) == 1
    source.write_text(MODULE.format(number=1000))
    assert ask(tmp_path) == 1000
    # a process that was killed after it had written the index, before it wrote the code
    for path in (tmp_path / "__pycache__").glob("*.nbc"):
        if path.name not in old:
            path.unlink()
    assert ask(tmp_path) == 1000


def test_without_a_folder_to_write_to_it_still_compiles(tmp_path):
    code = """
        import numba.core.caching as caching, logging
        logging.basicConfig(level="INFO")
        caching.CacheImpl._locator_classes = []
        from gpuem.codecs.compiled import compiled
        print(compiled(lambda x: x + 1)(2))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3"
    assert "NUMBA_CACHE_DIR" in done.stderr


@pytest.mark.parametrize(
    ("version", "tested"),
    [("0.61.0", True), ("0.68.1", True), ("0.68.2rc1", True), ("0.60.0", False), ("0.69.0", False), ("1.0", False)],
)
def test_the_cache_of_other_versions_is_left_as_it_is_and_that_is_said(caplog, version, tested):
    with caplog.at_level("INFO", "gpuem"):
        assert module._is_tested.__wrapped__(version) == tested
    assert ("are tested with 0.61 to 0.68" in caplog.text) != tested


def test_this_version_is_tested():
    assert module._is_tested(numba.__version__)
