"""The commands that train nothing: their options and help alone. What they do is imported when one of them runs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

PANEL = "Tools"
LOGDIR = Annotated[Path, typer.Option("--logdir", help="root of all runs", show_default=True)]
JSON = Annotated[bool, typer.Option("--json", help="a list of objects, for scripts")]
NAMES = "a run's path, a part of its name, or a pattern with *"
RUNS = Annotated[list[str] | None, typer.Argument(metavar="RUN", help=f"{NAMES} (default: all)")]
NEWEST = Annotated[list[str] | None, typer.Argument(metavar="RUN", help=f"{NAMES} (default: the newest)")]
Column = StrEnum("Column", ["run", "status", "age", "seed", "steps", "metric", "best", "last", "size"])
Status = StrEnum("Status", ["running", "completed", "interrupted", "failed", "killed", "foreign", "unreadable"])
Format = StrEnum("Format", ["csv", "parquet", "json"])
TAGS = Annotated[list[str] | None, typer.Option("--tag", metavar="TAG", help="a tag or a pattern with *; repeatable")]
COMPARED = Annotated[list[str], typer.Argument(metavar="RUN", help=NAMES)]
TRASH = Annotated[
    str, typer.Option("--trash", metavar="DIR", help="the trash (default: .NAME-trash beside the log root NAME)")
]


def add_commands(app: typer.Typer) -> None:
    """Adds `dashboard`, `runs …` and `doctor` to the command line."""
    app.command("dashboard", rich_help_panel=PANEL)(dashboard)
    app.command("doctor", rich_help_panel=PANEL)(doctor)
    app.add_typer(runs, name="runs", rich_help_panel=PANEL)


runs = typer.Typer(help="List, show, compare, export, prune and repair runs.", no_args_is_help=True)


def dashboard(
    logdir: LOGDIR = Path("logs"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="the first port to try; 0: any that is free")] = 6006,
    reload: Annotated[int, typer.Option(min=1, max=3600, help="seconds between two reloads of the page")] = 5,
    smoothing: Annotated[float, typer.Option(min=0, max=0.999, help="of curves, at first")] = 0.6,
    dark: Annotated[bool | None, typer.Option("--dark/--light", help="theme (default: the browser's)")] = None,
    last: Annotated[int | None, typer.Option(min=1, help="only so many runs, the newest", show_default=False)] = None,
    text: Annotated[str, typer.Option("--filter", help="only runs whose names contain this; may have * and ?")] = "",
    browser: Annotated[bool, typer.Option("--open", help="open it in the browser")] = False,
    host: Annotated[str, typer.Option(help="where to listen; others than this machine's need --expose")] = "127.0.0.1",
    expose: Annotated[bool, typer.Option("--expose", help="let others in who have the token that is printed")] = False,
    allowed: Annotated[
        list[str] | None, typer.Option("--allowed-host", metavar="NAME", help="one more name it may be asked by")
    ] = None,
) -> int:
    """TensorBoard on all runs, reloading by itself."""
    from rlboard.dashboard import serve

    return serve(
        logdir,
        port=port,
        reload=reload,
        smoothing=smoothing,
        dark=dark,
        last=last,
        text=text,
        browser=browser,
        host=host,
        expose=expose,
        allowed=allowed or [],
    )


def doctor(
    logdir: LOGDIR = Path("logs"),
    port: Annotated[int, typer.Option(min=1, max=65_535, help="where a dashboard is to be served")] = 6006,
    as_json: JSON = False,
) -> int:
    """What this machine and installation lack, and how to mend it.

    Exit code: 0 where there is no problem (a note is none), else that of the first one: 2 for the installation, 5 for
    the log directory and its disk, 6 for memory.
    """
    from rich.console import Console

    from rlboard.doctor import as_json as json_of
    from rlboard.doctor import diagnose, exit_code, show

    with Console(stderr=True).status("importing torch, measuring the disk", spinner="line"):
        findings = dict(diagnose(logdir, port))
    if as_json:
        typer.echo(json_of(findings))
    else:
        show(findings, Console())
    return exit_code(findings)


@runs.command("list")
def list_runs(
    logdir: LOGDIR = Path("logs"),
    text: Annotated[str, typer.Option("--filter", help="a part of the name, or a pattern with *")] = "",
    status: Annotated[list[Status] | None, typer.Option(help="only these; can be given several times")] = None,
    sort: Annotated[Column, typer.Option(help="the newest, largest or alphabetically first on top")] = Column.age,
    reverse: Annotated[bool, typer.Option("--reverse", help="the other way round")] = False,
    limit: Annotated[int, typer.Option(min=-1, help="rows; 0 for all, -1 for 100 on a screen and all in a pipe")] = -1,
    as_json: JSON = False,
) -> None:
    """All runs, a row each: how it ended, how far it came, its best and its last result.

    A run is `running` while its process holds its lock, `killed` if it ended without saying so, and `foreign` if other
    software wrote it. The metric is the one that its loop is judged by. In a pipe the columns are separated by tabs.
    """
    from rlboard.runs import table

    table.list_runs(logdir, text, status or (), sort, reverse, limit, as_json)


@runs.command("show")
def show_runs(names: NEWEST = None, logdir: LOGDIR = Path("logs"), as_json: JSON = False) -> None:
    """Everything about a run: command, options, versions, and how each of its curves went."""
    from rlboard.runs import show

    show.show_runs(logdir, names or (), as_json)


@runs.command("prune")
def prune(
    names: RUNS = None,
    logdir: LOGDIR = Path("logs"),
    older_than: Annotated[
        str, typer.Option(metavar="AGE", help="whose newest file is older, such as 30d; h: hours, d: days, w: weeks")
    ] = "",
    failed: Annotated[bool, typer.Option("--failed", help="that failed, were interrupted or killed")] = False,
    keep_best: Annotated[
        int | None,
        typer.Option(min=1, metavar="K", help="but never the K best of each loop and task", show_default=False),
    ] = None,
    trash: TRASH = "",
    yes: Annotated[bool, typer.Option("--yes", help="do it; without it is only shown what would be done")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="put the runs of the newest prune back")] = False,
    empty_trash: Annotated[bool, typer.Option("--empty-trash", help="delete for good what is in the trash")] = False,
) -> int:
    """Move runs to a trash: those that meet all conditions given, which add up.

    Nothing is done without --yes, and --undo takes it back. A run goes with its whole directory, a group with all its
    seeds. Neither the log root, nor what a process may still write to, nor anything behind a symbolic link is moved; a
    run of other software counts as written to for an hour. The best are told by the metric in `run.json`, among runs of
    one loop and one `env_id` or `data`.
    """
    from rlboard.errors import UsageError
    from rlboard.runs import prune as pruning

    conditions = (names, older_than, failed, keep_best)
    if undo or empty_trash:
        if any(conditions) or (undo and (empty_trash or yes)):
            raise UsageError(f"--{'undo' if undo else 'empty-trash'} takes no runs and no conditions: give it alone")
        return pruning.undo_prune(logdir, trash) if undo else pruning.empty_trash(logdir, trash, yes)
    return pruning.prune_runs(logdir, pruning.Conditions(tuple(names or ()), older_than, failed, keep_best), trash, yes)


@runs.command("repair")
def repair(
    names: RUNS = None,
    logdir: LOGDIR = Path("logs"),
    trash: TRASH = "",
    yes: Annotated[bool, typer.Option("--yes", help="do it; without it is only shown what is damaged")] = False,
) -> int:
    """Recover every record with a valid checksum from damaged event files.

    Nothing is done without --yes. The originals are kept in the trash of `rlboard runs prune`, until that is emptied.
    Runs that a process may still write to are left alone. Exit code: 0 where all is well or mended, 3 where it is not.
    """
    from rlboard.runs.repair import repair_runs

    return repair_runs(logdir, names or (), trash, yes)


@runs.command("export")
def export_runs(
    names: RUNS = None,
    logdir: LOGDIR = Path("logs"),
    tags: TAGS = None,
    extension: Annotated[Format, typer.Option("--format", help="of both files")] = Format.csv,
    output: Annotated[str, typer.Option(help="directory of the files; - for scalars to standard output")] = ".",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace files that are there")] = False,
) -> int:
    """Runs as tables for other software: `scalars`, a row a point, and `runs`, a row a run.

    `scalars` has the columns run, tag, step, wall_time (seconds since 1970) and value, sorted by run and tag and then
    as they were logged; what a resumed run logged twice is there twice. `runs` has status, seed, the configuration, and
    the last value of each metric. Files appear whole or not at all. NaN and infinity are null in JSON.
    """
    from rlboard.runs import export

    return export.export_runs(logdir, names or (), output, extension, tags or (), overwrite)


@runs.command("compare")
def compare_runs(
    names: COMPARED,
    logdir: LOGDIR = Path("logs"),
    tags: TAGS = None,
    figure: Annotated[Path | None, typer.Option(help="draw curves: a .png, .svg or .pdf, replaced if there")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="an object, for scripts")] = False,
) -> int:
    """Runs side by side: the options that differ, the last and the best value of their metrics, and their curves.

    Runs that differ only in their seed, and a group of seeds, are one column: the mean and its 95 % bootstrap interval.
    The best is the largest value; of a loss or an error, the smallest. Without --tag, metrics are those that the runs
    are judged by. A band in the figure ends where the first of its seeds ends; where seeds logged at different steps it
    is interpolated linearly.
    """
    from rlboard.runs import compare

    return compare.compare_runs(logdir, names, tags or (), figure, as_json)
