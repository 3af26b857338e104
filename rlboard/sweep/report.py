"""What a sweep has found: on the terminal, and as a run `study` beside its trials."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.table import Table

from rlboard.config import printable
from rlboard.events import Event, Events
from rlboard.instruments.drawing import pixels
from rlboard.instruments.tabs import images, more_text, scalars
from rlboard.run import Stop, open_run, pull
from rlboard.sweep.crew import reason, short
from rlboard.sweep.ledger import Ledger
from rlboard.sweep.plan import Sweep
from rlboard.sweep.space import Dimension
from rlboard.sweep.worker import command_of, overwriting, trial_name

STUDY = "study"
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#999999"
"""Of Okabe and Ito's colours, which colour-blind people tell apart."""

Results = Mapping[int, FrozenTrial]
"""The trials that have ended, by their slots."""


def report(sweep: Sweep, ledger: Ledger, results: Results, command: list[str], terminal: Console) -> None:
    """Prints the best trial and how much each option mattered, and writes the study's run. Raises StorageError."""
    complete = {slot: trial for slot, trial in results.items() if trial.state == TrialState.COMPLETE}
    if not complete:
        return
    slot = max(complete, key=lambda slot: (complete[slot].value or 0.0, -slot))
    best = complete[slot]
    weights = importances(ledger.study, sweep.space)
    terminal.print(_table(sweep, slot, best, weights))
    alone = " ".join(command_of(sweep, dict(best.params)))
    terminal.print(f"run it alone with: {alone}", markup=False)
    directory = Path(sweep.directory)
    resumption = overwriting(directory / STUDY, dict(sweep.values))
    if resumption is None and (directory / STUDY).exists():
        return  # another process writes the same at this moment
    config = sweep.loop.load().Config(**{**sweep.values, **best.params})
    opened = open_run(
        sweep.loop,
        config,
        sweep.options,
        command,
        stop=Stop(),
        ending=STUDY,
        group=sweep.directory,
        resumption=resumption,
    )
    with opened as run:
        run.findings["study"] = {"name": sweep.name, "best_trial": slot, "importances": weights}
        pull(_events(sweep, results, slot, weights), run, (images, more_text, scalars))


def importances(study: optuna.Study, space: Sequence[Dimension]) -> dict[str, float]:
    """The share of each option in the differences between the trials, by fANOVA, the largest first.

    Empty where there are too few trials, or no differences, to tell. F. Hutter et al., "An efficient approach for
    assessing hyperparameter importance", ICML 2014.
    """
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < 2 or len({trial.value for trial in complete}) < 2:
        return {}
    names = [dimension.name for dimension in space]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        return optuna.importance.get_param_importances(study, evaluator=evaluator, params=names)


def _table(sweep: Sweep, slot: int, best: FrozenTrial, weights: Mapping[str, float]) -> Table:
    metric = best.user_attrs["metric"]
    where = Path(sweep.directory, str(best.user_attrs["run"]))
    table = Table("option", "best", "importance", title=f"{metric} {best.value:.4g} in trial {slot}, {where}")
    table.title_justify = "left"
    names = [*weights, *(dimension.name for dimension in sweep.space if dimension.name not in weights)]
    for name in names:
        table.add_row(name, short(best.params[name]), f"{weights[name]:.1%}" if name in weights else "")
    return table


def _events(sweep: Sweep, results: Results, best: int, weights: Mapping[str, float]) -> Events:
    """The trials in the order in which they ended, and last the figures and the table of all."""
    ended = sorted(results, key=lambda slot: (results[slot].datetime_complete is None, results[slot].datetime_complete))
    so_far = -np.inf
    complete = [slot for slot in ended if results[slot].state == TrialState.COMPLETE]
    for step, slot in enumerate(complete, start=1):
        value = results[slot].value or 0.0
        so_far = max(so_far, value)
        yield Event(step, len(complete) + 1, {"sweep/value": value, "sweep/best": float(so_far)})
    metric = results[best].user_attrs["metric"]
    pictures = {"sweep/history": partial(history, [results[slot] for slot in ended], metric)}
    pictures["sweep/slices"] = partial(slices, list(results.values()), sweep.space, metric)
    if weights:
        pictures["sweep/importances"] = partial(importance_bars, weights)
    texts = {"sweep/trials": partial(trial_table, results, sweep.space)}
    yield Event(len(complete) + 1, len(complete) + 1, images=pictures, texts=texts)


