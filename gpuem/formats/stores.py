"""Clients of object stores (S3, Google Cloud, Azure) and web servers: what lies there, bytes of it, errors in words.

Everything goes through obstore, which is loaded when the first URL is used. URLs are plain text here; see `remote` for
what readers of headers get.
"""

from __future__ import annotations

import configparser
import datetime
import functools
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from gpuem.errors import DataError, InputError, ReadError
from gpuem.redaction import redact

# what obstore tries by itself: 5xx, refused and dropped connections, time-outs
RETRIES = 8
RETRY_SECONDS = 60.0
# bodies that are cut short are asked for again here
ATTEMPTS = 4
_WAIT_SECONDS = 0.5
_TIMEOUTS = {"connect_timeout": "10s", "timeout": "60s"}
EXAMPLES = {
    "s3": "s3://bucket/folder/scan.mib",
    "gs": "gs://bucket/folder/scan.mib",
    "az": "az://container/folder/scan.mib",
    "http": "http://host/folder/scan.mib",
    "https": "https://host/folder/scan.mib",
}
T = TypeVar("T")
_making = threading.Lock()


class Facts(NamedTuple):
    """What a store says of an object; the names are those of `os.stat_result`."""

    st_size: int
    st_mtime_ns: int
    etag: str = ""


def parts(url: str) -> tuple[str, str, str]:
    """Scheme and bucket or host, the key, and what follows a question mark (of web servers only)."""
    scheme, _, rest = url.partition("://")
    rest, mark, query = rest.partition("?") if scheme in ("http", "https") else (rest, "", "")
    host, _, key = rest.partition("/")
    return f"{scheme}://{host}", key, mark + query


def facts(url: str) -> Facts:
    """Size, time and tag of an object; raises FileNotFoundError, InputError or ReadError."""
    store, key = _store(url)
    import obstore

    def ask() -> Facts:
        try:
            return _facts(obstore.head(store, key))
        except (PermissionError, obstore.exceptions.BaseError) as error:
            # an address signed for reading only, or a server that answers nothing else
            if not url.startswith("http") or not re.search(r": (403|405|501)\b", str(error)):
                raise
            return _facts(obstore.get(store, key, options={"range": (0, 1)}).meta)

    return _asked(url, ask, "asking for its size")


def listed(url: str) -> list[str]:
    """What lies in a folder; nothing where the server doesn't tell."""
    store, key = _store(f"{url.rstrip('/')}/*")
    import obstore

    try:
        found = obstore.list_with_delimiter(store, key.removesuffix("*").rstrip("/") or None)
    except (obstore.exceptions.BaseError, OSError):
        return []
    return [f"{parts(url)[0]}/{entry['path']}" for entry in found["objects"]]


def fetch(url: str, start: int, stop: int, known: Facts | None = None) -> NDArray[np.uint8]:
    """Bytes [start, stop) of an object.

    Raises
    ------
    InputError
        It is gone, may not be read, or is another one than it was `known` as.
    ReadError
        The store or the network fails.
    DataError
        It ends too early.
    """
    store, key = _store(url)
    import obstore

    def ask() -> NDArray[np.uint8]:
        found = obstore.get(store, key, options={"range": (start, stop)})
        now = _facts(found.meta)
        if known is not None:
            refuse_changed(url, known, now)
        data: NDArray[np.uint8] = np.frombuffer(memoryview(found.bytes()), np.uint8)
        return data

    try:
        data = _asked(url, ask, f"reading {stop - start} bytes at {start}")
    except FileNotFoundError:
        raise InputError(f"{url}: is gone since it was opened") from None
    if data.size != stop - start:
        raise DataError(
            f"{url}: ends {stop - start - data.size} bytes before the end of a block of {stop - start} bytes at "
            f"{start}; the object is truncated or its index is damaged"
        )
    return data


def refuse_changed(url: str, then: Facts, now: Facts) -> None:
    """Raise InputError where an object isn't the one it was."""
    tags = not then.etag or not now.etag or then.etag == now.etag
    if (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns) or not tags:
        raise InputError(
            f"{url}: changed since it was opened ({then.st_size} bytes then, {now.st_size} now); wait until it is "
            "written completely and open it again"
        )


