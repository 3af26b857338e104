"""Runs side by side: the options in which they differ, and what came of it.

Runs that differ only in their seed, and the members of a group of seeds, are one column: their mean with its 95 %
bootstrap interval.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlboard.config import printable
from rlboard.errors import DataError, UsageError
from rlboard.eventfile import ScalarColumns, Series
from rlboard.runs.find import LoggedRun
from rlboard.runs.read import Column, Reader, find_some, foreign_config, matches, unknown_tags
from rlboard.runs.table import best_point, headline
from rlboard.statistics import interval

FIGURES = (".png", ".svg", ".pdf")
MOST_COLUMNS = 24
"""In tables; more are for scripts."""
LABEL_WIDTH, CELL_WIDTH = 24, 18
"""Characters that a table's first column and each of the others get: more columns begin another table."""
NOTHING = "–"


@dataclass(frozen=True)
class Estimate:
    """A number of each run of a column: their mean, and the ends of its 95 % interval; of a single run all are equal.

    `step` is where it was seen, the median over the runs.
    """

    mean: float
    lower: float
    upper: float
    step: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float], steps: Sequence[int]) -> Estimate:
        if len(values) == 1:
            return cls(values[0], values[0], values[0], steps[0], 1)
        lower, upper = interval(np.array(values))
        return cls(float(np.mean(values)), float(lower), float(upper), float(np.median(steps)), len(values))

    def __str__(self) -> str:
        return f"{self.mean:.4g}" + (f" ({self.lower:.4g} to {self.upper:.4g})" if self.runs > 1 else "")

    def plain(self) -> dict[str, float | None]:
        """For JSON, which has no NaN and no infinity."""
        return {name: value if math.isfinite(value) else None for name, value in vars(self).items()}


def compare_runs(root: Path, names: Sequence[str], tags: Sequence[str], figure: Path | None, as_json: bool) -> int:
    """Prints tables of the runs below `root` that `names` mean and draws their curves; returns the exit code.

    Args:
        root: the log root.
        names: see `find.select`.
        tags: only tags that are, or fit, one of these; for none, those by which the runs are judged.
        figure: where to draw the curves, as its ending says; what is there is replaced.
        as_json: an object instead of tables, with numbers that are not rounded.

    Raises:
        UsageError: `root` or `figure` cannot be used, or no tag matches.
        DataError: there are no runs, or they have no scalars.
        StorageError: `figure` cannot be written.
    """
    if figure and figure.suffix.lower() not in FIGURES:
        raise UsageError(f"--figure {printable(figure, 200)} does not end in {', '.join(FIGURES)}: give one that does")
    reader = Reader()
    runs = find_some(root)
    columns = columns_of(reader.choose(runs, names), runs)
    if not columns:
        return reader.exit_code
    left_out = 0 if as_json else max(0, len(columns) - MOST_COLUMNS)
    columns = read_columns(columns[: len(columns) - left_out], reader)
    chosen = choose_tags(columns, tags, reader)
    if as_json:
        sys.stdout.write(json.dumps(as_object(columns, chosen), indent=2, allow_nan=False) + "\n")
    else:
        show(columns, chosen, left_out)
    if figure:
        from rlboard.runs.figure import draw

        undrawn = draw(columns, chosen, figure)
        said = sys.stderr if as_json else sys.stdout
        said.write(f"figure: {printable(figure, 200)}{f', without {undrawn}' if undrawn else ''}\n")
    return reader.exit_code


