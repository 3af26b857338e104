"""Agents that see: a small game in pixels, from the command line to the replay, and Atari's where it is installed."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents import dqn, ppo
from agents._environments import CONTINUOUS, DISCRETE, FRAMES, evaluate, make_environment
from agents._networks import convolutions
from agents._q_networks import QNetwork
from agents._vector import make_environments
from rlboard.checkpoint import read_run
from rlboard.cli import main
from rlboard.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_thread")


class Catch(gymnasium.Env[Any, Any]):
    """A ball falls from the top of 6 x 6 cells, of 6 pixels each way; the paddle below it is moved by -1, 0 or 1."""

    observation_space = Box(0, 255, (2, 36, 36), np.uint8)
    action_space = Discrete(3)
    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def frames(self) -> NDArray[np.uint8]:
        cells = np.zeros((2, 6, 6), np.uint8)
        cells[0, self.row, self.column] = cells[1, 5, self.paddle] = 255
        return cells.repeat(6, axis=1).repeat(6, axis=2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:  # noqa: ARG002
        super().reset(seed=seed)
        self.row, (self.column, self.paddle) = 0, self.np_random.integers(6, size=2).tolist()
        return self.frames(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.row, self.paddle = self.row + 1, min(max(self.paddle + int(action) - 1, 0), 5)
        ended = self.row == 5
        reward = (7.0 if self.paddle == self.column else -3.0) if ended else 0.0
        return self.frames(), reward, ended, False, {}

    def render(self) -> Any:
        return self.frames().max(0)[..., None].repeat(3, axis=2)


@pytest.fixture(autouse=True, scope="module")
def catch() -> Iterator[None]:
    gymnasium.register("Catch-v0", entry_point=lambda **options: Catch(**options))
    yield
    del gymnasium.registry["Catch-v0"]


SMALL = dqn.Config(
    env_id="Catch-v0", total_timesteps=300, num_envs=2, hidden_size=16, batch_size=8, buffer_size=200,
    learning_starts=50, train_every=20, gradient_steps=2, clip_rewards=True, log_every=60, eval_every=150,
    eval_episodes=2,
)  # fmt: skip


def test_the_layers_are_those_of_the_paper() -> None:
    """Four frames of 84 x 84 become 7 x 7 x 64 features, and with 512 units 1,686,180 weights for four actions."""
    layers, features = convolutions((4, 84, 84))
    assert features == 7 * 7 * 64
    network = QNetwork((4, 84, 84), 512, 4, dueling=False)
    assert sum(parameter.numel() for parameter in network.parameters()) == 1_686_180
    frames = torch.randint(256, (3, 4, 84, 84), dtype=torch.uint8)
    torch.testing.assert_close(layers(frames), layers[1:](frames.float() / 255))
    assert network(frames).shape == (3, 4)


@pytest.mark.parametrize("dueling", [False, True])
def test_actions_are_those_that_the_network_says(dueling: bool) -> None:
    network = QNetwork((2, 36, 36), 16, 3, dueling)
    frames = np.random.default_rng(0).integers(256, size=(20, 2, 36, 36), dtype=np.uint8)
    said = network(torch.from_numpy(frames)).argmax(-1).tolist()
    assert dqn.choose(network.mirror(), frames, 0.0, np.random.default_rng(0), 3).tolist() == said
    assert [int(network.mirror()(frame).argmax()) for frame in frames] == said, "one by one, as evaluation asks"


def test_the_replay_keeps_bytes_and_the_sign_of_rewards() -> None:
    *_, last = dqn.train(SMALL)
    assert last.state is not None
    records = last.state()["replay"]["records"]
    transition = 2 * (2 * 36 * 36) + 8 + 4 + 4
    assert records.numel() == 200 * transition, "two observations in bytes, the action, the reward and the discount"
    assert -1 < last.scalars["replay/reward_mean"] < 1
    assert last.scalars["rollout/ep_rew_min"] == -3, "curves and evaluation show what the game says"


def test_training_goes_on_where_it_was() -> None:
    def told(config: dqn.Config, state: dict[str, Any] | None = None) -> list[tuple[dict[str, float], dict[str, Any]]]:
        return [(dict(event.scalars), deepcopy(event.state())) for event in dqn.train(config, state) if event.state]

    unbroken = told(SMALL)
    resumed = told(SMALL, unbroken[2][1])
    assert [scalars for scalars, _ in resumed[1:]] == [scalars for scalars, _ in unbroken[3:]]
    for name, weights in unbroken[-1][1]["model"].items():
        assert torch.equal(resumed[-1][1]["model"][name], weights), name


def test_a_run_fills_its_tabs_and_is_evaluated(tmp_path: Path) -> None:
    options = ["--env-id=Catch-v0", "--n-steps=1", "--hidden-size=16", "--total-timesteps=400"]
    assert main(["dqn", "--smoke", *options, f"--log-dir={tmp_path}", "--run-name=seen"]) == 0
    run = tmp_path / "DQN/seen"
    accumulator = EventAccumulator(str(run), {"tensors": 0})
    accumulator.Reload()
    tags = accumulator.Tags()
    assert tags["graph"]
    assert {"Weights/body.1.weight", "Activations/body.2", "Q/values", "Actions/taken"} <= set(tags["histograms"])
    assert "Embeddings/observations" in (run / "projector_config.pbtxt").read_text()
    saved = read_run(str(run))
    greedy = dqn.actor(dqn.Config(**saved.config), saved.weights, True, 0)  # type: ignore[arg-type]
    score = accumulator.Scalars("eval/mean_reward")[-1].value
    assert evaluate("Catch-v0", greedy, 2, seed=1) == pytest.approx(score)


def test_agents_that_cannot_see_name_the_one_that_can(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"\(2, 36, 36\), uint8\): take rlboard dqn, or one with a flat Box"):
        next(ppo.train(ppo.Config(env_id="Catch-v0")))
    for agent in ("a2c", "reinforce", "reinforce-baseline"):
        assert main([agent, "--env-id=Catch-v0"]) == 2
        assert "take rlboard dqn, or one" in capsys.readouterr().err
    assert main(["sac", "--env-id=Catch-v0"]) == 2
    assert "take rlboard dqn, or an environment with continuous actions" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(35, 35, 3), (2, 35, 84), (84, 84), (4, 84, 84, 1)])
def test_what_is_no_stack_of_frames_is_refused(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Catch, "observation_space", Box(0, 255, shape, np.uint8))
    with pytest.raises(UsageError, match="choose one with a flat Box"):
        make_environment("Catch-v0")


def test_no_agent_is_named_where_none_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Catch, "action_space", Box(-1, 1, (2,)))
    with pytest.raises(UsageError, match=r"Box.*: choose an environment with discrete actions"):
        make_environment("Catch-v0", kinds=[DISCRETE, FRAMES])
    with pytest.raises(UsageError, match=r"uint8\): choose one with a flat Box, like Pendulum-v1"):
        make_environment("Catch-v0", kinds=[CONTINUOUS])


@pytest.mark.slow
def test_catch_is_learned() -> None:
    """From pixels alone; without learning the ball is caught one time in four."""
    *_, last = dqn.train(
        replace(SMALL, total_timesteps=6000, num_envs=1, hidden_size=64, batch_size=32, buffer_size=6000, train_every=4,
                gradient_steps=2, target_every=200, exploration_steps=3000, learning_starts=200, log_every=1000,
                eval_every=6000, eval_episodes=100)
    )  # fmt: skip
    assert last.scalars["eval/mean_reward"] > 6.5


def test_a_game_of_atari_goes_on_in_the_middle() -> None:
    """With the sticky actions that it draws, whose random numbers are its own."""
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2")
    config = dqn.Config(env_id="ALE/Pong-v5", num_envs=2, total_timesteps=10_000)
    kinds = (DISCRETE, FRAMES)
    environments = make_environments(config, kinds)
    actions = np.random.default_rng(0).integers(6, size=(120, 2))
    for action in actions[:60]:
        environments.step(action)
    state = deepcopy(environments.state())
    assert environments.observations.shape == (2, 4, 84, 84)
    behind = make_environments(config, kinds, state)
    assert np.array_equal(behind.observations, environments.observations)
    for action in actions[60:]:
        step, other = environments.step(action), behind.step(action)
        assert np.array_equal(step.observations, other.observations)
        assert np.array_equal(step.rewards, other.rewards)
