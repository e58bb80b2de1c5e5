"""The parts of a job script that are the same in all of them, in bash."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from gpuem.slurm_site import Site

# as gpuem.executors.dask_workers has them for its own end of the line
DASK_SETTINGS = """\
# results are small, so nothing is ever spilled and plain TCP does; gpuem itself decides who gets which shard
export DASK_DISTRIBUTED__WORKER__MEMORY__TARGET=False
export DASK_DISTRIBUTED__WORKER__MEMORY__SPILL=False
export DASK_DISTRIBUTED__WORKER__MEMORY__PAUSE=False
export DASK_DISTRIBUTED__WORKER__MEMORY__TERMINATE=False
export DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL=60s
export DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES=100
export DASK_DISTRIBUTED__SCHEDULER__WORK_STEALING=False
export DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT=30s
export DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP=30s
export DASK_DISTRIBUTED__ADMIN__TICK__LIMIT=60s
export DASK_DISTRIBUTED__ADMIN__SYSTEM_MONITOR__INTERVAL=10s
export DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED=False"""

_TOLD = """\
# SIGTERM comes before the time limit: it is passed on to gpuem, which saves what is finished and ends with 75
told=0
client=
tell() {{
    told=$((told + 1))
    [ -z "$client" ] || {how}
}}
trap tell TERM"""

# a SIGTERM to srun itself would kill its tasks on the spot, so their step is sent the signal
TELL = {
    "process": _TOLD.format(how='kill -TERM "$client" 2> /dev/null'),
    "step": _TOLD.format(how='scancel --signal=TERM "$SLURM_JOB_ID"'),
    "named": _TOLD.format(
        how='scancel --signal=TERM "$(squeue --steps --noheader --jobs="$SLURM_JOB_ID" --format="%i %j" '
        "| sed -n 's/ *client *$//p')\""
    ),
}

SCHEDULER = """\
# a new name each time the job is run again: an old file would send workers to a scheduler that is gone
scheduler=$PWD/scheduler-$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}.json
{scheduler} >> scheduler.log 2>&1 &
scheduler_pid=$!
until [ -s "$scheduler" ]; do
    if ! kill -0 "$scheduler_pid" 2> /dev/null; then
        echo "the Dask scheduler did not start; why is at the end of $PWD/scheduler.log" >&2
        tail -n 5 scheduler.log >&2
        exit 1
    fi
    sleep 0.2
done

# {what}; their logs are workers-NODE.log
{workers} &
workers_pid=$!"""

RUN_AND_WAIT = """\
finished() {{ {{ grep -h '"event": *"shard"' {events}; cat store-*/done.jsonl; }} 2> /dev/null | wc -l; }}
before=$(finished)
{client} &
client=$!
# wait ends early when a signal comes: then once more
while heard=$told; wait "$client"; code=$?; [ "$heard" -ne "$told" ]; do :; done"""

SEND_HOME = """\
# a scheduler that ends sends its workers home; what is still there after that is ended with the job
kill -TERM "$scheduler_pid" 2> /dev/null
for _ in {1..50}; do
    kill -0 "$workers_pid" 2> /dev/null || break
    sleep 0.2
done
rm -f "$scheduler\""""

ASKED_AGAIN = """\
# told to stop before it could listen
if [ "$code" -eq 143 ] && [ "$told" -gt 0 ]; then code=75; fi
# 75: ended early, and what is finished is saved. The job runs again, unless it was cancelled or would run in circles
if [ "$code" -eq 75 ]; then
    state=$(scontrol show job "$job" | grep -o -m 1 'JobState=[A-Z_]*')
    if [ "$state" != JobState=RUNNING ]; then
        echo "cancelled; what is finished is saved, and submitted again this goes on"
    elif [ "$(finished)" -le "$before" ]; then
        echo "not one more shard was finished, so the job is not run again; why may be in the logs in $run" >&2
    elif scontrol requeue "$job"; then
        echo "in the queue again, to go on where this ended"
    else
        echo "Slurm does not run the job again; submit it again, and it goes on where this ended" >&2
    fi
fi
exit "$code\""""


@dataclass(frozen=True)
class Step:
    """Commands of a job script as the site wants them started.

    Parameters
    ----------
    site : Site
        What the cluster wants; its container.
    name : str
        Of the step.
    """

    site: Site
    name: str

    def beside(self, command: str) -> str:
        """A command that runs once, on the first node, beside the workers."""
        box = self.site.container
        if box is None:
            return command
        if box.kind == "apptainer":
            return f"{_apptainer(self.site)} \\\n    {command}"
        return self.everywhere(command, ["--overlap", "--nodes=1", "--ntasks=1", '--nodelist="$SLURMD_NODENAME"'])

    def everywhere(self, command: str, options: Sequence[str]) -> str:
        """A command that runs as a step of the job."""
        srun = ["srun", f"--job-name={self.name}", *options, *map(shlex.quote, self.site.srun)]
        box = self.site.container
        if box is not None and box.kind == "apptainer":
            command = f"{_apptainer(self.site)} \\\n    {command}"
        elif box is not None:
            if "--overlap" not in srun:
                srun.append("--overlap")
            srun.append(shlex.quote(f"--container-image={box.image}"))
            srun += [shlex.quote(f"--container-mounts={','.join(box.mounts)}")] * bool(box.mounts)
            srun += map(shlex.quote, box.options)
        return f"{' '.join(srun)} \\\n    {command}"


def _apptainer(site: Site) -> str:
    box = site.container
    assert box is not None
    mounts = [part for mount in box.mounts for part in ("--bind", mount)]
    return shlex.join(["apptainer", "exec", "--nv", *mounts, *box.options, box.image])
