"""The helper process: what it returns and raises, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import helper_calls
import pytest

from gpuem.errors import InputError, TruncatedError
from gpuem.formats import helper

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


@pytest.fixture
def path(tmp_path):
    (tmp_path / "file").write_bytes(b"12345678")
    return tmp_path / "file"


def running(pid):
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_one_process_answers_all_calls_where_the_caller_is(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, first, folder, options = helper.call(helper_calls.echo, path, fit=True)
    assert (text, folder, options) == (str(path), str(tmp_path), {"fit": True})
    assert first != os.getpid()
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert helper.call(helper_calls.echo, path)[1:3] == (first, str(tmp_path / "sub"))
    # HDF5 reads its variables when it begins
    monkeypatch.setenv("HDF5_VDS_PREFIX", "/elsewhere")
    assert helper.call(helper_calls.echo, path)[1] != first


def test_errors_arrive_whole(path):
    with pytest.raises(TruncatedError, match="too short") as caught:
        helper.call(helper_calls.refuse, path)
    assert caught.value.whole == 7
    with pytest.raises(InputError, match="ZeroDivisionError: our own mistake"):
        helper.call(helper_calls.fail, path)


def test_a_crash_is_an_error_and_the_next_call_works(path):
    first = helper.call(helper_calls.echo, path)[1]
    for _ in range(2):
        with pytest.raises(InputError, match=r"file: HDF5 crashed over its tables \(signal 11\)"):
            helper.call(helper_calls.crash, path)
    assert helper.call(helper_calls.echo, path)[1] != first
    with pytest.raises(InputError, match=r"the process that reads its tables ended \(0\)"):
        helper.call(helper_calls.leave, path)


def test_endless_naps_are_an_error(path, monkeypatch):
    monkeypatch.setattr(helper, "NAP_SECONDS", 1)
    with pytest.raises(InputError, match="waits for tables that don't come"):
        helper.call(helper_calls.nap, path)
    assert helper.call(helper_calls.echo, path)


@pytest.mark.slow
def test_endless_computing_is_an_error(path):
    with pytest.raises(InputError, match="hangs in its tables"):
        helper.call(helper_calls.compute, path)
    assert helper.call(helper_calls.echo, path)


def test_one_that_ended_for_want_of_calls_is_started_anew(path):
    first = helper.call(helper_calls.echo, path)[1]
    os.kill(first, signal.SIGTERM)
    helper._helper.process.wait()
    assert helper.call(helper_calls.echo, path)[1] != first


def test_several_threads_and_forks(path):
    found = []
    threads = [threading.Thread(target=lambda: found.append(helper.call(helper_calls.echo, path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    mine = helper.call(helper_calls.echo, path)[1]
    # whichever thread started it: it may have ended with that
    assert len(found) == 4
    code = (
        "import os, sys; from pathlib import Path; from gpuem.formats import helper; import helper_calls\n"
        "path = Path(sys.argv[1]); first = helper.call(helper_calls.echo, path)[1]\n"
        "child = os.fork()\n"
        "if not child: os._exit(helper.call(helper_calls.echo, path)[1] == first)\n"
        "assert os.waitpid(child, 0)[1] == 0; assert helper.call(helper_calls.echo, path)[1] == first"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(path)], check=True, cwd=Path(__file__).parent)
    assert running(mine)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_and_a_killed_caller_end_it(path, how):
    code = (
        "import sys; from pathlib import Path; from gpuem.formats import helper; import helper_calls\n"
        "path = Path(sys.argv[1]); print(helper.call(helper_calls.echo, path)[1], flush=True)\n"
        "helper.call(helper_calls.nap, path)"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parent) as caller:
        pid = int(caller.stdout.readline())
        caller.send_signal(how)
        error = caller.communicate()[1]
    assert b"KeyboardInterrupt" in error or how == signal.SIGKILL
    while running(pid):
        pass
