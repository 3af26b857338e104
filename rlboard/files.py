"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = True, contested: bool = False) -> Iterator[IO[bytes]]:
    """A file beside `path` that takes its place when it is written: a reader finds the old one or the new, whole.

    After an error there is what was before.

    Args:
        path: what is replaced, or made.
        durable: a power cut, too, leaves the one or the other; else one may find a file that is empty.
        contested: several processes may write it at once: the last one wins.

    Raises:
        OSError: it cannot be written.
    """
    mark = f"{os.getpid()}." if contested else ""  # else what a killed process left is overwritten by the next
    unfinished = path.with_name(f".{path.name}.{mark}tmp")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    if durable:
        with contextlib.suppress(OSError):  # Windows opens no directory
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)  # or a power cut undoes the renaming, and out of order
            finally:
                os.close(directory)
