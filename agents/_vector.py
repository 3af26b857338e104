"""Several copies of an environment, stepped together: what every agent but REINFORCE collects its experience with.

An episode that ends is followed by the next within the same step, so that every step is a transition that happened;
what the step itself led to, the observation from which a truncated episode's future is judged, is in `Step.finals`.

There are two engines: Gymnasium's environments, here, and those of `_compiled.py`, in machine code.
Gymnasium's `SyncVectorEnv` does the same for any space and with every `info`, and is slower; nor can it be taken up
again in the middle of an episode, as an exact resume must.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from functools import cached_property
from statistics import fmean
from typing import Any, NamedTuple, Protocol

import gymnasium
import numpy as np
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.spaces import Discrete
from numpy.typing import NDArray

from agents._environments import Observations, blamed, make_environment, seen, sizes
from rlboard.config import printable
from rlboard.errors import UsageError

COMPILED_FROM = 20_000
"""Environment steps from which `--engine auto` takes the compiled engine, whether or not it must be compiled first:
equal commands give equal runs."""

VECTORISED_FROM = 8
"""Environments from which Gymnasium's own vectorised CartPole is the faster one."""

Floats = NDArray[np.float32]
Booleans = NDArray[np.bool_]


class Step(NamedTuple):
    """What one step of all environments led to.

    observations: where the next step begins, that of a new episode where one has ended; (environments, size), or
        (environments, frames, height, width) of what is seen.
    rewards: (environments,) float32.
    terminated: the episode has come to an end of its own, after which nothing can be earned; (environments,).
    truncated: it was cut short, by a time limit, and would have gone on; (environments,).
    finals: what the step itself led to, the last of an episode where one has ended; of the same shape. The very
        array `observations` where none has ended.
    """

    observations: Observations
    rewards: Floats
    terminated: Booleans
    truncated: Booleans
    finals: Observations


