from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

from agents import sac
from agents._environments import evaluate
from agents._networks import Mirror
from agents._q_networks import SoftActorCritic
from agents._replay import Replay
from agents.sac import PRESETS, Config, Learner, actor, choose, sample, scaled, train
from rlboard.cli import main
from rlboard.errors import NumericalError, UsageError
from rlboard.registry import TRACKS

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("sac")]  # one run for all

SMALL = Config(
    total_timesteps=120,
    hidden_size=16,
    batch_size=8,
    learning_starts=40,
    log_every=40,
    eval_every=1000,
    eval_episodes=1,
)


def networks_of(action_size: int) -> SoftActorCritic:
    """In float64, the targets apart from the critics and the temperature from 1."""
    networks = SoftActorCritic(3, action_size, 16).double()
    with torch.no_grad():
        for parameter in (*networks.targets.parameters(), networks.log_temperature):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return networks


def batch_of(size: int, action_size: int, seed: int) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    fields = {
        "observations": rng.normal(size=(size, 3)),
        "next_observations": rng.normal(size=(size, 3)),
        "actions": rng.uniform(-1, 1, (size, action_size)),
        "rewards": 3 * rng.normal(size=size),
        "discounts": rng.choice([0.0, 0.9], size),
    }
    return {name: torch.from_numpy(values) for name, values in fields.items()}