def columns_of(chosen: Sequence[LoggedRun], runs: Sequence[LoggedRun]) -> list[Column]:
    """The columns that the `chosen` ones of all `runs` make, in the order of the first run of each."""
    members = {run.name: found for run in chosen if (found := _members(run, runs))}
    taken = {member.name for found in members.values() for member in found}
    parts: list[list[LoggedRun]] = []
    alike: dict[str, list[tuple[list[LoggedRun], set[str]]]] = {}
    for run in chosen:
        seed = _spelled(_config(run).get("seed"))
        if run.name in members:
            parts.append([run])
        elif run.name in taken:
            continue
        elif seed == "null":
            parts.append([run])
        else:
            same = alike.setdefault(_spelled(_all_but_seed(run)), [])
            part, seeds = next((each for each in same if seed not in each[1]), ([], set()))
            if not part:
                parts.append(part)
                same.append((part, seeds))
            part.append(run)
            seeds.add(seed)
    leaves = [_leaf(part[0]) for part in parts]
    columns = []
    for part, leaf in zip(parts, leaves, strict=True):
        name = leaf if leaves.count(leaf) == 1 else part[0].name
        of_group = members.get(part[0].name)
        if of_group:
            name = f"{name} ({len(of_group)} seeds)"
        elif len(part) > 1:
            name = f"{re.sub('-seed[0-9]+$', '', name)} ({len(part)} seeds)"
        columns.append(Column(printable(name, 100), tuple(of_group or part)))
    return columns


def _members(group: LoggedRun, runs: Sequence[LoggedRun]) -> list[LoggedRun]:
    """The runs of the seeds of `group`, none if it is no group."""
    if not isinstance(group.facts.get("seeds"), list):
        return []
    above = "" if group.name == "." else group.name
    below = [run for run in runs if run.name.rpartition("/")[0] == above and run.name != group.name]
    return sorted((run for run in below if run.loop == group.loop), key=lambda run: _number(run.facts.get("seed")))


def _number(seed: object) -> float:
    return seed if isinstance(seed, int | float) else math.inf


def _leaf(run: LoggedRun) -> str:
    return run.name.rpartition("/")[2]


@cache
def _config(run: LoggedRun) -> dict[str, Any]:
    return run.config if run.facts else foreign_config(run)


def _options(run: LoggedRun) -> dict[str, Any]:
    return {"loop": run.loop or None, **_config(run)}


def _circumstances(run: LoggedRun) -> dict[str, Any]:
    """What else results may depend on."""
    facts = run.facts
    versions = facts.get("versions")
    return {
        "status": run.status,
        "device": facts.get("device"),
        "git_commit": facts.get("git_commit"),
        **(versions if isinstance(versions, dict) else {}),
    }


def _all_but_seed(run: LoggedRun) -> list[dict[str, Any]]:
    return [_options(run) | {"seed": None}, _circumstances(run) | {"status": None}]


