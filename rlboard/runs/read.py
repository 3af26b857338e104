"""The scalars of the runs that a user names: what cannot be read is said in a line, and the rest is read."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track

from rlboard.config import printable
from rlboard.errors import DataError, RlboardError, UsageError
from rlboard.eventfile import ScalarColumns, Series, read_events, read_scalars, scan
from rlboard.eventfile.read import COMPILE_BYTES
from rlboard.runs.find import NAMED, LoggedRun, find_runs, select
from rlboard.runs.output import Complaints

SLOW_BYTES = 50 << 20
"""Of event files: reading more than these shows a progress bar."""


def find_some(root: Path) -> list[LoggedRun]:
    """All runs below `root`, as `find.find_runs` returns and raises; DataError where there are none."""
    runs = find_runs(root)
    if not runs:
        raise DataError(f"--logdir {printable(root, 200)} holds no runs: give the directory above them")
    return runs


@dataclass(frozen=True)
class Column:
    """A run, or several that differ only in their seed."""

    name: str
    runs: tuple[LoggedRun, ...]
    curves: tuple[Mapping[str, Series], ...] = ()
    """The scalars of each run."""

    def of(self, tag: str) -> list[Series]:
        """The curves of `tag`, one for each run that has it."""
        return [curves[tag] for curves in self.curves if tag in curves]


class Reader(Complaints):
    """Reads runs, and says on standard error what it cannot read."""

    def complain(self, error: RlboardError) -> None:
        self.add(str(error), error.exit_code)

    def choose(self, runs: Sequence[LoggedRun], names: Iterable[str]) -> list[LoggedRun]:
        """Those of `runs` that `names` mean, all for no names; a name that means none or many is complained of."""
        chosen, complaints = select(runs, names)
        for complaint in complaints:
            self.complain(UsageError(complaint))
        return chosen

    def each(self, runs: Sequence[LoggedRun]) -> Iterator[tuple[LoggedRun, list[ScalarColumns]]]:
        """Each run and the scalars of its event files, in the order of their names."""
        size = sum(run.size for run in runs)
        if size > COMPILE_BYTES:
            scan.compiled()
        errors = Console(stderr=True)
        hidden = not errors.is_terminal or size < SLOW_BYTES
        for run in track(runs, "reading", console=errors, transient=True, disable=hidden):
            if run.damage:
                self.complain(DataError(run.damage))
            yield run, list(self._files(run))

    def _files(self, run: LoggedRun) -> Iterator[ScalarColumns]:
        for path in run.event_files:
            where = printable(path, 200)
            try:
                columns = read_scalars(path)
            except OSError as error:
                self.complain(DataError(f"{where} cannot be read: {error.strerror or error}"))
                continue
            if columns.damage:
                lost = sum(damage.length for damage in columns.damage)
                self.complain(
                    DataError(f"{where} is damaged, {lost:,} bytes of it are passed over: see rlboard runs repair")
                )
            yield columns


def foreign_config(run: LoggedRun) -> dict[str, bool | float | str]:
    """The hyperparameters that other software logged for the HParams tab; of several records, TensorBoard's: the first.

    Numbers come as floats: the record knows no integers.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    for path in run.event_files:
        with contextlib.suppress(OSError, DecodeError):
            if not _contains(path, SESSION_START_INFO_TAG.encode()):
                continue
            for value in (value for event in read_events(path) for value in event.summary.value):
                if value.tag == SESSION_START_INFO_TAG:
                    hparams = HParamsPluginData.FromString(
                        value.metadata.plugin_data.content
                    ).session_start_info.hparams
                    kinds = {name: hparams[name].WhichOneof("kind") for name in sorted(hparams)}
                    return {name: getattr(hparams[name], kind) for name, kind in kinds.items() if kind}
    return {}


def _contains(path: Path, text: bytes) -> bool:
    """Whether `text` stands anywhere in a file: at the speed of memory, where decoding its events takes minutes."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return data.find(text) >= 0


def matches(tag: str, patterns: Iterable[str]) -> bool:
    """Whether `tag` is one of `patterns`, or fits one in which `*`, `?` and `[` have their usual meaning."""
    return any(tag == pattern or fnmatch.fnmatchcase(tag, pattern) for pattern in patterns)


def unknown_tags(patterns: Iterable[str], tags: Sequence[str]) -> list[UsageError]:
    """A complaint, with the nearest of `tags`, for each of `patterns` that none of them matches."""
    complaints = []
    for pattern in patterns:
        if not any(matches(tag, [pattern]) for tag in tags):
            near = difflib.get_close_matches(pattern, tags, cutoff=0.6)
            some = ", ".join(printable(tag, 100) for tag in (near or tags)[:NAMED])
            hint = f"did you mean {some}?" if near else f"there is {some}" if tags else "these runs have no scalars"
            complaints.append(UsageError(f"--tag {printable(pattern, 100)} matches no tag: {hint}"))
    return complaints
