"""The compiled engine is the algorithm of the other one: dynamics, gradient, updates, curves, and what is logged."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents import reinforce
from agents._compiled import (
    ENVIRONMENTS,
    CompiledEngine,
    Learner,
    advance,
    kernel,
    observe,
    random_state,
    start,
    uniform,
)
from agents._environments import evaluate, make_environment
from agents.reinforce import PRESETS, Config, GymEngine, Policy, choose, discounted, train
from rlboard.cli import main
from rlboard.errors import NumericalError, UsageError
from rlboard.events import Event
from rlboard.instruments.weights import weights_sha256

# One worker compiles the kernels once; the others would compile them at the same time.
pytestmark = pytest.mark.xdist_group("compiled")

KNOWN = {"CartPole-v1": (4, 2), "Acrobot-v1": (6, 3), "MountainCar-v0": (2, 3)}
EACH = [*list(KNOWN)[:2], pytest.param("MountainCar-v0", marks=pytest.mark.slow)]  # each compiles for seconds


def number(env_id: str) -> int:
    return ENVIRONMENTS[str(gymnasium.spec(env_id).entry_point)][0]


def engine_and_policy(env_id: str, learning_rate: float = 0.0, seed: int = 0) -> tuple[CompiledEngine, Policy]:
    size, actions = KNOWN[env_id]
    torch.manual_seed(seed)
    policy = Policy(size, 128, actions)
    return CompiledEngine(env_id, policy, learning_rate, 0.98, seed), policy


# The kernel's unsigned integers wrap around in silence; NumPy's warn.
wrapping_integers = np.errstate(over="ignore")


@wrapping_integers
def test_random_numbers_are_splitmix64() -> None:
    """The first outputs of the reference implementation for the seed 1234567."""
    state = np.array([1234567], np.uint64)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [uniform(state) for _ in expected] == [(value >> 11) / 2**53 for value in expected]


@pytest.mark.parametrize("env_id", EACH)
def test_dynamics_are_gymnasiums(env_id: str) -> None:
    """1,000 random steps: observation, reward, termination and truncation."""
    environment = make_environment(env_id)
    inner: Any = environment.unwrapped
    rng = np.random.default_rng(0)
    environment.reset(seed=0)
    ours = np.zeros(KNOWN[env_id][0], np.float32)
    ends = 0
    for _ in range(1000):
        first, second, third, fourth = map(float, (*inner.state, 0.0, 0.0)[:4])
        action = int(rng.integers(KNOWN[env_id][1]))
        theirs, reward, terminated, truncated, _ = environment.step(action)
        state, our_reward, our_terminated = advance(number(env_id), (first, second, third, fourth), action)
        observe(number(env_id), state, ours)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)
        assert (our_reward, our_terminated) == (reward, terminated)
        if terminated or truncated:
            ends += 1
            environment.reset()
    assert ends >= 2


@pytest.mark.parametrize("env_id", EACH)
@wrapping_integers
def test_resets_are_uniform_in_gymnasiums_range(env_id: str) -> None:
    environment, state = make_environment(env_id), random_state(0)
    inner: Any = environment.unwrapped
    ours = np.array([start(number(env_id), state) for _ in range(500)])
    theirs = []
    for seed in range(500):
        environment.reset(seed=seed)
        theirs.append(inner.state)
    width = np.shape(theirs)[1]
    np.testing.assert_allclose(ours[:, :width].min(axis=0), np.min(theirs, axis=0), atol=0.005)
    np.testing.assert_allclose(ours[:, :width].max(axis=0), np.max(theirs, axis=0), atol=0.005)
    assert not ours[:, width:].any()


@pytest.mark.parametrize("env_id", EACH)
@wrapping_integers
def test_an_episode_of_the_kernel_is_one_of_gymnasium(env_id: str) -> None:
    """The actions of the kernel, played again, lead to its observations, its length and its score."""
    engine, _ = engine_and_policy(env_id)
    environment = make_environment(env_id)
    inner: Any = environment.unwrapped
    for _ in range(3):
        environment.reset()
        state = start(number(env_id), engine._learner.random.copy())
        inner.state = np.array(state[: len(inner.state)])
        (score,), (length,), *_ = engine.learn(1)
        chaos = 100 if env_id == "Acrobot-v1" else length  # after that the last bits have grown into a difference
        rewards, ended = 0.0, False
        for step in range(length):
            if step < chaos:
                np.testing.assert_allclose(observed(inner), engine._learner.observations[step], rtol=1e-4, atol=1e-5)
            assert not ended
            _, reward, terminated, truncated, _ = environment.step(engine._learner.actions[step])
            rewards += float(reward)
            ended = terminated or truncated
            if step == chaos:
                break
        else:
            assert ended
            assert rewards == score


def observed(environment: Any) -> Any:
    return environment._get_ob() if hasattr(environment, "_get_ob") else np.array(environment.state, np.float32)


def episode_of(learner: Learner, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The last episode's observations, actions and discounted returns."""
    returns = discounted(learner.rewards[:length].tolist(), 0.98)
    return torch.tensor(learner.observations[:length]), torch.tensor(learner.actions[:length]), returns


