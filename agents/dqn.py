"""DQN: deep Q-learning, with three of the improvements that made it strong.

Paper: V. Mnih et al., "Human-level control through deep reinforcement learning", Nature 518, 2015. A network learns
what an action is worth, Q(s, a), from what the action led to and from what it says itself of that:

    y     = r + gamma max_a' Q_target(s', a')        or r where s' is the end
    theta = theta - Adam(grad Huber(Q(s, a; theta) - y))

Two things keep so circular a rule from running away: transitions are drawn from a replay of the past, and Q_target is a
copy of the network that stands still for `target_every` steps. On top of that, each by an option of its own:

    --double       a' is chosen by Q and judged by Q_target, so that luck is not taken for worth (van Hasselt et al.,
                   2016): y = r + gamma Q_target(s', argmax_a' Q(s', a'))
    --n-steps n    y = r_1 + gamma r_2 + ... + gamma^n max_a' Q_target(s_n, a'), so that rewards come nearer (Sutton,
                   1988; Rainbow, Hessel et al., 2018): for small n it hardly matters that the actions are older
    --dueling      Q(s, a) = V(s) + A(s, a) - mean_b A(s, b): what a state is worth is learned once (Wang et al., 2016)

`--no-double --n-steps 1` is the plain algorithm. What matters, and where it is:
- `Windows`, in _replay.py: a truncated episode is bootstrapped from its last observation, a terminated one is not.
- `learn`: the slope of Huber's loss is the error, held between -1 and 1, of which `Backpropagation` makes the gradient,
  clipped in norm; Q_target stands still during an update and judges the batches of all its gradient steps in one pass.
  Curves show the last batch before their point.
- `choose`: acting needs no gradient and runs in NumPy; the best action has the largest A, whatever V.

Result, the mean of 100 greedy episodes at the end: CartPole-v1, 50,000 steps: 500 on nine of seeds 1 to 10, 498.5 on
one; `--preset acrobot`, 100,000 steps: -84 to -76 on seeds 1 to 5; `--preset lunarlander`, 300,000 steps: 240, 251 and
165 on seeds 1 to 3. MountainCar's preset, after rl-baselines3-zoo's, and Pong's are not measured yet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.profiler import record_function

from agents._environments import DISCRETE, FRAMES, Act, Environment, Observations, make_environment, sizes
from agents._gradients import Adam, clipped_step, flatten, no_denormals
from agents._networks import Direct, Mirror
from agents._q_networks import QNetwork
from agents._replay import Batch, Replay, Windows, refuse_in_vain
from agents._training import Training
from agents._vector import Environments
from rlboard.checkpoint import load_weights
from rlboard.config import option
from rlboard.errors import NumericalError
from rlboard.events import Embedding, Event


@dataclass(frozen=True)
class Config:
    env_id: str = option("CartPole-v1", "Gymnasium environment: discrete actions, flat Box observations or frames",
                         check="agents._environments:check_frames")  # fmt: skip
    total_timesteps: int = option(50_000, "steps to train, those of all environments", min=1, smoke=1000, resume=True)
    num_envs: int = option(1, "environments stepped side by side", min=1, max=4096)
    learning_rate: float = option(1e-3, "step size of Adam", above=0, max=1e30, alias="--lr")
    anneal: bool = option(False, "let the learning rate fall linearly to 0 at the end")
    gamma: float = option(0.99, "discount: what a reward one step later is worth", min=0, max=1)
    double: bool = option(True, "double Q-learning: the network chooses the next action, its target judges it")
    dueling: bool = option(False, "two streams, for what a state is worth and for what each action adds")
    n_steps: int = option(3, "rewards that are counted before the target network estimates the rest", min=1, max=1000)
    hidden_size: int = option(128, "units of each of the two hidden layers", min=1, max=65536)
    batch_size: int = option(64, "transitions of a gradient step", min=1)
    buffer_size: int = option(100_000, "transitions that the replay keeps; the oldest give way", min=1)
    learning_starts: int = option(1000, "steps before the first update, so that the replay is varied", min=0, smoke=200)
    train_every: int = option(256, "steps between updates; at most one comes with a step of all environments", min=1)
    gradient_steps: int = option(128, "gradient steps of an update, each on a batch of its own", min=1)
    target_every: int = option(10, "steps after which the target network becomes a copy of the network", min=1)
    clip_rewards: bool = option(False, "learn from the sign of rewards alone, as games with large scores want")
    max_grad_norm: float = option(10.0, "largest norm of a gradient; a larger one is scaled down", above=0)
    exploration_steps: int = option(8000, "steps over which random actions fall from all to the final share", min=1)
    exploration_final: float = option(0.04, "share of random actions in the end: epsilon", min=0, max=1)
    log_every: int = option(1000, "steps between points of the curves", min=1, resume=True)
    eval_every: int = option(10_000, "steps between evaluations; there is always one at the end", min=1, resume=True)
    eval_episodes: int = option(10, "greedy episodes in an evaluation", min=1, smoke=2, resume=True)
    engine: str = option("auto", "gym: Gymnasium's environments; compiled: machine code, for those it knows; "
                         "auto: compiled where it can be, from 20,000 steps up",
                         choices=("auto", "gym", "compiled"))  # fmt: skip
    seed: int = option(1, "seed of the weights, the actions, the batches and the environments", min=0)
    device: str = option("cpu", "auto, cpu, cuda, cuda:N or mps; so small a network is fastest on the CPU",
                         check="rlboard.devices:check_device")  # fmt: skip


PRESETS = {
    "cartpole": {},
    "acrobot": {
        "env_id": "Acrobot-v1", "total_timesteps": 100_000, "learning_rate": 6.3e-4, "batch_size": 128,
        "buffer_size": 50_000, "train_every": 4, "gradient_steps": 2, "target_every": 250,
        "exploration_steps": 12_000, "exploration_final": 0.1,
    },
    "lunarlander": {
        "env_id": "LunarLander-v3", "total_timesteps": 300_000, "anneal": True, "batch_size": 128,
        "buffer_size": 50_000, "train_every": 4, "gradient_steps": 1, "target_every": 500,
        "exploration_steps": 12_000, "exploration_final": 0.1, "eval_every": 20_000,
    },
    "mountaincar": {
        "env_id": "MountainCar-v0", "total_timesteps": 120_000, "learning_rate": 4e-3, "gamma": 0.98, "double": False,
        "n_steps": 1, "hidden_size": 256, "batch_size": 128, "buffer_size": 10_000, "train_every": 16,
        "gradient_steps": 8, "target_every": 600, "exploration_steps": 24_000, "exploration_final": 0.07,
    },
    "pong": {
        "env_id": "ALE/Pong-v5", "total_timesteps": 1_000_000, "learning_rate": 1e-4, "hidden_size": 512,
        "batch_size": 32, "buffer_size": 20_000, "learning_starts": 10_000, "train_every": 4, "gradient_steps": 1,
        "target_every": 1000, "exploration_steps": 100_000, "exploration_final": 0.01, "eval_every": 100_000,
        "eval_episodes": 5, "device": "auto",
    },
}  # fmt: skip


def q_network(config: Config, environments: Environment | Environments) -> tuple[QNetwork, int]:
    """The network for these environments, and the number of their actions."""
    shape, (_, actions) = environments.observation_space.shape, sizes(environments)
    assert shape
    return QNetwork(shape, config.hidden_size, actions, config.dueling), actions


@np.errstate(over="ignore", invalid="ignore")  # weights that diverge show in the loss
def choose(
    q: Mirror | Direct, observations: Observations, epsilon: float, rng: np.random.Generator, count: int
) -> NDArray[Any]:
    """For each of observations, (batch, ...), the best of `count` actions, or any with chance epsilon: (batch,)."""
    explores = rng.random(len(observations)) < epsilon
    actions = rng.integers(count, size=len(observations))
    return actions if explores.all() else np.where(explores, actions, q(observations).argmax(-1))


@no_denormals()
def learn(
    config: Config, network: QNetwork, target: QNetwork, optimizer: Adam, transitions: Batch
) -> dict[str, Tensor]:
    """Takes a gradient step on each batch of `transitions`, and returns what the last one came to."""
    backpropagation = network.backpropagation
    batches = {name: torch.split(values, config.batch_size) for name, values in transitions.items()}
    with torch.no_grad():
        target_q = torch.split(target(transitions["next_observations"]), config.batch_size)
    for number, next_q in enumerate(target_q):
        batch = {name: parts[number] for name, parts in batches.items()}
        if config.double:
            with torch.no_grad():
                best = network(batch["next_observations"]).argmax(1, keepdim=True)
            next_values = next_q.gather(1, best)
        else:
            next_values = next_q.amax(1, keepdim=True)
        y = torch.addcmul(batch["rewards"][:, None], batch["discounts"][:, None], next_values)
        values, actions = backpropagation.forward(batch["observations"]), batch["actions"][:, None]
        q = values.gather(1, actions)
        slopes = (q - y).clamp_(-1, 1).div_(len(q))  # of the mean of Huber's loss, by q
        backpropagation.backward(torch.zeros_like(values).scatter_(1, actions, slopes))
        norm = clipped_step(optimizer, config.max_grad_norm)
    return {"loss": nn.functional.smooth_l1_loss(q, y), "q": q, "y": y, "norm": norm}


def actor(config: Config, weights: Mapping[str, Tensor], greedy: bool, seed: int) -> Act:
    """What a finished run has learned: the best action, or, one time in 1 / exploration_final, any.

    Raises:
        DataError: `weights` are of another network than `config` describes.
    """
    environment = make_environment(config.env_id)
    network, action_count = q_network(config, environment)
    load_weights(network, weights)
    values, rng = network.mirror(), np.random.default_rng(seed)

    def act(observation: Observations) -> int:
        explores = not greedy and rng.random() < config.exploration_final
        return int(rng.integers(action_count) if explores else values(observation).argmax())

    return act


def train(config: Config, state: Mapping[str, Any] | None = None) -> Iterator[Event]:
    """Trains, and yields an event at step 0, every `log_every` steps, at evaluations, and at the last step.

    The x axis counts the steps of all environments. With the `state` of an earlier event it goes on behind that, and
    the first event is at its step.

    Raises:
        UsageError: the environment, the device or the configuration cannot be used (before the first event).
        NumericalError: the loss is NaN or infinite.
    """
    refuse_in_vain(config, config.n_steps * config.num_envs)
    training = Training(config, (DISCRETE, FRAMES), state)
    environments, rng, device = training.environments, training.rng, training.device
    replay = Replay(config.buffer_size, environments)
    windows = Windows(replay, config.n_steps, config.gamma)
    network, action_count = q_network(config, environments)
    network.to(device)
    target = deepcopy(network)
    weights, target_weights = flatten(network), flatten(target)
    assert weights.grad is not None
    optimizer = Adam([weights], config.learning_rate)
    learned: dict[str, Tensor] = {}  # what the last gradient step came to
    curves: dict[str, float] = {}  # the same as of the last event
    training.keep(network, target=target, optimizer=optimizer, replay=replay, windows=windows, curves=curves,
                  gradient=weights.grad)  # which an event may show that comes before the next update  # fmt: skip
    q = network.mirror()
    greedy = lambda observation: q(observation).argmax()  # noqa: E731

    def epsilon() -> float:
        return 1 - (1 - config.exploration_final) * min(1.0, training.step / config.exploration_steps)

    def learning_rate() -> float:
        return config.learning_rate * (1 - training.step / training.total if config.anneal else 1.0)

    @torch.no_grad()
    def latest_q() -> Tensor:
        values: Tensor = network(replay.latest(1000, device)["observations"])
        return values

    @torch.no_grad()
    def embedding() -> Embedding:
        points = network.features(replay.latest(1000, device)["observations"])
        values, actions = latest_q().max(-1)
        return Embedding(points.cpu(), [*zip(values.tolist(), actions.tolist(), strict=True)], ["value", "action"])

    yield training.begin()

    while training.step < training.total:
        observations = environments.observations
        actions = choose(q, observations, epsilon(), rng, action_count)
        led_to = environments.step(actions)
        if config.clip_rewards:
            led_to = led_to._replace(rewards=np.sign(led_to.rewards))
        windows.add(observations, actions, led_to)
        due = training.count()

        if training.passed(config.target_every):
            target_weights.data.copy_(weights.data)
        if training.step > config.learning_starts and training.passed(config.train_every) and len(replay):
            with record_function("update"):
                optimizer.learning_rate = learning_rate()
                size = config.gradient_steps * config.batch_size
                learned = learn(config, network, target, optimizer, replay.sample(size, rng, device))
            if device.type != "cpu":
                q.refresh()

        if not due:
            continue
        if learned:
            curves |= {
                "train/loss": learned["loss"].item(),
                "train/q_mean": learned["q"].mean().item(),
                "train/td_error": (learned["q"] - learned["y"]).abs().mean().item(),
                "train/grad_norm": learned["norm"].item(),
            }
            if not math.isfinite(loss := curves["train/loss"]):
                raise NumericalError(f"the loss is {loss} at step {training.step}: try a smaller --learning-rate")
        scalars = {
            **curves,
            **replay.scalars(),
            "train/learning_rate": learning_rate(),
            "exploration/epsilon": epsilon(),
        }
        histograms = {"Q/values": latest_q, "Actions/taken": lambda: replay.latest(1000, device)["actions"]}
        yield training.event(scalars, greedy, histograms if len(replay) else {}, embedding if len(replay) else None)
    environments.close()
