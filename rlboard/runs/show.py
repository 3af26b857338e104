"""One run in full: what ran with which options, how each of its curves went, which files it left."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from rlboard.config import Value, printable
from rlboard.errors import DataError, UsageError
from rlboard.eventfile import Series
from rlboard.registry import SourceError, find_loop
from rlboard.runs.find import LoggedRun, find_runs, select
from rlboard.runs.output import age, byte_size
from rlboard.runs.table import best_point, read_run, smaller_is_better, summary

BLOCKS = "▁▂▃▄▅▆▇█"
SPARKLINE_WIDTH = 24
FACTS = ("command", "device", "git_commit", "weights_sha256", "dropped_records")
"""Entries of `run.json` that are shown as they are, where they say something."""


def show_runs(root: Path, names: Iterable[str], as_json: bool) -> None:
    """Prints everything about the runs that `names` mean, the newest for none; as JSON, `run.json` and the metrics.

    Raises:
        UsageError: `root` is no directory, or, at the end, a name means no run or several.
        DataError: at the end, where something of a run could not be read.
    """
    terminal = Console(highlight=False)
    found = find_runs(root)
    if not found:
        raise UsageError(f"there are no runs in --logdir {printable(root, 200)}")
    newest = max(found, key=lambda run: run.modified)
    runs, complaints = select(found, list(names) or [newest.name])
    problems: list[str] = []
    described: list[dict[str, Any]] = []
    for run in runs:
        columns, problem = read_run(run)
        curves: Mapping[str, Series] = columns or {}
        problems += [problem] if problem else []
        if as_json:
            row = summary(run, columns, problem)
            metrics = {tag: _metric(tag, curve) for tag, curve in curves.items()}
            described.append({"run": run.name, **run.facts, "status": row.status, "metrics": metrics})
        else:
            terminal.print(_page(run, curves), soft_wrap=not terminal.is_terminal)
    if as_json:
        terminal.file.write(json.dumps(described, indent=2, ensure_ascii=False) + "\n")
    if complaints:
        raise UsageError("; ".join(complaints))
    if problems:
        raise DataError("; ".join(problems))


def _page(run: LoggedRun, curves: Mapping[str, Series]) -> RenderableType:
    parts: list[RenderableType] = [f"[bold]{escape(printable(run.name, 200))}[/]", _facts(run)]
    if run.config:
        parts += ["", _options(run)]
    if curves:
        parts += ["", _metrics(curves)]
    return Group(*parts, "", _files(run), "")


def _facts(run: LoggedRun) -> Table:
    table = Table.grid(padding=(0, 2))
    rows: dict[str, Any] = {
        "status": run.status,
        "loop": run.loop,
        "last written": f"{age(run.modified, time.time())} ago",
    }
    rows |= dict(_times(run.facts))
    rows |= {name: run.facts[name] for name in FACTS if run.facts.get(name)}
    for name in ("versions", "results"):
        if isinstance(values := run.facts.get(name), dict):
            rows[name] = ", ".join(f"{key} {_number(value)}" for key, value in values.items())
    for name, value in rows.items():
        words = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        table.add_row(name.replace("_", " "), escape(printable(words, 500)))
    return table


def _times(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """When the run started, in local time, and how long it took."""
    try:
        started = datetime.fromisoformat(facts["started"])
        yield "started", f"{started.astimezone():%Y-%m-%d %H:%M:%S}"
        took = (datetime.fromisoformat(facts["ended"]) - started).total_seconds()
        yield "took", f"{took:,.1f} s"
    except (KeyError, TypeError, ValueError):  # it runs still, was killed, or was logged by something else
        return


def _options(run: LoggedRun) -> Table:
    """The configuration; what is not the default is bold, with the default beside it."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("option", "value", "default"):
        table.add_column(title, overflow="fold")
    defaults = _defaults(run.loop)
    for name, value in run.config.items():
        words = escape(printable(value, 200))
        changed = name in defaults and defaults[name] != value
        default = printable(defaults[name], 200) if changed else ""
        table.add_row(escape(printable(name)), f"[bold]{words}[/]" if changed else words, escape(default))
    return table


def _defaults(loop: str) -> dict[str, Value]:
    """The defaults of a loop's options; none where the loop is not here."""
    try:
        return find_loop(loop).defaults()
    except (KeyError, SourceError):
        return {}


def _metrics(curves: Mapping[str, Series]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("metric", "points", "last step", "last", "best", "at step", ""):
        table.add_column(title, justify="left" if title in ("metric", "") else "right", overflow="fold")
    for tag, curve in curves.items():
        metric = _metric(tag, curve)
        numbers = (
            f"{metric['points']:,}",
            f"{metric['last_step']:,}",
            _number(metric["last"]),
            _number(metric["best"]),
        )
        best_step = "" if metric["best_step"] is None else f"{metric['best_step']:,}"
        table.add_row(escape(printable(tag, 80)), *numbers, best_step, sparkline(curve.value))
    return table


def _metric(tag: str, curve: Series) -> dict[str, Any]:
    """What a curve comes to, for JSON: None where there is no finite value."""
    last, (best, best_step) = float(curve.value[-1]), best_point(tag, curve)
    known = math.isfinite(best)
    return {
        "points": len(curve.step),
        "last_step": int(curve.step[-1]),
        "last": last if math.isfinite(last) else None,
        "best": best if known else None,
        "best_step": best_step if known else None,
        "smaller_is_better": smaller_is_better(tag),
    }


def sparkline(values: NDArray[Any], width: int = SPARKLINE_WIDTH) -> str:
    """A curve as a line of block letters: the means of at most `width` equal stretches; a gap where none is finite."""
    finite = np.where(np.isfinite(values), values.astype(np.float64), np.nan)
    stretches = [part[~np.isnan(part)] for part in np.array_split(finite, min(width, len(finite)))]
    means = np.array([part.mean() if len(part) else np.nan for part in stretches])
    if np.isnan(means).all():
        return ""
    low, high = np.nanmin(means), np.nanmax(means)
    levels = (means - low) / (high - low) * (len(BLOCKS) - 1) if high > low else np.where(np.isnan(means), np.nan, 0.0)
    return "".join(" " if np.isnan(level) else BLOCKS[round(level)] for level in levels)


def _files(run: LoggedRun) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(f"files in {escape(printable(run.directory, 200))}", overflow="fold")
    table.add_column(byte_size(run.size), justify="right", no_wrap=True)
    for path in sorted(run.directory.iterdir()) if not run.problem else ():
        if path.is_file():
            table.add_row(escape(printable(path.name, 200)), byte_size(path.stat().st_size))
    return table


def _number(value: object) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