def _spelled(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def read_columns(columns: Sequence[Column], reader: Reader) -> list[Column]:
    """The columns with their curves."""
    every = [run for column in columns for run in column.runs]
    curves = {run.name: _curves(files) for run, files in reader.each(every)}
    return [replace(column, curves=tuple(curves[run.name] for run in column.runs)) for column in columns]


def _curves(files: Sequence[ScalarColumns]) -> dict[str, Series]:
    """The scalars of a run's files, one behind the other."""
    curves: dict[str, Series] = {}
    for columns in files:
        for tag, series in columns.items():
            earlier = [curves[tag]] if tag in curves else []
            curves[tag] = Series(*(np.concatenate(parts) for parts in zip(*earlier, series, strict=True)))
    return curves


def choose_tags(columns: Sequence[Column], patterns: Sequence[str], reader: Reader) -> list[str]:
    """The tags that `patterns` match; for no patterns, those that the runs are judged by.

    Raises:
        UsageError: nothing matches.
        DataError: there are no scalars.
    """
    read = [(run, curves) for column in columns for run, curves in zip(column.runs, column.curves, strict=True)]
    known = sorted({tag for _, curves in read for tag in curves})
    if not known:
        raise DataError("there is nothing to compare: these runs have no scalars")
    if not patterns:
        return list(dict.fromkeys(headline(run, curves) for run, curves in read if curves))
    complaints = unknown_tags(patterns, known)
    if len(complaints) == len(patterns):
        raise complaints[0]
    for complaint in complaints:
        reader.complain(complaint)
    return [tag for tag in known if matches(tag, patterns)]


def differences(
    columns: Sequence[Column], facts_of: Callable[[LoggedRun], Mapping[str, Any]]
) -> dict[str, list[list[Any]]]:
    """What is not equal in all columns: its name to the values in each column, each value once."""
    facts = [[facts_of(run) for run in column.runs] for column in columns]
    names = dict.fromkeys(name for column in facts for each in column for name in each)
    values = {
        name: [list({_spelled(each.get(name)): each.get(name) for each in column}.values()) for column in facts]
        for name in names
    }
    return {name: each for name, each in values.items() if len({_spelled(column) for column in each}) > 1}


def last_and_best(column: Column, tag: str) -> tuple[Estimate, Estimate] | None:
    """The last and the best value of `tag`, the smallest for a loss and else the largest; None where there is none."""
    curves = column.of(tag)
    if not curves:
        return None
    last = [(float(curve.value[-1]), int(curve.step[-1])) for curve in curves]
    best = [best_point(tag, curve) for curve in curves]
    return Estimate.of(*zip(*last, strict=True)), Estimate.of(*zip(*best, strict=True))


def as_object(columns: Sequence[Column], tags: Sequence[str]) -> dict[str, Any]:
    """The comparison for `json.dumps`; every list has an entry a column."""
    metrics = {tag: [last_and_best(column, tag) for column in columns] for tag in tags}
    return {
        "columns": [{"name": column.name, "runs": [run.name for run in column.runs]} for column in columns],
        "options": differences(columns, _options),
        "circumstances": differences(columns, _circumstances),
        "metrics": {
            tag: [found and {"last": found[0].plain(), "best": found[1].plain()} for found in each]
            for tag, each in metrics.items()
        },
    }


def show(columns: Sequence[Column], tags: Sequence[str], left_out: int) -> None:
    """Prints the comparison as tables, as many columns side by side as the terminal is wide."""
    terminal = Console(highlight=False)
    blocks = {
        "options that differ": differences(columns, _options),
        "circumstances that differ": differences(columns, _circumstances),
    }
    found = [[last_and_best(column, tag) for column in columns] for tag in tags]
    several = any(len(column.runs) > 1 for column in columns)
    beside = max(1, (terminal.width - LABEL_WIDTH) // CELL_WIDTH)
    for start in range(0, len(columns), beside):
        part = slice(start, start + beside)
        names = [column.name for column in columns[part]]
        for title, values in blocks.items():
            if values:
                rows = [(name, [_listed(column) for column in each[part]]) for name, each in values.items()]
                _print(terminal, title, names, rows)
        rows = []
        for tag, each in zip(tags, found, strict=True):
            rows.append((tag, [NOTHING if not pair else f"last {pair[0]}" for pair in each[part]]))
            rows.append(("", ["" if not pair else f"best {pair[1]} at {pair[1].step:,.0f}" for pair in each[part]]))
        _print(terminal, "metrics", names, rows)
    if several:
        terminal.print(
            "Several seeds: the mean (its 95 % bootstrap interval), and the median of the steps of the best."
        )
    if left_out:
        terminal.print(f"{left_out:,} more columns are left out: name fewer runs, or give --json for all.")


def _print(terminal: Console, title: str, names: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> None:
    terminal.print(Text(title, style="bold"))
    table = Table()
    table.add_column("", overflow="fold")
    for name in names:
        table.add_column(Text(name), overflow="fold")
    for label, cells in rows:
        table.add_row(Text(printable(label, 100) if label else ""), *map(Text, cells))
    terminal.print(table)


def _listed(values: Sequence[Any]) -> str:
    """Values in one cell; whole numbers without gaps, such as seeds, as a range."""
    if len(values) > 2 and all(type(value) is int for value in values):
        numbers = sorted(values)
        if numbers[-1] - numbers[0] == len(numbers) - 1:
            return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(NOTHING if value is None else printable(value, CELL_WIDTH * 3) for value in values)
