from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from agents._environments import evaluate
from agents._gradients import Adam, flatten
from agents._q_networks import QNetwork
from agents._replay import refuse_in_vain
from agents.dqn import PRESETS, Config, actor, choose, learn, train
from rlboard.cli import main
from rlboard.errors import NumericalError, UsageError
from rlboard.events import Event

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("dqn")]  # one run for all

SMALL = Config(
    total_timesteps=400,
    double=False,
    n_steps=1,
    hidden_size=16,
    learning_starts=100,
    train_every=50,
    gradient_steps=2,
    target_every=100,
    log_every=50,
    exploration_steps=200,
    eval_every=1000,
    eval_episodes=1,
)


def batch_of(size: int, seed: int = 0) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    fields = {
        "observations": rng.normal(size=(size, 4)),
        "next_observations": rng.normal(size=(size, 4)),
        "rewards": 3 * rng.normal(size=size),
        "discounts": rng.choice([0.0, 0.9, 0.81], size),
    }
    tensors = {name: torch.tensor(values, dtype=torch.float32) for name, values in fields.items()}
    return tensors | {"actions": torch.tensor(rng.integers(3, size=size))}


def paper(config: Config, network: QNetwork, target: QNetwork, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss, transition by transition, from the papers' formulas."""
    losses = []
    for number in range(len(batch["actions"])):
        observation, following = batch["observations"][number], batch["next_observations"][number]
        with torch.no_grad():
            judge = network if config.double else target
            chosen = max(range(3), key=lambda action: float(judge(following)[action]))
            y = batch["rewards"][number] + batch["discounts"][number] * target(following)[chosen]
        error = network(observation)[batch["actions"][number]] - y
        losses.append(0.5 * error**2 if abs(error) < 1 else abs(error) - 0.5)
    return sum(losses, torch.zeros(())) / len(losses)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dueling", [False, True])
@pytest.mark.parametrize("max_grad_norm", [0.05, 10.0])
def test_an_update_is_that_of_the_papers(double: bool, dueling: bool, max_grad_norm: float) -> None:
    config = Config(double=double, dueling=dueling, batch_size=8, learning_rate=1e-2, max_grad_norm=max_grad_norm)
    network, target = QNetwork((4,), 16, 3, dueling), QNetwork((4,), 16, 3, dueling)
    reference, transitions = deepcopy(network), batch_of(24)
    theirs = torch.optim.Adam(reference.parameters(), lr=config.learning_rate)
    for start in (0, 8, 16):
        loss = paper(config, reference, target, {name: part[start : start + 8] for name, part in transitions.items()})
        theirs.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(reference.parameters(), max_grad_norm)
        theirs.step()

    before = deepcopy(target.state_dict())
    last = learn(config, network, target, Adam([flatten(network)], 1e-2), transitions)
    for one, other in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last["loss"], loss.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last["norm"], norm, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(values, before[name]) for name, values in target.state_dict().items())


def test_dueling_streams_are_a_value_and_advantages_of_mean_zero() -> None:
    network, observations = QNetwork((4,), 16, 3, dueling=True), torch.randn(7, 4)
    assert network.value is not None
    values = network.value(network.body(observations))
    torch.testing.assert_close(network(observations).mean(-1, keepdim=True), values)
    assert {name.partition(".")[0] for name, _ in QNetwork((4,), 16, 3, dueling=False).named_parameters()} == {
        "body",
        "advantage",
    }


@pytest.mark.parametrize("dueling", [False, True])
def test_the_mirror_acts_as_the_network_does_and_follows_it(dueling: bool) -> None:
    network = QNetwork((4,), 16, 3, dueling)
    weights, mirror, observations = flatten(network), network.mirror(), torch.randn(50, 4)
    seen = []
    for seed in range(10):
        with torch.no_grad():
            weights.normal_(generator=torch.Generator().manual_seed(seed))
        greedy = choose(mirror, observations.numpy(), 0.0, np.random.default_rng(0), 3).tolist()
        assert greedy == network(observations).argmax(-1).tolist()
        seen += greedy
    assert set(seen) == {0, 1, 2}


@pytest.mark.parametrize("epsilon", [1.0, 0.3])
def test_epsilon_is_the_share_of_random_actions(epsilon: float) -> None:
    network = QNetwork((4,), 16, 3, dueling=False)
    network.load_state_dict(network.state_dict() | {"advantage.2.bias": torch.tensor([0.0, 100.0, 0.0])})
    drawn = choose(network.mirror(), np.zeros((20_000, 4), np.float32), epsilon, np.random.default_rng(0), 3)
    share = np.bincount(drawn, minlength=3) / len(drawn)
    assert np.abs(share - (np.array([0, 1, 0]) * (1 - epsilon) + epsilon / 3)).max() < 4 * math.sqrt(0.25 / len(drawn))