class Paper:
    """The papers' equations, transition by transition, with torch's own distributions."""

    def __init__(self, networks: SoftActorCritic, learning_rate: float, tau: float) -> None:
        self.own = {name: value.clone().requires_grad_() for name, value in networks.state_dict().items()}
        self.tau = tau
        self.adams = {
            part: torch.optim.Adam(
                [own for name, own in self.own.items() if name.startswith(part)], learning_rate, fused=True
            )
            for part in ("critics", "actor", "log_temperature")
        }

    def q(self, critics: str, number: int, observation: Tensor, action: Tensor) -> Tensor:
        hidden = torch.cat([observation, action])
        for layer in range(3):
            weight, bias = (self.own[f"{critics}.{kind}.{layer}"][number] for kind in ("weights", "biases"))
            hidden = hidden @ weight + bias[0]
            hidden = hidden.relu() if layer < 2 else hidden
        return hidden[0]

    def policy(self, observation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        hidden = observation
        for layer in (0, 2, 4):
            hidden = self.own[f"actor.{layer}.weight"] @ hidden + self.own[f"actor.{layer}.bias"]
            hidden = hidden.relu() if layer < 4 else hidden
        mean, deviation = hidden[: len(noise)], hidden[len(noise) :].clamp(-20, 2).exp()
        squashed = TransformedDistribution(Independent(Normal(mean, deviation), 1), TanhTransform(cache_size=1))
        action = torch.tanh(mean + deviation * noise)
        log_probability: Tensor = squashed.log_prob(action)  # type: ignore[no-untyped-call]
        return action, log_probability

    def step(self, part: str, losses: list[Tensor]) -> None:
        self.adams[part].zero_grad()
        torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
        self.adams[part].step()

    def update(self, batch: dict[str, Tensor], next_noise: Tensor, noise: Tensor) -> None:
        transitions = range(len(noise))
        alpha = self.own["log_temperature"].detach().exp()
        losses = []
        for row in transitions:
            observation, following = batch["observations"][row], batch["next_observations"][row]
            with torch.no_grad():
                action, log_probability = self.policy(following, next_noise[row])
                worth = min(self.q("targets", number, following, action) for number in (0, 1)) - alpha * log_probability
                y = batch["rewards"][row] + batch["discounts"][row] * worth
            values = [self.q("critics", number, observation, batch["actions"][row]) for number in (0, 1)]
            losses.append(sum((0.5 * (value - y) ** 2 for value in values), torch.zeros(())))
        self.step("critics", losses)

        actor_losses, temperature_losses = [], []
        for row in transitions:
            action, log_probability = self.policy(batch["observations"][row], noise[row])
            values = [self.q("critics", number, batch["observations"][row], action) for number in (0, 1)]
            actor_losses.append(alpha * log_probability - min(values))
            entropy_excess = -log_probability.detach() + noise.shape[1]
            temperature_losses.append(self.own["log_temperature"] * entropy_excess)
        self.step("actor", actor_losses)
        self.step("log_temperature", temperature_losses)
        with torch.no_grad():
            for name in self.own:
                if name.startswith("targets"):
                    critic = self.own[name.replace("targets", "critics")]
                    self.own[name].copy_((1 - self.tau) * self.own[name] + self.tau * critic)


@pytest.mark.parametrize("action_size", [1, 3])
def test_updates_are_those_of_the_papers(action_size: int) -> None:
    networks = networks_of(action_size)
    learner = Learner(networks, Config(learning_rate=1e-2, tau=0.1))
    paper = Paper(networks, 1e-2, 0.1)
    for seed in range(3):
        batch = batch_of(8, action_size, seed)
        torch.manual_seed(seed)
        learner.update(batch)
        torch.manual_seed(seed)
        next_noise, noise = (torch.randn(8, action_size, dtype=torch.float64) for _ in range(2))
        paper.update(batch, next_noise, noise)
        for name, value in networks.state_dict().items():
            torch.testing.assert_close(value, paper.own[name].detach(), rtol=1e-9, atol=1e-9, msg=name)


def constant(mean: float, log_deviation: float) -> nn.Module:
    """An actor that always says this."""
    actor = nn.Linear(1, 2).double()
    nn.init.zeros_(actor.weight)
    with torch.no_grad():
        actor.bias.copy_(torch.tensor([mean, log_deviation]))
    return actor


@pytest.mark.parametrize("mean", [0.25, 30.0, -30.0])
def test_log_probabilities_are_exact_where_actions_round_to_one(mean: float) -> None:
    """log(1 - tanh^2 u) = -2 log cosh u, and log cosh u = |u| - log 2 to the last bit from |u| = 19 on."""
    says = constant(mean, -1.0)
    torch.manual_seed(0)
    actions, log_probabilities = sample(says, torch.zeros(50, 1, dtype=torch.float64))
    torch.manual_seed(0)
    noise = torch.randn(50, 1, dtype=torch.float64)[:, 0]
    for epsilon, action, told in zip(noise.tolist(), actions[:, 0].tolist(), log_probabilities.tolist(), strict=True):
        u = mean + math.exp(-1) * epsilon
        log_cosh = abs(u) - math.log(2) if abs(u) > 20 else math.log(math.cosh(u))
        assert action == pytest.approx(math.tanh(u), rel=1e-12)
        assert told == pytest.approx(-(epsilon**2) / 2 + 1 - math.log(2 * math.pi) / 2 + 2 * log_cosh, rel=1e-12)


@pytest.mark.parametrize(("log_deviation", "held"), [(-1000.0, -20.0), (1000.0, 2.0)])
def test_a_deviation_has_bounds(log_deviation: float, held: float) -> None:
    said, expected = constant(0.0, log_deviation), constant(0.0, held)
    observations, drawn = torch.zeros(10, 1, dtype=torch.float64), []
    for says in (said, expected):
        torch.manual_seed(0)
        drawn.append(torch.cat([sample(says, observations)[0][:, 0], sample(says, observations)[1]]))
    assert torch.equal(*drawn)


def test_acting_follows_the_policy_that_is_trained() -> None:
    networks = SoftActorCritic(3, 2, 16)
    policy, observation = Mirror(networks.actor), torch.tensor([0.5, -1.0, 2.0])
    Learner(networks, Config())  # which moves the parameters
    policy.refresh()  # and from here on nothing is copied
    with torch.no_grad():
        list(networks.actor.parameters())[-1].copy_(torch.tensor([0.5, -0.2, -1.0, 0.3]))
    np.testing.assert_allclose(
        choose(policy, observation.numpy()), networks(observation).detach().numpy(), rtol=1e-5, atol=1e-6
    )
    acted = choose(policy, observation.expand(20_000, -1).numpy(), np.random.default_rng(0))
    sampled = sample(networks.actor, observation.expand(20_000, -1))[0].detach().numpy()
    for one, other in zip(
        np.quantile(acted, (0.1, 0.5, 0.9), 0), np.quantile(sampled, (0.1, 0.5, 0.9), 0), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=0.03)
    assert acted.std(0).min() > 0.1


def test_actions_reach_the_bounds_of_the_environment() -> None:
    space = gymnasium.spaces.Box(np.array([-2, 0], np.float32), np.array([2, 10], np.float32))
    ends = np.array([[-1, -1], [0, 0], [1, 1]], np.float32)
    assert scaled(ends, space).tolist() == [[-2, 0], [0, 5], [2, 10]]
    assert scaled(ends, space).dtype == np.float32


class Counter(gymnasium.Env[Any, Any]):
    """Observes how many steps there were, and terminates after three of them; unless its time limit is shorter."""

    observation_space = gymnasium.spaces.Box(0, 3, (1,), np.float32)
    action_space = gymnasium.spaces.Box(0, 10, (2,), np.float32)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, **_: Any) -> tuple[Any, dict[str, Any]]:
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        self.steps += 1
        return np.full(1, self.steps, np.float32), float(action[1]), self.steps == 3, False, {}