class Environments(ABC):
    """`count` environments of one kind, and what their episodes come to.

    Attributes:
        observations: where the next step begins, (count, ...); never written to once it was handed out.
        notice: which engine steps them, and why where another would have been taken: for an agent's first event.
    """

    engine = "gym"
    observations: Observations
    notice = "engine: gym"

    def __init__(self, env_id: str, count: int, kinds: Sequence[str]) -> None:
        environment = make_environment(env_id, kinds=kinds)
        self.env_id, self.count = env_id, count
        self.observation_space, self.action_space = environment.observation_space, environment.action_space
        environment.close()
        self.scores: deque[float] = deque(maxlen=100)
        self.lengths: deque[int] = deque(maxlen=100)
        self.episodes = 0

    @cached_property
    def first(self) -> Observations:
        """What all began with, two observations at least, to show a network by: the same in a resumed run."""
        return np.resize(self.observations, (max(2, self.count), *self.observations.shape[1:]))

    @abstractmethod
    def step(self, actions: NDArray[Any]) -> Step:
        """Takes a step in each environment: actions, (count,) integers or (count, action size) floats."""

    def note(self, scores: Sequence[float], lengths: Sequence[int]) -> None:
        """Takes in the returns and the lengths of episodes that have ended."""
        self.scores.extend(scores)
        self.lengths.extend(lengths)
        self.episodes += len(scores)

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
            "engine": self.engine,
            "scores": list(self.scores),
            "lengths": list(self.lengths),
            "episodes": self.episodes,
            "first": self.first.tolist(),
            "environments": self._state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes back to what `state` has returned."""
        self.scores.extend(state["scores"])
        self.lengths.extend(state["lengths"])
        self.episodes = state["episodes"]
        self.first = seen(state["first"], self.observation_space)
        self._restore(state["environments"])

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
        self.score: list[Any] = [0.0] * count  # of the episodes at hand
        seeds = np.random.SeedSequence(seed).generate_state(count).tolist()
        for environment, own in zip(self.environments, seeds, strict=True):
            environment.reset(seed=own)
        self.observations = np.stack([self._begin(number) for number in range(count)])

    def _begin(self, number: int) -> Observations:
        environment = self.environments[number]
        random = environment.unwrapped.np_random
        self.begun[number] = random.bit_generator.state
        self.actions[number] = []
        self.score[number] = 0.0
        # A game of Atari has random numbers of its own, which it draws from nothing but a seed.
        seed = int(random.integers(2**31)) if self.env_id.startswith("ALE/") else None
        return seen(environment.reset(seed=seed)[0], self.observation_space)

    def step(self, actions: NDArray[Any]) -> Step:
        """See `Environments.step`."""
        for taken, action in zip(self.actions, actions.copy(), strict=True):
            taken.append(action)
        with blamed(self.env_id):
            results = [environment.step(action) for environment, action in zip(self.environments, actions, strict=True)]
            led_to, gained, ends, cuts, _ = zip(*results, strict=True)
            self.score = [score + reward for score, reward in zip(self.score, gained, strict=True)]
            self.observations = finals = seen(led_to, self.observation_space)
            rewards, terminated = np.array(gained, np.float32), np.array(ends, np.bool_)
            truncated = np.array(cuts, np.bool_)
            if True in ends or True in cuts:
                self.observations = finals.copy()
                truncated &= ~terminated
                for number in np.flatnonzero(terminated | truncated).tolist():
                    self.note([float(self.score[number])], [len(self.actions[number])])
                    self.observations[number] = self._begin(number)
        return Step(self.observations, rewards, terminated, truncated, finals)

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
                observation, reward, *_ = environment.step(action)
                self.score[number] += reward
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
        self.score = np.zeros(count)  # of the episodes at hand

    def step(self, actions: NDArray[Any]) -> Step:
        """See `Environments.step`."""
        environment = self.environment
        observations, rewards, terminated, truncated, _ = environment.step(actions)
        finals, ended = observations, environment.prev_done
        self.score += rewards
        if ended.any():
            self.note(self.score[ended].tolist(), environment.steps[ended].tolist())
            self.score[ended] = 0
            truncated &= ~terminated
            fresh = environment.np_random.uniform(environment.low, environment.high, size=(4, int(ended.sum())))
            state: Any = environment.state
            state[:, ended] = fresh
            environment.steps[ended] = 0
            observations = finals.copy()
            observations[ended] = fresh.T
            environment.prev_done = np.zeros_like(ended)
        self.observations = observations
        return Step(observations, rewards, terminated, truncated, finals)

    def _state(self) -> dict[str, Any]:
        arrays = {name: getattr(self.environment, name).tolist() for name in self.STATE}
        return {**arrays, "score": self.score.tolist(), "random": self.environment.np_random.bit_generator.state}

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.environment.np_random.bit_generator.state = state["random"]
        for name in self.STATE:
            getattr(self.environment, name)[:] = state[name]
        self.score[:] = state["score"]
        state_of_all: Any = self.environment.state
        self.observations = state_of_all.T.astype(np.float32)

    def close(self) -> None:
        self.environment.close()


class CompiledEnvironments(Environments):
    """A known environment in machine code: a step of all is one call, of a few microseconds.

    The dynamics are Gymnasium's, in float64; what differs are the random numbers of resets.

    Raises:
        UsageError: the environment is not known.
        ImportError: there is no numba.
        RuntimeError: numba has no place for its cache, or is switched off.
    """

    engine = "compiled"
    STATE = ("states", "randoms", "steps", "scores")

    def __init__(self, env_id: str, count: int, seed: int, kinds: Sequence[str]) -> None:
        from agents._compiled import NUMBERS, STEPPED, Worlds, observe, prepare, start, stepper

        super().__init__(env_id, count, kinds)
        spec = gymnasium.registry.get(env_id)
        if spec is None or spec.entry_point not in NUMBERS or spec.kwargs or spec.additional_wrappers:
            raise UsageError(f"--engine compiled knows {STEPPED}, not {printable(env_id)}: use --engine gym")
        environment, (size, _) = NUMBERS[spec.entry_point], sizes(self)
        discrete = isinstance(self.action_space, Discrete)
        self._worlds = Worlds(
            states=np.zeros((count, 4)),
            randoms=np.random.SeedSequence(seed).generate_state(count, np.uint64).astype(np.uint64)[:, None],
            steps=np.zeros(count, np.int64),
            scores=np.zeros(count),
            actions=np.zeros(count, np.int64 if discrete else np.float32),
            ended_scores=np.zeros(count),
            ended_lengths=np.zeros(count, np.int64),
        )
        self._actions = self._worlds.actions if discrete else self._worlds.actions[:, None]
        self._longest = int(spec.max_episode_steps or np.iinfo(np.int64).max)
        self.observations = np.zeros((count, size), np.float32)
        with np.errstate(over="ignore"):  # random numbers wrap around
            for number in range(count):
                state = start(environment, self._worlds.randoms[number])
                self._worlds.states[number] = state
                observe(environment, state, self.observations[number])
        self._finals = np.empty_like(self.observations)
        flags = np.empty(count, np.bool_)
        outputs = (self.observations, np.empty(count, np.float32), flags, flags, self._finals)
        self._kernel, how = prepare(stepper(environment), self._worlds, self._longest, outputs)
        self.notice = f"engine: compiled{how and f' ({how})'}"

    def step(self, actions: NDArray[Any]) -> Step:
        """See `Environments.step`."""
        self._actions[:] = actions
        count = self.count
        observations, rewards = np.empty(self.observations.shape, np.float32), np.empty(count, np.float32)
        terminated, truncated, finals = np.empty(count, np.bool_), np.empty(count, np.bool_), self._finals
        ended = self._kernel(self._worlds, self._longest, (observations, rewards, terminated, truncated, finals))
        self.observations = observations
        if not ended:
            return Step(observations, rewards, terminated, truncated, observations)
        self.note(self._worlds.ended_scores[:ended].tolist(), self._worlds.ended_lengths[:ended].tolist())
        self._finals = np.empty_like(finals)  # these are handed out
        return Step(observations, rewards, terminated, truncated, finals)

    def _state(self) -> dict[str, Any]:
        arrays = {name: getattr(self._worlds, name).tolist() for name in self.STATE}
        return {**arrays, "observations": self.observations.tolist()}

    def _restore(self, state: Mapping[str, Any]) -> None:
        for name in self.STATE:
            array = getattr(self._worlds, name)
            array[:] = np.array(state[name], array.dtype)
        self.observations = np.array(state["observations"], np.float32)

    def close(self) -> None:
        """There is nothing to free."""


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
    @property
    def engine(self) -> str: ...


def make_environments(config: Wanted, kinds: Sequence[str], state: Mapping[str, Any] | None = None) -> Environments:
    """The environments that `config` asks for, each with random numbers of its own that follow from its seed.

    They are of these `kinds`: DISCRETE, CONTINUOUS, FRAMES.

    With the `state` of earlier ones they go on from there, in the same engine.

    Raises:
        UsageError: see `make_environment`; or the engine that is asked for does not know the environment; or numba,
            which the `state` needs, cannot be used.
    """
    engine = state["engine"] if state else config.engine
    arguments = (config.env_id, config.num_envs, config.seed, kinds)
    environments: Environments | None = None
    reason = ""
    if engine == "compiled" or (engine == "auto" and config.total_timesteps >= COMPILED_FROM):
        try:
            environments = CompiledEnvironments(*arguments)
        except UsageError as error:
            if engine == "compiled":
                raise
            reason = f": {error}"
        except Exception as error:  # noqa: BLE001 - no numba, no place for its cache, a cache broken by a power failure
            reason = f": numba cannot be used ({printable(error, 120)})"
            if state:
                raise UsageError(f"this run began in the compiled engine{reason}: see rlboard doctor") from None
    if environments is None:
        spec = gymnasium.registry.get(config.env_id)
        vectorised = spec and spec.vector_entry_point == "gymnasium.envs.classic_control.cartpole:CartPoleVectorEnv"
        kind = VectorisedCartPole if vectorised and config.num_envs >= VECTORISED_FROM else Gathered
        environments = kind(*arguments)
        environments.notice += reason
    environments.first  # noqa: B018 - before a step is taken
    if state:
        environments.restore(state)
    return environments
