"""Files from the network that are verified before anything reads them.

`fetch` asks one mirror after another for the same bytes. What one mirror leaves unfinished the next one continues,
and a file gets its name only when its checksum holds.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

from filelock import FileLock
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from rlboard.errors import DataError, StorageError

ATTEMPTS = 5  # at one mirror, as long as each brings something
CHUNK = 1 << 16
LARGEST = 1 << 30  # bytes: a host that never stops sending is not the one we asked for
PATIENCE = 60.0  # seconds
PROGRESS = 1 << 20  # bytes that a mirror has to bring within `PATIENCE`


class _RefusedError(Exception):
    """A mirror that does not have the file, or stopped sending it."""


def md5_of(path: Path) -> str:
    """The MD5 of a file as 32 hexadecimal digits, empty where there is no such file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError:
        return ""


def fetch(urls: Sequence[str], path: Path, md5: str, patience: float = PATIENCE, progress: int = PROGRESS) -> None:
    """Brings `path` from the first of `urls` that has it; at once where it is there already.

    A mirror that brings less than `progress` bytes in `patience` seconds is left for the next one. A partial
    download stays beside `path` as `*.partial`, for the next mirror and for the next call.

    Raises:
        DataError: no mirror brought a file with this MD5; the message ends in what to do by hand.
        StorageError: the file cannot be written.
    """
    if md5_of(path) == md5:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(path.name + ".lock")):
            if md5_of(path) != md5:
                _fetch(urls, path, md5, patience, progress)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error}: set XDG_CACHE_HOME to another directory") from error


def _fetch(urls: Sequence[str], path: Path, md5: str, patience: float, progress: int) -> None:
    partial = path.with_name(path.name + ".partial")
    reasons = []
    for url in urls:
        with partial.open("ab", buffering=0) as file:
            reason = _from_mirror(url, file, md5, patience, progress)
        if not reason:
            partial.replace(path)
            return
        reasons.append(f"{urllib.parse.urlsplit(url).netloc}: {reason}")
    if not partial.stat().st_size:
        partial.unlink()
    raise DataError(
        f"{path.name} cannot be downloaded ({'; '.join(reasons)}). By hand:\n"
        f"  1. download {urls[0]}{f' (or {urls[-1]})' if len(urls) > 1 else ''}, MD5 {md5},\n"
        f"  2. put it at {path},\n"
        "  3. run the command again; --data shapes needs no file."
    )


def _from_mirror(url: str, file: FileIO, md5: str, patience: float, progress: int) -> str:
    """Why this mirror could not complete `file`; empty where it did."""
    reason = ""
    for _ in range(ATTEMPTS):
        start = file.seek(0, os.SEEK_END)
        try:
            _receive(url, file, start, patience, progress)
        except _RefusedError as refusal:
            return str(refusal)
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", "") or error) or type(error).__name__
            if isinstance(error, TimeoutError) or file.tell() == start:
                return reason
            continue
        if md5_of(Path(file.name)) == md5:
            return ""
        file.truncate(0)
        reason = "the file has another checksum"
        if start == 0:  # else its beginning was an older one's: once more, from the start
            return reason
    return reason


def _receive(url: str, file: FileIO, start: int, patience: float, progress: int) -> None:
    """Appends to `file`, which has `start` bytes, what `url` has from there on.

    Raises:
        _RefusedError: the host has no such file.
        OSError, http.client.HTTPException: no connection, or one that ended early; `TimeoutError` where it stalled.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "rlboard", "Range": f"bytes={start}-"})
    try:
        response = urllib.request.urlopen(request, timeout=patience)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing is missing: the checksum decides
        raise _RefusedError(f"HTTP {error.code} {error.reason}") from error
    with response:
        if response.headers.get_content_type() == "text/html":
            raise _RefusedError("an HTML page instead of the file")
        if response.status != http.client.PARTIAL_CONTENT:
            start = 0
            file.truncate(0)
        length = response.headers.get("Content-Length", "")
        expected = start + int(length) if length.isdecimal() else None
        with progress_bar(DownloadColumn(), TransferSpeedColumn()) as bar:
            task = bar.add_task(urllib.parse.urlsplit(url).netloc, total=expected, completed=start)
            received = window_start = start
            window_end = time.monotonic() + patience
            while chunk := response.read1(CHUNK):
                _write(file, chunk)
                received += len(chunk)
                bar.update(task, completed=received)
                if received - window_start >= progress:
                    window_start, window_end = received, time.monotonic() + patience
                elif time.monotonic() > window_end:
                    raise TimeoutError(f"less than {progress} bytes in {patience:g} seconds")
                if received > LARGEST:
                    raise _RefusedError(f"more than {LARGEST} bytes")
    if expected is not None and received < expected:
        raise ConnectionError(f"the connection ended after {received} of {expected} bytes")


def _write(file: FileIO, chunk: bytes) -> None:
    """Writes all of `chunk`; a full disk is no fault of the network's and raises `StorageError`."""
    try:
        if file.write(chunk) != len(chunk):
            raise OSError("the disk is full")
    except OSError as error:
        raise StorageError(f"{file.name} cannot be written: {error}") from error


def progress_bar(*columns: ProgressColumn) -> Progress:
    """A bar on the terminal with these columns in it, nothing where there is no terminal; gone when it is done."""
    console = Console(stderr=True)
    bar = TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn()
    return Progress(*bar, console=console, transient=True, disable=not console.is_terminal)
