"""What can go wrong, as a tree.

GpuemError
  RecipeError    a recipe or an argument is wrong: which key, what was found, what is allowed
    PositionError    an index that a data set doesn't have (an IndexError, too)
  InputError     a file can't be used: missing, empty, alien, its header and size disagree
    TruncatedError   fewer whole frames than the header or the scan promises
  DataError      the bytes are there but broken: a corrupt chunk, NaN in a frame
    ReadError        the bytes can't be had now: the device, the network or the server fails; it may pass
  PlanError      the job doesn't fit: memory needed and memory allowed, in numbers
  DeviceError    a GPU is absent, full or lost
  OutputError    the result can't be written: it exists, the disk is full, no permission
  ResumableError   the run ended early; what is finished is saved, and the next run can go on there

Every message says what happened, where, with the numbers, and what to do. The command line turns each of them into
exit code 2, but ResumableError into 75, which schedulers read as "try again".
"""

from __future__ import annotations

from gpuem.redaction import redact


class GpuemError(Exception):
    """Base of everything gpuem raises on purpose; secrets of URLs are left out of its message."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(redact(arg) if isinstance(arg, str) else arg for arg in args))


class RecipeError(GpuemError, ValueError):
    """A recipe, or an argument of the Python interface, is wrong."""


class PositionError(RecipeError, IndexError):
    """An index of a data set that isn't there."""


class InputError(GpuemError):
    """A file can't be used as detector data."""


class TruncatedError(InputError):
    """Fewer whole frames than promised.

    Parameters
    ----------
    message : str
        What, where, the numbers, the remedy.
    whole : int
        Number of whole frames that are there.
    """

    def __init__(self, message: str, whole: int) -> None:
        super().__init__(message)
        self.whole = whole

    def __reduce__(self) -> tuple[type[TruncatedError], tuple[str, int]]:
        return type(self), (str(self), self.whole)


class DataError(GpuemError):
    """Bytes that were read are broken.

    Parameters
    ----------
    message : str
        What, where, the numbers, the remedy.
    frames : tuple of int
        Flat indices, in file order, of the frames that are lost by it.
    """

    def __init__(self, message: str, frames: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.frames = frames


class ReadError(DataError):
    """Bytes can't be had now: the device, the network or the server fails. Trying again, or elsewhere, may help."""


class PlanError(GpuemError):
    """The job doesn't fit into the memory it may use."""


class DeviceError(GpuemError):
    """A GPU was asked for and can't be used."""


class OutputError(GpuemError):
    """The result can't be written."""


class ResumableError(GpuemError):
    """The run ended early; what is finished is saved, and the next run can go on there."""
