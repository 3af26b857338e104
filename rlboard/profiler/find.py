"""Which traces lie below a log directory.

Directories are followed as TensorBoard follows them, links to directories too, so that what it takes for a run is one
here. A trace must lie in its run's own directory or in the log directory once all links are followed: no link inside a
run leads to a file elsewhere. Requests name a run and a trace, and these only pick one of the files found, so that no
request is ever made into a path.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

TRACE = re.compile(r"(?:.*\.)?trace\.json(?:\.gz)?")
"""The names of trace files: those that `rlboard --profile`, torch's `tensorboard_trace_handler` and examples write."""
MOST_DIRECTORIES = 100_000
"""How many directories are looked into at most; those nearest to the root come first."""


@dataclass(frozen=True)
class TraceFile:
    """A trace on the disk: of which run, by which name within it, where when links are followed, and as it was then."""

    run: str
    name: str
    path: Path
    size: int
    modified: int

    @property
    def version(self) -> tuple[str, int, int]:
        """Differs from that of any other trace, and of this one once it has been written again."""
        return (str(self.path), self.size, self.modified)

    def now(self) -> TraceFile:
        """As it is now.

        Raises:
            OSError: it is no longer there; a link that has come in its place is not followed.
        """
        if os.path.realpath(self.path) != str(self.path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        stat = self.path.stat()
        return TraceFile(self.run, self.name, self.path, stat.st_size, stat.st_mtime_ns)


Found = dict[tuple[str, str], TraceFile]
"""By run and name."""


def find_traces(logdir: Path) -> Found:
    """All traces below `logdir`, by run and then by name, numbers in names in their order."""
    found: list[TraceFile] = []
    linked: set[str] = set()
    root = os.path.realpath(logdir)
    waiting = [(str(logdir), "")]
    for directory, name in waiting:
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    below = f"{name}/{entry.name}" if name else entry.name
                    if TRACE.fullmatch(entry.name):
                        found += _trace(Path(logdir), root, below)
                    elif entry.is_dir() and len(waiting) < MOST_DIRECTORIES:
                        if entry.is_symlink():
                            target = os.path.realpath(entry.path)
                            if target in linked or Path(os.path.realpath(directory)).is_relative_to(target):
                                continue  # a loop
                            linked.add(target)
                        waiting.append((entry.path, below))
        except OSError:
            continue  # removed meanwhile, or not ours to read
    found.sort(key=lambda trace: (_natural(trace.run), _natural(trace.name)))
    return {(trace.run, trace.name): trace for trace in found}


def _trace(logdir: Path, root: str, below: str) -> list[TraceFile]:
    """The trace at the path `below` the log directory: none if it is no file, or one that lies elsewhere."""
    path = logdir / below
    run = _run_of(PurePosixPath(below).parent)
    try:
        if not path.is_file():
            return []
        real = Path(os.path.realpath(path))
        if not (real.is_relative_to(root) or real.is_relative_to(os.path.realpath(logdir / run))):
            return []
        stat = real.stat()
    except OSError:
        return []
    return [TraceFile(str(run), str(PurePosixPath(below).relative_to(run)), real, stat.st_size, stat.st_mtime_ns)]


def _run_of(directory: PurePosixPath) -> PurePosixPath:
    """The run that traces in `directory` belong to: the one above `profile`, `plugins/profile` or a folder in that."""
    parts = directory.parts
    for end in (("plugins", "profile"), ("profile",)):
        if parts[-len(end) :] == end:
            return PurePosixPath(*parts[: -len(end)])
    return PurePosixPath(*parts[:-3]) if parts[-3:-1] == ("plugins", "profile") else directory


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


class TraceList:
    """The traces below a log directory, looked for again now and then: a twentieth of a core at most.

    Args:
        logdir: may come to be later; empty for none.
    """

    def __init__(self, logdir: str) -> None:
        self._logdir = Path(os.path.expanduser(logdir)) if logdir else None  # noqa: PTH111 - never fails
        self._found: Found = {}
        self._lock = threading.Lock()
        self._looking: threading.Thread | None = None
        self._next = 0.0

    def get(self, patience: float) -> Found:
        """What is known after waiting `patience` seconds at most for a look that is due or under way."""
        with self._lock:
            if self._looking is None and self._logdir is not None and time.monotonic() >= self._next:
                self._looking = threading.Thread(target=self._look, args=(self._logdir,), daemon=True)
                self._looking.start()
            looking = self._looking
        if looking is not None:
            looking.join(patience)
        return self._found

    def is_empty(self) -> bool:
        """Whether no trace is known; asks for one file where one was found before."""
        first = next(iter(self._found.values()), None)
        return not (first and first.path.exists()) and not self.get(patience=0.2)

    def _look(self, logdir: Path) -> None:
        started = time.monotonic()
        try:
            self._found = find_traces(logdir)
        finally:
            ended = time.monotonic()
            self._next = ended + max(1.0, 20 * (ended - started))
            self._looking = None