def reference(env_id: str, policy: Policy) -> Policy:
    """A copy in the usual memory."""
    copy = Policy(KNOWN[env_id][0], 128, KNOWN[env_id][1])
    copy.load_state_dict(policy.state_dict())
    return copy


@pytest.mark.parametrize("env_id", EACH)
def test_gradient_loss_and_entropy_are_autograds(env_id: str) -> None:
    engine, policy = engine_and_policy(env_id)
    for odd_and_even in range(4):
        _, (length,), loss, entropy = engine.learn(1)
        observations, actions, returns = episode_of(engine._learner, length)
        double = reference(env_id, policy).double()
        log_probabilities = double(observations.double())
        expected = -(returns * log_probabilities[torch.arange(length), actions]).sum()
        expected.backward()
        for ours, theirs in zip(policy.parameters(), double.parameters(), strict=True):
            assert ours.grad is not None
            assert theirs.grad is not None
            error = (ours.grad - theirs.grad).abs().max() / theirs.grad.abs().max()
            assert error < 1e-5, odd_and_even
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        mean_entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=1).mean()
        assert entropy == pytest.approx(mean_entropy.item(), rel=1e-5)


@pytest.mark.parametrize("env_id", EACH)
def test_a_hundred_updates_end_in_torchs_weights(env_id: str) -> None:
    """Equal weights and equal episodes end in equal weights, to 1e-4.

    Where returns are long and alike, gradients nearly cancel, and Adam divides them by their own size: torch in float32
    is then 1e-2 away from torch in float64. There each update begins with equal weights and moments.
    """
    engine, policy = engine_and_policy(env_id, learning_rate=1e-3)
    theirs = reference(env_id, policy).double()
    before = [parameter.clone() for parameter in theirs.parameters()]
    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-3)
    for _ in range(100):
        if env_id != "CartPole-v1":
            theirs.load_state_dict(policy.state_dict())
            moments = (engine._views(engine._learner.first_moments), engine._views(engine._learner.second_moments))
            for parameter, first, second in zip(theirs.parameters(), *moments, strict=True):
                if state := optimizer.state[parameter]:
                    state["exp_avg"].copy_(first)
                    state["exp_avg_sq"].copy_(second)
        _, (length,), *_ = engine.learn(1)
        observations, actions, returns = episode_of(engine._learner, length)
        optimizer.zero_grad()
        log_probabilities = theirs(observations.double())
        torch.autograd.backward(-(returns * log_probabilities[torch.arange(length), actions]).sum())
        optimizer.step()
        if env_id != "CartPole-v1":
            assert_equal_weights(policy, theirs)
    assert_equal_weights(policy, theirs)
    moved = [(now - then).abs().max() for now, then in zip(theirs.parameters(), before, strict=True)]
    assert max(moved) > 0.02


def assert_equal_weights(ours: Policy, theirs: Policy) -> None:
    for our, their in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(our.double(), their, rtol=0, atol=1e-4)


