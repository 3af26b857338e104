"""Vectorised environments: Gymnasium's own steps, what an episode's end hands out, statistics, and exact resume."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Discrete

from agents._environments import CONTINUOUS, DISCRETE
from agents._vector import CompiledEnvironments, Environments, Gathered, Step, VectorisedCartPole

KINDS = [DISCRETE, CONTINUOUS]
COMPILED = pytest.mark.xdist_group("compiled")  # one worker compiles the kernels once
MADE = [
    pytest.param(Gathered, "CartPole-v1", id="gathered"),
    pytest.param(Gathered, "Pendulum-v1", id="gathered-pendulum"),
    pytest.param(VectorisedCartPole, "CartPole-v1", id="vectorised"),
    pytest.param(CompiledEnvironments, "CartPole-v1", id="compiled", marks=COMPILED),
    pytest.param(CompiledEnvironments, "Pendulum-v1", id="compiled-pendulum", marks=COMPILED),
]
Make = Callable[[str, int, int, list[str]], Environments]


def actions_for(environments: Environments, seed: int = 0) -> Iterator[Any]:
    """Random actions for all, always in the same memory."""
    rng, space, count = np.random.default_rng(seed), environments.action_space, environments.count
    if isinstance(space, Discrete):
        buffer: Any = np.zeros(count, np.int64)
        while True:
            buffer[:] = rng.integers(space.n, size=count)
            yield buffer
    buffer = np.zeros((count, 1), np.float32)
    while True:
        buffer[:] = rng.uniform(-2, 2, size=buffer.shape)
        yield buffer


def steps_of(environments: Environments, number: int, seed: int = 0) -> list[Step]:
    return [environments.step(actions) for actions in islice(actions_for(environments, seed), number)]


def assert_equal_steps(one: list[Step], other: list[Step]) -> None:
    for first, second in zip(one, other, strict=True):
        for name, ours, theirs in zip(Step._fields, first, second, strict=True):
            np.testing.assert_array_equal(ours, theirs, name)
            assert ours.dtype == theirs.dtype


@pytest.fixture
def register() -> Iterator[Callable[[int], str]]:
    """Registers CartPole with a time limit; returns its name."""
    names = []

    def short(limit: int) -> str:
        name = f"Short{limit}-v0"
        gymnasium.register(
            name,
            "gymnasium.envs.classic_control.cartpole:CartPoleEnv",
            vector_entry_point="gymnasium.envs.classic_control.cartpole:CartPoleVectorEnv",
            max_episode_steps=limit,
        )
        names.append(name)
        return name

    yield short
    for name in names:
        del gymnasium.registry[name]


@pytest.mark.parametrize(("env_id", "steps", "ends"), [
    ("CartPole-v1", 100, "terminated"), ("Acrobot-v1", 501, "truncated"), ("Pendulum-v1", 201, "truncated"),
    ("LunarLander-v3", 200, "terminated"),
])  # fmt: skip
def test_a_step_is_that_of_single_environments(env_id: str, steps: int, ends: str) -> None:
    """Values, rewards, ends of both kinds, last observations, and those of the episodes that follow."""
    if env_id == "LunarLander-v3":
        pytest.importorskip("Box2D")
    ours = Gathered(env_id, 2, 7, KINDS)
    singles = [gymnasium.make(env_id) for _ in range(2)]
    for single, seed in zip(singles, np.random.SeedSequence(7).generate_state(2).tolist(), strict=True):
        single.reset(seed=seed)
    np.testing.assert_array_equal(ours.observations, [single.reset()[0] for single in singles])
    ended = {"terminated": 0, "truncated": 0}
    for actions in islice(actions_for(ours), steps):
        step = ours.step(actions)
        assert (step.finals is step.observations) == (not (step.terminated | step.truncated).any())
        assert ours.observations is step.observations
        for number, single in enumerate(singles):
            observation, reward, terminated, truncated, _ = single.step(actions[number])
            np.testing.assert_array_equal(step.finals[number], observation)
            assert step.rewards[number] == np.float32(reward)
            assert step.terminated[number] == terminated
            assert step.truncated[number] == (truncated and not terminated)
            if terminated or truncated:
                observation, _ = single.reset()
            np.testing.assert_array_equal(step.observations[number], observation)
        ended["terminated"] += step.terminated.sum()
        ended["truncated"] += step.truncated.sum()
    assert ended[ends] >= 2
    assert [array.dtype for array in step] == [np.float32, np.float32, np.bool_, np.bool_, np.float32]


def test_the_vectorised_cartpole_moves_as_single_ones() -> None:
    ours = VectorisedCartPole("CartPole-v1", 8, 7, KINDS)
    single: Any = gymnasium.make("CartPole-v1").unwrapped
    single.reset()
    ended = 0
    for actions in islice(actions_for(ours), 60):
        before: Any = ours.environment.state
        states = before.T.copy()
        step = ours.step(actions)
        for number in range(8):
            single.state, single.steps_beyond_terminated = states[number], None
            observation, reward, terminated, *_ = single.step(actions[number])
            np.testing.assert_allclose(step.finals[number], observation, rtol=1e-6)
            assert (step.rewards[number], step.terminated[number]) == (reward, terminated)
            assert not step.truncated[number]
            if terminated:
                ended += 1
                assert (np.abs(step.observations[number]) < 0.05).all()
            else:
                np.testing.assert_array_equal(step.observations[number], step.finals[number])
    assert ended > 8


@pytest.mark.filterwarnings("ignore:.*The environment CartPole-v0 is out of date")
@pytest.mark.parametrize(("env_id", "limit"), [("CartPole-v0", 200), ("CartPole-v1", 500)])
@pytest.mark.parametrize("kind", [VectorisedCartPole, pytest.param(CompiledEnvironments, marks=COMPILED)])
def test_the_time_limit_is_the_registrys(kind: Any, env_id: str, limit: int) -> None:
    environments = kind(env_id, 2, 0, KINDS)
    still: Any = np.zeros(2, np.int64)
    for step_number in range(1, limit + 1):
        state = environments._worlds.states if kind is CompiledEnvironments else environments.environment.state
        state[:] = 0.0  # nothing falls
        step = environments.step(still)
        assert not step.terminated.any()
        assert step.truncated.all() == step.truncated.any() == (step_number == limit)
    assert list(environments.lengths) == [limit, limit]


@pytest.mark.parametrize("kind", [Gathered, VectorisedCartPole, pytest.param(CompiledEnvironments, marks=COMPILED)])
def test_truncation_hands_out_the_last_observation_and_the_next_episodes(
    kind: Any, register: Callable[[int], str]
) -> None:
    environments = kind(register(5), 3, 0, KINDS)
    for number, step in enumerate(steps_of(environments, 10), start=1):
        assert not step.terminated.any()
        assert step.truncated.tolist() == [number % 5 == 0] * 3
        assert (step.finals is step.observations) == (number % 5 != 0)
        if number % 5 == 0:
            assert (np.abs(step.finals[:, 1]) > 0.1).all()  # five pushes make no balance
            assert (np.abs(step.observations) <= 0.05).all()
    assert environments.scalars() == {
        "rollout/ep_rew_mean": 5, "rollout/ep_rew_min": 5, "rollout/ep_rew_max": 5, "rollout/ep_len_mean": 5,
        "time/episodes": 6,
    }  # fmt: skip


@pytest.mark.parametrize("kind", [Gathered, VectorisedCartPole, pytest.param(CompiledEnvironments, marks=COMPILED)])
def test_an_episode_that_falls_at_its_time_limit_is_terminated(kind: Any, register: Callable[[int], str]) -> None:
    environments = kind(register(1), 2, 0, KINDS)
    falling = [2.39, 10.0, 0.0, 0.0]
    if kind is Gathered:
        environments.environments[1].unwrapped.state = np.array(falling)
    elif kind is VectorisedCartPole:
        environments.environment.state[:, 1] = falling
    else:
        environments._worlds.states[1] = falling
    step = environments.step(np.ones(2, np.int64))
    assert step.terminated.tolist() == [False, True]
    assert step.truncated.tolist() == [True, False]
    assert step.finals[1, 0] > 2.4


@pytest.mark.parametrize(("kind", "env_id"), MADE)
def test_statistics_are_those_of_the_episodes(kind: Make, env_id: str) -> None:
    environments = kind(env_id, 3, 0, KINDS)
    assert not environments.scalars()
    scores, lengths = [], []
    score, length = np.zeros(3), np.zeros(3, int)
    for step in steps_of(environments, 410):
        score += step.rewards
        length += 1
        for number in np.flatnonzero(step.terminated | step.truncated):
            scores.append(score[number])
            lengths.append(length[number])
            score[number] = length[number] = 0
    assert len(scores) >= 6
    assert environments.episodes == len(scores)
    assert list(environments.lengths) == lengths[-100:]
    np.testing.assert_allclose(list(environments.scores), scores[-100:], rtol=1e-6)
    scalars = environments.scalars()
    assert scalars["rollout/ep_rew_mean"] == pytest.approx(np.mean(scores[-100:]), rel=1e-6)
    assert scalars["rollout/ep_rew_min"] == pytest.approx(min(scores[-100:]), rel=1e-6)
    assert scalars["rollout/ep_rew_max"] == pytest.approx(max(scores[-100:]), rel=1e-6)
    assert scalars["rollout/ep_len_mean"] == pytest.approx(np.mean(lengths[-100:]))


@pytest.mark.parametrize(("kind", "env_id"), [*MADE, (Gathered, "LunarLander-v3")])
def test_a_resume_in_mid_episode_is_exact(kind: Make, env_id: str) -> None:
    """Through a file, with episodes that end before, between and after."""
    if env_id == "LunarLander-v3":
        pytest.importorskip("Box2D")
    environments, behind = kind(env_id, 3, 0, KINDS), kind(env_id, 3, 99, KINDS)
    steps_of(environments, 130)
    file = io.BytesIO()
    torch.save(environments.state(), file)
    file.seek(0)
    behind.restore(torch.load(file, weights_only=True))
    np.testing.assert_array_equal(behind.observations, environments.observations)
    assert behind.state() == environments.state()
    steps = steps_of(environments, 110, seed=1)
    assert_equal_steps(steps, steps_of(behind, 110, seed=1))
    assert any((step.terminated | step.truncated).any() for step in steps)
    assert behind.state() == environments.state()


@pytest.mark.parametrize(("kind", "env_id"), MADE)
def test_random_numbers_follow_from_the_seed(kind: Make, env_id: str) -> None:
    one, same, other = (kind(env_id, 2, seed, KINDS) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.observations, same.observations)
    assert len(np.unique(np.concatenate([one.observations, other.observations]), axis=0)) == 4
    steps = steps_of(one, 201)
    assert_equal_steps(steps, steps_of(same, 201))
    begun = [
        observation
        for step in [*steps, *steps_of(other, 201)]
        for observation in step.observations[step.terminated | step.truncated]
    ]
    assert len(np.unique(begun, axis=0)) == len(begun) >= 4


@pytest.mark.parametrize(("kind", "env_id"), MADE)
def test_what_was_handed_out_is_never_written_to(kind: Make, env_id: str) -> None:
    environments = kind(env_id, 2, 0, KINDS)
    first = environments.observations
    before = first.copy()
    handed, copies = [], []
    for actions in islice(actions_for(environments), 202):
        step = environments.step(actions)
        handed.append(step)
        copies.append(Step._make(array.copy() for array in step))
    np.testing.assert_array_equal(first, before)
    assert_equal_steps(handed, copies)


@pytest.mark.parametrize(("kind", "env_id"), MADE)
def test_actions_for_another_number_of_environments_are_refused(kind: Make, env_id: str) -> None:
    environments, others = kind(env_id, 3, 0, KINDS), kind(env_id, 4, 0, KINDS)
    for wrong, right in ((others, environments), (environments, others)):
        with pytest.raises((ValueError, AssertionError)):
            right.step(next(actions_for(wrong)))
