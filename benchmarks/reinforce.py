"""`rlboard reinforce` against its peers: how fast it takes steps, and how soon it has learned.

    python -m benchmarks.reinforce [--only solved] [--seeds N] [--cap SECONDS]
                                   [--minimalrl PATH] [--pytorch-examples PATH] [--cleanrl PATH]

`training` and `command` count environment steps per CPU second. All sides learn with the same network, optimiser and
hyperparameters, one update an episode; their random numbers and so the lengths of their episodes differ, which is why
steps are counted on all sides. The compiled engine takes the blog's 10,000 episodes, the others, which take so much
longer, the first of them. The bound is what no program can beat on one core: the multiplications of the policy and its
gradient, each with its addition, as fast as the processor can be seen to do them, and nothing else.

`solved` takes the CPU time until CartPole-v1 is solved: the last 100 training episodes have a mean return of 475. Every
run has a seed of its own, 1 to N (`--seeds`, the same as `--repeats`), one thread, and is given up after `--cap` CPU
seconds. Start-up is left out on all sides: what is imported, and our code compiled or taken from its cache. Peers are
measured by one instrument, `_solved`; ours by its own curve, which has a point only every 20 episodes. Peers that are
on no package index run from the file that is given, and as they are: minimalRL goes on with episodes after their
truncation, CleanRL logs.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents import reinforce
from benchmarks import _blog_reinforce
from benchmarks._solved import Goal, run_script, until_solved
from benchmarks.harness import Benchmark, Command, ContenderError, Function, Measurement, Stopwatch, main

SEED = 1
EPISODES = 10_000  # of a training that is not solved: the blog's number


def ours(engine: str, episodes: int) -> Measurement:
    watch = Stopwatch()
    *_, last = reinforce.train(reinforce.Config(episodes=episodes, seed=SEED, engine=engine))
    return watch.stop(work=last.scalars["time/steps"])


def multiplications(observation_size: int, hidden_size: int, actions: int) -> int:
    """Of one step of REINFORCE: the policy's forward pass, and its gradient from the hidden values kept from it.

    The gradients of the logits of a step sum to zero, which saves one action's share of the gradient.
    """
    forward = hidden_size * (observation_size + actions)
    backward = hidden_size * 2 * (actions - 1)  # to the hidden layer, and to the weights that follow it
    return forward + backward + hidden_size * observation_size


def bound(steps: int) -> Measurement:
    """The arithmetic of `steps` steps on CartPole and no more: chains of multiply-adds on numbers in registers."""
    import numba

    @numba.njit(fastmath={"contract"})
    def multiply_and_add(numbers: Any, rounds: int, factor: Any, term: Any) -> None:
        for _ in range(rounds):
            for index in range(128):
                number = numbers[index]
                for _ in range(8):
                    number = number * factor + term
                numbers[index] = number

    arguments = np.ones(128, np.float32), np.float32(0.5), np.float32(0.25)
    multiply_and_add(arguments[0], 1, *arguments[1:])
    rounds = steps * multiplications(4, 128, 2) // (128 * 8)
    watch = Stopwatch()
    multiply_and_add(arguments[0], rounds, *arguments[1:])
    return watch.stop(work=rounds * 128 * 8 / multiplications(4, 128, 2))


def blog(episodes: int, threads: int = 0) -> Measurement:
    """On `threads` threads, as many as torch thinks best by default."""
    torch.set_num_threads(threads or torch.get_num_threads())
    watch = Stopwatch()
    steps = _blog_reinforce.train(episodes, SEED)
    return watch.stop(work=steps)


def our_command(name: str, episodes: int, *options: str) -> Command:
    argv = [sys.executable, "-m", "rlboard", "reinforce", f"--episodes={episodes}", f"--seed={SEED}", *options]
    return Command(name, argv, _logged_steps)


def blog_command(episodes: int) -> Command:
    argv = [sys.executable, _blog_reinforce.__file__, f"--episodes={episodes}", f"--seed={SEED}"]
    return Command("blog", argv, lambda _, printed: float(printed.rpartition("environment steps: ")[2]))


def _logged_steps(directory: Path, _: str) -> float:
    """The number of environment steps that a finished run says it took."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = (directory / "logs" / "REINFORCE").iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    return float(events.Scalars("time/steps")[-1].value)


@dataclass(frozen=True)
class EachSeed:
    """A Function that is given the next seed in each run, from 1 on."""

    name: str
    function: Callable[[int], Measurement]
    warm_up: Callable[[], object] | None = None
    seeds: Iterator[int] = field(default_factory=lambda: count(1))

    def measure(self, directory: Path) -> Measurement:
        return Function(self.name, partial(self.function, next(self.seeds)), self.warm_up).measure(directory)


def our_solution(goal: Goal, engine: str, seed: int) -> Measurement:
    """Looks at the curve as anybody can: at the mean of the last 100 episodes, which it has every 20."""
    rare: dict[str, Any] = {"episodes": EPISODES, "eval_every": EPISODES, "eval_episodes": 1}
    config = reinforce.Config(**(rare | reinforce.PRESETS["solve"]), engine=engine, seed=seed)
    watch, solved = Stopwatch(), False
    for event in reinforce.train(config):
        mean_return = event.scalars.get("rollout/ep_rew_mean", 0.0)
        solved = event.step >= goal.episodes and mean_return >= goal.mean_return
        if solved or watch.cpu_seconds > goal.cpu_seconds:
            break
    return goal.measurement(watch, int(event.scalars.get("time/steps", 0)), event.step, solved, event.step == EPISODES)


def blog_solution(goal: Goal, seed: int) -> Measurement:
    return until_solved(partial(_blog_reinforce.train, EPISODES, seed), goal, seed)


