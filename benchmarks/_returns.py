"""What agents have learned in the end: every preset, seed by seed, beside the same training by a peer.

A cell is an agent and an environment that one of its presets is for. All sides are measured alike: by the mean return
of 100 episodes, always the same ones, that the final policy plays without noise; it has the last weights, not the best.
The mean return of the last 100 episodes of the training, noise included, stands beside it: ours as `rlboard` logs it,
the peers' as their environments see it. Over the seeds, the interquartile mean with its 95 % bootstrap interval.

CPU time is that of a whole training on one thread: ours with every tab filled and its evaluations, a peer's from the
first reset of an environment on, with its own logging. Trainings side by side slow each other down.

Every training that ended is kept as a JSON file, and ours with its run beside it: a command that was interrupted goes
on, and what has got other hyperparameters since is trained anew.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import gymnasium
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray

from agents._environments import Act, play_episodes
from benchmarks._peers import Peer, Values, label
from benchmarks._solved import Goal, Training, counting
from benchmarks.harness import ContenderError, Function, Measurement, Stopwatch, duration
from rlboard.checkpoint import read_run
from rlboard.cli import main as rlboard
from rlboard.eventfile import read_scalars
from rlboard.files import replacing
from rlboard.registry import TRACKS, Loop, find_loop
from rlboard.statistics import interquartile_mean, interval

OURS, RUN_NAME = "rlboard", "run"
HEADLINE, STEPS = "rollout/ep_rew_mean", "time/steps"
EPISODES = 100
TIMES = ("cpu_seconds", "wall_seconds")
UNSEEN = 10_000
"""The first seed of the episodes that are played in the end; trainings have smaller ones."""


Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


@cache
def loop_of(agent: str) -> Loop:
    return find_loop(f"agents/{agent}")


@dataclass(frozen=True)
class Cell:
    """An agent, and the first of its presets that is for this environment."""

    agent: str
    env_id: str
    preset: str

    @property
    def name(self) -> str:
        return f"{self.agent}:{self.env_id}"

    def values(self, seed: int, quick: bool) -> Values:
        """Of every option."""
        return loop_of(self.agent).defaults(self.preset, smoke=quick) | {"seed": seed}


def all_cells() -> dict[str, Cell]:
    """By their names; a new agent or preset is among them."""
    loops = [loop for track in TRACKS if track.package == "agents" for loop in track.loops()]
    cells: dict[str, Cell] = {}
    for loop in loops:
        for preset in ("", *loop.presets):
            if env_id := loop.defaults(preset).get("env_id"):
                cell = Cell(loop.name, str(env_id), preset)
                cells.setdefault(cell.name, cell)
    return cells


def train_ours(agent: str, values: Values, log_dir: str = "logs", run_name: str = "") -> None:
    """`rlboard <agent>` with these values, in this process."""
    loop = loop_of(agent)
    arguments = [option.spelled(values[option.name]) for option in loop.options]
    code = rlboard([loop.command, *arguments, f"--log-dir={log_dir}", f"--run-name={run_name}"])
    if code:
        raise ContenderError(f"rlboard {loop.command} ended with exit code {code}")


def our_training(cell: Cell, values: Values, log_dir: Path, run: Path) -> Measurement:
    """Trains to `run`, below the root `log_dir`, whose contents are replaced."""
    shutil.rmtree(log_dir, ignore_errors=True)
    begin()
    watch = Stopwatch()
    train_ours(cell.agent, values, str(log_dir), RUN_NAME)
    measured = watch.stop(work=1)
    saved = read_run(str(run))
    act = saved.loop.load().actor(saved.loop.load().Config(**saved.config), saved.weights, True, 0)
    scalars = read_scalars(run, [HEADLINE, STEPS])
    in_training = scalars[HEADLINE].value[-1] if HEADLINE in scalars else math.nan
    return judged(measured, cell, act, steps=scalars[STEPS].value[-1], in_training=in_training)


def peers_training(peer: Peer, cell: Cell, values: Values) -> Measurement:
    begin()
    training = Training(Goal(math.inf, EPISODES, math.inf), int(values["seed"]))
    with counting(training):
        act = peer.train(cell.agent, values)
    assert training.watch is not None
    measured = training.watch.stop(work=1)
    in_training = statistics.fmean(training.returns) if training.returns else math.nan
    return judged(measured, cell, act, steps=training.steps, in_training=in_training)


def begin() -> None:
    torch.set_num_threads(1)
    torch.optim.Adam([torch.zeros(1)])  # the first optimiser imports torch's compiler: 2 s that are no training


def judged(measured: Measurement, cell: Cell, act: Act, steps: float, in_training: float) -> Measurement:
    """`measured`, and what its policy is worth."""
    final = [score for score, _ in play_episodes(cell.env_id, act, range(UNSEEN, UNSEEN + EPISODES))]
    extra = {"return": statistics.fmean(final), "in training": float(in_training), "steps": float(steps)}
    return dataclasses.replace(measured, extra=extra)


@dataclass
class Outcome:
    """Of one cell and side: the trainings that ended, and why others did not."""

    measurements: list[Measurement] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """One training: of a cell by us, or by a peer."""

    cell: Cell
    peer: Peer | None
    seed: int
    into: Path
    quick: bool

    @property
    def by(self) -> str:
        return self.peer.name if self.peer else OURS

    @property
    def directory(self) -> Path:
        return self.into / self.cell.name.replace(":", "-") / self.by / f"seed{self.seed}"

    @property
    def run(self) -> Path:
        """Where ours logs."""
        return self.directory / loop_of(self.cell.agent).track.directory(self.cell.agent) / RUN_NAME

    def done(self, again: bool = False) -> Measurement:
        """What came of it, now or before. Raises ContenderError where it failed."""
        values = self.cell.values(self.seed, self.quick)
        file = self.directory.with_suffix(".json")
        if file.exists() and not again:
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept["options"] == values:
                return Measurement(**kept["measurement"])
        if self.peer:
            self.peer.given(self.cell.agent, values)  # or it is refused, before a process is started
        function: Callable[[], Measurement] = (
            partial(peers_training, self.peer, self.cell, values)
            if self.peer
            else partial(our_training, self.cell, values, self.directory.absolute(), self.run.absolute())
        )
        with tempfile.TemporaryDirectory(prefix="rlboard-benchmark-") as directory:
            measured = Function(self.by, function).measure(Path(directory))
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as opened:
            opened.write(json.dumps({"options": values, "measurement": dataclasses.asdict(measured)}).encode())
        return measured


def trained(tasks: Sequence[Task], jobs: int, again: bool) -> dict[tuple[Cell, str], Outcome]:
    """What came of all tasks, `jobs` of them at a time, by cell and side."""
    outcomes: dict[tuple[Cell, str], Outcome] = {}
    with ThreadPoolExecutor(jobs) as executor:
        waiting = {executor.submit(task.done, again): task for task in tasks}
        try:
            for count, future in enumerate(as_completed(waiting), start=1):
                task = waiting[future]
                outcome = outcomes.setdefault((task.cell, task.by), Outcome())
                try:
                    measured = future.result()
                except ContenderError as error:
                    outcome.failures.append(str(error))
                    said = str(error)
                else:
                    outcome.measurements.append(measured)
                    said = f"return {measured.extra['return']:.1f}, {duration(measured.cpu_seconds)} of CPU"
                print(
                    f"[{count} of {len(tasks)}] {task.cell.name}, {task.by}, seed {task.seed}: {said}", file=sys.stderr
                )
        finally:
            executor.shutdown(cancel_futures=True)
    return outcomes


def table(rows: Iterable[tuple[Cell, str, int | None, Outcome]]) -> str:
    """Markdown: a row for each cell and side, of which the name and the lines of its file are given."""
    header = ["environment", "agent", "by", "seeds", "steps", f"mean return of {EPISODES} episodes (95 %)",
              "last 100 in training (95 %)", "CPU per seed", "wall", "lines"]  # fmt: skip
    lines = [header, ["---", "---", "---", *["---:"] * (len(header) - 3)]]
    for cell, by, length, outcome in rows:
        row = [cell.env_id, cell.agent.replace("_", "-"), by]
        if reasons := set(outcome.failures):
            by_seeds = f" ({len(outcome.failures)} seeds)" if outcome.measurements else ""
            row[-1] = f"{by}: {'; '.join(sorted(reasons))}{by_seeds}".replace("|", "\\|")
        if runs := outcome.measurements:
            row += [str(len(runs)), f"{statistics.median(run.extra['steps'] for run in runs):,.0f}"]
            row += [middle([run.extra[name] for run in runs]) for name in ("return", "in training")]
            row += [duration(statistics.median(getattr(run, name) for run in runs)) for name in TIMES]
            row.append("" if length is None else str(length))
        lines.append(row + [""] * (len(header) - len(row)))
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def middle(scores: Sequence[float]) -> str:
    """The interquartile mean and its interval: `487.3 (471.0 to 500.0)`."""
    array = np.array(scores)
    lower, upper = interval(array, interquartile_mean)
    return f"{interquartile_mean(array):.1f} ({lower:.1f} to {upper:.1f})"


def draw(curves: Mapping[Cell, Sequence[Curve]], target: Path) -> None:
    """A panel for each cell: the training's mean return of 100 episodes, over the environment's steps."""
    rows = math.ceil(len(curves) / 4)
    columns = math.ceil(len(curves) / rows)
    figure = Figure(figsize=(3.2 * columns, 2.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[len(curves) :]:
        panel.axis("off")
    for panel, (cell, seeds) in zip(panels, curves.items(), strict=False):
        for steps, scores in seeds:
            panel.plot(steps, scores, color="tab:blue", alpha=0.2, linewidth=0.8)
        common = np.linspace(max(steps[0] for steps, _ in seeds), min(steps[-1] for steps, _ in seeds), 200)
        together = np.stack([np.interp(common, steps, scores) for steps, scores in seeds])
        panel.fill_between(common, *interval(together, interquartile_mean), color="tab:orange", alpha=0.35, linewidth=0)
        panel.plot(common, interquartile_mean(together), color="tab:orange")
        threshold = gymnasium.spec(cell.env_id).reward_threshold
        if threshold is not None:
            panel.axhline(threshold, color="black", linestyle=":", linewidth=0.8)
        panel.set_title(f"{cell.agent.replace('_', '-')}, {cell.env_id}", fontsize=9)
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.tick_params(labelsize=8)
    figure.supxlabel("environment steps", fontsize=9)
    figure.supylabel("return in training, mean of 100", fontsize=9)
    figure.savefig(target, dpi=110)


def curve_of(run: Path) -> Curve:
    """How a run of ours has learned: environment steps and mean returns, (points,) each."""
    scalars = read_scalars(run, [HEADLINE, STEPS])
    headline, steps = scalars[HEADLINE], scalars[STEPS]
    return np.interp(headline.step, steps.step, steps.value), headline.value.astype(np.float64)


def returns(
    cells: Sequence[Cell],
    peers: Sequence[Peer],
    *,
    seeds: int,
    jobs: int,
    into: Path,
    figure: Path | None = None,
    quick: bool = False,
    again: bool = False,
) -> int:
    """Trains what is not yet in `into`, prints the table and draws the figure; 1 where a training of ours failed."""
    sides: list[Peer | None] = [None, *peers]
    tasks = [Task(cell, peer, seed, into, quick) for cell in cells for seed in range(1, seeds + 1) for peer in sides]
    outcomes = trained(tasks, jobs, again)
    rows: list[tuple[Cell, str, int | None, Outcome]] = []
    for cell in cells:
        source = Path(str(loop_of(cell.agent).load().__file__)).read_text(encoding="utf-8")
        rows.append((cell, OURS, len(source.splitlines()), outcomes[cell, OURS]))
        rows += [
            (cell, label(peer, cell.agent, cell.values(1, quick)), peer.lines(cell.agent), outcomes[cell, peer.name])
            for peer in peers
        ]
    print(table(rows))
    if figure:
        runs = {cell: [task.run for task in tasks if task.cell == cell and task.by == OURS] for cell in cells}
        found = {cell: [curve_of(run) for run in each if run.exists()] for cell, each in runs.items()}
        draw({cell: curves for cell, curves in found.items() if curves}, figure)
    return int(any(outcomes[cell, OURS].failures for cell in cells))