def test_the_curves_are_where_they_belong() -> None:
    first, *events = train(replace(SMALL, log_every=60, eval_every=130, anneal=True))
    assert (first.step, first.total, dict(first.scalars)) == (0, 400, {})
    assert isinstance(first.model, nn.Module)
    assert first.inputs is not None
    assert first.model(first.inputs).shape == (2, 2)
    assert [event.step for event in events] == [60, 120, 130, 180, 240, 260, 300, 360, 390, 400]
    assert [event.step for event in events if "eval/mean_reward" in event.scalars] == [130, 260, 390, 400]
    assert [event.step for event in events if "train/loss" in event.scalars] == [180, 240, 260, 300, 360, 390, 400]
    for event in events:
        expected = 1 - (1 - SMALL.exploration_final) * min(1, event.step / SMALL.exploration_steps)
        assert event.scalars["exploration/epsilon"] == pytest.approx(expected)
        assert event.scalars["train/learning_rate"] == pytest.approx(SMALL.learning_rate * (1 - event.step / 400))
        assert event.scalars["replay/transitions"] == event.scalars["time/steps"] == event.step
    assert events[-1].scalars["exploration/epsilon"] == pytest.approx(SMALL.exploration_final)


def states(config: Config) -> Iterator[tuple[Event, dict[str, Any]]]:
    for event in train(config):
        assert event.state is not None
        yield event, deepcopy(event.state())


def test_the_last_of_annealed_updates_changes_nothing() -> None:
    *_, (_, earlier), (before, middle), (last, end) = states(replace(SMALL, anneal=True))
    assert (before.step, last.step) == (350, 400)
    assert all(torch.equal(end["model"][name], weights) for name, weights in middle["model"].items())
    assert not all(torch.equal(earlier["model"][name], weights) for name, weights in middle["model"].items())


def test_the_target_is_the_network_as_it_was() -> None:
    """With events at every update, and the target following at every second, before the update of its step."""
    seen = list(states(SMALL))
    learned = {event.step: state["model"] for event, state in seen}
    for event, state in seen:
        copied = event.step // 100 * 100 - 50 if event.step >= 100 else 0
        name = "advantage.2.weight"
        assert torch.equal(state["target"][name], learned[copied][name]), event.step
    changed = [step for step in learned if step and not torch.equal(learned[step][name], learned[step - 50][name])]
    assert changed == [150, 200, 250, 300, 350, 400], "nothing is learned until learning_starts is passed"


