"""The tree reads as the sentence: a module imports only from what stands to its left."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SENTENCE = ["formats", "storage", "codecs", "tiles", "backends", "analyses", "engine", "result_store", "results"]
AFTER = [
    "correction",
    "arguments",
    "stream",
    "resident",
    "dataset",
    "region",
    "look",
    "patterns",
    "data_sets",
    "toml_file",
    "recipe",
    "array_files",
    "shard_records",
    "checkpoint",
    "identity",
    "prepared",
    "run_folder",
    "executors",
    "sampling",
    "keeping",
    "maps",
    "provenance",
    "resume",
    "synthetic_kernels",
    "synthetic",
    "outputs",
    "job",
    "rank_job",
    "many",
    "selftest",
    "pictures",
    "panels",
    "plot_strain",
    "plot_look",
    "plot_detectors",
    "plot",
    "streams",
    "progress",
    "status",
    "timings",
    "plot_timeline",
    "cli_status",
    "slurm_site",
    "slurm_parts",
    "slurm",
    "cli_slurm",
    "demo",
    "cli_report",
    "cli",
    "__main__",
]
EVERYWHERE = [
    *("redaction", "errors", "messages", "paths", "axes", "atomic", "interrupts", "regular_files", "ownership"),
    "staging",
]


def modules():
    return sorted((ROOT / "gpuem").rglob("*.py"))


def imports(path):
    """(top-level part of gpuem, imported module) of every import of gpuem in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gpuem":
            parts = node.module.split(".")
            if len(parts) > 1:
                yield parts[1]
            else:
                yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("gpuem."))


def place(path):
    return path.relative_to(ROOT / "gpuem").with_suffix("").parts[0]


def test_modules_import_only_from_their_left():
    order = EVERYWHERE + SENTENCE + AFTER
    for path in modules():
        own = place(path)
        if own == "__init__":
            continue
        assert own in order, f"{path}: where does it stand in the sentence?"
        for other in imports(path):
            assert order.index(other) <= order.index(own), f"{path.name} ({own}) imports {other}"
            if own in EVERYWHERE:
                assert other in EVERYWHERE, f"{path.name} imports {other}"


def test_only_the_command_line_prints():
    for path in modules():
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        prints = any(isinstance(c.func, ast.Name) and c.func.id == "print" for c in calls)
        assert not prints, path


def test_sizes_that_read_well():
    for path in modules():
        text = path.read_text()
        assert text.count("\n") <= 400, f"{path}: {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                arguments = len(node.args.args) + len(node.args.kwonlyargs)
                assert lines <= 60 or node.name == "run", f"{path}:{node.lineno} {node.name}: {lines} lines"
                # the parameters of a command are what it can be told
                assert arguments <= 9 or place(path).startswith("cli"), f"{path}:{node.lineno} {node.name}"


def test_importing_gpuem_loads_nothing_heavy():
    heavy = "{'numpy', 'numba', 'zarr', 'h5py', 'cupy', 'pydantic'}"
    code = f"import sys, gpuem; print(sorted({{m.split('.')[0] for m in sys.modules}} & {heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_there():
    import gpuem

    for name in gpuem.__all__:
        assert getattr(gpuem, name).__doc__, name
    assert not hasattr(gpuem, "nothing")
