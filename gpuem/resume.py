"""What a resumed run goes by: a result that is there, or an unfinished run that is to replace it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from gpuem import identity, results, run_folder
from gpuem.errors import InputError
from gpuem.results import Results
from gpuem.run_folder import RunFolder

log = logging.getLogger("gpuem")


def replaces(folder: Path, output: Path, now: dict[str, Any]) -> bool:
    """Whether an unfinished run lies there that is the one that is wanted, and may replace the result that is there."""
    try:
        then = run_folder.begun(folder)
    except InputError as error:
        log.warning("%s", error)
        return False
    if then is None or then.get("overwrite") is not True or identity.differences(then["identity"], now):
        return False
    # the run before may have ended between saving its result and removing what it had kept
    return "id" in then and then["id"] != results.load_results(output).provenance.get("run")


def finished(folder: Path, output: Path, now: dict[str, Any]) -> Results:
    """The result that is there, where it is the one that is wanted."""
    found = results.load_results(output)
    then = found.provenance.get("identity")
    identity.refuse_another(output, then if isinstance(then, dict) else {}, now)
    log.info("%s: finished already", output)
    if run_folder.finished_shards(folder):
        # the run before ended between saving its result and removing what it had kept
        with RunFolder(folder, rank=None) as kept:
            kept.finish()
    return found
