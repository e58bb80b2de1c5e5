"""Objects of a store and files of a web server into the memory of a GPU, through kvikio's remote files.

kvikio's own threads fetch many ranges at a time and copy them to the GPU; what they can't open goes through page-locked
memory, with obstore.

This has been run with a stand-in for kvikio only, not on a GPU.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from gpuem.errors import DeviceError, InputError
from gpuem.formats import stores
from gpuem.formats.remote import address
from gpuem.formats.source import File
from gpuem.storage.gds_errors import words

# one connection is slow, and kvikio's threads wait for the network most of the time
THREADS = 64
_S3 = {
    "region": "aws_region_name",
    "access_key_id": "aws_access_key_id",
    "secret_access_key": "aws_secret_access_key",
    "session_token": "aws_session_token",
    "endpoint": "aws_endpoint_url",
}


class Handle:
    """A remote file with the interface of ``kvikio.CuFile``."""

    def __init__(self, remote: Any) -> None:
        self._remote = remote

    def pread(self, target: Any, size: int, file_offset: int, task_size: int) -> Any:
        """Begin to read; a remote file takes kvikio's own task size."""
        return self._remote.pread(target, size=size, file_offset=file_offset)

    def close(self) -> None:
        """Let go of it."""
        self._remote.close()


def choose(asked: str, files: tuple[File, ...]) -> tuple[str, str]:
    """How bytes of remote files should reach the GPU, and why: ``kvikio`` or ``pinned``.

    Raises
    ------
    DeviceError
        The direct way was asked for and isn't there.
    """
    obstacle = _obstacle(files)
    if obstacle and asked == "gds":
        raise DeviceError(f"kvikio can't read these files: {obstacle}. Ask for auto or for pinned memory")
    if obstacle:
        return "pinned", f"obstore reads over the network: {obstacle}"
    return "kvikio", "kvikio reads over the network"


def open_file(file: File, kvikio: Any) -> Handle:
    """Open a remote file; raises InputError where kvikio can't."""
    url = address(file.path)
    try:
        if url.startswith("s3:"):
            root, key, _ = stores.parts(url)
            remote = kvikio.RemoteFile.open_s3(root.removeprefix("s3://"), key, file.size, **_s3_settings())
        else:
            remote = kvikio.RemoteFile.open_http(url, nbytes=file.size)
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        raise InputError(f'{url}: kvikio can\'t open it: {words(error)}; try transfer = "pinned"') from None
    return Handle(remote)


def _s3_settings() -> dict[str, str]:
    """What kvikio doesn't take from the environment by itself: the files of AWS's tools, names that it doesn't know."""
    known = stores.s3_options()
    found = {parameter: known[name] for name, parameter in _S3.items() if name in known}
    for name, variable in (("aws_region_name", "AWS_REGION"), ("aws_endpoint_url", "AWS_ENDPOINT_URL_S3")):
        if variable in os.environ:
            found.setdefault(name, os.environ[variable])
    return found


def _obstacle(files: tuple[File, ...]) -> str:
    """Why kvikio can't read all of the files; empty where it can."""
    if not all(file.remote for file in files):
        return "some of the files are local"
    schemes = {str(file.path).partition(":")[0] for file in files}
    if schemes - {"s3", "http", "https"}:
        return "kvikio knows S3 and web servers only"
    if "s3" in schemes and "skip_signature" in stores.s3_options():
        return "kvikio signs what it asks S3 for"
    try:
        kvikio = importlib.import_module("kvikio")
        return "" if kvikio.is_remote_file_available() else "kvikio was built without remote files"
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"kvikio can't be used ({error})"
