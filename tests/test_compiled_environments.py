"""Compiled environments: Gymnasium's dynamics, ends and resets, and which engine steps an agent's environments."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import gymnasium
import numpy as np
import pytest

from agents._compiled import NUMBERS, advance, observe, random_state, start, stepper
from agents._environments import CONTINUOUS, DISCRETE
from agents._vector import COMPILED_FROM, CompiledEnvironments, Environments, make_environments
from rlboard.errors import UsageError

pytestmark = pytest.mark.xdist_group("compiled")  # one worker compiles the kernels once

KINDS = [DISCRETE, CONTINUOUS]
KNOWN = ["CartPole-v1", "Acrobot-v1", "MountainCar-v0", "Pendulum-v1", "MountainCarContinuous-v0"]
IN_A_KERNEL = [
    pytest.param(env_id, marks=[] if env_id in ("CartPole-v1", "Pendulum-v1") else pytest.mark.slow) for env_id in KNOWN
]  # each compiles for seconds
# Gymnasium rounds the state of this one to single precision, and of no other.
TOLERANCE = dict.fromkeys(KNOWN, (1e-12, 1e-12)) | {"MountainCarContinuous-v0": (2e-7, 1e-8)}


def single(env_id: str, state: Any) -> Any:
    """Gymnasium's environment, in this state."""
    environment: Any = gymnasium.make(env_id).unwrapped
    environment.reset(seed=0)
    place(environment, state)
    return environment


def place(environment: Any, state: Any) -> None:
    environment.state = np.array(state[: len(environment.state)])
    environment.steps_beyond_terminated = None


def actions_of(env_id: str, shape: tuple[int, ...]) -> Any:
    space, rng = gymnasium.make(env_id).action_space, np.random.default_rng(0)
    if isinstance(space, gymnasium.spaces.Discrete):
        return rng.integers(space.n, size=shape)
    return rng.uniform(-2.5, 2.5, size=(*shape, 1)).astype(np.float32)  # beyond what either of them can do


@pytest.mark.parametrize("env_id", KNOWN)
def test_the_dynamics_are_gymnasiums(env_id: str) -> None:
    """1,000 random steps of `advance` as plain Python."""
    number = NUMBERS[str(gymnasium.spec(env_id).entry_point)]
    rng = np.random.default_rng(1)
    theirs = single(env_id, rng.uniform(-0.05, 0.05, size=4))
    ours = np.zeros(theirs.observation_space.shape, np.float32)
    for action in actions_of(env_id, (1000,)):
        first, second, third, fourth = (*map(float, theirs.state), 0.0, 0.0)[:4]
        observation, reward, terminated, _, _ = theirs.step(action)
        before, number_or_force = (first, second, third, fourth), action.flat[0] if action.shape else action
        state, our_reward, our_terminated = advance(number, before, number_or_force)
        np.testing.assert_allclose(state[: len(theirs.state)], theirs.state, *TOLERANCE[env_id])
        observe(number, state, ours)
        np.testing.assert_allclose(ours, observation, rtol=1e-6, atol=1e-6)
        assert our_reward == pytest.approx(
            float(reward), rel=1e-12, abs=1e-9
        )  # a torque's square is in single precision
        assert our_terminated == terminated
        if terminated:
            place(theirs, rng.uniform(-0.05, 0.05, size=4))


@pytest.mark.parametrize("env_id", IN_A_KERNEL)
def test_a_step_of_the_kernel_is_gymnasiums(env_id: str) -> None:
    """1,000 random steps: states, last observations, rewards, ends of both kinds, and what follows them."""
    ours, limit = CompiledEnvironments(env_id, 2, 0, KINDS), gymnasium.spec(env_id).max_episode_steps
    worlds = ours._worlds
    theirs = single(env_id, worlds.states[0])
    ends = 0
    for actions in actions_of(env_id, (1000, 2)):
        if ends == 0:  # where they are terminated soon: towards the goal, as fast as can be
            goal = {"MountainCar-v0": [0.4, 0.06], "MountainCarContinuous-v0": [0.4, 0.06], "Acrobot-v1": [2.0, 0.5]}
            worlds.states[:, :2] = goal.get(env_id, worlds.states[:, :2])
        before, steps = worlds.states.copy(), worlds.steps + 1
        step = ours.step(actions)
        for number in range(2):
            place(theirs, before[number])
            observation, reward, terminated, _, _ = theirs.step(actions[number])
            truncated = not terminated and steps[number] == limit
            np.testing.assert_allclose(step.finals[number], observation, rtol=1e-6, atol=1e-6)
            assert step.rewards[number] == pytest.approx(float(reward), rel=1e-6)
            assert (step.terminated[number], step.truncated[number]) == (terminated, truncated)
            if terminated or truncated:
                ends += 1
                assert worlds.steps[number] == worlds.scores[number] == 0
                theirs.state = worlds.states[number, : len(theirs.state)]
                seen = np.zeros_like(observation)
                observe(NUMBERS[str(theirs.spec.entry_point)], tuple(worlds.states[number]), seen)
                np.testing.assert_allclose(step.observations[number], seen, rtol=1e-6, atol=1e-7)
            else:
                size = len(theirs.state)
                np.testing.assert_allclose(worlds.states[number, :size], theirs.state, *TOLERANCE[env_id])
                np.testing.assert_array_equal(step.observations[number], step.finals[number])
                assert worlds.steps[number] == steps[number]
    assert ends >= 2


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "MountainCarContinuous-v0"])
@np.errstate(over="ignore")  # the random numbers wrap around
def test_resets_are_uniform_in_gymnasiums_range(env_id: str) -> None:
    number, random = NUMBERS[str(gymnasium.spec(env_id).entry_point)], random_state(0)
    environment: Any = gymnasium.make(env_id).unwrapped
    ours = np.array([start(number, random) for _ in range(1000)])
    theirs = []
    for seed in range(1000):
        environment.reset(seed=seed)
        theirs.append(environment.state)
    width = np.ptp(theirs, axis=0)
    for statistic, tolerance in ((np.min, 0.01), (np.max, 0.01), (np.mean, 0.04), (np.std, 0.04)):
        difference = np.abs(statistic(ours[:, :2], axis=0) - statistic(theirs, axis=0))
        assert (difference <= tolerance * width).all(), statistic
    assert not ours[:, 2:].any()


