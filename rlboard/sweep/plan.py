"""What a sweep is to do: the same in all of its processes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from rlboard.config import Value
from rlboard.registry import Loop
from rlboard.run import RunOptions
from rlboard.sweep.space import Dimension, combinations

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler

    from rlboard.sweep.ledger import Ledger

PARTS = 20
"""Of a trial, at whose ends it may be pruned: trials are compared at equal shares, whatever their steps."""


@dataclass(frozen=True)
class Sweep:
    """A sweep.

    Attributes:
        loop: what is run.
        space: what is searched.
        values: the value of every option of the loop, but for what a trial chooses.
        fixed: those that the user has fixed.
        options: the plumbing of every trial.
        method: `grid`, `random` or `tpe`.
        pruner: `none`, `median` or `hyperband`.
        trials: how many, over all machines.
        jobs: how many at once, in processes of this machine.
        metric: the tag whose largest value is searched; empty for the loop's headline.
        seed: of what is tried.
        name: of the study.
        directory: of the study; its trials are runs below it.
        storage: address of the study.
    """

    loop: Loop
    space: tuple[Dimension, ...]
    values: Mapping[str, Value]
    fixed: Mapping[str, Value]
    options: RunOptions
    method: str
    pruner: str
    trials: int
    jobs: int
    metric: str
    seed: int
    name: str
    directory: str
    storage: str

    def open(self) -> Ledger:
        """The sweep's study; see `ledger.open_ledger`."""
        from rlboard.sweep.ledger import open_ledger

        identity = identity_of(self.loop, self.space, self.fixed, self.method, self.metric)
        return open_ledger(self.storage, self.name, identity, self.sampler(0), self._pruner())

    def sampler(self, slot: int) -> BaseSampler:
        """What chooses the values of the trial in a slot: of random search the same ones, whoever runs it and when."""
        from optuna.exceptions import ExperimentalWarning
        from optuna.samplers import RandomSampler, TPESampler

        seed = (self.seed * 1_000_003 + slot) % 2**32
        if self.method != "tpe":
            return RandomSampler(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return TPESampler(seed=seed, constant_liar=True)  # which keeps away from what is running

    def _pruner(self) -> BasePruner:
        from optuna.pruners import HyperbandPruner, MedianPruner, NopPruner

        if self.pruner == "hyperband":
            return HyperbandPruner(min_resource=1, max_resource=PARTS, reduction_factor=3)
        return MedianPruner() if self.pruner == "median" else NopPruner()

    def grid(self, slot: int) -> dict[str, Value]:
        """What the trial in a slot does not choose itself."""
        return self.combinations[slot] if self.method == "grid" else {}

    @cached_property
    def combinations(self) -> list[dict[str, Value]]:
        """Of a grid, by slot."""
        return combinations(self.space)


def identity_of(
    loop: Loop, space: tuple[Dimension, ...], fixed: Mapping[str, Value], method: str, metric: str
) -> dict[str, str]:
    """What is the same for all trials of a study, by its name in an error message."""
    free = {option.name for option in loop.options if option.resume}  # it decides nothing, such as a directory
    return {
        "the loop": f"{loop.track.package}/{loop.name}",
        "--space": " ".join(map(str, space)),
        "--method": method,
        "--metric": metric or "headline",
        "--set": " ".join(f"{name}={fixed[name]}" for name in sorted(fixed) if name not in free) or "nothing",
    }
