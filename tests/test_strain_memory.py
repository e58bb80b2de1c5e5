"""Nothing of a strain run grows with the scan but its maps."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

import gpuem
from gpuem import dataset, job, look, recipe, synthetic

SMALL = synthetic.Pattern(frame=(64, 64), center=(31.3, 32.1), a=(0.0, 14.0), b=(14.0, 0.0), order=1, radius=4.0)

CODE = """
import json, sys, threading
import numpy as np
import gpuem
from gpuem import job, recipe

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

peak, done = [0], threading.Event()
def watch():
    while not done.wait(0.005):
        peak[0] = max(peak[0], anonymous())

ds = gpuem.open("many.raw", frame=(64, 64), dtype="<u2")
resolved, prepared = job.begin(ds, [gpuem.Strain()], recipe.run_section(memory="2 GB"))
watcher = threading.Thread(target=watch)
watcher.start()
found = gpuem.run(ds, [gpuem.Strain()], memory="2 GB")
done.set(); watcher.join()
valid = float(found["strain/valid"].data.mean())
print(json.dumps({"planned": prepared.plan.total_nbytes, "peak": peak[0], "valid": valid}))
"""


def test_ten_terabytes_need_less_than_ten_gigabytes():
    frames, _ = synthetic.generate(synthetic.Pattern(), (2, 8), seed=3)
    small = dataset.of_array(frames)
    positions = 10 * 10**12 // (256 * 256 * 2)
    with open("big.raw", "wb") as stream:
        # a sparse file: nothing is written
        stream.truncate(positions * 256 * 256 * 2)
    ds = gpuem.open("big.raw", frame=(256, 256), dtype="<u2")
    sample = look.sample(small, np.ones(small.positions, np.bool_))
    resolved = gpuem.Strain().look(job.view_of(small), sample)
    prepared = job.prepare(ds, [resolved], recipe.run_section(memory="10 GB"), sample_nbytes=look.sample_nbytes(ds))
    assert prepared.plan.total_nbytes <= 10 * 10**9, prepared.plan.nbytes


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_run_stays_under_its_plan():
    frames, _ = synthetic.generate(SMALL, (4, 64), seed=5)
    with open("many.raw", "wb") as stream:
        for _ in range(80):
            frames.tofile(stream)
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout)
    assert numbers["valid"] == 1.0
    assert numbers["peak"] <= numbers["planned"], numbers