def test_actions_are_samples_of_the_policy() -> None:
    for env_id in KNOWN:
        engine, policy = engine_and_policy(env_id)
        chosen, expected = np.zeros(KNOWN[env_id][1]), np.zeros(KNOWN[env_id][1])
        for _ in range(100):
            _, (length,), *_ = engine.learn(1)
            observations, actions, _ = episode_of(engine._learner, length)
            chosen += np.bincount(actions, minlength=len(chosen))
            expected += policy(observations).exp().sum(dim=0).detach().numpy()
        assert np.abs(chosen - expected).max() < 4 * np.sqrt(expected.sum() / 4)
        assert expected.max() - expected.min() > 8 * np.sqrt(expected.sum() / 4) or env_id == "CartPole-v1"


def test_evaluation_is_greedy_repeatable_and_agrees_with_gymnasium() -> None:
    engine, policy = engine_and_policy("CartPole-v1", learning_rate=1e-3)
    engine.learn(200)
    before = [array.copy() for array in engine._learner]
    score = engine.evaluate(300)
    assert engine.evaluate(300) == score
    for name in ("random", "parameters", "first_moments", "second_moments", "updates"):
        index = Learner._fields.index(name)
        np.testing.assert_array_equal(engine._learner[index], before[index])
    weights = policy.weights()
    theirs = [evaluate("CartPole-v1", lambda observation: choose(weights, observation), 1, seed) for seed in range(60)]
    assert abs(score - np.mean(theirs)) < 4 * np.std(theirs) / np.sqrt(len(theirs))


def test_the_policy_follows_every_update() -> None:
    engine, policy = engine_and_policy("CartPole-v1", learning_rate=1e-2)
    before = weights_sha256(policy)
    engine.learn(1)
    assert weights_sha256(policy) != before
    observation = np.array([0.1, 0.2, -0.1, -0.2], np.float32)
    assert choose(policy.weights(), observation) == policy(torch.tensor(observation)[None]).argmax()


def events_of(**options: Any) -> list[Event]:
    return list(train(Config(eval_episodes=1, **options)))


def hash_of(event: Event) -> str:
    assert event.model is not None
    return weights_sha256(event.model)


@pytest.mark.parametrize(("options", "engine"), [
    ({"episodes": 20}, "gym"),
    ({"episodes": reinforce.COMPILED_FROM}, "compiled"),
    ({"episodes": 20, "engine": "compiled"}, "compiled"),
    ({"episodes": 20, "engine": "gym"}, "gym"),
])  # fmt: skip
def test_the_first_event_says_which_engine_runs(options: dict[str, Any], engine: str) -> None:
    first = next(train(Config(**options)))
    assert first.notice == f"engine: {engine}"


def test_equal_seeds_are_equal_and_the_engines_begin_with_the_same_weights() -> None:
    options = {"episodes": 60, "engine": "compiled", "seed": 5}
    first, second = events_of(**options), events_of(**options)
    assert [event.scalars for event in first] == [event.scalars for event in second]
    assert hash_of(first[-1]) == hash_of(second[-1])
    hashes = [hash_of(next(train(Config(engine=engine, seed=5)))) for engine in ("gym", "compiled")]
    assert hashes[0] == hashes[1] != hash_of(first[-1])


def test_both_engines_log_the_same_tags_at_the_same_steps(tmp_path: Path) -> None:
    logged = {}
    for engine in ("gym", "compiled"):
        arguments = ["--smoke", "--eval-every=30", "--engine", engine, "--run-name", engine]
        assert main(["reinforce", *arguments, "--log-dir", str(tmp_path)]) == 0
        accumulator = EventAccumulator(str(tmp_path / "REINFORCE" / engine), {"tensors": 0, "images": 0})
        accumulator.Reload()
        tags = accumulator.Tags()
        logged[engine] = {
            **{tag: [point.step for point in accumulator.Scalars(tag)] for tag in tags["scalars"]},
            **{tag: [point.step for point in accumulator.Images(tag)] for tag in tags["images"]},
            **{tag: [point.step for point in accumulator.Histograms(tag)] for tag in tags["histograms"]},
            "graph": tags["graph"],
            "tensors": sorted(set(tags["tensors"])),
        }
        facts = json.loads((tmp_path / "REINFORCE" / engine / "run.json").read_text())
        assert facts["config"]["engine"] == engine
    compiled_alone = {tag: steps for tag, steps in logged["compiled"].items() if logged["gym"].get(tag) != steps}
    assert set(compiled_alone) <= {"best/reward"}  # which episodes are the best is chance
    assert set(logged["gym"]) == set(logged["compiled"])
    assert logged["compiled"]["reward"] == [20, 40, 60]
    assert logged["compiled"]["eval/mean_reward"] == [40, 60]


