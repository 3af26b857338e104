"""Runs as a table: how each went, in one row read from its `run.json` and its event files."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from rlboard.config import printable
from rlboard.errors import DataError
from rlboard.eventfile import ScalarColumns, Series, read_scalars
from rlboard.runs.find import LoggedRun, find_runs, matching
from rlboard.runs.output import age, byte_size

COLUMNS = ("run", "status", "age", "seed", "steps", "metric", "best", "last", "size")
HEADLINES = ("reward", "rollout/ep_rew_mean", "Accuracy/val", "Loss/val")
"""Tags that a run is judged by where it does not say so itself: the names that rlboard and its peers give them."""
STATUS_STYLES = {"running": "green", "failed": "red", "killed": "red", "unreadable": "red", "interrupted": "yellow"}
ON_A_SCREEN = 100
"""Rows, unless another number is asked for."""
WIDE = 110
"""Characters of a terminal in which all columns have room."""


@dataclass(frozen=True)
class Row:
    """One run's row.

    Attributes:
        run: its name below the log root.
        status: see `LoggedRun.status`.
        modified: when it last wrote, in seconds since 1970.
        seed: None where it has none.
        steps: the last step of any scalar; None without scalars.
        metric: the tag it is judged by, with its `best` and its `last` value; empty and None without one.
        size: bytes.
        problem: what could not be read, as one line.
    """

    run: str
    status: str
    modified: float
    seed: int | None
    steps: int | None
    metric: str
    best: float | None
    last: float | None
    size: int
    problem: str

    def cells(self, now: float) -> tuple[str, ...]:
        """The row as text, one cell for each of `COLUMNS`."""
        numbers = ("" if value is None else f"{value:,}" for value in (self.seed, self.steps))
        values = ("" if value is None else f"{value:.4g}" for value in (self.best, self.last))
        ago = age(self.modified, now) if self.modified else ""
        name, metric = printable(self.run, 200), printable(self.metric, 60) if self.metric else ""
        return name, self.status, ago, *numbers, metric, *values, byte_size(self.size)


def list_runs(
    root: Path, text: str, statuses: Iterable[str], sort: str, reverse: bool, limit: int, as_json: bool
) -> None:
    """Prints the runs below `root` that `text` and `statuses` let through: a table, or lines of tabs in a pipe.

    Args:
        root: the log root.
        text: see `find.matching`; empty for all.
        statuses: which to show; none for all.
        sort: one of `COLUMNS`; names and words from A on, ages from the newest, numbers from the largest.
        reverse: the other way round.
        limit: how many to show; 0 for all, -1 for as many as fit a screen, and all of them in a pipe.
        as_json: a list of objects instead, with numbers that are not rounded.

    Raises:
        UsageError: `root` is no directory.
        DataError: at the end, where a run could not be read.
    """
    terminal = Console(soft_wrap=True, highlight=False)
    wanted = set(statuses)
    runs = [run for run in matching(find_runs(root), text) if not wanted or run.status in wanted]
    most = limit if limit >= 0 else ON_A_SCREEN if terminal.is_terminal and not as_json else 0
    more = max(0, len(runs) - most) if most else 0
    if sort in ("run", "age"):  # then the others need not be read
        runs.sort(key=lambda run: run.name if sort == "run" else -run.modified, reverse=reverse)
        rows = summaries(runs[: len(runs) - more])
    else:
        rows = _sorted(summaries(runs), sort, reverse)[: len(runs) - more]
    now = time.time()
    if as_json:
        terminal.file.write(json.dumps([_plain(row) for row in rows], indent=2) + "\n")
    elif not terminal.is_terminal:
        terminal.file.writelines("\t".join(cells) + "\n" for cells in (COLUMNS, *(row.cells(now) for row in rows)))
    elif rows:
        terminal.print(_table(rows, now, terminal.width))
        if more:
            terminal.print(f"and {more:,} more: --limit 0 shows all")
    else:
        terminal.print(f"no runs in {printable(root, 200)}{' like that' if text or wanted else ''}", markup=False)
    if unread := [row for row in rows if row.problem]:
        rest = f" (and {len(unread) - 1} more runs)" if len(unread) > 1 else ""
        raise DataError(f"{unread[0].problem}{rest}")


def summaries(runs: Sequence[LoggedRun]) -> list[Row]:
    """The rows of `runs`, with a progress bar on a terminal where that takes a while."""
    console = Console(stderr=True)
    quiet = not console.is_terminal or sum(run.size for run in runs) < 50 << 20
    reading = track(runs, "reading", console=console, transient=True, disable=quiet)
    return [summary(run, *read_run(run)) for run in reading]


def read_run(run: LoggedRun) -> tuple[ScalarColumns | None, str]:
    """The scalars of `run` as far as they can be read, and what is wrong with it, as one line; empty for nothing."""
    problem, columns = run.damage, None
    try:
        columns = read_scalars(run.directory)
        if columns.damage:
            lost = sum(damage.length for damage in columns.damage)
            problem = problem or (
                f"{printable(columns.damage[0].path, 200)} is damaged, {lost:,} bytes are lost: rlboard runs repair "
                "recovers the rest"
            )
    except FileNotFoundError:  # no event files
        pass
    except OSError as error:
        problem = problem or f"{printable(error.filename or run.directory, 200)} cannot be read: {error.strerror}"
    return columns, problem


def summary(run: LoggedRun, columns: ScalarColumns | None, problem: str) -> Row:
    """The row of `run`, of which `read_run` has returned `columns` and `problem`; what is not known is left empty."""
    seed = run.facts.get("seed")
    metric, steps = "", None
    best = last = None
    if columns:
        steps = int(columns.step.max())
        metric = headline(run, columns)
        last, best = float(columns[metric].value[-1]), best_point(metric, columns[metric])[0]
    status = "unreadable" if problem and not columns else run.status
    return Row(
        run.name, status, run.modified, seed if isinstance(seed, int) else None, steps, metric, best, last, run.size,
        problem,
    )  # fmt: skip


def headline(run: LoggedRun, columns: Mapping[str, object]) -> str:
    """The tag of `columns` that `run` is judged by: what it says, else what it logs a best of, else a common name."""
    noted = run.facts.get("best")
    said = noted if isinstance(noted, dict) else {}
    bests = [tag.removeprefix("best/") for tag in columns if tag.startswith("best/")]
    return next((tag for tag in (*said, *bests, *HEADLINES) if tag in columns), next(iter(columns)))


def smaller_is_better(tag: str) -> bool:
    """Whether a metric of this name is a loss or an error."""
    return any(word in tag.lower() for word in ("loss", "error"))


def best_point(tag: str, curve: Series) -> tuple[float, int]:
    """The largest finite value of a metric, or the smallest of a loss, and its first step; NaN where none is finite."""
    goodness = np.where(np.isfinite(curve.value), -curve.value if smaller_is_better(tag) else curve.value, -np.inf)
    index = int(np.argmax(goodness))
    return (float(curve.value[index]) if np.isfinite(curve.value[index]) else math.nan), int(curve.step[index])


def _sorted(rows: Iterable[Row], column: str, reverse: bool) -> list[Row]:
    """Words from A on, numbers from the largest; rows without a value, or with NaN, come last either way."""
    known: list[Row] = []
    unknown: list[Row] = []
    for row in rows:
        value = getattr(row, column)
        (unknown if value in ("", None) or value != value else known).append(row)
    numbers = bool(known) and not isinstance(getattr(known[0], column), str)
    return sorted(known, key=lambda row: getattr(row, column), reverse=numbers != reverse) + unknown


def _plain(row: Row) -> dict[str, object]:
    """The row for JSON, which has no NaN."""
    fields = dataclasses.asdict(row)
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in fields.items()
    }


def _table(rows: Sequence[Row], now: float, width: int) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    shown = [column for column in COLUMNS if width >= WIDE or column not in ("seed", "metric", "size")]
    for column in shown:
        right = column in ("age", "seed", "steps", "best", "last", "size")
        table.add_column(column, justify="right" if right else "left", no_wrap=column != "run", overflow="fold")
    for row in rows:
        cells = {column: escape(cell) for column, cell in zip(COLUMNS, row.cells(now), strict=True)}
        if style := STATUS_STYLES.get(row.status):
            cells["status"] = f"[{style}]{row.status}[/]"
        table.add_row(*(cells[column] for column in shown))
    return table
