"""Several copies of an environment, stepped together: what every agent but REINFORCE collects its experience with.

An episode that ends is followed by the next within the same step, so that every step is a transition that happened;
what the step itself led to, the observation from which a truncated episode's future is judged, is in `Step.finals`.

Gymnasium's `SyncVectorEnv` does the same for any space and with every `info`, at half the speed for small
environments; nor can it be taken up again in the middle of an episode, as an exact resume must.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple, Protocol

import gymnasium
import numpy as np
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from numpy.typing import NDArray

from agents._environments import make_environment

VECTORISED_FROM = 8
"""Environments from which Gymnasium's own vectorised CartPole is the faster one."""

Floats = NDArray[np.float32]
Booleans = NDArray[np.bool_]


class Step(NamedTuple):
    """What one step of all environments led to.

    observations: where the next step begins, that of a new episode where one has ended; (environments, size).
    rewards: (environments,) float32.
    terminated: the episode has come to an end of its own, after which nothing can be earned; (environments,).
    truncated: it was cut short, by a time limit, and would have gone on; (environments,).
    finals: what the step itself led to, the last of an episode where one has ended; (environments, size).
    """

    observations: Floats
    rewards: Floats
    terminated: Booleans
    truncated: Booleans
    finals: Floats


class Environments(ABC):
    """`count` environments of one kind, and what their episodes come to.

    Attributes:
        observations: where the next step begins, (count, size); never written to once it was handed out.
    """

    observations: Floats

    def __init__(self, env_id: str, count: int, kinds: Sequence[str]) -> None:
        environment = make_environment(env_id, kinds=kinds)
        self.env_id, self.count = env_id, count
        self.observation_space, self.action_space = environment.observation_space, environment.action_space
        environment.close()
        self.scores: deque[float] = deque(maxlen=100)
        self.lengths: deque[int] = deque(maxlen=100)
        self.episodes = 0
        self.score = np.zeros(count)  # of the episodes at hand
        self.length = np.zeros(count, np.int64)

    def step(self, actions: NDArray[Any]) -> Step:
        """Takes a step in each environment: actions, (count,) integers or (count, action size) floats."""
        step = self._advance(actions)
        self.observations = step.observations
        self.score += step.rewards
        self.length += 1
        ended = step.terminated | step.truncated
        if ended.any():
            self.scores.extend(self.score[ended].tolist())
            self.lengths.extend(self.length[ended].tolist())
            self.episodes += int(ended.sum())
            self.score[ended] = self.length[ended] = 0
        return step

    def scalars(self) -> dict[str, float]:
        """Mean, smallest and largest return and mean length of the last 100 episodes; empty before any has ended."""
        if not self.scores:
            return {}
        return {
            "rollout/ep_rew_mean": fmean(self.scores),
            "rollout/ep_rew_min": min(self.scores),
            "rollout/ep_rew_max": max(self.scores),
            "rollout/ep_len_mean": fmean(self.lengths),
            "time/episodes": self.episodes,
        }

    def state(self) -> dict[str, Any]:
        """Everything that decides the next step, given its actions."""
        return {
            "scores": list(self.scores),
            "lengths": list(self.lengths),
            "episodes": self.episodes,
            "score": self.score.tolist(),
            "length": self.length.tolist(),
            "environments": self._state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes back to what `state` has returned."""
        self.scores.extend(state["scores"])
        self.lengths.extend(state["lengths"])
        self.episodes = state["episodes"]
        self.score[:] = state["score"]
        self.length[:] = state["length"]
        self._restore(state["environments"])

    @abstractmethod
    def _advance(self, actions: NDArray[Any]) -> Step: ...

    @abstractmethod
    def _state(self) -> Any: ...

    @abstractmethod
    def _restore(self, state: Any) -> None: ...

    @abstractmethod
    def close(self) -> None:
        """Frees what the environments hold."""


class Gathered(Environments):
    """Any environments of Gymnasium, stepped one after the other.

    An environment's own state cannot be saved in general. Where an episode stands follows from the random numbers that
    it began with and from its actions since, which are noted, and played again by `restore`.
    """

    def __init__(self, env_id: str, count: int, seed: int, kinds: Sequence[str]) -> None:
        super().__init__(env_id, count, kinds)
        self.environments = [make_environment(env_id) for _ in range(count)]
        self.begun: list[Mapping[str, Any]] = [{}] * count
        self.actions: list[list[Any]] = [[] for _ in range(count)]
        seeds = np.random.SeedSequence(seed).generate_state(count).tolist()
        for environment, own in zip(self.environments, seeds, strict=True):
            environment.reset(seed=own)
        self.observations = np.stack([self._begin(number) for number in range(count)])

    def _begin(self, number: int) -> Floats:
        environment = self.environments[number]
        self.begun[number] = environment.unwrapped.np_random.bit_generator.state
        self.actions[number] = []
        return np.asarray(environment.reset()[0], np.float32)

    def _advance(self, actions: NDArray[Any]) -> Step:
        observations = np.empty_like(self.observations)
        rewards = np.empty(self.count, np.float32)
        terminated, truncated = np.zeros(self.count, np.bool_), np.zeros(self.count, np.bool_)
        finals = observations
        for number, (environment, taken, action) in enumerate(
            zip(self.environments, self.actions, actions, strict=True)
        ):
            taken.append(action)
            observations[number], rewards[number], end, cut, _ = environment.step(action)
            if end or cut:
                if finals is observations:
                    finals = observations.copy()
                finals[number] = observations[number]
                terminated[number], truncated[number] = end, cut and not end
                observations[number] = self._begin(number)
            elif finals is not observations:
                finals[number] = observations[number]
        return Step(observations, rewards, terminated, truncated, finals)

    def _state(self) -> list[dict[str, Any]]:
        return [
            {"begun": begun, "actions": np.array(actions).tolist()}
            for begun, actions in zip(self.begun, self.actions, strict=True)
        ]

    def _restore(self, state: list[dict[str, Any]]) -> None:
        dtype = self.action_space.dtype
        for number, (environment, told) in enumerate(zip(self.environments, state, strict=True)):
            environment.unwrapped.np_random.bit_generator.state = told["begun"]
            observation = self._begin(number)
            for action in np.array(told["actions"], dtype):
                self.actions[number].append(action)
                observation = environment.step(action)[0]
            self.observations[number] = observation

    def close(self) -> None:
        for environment in self.environments:
            environment.close()


class VectorisedCartPole(Environments):
    """Gymnasium's own vectorised CartPole, all environments in one array.

    It would begin the next episode one step late, in a step in which nothing happens; here that is done at once.
    """

    STATE = ("state", "steps")

    def __init__(self, env_id: str, count: int, seed: int, kinds: Sequence[str]) -> None:
        super().__init__(env_id, count, kinds)
        made = gymnasium.make_vec(env_id, count, gymnasium.VectorizeMode.VECTOR_ENTRY_POINT)
        assert isinstance(made.unwrapped, CartPoleVectorEnv)
        self.environment = made.unwrapped
        self.observations, _ = self.environment.reset(seed=seed)

    def _advance(self, actions: NDArray[Any]) -> Step:
        environment = self.environment
        observations, rewards, terminated, truncated, _ = environment.step(actions)
        finals, ended = observations, environment.prev_done
        if ended.any():
            truncated &= ~terminated
            fresh = environment.np_random.uniform(environment.low, environment.high, size=(4, int(ended.sum())))
            state: Any = environment.state
            state[:, ended] = fresh
            environment.steps[ended] = 0
            observations = finals.copy()
            observations[ended] = fresh.T
            environment.prev_done = np.zeros_like(ended)
        return Step(observations, rewards, terminated, truncated, finals)

    def _state(self) -> dict[str, Any]:
        arrays = {name: getattr(self.environment, name).tolist() for name in self.STATE}
        return {**arrays, "random": self.environment.np_random.bit_generator.state}

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.environment.np_random.bit_generator.state = state["random"]
        for name in self.STATE:
            getattr(self.environment, name)[:] = state[name]
        state_of_all: Any = self.environment.state
        self.observations = state_of_all.T.astype(np.float32)

    def close(self) -> None:
        self.environment.close()


class Wanted(Protocol):
    """What an agent's `Config` says about its environments."""

    @property
    def env_id(self) -> str: ...
    @property
    def num_envs(self) -> int: ...
    @property
    def total_timesteps(self) -> int: ...
    @property
    def seed(self) -> int: ...


def make_environments(config: Wanted, kinds: Sequence[str], state: Mapping[str, Any] | None = None) -> Environments:
    """The environments that `config` asks for, each with random numbers of its own that follow from its seed.

    Their actions are of these `kinds`, DISCRETE or CONTINUOUS.

    With the `state` of earlier ones they go on from there.

    Raises:
        UsageError: see `make_environment`.
    """
    spec = gymnasium.registry.get(config.env_id)
    vectorised = spec and spec.vector_entry_point == "gymnasium.envs.classic_control.cartpole:CartPoleVectorEnv"
    kind = VectorisedCartPole if vectorised and config.num_envs >= VECTORISED_FROM else Gathered
    environments = kind(config.env_id, config.num_envs, config.seed, kinds)
    if state:
        environments.restore(state)
    return environments