def _facts(meta: Any) -> Facts:
    # whole microseconds: a float would not be the same twice
    passed = meta["last_modified"] - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return Facts(int(meta["size"]), passed // datetime.timedelta(microseconds=1) * 1000, meta.get("e_tag") or "")


def _asked(url: str, ask: Callable[[], T], what: str) -> T:
    """What a store answers, its errors as gpuem's; asked again where the body was cut short."""
    import obstore.exceptions as known

    for attempt in range(ATTEMPTS):
        try:
            return ask()
        except (FileNotFoundError, known.NotFoundError) as error:
            if "NoSuchBucket" in str(error):
                raise InputError(f"{url}: no such bucket; check its name{_where(url)}") from None
            raise FileNotFoundError(2, "no such object", redact(url)) from None
        except (PermissionError, known.PermissionDeniedError, known.UnauthenticatedError) as error:
            raise InputError(f"{url}: may not be read ({_short(error)}); {_credentials(url)}") from None
        except (known.NotSupportedError, NotImplementedError) as error:
            what = "the server sends whole files only, not parts of them" if "Range" in str(error) else _short(error)
            raise InputError(f"{url}: {what}; copy the file to where it can be read") from None
        except (known.BaseError, OSError, ValueError) as error:
            _refuse_for_good(url, error)
            if attempt + 1 == ATTEMPTS or re.search(r"after [1-9]\d* retries", str(error)):
                raise ReadError(
                    f"{url}: {what}: {_short(error)}; is the server up, the network slow? Try again"
                ) from None
        time.sleep(_WAIT_SECONDS * 2**attempt)
    raise AssertionError("unreachable")


def _refuse_for_good(url: str, error: Exception) -> None:
    """Raise InputError or DataError for what no other attempt changes."""
    text = str(error)
    if re.search(r": 416\b", text):
        raise DataError(f"{url}: ends before the bytes that were asked for; it is truncated or its index is damaged")
    if "credential" in text.lower() or "/latest/" in text:
        raise InputError(f"{url}: no credentials were found; {_credentials(url)}") from None
    if re.search(r"\b30[1278]\b|Moved Permanently|redirect", text):
        raise InputError(
            f"{url}: the server redirects; give the new address, or the bucket's region by AWS_REGION ({_short(error)})"
        ) from None
    if re.search(r"status code: 4(?!08|29)\d\d", text):
        raise InputError(f"{url}: {_short(error)}; check the address{_where(url)}") from None


def _where(url: str) -> str:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return f" (asked at {endpoint})" if url.startswith("s3:") and endpoint else ""


def _credentials(url: str) -> str:
    """What to do where a store doesn't let one in."""
    if url.startswith("s3:"):
        return (
            "give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or for public data "
            "AWS_SKIP_SIGNATURE=true"
        )
    return "check the address and who may read it"


def _short(error: Exception) -> str:
    """The first line of an error, without the store's own details."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0].split("Debug source:")[0][:300]


def _store(url: str) -> tuple[Any, str]:
    """The store that an object lies in, and its key there; one for each bucket or host, and for each process."""
    try:
        import obstore  # noqa: F401
    except ImportError:
        raise InputError(f"{url}: reading from there needs obstore: pip install 'gpuem[remote]'") from None
    root, key, query = parts(url)
    if not key or key.endswith("/") or not root.partition("://")[2]:
        raise InputError(f"{url}: names no object; it should look like {EXAMPLES[root.partition(':')[0]]}")
    with _making:
        # a signed address is a store of its own: what it signs must not become part of a name
        return (_made(f"{root}/{key}{query}", os.getpid()), "") if query else (_made(root, os.getpid()), key)


@functools.lru_cache(64)
def _made(root: str, process: int) -> Any:
    """A client; obstore's threads don't survive a fork, so every process makes its own."""
    from obstore.store import from_url

    backoff = {"init_backoff": datetime.timedelta(seconds=_WAIT_SECONDS), "max_backoff": datetime.timedelta(seconds=5)}
    retry: Any = {
        "max_retries": RETRIES, "retry_timeout": datetime.timedelta(seconds=RETRY_SECONDS), "backoff": backoff
    }  # fmt: skip
    client: Any = {**_TIMEOUTS, "user_agent": "gpuem"}
    options: dict[str, Any] = {}
    if root.startswith("s3:"):
        options = s3_options()
        endpoint = (
            options.get("endpoint") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        )
        client["allow_http"] = bool(endpoint and endpoint.startswith("http://"))
    elif root.startswith("http:"):
        client["allow_http"] = True
    try:
        return from_url(root, client_options=client, retry_config=retry, **options)
    except Exception as error:  # noqa: BLE001 - what is raised would show the address with all that signs it
        raise InputError(f"{root}: {_short(error)}; {_credentials(root)}") from None


def s3_options() -> dict[str, Any]:
    """What obstore doesn't take from the environment by itself: anonymous access, and the files of AWS's own tools."""
    if any(_true(os.environ.get(name)) for name in ("AWS_SKIP_SIGNATURE", "GPUEM_S3_ANONYMOUS")):
        return {"skip_signature": True}
    if "AWS_ACCESS_KEY_ID" in os.environ:
        return {}
    profile = os.environ.get("AWS_PROFILE", "default")
    found: dict[str, str] = {}
    for variable, name, section in (
        ("AWS_CONFIG_FILE", "config", profile if profile == "default" else f"profile {profile}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "credentials", profile),
    ):
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(Path(os.environ.get(variable, f"~/.aws/{name}")).expanduser(), encoding="utf-8")
        except (configparser.Error, OSError, UnicodeDecodeError):
            continue
        if parser.has_section(section):
            found.update(parser.items(section))
    names = {
        "aws_access_key_id": "access_key_id", "aws_secret_access_key": "secret_access_key",
        "aws_session_token": "session_token", "region": "region", "endpoint_url": "endpoint",
    }  # fmt: skip
    if "AWS_REGION" in os.environ or "AWS_DEFAULT_REGION" in os.environ:
        found.pop("region", None)
    if "AWS_ENDPOINT_URL" in os.environ or "AWS_ENDPOINT_URL_S3" in os.environ:
        found.pop("endpoint_url", None)
    return {names[key]: value for key, value in found.items() if key in names}


def _true(text: str | None) -> bool:
    return (text or "").lower() in ("1", "true", "yes", "on")
