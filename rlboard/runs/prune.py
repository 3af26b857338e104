"""Old, failed and surpassed runs moved to a trash, from which they come back.

What is moved is a whole directory, as a user sees it: the seeds of a group go and stay with it, and a directory inside
which another run stays, stays too. What a process may still write to is never moved.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import typer
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import track

from rlboard.config import printable
from rlboard.errors import DataError, StorageError, UsageError
from rlboard.runs.find import LOCK, LoggedRun, directories_above, find_runs, select
from rlboard.runs.output import Complaints, age, byte_size, command_line, plural, print_rows, reason_of
from rlboard.runs.trash import Folder, Trash, tree

PRUNE = ("rlboard", "runs", "prune")
FAILED = ("failed", "interrupted", "killed")
SECONDS = {"h": 3_600, "d": 86_400, "w": 7 * 86_400}
FOREIGN_SECONDS = 3_600
"""How long a run of other software, which has no lock, counts as live after it wrote last."""
LIVE_HINT = "end it first, or wait for an hour after other software wrote to it"
SEED = re.compile(r"seed-?\d+")
"""The name of a run inside the run of its group."""
TASKS = ("env_id", "data")
"""Options that say what was to be learned: the scores of two runs compare only where these are equal."""


class Stay(NamedTuple):
    """Why a run is not moved: in words that many runs may share, and with an exit code where that is no mere choice."""

    words: str
    detail: str = ""
    exit_code: int = 0

    def __str__(self) -> str:
        return f"{self.words}: {self.detail}" if self.detail else self.words


@dataclass(frozen=True)
class Unit:
    """A run that is moved with all that its directory holds.

    Attributes:
        run: the run itself.
        below: all runs that lie inside it.
        inside: the names of those among them that are units of their own, and not its seeds.
    """

    run: LoggedRun
    below: tuple[LoggedRun, ...]
    inside: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.run.name

    @cached_property
    def tree(self) -> tuple[float, int]:
        """When its newest file was written, and its bytes. Raises OSError."""
        return tree(self.run.directory)

    @property
    def live(self) -> str:
        """The name of a run of it that a process may still write to; empty for none. Raises OSError."""
        times = {self.run: self.tree[0]} | {each: each.modified for each in self.below}
        return next((run.name for run, modified in times.items() if is_live(run, modified)), "")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Holds the locks of all its runs. Raises filelock.Timeout where one is taken, OSError where one cannot be."""
        with contextlib.ExitStack() as stack:
            for run in (self.run, *self.below):
                stack.enter_context(hold(run))
            yield


