import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from numpy.typing import NDArray

from agents import _replay
from agents._replay import Replay, Windows
from agents._vector import Step
from rlboard.errors import UsageError

CPU = torch.device("cpu")
FIELDS = ("actions", "observations", "next_observations", "rewards", "discounts")


def replay_of(capacity: int, actions: Any = None) -> Replay:
    spaces: Any = SimpleNamespace(
        observation_space=Box(-1, 1, (2,)), action_space=actions or Discrete(4), env_id="Some-v0"
    )
    return Replay(capacity, spaces)


def transition(number: int) -> dict[str, Any]:
    """One that can be told by its number."""
    return {
        "observations": [number, number + 0.5],
        "actions": number % 4,
        "rewards": -number,
        "next_observations": [number + 1, number + 1.5],
        "discounts": number % 3 / 2,
    }


def fill(replay: Replay, numbers: range, environments: int = 1) -> None:
    for first in range(numbers.start, numbers.stop, environments):
        several = [transition(number) for number in range(first, first + environments)]
        fields = {name: np.array([each[name] for each in several], np.float32) for name in several[0]}
        replay.add(**fields | {"actions": fields["actions"].astype(np.int64)})


def numbers(batch: _replay.Batch) -> list[int]:
    """Which transitions a batch holds; each must be whole."""
    found = [int(number) for number in batch["observations"][:, 0]]
    for name in FIELDS:
        torch.testing.assert_close(batch[name].double(), torch.tensor([transition(n)[name] for n in found]).double())
    return found


@pytest.mark.parametrize("environments", [1, 4])
def test_the_oldest_transitions_give_way(environments: int) -> None:
    replay = replay_of(6)
    fill(replay, range(4), environments)
    assert len(replay) == 4
    assert numbers(replay.latest(10, CPU)) == [0, 1, 2, 3]
    fill(replay, range(4, 16), environments)
    assert len(replay) == 6
    assert numbers(replay.latest(10, CPU)) == [10, 11, 12, 13, 14, 15]
    assert numbers(replay.latest(2, CPU)) == [14, 15]
    assert set(numbers(replay.sample(300, np.random.default_rng(0), CPU))) == set(range(10, 16))


def test_every_transition_has_an_equal_chance() -> None:
    replay = replay_of(10)
    fill(replay, range(5))
    drawn = np.bincount(numbers(replay.sample(20_000, np.random.default_rng(0), CPU)), minlength=5)
    assert len(drawn) == 5, "places that were never filled are not drawn"
    assert np.abs(drawn / 20_000 - 0.2).max() < 4 * np.sqrt(0.2 * 0.8 / 20_000)
    one, same = (replay.sample(7, np.random.default_rng(3), CPU) for _ in range(2))
    assert all(torch.equal(one[name], same[name]) for name in FIELDS)


def test_a_batch_is_ready_for_torch() -> None:
    replay = replay_of(4)
    fill(replay, range(4))
    batch = replay.sample(3, np.random.default_rng(0), CPU)
    assert {name: tuple(values.shape) for name, values in batch.items()} == {
        "actions": (3,),
        "observations": (3, 2),
        "next_observations": (3, 2),
        "rewards": (3,),
        "discounts": (3,),
    }
    assert batch["actions"].dtype == torch.int64
    assert all(batch[name].dtype == torch.float32 for name in FIELDS[1:])


def test_continuous_actions_are_vectors() -> None:
    replay = replay_of(3, Box(-2, 2, (2,)))
    ones = np.ones(1, np.float32)
    replay.add(np.zeros((1, 2), np.float32), np.array([[0.25, -2]]), ones, np.zeros((1, 2), np.float32), ones)
    assert replay.sample(1, np.random.default_rng(0), CPU)["actions"].tolist() == [[0.25, -2]]


def test_what_it_holds_is_told() -> None:
    replay = replay_of(6)
    assert replay.scalars() == {}
    fill(replay, range(8))
    assert replay.scalars() == {
        "replay/transitions": 6,
        "replay/reward_mean": -np.mean(range(2, 8)),
        "replay/terminated_percent": pytest.approx(100 / 3),
    }


@pytest.mark.parametrize("added", [0, 3, 9])
def test_a_replay_goes_on_as_if_it_had_never_ended(added: int, tmp_path: Path) -> None:
    unbroken = replay_of(5)
    fill(unbroken, range(added))
    torch.save(unbroken.state_dict(), tmp_path / "replay.pt")
    resumed = replay_of(5)
    resumed.load_state_dict(torch.load(tmp_path / "replay.pt", weights_only=True))
    for replay in (unbroken, resumed):
        fill(replay, range(added, added + 3))
    assert (len(resumed), resumed.added) == (len(unbroken), unbroken.added)
    assert np.array_equal(resumed.records, unbroken.records)


