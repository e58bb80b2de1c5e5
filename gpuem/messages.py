"""What pydantic finds wrong, in gpuem's words: each mistake with the nearest right word."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

# what other programs call it
_ELSEWHERE = {"radius": "outer", "type": "kind", "file": "path", "filename": "path", "gpu": "cuda"}
# a value that is shown in a message
_LONGEST = 120


class _Repr(reprlib.Repr):
    """Values as a message shows them: short, whatever they are."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 3, _LONGEST, _LONGEST, 40

    def repr_int(self, x: int, level: int) -> str:
        """A number with so many digits that Python refuses to print it is told by its size."""
        return super().repr_int(x, level) if x.bit_length() < 1000 else f"a number of {x.bit_length():,} bits"

    def repr1(self, x: Any, level: int) -> str:
        """Whatever keeps a value from being shown is no reason to fail."""
        try:
            return super().repr1(x, level)
        except Exception:  # noqa: BLE001 - somebody else's __repr__
            return f"<{type(x).__name__}>"


def shown(value: Any) -> str:
    """A value as a message shows it."""
    return _Repr().repr(value)


def nearest(word: str, known: Sequence[str], cutoff: float = 0.5) -> str:
    """``; did you mean 'outer'?`` where there is such a word; else empty."""
    other = _ELSEWHERE.get(word.lower(), "")
    near = [other] if other in known else get_close_matches(word, known, 1, cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""


def reason(error: Any, known: Sequence[str] = ()) -> str:
    """One of ``ValidationError.errors()`` in words.

    Parameters
    ----------
    error : mapping
        As pydantic describes a mistake.
    known : sequence of str
        The names that are allowed in the place of an unknown one.
    """
    kind, value = error["type"], error.get("input")
    if kind == "extra_forbidden":
        return "unknown key" + (nearest(str(error["loc"][-1]), known) or f"; known: {', '.join(known)}")
    if kind == "missing":
        return "is missing"
    if kind == "literal_error":
        words = [word.strip("'") for word in str(error["ctx"]["expected"]).replace(" or ", ", ").split(", ")]
        hint = nearest(value.lower(), words) if isinstance(value, str) else ""
        return f"{shown(value)} is not one of {', '.join(words)}{hint}"
    message = str(error["msg"]).removeprefix("Value error, ")
    return message if kind == "value_error" else f"{message} (found {shown(value)})"


def in_a_line(error: BaseException) -> str:
    """What an error says, in one line that isn't too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."
