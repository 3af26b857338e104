"""Which runs lie below a log root, and which of them a user means.

A run is a directory that holds event files or a `run.json`, whoever wrote them. Symbolic links are not followed, so
that nothing outside the root is ever taken for a run.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rlboard.config import printable
from rlboard.errors import DataError, StorageError, UsageError

RUN_JSON = "run.json"
LOCK = ".lock"
NAMED = 5
"""How many runs an error message names at most."""


@dataclass(frozen=True)
class LoggedRun:
    """A run as it lies on the disk.

    Attributes:
        name: its path below the log root, with `/`, as TensorBoard names it; `.` for the root itself.
        directory: where it lies.
        event_files: in the order of their names, which is the order TensorBoard reads them in.
        modified: when the newest of its files was written, in seconds since 1970.
        size: bytes of all its files, without those of runs inside it.
        problem: why it could not be looked into, if so; then it has no files.
    """

    name: str
    directory: Path
    event_files: tuple[Path, ...] = ()
    modified: float = 0.0
    size: int = 0
    problem: str = ""

    @property
    def facts(self) -> dict[str, Any]:
        """What its `run.json` says; empty where there is none that can be read."""
        return self._read[0]

    @property
    def damage(self) -> str:
        """What is wrong with the run's directory or its `run.json`, as one line; empty for nothing."""
        return self.problem or self._read[1]

    @cached_property
    def _read(self) -> tuple[dict[str, Any], str]:
        if not (self.directory / RUN_JSON).exists():
            return {}, ""
        try:
            return read_facts(self.directory), ""
        except DataError as error:
            return {}, str(error)

    @cached_property
    def status(self) -> str:
        """`running`, `completed`, `pruned`, `interrupted` or `failed`, as it says itself; `killed` if it ended unsaid.

        One with a damaged `run.json` is `unreadable`.
        Foreign is a run of other software: it has no `run.json`.
        """
        if self.damage:
            return "unreadable"
        status = str(self.facts.get("status", "foreign"))
        return "killed" if status == "running" and not self.is_alive() else status

    @property
    def loop(self) -> str:
        """The folder and name of its loop, such as `agents/reinforce`; empty for a foreign run."""
        return str(self.facts.get("loop", ""))

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.facts.get("config", {}))

    def is_alive(self) -> bool:
        """Whether a process holds the run's lock."""
        from filelock import FileLock, Timeout

        if not (self.directory / LOCK).exists():
            return False
        try:
            with FileLock(self.directory / LOCK, timeout=0):
                return False
        except Timeout:
            return True
        except OSError:  # a lock that cannot be opened is somebody else's
            return True


def read_facts(directory: Path) -> dict[str, Any]:
    """What the `run.json` of a run says, its `loop`, `config` and `status` of the right types.

    Raises:
        DataError: it is missing or damaged.
    """
    path = directory / RUN_JSON
    where = printable(path, 200)
    try:
        facts = json.loads(path.read_bytes())
    except FileNotFoundError:
        no_run = f"{printable(directory, 200)} is no run, it has no {RUN_JSON}"
        raise DataError(f"{no_run}: {suggestion(directory.name, directory)}") from None
    except OSError as error:
        raise DataError(f"{where} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is damaged: {printable(error)}") from None
    types: dict[str, type] = {"loop": str, "config": dict, "status": str}
    for name, kind in types.items():
        if not isinstance(facts, dict) or not isinstance(facts.get(name), kind):
            raise DataError(f"{where} is damaged: it has no {name}")
    return facts  # type: ignore[no-any-return]


def check_root(root: Path) -> None:
    """Raises UsageError where `root` is no directory, StorageError where it cannot be listed."""
    where = f"--logdir {printable(root, 200)}"
    try:
        with os.scandir(root):
            pass
    except (FileNotFoundError, ValueError):
        raise UsageError(f"{where} is not there: give the directory that --log-dir was given to the runs") from None
    except NotADirectoryError:
        raise UsageError(f"{where} is a file: give the directory above the runs") from None
    except OSError as error:
        raise StorageError(f"{where} cannot be read: {error.strerror}") from None