@pytest.fixture
def counters() -> Iterator[dict[str, int]]:
    """Environments and the steps after which their episodes end: by a time limit, and of themselves."""
    limits = {"Truncated-v0": 2, "Terminated-v0": 3}
    gymnasium.register("Truncated-v0", entry_point=lambda **options: Counter(**options), max_episode_steps=2)
    gymnasium.register("Terminated-v0", entry_point=lambda **options: Counter(**options), max_episode_steps=50)
    yield limits
    for env_id in limits:
        del gymnasium.registry[env_id]


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """What is added to the replay: observations, actions, rewards, next observations and discounts."""
    added: list[list[Any]] = []
    original = Replay.add

    def add(self: Replay, *transition: Any) -> None:
        added.append([np.array(part) for part in transition])
        original(self, *transition)

    monkeypatch.setattr(Replay, "add", add)
    return added


@pytest.mark.parametrize("env_id", ["Truncated-v0", "Terminated-v0"])
def test_only_a_terminated_episode_has_no_future(
    env_id: str, counters: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    added, length = recorded(monkeypatch), counters[env_id]
    list(train(replace(SMALL, env_id=env_id, gamma=0.5, num_envs=2)))
    assert len(added) == 60
    for number, (observations, actions, rewards, next_observations, discounts) in enumerate(added):
        step = number % length
        assert observations[:, 0].tolist() == [step, step]
        assert next_observations[:, 0].tolist() == [step + 1, step + 1], (
            "the last observation, not the first of the next"
        )
        assert discounts.tolist() == [0.0 if step == 2 else 0.5] * 2
        np.testing.assert_allclose(rewards, 5 * (actions[:, 1] + 1), rtol=1e-5)


def test_uniform_actions_come_first_and_updates_at_their_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    updates: list[int] = []
    original = Learner.update
    added = recorded(monkeypatch)

    def update(self: Learner, batch: dict[str, Tensor]) -> Any:
        assert len(batch["rewards"]) == 8
        updates.append(2 * len(added))
        return original(self, batch)

    monkeypatch.setattr(Learner, "update", update)
    with monkeypatch.context() as patch:
        patch.setattr(sac, "choose", lambda _, states, *__: np.full((*states.shape[:-1], 1), 0.25, np.float32))
        list(train(replace(SMALL, num_envs=2, learning_starts=42, train_every=7, gradient_steps=3)))
    first, then = (np.concatenate([actions for _, actions, *_ in part]) for part in (added[:21], added[21:]))
    assert abs(first.mean()) < 0.3
    assert -1 <= first.min() < -0.8 < 0.8 < first.max() <= 1
    assert (then == 0.25).all()
    assert updates == [step for multiple in range(49, 120, 7) for step in [multiple + multiple % 2] * 3]


def test_the_curves_are_where_they_belong() -> None:
    first, *events = train(replace(SMALL, log_every=30, eval_every=50))
    assert (first.step, first.total, dict(first.scalars)) == (0, 120, {})
    assert isinstance(first.model, nn.Module)
    assert first.inputs is not None
    assert first.model(first.inputs).shape == (2, 1)
    assert [event.step for event in events] == [30, 50, 60, 90, 100, 120]
    assert [event.step for event in events if "eval/mean_reward" in event.scalars] == [50, 100, 120]
    assert [event.step for event in events if "train/loss" in event.scalars] == [50, 60, 90, 100, 120]
    for event in events:
        assert event.scalars["replay/transitions"] == event.scalars["time/steps"] == event.step
    last = events[-1].scalars
    assert last["train/loss"] == pytest.approx(last["train/actor_loss"] + last["train/critic_loss"])
    temperatures = [event.scalars["train/temperature"] for event in events[1:]]
    assert 1 > temperatures[0] > temperatures[-1] > 0, "entropy is above its target at first"


def test_the_projector_shows_recent_observations_with_value_and_action() -> None:
    *_, last = train(SMALL)
    embedding = last.embeddings["Embeddings/observations"]()
    assert isinstance(last.model, SoftActorCritic)
    assert embedding.points.shape == (120, 16)
    assert embedding.columns == ["value", "action"]
    with torch.no_grad():
        actions = last.model.actor[-1](torch.as_tensor(embedding.points))[:, 0].tanh()
    assert [float(action) for _, action in embedding.rows] == pytest.approx(actions.tolist(), abs=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"total_timesteps": 100}, "before anything is learned: give at least 101"),
        ({"train_every": 300, "total_timesteps": 299}, "give at least 300, or a smaller --learning-starts"),
        ({"env_id": "CartPole-v1"}, "continuous actions"),
        ({"buffer_size": 10**15}, "--buffer-size 10{15}: .* GiB"),
    ],
)
def test_what_cannot_be_learned_is_refused_before_the_first_event(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as refusal:
        next(train(replace(Config(), **options)))
    assert str(refusal.value).isprintable()


def test_training_that_diverges_ends() -> None:
    with pytest.raises(NumericalError, match="smaller --learning-rate"):
        list(train(replace(SMALL, learning_rate=1e30)))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sac")
    options = ["--hidden-size=32", "--run-name=smoke", "--log-dir", str(root)]
    assert main(["sac", "--smoke", *options]) == 0
    return root / "SAC/smoke"


def test_a_run_fills_its_tabs(smoke: Path) -> None:
    accumulator = EventAccumulator(str(smoke), {"scalars": 0, "tensors": 0})
    accumulator.Reload()
    tags = accumulator.Tags()
    assert set(tags["scalars"]) >= {
        "eval/mean_reward",
        "replay/reward_mean",
        "replay/terminated_percent",
        "replay/transitions",
        "time/episodes",
        "time/fps",
        "train/actor_loss",
        "train/critic_loss",
        "train/entropy",
        "train/grad_norm",
        "train/learning_rate",
        "train/loss",
        "train/q_mean",
        "train/temperature",
    }
    assert accumulator.Scalars("train/entropy")[-1].step == 300
    taken = accumulator.Histograms("Actions/taken")[-1].histogram_value
    assert taken.num == 300
    assert -1 <= taken.min < -0.5 < 0.5 < taken.max <= 1
    assert accumulator.Histograms("Q/values")[-1].histogram_value.num == 2 * 32
    histograms = set(tags["histograms"])
    assert {"Weights/actor.0.weight", "Gradients/critics.weights.1", "Activations/actor.1"} <= histograms
    assert not [tag for tag in histograms if tag.startswith("Gradients/targets")]
    assert tags["graph"]
    assert "Embeddings/observations" in (smoke / "projector_config.pbtxt").read_text()


def test_a_finished_run_is_evaluated_with_and_without_noise(smoke: Path) -> None:
    from rlboard.checkpoint import read_run

    run = read_run(str(smoke))
    config = Config(**run.config)  # type: ignore[arg-type]
    accumulator = EventAccumulator(str(smoke))
    accumulator.Reload()
    greedy = actor(config, run.weights, True, 0)
    score = evaluate(config.env_id, greedy, config.eval_episodes, config.seed)
    assert score == pytest.approx(accumulator.Scalars("eval/mean_reward")[-1].value)
    observation = np.array([1, 0, 0], np.float32)
    one, same, other = (actor(config, run.weights, False, seed) for seed in (5, 5, 6))
    drawn, again, others = (np.array([act(observation) for _ in range(50)]) for act in (one, same, other))
    np.testing.assert_array_equal(drawn, again)
    assert not np.array_equal(drawn, others)
    assert np.abs(drawn).max() <= 2
    assert main(["evaluate", str(smoke), "--smoke", "--log-dir", str(smoke.parents[1])]) == 0


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_a_smoke_run_that_learns(name: str) -> None:
    (loop,) = (loop for track in TRACKS for loop in track.loops() if loop.name == "sac")
    values = loop.defaults(name, smoke=True)
    Config(**PRESETS[name])  # type: ignore[arg-type]
    assert values["total_timesteps"] > values["learning_starts"] + values["train_every"]  # type: ignore[operator]


@pytest.mark.slow
def test_pendulum_is_learned() -> None:
    """-1,200 is what doing nothing earns, and about -150 the best there is."""
    config = Config(total_timesteps=5000, hidden_size=64, batch_size=128, eval_episodes=20)
    *_, last = train(config)
    assert last.scalars["eval/mean_reward"] > -250
