"""SAC: the soft actor-critic, whose continuous actions are as random as they can be while they earn.

Papers: T. Haarnoja et al., "Soft Actor-Critic: Off-Policy Maximum Entropy Deep Reinforcement Learning with a Stochastic
Actor" and "Soft Actor-Critic Algorithms and Applications", both 2018. A policy earns its rewards and alpha times its
entropy. It acts with a squashed Gaussian, of which `sample` makes

    u = mean(s) + deviation(s) noise,    a = tanh(u),    log pi(a | s) = log N(u) - sum log(1 - tanh^2 u)

and for a batch of transitions (s, a, r, s') of the replay, a' and b being samples of pi(. | s') and pi(. | s), `update`
takes a step of Adam on each of

    critics:      sum_i 1/2 (Q_i(s, a) - y)^2,    y = r + gamma (min_i Q'_i(s', a') - alpha log pi(a' | s'))
    actor:        alpha log pi(b | s) - min_i Q_i(s, b)
    temperature:  -log alpha (log pi(b | s) + H),    H = -dim(a)

and lets Q'_i <- Q'_i + tau (Q_i - Q'_i) follow. What matters beside the equations:

    two critics, of which the smaller counts: one alone comes to believe what it hopes     Critics
    log(1 - tanh^2 u) = 2 (log 2 - u - softplus(-2u)), exact where 1 - tanh^2 u is 0       sample
    no gradient of the critics' weights in the actor's loss: 2 of 18 large products saved  Learner.update
    actions, and thus H, are in [-1, 1]; only the environment sees its own bounds          scaled
    y = r only where the episode was terminated: a truncated one would have gone on        train
    uniform actions first, so that the critics know something of all of them               train

Result: Pendulum-v1, 10,000 steps, seeds 1 to 10: greedy mean returns of 100 episodes from -134.3 to -132.2. The preset
of LunarLander, after rl-baselines3-zoo's, is not measured yet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box, Space
from torch import Tensor, nn
from torch.nn.functional import mse_loss, softplus
from torch.profiler import record_function

from agents._environments import CONTINUOUS, Act, make_environment, sizes
from agents._gradients import Adam, flatten, no_denormals
from agents._networks import Floats, Mirror
from agents._q_networks import SoftActorCritic
from agents._replay import Batch, Replay, refuse_in_vain
from agents._training import Training
from rlboard.checkpoint import load_weights
from rlboard.config import option
from rlboard.errors import NumericalError
from rlboard.events import Embedding, Event

SMALLEST, LARGEST = -20, 2
"""Between these the logarithm of the deviation is held."""


@dataclass(frozen=True)
class Config:
    env_id: str = option("Pendulum-v1", "Gymnasium environment: continuous actions, flat Box observations",
                         check="agents._environments:check_continuous")  # fmt: skip
    total_timesteps: int = option(10_000, "steps to train, those of all environments", min=1, smoke=300, resume=True)
    num_envs: int = option(1, "environments stepped side by side", min=1, max=4096)
    learning_rate: float = option(1e-3, "step size of Adam, for all that is learned", above=0, max=1e30, alias="--lr")
    gamma: float = option(0.99, "discount: what a reward one step later is worth", min=0, max=1)
    hidden_size: int = option(256, "units of each of the two hidden layers", min=1, max=65536)
    batch_size: int = option(256, "transitions of an update", min=1, smoke=32)
    buffer_size: int = option(100_000, "transitions that the replay keeps; the oldest give way", min=1)
    learning_starts: int = option(100, "steps of uniform actions before the first update", min=1, smoke=100)
    train_every: int = option(1, "steps between updates", min=1)
    gradient_steps: int = option(1, "updates at a time, each on a batch of its own", min=1)
    tau: float = option(0.005, "how far the targets go towards the critics after an update", above=0, max=1)
    log_every: int = option(1000, "steps between points of the curves", min=1, smoke=100, resume=True)
    eval_every: int = option(5000, "steps between evaluations; there is always one at the end", min=1, resume=True)
    eval_episodes: int = option(10, "episodes in an evaluation, without noise", min=1, smoke=2, resume=True)
    engine: str = option("auto", "gym: Gymnasium's environments; compiled: machine code, for those it knows; "
                         "auto: compiled where it can be, from 20,000 steps up",
                         choices=("auto", "gym", "compiled"))  # fmt: skip
    seed: int = option(1, "seed of the weights, the actions, the batches and the environments", min=0)
    device: str = option("cpu", "auto, cpu, cuda, cuda:N or mps", check="rlboard.devices:check_device")


PRESETS = {
    "pendulum": {},
    "lunarlander-continuous": {
        "env_id": "LunarLanderContinuous-v3", "total_timesteps": 200_000, "learning_rate": 7.3e-4, "tau": 0.01,
        "buffer_size": 1_000_000, "learning_starts": 10_000, "eval_every": 20_000,
    },
}  # fmt: skip


def sample(actor: nn.Module, observations: Tensor) -> tuple[Tensor, Tensor]:
    """Actions in [-1, 1], (batch, action size), and the logarithms of their probability densities, (batch,)."""
    mean, log_deviation = actor(observations).chunk(2, dim=-1)
    log_deviation = log_deviation.clamp(SMALLEST, LARGEST)
    noise = torch.randn_like(mean)
    u = torch.addcmul(mean, log_deviation.exp(), noise)
    log_normal = -log_deviation - noise.square() / 2 - math.log(2 * math.pi) / 2
    log_slope = 2 * (math.log(2) - u - softplus(-2 * u))
    return torch.tanh(u), (log_normal - log_slope).sum(-1)


class Learner:
    """The networks and what trains them."""

    def __init__(self, networks: SoftActorCritic, config: Config) -> None:
        self.networks, self.tau = networks, config.tau
        self.target_entropy = -float(networks.action_size)
        self.actor_parameters = [*networks.actor.parameters(), networks.log_temperature]
        self.actor, self.critics, self.targets = map(flatten, (networks.actor, networks.critics, networks.targets))
        networks.targets.zero_grad()  # they have none to show
        self.critics_adam = Adam([self.critics], config.learning_rate)
        self.actor_adam = Adam([self.actor, networks.log_temperature], config.learning_rate)

    @no_denormals()
    def update(self, batch: Batch) -> dict[str, Tensor]:
        """Takes a step of Adam on the loss of each network, lets the targets follow, and returns what it came to.

        That is two losses, the values of the batch, (2, batch), and log pi(b | s) of new actions, (batch,).
        """
        networks, observations, next_observations = self.networks, batch["observations"], batch["next_observations"]
        temperature = networks.log_temperature.detach().exp()
        with torch.no_grad():
            next_actions, next_log_probabilities = sample(networks.actor, next_observations)
            next_values = networks.targets(next_observations, next_actions).amin(0)
            y = batch["rewards"] + batch["discounts"] * (next_values - temperature * next_log_probabilities)
        values = networks.critics(observations, batch["actions"])
        critic_loss = mse_loss(values, y.expand(2, -1))  # the mean over both critics is the sum of their halves
        self.critics_adam.zero()
        critic_loss.backward()  # type: ignore[no-untyped-call]
        self.critics_adam.step()

        actions, log_probabilities = sample(networks.actor, observations)
        actor_loss = (temperature * log_probabilities - networks.critics(observations, actions).amin(0)).mean()
        surprise = log_probabilities.detach().mean() + self.target_entropy
        self.actor_adam.zero()
        (actor_loss - networks.log_temperature * surprise).backward(inputs=self.actor_parameters)
        self.actor_adam.step()
        self.targets.data.lerp_(self.critics.data, self.tau)
        learned = {"critic_loss": critic_loss, "actor_loss": actor_loss, "q": values, "log_pi": log_probabilities}
        return {name: tensor.detach() for name, tensor in learned.items()}

    def scalars(self, learned: Mapping[str, Tensor]) -> dict[str, float]:
        """What an update that was the last one came to."""
        critic_loss, actor_loss = learned["critic_loss"].item(), learned["actor_loss"].item()
        gradients = [vector.grad.norm().item() for vector in (self.actor, self.critics) if vector.grad is not None]
        return {
            "train/loss": actor_loss + critic_loss,
            "train/actor_loss": actor_loss,
            "train/critic_loss": critic_loss,
            "train/q_mean": learned["q"].mean().item(),
            "train/temperature": self.networks.log_temperature.exp().item(),
            "train/entropy": -learned["log_pi"].mean().item(),
            "train/grad_norm": math.hypot(*gradients),
        }


@np.errstate(over="ignore", invalid="ignore")  # weights that diverge show in the actions
def choose(actor: Mirror, observations: Floats, rng: np.random.Generator | None = None) -> Floats:
    """Actions in [-1, 1] for observations, (..., size): samples of the policy, or without `rng` its noiseless ones.

    Raises:
        NumericalError: they are NaN.
    """
    mean, log_deviation = np.split(actor(observations), 2, axis=-1)
    if rng is not None:
        noise = rng.standard_normal(mean.shape, np.float32)
        mean = mean + np.exp(log_deviation.clip(SMALLEST, LARGEST)) * noise
    if np.isnan(mean).any():
        raise NumericalError("the policy's actions are NaN: try a smaller --learning-rate")
    return np.tanh(mean)


def scaled(actions: Floats, space: Space[Any]) -> Floats:
    """Actions in [-1, 1] as the environment takes them, within the bounds of `space`."""
    assert isinstance(space, Box)
    return (space.low + (space.high - space.low) * (actions + 1) / 2).astype(np.float32)


def actor(config: Config, weights: Mapping[str, Tensor], greedy: bool, seed: int) -> Act:
    """The policy of a finished run: without its noise, or a sample of its actions, equal for equal seeds.

    Raises:
        DataError: `weights` are of another network than `config` describes.
    """
    environment = make_environment(config.env_id)
    networks = SoftActorCritic(*sizes(environment), config.hidden_size)
    load_weights(networks, weights)
    policy, rng = Mirror(networks.actor), None if greedy else np.random.default_rng(seed)
    return lambda observation: scaled(choose(policy, observation, rng), environment.action_space)


def train(config: Config, state: Mapping[str, Any] | None = None) -> Iterator[Event]:
    """Trains, and yields an event at step 0, every `log_every` steps, at evaluations, and at the last step.

    The x axis counts the steps of all environments. With the `state` of an earlier event it goes on behind that, and
    the first event is at its step.

    Raises:
        UsageError: the environment, the device or the configuration cannot be used (before the first event).
        NumericalError: the loss is NaN or infinite, or the actions are NaN.
    """
    refuse_in_vain(config)
    training = Training(config, [CONTINUOUS], state)
    environments, rng, device = training.environments, training.rng, training.device
    space, (observation_size, action_size) = environments.action_space, sizes(environments)
    replay = Replay(config.buffer_size, environments)
    networks = SoftActorCritic(observation_size, action_size, config.hidden_size).to(device)
    learner = Learner(networks, config)
    training.keep(networks, actor_adam=learner.actor_adam, critics_adam=learner.critics_adam, replay=replay)
    policy = Mirror(networks.actor)
    learned: dict[str, Tensor] = {}  # by the last update, unless an event has shown it

    def greedy(observation: Floats) -> Floats:
        return scaled(choose(policy, observation), space)

    @torch.no_grad()
    def embedding() -> Embedding:
        latest = replay.latest(1000, device)["observations"]
        actions = networks(latest)
        values = networks.critics(latest, actions).amin(0).tolist()
        told = (" ".join(f"{each:.4g}" for each in action) for action in actions.tolist())
        return Embedding(networks.actor[:-1](latest).cpu(), [*zip(values, told, strict=True)], ["value", "action"])

    yield training.begin()

    while training.step < training.total:
        observations = environments.observations
        if training.step < config.learning_starts:
            actions = rng.uniform(-1, 1, (config.num_envs, action_size)).astype(np.float32)
        else:
            actions = choose(policy, observations, rng)
        led_to = environments.step(scaled(actions, space))
        replay.add(observations, actions, led_to.rewards, led_to.finals, config.gamma * ~led_to.terminated)
        due = training.count()

        updates = config.gradient_steps * training.passed(config.train_every)
        if updates and training.step > config.learning_starts:
            with record_function("update"):
                for _ in range(updates):
                    learned = learner.update(replay.sample(config.batch_size, rng, device))
            if device.type != "cpu":
                policy.refresh()

        if not due:
            continue
        scalars = {**replay.scalars(), "train/learning_rate": config.learning_rate}
        histograms = {"Actions/taken": lambda: replay.latest(1000, device)["actions"]}
        if learned:
            scalars |= learner.scalars(learned)
            if not math.isfinite(loss := scalars["train/loss"]):
                raise NumericalError(f"the loss is {loss} at step {training.step}: try a smaller --learning-rate")
            histograms["Q/values"] = partial(Tensor.cpu, learned["q"])
            learned = {}
        yield training.event(scalars, greedy, histograms, embedding)
    environments.close()
