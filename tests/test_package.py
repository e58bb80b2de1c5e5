"""What the wheel holds, and that a stranger's two commands find everything."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_the_kernels_and_nothing_else(tmp_path):
    pytest.importorskip("build", reason="the package 'build' is not installed")
    copy = tmp_path / "copy"
    skip = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", ".hypothesis", ".venv", "dist")
    shutil.copytree(ROOT, copy, ignore=skip)
    (copy / "kernels" / "planted.cu").write_text("// a kernel\n")
    (copy / "kernels" / "build").mkdir()
    (copy / "kernels" / "build" / "junk.cubin").write_bytes(b"\x7fELF")
    (copy / "gpuem" / "__pycache__").mkdir()
    (copy / "gpuem" / "__pycache__" / "stale.pyc").write_bytes(b"x")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path / "dist"), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "gpuem/kernels/planted.cu" in names
    assert "gpuem/cli.py" in names
    assert "gpuem/py.typed" in names
    own = [n for n in names if not n.startswith("gpuem-")]
    assert all(n.startswith("gpuem/") and n.endswith((".py", ".cu", ".cuh", "py.typed")) for n in own), own


def test_the_core_installs_with_at_most_25_packages():
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    seen: set[str] = set()
    todo = ["gpuem"]
    while todo:
        for line in requires(todo.pop()) or []:
            need = Requirement(line)
            if need.marker and not need.marker.evaluate({"extra": ""}):
                continue
            name = need.name.lower().replace("_", "-")
            if name not in seen:
                seen.add(name)
                todo.append(name)
    assert len(seen) <= 25, sorted(seen)
