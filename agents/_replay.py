"""Experience replay (L.-J. Lin, 1992): transitions that are learned from long after they happened."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium.spaces import Box
from numpy.typing import NDArray
from torch import Tensor

from agents._environments import Observations, seen_as
from agents._vector import Environments, Step
from rlboard.errors import UsageError

LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux tells a container how much memory it may use, by cgroups of version 2 and of version 1."""

Batch = dict[str, Tensor]
Window = tuple[Observations, NDArray[Any], NDArray[np.float32], NDArray[np.bool_]]
"""Where it begins, the actions taken there, the returns until now, and whose are not in the replay yet."""


class Replay:
    """The last `capacity` transitions, in one array that is made once; the oldest give way.

    A transition is one record of it, so that a batch is gathered in one pass: `observations` ((observation size,), or
    frames as the bytes that they are), `actions` ((action size,) floats or a number), `rewards`, `next_observations`
    like `observations`, `discounts`: what the value of the next observation counts for, 0 where the episode was
    terminated.

    Raises:
        UsageError: there is not so much memory, by `option`, the flag that asks for it.
    """

    def __init__(self, capacity: int, environments: Environments, option: str = "--buffer-size") -> None:
        observations, actions = environments.observation_space, environments.action_space
        assert isinstance(observations, Box)
        observation = (seen_as(observations), observations.shape)
        action = ("<f4", actions.shape) if isinstance(actions, Box) else ("<i8", ())
        self.record = np.dtype(
            [
                ("actions", *action),
                ("observations", *observation),
                ("next_observations", *observation),
                ("rewards", "<f4"),
                ("discounts", "<f4"),
            ],
            align=True,
        )
        wanted, there = capacity * self.record.itemsize, memory()
        if wanted > there:
            fits = int(0.5 * there / self.record.itemsize)
            raise UsageError(
                f"{option} {capacity}: {capacity:,} of {environments.env_id}'s steps take {wanted / 2**30:,.1f} GiB, "
                f"and this machine has {there / 2**30:.1f}: give at most {fits}"
            )
        self.records = np.zeros(capacity, self.record)
        self.fields = [self.records[name] for name in self.record.names or ()]
        self.added = 0

    def __len__(self) -> int:
        return min(self.added, len(self.records))

    def add(
        self,
        observations: Observations,
        actions: NDArray[Any],
        rewards: NDArray[np.float32],
        next_observations: Observations,
        discounts: NDArray[np.float32],
    ) -> None:
        """Takes in a transition of each environment; the first axis of all is (environments,)."""
        count, start = len(actions), self.added % len(self.records)
        places: Any = slice(start, start + count)  # a third of the time of an array of places
        if start + count > len(self.records):
            places = np.arange(start, start + count) % len(self.records)
        given = (actions, observations, next_observations, rewards, discounts)
        for field, values in zip(self.fields, given, strict=True):
            field[places] = values
        self.added += count

    def sample(self, size: int, rng: np.random.Generator, device: torch.device) -> Batch:
        """`size` transitions, each drawn from all with equal chance: tensors by field, (size, ...)."""
        return self._batch(rng.integers(len(self), size=size), device)

    def latest(self, size: int, device: torch.device) -> Batch:
        """The last `size` transitions, or all of fewer, the oldest first: tensors by field, (size, ...)."""
        return self._batch(np.arange(self.added - min(size, len(self)), self.added) % len(self.records), device)

    def _batch(self, places: NDArray[np.int64], device: torch.device) -> Batch:
        chosen = self.records.take(places)  # ten times as fast as records[places]
        return {name: torch.from_numpy(chosen[name]).to(device) for name in self.record.names or ()}

    def scalars(self) -> dict[str, float]:
        """How many transitions there are, and what they hold on average; empty before the first."""
        if not self.added:
            return {}
        kept = self.records[: len(self)]
        return {
            "replay/transitions": len(self),
            "replay/reward_mean": float(kept["rewards"].mean()),
            "replay/terminated_percent": 100 * float((kept["discounts"] == 0).mean()),
        }

    def state_dict(self) -> dict[str, Any]:
        """The transitions, as bytes in a tensor, and how many were ever added."""
        return {"records": torch.from_numpy(self.records[: len(self)].view(np.uint8)), "added": self.added}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes back to what `state_dict` has returned."""
        records = state_dict["records"].numpy().view(self.record)
        self.records[: len(records)] = records
        self.added = state_dict["added"]


class Settings(Protocol):
    """What an agent's `Config` says about its replay and when it is learned from."""

    @property
    def total_timesteps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def buffer_size(self) -> int: ...
    @property
    def learning_starts(self) -> int: ...
    @property
    def train_every(self) -> int: ...


