"""The commands that train nothing: their options and help alone. What they do is imported when one of them runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

LOGDIR = Annotated[Path, typer.Option("--logdir", help="root of all runs", show_default=True)]


def add_commands(app: typer.Typer) -> None:
    """Adds `dashboard`, `runs …` and `doctor` to the command line."""
    app.command("dashboard")(dashboard)
    app.command("doctor")(doctor)
    app.add_typer(runs, name="runs")


runs = typer.Typer(help="List, show, compare, export, prune and repair runs.", no_args_is_help=True)


def dashboard(logdir: LOGDIR = Path("logs")) -> int:
    """TensorBoard on all runs, reloading by itself."""
    raise NotImplementedError


def doctor(logdir: LOGDIR = Path("logs")) -> int:
    """What this machine and installation lack, and how to mend it."""
    raise NotImplementedError
