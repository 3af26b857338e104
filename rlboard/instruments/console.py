"""The terminal: a progress bar for people, plain lines for a pipe, and a table at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from rlboard.events import Event, Events

if TYPE_CHECKING:
    from rlboard.run import Run

UNITS = {"time/fps": "steps/s", "time/images_per_second": "images/s"}


def console(events: Events, run: Run) -> Events:
    """Where the run is and how to look at it, how far it is, and how it ended."""
    terminal = Console(soft_wrap=True, highlight=False)
    goes_on = f", going on at step {run.step:,}" if run.step else ""
    terminal.print(f"{run.loop.command}: logging to {run.directory}{goes_on}", markup=False)
    terminal.print(f"watch it with: rlboard dashboard --logdir={run.options.log_dir}", markup=False)
    latest: dict[str, float] = {}
    show = _bar if terminal.is_terminal else _lines
    for event in show(_noticed(events, terminal), terminal):
        latest.update(event.scalars)
        yield event
    terminal.print(_summary(run, latest))


def _noticed(events: Events, terminal: Console) -> Events:
    for event in events:
        if event.notice:
            terminal.print(event.notice, markup=False)
        yield event


def _lines(events: Events, terminal: Console) -> Events:
    for event in events:
        if event.message or event.headline in event.scalars:
            terminal.print(event.message or _point(event), markup=False)
            terminal.file.flush()
        yield event


def _point(event: Event) -> str:
    return f"step {event.step}/{event.total}, {event.headline} {event.scalars[event.headline]:.4g}"


def progress_bar(terminal: Console) -> Progress:
    """What is going on, how far it is, and how long it takes; nothing where `terminal` is none."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=terminal,
        disable=not terminal.is_terminal,
    )


def _bar(events: Events, terminal: Console) -> Events:
    with progress_bar(terminal) as progress:
        task = progress.add_task("starting", total=None)
        headline, message, latest = "", "", dict[str, float]()
        for event in events:
            headline = event.headline or headline
            latest.update(event.scalars)
            message = event.message or message
            description = _description(headline, latest) or message or "starting"
            progress.update(task, completed=event.step, total=event.total, description=description)
            yield event


def _description(headline: str, latest: Mapping[str, float]) -> str:
    shown = [f"{tag} {latest[tag]:.4g}" for tag in (headline, "Loss/train_step") if tag in latest]
    rates = [f"{latest[tag]:,.0f} {unit}" for tag, unit in UNITS.items() if tag in latest]
    return "  ".join(shown + rates)


def _summary(run: Run, latest: Mapping[str, float]) -> Table:
    table = Table(show_header=False, title=f"{run.loop.command}: {run.status}", title_justify="left")
    for tag, best in run.best.items():
        end = f"{latest[tag]:.4g} at the end, " if tag in latest else ""
        table.add_row(tag, f"{end}best {best['value']:.4g} at step {best['step']:,}")
    for tag, value in latest.items():
        if tag.startswith("eval/") and tag not in run.best:
            table.add_row(tag, f"{value:.4g}")
    if "time/steps" in latest:
        table.add_row("steps", f"{latest['time/steps']:,.0f}")
    table.add_row("time", f"{time.time() - run.began:,.1f} s")
    if run.writer.dropped:
        table.add_row("not logged", f"{run.writer.dropped:,} records")
    table.add_row("logs", str(run.directory))
    return table