def refuse_in_vain(config: Settings, filled: int = 1) -> None:
    """Raises UsageError where a batch is larger than the replay can be, or nothing would be learned.

    `filled`: the steps after which there is something in the replay.
    """
    if config.batch_size > config.buffer_size:
        raise UsageError(
            f"--batch-size {config.batch_size} is more than the replay keeps: "
            f"give at most {config.buffer_size}, the --buffer-size, or a larger one of those"
        )
    first = math.ceil(max(config.learning_starts + 1, filled) / config.train_every) * config.train_every
    if first > config.total_timesteps:
        raise UsageError(
            f"--total-timesteps {config.total_timesteps} end before anything is learned: give at least {first}, "
            f"or a smaller --learning-starts ({config.learning_starts}) or --train-every ({config.train_every})"
        )


class Windows:
    """Transitions of `steps` steps, made of single ones for a replay: r_1 + gamma r_2 + ..., and what comes after.

    A window that meets the end of its episode is shorter, and none goes beyond it. Where the episode was truncated, the
    value of its last observation counts as it does after a whole window; where it was terminated, nothing does.
    """

    def __init__(self, replay: Replay, steps: int, gamma: float) -> None:
        self.replay, self.steps, self.gamma = replay, steps, gamma
        self.open: deque[Window] = deque()

    def add(self, observations: Observations, actions: NDArray[Any], step: Step) -> None:
        """Takes in a step of all environments; what it completes goes into the replay."""
        if self.steps == 1:
            discounts = np.float32(self.gamma) * ~step.terminated
            self.replay.add(observations, actions, step.rewards, step.finals, discounts)
            return
        ended = step.terminated | step.truncated
        self.open.append((observations, actions, np.zeros_like(step.rewards), np.ones_like(ended)))
        for number, (begun, taken, returns, unfinished) in enumerate(self.open):
            age = len(self.open) - 1 - number
            returns += np.float32(self.gamma**age) * step.rewards
            done = unfinished & (ended | (age == self.steps - 1))
            if done.any():
                discounts = np.float32(self.gamma ** (age + 1)) * ~step.terminated
                window = begun, taken, returns, step.finals, discounts
                self.replay.add(*(window if done.all() else (part[done] for part in window)))
                unfinished &= ~done
        if len(self.open) == self.steps:
            self.open.popleft()

    def state_dict(self) -> list[list[Tensor]]:
        """The windows that are not complete."""
        return [[torch.from_numpy(part) for part in window] for window in self.open]

    def load_state_dict(self, state_dict: list[list[Tensor]]) -> None:
        """Goes back to what `state_dict` has returned."""
        for observations, actions, returns, unfinished in state_dict:
            self.open.append((observations.numpy(), actions.numpy(), returns.numpy(), unfinished.numpy()))


def memory() -> int:
    """The bytes of memory of this machine, or that its container may use; 2^63 where the system does not tell."""
    sizes = [2**63]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit in LIMITS:
        with suppress(OSError, ValueError):  # there is no such file, or it says `max`
            sizes.append(int(limit.read_text()))
    return min(sizes)