@dataclass(frozen=True)
class Conditions:
    """What a run must meet to be pruned, all of it.

    Attributes:
        names: the runs a user names; none for all.
        older_than: an age, such as `30d`, that its newest file must have; empty for any.
        failed: whether it must be failed, interrupted or killed.
        keep_best: how many of the best runs of a loop are kept; None for none.

    Raises:
        UsageError: `older_than` is no age, or there is no condition at all.
    """

    names: tuple[str, ...] = ()
    older_than: str = ""
    failed: bool = False
    keep_best: int | None = None

    def __post_init__(self) -> None:
        if not (self.names or self.older_than or self.failed or self.keep_best):
            raise UsageError("nothing says which runs to prune: give RUN, --older-than, --failed or --keep-best")
        _ = self.seconds

    @cached_property
    def seconds(self) -> float:
        if not self.older_than:
            return 0.0
        if not (match := re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([hdw])", self.older_than)):
            hint = "give a number with h, d or w (hours, days, weeks), such as --older-than 30d"
            raise UsageError(f"--older-than {printable(self.older_than)} is not an age: {hint}")
        return float(match[1]) * SECONDS[match[2]]

    @property
    def options(self) -> list[str]:
        given = {"--older-than": self.older_than, "--keep-best": self.keep_best}
        options = [f"{flag}={value}" for flag, value in given.items() if value]
        return [*options, *(["--failed"] if self.failed else [])]


def prune_runs(logdir: Path, conditions: Conditions, trash_directory: str, yes: bool) -> int:
    """Shows the runs below `logdir` that meet `conditions`, with `yes` moves them to the trash; returns the exit code.

    Raises:
        UsageError: `logdir` is no directory, or the trash would be inside it.
        StorageError: the log root cannot be read, or the trash cannot be written.
    """
    runs = find_runs(logdir)
    trash, complaints, terminal = Trash(logdir, trash_directory), Complaints(), Console(soft_wrap=True, highlight=False)
    going, staying = plan(runs, conditions, logdir, complaints)
    _show(going, conditions, terminal)
    stay = f"{plural(staying.total(), 'run')} {'stays' if staying.total() == 1 else 'stay'}"
    kept = "; ".join([stay, *(f"{count:,} {words}" for words, count in staying.most_common())])
    if not going:
        nothing = f"nothing to prune: {kept}" if runs else f"no runs in {printable(logdir, 200)}"
        terminal.print(nothing, markup=False)
        return complaints.exit_code
    place = ["--logdir", str(logdir), *(["--trash", trash_directory] if trash_directory else [])]
    moved, where = _move(going, trash, complaints) if yes else (going, trash.path)
    size, verb = byte_size(sum(unit.tree[1] for unit in moved)), "moved" if yes else "would go"
    if moved:
        terminal.print(f"{plural(len(moved), 'run')}, {size}, {verb} to {printable(where, 200)}", markup=False)
    if staying:
        terminal.print(kept, markup=False)
    if not yes:
        again = [*conditions.options, *place, "--yes", *(["--", *conditions.names] if conditions.names else [])]
        terminal.print(f"do it with: {command_line(*PRUNE, *again)}", markup=False)
    elif moved:
        terminal.print(f"put back with: {command_line(*PRUNE, *place, '--undo')}", markup=False)
        terminal.print(f"free the space with: {command_line(*PRUNE, *place, '--empty-trash', '--yes')}", markup=False)
    return complaints.exit_code


def plan(
    runs: Sequence[LoggedRun], conditions: Conditions, logdir: Path, complaints: Complaints
) -> tuple[list[Unit], Counter[str]]:
    """The units to move, in the order of their names, and how many stay for which reason."""
    units = _units(runs)
    chosen, named = _chosen(runs, units, conditions.names, logdir, complaints)
    best = _best([unit.run for unit in units.values()], conditions.keep_best or 0)
    now = time.time()

    @functools.cache
    def stay(name: str) -> Stay | None:
        return _stay(units[name], conditions, best, now)

    going: list[Unit] = []
    staying: Counter[str] = Counter()
    for name in sorted(chosen):
        reason = stay(name)
        for inner in units[name].inside if reason is None else ():
            if why := stay(inner):
                reason = Stay("with a run inside that stays", f"{printable(inner, 200)}, {why}", why.exit_code)
                break
        if reason is None:
            going.append(units[name])
            continue
        staying[reason.words] += 1
        if reason.exit_code > UsageError.exit_code or (reason.exit_code and name in named):
            complaints.add(f"{printable(name, 200)} stays: {reason}", reason.exit_code)
    taken = {inner for unit in going for inner in unit.inside}
    return [unit for unit in going if unit.name not in taken], staying


def is_live(run: LoggedRun, modified: float) -> bool:
    """Whether a process may still write to `run`, whose newest file was written at `modified`."""
    if os.path.lexists(run.directory / LOCK):
        return run.is_alive()
    return time.time() - modified < FOREIGN_SECONDS


def hold(run: LoggedRun) -> contextlib.AbstractContextManager[object]:
    """Holds the lock of `run`, if it has one. Raises filelock.Timeout where it is taken, OSError where it cannot be."""
    path = run.directory / LOCK
    return FileLock(path, timeout=0) if os.path.lexists(path) else contextlib.nullcontext()


def undo_prune(logdir: Path, trash_directory: str) -> int:
    """Puts the runs of the newest prune of `logdir` back; returns the exit code.

    Raises:
        UsageError: there is nothing to put back.
        StorageError: the trash cannot be used.
    """
    trash, complaints = Trash(logdir, trash_directory), Complaints()
    count = 0
    with trash.used() if trash.path.exists() else contextlib.nullcontext():
        prunes = [each for each in _folders(trash, complaints) if each.command == "prune" and each.can_be_put_back]
        if not prunes:
            raise UsageError(f"there is no prune to undo in {printable(trash.path, 200)}")
        for name, problem in trash.put_back(prunes[-1]):
            if problem:
                complaints.add(f"{printable(name, 200)} stays in the trash: {problem}", StorageError.exit_code)
            else:
                count += 1
    typer.echo(f"{plural(count, 'run')} put back into {printable(logdir, 200)}")
    return complaints.exit_code


def empty_trash(logdir: Path, trash_directory: str, yes: bool) -> int:
    """Shows what the trash of `logdir` holds, and with `yes` deletes it for good; returns the exit code.

    Raises:
        UsageError: the trash cannot be where it is wanted.
        StorageError: the trash cannot be used.
    """
    trash, complaints, errors = Trash(logdir, trash_directory), Complaints(), Console(stderr=True)
    freed = 0
    with trash.used() if trash.path.exists() else contextlib.nullcontext():
        folders = _folders(trash, complaints)
        hidden = not (yes and errors.is_terminal)
        for folder in track(folders, "deleting", console=errors, transient=True, disable=hidden):
            try:
                size, held = tree(folder.path)[1], len(folder.held)
                if yes:
                    trash.empty(folder)
            except OSError as error:
                message = f"{printable(folder.path, 200)} cannot be {'deleted' if yes else 'read'}: {reason_of(error)}"
                complaints.add(message, StorageError.exit_code)
                continue
            freed += size
            what = plural(held, "run" if folder.command == "prune" else "file")
            typer.echo("\t".join((folder.path.name, folder.command, what, byte_size(size))))
    where = printable(trash.path, 200)
    if not folders:
        typer.echo(f"there is nothing in the trash {where}")
    elif yes:
        typer.echo(f"{byte_size(freed)} freed")
    else:
        place = ["--logdir", str(logdir), *(["--trash", trash_directory] if trash_directory else [])]
        typer.echo(f"{byte_size(freed)} in {where} can be freed")
        typer.echo(f"do it with: {command_line(*PRUNE, *place, '--empty-trash', '--yes')}")
    return complaints.exit_code


def _units(runs: Sequence[LoggedRun]) -> dict[str, Unit]:
    """The runs by name that are not the seeds of a group, each with what is inside it."""
    names = {run.name for run in runs}
    units = [run for run in runs if not _group(run.name, names)]
    below, inside = defaultdict[str, list[LoggedRun]](list), defaultdict[str, list[str]](list)
    for run in runs:
        for above in directories_above(run.name):
            below[above].append(run)
    for run in units:
        for above in directories_above(run.name):
            inside[above].append(run.name)
    return {run.name: Unit(run, tuple(below[run.name]), tuple(inside[run.name])) for run in units}


def _group(name: str, names: Container[str]) -> str:
    """The run of which `name` is one of the seeds; empty for none."""
    parent, _, leaf = name.rpartition("/")
    return parent if SEED.fullmatch(leaf) and parent in names else ""


def _chosen(
    runs: Sequence[LoggedRun], units: Mapping[str, Unit], names: Iterable[str], logdir: Path, complaints: Complaints
) -> tuple[set[str], set[str]]:
    """The units that `names` mean, all for none; and those among them that are meant one by one, by no pattern."""
    if not names:
        return set(units), set()
    chosen, named = set[str](), set[str]()
    whole, seeds = [unit.run for unit in units.values()], [run for run in runs if run.name not in units]
    for name in names:
        if name and name not in units and _is_above(name, logdir):
            complaints.add(
                f"RUN {printable(name)} is the log root or above it: it is never pruned", UsageError.exit_code
            )
            continue
        found, problems = select(whole, [name])
        if problems and (meant := select(seeds, [name])[0]):
            group = printable(meant[0].name.rpartition("/")[0], 200)
            problems = [f"RUN {printable(name, 200)} is a seed of {group}, whose seeds stay together: give {group}"]
        for problem in problems:
            complaints.add(problem, UsageError.exit_code)
        chosen |= {run.name for run in found}
        named |= {run.name for run in found} if len(found) == 1 else set()
    return chosen, named


def _is_above(name: str, logdir: Path) -> bool:
    """Whether `name` is the path of the log root or of a directory above it, or nothing but dots."""
    root, path = (Path(os.path.abspath(each)) for each in (logdir, name))  # noqa: PTH100 - resolves no links
    return not name.strip("./") or root.is_relative_to(path)


def _best(runs: Iterable[LoggedRun], count: int) -> set[str]:
    """The names of the `count` best runs of each loop, of runs that have ended; of equals the newer one."""
    ranked = defaultdict[tuple[str, ...], list[tuple[float, float, str]]](list)
    for run in runs if count else ():
        best = run.facts.get("best")
        headline, entry = next(iter(best.items()), ("", None)) if isinstance(best, dict) else ("", None)
        value = entry.get("value") if isinstance(entry, dict) else None
        if isinstance(value, int | float) and value == value and run.status != "running":
            task = (str(run.config.get(option)) for option in TASKS)
            ranked[run.loop, headline, *task].append((value, run.modified, run.name))
    return {name for entries in ranked.values() for *_, name in heapq.nlargest(count, entries)}


def _stay(unit: Unit, conditions: Conditions, best: Container[str], now: float) -> Stay | None:
    """Why `unit` stays, whatever is inside it; None if it may go."""
    run = unit.run
    if run.name == ".":
        return Stay("the log root itself", exit_code=UsageError.exit_code)
    if run.problem:
        return Stay("unreadable", run.problem, StorageError.exit_code)
    if not run.event_files:
        return Stay("without event files", exit_code=UsageError.exit_code)
    newer = Stay(f"newer than {conditions.older_than}")
    if now - run.modified < conditions.seconds:
        return newer
    try:
        if now - unit.tree[0] < conditions.seconds:
            return newer
        if (conditions.failed or conditions.keep_best) and run.damage:
            return Stay("damaged", run.damage, DataError.exit_code)
        if conditions.failed and run.status not in FAILED:
            return Stay("not failed, interrupted or killed")
        if run.name in best:
            return Stay(f"among the best {conditions.keep_best} of a loop")
        if run.status == "foreign" and not (conditions.names or conditions.older_than):
            return Stay("of other software, which --keep-best cannot judge")
        if live := unit.live:
            return Stay("live", f"{printable(live, 200)} may still be written to: {LIVE_HINT}", UsageError.exit_code)
    except OSError as error:
        what = f"{printable(error.filename or run.directory, 200)} cannot be read: {reason_of(error)}"
        return Stay("unreadable", what, StorageError.exit_code)
    return None


def _move(units: Sequence[Unit], trash: Trash, complaints: Complaints) -> tuple[list[Unit], Path]:
    """Moves `units` to a new folder of the trash; returns those that are in it, and the folder."""
    moved: list[Unit] = []
    errors = Console(stderr=True)
    with trash.used():
        folder = trash.begin("prune", [unit.name for unit in units])
        for unit in track(units, "moving", console=errors, transient=True, disable=not errors.is_terminal):
            try:
                with unit.held():
                    problem = _changed(unit, trash.root)
                    if not problem:
                        trash.take(folder, unit.name)
            except Timeout:
                problem = "a process has begun to write to it"
            except OSError as error:
                problem = reason_of(error)
            is_there = os.path.lexists(folder.place(unit.name))
            if problem:
                state = "is in the trash, but could not be removed" if is_there else "stays"
                complaints.add(f"{printable(unit.name, 200)} {state}: {problem}", StorageError.exit_code)
            if is_there:
                moved.append(unit)
        if not moved:
            trash.discard(folder)
    return moved, folder.path


def _changed(unit: Unit, root: Path) -> str:
    """What has happened to `unit` since it was looked at; empty for nothing. Raises OSError."""
    if unit.run.directory.resolve() != root / unit.name:
        return "it lies behind a symbolic link now"
    return "it was written to meanwhile" if tree(unit.run.directory)[0] > unit.tree[0] else ""


def _show(units: Sequence[Unit], conditions: Conditions, terminal: Console) -> None:
    """A table of what is to go; in a pipe, lines of tabs."""
    rows, now = [("run", "status", "age", "size", "why")], time.time()
    for unit in units:
        newest, size = unit.tree
        inside = f" (and {len(unit.below)} inside)" if unit.below else ""
        why = {
            "named": conditions.names,
            unit.run.status: conditions.failed,
            f"older than {conditions.older_than}": conditions.older_than,
            f"not among the best {conditions.keep_best}": conditions.keep_best,
        }
        reasons = ", ".join(reason for reason, holds in why.items() if holds)
        rows.append((printable(unit.name, 300) + inside, unit.run.status, age(newest, now), byte_size(size), reasons))
    print_rows(rows, ("age", "size"), terminal)


def _folders(trash: Trash, complaints: Complaints) -> list[Folder]:
    folders, problems = trash.folders()
    for problem in problems:
        complaints.add(str(problem), problem.exit_code)
    return folders
