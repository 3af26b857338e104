"""The agents against Stable-Baselines3 and CleanRL: how fast they take steps, and what they have learned in the end.

    python -m benchmarks.agents --only speed --cleanrl CHECKOUT
    python -m benchmarks.agents --only return --peers --cleanrl CHECKOUT --jobs 2 --figure docs/agents.png
    python -m benchmarks.agents --only return --cell ppo:CartPole-v1 --again

`speed` counts environment steps per CPU second of whole trainings, in turn, on one thread each, with the same
hyperparameters; `_peers` says what a peer cannot be given. All log as often as they do by themselves: ours by `rlboard`
with every tab filled, which includes checkpoints and an evaluation episode at the end, peers by their own writers.
Imports, and our code compiled or taken from its cache, are no training. Ours runs in Gymnasium, as the peers do, and
with compiled environments, which is a row of its own. `--only` takes the name of one such benchmark as well.

`return` trains every agent on every environment that it has a preset for, with seeds 1 to N; `_returns` says how what
they have learned is measured. CHECKOUT is one of github.com/vwxyzjn/cleanrl.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

if not __package__:  # run as a file, whose folder hides the package `agents`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import _returns
from benchmarks._peers import CleanRL, Peer, StableBaselines3, Values, label
from benchmarks._returns import loop_of, train_ours
from benchmarks.harness import Benchmark, Function, Measurement, Stopwatch, main
from rlboard.config import Value

PLAIN: dict[str, Value] = {"double": False, "n_steps": 1}
"""The DQN that all sides have."""

SPEED: dict[str, tuple[str, int, dict[str, Value]]] = {
    "ppo": ("ppo", 40_960, {}),
    "a2c": ("a2c", 40_000, {}),
    "dqn": ("dqn", 20_000, PLAIN | {"hidden_size": 256}),
    "dqn4": (
        "dqn",
        20_000,
        PLAIN | {"batch_size": 128, "gradient_steps": 1, "hidden_size": 120, "target_every": 500, "train_every": 4},
    ),
    "sac": ("sac", 3_000, {}),
}
"""Benchmark to agent, steps, and what replaces its defaults. `dqn4` updates every 4 steps, for which, but for the sizes
of layers, CleanRL's DQN has all the options."""


ENVIRONMENTS = ("CartPole-v1", "Acrobot-v1", "LunarLander-v3", "Pendulum-v1")
"""Whose cells are trained without `--cell`."""

Train = Callable[[str, Values], object]


def timed(training: Callable[[], object], steps: int) -> Measurement:
    torch.set_num_threads(1)
    watch = Stopwatch()
    training()
    return watch.stop(work=steps)


def contender(name: str, train: Train, agent: str, values: Values, smoke: Values) -> Function:
    """Takes the steps of `values`, after those of `smoke`, which are not timed."""
    steps = int(values["total_timesteps"])
    return Function(name, partial(timed, partial(train, agent, values), steps), partial(train, agent, smoke))


def benchmarks(quick: bool, cleanrl: Path | None = None) -> list[Benchmark]:
    """`cleanrl`: a checkout."""
    made = []
    for name, (agent, steps, changes) in SPEED.items():
        loop = loop_of(agent)
        rare = {"eval_every": steps, "eval_episodes": 1}  # the peers do not evaluate
        smoke = loop.defaults(smoke=True) | rare | changes
        values = smoke if quick else loop.defaults() | rare | changes | {"total_timesteps": steps}
        ours: dict[str, Values] = {"rlboard": {"engine": "gym"}, "rlboard, compiled": {"engine": "compiled"}}
        if "engine" not in values:
            ours = {"rlboard": {}}
        contenders = [contender(row, train_ours, agent, values | more, smoke | more) for row, more in ours.items()]
        contenders += [
            contender(label(peer, agent, values), peer.train, agent, values, smoke)
            for peer in (StableBaselines3(), CleanRL(cleanrl))
        ]
        note = f"{values['total_timesteps']:,} steps of {values['num_envs']} × {values['env_id']}, logging on"
        made.append(Benchmark(name, "step", contenders, note))
    return made


def command_line(argv: list[str]) -> int:
    cells = _returns.all_cells()
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--only", action="append", default=[], help=f"speed, return, or one of {', '.join(SPEED)}")
    parser.add_argument("--cleanrl", type=Path, metavar="CHECKOUT", help="of github.com/vwxyzjn/cleanrl")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run at all?")
    group = parser.add_argument_group("return")
    group.add_argument("--cell", action="append", choices=cells, metavar="AGENT:ENVIRONMENT", help="this one alone")
    group.add_argument("--peers", action="store_true", help="train the peers as well")
    group.add_argument("--seeds", type=int, default=10, metavar="N")
    group.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings at a time")
    group.add_argument("--into", type=Path, default=Path(".benchmarks/agents"), help="where trainings are kept")
    group.add_argument("--again", action="store_true", help="train what is kept there once more")
    group.add_argument("--figure", type=Path, metavar="FILE", help="draw the learning curves there")
    own, others = parser.parse_known_args(argv)
    if own.seeds < 1 or own.jobs < 1:
        parser.error("--seeds and --jobs: at least 1")
    cleanrl = own.cleanrl and own.cleanrl.absolute()  # each contender runs in a directory of its own
    asked = own.only or ["speed", "return"]
    code = 0
    if asked != ["return"]:
        quick = ["--quick"] if own.quick else []
        named = [f"--only={name}" for name in asked if name not in {"speed", "return"}]
        code = main(partial(benchmarks, cleanrl=cleanrl), [*quick, *named, *others])
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if "return" in asked:
        chosen = [cells[name] for name in own.cell or cells if own.cell or cells[name].env_id in ENVIRONMENTS]
        peers: list[Peer] = [StableBaselines3(), *([CleanRL(cleanrl)] if cleanrl else [])] if own.peers else []
        code |= _returns.returns(
            chosen,
            peers,
            seeds=own.seeds,
            jobs=own.jobs,
            into=own.into,
            figure=own.figure,
            quick=own.quick,
            again=own.again,
        )
    return code


if __name__ == "__main__":
    raise SystemExit(command_line(sys.argv[1:]))
