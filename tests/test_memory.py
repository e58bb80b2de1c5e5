"""The plan holds: a run on a file larger than its memory limit stays under what was planned."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

CODE = """
import json, sys, threading, time
import gpuem
from gpuem import job, recipe

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

peak, mapped, done = [0], [0], threading.Event()
def watch():
    while not done.wait(0.01):
        peak[0] = max(peak[0], anonymous())
        for line in open("/proc/self/status"):
            if line.startswith("RssFile"):
                mapped[0] = max(mapped[0], int(line.split()[1]) * 1024)

watcher = threading.Thread(target=watch)
watcher.start()
ds = gpuem.open("big.raw", frame=(256, 256), dtype=sys.argv[1])
chosen = [gpuem.Sum(), gpuem.VirtualDetector(outer=80), gpuem.CenterOfMass()]
plan = job.prepare(ds, chosen, recipe.run_section(memory="1 GB")).plan
found = gpuem.run(ds, chosen, memory="1 GB")
done.set(); watcher.join()
frames = found.provenance["frames"]["read"]
print(json.dumps({"planned": plan.total_nbytes, "peak": peak[0], "mapped": mapped[0], "frames": frames}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_eight_gigabytes_with_one_gigabyte_of_memory(dtype):
    with open("big.raw", "wb") as stream:
        # a sparse file: read like any other, no disk is filled
        stream.truncate(8 * 10**9 // 131072 * 131072)
    done = subprocess.run([sys.executable, "-c", CODE, dtype], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout)
    assert numbers["frames"] == 8 * 10**9 // 131072
    assert numbers["peak"] <= numbers["planned"] <= 10**9, numbers
    # pages of the mapped file are given back shard by shard
    assert numbers["mapped"] < 10**9, numbers