def trial_table(results: Results, space: Sequence[Dimension]) -> str:
    """All trials as a Markdown table, the best first."""
    names = [dimension.name for dimension in space]
    columns = ["trial", *names, "best", "final", "how it ended"]
    rows = []
    for slot, trial in sorted(results.items(), key=lambda pair: (-_value(pair[1]), pair[0])):
        notes = trial.user_attrs
        numbers = [f"{notes[key]:.6g}" if notes.get(key) is not None else "" for key in ("best", "final")]
        ending = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned"}.get(trial.state)
        said = ending or f"failed: {printable(reason(trial), 200)}".replace("|", "\\|")
        cells = [trial_name(slot), *(str(trial.params.get(name, "")).replace("|", "\\|") for name in names)]
        rows.append(f"| {' | '.join([*cells, *numbers, said])} |")
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *rows])


def history(trials: Sequence[FrozenTrial], metric: str) -> NDArray[np.uint8]:
    """The value of each trial in the order in which they ended, and the best so far."""
    figure = Figure((8, 4.2), layout="constrained")
    axes = figure.subplots()
    places = np.arange(1, len(trials) + 1)
    values = np.array([_value(trial) for trial in trials])
    complete = np.array([trial.state == TrialState.COMPLETE for trial in trials])
    shown = np.isfinite(values)
    pruned = shown & ~complete
    axes.scatter(places[complete], values[complete], s=18, color=BLUE, label="complete")
    if pruned.any():
        axes.scatter(places[pruned], values[pruned], s=18, color=GREY, marker="x", label="pruned")
    running = np.maximum.accumulate(np.where(complete, values, -np.inf))
    axes.step(places[np.isfinite(running)], running[np.isfinite(running)], where="post", color=ORANGE, label="best")
    axes.set_xlabel("trials that have ended")
    axes.set_ylabel(metric, parse_math=False)
    axes.legend(frameon=False)
    return _drawn(figure, [axes])


def importance_bars(weights: Mapping[str, float]) -> NDArray[np.uint8]:
    """A bar for each option, the most important on top."""
    figure = Figure((8, 1.2 + 0.4 * len(weights)), layout="constrained")
    axes = figure.subplots()
    names = list(weights)[::-1]
    bars = axes.barh(names, [100 * weights[name] for name in names], color=BLUE)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_xlabel("importance (fANOVA), in percent")
    return _drawn(figure, [axes])


def slices(trials: Sequence[FrozenTrial], space: Sequence[Dimension], metric: str) -> NDArray[np.uint8]:
    """The value of each trial over each option; earlier trials are lighter."""
    shown = [trial for trial in trials if np.isfinite(_value(trial))]
    wide = min(3, len(space))
    high = -(-len(space) // wide)
    figure = Figure((4 * wide, 3.4 * high), layout="constrained")
    places = figure.subplots(high, wide, squeeze=False).ravel()
    ages = [trial.number for trial in shown]
    values = [_value(trial) for trial in shown]
    for axes, dimension in zip(places, space, strict=False):
        tried = [trial.params[dimension.name] for trial in shown]
        if dimension.choices:
            tried = [dimension.choices.index(value) for value in tried]
            axes.set_xticks(range(len(dimension.choices)), [printable(value, 20) for value in dimension.choices])
            axes.margins(x=0.2)
        elif dimension.log:
            axes.set_xscale("log")
        axes.scatter(tried, values, s=18, c=ages, cmap="Blues", vmin=min(ages) - len(ages), edgecolors="0.4", lw=0.4)
        axes.set_xlabel(dimension.name)
    figure.supylabel(metric, fontsize=10).set_parse_math(False)
    for axes in places[len(space) :]:
        axes.set_axis_off()
    return _drawn(figure, list(places[: len(space)]))


def _value(trial: FrozenTrial) -> float:
    """The best value of a trial; -inf of one that failed."""
    best = trial.user_attrs.get("best")
    return float(best) if best is not None and trial.state != TrialState.FAIL else -np.inf


def _drawn(figure: Figure, charts: Sequence[Axes]) -> NDArray[np.uint8]:
    for axes in charts:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
    return pixels(figure)
