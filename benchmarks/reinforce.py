"""`rlboard reinforce` against the blog's script: environment steps per CPU second on equal numbers of episodes.

    python -m benchmarks.reinforce

Both learn with the same network, optimiser and hyperparameters, one update an episode; their random numbers and so
the lengths of their episodes differ, which is why steps are counted on both sides.
"""

import sys
from functools import partial
from pathlib import Path

import torch

from agents import reinforce
from benchmarks import _blog_reinforce
from benchmarks.harness import Benchmark, Command, Function, Measurement, Stopwatch, main

SEED = 1


def ours(episodes: int) -> Measurement:
    watch = Stopwatch()
    *_, last = reinforce.train(reinforce.Config(episodes=episodes, seed=SEED))
    return watch.stop(work=last.scalars["time/steps"])


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


def benchmarks(quick: bool) -> list[Benchmark]:
    training, command = (5, 20) if quick else (500, 500)
    warm_up = 2
    return [
        Benchmark(
            "training",
            "step",
            [
                Function("ours", partial(ours, training), partial(ours, warm_up)),
                Function("blog", partial(blog, training), partial(blog, warm_up)),
                Function("blog, one thread", partial(blog, training, 1), partial(blog, warm_up, 1)),
            ],
            f"{training:,} episodes, without imports and logging",
        ),
        Benchmark(
            "command",
            "step",
            [
                our_command("ours", command, "--log=minimal"),
                our_command("ours, every tab filled", command),
                blog_command(command),
            ],
            f"{command:,} episodes, the whole process from its start to its exit",
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main(benchmarks))