class Endless(gymnasium.Env[Any, Any]):
    """Never terminates: only the time limit of `gymnasium.make` ends an episode. Every step is worth 1."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,), np.float64)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, terminates: bool, render_mode: str | None = None) -> None:
        self.terminates, self.render_mode = terminates, render_mode

    def reset(self, **_: Any) -> tuple[Any, dict[str, Any]]:
        return np.zeros(1), {}

    def step(self, _: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.zeros(1), 1.0, self.terminates, False, {}


@pytest.fixture
def endless() -> Iterator[str]:
    gymnasium.register("Endless-v0", entry_point=lambda **options: Endless(**options), max_episode_steps=2)
    yield "Endless-v0"
    del gymnasium.registry["Endless-v0"]


@pytest.mark.parametrize(("terminates", "worth", "n_steps"), [(False, 2.0, 1), (False, 2.0, 3), (True, 1.0, 1)])
def test_a_time_limit_is_not_an_end(terminates: bool, worth: float, n_steps: int, endless: str) -> None:
    """At gamma 0.5 a reward of 1 for ever is worth 2, however often it is cut short; one that ends, 1."""
    gymnasium.registry[endless].kwargs["terminates"] = terminates
    config = replace(SMALL, env_id=endless, gamma=0.5, learning_rate=1e-2, gradient_steps=10, target_every=10)
    *_, last = train(replace(config, train_every=10, n_steps=n_steps, total_timesteps=300))
    assert last.scalars["train/q_mean"] == pytest.approx(worth, abs=0.05)
    assert last.scalars["train/td_error"] < 0.05


def test_environments_side_by_side_share_one_x_axis() -> None:
    *_, (last, state) = states(replace(SMALL, num_envs=3))
    assert last.step == last.total == 402
    assert state["replay"]["added"] == 402


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 200_000}, "give at most 100000, the --buffer-size"),
        ({"total_timesteps": 1000}, "--total-timesteps 1000 end before anything is learned: give at least 1024"),
        ({"learning_starts": 50_000}, "give at least 50176, or a smaller --learning-starts"),
        ({"n_steps": 300, "num_envs": 200}, "give at least 60160"),
        ({"env_id": "Pendulum-v1"}, "discrete actions"),
        ({"buffer_size": 10**15}, "--buffer-size 10{15}: .* GiB"),
    ],
)
def test_what_cannot_be_learned_is_refused_before_the_first_event(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as refusal:
        next(train(replace(Config(), **options)))
    assert str(refusal.value).isprintable()


def test_the_shortest_training_that_is_not_refused_learns() -> None:
    *_, last = train(replace(SMALL, total_timesteps=150))
    assert "train/loss" in last.scalars
    with pytest.raises(UsageError, match="give at least 150"):
        next(train(replace(SMALL, total_timesteps=149)))


def test_a_loss_that_is_not_finite_ends_training() -> None:
    with pytest.raises(NumericalError, match="smaller --learning-rate"):
        list(train(replace(SMALL, learning_rate=1e30)))


def test_numbers_that_are_nearly_zero_are_only_lost_in_an_update() -> None:
    list(train(SMALL))
    assert (torch.tensor([1e-38]) * 0.1).item() > 0


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dqn")
    options = ["--dueling", "--run-name=smoke", "--log-dir", str(root)]
    assert main(["dqn", "--smoke", *options]) == 0
    return root / "DQN/smoke"


def test_a_run_fills_its_tabs(smoke: Path) -> None:
    accumulator = EventAccumulator(str(smoke), {"scalars": 0, "tensors": 0})
    accumulator.Reload()
    tags = accumulator.Tags()
    curves = set(tags["scalars"])
    assert curves >= {
        "rollout/ep_rew_mean",
        "rollout/ep_len_mean",
        "train/loss",
        "train/q_mean",
        "train/td_error",
        "train/grad_norm",
        "train/learning_rate",
        "exploration/epsilon",
        "replay/transitions",
        "replay/reward_mean",
        "replay/terminated_percent",
        "eval/mean_reward",
        "time/fps",
        "time/episodes",
    }
    assert accumulator.Scalars("eval/mean_reward")[-1].step == 1000
    kept = accumulator.Scalars("replay/transitions")[-1].value
    assert 998 <= kept <= 1000, "two windows of three steps may still be open"
    taken = accumulator.Histograms("Actions/taken")[-1].histogram_value
    assert (taken.num, taken.min, taken.max) == (kept, 0, 1)
    values = accumulator.Histograms("Q/values")[-1].histogram_value
    assert values.num == 2 * kept
    weights = {"body.0", "advantage.0", "advantage.2", "value.0", "value.2"}
    assert {f"Weights/{name}.weight" for name in weights} | {"Activations/advantage.1"} <= set(tags["histograms"])
    (tensors,) = smoke.rglob("*tensors*")
    assert "Embeddings/observations" in (smoke / "projector_config.pbtxt").read_text()
    assert tensors.stat().st_size > 0


def test_a_finished_run_is_evaluated_with_and_without_exploration(smoke: Path) -> None:
    from rlboard.checkpoint import read_run

    run = read_run(str(smoke))
    config = Config(**run.config)  # type: ignore[arg-type]
    greedy = actor(config, run.weights, True, 0)
    assert evaluate(config.env_id, greedy, 2, seed=config.seed) == pytest.approx(logged(smoke, "eval/mean_reward"))
    explorer, observation = (
        actor(replace(config, exploration_final=0.5), run.weights, False, 0),
        np.zeros(4, np.float32),
    )
    other = np.mean([explorer(observation) != greedy(observation) for _ in range(2000)])
    assert other == pytest.approx(0.25, abs=0.05), "half of the random actions are the best one"
    assert main(["evaluate", str(smoke), "--smoke", "--log-dir", str(smoke.parents[1])]) == 0


def logged(run: Path, tag: str) -> float:
    accumulator = EventAccumulator(str(run))
    accumulator.Reload()
    return float(accumulator.Scalars(tag)[-1].value)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_options_that_there_are(name: str) -> None:
    config = Config(**PRESETS[name])  # type: ignore[arg-type]
    refuse_in_vain(config, config.n_steps * config.num_envs)
    refuse_in_vain(replace(config, total_timesteps=1000, learning_starts=200), config.n_steps * config.num_envs)


@pytest.mark.slow
def test_cartpole_is_learned() -> None:
    """The greedy episodes of seeds 1 and 2 all lasted the 500 steps that are possible."""
    *_, last = train(Config(eval_every=50_000, eval_episodes=20))
    assert last.scalars["eval/mean_reward"] >= 450
