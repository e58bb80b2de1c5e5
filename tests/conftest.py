from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))
# no time limits: the first example of a type compiles its kernels
settings.register_profile("gpuem", deadline=None, max_examples=40)
settings.load_profile("gpuem")


@pytest.fixture(autouse=True)
def _no_stray_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