def test_more_than_the_memory_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_replay, "memory", lambda: 1_000_000)
    with pytest.raises(
        UsageError, match=r"^--buffer-size 100000: 100,000 of Some-v0's steps .* give at most \d+$"
    ) as no:
        replay_of(100_000)
    fits = int(str(no.value).rpartition(" ")[2])
    assert len(replay_of(fits).records) == fits > 10_000


def test_a_container_may_have_less_memory_than_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second, first = tmp_path / "memory.max", tmp_path / "memory.limit_in_bytes"
    monkeypatch.setattr(_replay, "LIMITS", (second, first))
    there = _replay.memory()
    if hasattr(os, "sysconf"):
        assert 2**24 < there < 2**63
    second.write_text("max\n")
    assert _replay.memory() == there
    first.write_text("9223372036854771712\n")  # what version 1 says where there is no limit
    assert _replay.memory() == there
    first.write_text("1048576\n")
    assert _replay.memory() == 1048576
    second.write_text("4096\n")
    assert _replay.memory() == 4096


Transition = tuple[float, int, float, float, float]


def episodes(environments: int, steps: int) -> Iterator[tuple[Any, Any, Step]]:
    """Random steps whose observations are all different, and whose episodes end in either way."""
    rng, fresh = np.random.default_rng(0), count(1)

    def draw() -> NDArray[np.float32]:
        return np.array([[next(fresh), 0] for _ in range(environments)], np.float32)

    observations = draw()
    for _ in range(steps):
        terminated, truncated = rng.random((2, environments)) < 0.15
        finals = draw()
        following = np.where((terminated | truncated)[:, None], draw(), finals)
        rewards = rng.normal(size=environments).astype(np.float32)
        step = Step(following, rewards, terminated, truncated & ~terminated, finals)
        yield observations, rng.integers(4, size=environments), step
        observations = following


def reference(environments: int, steps: int, n: int, gamma: float) -> set[Transition]:
    """The n-step transitions that are complete, from the definition, one environment and one window at a time."""
    found = set()
    taken = list(episodes(environments, steps))
    for environment in range(environments):
        for start in range(steps):
            total = 0.0
            for age, (_, _, step) in enumerate(taken[start : start + n]):
                total += gamma**age * float(step.rewards[environment])
                terminated, truncated = bool(step.terminated[environment]), bool(step.truncated[environment])
                if terminated or truncated or age == n - 1:
                    begun, action = taken[start][0][environment, 0], taken[start][1][environment]
                    discount = 0.0 if terminated else gamma ** (age + 1)
                    found.add((float(begun), int(action), round(total, 4), float(step.finals[environment, 0]),
                               round(discount, 5)))  # fmt: skip
                    break
    return found


@pytest.mark.parametrize("environments", [1, 3])
@pytest.mark.parametrize("n", [1, 2, 5, 80])
def test_windows_are_the_multi_step_returns_of_the_definition(n: int, environments: int, tmp_path: Path) -> None:
    """60 steps of each environment, with a checkpoint in the middle of some windows."""
    replay = replay_of(1000)
    windows = Windows(replay, n, 0.9)
    for number, taken in enumerate(episodes(environments, 60)):
        if number == 33:
            torch.save(windows.state_dict(), tmp_path / "windows.pt")
            windows = Windows(replay, n, 0.9)
            windows.load_state_dict(torch.load(tmp_path / "windows.pt", weights_only=True))
        windows.add(*taken)
    batch = {name: values.tolist() for name, values in replay.latest(1000, CPU).items()}
    found = {
        (begun[0], action, round(total, 4), final[0], round(discount, 5))
        for action, begun, final, total, discount in zip(*(batch[name] for name in FIELDS), strict=True)
    }
    expected = reference(environments, 60, n, 0.9)
    assert len(replay) == len(found) == len(expected)
    assert sorted((begun, action, final) for begun, action, _, final, _ in found) == sorted(
        (begun, action, final) for begun, action, _, final, _ in expected
    )
    ours, theirs = np.array(sorted(found)), np.array(sorted(expected))
    np.testing.assert_allclose(ours, theirs, atol=2e-4)
    assert {0.0, *(round(0.9 ** (age + 1), 5) for age in range(min(n, 2)))} <= set(ours[:, 4].tolist())
