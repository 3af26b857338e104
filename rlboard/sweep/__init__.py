"""`rlboard sweep LOOP`: many runs of a loop with different options, to find the best ones.

Optuna chooses what is tried and keeps the study. Each trial is a run of its own below the study's directory,
`logs/<loop>/<study>/trial007`, with its own checkpoint, hyperparameters and curves.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterable
from pathlib import Path

from rlboard.config import Option, Value, options_of, printable
from rlboard.errors import RlboardError, UsageError
from rlboard.registry import TRACKS, Loop, Track, find_loop
from rlboard.run import RunOptions, Stop, check_log_dir, check_run_name, directory_of, signals
from rlboard.runs.find import nearest
from rlboard.sweep.plan import Sweep, identity_of
from rlboard.sweep.space import combinations, parse_settings, parse_space
from rlboard.sweep.storage import check_installed, hidden

TRIALS = 20
"""Of a search that is no grid, unless told otherwise."""
PLUMBING = ("preset", "smoke", "log", "save_every", "keep")
"""The options of every run that --set may fix beside those of the loop."""


def sweep(
    loop: str,
    space: Iterable[str],
    settings: Iterable[str] = (),
    *,
    method: str = "tpe",
    trials: int | None = None,
    pruner: str = "none",
    jobs: int = 1,
    metric: str = "",
    seed: int = 0,
    study: str = "",
    storage: str = "",
    log_dir: str = "logs",
    tracks: Iterable[Track] = TRACKS,
) -> int:
    """Runs or goes on with a sweep, with the options of the command; returns the exit code.

    Raises:
        RlboardError: what cannot be used, before anything is run; or why no trial has a result.
    """
    planned, command = plan(
        loop,
        space,
        settings,
        method=method,
        trials=trials,
        pruner=pruner,
        jobs=jobs,
        metric=metric,
        seed=seed,
        study=study,
        storage=storage,
        log_dir=log_dir,
        tracks=tracks,
    )
    return execute(planned, command)


def plan(
    loop: str,
    space: Iterable[str],
    settings: Iterable[str],
    *,
    method: str,
    trials: int | None,
    pruner: str,
    jobs: int,
    metric: str,
    seed: int,
    study: str,
    storage: str,
    log_dir: str,
    tracks: Iterable[Track],
) -> tuple[Sweep, list[str]]:
    """The sweep that the command's options ask for, and the command as it can be typed again, without a password.

    Raises:
        UsageError: an option cannot be used.
    """
    check_installed()
    check_log_dir(log_dir)
    check_run_name(study, "--study")
    known = _loop(loop, tracks)
    plumbing = tuple(option for option in options_of(RunOptions) if option.name in PLUMBING)
    dimensions = parse_space(space, known.options, grid=method == "grid")
    fixed = parse_settings(settings, (*known.options, *plumbing))
    if both := [dimension.name for dimension in dimensions if dimension.name in fixed]:
        raise UsageError(f"{both[0]} is in --space and in --set: search it or fix it")
    if method == "grid":
        if trials is not None:
            raise UsageError("--trials is not for --method grid, which tries all combinations: leave it out")
        trials = len(combinations(dimensions))
    options = _run_options(known, plumbing, fixed, log_dir)
    values = known.defaults(options.preset, smoke=options.smoke)
    values |= {name: value for name, value in fixed.items() if name in values}
    _check_arguments(known, {**values, **{dimension.name: "given" for dimension in dimensions}})
    identity = identity_of(known, dimensions, fixed, method, metric)
    name = study or f"sweep-{hashlib.sha256(json.dumps([identity, seed]).encode()).hexdigest()[:6]}"
    directory = directory_of(known, log_dir) / name
    address = storage or str(directory / "study.log")
    planned = Sweep(
        loop=known,
        space=dimensions,
        values=values,
        fixed=fixed,
        options=options,
        method=method,
        pruner=pruner,
        trials=trials or TRIALS,
        jobs=jobs,
        metric=metric,
        seed=seed,
        name=name,
        directory=str(directory),
        storage=address,
    )
    words = [f"--space={' '.join(map(str, dimensions))}"]
    words += [f"--set={shlex.join(f'{key}={value}' for key, value in fixed.items())}"] if fixed else []
    words += [f"--method={method}", f"--seed={seed}", f"--study={name}"]
    words += [f"--trials={planned.trials}"] if method != "grid" else []
    words += [f"--pruner={pruner}"] if pruner != "none" else []
    words += [f"--metric={metric}"] if metric else []
    words += [f"--storage={hidden(storage)}"] if storage else []
    return planned, ["rlboard", "sweep", loop, *words]


def _loop(name: str, tracks: Iterable[Track]) -> Loop:
    """The loop that a user means by `reinforce`, `vision/train` or the name that `run.json` has."""
    typed = {
        str(Path(track.group, path.stem)).replace("_", "-"): f"{track.package}/{path.stem}"
        for track in tracks
        for path in track.files()
    }
    wanted = typed.get(name.replace("_", "-"), name)
    if wanted not in typed.values():
        raise UsageError(
            f"LOOP {printable(name)} is no loop: {nearest(name, list(typed))}; there is {', '.join(typed)}"
        )
    return find_loop(wanted, tracks)


def _run_options(loop: Loop, plumbing: Iterable[Option], fixed: dict[str, Value], log_dir: str) -> RunOptions:
    """The plumbing of every trial, with what of it is fixed; scalars and hyperparameters alone unless it is said."""
    chosen = {option.name: fixed[option.name] for option in plumbing if option.name in fixed}
    if chosen.get("preset", "") not in ("", *loop.presets):
        known = ", ".join(loop.presets) or "none"
        raise UsageError(f"--set preset={printable(chosen['preset'])} is no preset of {loop.command}: there is {known}")
    return RunOptions(**{"log": "minimal", "log_dir": log_dir, "keep": 1, **chosen})  # type: ignore[arg-type]


def _check_arguments(loop: Loop, values: dict[str, Value]) -> None:
    for option in loop.options:
        if option.argument and option.required and values[option.name] == option.default:
            raise UsageError(f"{loop.command} needs {option.flag}: give it as --set {option.name}=…")


def execute(sweep: Sweep, command: list[str]) -> int:
    """Runs what is left of a sweep, reports, and returns the exit code.

    Raises:
        StorageError: the study's storage does not answer, or a run cannot be written.
        UsageError: the study is another, or the loop does not log what is searched.
        RlboardError: no trial has a result: why the first one has none.
    """
    from optuna.trial import TrialState
    from rich.console import Console

    from rlboard.sweep.crew import supervise
    from rlboard.sweep.report import report

    terminal, stop = Console(soft_wrap=True, highlight=False), Stop()
    ledger = sweep.open()
    terminal.print(f"sweep: {sweep.trials:,} trials below {sweep.directory}", markup=False)
    terminal.print(f"watch them with: rlboard dashboard --logdir={sweep.directory}", markup=False)
    with signals(stop):
        supervise(sweep, ledger, stop, terminal)
    results = dict(ledger.slots().finished())
    report(sweep, ledger, results, command, terminal)
    if stop.number:
        terminal.print(f"stopped after {len(results):,} of {sweep.trials:,} trials: the same command goes on")
    elif all(trial.state == TrialState.FAIL for trial in results.values()):
        notes = results[0].user_attrs
        code = notes.get("exit_code", RlboardError.exit_code)
        kind = next((each for each in RlboardError.__subclasses__() if each.exit_code == code), RlboardError)
        raise kind(f"none of {len(results):,} trials has a result; the first: {notes.get('reason', 'was killed')}")
    return stop.exit_code
