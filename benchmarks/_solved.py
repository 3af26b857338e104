"""How long until CartPole-v1 is solved: one instrument for training code that knows nothing of it.

`until_solved` runs anything that makes its environments by `gymnasium.make`, such as a script (`run_script`), on one
thread. Each of these environments counts its steps and notes the return of every finished episode, and training is
ended from within as soon as the last ones are good enough. CPU time starts at the first reset of an environment:
what is imported before is not training.

An episode ends where Gymnasium ends it, by termination or truncation, and its return is what was collected until
then. A script that goes on after the truncation is left to; those steps count as steps and in no return.
"""

import contextlib
import dataclasses
import itertools
import random
import runpy
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, SupportsFloat
from unittest.mock import patch

import gymnasium
import numpy as np
import torch

from benchmarks.harness import Measurement, Stopwatch


@dataclasses.dataclass(frozen=True)
class Goal:
    """Solved: the last `episodes` training episodes have a mean return of at least `mean_return`."""

    mean_return: float = 475.0
    episodes: int = 100
    cpu_seconds: float = 600.0  # then it is given up

    def measurement(self, watch: Stopwatch, steps: int, episodes: int, solved: bool, ended: bool) -> Measurement:
        """What one training took; `ended` if it came to its own end, before it was solved or given up."""
        taken = watch.stop(work=1, steps=steps, episodes=episodes)
        taken.extra["steps per CPU s"] = steps / taken.cpu_seconds
        unsolved = "not solved when its training ended" if ended else f"not solved in {self.cpu_seconds:g} CPU s"
        return dataclasses.replace(taken, training_seconds=None, given_up="" if solved else unsolved)


class _Enough(BaseException):
    """Ends a training from within, past any `except Exception` of its own."""


class Training:
    """What the environments of one training have seen together."""

    def __init__(self, goal: Goal, seed: int) -> None:
        self.goal = goal
        self.seeds = itertools.count(seed)  # for environments that the training itself does not seed
        self.watch: Stopwatch | None = None
        self.steps = self.episodes = 0
        self.returns: deque[float] = deque(maxlen=goal.episodes)

    @property
    def solved(self) -> bool:
        goal = self.goal
        return len(self.returns) == goal.episodes and sum(self.returns) >= goal.mean_return * goal.episodes

    def begin(self) -> None:
        if self.watch is None:
            self.watch = Stopwatch()

    def step(self) -> None:
        self.steps += 1
        if self.steps % 128 == 0 and self.watch is not None and self.watch.cpu_seconds > self.goal.cpu_seconds:
            raise _Enough

    def episode(self, total: float) -> None:
        self.episodes += 1
        self.returns.append(total)
        if self.solved:
            raise _Enough


class Counted(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Tells `training` what happens in an environment, and changes nothing but a first seed that is missing."""

    def __init__(self, environment: gymnasium.Env[Any, Any], training: Training) -> None:
        super().__init__(environment)
        self.training = training
        self.seeded = self.over = False
        self.total = 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.training.begin()
        if seed is None and not self.seeded:
            seed = next(self.training.seeds)
        self.seeded, self.over, self.total = True, False, 0.0
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.training.step()
        if not self.over:
            self.total += float(reward)
            if terminated or truncated:
                self.over = True
                self.training.episode(self.total)
        return observation, reward, terminated, truncated, info


@contextlib.contextmanager
def counting(training: Training) -> Iterator[None]:
    """Tells `training` of all environments that `gymnasium.make` makes in here."""
    make = gymnasium.make

    def counted(*arguments: Any, **options: Any) -> Counted:
        environment = make(*arguments, **options)
        if environment.spec is not None:
            environment.spec.reward_threshold = float("inf")  # one rule for all, also where a script has its own
        return Counted(environment, training)

    with patch.object(gymnasium, "make", counted):
        yield


def until_solved(train: Callable[[], object], goal: Goal, seed: int) -> Measurement:
    """Runs `train` on one thread until it has reached the goal, has used up its time, or is done.

    Raises:
        RuntimeError: it reset no environment that `gymnasium.make` has made.
    """
    torch.set_num_threads(1)
    torch.optim.Adam([torch.zeros(1)])  # the first optimiser imports torch's compiler: 2 s that are no training
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - a script may draw from the global generator
    torch.manual_seed(seed)
    training = Training(goal, seed)
    ended = False
    with counting(training), contextlib.suppress(_Enough):
        train()
        ended = True
    if training.watch is None:
        raise RuntimeError("it reset no environment made by gymnasium.make")
    return goal.measurement(training.watch, training.steps, training.episodes, training.solved, ended)


def run_script(path: Path, *arguments: str) -> dict[str, Any]:
    """Runs a Python file as a program, in this process; `import gym` gets it Gymnasium. Returns its global names."""
    sys.modules["gym"] = gymnasium
    with patch.object(sys, "argv", [str(path), *arguments]):
        return runpy.run_path(str(path), run_name="__main__")
