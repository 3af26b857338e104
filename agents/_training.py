"""What agents that count environment steps do around their loops: begin or go on, count, and say what came of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from agents._environments import NOT_EVALUATED, Act, evaluation, passed
from agents._vector import Wanted, make_environments
from rlboard.devices import resolve_device
from rlboard.events import Embedding, Event
from rlboard.seeding import seed_everything


class Settings(Wanted, Protocol):
    """What an agent's `Config` says about its training."""

    @property
    def device(self) -> str: ...
    @property
    def log_every(self) -> int: ...
    @property
    def eval_every(self) -> int: ...
    @property
    def eval_episodes(self) -> int: ...


class Stateful(Protocol):
    """A part of a training that a checkpoint keeps, in torch's words: networks and optimizers are such."""

    def state_dict(self) -> Any:
        """Everything that decides what it does next."""
        ...

    def load_state_dict(self, state_dict: Any) -> Any:
        """Goes back to what `state_dict` has returned."""
        ...


class Training:
    """A training of so many `steps` at a time: its environments, its random numbers, and how far it has come.

    Attributes:
        step: the environment steps so far. total: those to come to, rounded up to whole updates.
        rng: for all that is drawn in NumPy. device: that the networks lie on.

    Raises:
        UsageError: the environment or the device cannot be used.
    """

    def __init__(
        self, config: Settings, kinds: Sequence[str], state: Mapping[str, Any] | None = None, steps: int | None = None
    ) -> None:
        torch.set_num_threads(1)  # a second thread costs more than layers of this size can give it to do
        self.config, self.steps = config, steps or config.num_envs
        self.rng = seed_everything(config.seed)
        self.device = resolve_device(config.device)
        self.environments = make_environments(config, kinds, state["environments"] if state else None)
        self.step, self.total = 0, math.ceil(config.total_timesteps / self.steps) * self.steps
        self._before = 0
        self._begun = state

    def keep(self, model: nn.Module, **parts: Stateful | Tensor | dict[str, Any]) -> None:
        """Names what else a checkpoint keeps, and takes it back to where an earlier training has stood."""
        self.model = model
        self._parts: dict[str, Stateful | Tensor | dict[str, Any]] = {"model": model, **parts}
        if self._begun is None:
            return
        for name, part in self._parts.items():
            if isinstance(part, Tensor):
                part.copy_(self._begun[name])
            elif isinstance(part, dict):
                part.update(self._begun[name])
            else:
                part.load_state_dict(self._begun[name])
        self.rng.bit_generator.state = self._begun["random"]
        self.step = self._begun["step"]

    def state(self) -> dict[str, Any]:
        """Everything that decides how the training goes on."""
        parts = {
            name: part if isinstance(part, Tensor | dict) else part.state_dict() for name, part in self._parts.items()
        }
        random = self.rng.bit_generator.state
        return {**parts, "environments": self.environments.state(), "random": random, "step": self.step}

    def begin(self) -> Event:
        """The first event, which shows the network by what the environments began with."""
        inputs = torch.from_numpy(self.environments.first).to(self.device)
        notice = self.environments.notice
        return Event(self.step, self.total, model=self.model, inputs=inputs, notice=notice, state=self.state)

    def count(self) -> bool:
        """Counts the steps of an update, and tells whether an event is due."""
        self._before, self.step = self.step, self.step + self.steps
        return self._judged() or self.passed(self.config.log_every) > 0

    def passed(self, every: int) -> int:
        """How many multiples of `every` are among the steps that were counted last."""
        return passed(every, self._before, self.step)

    def _judged(self) -> bool:
        """Whether an evaluation is due."""
        return self.step >= self.total or self.passed(self.config.eval_every) > 0

    def event(
        self,
        scalars: Mapping[str, float],
        greedy: Act,
        histograms: Mapping[str, Callable[[], Tensor | NDArray[Any]]],
        observations: Callable[[], Embedding] | None,
    ) -> Event:
        """What has come of it until now, judged by the policy `greedy`, and at the end `observations` as points."""
        config, judgement = self.config, NOT_EVALUATED
        if self._judged():
            judgement = evaluation(config.env_id, greedy, config.eval_episodes, config.seed)
        scalars = {**self.environments.scalars(), **scalars, "time/steps": self.step, **judgement.scalars}
        embeddings = {"Embeddings/observations": observations} if self.step >= self.total and observations else {}
        return Event(
            self.step,
            self.total,
            scalars,
            "rollout/ep_rew_mean",
            model=self.model,
            images=judgement.images,
            videos=judgement.videos,
            histograms=histograms,
            embeddings=embeddings,
            state=self.state,
        )