def find_runs(root: Path) -> list[LoggedRun]:
    """All runs below `root`, sorted by name; a directory that cannot be read is one too, with its `problem`.

    Raises:
        UsageError: `root` is no directory.
        StorageError: it cannot be read.
    """
    check_root(root)
    found: list[LoggedRun] = []
    waiting = [(str(root), "")]
    while waiting:
        directory, name = waiting.pop()
        event_files: list[Path] = []
        modified, size, is_run = 0.0, 0, False
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append((entry.path, f"{name}/{entry.name}" if name else entry.name))
                    elif entry.is_file(follow_symlinks=False):
                        stat = entry.stat(follow_symlinks=False)
                        modified, size = max(modified, stat.st_mtime), size + stat.st_size
                        if "tfevents" in entry.name and not entry.name.endswith(".profile-empty"):
                            event_files.append(Path(entry.path))
                        is_run = is_run or entry.name == RUN_JSON
        except FileNotFoundError:
            continue  # removed meanwhile
        except OSError as error:
            problem = f"{printable(directory, 200)} cannot be read: {error.strerror}"
            found.append(LoggedRun(name, Path(directory), problem=problem))
            continue
        if event_files or is_run:
            found.append(LoggedRun(name or ".", Path(directory), tuple(sorted(event_files)), modified, size))
    return sorted(found, key=lambda run: run.name)


def matching(runs: Iterable[LoggedRun], text: str) -> list[LoggedRun]:
    """The runs whose name contains `text`, or fits it where it is a pattern with `*` or `?`; all for no text."""
    return [run for run in runs if _contains(run.name, text) or _fits(run.name, text)]


def select(runs: Sequence[LoggedRun], names: Iterable[str]) -> tuple[list[LoggedRun], list[str]]:
    """The runs that `names` mean, in that order and each once, and a complaint for each name that means none or many.

    A name is a run's path, from here or from the log root; the end of one; a part of one; or a pattern with `*` or `?`,
    which alone may mean several. No names at all mean all runs.
    """
    chosen: dict[str, LoggedRun] = {}
    complaints: list[str] = []
    names = list(names)
    for name in names:
        matches = _matches(runs, name)
        if len(matches) > 1 and not _is_pattern(name):
            some = ", ".join(printable(run.name, 100) for run in matches[:NAMED])
            rest = f" and {len(matches) - NAMED} more" if len(matches) > NAMED else ""
            complaints.append(
                f"RUN {printable(name)} means {len(matches)} runs, {some}{rest}: give more of it, or a pattern with *"
            )
        elif matches:
            chosen |= {run.name: run for run in matches}
        else:
            complaints.append(f"RUN {printable(name, 200)} is not there: {nearest(name, [run.name for run in runs])}")
    return (list(chosen.values()) if names else list(runs)), complaints


def _is_pattern(name: str) -> bool:
    return "*" in name or "?" in name


def _contains(name: str, part: str) -> bool:
    return _composed(part) in _composed(name)


def _fits(name: str, pattern: str) -> bool:
    """Whether a run's name, or the end of it, is what the pattern describes."""
    literal = _composed(pattern).replace("[", "[[]")
    patterns = (literal, f"*/{literal}") if _is_pattern(pattern) else ()
    return any(fnmatch.fnmatchcase(_composed(name), each) for each in patterns)


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)  # macOS takes letters apart


def _matches(runs: Sequence[LoggedRun], name: str) -> list[LoggedRun]:
    """The runs that `name` may mean by the first rule under which it means any."""
    if not name:
        return []
    wanted = name.rstrip("/") or name
    path = os.path.abspath(wanted)  # noqa: PTH100 - resolves no links, on purpose
    rules = (
        lambda run: run.name == wanted,
        lambda run: os.path.abspath(run.directory) == path,  # noqa: PTH100
        lambda run: run.name.endswith(f"/{wanted}"),
        lambda run: _fits(run.name, name),
        lambda run: bool(wanted.strip("./")) and _contains(run.name, wanted),
    )
    return next(filter(None, ([run for run in runs if rule(run)] for rule in rules)), [])


def directories_above(name: str) -> Iterator[str]:
    """The names of the directories that the run `name` lies in, up to the root, which is not one of them."""
    while name := name.rpartition("/")[0]:
        yield name


def nearest(name: str, names: Sequence[str]) -> str:
    """What to give instead of `name`, which is not among `names`: those that are most like it."""
    leaf = name.rstrip("/").rpartition("/")[2]
    leaves = {each.rpartition("/")[2]: each for each in names}
    if near := [leaves[each] for each in difflib.get_close_matches(leaf, leaves, cutoff=0.6)]:
        return f"did you mean {' or '.join(printable(each, 200) for each in near)}?"
    return f"give a run, such as {printable(names[-1], 200)}" if names else "there are no runs"


def suggestion(name: str, below: Path = Path("logs")) -> str:
    """What to give where `name` is no run: the runs below a directory whose names are nearest."""
    names = [f"{below}/{run.name}" for run in find_runs(below) if run.name != "."] if below.is_dir() else []
    return nearest(name, names) if names else "give the directory of a run, such as logs/REINFORCE/NAME"
