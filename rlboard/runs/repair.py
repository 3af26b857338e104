"""Damaged event files found, and replaced by what is valid in them; the originals wait in the trash."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import Timeout
from rich.console import Console
from rich.progress import Progress

from rlboard.config import printable
from rlboard.errors import DataError, StorageError, UsageError
from rlboard.eventfile.read import Report, repair, verify
from rlboard.runs.find import LoggedRun, find_runs, select
from rlboard.runs.output import Complaints, command_line, plural, print_rows, reason_of
from rlboard.runs.prune import LIVE_HINT, hold, is_live
from rlboard.runs.trash import Folder, Trash


@dataclass(frozen=True)
class Damaged:
    """An event file of which not every byte belongs to a valid record; `modified` as it was when it was looked at."""

    run: LoggedRun
    name: str
    modified: int
    report: Report

    @property
    def reasons(self) -> str:
        reasons = list(dict.fromkeys(damage.reason for damage in self.report.damage))
        return ", ".join([*reasons, *(["torn end"] if self.report.torn_tail is not None else [])])

    @property
    def lost(self) -> int:
        """Bytes."""
        return self.report.size - self.report.valid_bytes


def repair_runs(logdir: Path, names: Iterable[str], trash_directory: str, yes: bool) -> int:
    """Shows the damaged event files of the runs that `names` mean, all for none, and with `yes` mends them.

    Returns the exit code: 0 where all is well in the end.

    Raises:
        UsageError: `logdir` is no directory, or the trash would be inside it.
        StorageError: the log root cannot be read, or the trash cannot be written.
    """
    runs, names = find_runs(logdir), list(names)
    trash, complaints, terminal = Trash(logdir, trash_directory), Complaints(), Console(soft_wrap=True, highlight=False)
    chosen, problems = select(runs, names)
    for problem in problems:
        complaints.add(problem, UsageError.exit_code)
    named = {found[0].name for name in names if len(found := select(runs, [name])[0]) == 1}
    looked_at = [run for run in chosen if _may_be_read(run, run.name in named, complaints)]
    damaged = list(_damaged(looked_at, complaints))
    _show(damaged, terminal)
    for each in damaged:
        if not each.report.records:
            where = printable(each.report.path, 200)
            complaints.add(f"{where} holds no valid record: it is left as it is", DataError.exit_code)
    to_mend = [each for each in damaged if each.report.records]
    count = plural(sum(len(run.event_files) for run in looked_at), "event file")
    of = f"{count} of {plural(len(looked_at), 'run')}"
    live = f"; {plural(len(chosen) - len(looked_at), 'run')} left alone" if len(looked_at) < len(chosen) else ""
    if not damaged:
        terminal.print(f"{of}: {'no damage' if runs else 'there are no runs'}{live}", markup=False)
    elif not yes:
        terminal.print(f"{of}: {len(damaged):,} damaged{live}", markup=False)
        place = ["--logdir", str(logdir), *(["--trash", trash_directory] if trash_directory else [])]
        again = command_line("rlboard", "runs", "repair", *place, "--yes", *(["--", *names] if names else []))
        if to_mend:
            terminal.print(f"mend with: {again}", markup=False)
        complaints.exit_code = max(complaints.exit_code, DataError.exit_code)
    elif to_mend:
        mended, folder = _mend(to_mend, trash, complaints)
        kept = f", the originals are in {printable(folder, 200)}" if mended else ""
        terminal.print(f"{of}: {len(damaged):,} damaged, {mended:,} mended{kept}{live}", markup=False)
    return complaints.exit_code


def _may_be_read(run: LoggedRun, named: bool, complaints: Complaints) -> bool:
    """Whether `run` can be read and nobody writes to it."""
    if run.problem:
        complaints.add(run.problem, StorageError.exit_code)
        return False
    if is_live(run, run.modified):
        if named:
            complaints.add(f"{printable(run.name, 200)} is live and left alone: {LIVE_HINT}", UsageError.exit_code)
        return False
    return True


def _damaged(runs: Sequence[LoggedRun], complaints: Complaints) -> Iterator[Damaged]:
    """Verifies the event files of `runs`, with a progress bar on a terminal."""
    errors = Console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("verifying", total=sum(run.size for run in runs))
        for run in runs:
            for path in run.event_files:
                try:
                    modified = path.stat().st_mtime_ns
                    report = verify(path)
                except OSError as error:
                    message = f"{printable(path, 200)} cannot be read: {reason_of(error)}"
                    complaints.add(message, DataError.exit_code)
                    continue
                if not report.ok:
                    yield Damaged(run, os.path.normpath(f"{run.name}/{path.name}"), modified, report)
            progress.advance(task, run.size)


def _mend(damaged: Sequence[Damaged], trash: Trash, complaints: Complaints) -> tuple[int, Path]:
    """Keeps each file in a new folder of the trash and replaces it; returns how many are mended, and the folder."""
    count = 0
    errors = Console(stderr=True)
    with trash.used(), Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        folder = trash.begin("repair", [each.name for each in damaged])
        task = progress.add_task("mending", total=sum(each.report.size for each in damaged))
        for each in damaged:
            try:
                with hold(each.run):
                    problem = _replace(each, trash, folder)
            except Timeout:
                problem = "a process has begun to write to it"
            except (OSError, ValueError) as error:
                problem = reason_of(error)
            if problem:
                complaints.add(f"{printable(each.report.path, 200)} is not mended: {problem}", StorageError.exit_code)
            count += not problem
            progress.advance(task, each.report.size)
        if not folder.held:
            trash.discard(folder)
    return count, folder.path


def _replace(damaged: Damaged, trash: Trash, folder: Folder) -> str:
    """Replaces a file by its valid records; returns what kept it from that, empty for nothing. Raises OSError."""
    path = damaged.report.path
    if path.resolve() != trash.root / damaged.name:
        return "it lies behind a symbolic link now"
    before = path.stat()
    if before.st_mtime_ns != damaged.modified:
        return "it was written to meanwhile"
    trash.keep(folder, damaged.name)
    repair(path, path, overwrite=True)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # mending makes a run no younger: prune asks its age
    return ""


def _show(damaged: Sequence[Damaged], terminal: Console) -> None:
    """A table of the damaged files; in a pipe, lines of tabs."""
    rows = ((printable(each.name, 400), f"{each.report.records:,}", f"{each.lost:,}", each.reasons) for each in damaged)
    print_rows([("event file", "records", "bytes lost", "damage"), *rows], ("records", "bytes lost"), terminal)