def linear(start: float) -> Callable[[float], float]:
    """A schedule that falls to 0, as Stable-Baselines3 takes it: of the fraction of training that is left."""
    return lambda left: start * left


RL_ZOO: dict[str, tuple[int, dict[str, Any]]] = {
    "A2C": (500_000, {"ent_coef": 0.0}),
    "PPO": (
        100_000,
        {
            "n_steps": 32,
            "batch_size": 256,
            "gae_lambda": 0.8,
            "gamma": 0.98,
            "n_epochs": 20,
            "ent_coef": 0.0,
            "learning_rate": linear(0.001),
            "clip_range": linear(0.2),
        },
    ),
}
"""Steps and hyperparameters for CartPole-v1, 8 environments at once, from hyperparams/a2c.yml and ppo.yml of
github.com/DLR-RM/rl-baselines3-zoo: PPO's are tuned, A2C's are the library's own defaults."""


def stable_baselines3_solution(algorithm: str, goal: Goal, seed: int) -> Measurement:
    import stable_baselines3
    from stable_baselines3.common.env_util import make_vec_env

    steps, hyperparameters = RL_ZOO[algorithm]

    def train() -> None:
        environments = make_vec_env("CartPole-v1", n_envs=8, seed=seed)
        learner = getattr(stable_baselines3, algorithm)
        learner("MlpPolicy", environments, seed=seed, device="cpu", **hyperparameters).learn(steps)

    return until_solved(train, goal, seed)


@dataclass(frozen=True)
class Script:
    """A peer that is on no package index, to be fetched by whoever runs the benchmark."""

    name: str
    option: str
    source: str
    arguments: tuple[str, ...] = ()
    seeded_by: str = ""  # its option for the seed

    def solution(self, path: Path | None, goal: Goal, seed: int) -> Measurement:
        if path is None:
            raise ContenderError(f"not given: {self.option} PATH, a copy of {self.source}")
        seeding = [f"{self.seeded_by}={seed}"] if self.seeded_by else []
        return until_solved(partial(run_script, path, *self.arguments, *seeding), goal, seed)


SCRIPTS = (
    Script("minimalRL", "--minimalrl", "github.com/seungeunrho/minimalRL: REINFORCE.py"),
    Script(
        "pytorch/examples",
        "--pytorch-examples",
        "github.com/pytorch/examples: reinforcement_learning/reinforce.py",
        seeded_by="--seed",
    ),
    Script("CleanRL PPO", "--cleanrl", "github.com/vwxyzjn/cleanrl: cleanrl/ppo.py", ("--no-cuda",), "--seed"),
)


def benchmarks(quick: bool, paths: dict[str, Path] | None = None, cap: float = Goal.cpu_seconds) -> list[Benchmark]:
    """`paths`: the peers' scripts by their options."""
    training, whole = (5, 20) if quick else (500, EPISODES)
    warm_up = 2
    goal = Goal(mean_return=10, episodes=10) if quick else Goal(cpu_seconds=cap)
    at_once = Goal(mean_return=0, episodes=1)
    return [
        Benchmark(
            "training",
            "step",
            [
                Function("ours, compiled", partial(ours, "compiled", whole), partial(ours, "compiled", warm_up)),
                Function("ours, gym", partial(ours, "gym", training), partial(ours, "gym", warm_up)),
                Function("blog, one thread", partial(blog, training, 1), partial(blog, warm_up, 1)),
                Function("blog", partial(blog, training), partial(blog, warm_up)),
                Function("bound", partial(bound, 1_000 if quick else 10_000_000)),
            ],
            f"{whole:,} episodes of the compiled engine, {training:,} of the others, without imports and logging",
        ),
        Benchmark(
            "command",
            "step",
            [
                our_command("ours, every tab filled", whole),
                our_command("ours, --log minimal", whole, "--log=minimal"),
                blog_command(training),
            ],
            f"{whole:,} episodes of ours, {training:,} of the blog's, the whole process from its start to its exit",
        ),
        Benchmark(
            "solved",
            "solution",
            [
                *(
                    EachSeed(
                        f"ours, {engine}",
                        partial(our_solution, goal, engine),
                        partial(our_solution, at_once, engine, SEED),
                    )
                    for engine in ("compiled", "gym")
                ),
                EachSeed("blog", partial(blog_solution, goal)),
                *(EachSeed(f"SB3 {name}", partial(stable_baselines3_solution, name, goal)) for name in RL_ZOO),
                *(
                    EachSeed(each.name, partial(each.solution, (paths or {}).get(each.option), goal))
                    for each in SCRIPTS
                ),
            ],
            f"CartPole-v1 until the last {goal.episodes} episodes have a mean return of {goal.mean_return:g}, "
            "one thread, without imports",
        ),
    ]


def command_line(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--seeds", dest="repeats", metavar="N")
    parser.add_argument("--cap", type=float, metavar="SECONDS", default=Goal.cpu_seconds)
    for script in SCRIPTS:
        parser.add_argument(script.option, type=Path, dest=script.option, metavar="PATH")
    own, others = parser.parse_known_args(argv)
    paths = {}
    for script in SCRIPTS:
        path = getattr(own, script.option)
        if path is None:
            continue
        if not path.is_file():
            parser.error(f"{script.option} {path}: no such file; it is to be a copy of {script.source}")
        paths[script.option] = path.absolute()  # each contender runs in a directory of its own
    repeats = [] if own.repeats is None else [f"--repeats={own.repeats}"]
    return main(partial(benchmarks, paths=paths, cap=own.cap), [*others, *repeats])


if __name__ == "__main__":
    raise SystemExit(command_line(sys.argv[1:]))