def made(engine: str = "auto", state: Any = None, kinds: list[str] | None = None, **fields: Any) -> Environments:
    config: Any = SimpleNamespace(
        **{"env_id": "CartPole-v1", "num_envs": 2, "total_timesteps": COMPILED_FROM, "seed": 0, "engine": engine}
        | fields
    )
    return make_environments(config, kinds or KINDS, state)


@pytest.mark.parametrize(("fields", "engine"), [
    ({}, "compiled"),
    ({"total_timesteps": COMPILED_FROM - 1}, "gym"),
    ({"engine": "compiled", "total_timesteps": 1}, "compiled"),
    ({"engine": "gym"}, "gym"),
])  # fmt: skip
def test_auto_is_compiled_where_it_pays(fields: dict[str, Any], engine: str) -> None:
    environments = made(**fields)
    assert environments.engine == engine
    assert environments.notice.startswith(f"engine: {engine}")
    assert ":" not in environments.notice.removeprefix("engine: ")


@pytest.mark.parametrize("engine", ["gym", "compiled"])
def test_a_resumed_run_stays_in_its_engine(engine: str) -> None:
    """Even where `auto` would take the other one for as many steps."""
    state = made(engine).state()
    for steps in (1, COMPILED_FROM):
        resumed = made("auto", state, total_timesteps=steps)
        assert resumed.engine == engine
        assert resumed.state() == state


def test_other_environments_are_refused_or_left_to_gymnasium() -> None:
    gymnasium.register(
        "Slow-v0", "gymnasium.envs.classic_control.cartpole:CartPoleEnv", kwargs={"sutton_barto_reward": True}
    )
    known = "--engine compiled knows CartPole-v1, Acrobot-v1, MountainCar-v0, Pendulum-v1 and MountainCarContinuous-v0"
    try:
        for env_id in ("Slow-v0", "gymnasium.envs.classic_control:CartPole-v1"):
            with pytest.raises(UsageError, match=f"{known}, not {env_id}: use --engine gym"):
                made("compiled", env_id=env_id)
            assert made("auto", env_id=env_id).notice == f"engine: gym: {known}, not {env_id}: use --engine gym"
    finally:
        del gymnasium.registry["Slow-v0"]
    for engine in ("auto", "compiled"):
        with pytest.raises(UsageError, match=r"has actions Discrete\(2\)"):
            made(engine, kinds=[CONTINUOUS])


@pytest.mark.parametrize("engine", ["auto", "compiled"])
def test_without_numba_gymnasium_goes_on(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state = made(engine).state()
    monkeypatch.delitem(sys.modules, "agents._compiled")
    monkeypatch.setitem(sys.modules, "numba", None)
    environments = made(engine)
    assert environments.engine == "gym"
    assert environments.notice.startswith("engine: gym: numba cannot be used (")
    with pytest.raises(UsageError, match=r"began in the compiled engine.*numba cannot be used \(.*rlboard doctor"):
        made(engine, state)


def test_without_a_place_for_numbas_cache_gymnasium_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba.core.caching.CompileResultCacheImpl._locator_classes", [])
    stepper.cache_clear()
    assert made("compiled").notice.startswith("engine: gym: numba cannot be used (cannot cache function")


def test_with_a_broken_cache_gymnasium_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile.load", Mock(side_effect=EOFError("Ran out of input")))
    stepper.cache_clear()
    assert made().notice == "engine: gym: numba cannot be used (Ran out of input)"


def test_numba_switched_off_leaves_gymnasium(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba.config.DISABLE_JIT", 1)
    stepper.cache_clear()
    assert made("compiled").notice == "engine: gym: numba cannot be used (NUMBA_DISABLE_JIT is set)"
