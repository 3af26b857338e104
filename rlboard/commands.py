"""The commands that train nothing: their options and help alone. What they do is imported when one of them runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

PANEL = "Tools"
LOGDIR = Annotated[Path, typer.Option("--logdir", help="root of all runs", show_default=True)]
JSON = Annotated[bool, typer.Option("--json", help="a list of objects, for scripts")]
NAMES = "a run's path, a part of its name, or a pattern with *"
RUNS = Annotated[list[str] | None, typer.Argument(metavar="RUN", help=f"{NAMES} (default: all)")]
NEWEST = Annotated[list[str] | None, typer.Argument(metavar="RUN", help=f"{NAMES} (default: the newest)")]
Column = StrEnum("Column", ["run", "status", "age", "seed", "steps", "metric", "best", "last", "size"])
Status = StrEnum(
    "Status", ["running", "completed", "pruned", "interrupted", "failed", "killed", "foreign", "unreadable"]
)
Method = StrEnum("Method", ["grid", "random", "tpe"])
Pruner = StrEnum("Pruner", ["none", "median", "hyperband"])
Format = StrEnum("Format", ["csv", "parquet", "json"])
TAGS = Annotated[list[str] | None, typer.Option("--tag", metavar="TAG", help="a tag or a pattern with *; repeatable")]
COMPARED = Annotated[list[str], typer.Argument(metavar="RUN", help=NAMES)]
TRASH = Annotated[
    str, typer.Option("--trash", metavar="DIR", help="the trash (default: .NAME-trash beside the log root NAME)")
]


def add_commands(app: typer.Typer) -> None:
    """Adds `sweep`, `tour`, `dashboard`, `runs …` and `doctor` to the command line."""
    app.command("sweep", rich_help_panel=PANEL)(sweep)
    app.command("tour", rich_help_panel=PANEL)(tour)
    app.command("dashboard", rich_help_panel=PANEL)(dashboard)
    app.command("doctor", rich_help_panel=PANEL)(doctor)
    app.add_typer(runs, name="runs", rich_help_panel=PANEL)


runs = typer.Typer(help="List, show, compare, export, prune and repair runs.", no_args_is_help=True)


def tour(
    log_dir: Annotated[Path, typer.Option(help="root of all runs")] = Path("logs"),
    wav: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="one more sound for the Audio tab"),
    ] = None,
    browser: Annotated[bool, typer.Option("--open", help="open the dashboard at the end")] = False,
) -> int:
    """Fill every TensorBoard tab with short, real runs, each with a note on what to look for.

    About three minutes on two cores, without a network: an agent on CartPole, a convolutional network, a vision
    transformer and a GAN on generated shapes, embeddings of images and words, and explanations of what was learned. The
    runs are called `tour`; in each, the Text tab says of every tab it fills what broken looks like.
    """
    from rlboard.run import check_log_dir
    from rlboard.tour import take

    check_log_dir(str(log_dir))
    code = take(str(log_dir), wav)
    if code == 0 and browser:
        return dashboard(log_dir, text="tour", browser=True)
    if code == 0:
        typer.echo(f"look at it with: rlboard dashboard --logdir={log_dir} --filter=tour --open")
    return code


def sweep(
    loop: Annotated[str, typer.Argument(metavar="LOOP", help="what to run: reinforce, vision/train, …")],
    space: Annotated[
        list[str], typer.Option(metavar="SPACE", help="what is searched: NAME=a,b,c or NAME=a..b[:log]; repeatable")
    ],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="what is fixed; repeatable")
    ] = None,
    method: Annotated[
        Method, typer.Option(help="all combinations; at random; or what did well before (Parzen estimators)")
    ] = Method.tpe,
    trials: Annotated[
        int | None, typer.Option(min=1, max=1_000_000, help="over all machines (default: 20)", show_default=False)
    ] = None,
    pruner: Annotated[Pruner, typer.Option(help="end trials early that fall behind others")] = Pruner.none,
    jobs: Annotated[int, typer.Option(min=1, max=256, help="trials at once, which share the cores")] = 1,
    metric: Annotated[
        str, typer.Option(metavar="TAG", help="scalar whose largest value is searched (default: the loop's headline)")
    ] = "",
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="of what is tried; --set seed=… is the loop's")] = 0,
    study: Annotated[
        str, typer.Option(metavar="NAME", help="the study's name and directory (default: one for each such command)")
    ] = "",
    storage: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="journal:///FILE, FILE.log, sqlite:///FILE or postgresql://USER@HOST/DB "
                     "(default: study.log in the study's directory)"),
    ] = "",
    log_dir: Annotated[Path, typer.Option(help="root of all runs")] = Path("logs"),
) -> int:  # fmt: skip
    """Search the options of a loop, each trial a run of its own.

    rlboard sweep reinforce --space "learning_rate=1e-4..1e-2:log gamma=0.95,0.98,1" --trials 20

    rlboard sweep vision/train --method grid --space "lr=0.03,0.1,0.3 batch_size=64,128" --set "epochs=2 images=5000"

    Names are those of the loop's options or their alias. A range in a grid needs its number of points:
    lr=1e-3..1e-1:log:5. --set also takes preset, smoke, log, save_every and keep. What counts is the largest value of
    the metric in a run; TensorBoard's HParams tab has it as hparam/best, and the last one as hparam/final.

    The same command goes on with a study that was stopped, and with more --trials extends it. Started on several
    machines with one --storage, it shares the trials out. A trial whose process is killed goes on in another, at once
    on the same machine, else when it has given no sign of life for a minute. Keep passwords out of the command: a
    ~/.pgpass file or PGPASSWORD holds them.
    """
    from rlboard.sweep import sweep as run_sweep

    return run_sweep(
        loop,
        space,
        settings or (),
        method=method,
        trials=trials,
        pruner=pruner,
        jobs=jobs,
        metric=metric,
        seed=seed,
        study=study,
        storage=storage,
        log_dir=str(log_dir),
    )


def sweep_of(loop: str) -> Callable[..., int]:
    """The command `sweep` of one loop."""

    def command(**given: Any) -> int:
        return sweep(loop, **given)

    signature = inspect.signature(sweep, eval_str=True)
    command.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[each for name, each in signature.parameters.items() if name != "loop"]
    )
    return command


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
