"""Secrets that URLs carry: what is printed, logged or saved shows none of them.

A signed URL is a password: who has it reads the data. Query, fragment and user information of every URL are replaced
before it becomes text for people or files; the address itself stays where it is used.
"""

from __future__ import annotations

import re

REDACTED = "REDACTED"
# a URL that went through a path has lost a slash
_SCHEME = re.compile(r"(?:(?:s3|gs|az|abfss?|https?):/+|\b[a-z][a-z0-9+.-]*://)", re.IGNORECASE)
# in quotes a URL ends with them, elsewhere with what no URL holds
_END = {'"': re.compile(r'["\n]'), "'": re.compile(r"['\n]"), "`": re.compile(r"[`\n]")}
_BARE_END = re.compile(r"[\s\"<>]")
_USER = re.compile(r"[^/?#]*@")
_SECRET = re.compile(r"[?#].*", re.DOTALL)


def redact(text: str) -> str:
    """A text, perhaps of many lines, without the secrets of the URLs in it.

    Parameters
    ----------
    text : str
        A URL, a message, a recipe.

    Returns
    -------
    str
        The same with ``REDACTED`` for user information (``https://REDACTED@host/x``), query and fragment
        (``https://host/x?REDACTED``) of every URL. Texts without these are returned as they are.
    """
    parts, done = [], 0
    for found in _SCHEME.finditer(text):
        if found.start() < done:
            # inside a URL that was dealt with
            continue
        quote = text[found.start() - 1] if found.start() else ""
        end = _END.get(quote, _BARE_END).search(text, found.end())
        stop = end.start() if end else len(text)
        if quote not in _END:
            # the end of a sentence is no part of it
            stop = found.end() + len(text[found.end() : stop].rstrip(").,;:"))
        rest = text[found.end() : stop]
        # only before the first slash: an @ in a path is a letter like any other
        user = _USER.match(rest)
        if user:
            rest = f"{REDACTED}@{rest[user.end() :]}"
        parts += [text[done : found.end()], _SECRET.sub(lambda mark: mark[0][0] + REDACTED, rest)]
        done = stop
    return "".join([*parts, text[done:]])


def holds_secrets(url: str) -> bool:
    """Whether a URL has something that `redact` takes out."""
    return redact(url) != url
