from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell's background job: what tests start must hear Ctrl-C nevertheless
    signal.signal(signal.SIGINT, signal.default_int_handler)
# no time limits: the first example of a type compiles its kernels
settings.register_profile("gpuem", deadline=None, max_examples=40)
settings.load_profile("gpuem")

SWITCH = "--require-gpu"


@pytest.fixture(autouse=True)
def _no_stray_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# Tests marked `gpu` are skipped where there is no GPU. With --require-gpu that is a failure, and so is every other skip
# of such a test, a file that was skipped as a whole and may hold such tests, and a run without any: nobody is to
# believe that something was proven on a GPU when nothing was.


def pytest_addoption(parser):
    text = "tests marked gpu fail where they would be skipped, for whatever reason; and there must be some"
    parser.addoption(SWITCH, action="store_true", help=text)


def required(config):
    return config.getoption(SWITCH)


def why_no_gpu(config):
    """Why no GPU can be used; asked once in a run, and only when a test wants to know."""
    if not hasattr(config, "why_no_gpu"):
        from gpuem.backends import cuda_device

        config.why_no_gpu = cuda_device.why_not()
    return config.why_no_gpu


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and why_no_gpu(item.config):
        pytest.skip(f"no GPU can be used: {why_no_gpu(item.config)}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if required(item.config) and item.get_closest_marker("gpu"):
        refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    if required(collector.config) and isinstance(collector, pytest.Module) and names_the_marker(collector.path):
        refuse_skip(report)
    return report


def refuse_skip(report):
    # expected failures are reported as skipped as well: they prove no more
    if report.skipped:
        *_, reason = report.longrepr if isinstance(report.longrepr, tuple) else (report.longrepr,)
        report.outcome, report.longrepr = "failed", f"{SWITCH}: a skip is a failure. {reason}"


def names_the_marker(path):
    """Whether a file says mark.gpu: from a file that can't be imported nothing else is known."""
    return "mark.gpu" in path.read_text(encoding="utf-8")


def pytest_collection_finish(session):
    marked = [item for item in session.items if item.get_closest_marker("gpu")]
    if required(session.config) and not marked:
        raise pytest.UsageError(f"{SWITCH}: no test marked gpu was collected")
    for path in {item.path for item in marked}:
        if not names_the_marker(path):
            raise pytest.UsageError(
                f"{path}: its tests are marked gpu; say mark.gpu in the file, so that they are found"
            )
