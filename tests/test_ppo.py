"""PPO: each equation against a plain computation of the same, and a run read back through TensorBoard's own reader."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributions import Categorical, Normal

from agents import ppo
from agents._actor_critic import ActorCritic, Player, Rollout, check_batches, collect
from agents._environments import evaluate, make_environment
from agents._networks import RunningMoments
from agents.ppo import Config, losses, train
from rlboard.cli import main
from rlboard.errors import DataError, NumericalError, UsageError
from rlboard.registry import find_loop

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("ppo")]  # one run for all

SMALL: dict[str, Any] = {
    "total_timesteps": 512, "num_envs": 4, "n_steps": 16, "batch_size": 32, "n_epochs": 2, "hidden_size": 8,
    "log_every": 64, "eval_every": 512, "eval_episodes": 1,
}  # fmt: skip


class Constant(gymnasium.Env[Any, Any]):
    """Always the same observation and a reward of 1; an episode is over, terminated or truncated, after two steps."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, terminated: bool) -> None:
        self.terminated, self.render_mode = terminated, None

    def reset(self, **_: Any) -> tuple[Any, dict[str, Any]]:
        self.steps = 0
        return np.ones(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:  # noqa: ARG002
        self.steps += 1
        ended = self.steps == 2
        return np.ones(2, np.float32), 1.0, ended and self.terminated, ended and not self.terminated, {}


@pytest.fixture(params=[True, False], ids=["terminated", "truncated"])
def constant(request: pytest.FixtureRequest) -> Iterator[tuple[str, bool]]:
    gymnasium.register("Constant-v0", entry_point=lambda **_: Constant(request.param))
    yield "Constant-v0", request.param
    del gymnasium.registry["Constant-v0"]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of every call of `losses` from here on."""
    calls: list[tuple[Any, ...]] = []

    def noted(*arguments: Any) -> Any:
        calls.append(arguments)
        return losses(*arguments)

    monkeypatch.setattr(ppo, "losses", noted)
    return calls


def test_a_truncated_episode_is_worth_what_would_have_followed(constant: tuple[str, bool], batches: list[Any]) -> None:
    """In the equal states of `Constant` with lambda 0 every return is 1 + gamma V, but where an episode terminates."""
    env_id, terminated = constant
    events = train(Config(**SMALL | {"env_id": env_id, "gamma": 0.5, "gae_lambda": 0.0, "batch_size": 64}))
    network = next(events).model
    assert isinstance(network, ActorCritic)
    with torch.no_grad():
        network.critic.get_parameter("4.bias").fill_(3)
        value = network(torch.ones(1, 2))[1].item()
    next(events)
    *_, returns = batches[0]
    following = 1 if terminated else 1 + 0.5 * value
    by_step = returns.sort().values
    assert by_step[:32].tolist() == pytest.approx([following] * 32)
    assert by_step[32:].tolist() == pytest.approx([1 + 0.5 * value] * 32)


def batch_of(network: ActorCritic, continuous: bool, count: int = 64) -> tuple[torch.Tensor, ...]:
    inputs = torch.randn(count, 3)
    actions = torch.randn(count, 2) if continuous else torch.randint(2, (count,))
    with torch.no_grad():
        old = network.log_probabilities(network(inputs)[0], actions) + 0.4 * torch.randn(count)
    return inputs, actions, old, torch.randn(count) * 3 + 1, torch.randn(count)


def network_of(config: Config, space: gymnasium.Space[Any]) -> ActorCritic:
    environment: Any = gymnasium.Env()
    environment.observation_space = gymnasium.spaces.Box(-1, 1, (3,))
    environment.action_space = space
    network = ActorCritic(config, environment)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return network


DISCRETE_SPACE = gymnasium.spaces.Discrete(2)
BOX = gymnasium.spaces.Box(np.array([-2, 0], np.float32), np.array([2, 10], np.float32))


@pytest.mark.parametrize("space", [DISCRETE_SPACE, BOX], ids=["discrete", "continuous"])
def test_the_gradient_is_that_of_the_papers_loss_transition_by_transition(space: gymnasium.Space[Any]) -> None:
    config = Config(hidden_size=8, entropy_coefficient=0.1, value_coefficient=0.7)
    network = network_of(config, space)
    inputs, actions, old, advantages, returns = batch = batch_of(network, space is BOX)
    total, policy_loss, value_loss, _, log_ratios = losses(network, config, 0.2, *batch)
    found = torch.autograd.grad(total, list(network.parameters()))

    normalized = [(float(each) - advantages.mean().item()) / advantages.std().item() for each in advantages]
    surrogates, squares, entropies, clipped = [], [], [], 0
    for number in range(len(inputs)):
        outputs, value = network(inputs[number : number + 1])
        log_std = network.log_std
        pi: Any = Categorical(logits=outputs[0]) if log_std is None else Normal(outputs[0], log_std.exp())
        ratio = (pi.log_prob(actions[number]).sum() - old[number]).exp()
        assert ratio.item() == pytest.approx(math.exp(log_ratios[number].item()), rel=1e-4)
        near = min(max(ratio.item(), 0.8), 1.2)
        clipped += near != ratio.item()
        advantage = normalized[number]
        surrogates.append(
            ratio * advantage if ratio.item() * advantage <= near * advantage else near * advantage + 0 * ratio
        )
        squares.append((value[0] - returns[number]) ** 2)
        entropies.append(pi.entropy().sum())
    assert 10 < clipped < 54, "some are clipped, some are not"
    surrogate, square, entropy = (torch.stack(each).mean() for each in (surrogates, squares, entropies))
    assert policy_loss.item() == pytest.approx(-surrogate.item(), abs=1e-5)
    assert value_loss.item() == pytest.approx(square.item(), rel=1e-5)
    expected = torch.autograd.grad(-surrogate + 0.7 * square - 0.1 * entropy, list(network.parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_what_is_logged_is_measured_over_the_whole_rollout_after_its_update(batches: list[Any]) -> None:
    events = train(Config(**SMALL | {"learning_rate": 0.1}))
    next(events)
    event = next(events)
    network = event.model
    assert isinstance(network, ActorCritic)
    *_, inputs, actions, old, advantages, returns = batches[-1]
    with torch.no_grad():
        outputs, values = network(inputs)
    pi: Any = Categorical(logits=outputs)
    log_ratios = pi.log_prob(actions) - old
    ratios = log_ratios.exp()
    expected = {
        "train/value_loss": (values - returns).square().mean(),
        "train/entropy": pi.entropy().mean(),
        "train/approx_kl": (ratios - 1 - log_ratios).mean(),
        "train/clip_fraction": ((ratios < 0.8) | (ratios > 1.2)).float().mean(),
        "train/explained_variance": 1 - advantages.var() / returns.var(),
    }
    assert event.scalars["train/clip_range"] == 0.2
    assert event.scalars["train/clip_fraction"] > 0, "or it is not tested"
    for tag, value in expected.items():
        assert event.scalars[tag] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), tag
    assert len(inputs) == 64


def test_the_first_gradient_is_clipped_and_adams_step_follows_it(batches: list[Any]) -> None:
    config = Config(**SMALL | {"n_epochs": 1, "batch_size": 64, "max_grad_norm": 0.05})
    events = train(config)
    network = next(events).model
    assert isinstance(network, ActorCritic)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    event = next(events)
    reference = network_like(network, config)
    for parameter, value in zip(reference.parameters(), before, strict=True):
        parameter.data = value
    optimizer = torch.optim.Adam(reference.parameters(), lr=config.learning_rate, eps=1e-5)
    loss, *_ = losses(reference, *batches[0][1:])
    loss.backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
    optimizer.step()
    assert event.scalars["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert norm > 0.05
    for ours, theirs in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def network_like(network: ActorCritic, config: Config) -> ActorCritic:
    copy = ActorCritic(config, make_environment(config.env_id))
    copy.load_state_dict(network.state_dict())
    return copy


def test_noise_makes_samples_of_the_policy() -> None:
    rng = np.random.default_rng(0)
    observation = np.array([0.5, -1, 2], np.float32)
    tensor = torch.from_numpy(observation)[None]
    crowd = np.tile(observation, (20_000, 1))

    network = network_of(Config(hidden_size=8), DISCRETE_SPACE)
    player = Player(network, DISCRETE_SPACE)
    seen = player.act(crowd, player.noise(rng, len(crowd))).mean()
    assert seen == pytest.approx(network(tensor)[0].softmax(-1)[0, 1].item(), abs=4 * 0.5 / math.sqrt(20_000))
    assert player.greedy(observation) == network(tensor)[0].argmax()

    network = network_of(Config(hidden_size=8), BOX)
    assert network.log_std is not None
    player = Player(network, BOX)
    drawn = player.act(crowd, player.noise(rng, len(crowd)))
    deviation, mean = network.log_std.exp().detach().numpy(), network(tensor)[0][0].detach().numpy()
    np.testing.assert_allclose(drawn.mean(0), mean, atol=0.04)
    np.testing.assert_allclose(drawn.std(0), deviation, rtol=0.03)
    np.testing.assert_allclose(player.act(observation), mean, rtol=1e-5)


def test_continuous_actions_are_scaled_to_the_bounds_and_kept_within() -> None:
    player = Player(network_of(Config(hidden_size=8), BOX), BOX)
    taken = player.taken(np.array([[0, 0], [1, -1], [-7, 7], [0.5, 0.5]], np.float32))
    np.testing.assert_allclose(taken, np.array([[0, 5], [2, 0], [-2, 10], [1, 7.5]]))
    assert BOX.contains(taken[2])


def test_observations_are_normalised_by_what_was_seen_before_the_rollout(
    batches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy that plays and the one that learns see the same; the moments follow after the update."""
    rollouts: list[Rollout] = []

    def noted(*arguments: Any) -> Rollout:
        rollouts.append(collect(*arguments))
        return rollouts[-1]

    monkeypatch.setattr(ppo, "collect", noted)
    events = train(Config(**SMALL | {"normalize_observations": True, "batch_size": 64}))
    next(events)
    for _ in range(3):
        event = next(events)
        network = event.model
        assert isinstance(network, ActorCritic)
        moments = network.normalize
        assert isinstance(moments, RunningMoments)
        seen = np.concatenate([rollout.observations.reshape(-1, 4) for rollout in rollouts])
        np.testing.assert_allclose(moments.mean, seen.mean(0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(moments.variance, seen.var(0), rtol=1e-4)
    before = seen[: -rollouts[-1].observations.size // 4]
    inputs = (rollouts[-1].observations.reshape(-1, 4) - before.mean(0)) / np.sqrt(before.var(0) + 1e-8)
    np.testing.assert_allclose(batches[-1][3], inputs.clip(-10, 10), rtol=1e-3, atol=1e-4)
    assert abs(event.scalars["train/approx_kl"]) < 0.1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"batch_size": 100},
            "--batch-size 100 does not divide --num-envs 8 x --n-steps 32 = 256: give 64 or 128 or 256",
        ),
        ({"batch_size": 512}, "give 64 or 128 or 256"),
        ({"num_envs": 1, "n_steps": 7, "batch_size": 2}, "give 7"),
    ],
)
def test_a_batch_size_that_does_not_divide_says_which_would(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        next(train(Config(**options)))


def test_the_batches_of_every_preset_divide_its_rollouts_in_a_smoke_run_too() -> None:
    loop = find_loop("agents/ppo")
    for preset in ("", *loop.presets):
        for smoke in (False, True):
            values: dict[str, Any] = loop.defaults(preset, smoke=smoke)
            check_batches(values["num_envs"], values["n_steps"], values["batch_size"])


def test_a_loss_that_is_not_finite_ends_the_run_in_a_line() -> None:
    with pytest.raises(NumericalError, match=r"the loss is (nan|inf) at step 64: try a smaller --learning-rate"):
        list(train(Config(**SMALL | {"learning_rate": 1e30, "anneal": False})))


def test_learning_rate_and_clip_range_fall_to_0() -> None:
    points = [event.scalars for event in train(Config(**SMALL)) if event.scalars]
    left = [1 - number / 8 for number in range(8)]
    assert [point["train/learning_rate"] for point in points] == pytest.approx([1e-3 * each for each in left])
    assert [point["train/clip_range"] for point in points] == pytest.approx([0.2 * each for each in left])


def test_continuous_actions_are_learned(tmp_path: Path) -> None:
    config = Config(**SMALL | {"env_id": "Pendulum-v1", "normalize_rewards": True, "entropy_coefficient": 0.01})
    first, *events = train(config)
    assert isinstance(first.model, ActorCritic)
    assert first.model.log_std is not None
    last = events[-1]
    assert last.scalars["train/std"] == pytest.approx(first.model.log_std.exp().item(), rel=1e-5)
    assert last.scalars["train/std"] != 1
    points, rows, columns, _ = last.embeddings["Embeddings/observations"]()
    assert points.shape == (512, 8)
    assert columns == ["value", "action"]
    assert all(-2 <= float(action) <= 2 for _, action in rows)
    assert last.histograms["Actions/taken"]().shape == (16, 4, 1)
    state = last.state() if last.state else {}
    torch.save(state, tmp_path / "state.pt")
    greedy = ppo.actor(config, state["model"], True, 0)
    assert evaluate("Pendulum-v1", greedy, 1, config.seed) == pytest.approx(last.scalars["eval/mean_reward"])


def test_an_actor_is_the_policy_that_was_trained() -> None:
    config = Config(**SMALL | {"normalize_observations": True})
    *_, last = train(config)
    assert last.model is not None
    weights = last.model.state_dict()
    assert evaluate(config.env_id, ppo.actor(config, weights, True, 0), 1, 1) == last.scalars["eval/mean_reward"]
    observation = np.array([0.01, 0.02, 0.03, 0.04], np.float32)
    draws = [
        [actor(observation) for _ in range(50)] for actor in (ppo.actor(config, weights, False, s) for s in (1, 1, 2))
    ]
    assert draws[0] == draws[1] != draws[2]
    with pytest.raises(DataError, match="another network"):
        ppo.actor(Config(hidden_size=9), weights, True, 0)


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ppo")
    assert main(["ppo", "--smoke", "--run-name=smoke", "--log-dir", str(root)]) == 0
    return next(root.rglob("run.json")).parent


def test_a_smoke_run_fills_the_tabs(smoke_run: Path) -> None:
    events = EventAccumulator(str(smoke_run))
    events.Reload()
    tags = events.Tags()
    common = {"loss", "policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "explained_variance",
              "clip_range", "learning_rate", "grad_norm"}  # fmt: skip
    assert {f"train/{name}" for name in common} | {"rollout/ep_rew_mean", "eval/mean_reward"} <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [1024, 2048]
    assert {"Actions/taken", "Weights/actor.0.weight", "Gradients/critic.4.bias"} <= set(tags["histograms"])
    assert "eval/episode" in tags["images"]
    assert "Embeddings/observations" in (smoke_run / "projector_config.pbtxt").read_text()
    told = json.loads((smoke_run / "run.json").read_text())
    assert told["status"] == "completed"


def test_a_finished_run_can_be_evaluated(smoke_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(smoke_run), "--episodes=2", "--log-dir", str(smoke_run.parent), "--log=minimal"]) == 0
    assert "eval/mean_reward" in capsys.readouterr().out


@pytest.mark.slow
def test_solve_solves_cartpole_in_20_000_steps() -> None:
    """The greedy policy at the end earns a mean of at least 475 in 100 episodes: on 9 of 10 seeds or more."""
    preset: dict[str, Any] = ppo.PRESETS["solve"] | {"eval_every": 10**9, "eval_episodes": 100, "log_every": 10**9}
    ends = [list(train(Config(**preset | {"seed": seed})))[-1] for seed in range(1, 11)]
    assert all(end.step <= 20_000 for end in ends)
    scores = [end.scalars["eval/mean_reward"] for end in ends]
    assert sum(score >= 475 for score in scores) >= 9, scores


@pytest.mark.slow
def test_pendulum_swings_up() -> None:
    """A random policy earns about -1,200, one that holds the pendulum upright about -150."""
    preset: dict[str, Any] = ppo.PRESETS["pendulum"] | {"eval_every": 10**9, "eval_episodes": 20}
    *_, last = train(Config(**preset))
    assert last.scalars["eval/mean_reward"] > -300
