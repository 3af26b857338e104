"""Experience replay (L.-J. Lin, 1992): transitions that are learned from long after they happened."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from numpy.typing import NDArray
from torch import Tensor

from agents._vector import Environments
from rlboard.errors import UsageError

Batch = dict[str, Tensor]


class Replay:
    """The last `capacity` transitions, in one array that is made once; the oldest give way.

    A transition is one record of it, so that a batch is gathered in one pass: `observations` (observation size,),
    `actions` ((action size,) floats or a number), `rewards`, `next_observations` (observation size,), `discounts`: what
    the value of the next observation counts for, 0 where the episode was terminated.

    Raises:
        UsageError: there is not so much memory, by `option`, the flag that asks for it.
    """

    def __init__(self, capacity: int, environments: Environments, option: str = "--buffer-size") -> None:
        observations, actions = environments.observation_space, environments.action_space
        assert isinstance(observations, Box)
        shape = observations.shape
        action = ("<f4", actions.shape) if isinstance(actions, Box) else ("<i8", ())
        self.record = np.dtype(
            [
                ("actions", *action),
                ("observations", "<f4", shape),
                ("next_observations", "<f4", shape),
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
        self.added = 0

    def __len__(self) -> int:
        return min(self.added, len(self.records))

    def add(
        self,
        observations: NDArray[np.float32],
        actions: NDArray[Any],
        rewards: NDArray[np.float32],
        next_observations: NDArray[np.float32],
        discounts: NDArray[np.float32],
    ) -> None:
        """Takes in a transition of each environment; the first axis of all is (environments,)."""
        count = len(actions)
        if count == 1:  # a place without an array of places: a third of the time
            places: Any = self.added % len(self.records)
            self.records[places] = (actions[0], observations[0], next_observations[0], rewards[0], discounts[0])
        else:
            places = np.arange(self.added, self.added + count) % len(self.records)
            for name, values in zip(
                self.record.names or (), (actions, observations, next_observations, rewards, discounts), strict=True
            ):
                self.records[name][places] = values
        self.added += count

    def sample(self, size: int, rng: np.random.Generator, device: torch.device) -> Batch:
        """`size` transitions, each drawn from all with equal chance: tensors by field, (size, ...)."""
        chosen = self.records[rng.integers(len(self), size=size)]
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

    def state(self) -> dict[str, Any]:
        """The transitions, as bytes in a tensor, and how many were ever added."""
        return {"records": torch.from_numpy(self.records[: len(self)].view(np.uint8)), "added": self.added}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes back to what `state` has returned."""
        records = state["records"].numpy().view(self.record)
        self.records[: len(records)] = records
        self.added = state["added"]


def memory() -> int:
    """The bytes of memory of this machine, or that its container may use; 2^63 where the system does not tell."""
    sizes = [2**63]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(sizes)