@pytest.mark.parametrize("options", [
    ["--env-id=LunarLander-v3"], ["--env-id=CartPole-v1", "--device=cuda"], ["--env-id=FrozenLake-v1"],
])  # fmt: skip
def test_what_the_compiled_engine_cannot_do_is_one_line(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reinforce", "--engine=compiled", *options, "--log-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_unknown_environment_is_named_with_those_that_are_known() -> None:
    gymnasium.register(
        "Slow-v0", "gymnasium.envs.classic_control.cartpole:CartPoleEnv", kwargs={"sutton_barto_reward": True}
    )
    try:
        with pytest.raises(UsageError, match=r"CartPole-v1, Acrobot-v1 and MountainCar-v0, not Slow-v0"):
            next(train(Config(env_id="Slow-v0", engine="compiled")))
        assert next(train(Config(env_id="Slow-v0"))).notice.startswith("engine: gym: --engine compiled knows")
    finally:
        del gymnasium.registry["Slow-v0"]


@pytest.mark.parametrize("engine", ["auto", "compiled"])
def test_without_numba_the_other_engine_runs(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "agents._compiled")
    monkeypatch.setitem(sys.modules, "numba", None)
    first = next(train(Config(engine=engine)))
    assert first.notice.startswith("engine: gym: numba cannot be used")


def test_without_a_place_for_numbas_cache_the_other_engine_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba.core.caching.CompileResultCacheImpl._locator_classes", [])
    kernel.cache_clear()
    first = next(train(Config(engine="compiled")))
    assert first.notice.startswith("engine: gym: numba cannot be used (cannot cache function")


def test_weights_that_explode_end_training() -> None:
    with pytest.raises(NumericalError, match="smaller --learning-rate"):
        events_of(engine="compiled", episodes=200, learning_rate=1e30)


@pytest.mark.slow
def test_learning_curves_of_20_seeds_agree() -> None:
    """At every 100 episodes the means over the seeds differ by less than three standard errors."""
    curves = {
        engine: np.array([
            [
                event.scalars["rollout/ep_rew_mean"]
                for event in events_of(engine=engine, seed=seed, episodes=600, eval_every=600, **PRESETS["solve"])
                if event.step and event.step % 100 == 0
            ]
            for seed in range(1, 21)
        ])
        for engine in ("gym", "compiled")
    }  # fmt: skip
    means = {engine: curve.mean(axis=0) for engine, curve in curves.items()}
    errors = {engine: curve.std(axis=0, ddof=1) / np.sqrt(20) for engine, curve in curves.items()}
    difference = np.abs(means["gym"] - means["compiled"])
    assert (difference < 3 * np.hypot(errors["gym"], errors["compiled"])).all(), means
    assert means["compiled"][-1] > 3 * means["compiled"][0]


def test_engines_speak_alike() -> None:
    config = Config(seed=3)
    policy = Policy(4, 128, 2)
    gym = GymEngine(config, make_environment(config.env_id), policy, np.random.default_rng(3))
    compiled = CompiledEngine(config.env_id, Policy(4, 128, 2), config.learning_rate, config.gamma, config.seed)
    for engine in (gym, compiled):
        scores, lengths, loss, entropy = engine.learn(3)
        assert scores == lengths
        assert len(lengths) == 3
        assert loss > 0
        assert 0 < entropy <= np.log(2) + 1e-6
