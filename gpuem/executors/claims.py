"""Which rank runs which shards: each takes the next batch that none has taken, by a file in the run folder.

Batches become smaller towards the end (guided self-scheduling): few files, and no rank waits long for another. A claim
is a file that is written under a name of its own and then linked to the name of the batch: link is atomic also on
network file systems, and whoever sees the claim sees whose it is.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from pathlib import Path

from gpuem import ownership

# file systems without hard links: there an exclusive open is what decides
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def batches(shards: int, ranks: int) -> list[range]:
    """All shards in order, in batches of half of what is left, shared by all ranks; the last ones are single shards."""
    cuts, done = [], 0
    while done < shards:
        count = max(1, (shards - done) // (2 * ranks))
        cuts.append(range(done, done + count))
        done += count
    return cuts


class Claims:
    """The batches of one launch, as one rank takes them.

    Parameters
    ----------
    folder : Path
        The run folder.
    launch : str
        Names the launch: claims of an earlier one mean nothing.
    rank, ranks : int
        Number of this process, and of all.
    shards : int
        Number of shards of the run.
    """

    def __init__(self, folder: Path, launch: str, rank: int, ranks: int, shards: int) -> None:
        self._folder, self._rank, self._ranks = folder, rank, ranks
        self._prefix = f"claim-x{hashlib.sha256(launch.encode()).hexdigest()[:12]}."
        self._batches = batches(shards, ranks)
        self._next = 0

    def take(self) -> range | None:
        """The next batch that no rank has taken; None where all are taken.

        Raises
        ------
        OSError
            The run folder can't be written.
        """
        while self._next < len(self._batches):
            number = self._next
            self._next += 1
            if self._claim(self._folder / f"{self._prefix}{number}"):
                return self._batches[number]
        return None

    def owners(self) -> dict[int, int]:
        """For each shard that was taken: the rank that did."""
        found: dict[int, int] = {}
        for number, batch in enumerate(self._batches):
            with contextlib.suppress(OSError, ValueError):
                owner = int((self._folder / f"{self._prefix}{number}").read_text(encoding="ascii"))
                found.update(dict.fromkeys(batch, owner))
        return found

    def begin(self) -> None:
        """Remove the claims of earlier launches, record the names of all that may be made.

        For the rank that leads, before the others begin.

        Raises
        ------
        OutputError
            Files of somebody else are there, or nothing can be written.
        """
        ownership.remove(self._folder, "claim-*")
        own = [f"claim-of.{rank}" for rank in range(self._ranks)]
        ownership.claim(self._folder, *own, *(f"{self._prefix}{k}" for k in range(len(self._batches))))

    def _claim(self, path: Path) -> bool:
        """Whether this rank made the file; False where another one did."""
        if path.exists():
            return False
        content = str(self._rank).encode()
        own = self._folder / f"claim-of.{self._rank}"
        own.write_bytes(content)
        try:
            path.hardlink_to(own)
        except FileExistsError:
            # a network file system may answer so where its first answer was lost
            return own.samefile(path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return _create(path, content)
        finally:
            own.unlink(missing_ok=True)
        return True


def _create(path: Path, content: bytes) -> bool:
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(file, content)
    finally:
        os.close(file)
    return True
