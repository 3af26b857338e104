"""A2C: the advantage actor-critic, which learns from a few steps of several environments at a time.

Papers: V. Mnih et al., "Asynchronous Methods for Deep Reinforcement Learning", ICML 2016 (A3C), here in its synchronous
form, A2C: Y. Wu et al., "Scalable trust-region method for deep reinforcement learning using Kronecker-factored
approximation", NeurIPS 2017. REINFORCE waits for an episode's end; here a critic V(s) tells after n steps what is still
to come, and what was to be expected of a state anyway:

    delta_t = r_t + gamma V(s_t+1) - V(s_t)                               what a step was better than expected
    A_t     = delta_t + gamma lambda A_t+1                                the advantage of its action
    R_t     = A_t + V(s_t)                                                at lambda = 1 the paper's n-step return,
                                                                          r_t + gamma r_t+1 + ... + gamma^n V(s_t+n)
    loss    = -mean A_t log pi(a_t | s_t) + c_v mean (R_t - V(s_t))^2 - c_e mean H(pi(. | s_t))
    g       = 0.99 g + 0.01 d^2,    theta = theta - lr d / sqrt(g + 1e-5),    d = the gradient of the loss, clipped

With V(s_t+1) = 0 where the episode was terminated, and A_t+1 = 0 where it ended. `--no-baseline` weighs an action by
R_t and not by A_t: the same gradient on average, with the variance of REINFORCE.

What matters besides:

    several environments, played on from rollout to rollout; bootstrapped where truncated    collect
    all values in one pass, because the network stays as it is while it plays                train
    RMSprop with epsilon under the root and g = 1 at first, as in TensorFlow                 RMSprop
    orthogonal weights, output gains 0.01 and 1, separate networks for policy and value      ActorCritic
    means of continuous actions kept within the bounds by a tanh                             ActorCritic
    one vector of all parameters, so that clipping and RMSprop are a few operators           train, flatten
    observations normalised, by moments that change between updates only                     train

Result, greedy at the end: CartPole-v1, 500,000 steps: 500 on seeds 1 to 10. `--preset acrobot`, 200,000 steps: -86 to
-79 on seeds 1 to 10. `--preset pendulum`, 600,000 steps: -180 and -207 (seeds 1, 2). `--preset lunarlander`, a million
steps: 192 to 244 on seeds 1 to 10. With gradients that short, epsilon under the root holds RMSprop's steps back: it
wants ten times the usual learning rate there.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from agents._actor_critic import (
    ActorCritic,
    Player,
    RewardScale,
    Rollout,
    act_by,
    advantages_of,
    collect,
    explained_variance,
    features,
    transitions,
)
from agents._environments import CONTINUOUS, DISCRETE, Act
from agents._gradients import Adam, Optimizer, descend, flatten
from agents._networks import RunningMoments
from agents._training import Training
from rlboard.config import option
from rlboard.errors import NumericalError
from rlboard.events import Event


@dataclass(frozen=True)
class Config:
    env_id: str = option("CartPole-v1", "Gymnasium environment: flat Box observations, any actions",
                         check="agents._environments:check_any")  # fmt: skip
    total_timesteps: int = option(500_000, "environment steps to train, rounded up to whole updates",
                                  min=1, smoke=2000)  # fmt: skip
    num_envs: int = option(8, "environments stepped together: their states differ, which steadies the gradient",
                           min=1, max=4096)  # fmt: skip
    n_steps: int = option(5, "steps of each environment per update: more see further and update less often",
                          min=1, max=65536)  # fmt: skip
    optimizer: str = option("rmsprop", "rmsprop: the paper's; adam: faster at first", choices=("rmsprop", "adam"))
    learning_rate: float = option(7e-4, "step size of the optimizer", above=0, max=1e30, alias="--lr")
    anneal: bool = option(False, "let the learning rate fall linearly to 0 at the end")
    gamma: float = option(0.99, "discount: what a reward one step later is worth", min=0, max=1)
    gae_lambda: float = option(1.0, "1: n-step returns; towards 0: advantages trust the next value, with less variance",
                               min=0, max=1)  # fmt: skip
    baseline: bool = option(True, "weigh actions by the advantage; without, by the return, as REINFORCE does")
    entropy_coefficient: float = option(0.0, "what a nat of entropy is worth: more explores longer", min=0, max=1e3)
    value_coefficient: float = option(0.5, "weight of the value loss", min=0, max=1e3)
    max_grad_norm: float = option(0.5, "longer gradients are scaled down to this", above=0, max=1e30)
    hidden_size: int = option(64, "units of each of the two hidden layers", min=1, max=65536)
    normalize_observations: bool = option(False, "subtract the running mean of observations, divide by their deviation")
    normalize_rewards: bool = option(False, "divide rewards by the running deviation of the discounted return")
    log_every: int = option(1000, "environment steps between points of the curves", min=1, resume=True)
    eval_every: int = option(50_000, "environment steps between evaluations; there is always one at the end",
                             min=1, resume=True)  # fmt: skip
    eval_episodes: int = option(10, "greedy episodes in an evaluation", min=1, smoke=2, resume=True)
    engine: str = option("auto", "gym: Gymnasium's environments; compiled: machine code, for those it knows; "
                         "auto: compiled where it can be, from 20,000 steps up",
                         choices=("auto", "gym", "compiled"))  # fmt: skip
    seed: int = option(1, "seed of the weights, the actions and the environments", min=0)
    device: str = option("cpu", "auto, cpu, cuda, cuda:N or mps; so small a network is fastest on the CPU",
                         check="rlboard.devices:check_device")  # fmt: skip


PRESETS = {
    "acrobot": {
        "env_id": "Acrobot-v1", "total_timesteps": 200_000, "num_envs": 16, "normalize_observations": True,
        "normalize_rewards": True,
    },
    "lunarlander": {
        "env_id": "LunarLander-v3", "total_timesteps": 1_000_000, "learning_rate": 6e-3, "anneal": True, "n_steps": 16,
        "gamma": 0.999, "gae_lambda": 0.98, "entropy_coefficient": 1e-3, "value_coefficient": 1.0, "hidden_size": 128,
        "normalize_observations": True, "normalize_rewards": True,
    },
    "pendulum": {
        "env_id": "Pendulum-v1", "total_timesteps": 600_000, "learning_rate": 1e-3, "n_steps": 8, "gamma": 0.9,
        "gae_lambda": 0.9, "value_coefficient": 0.4, "normalize_observations": True, "normalize_rewards": True,
    },
}  # fmt: skip

MOMENTS_EVERY = 8
"""Of so many updates, one takes its observations into the moments by which they are normalised."""


class RMSprop(Optimizer):
    """The paper's optimizer: torch's own adds epsilon behind the root, and begins with g = 0."""

    def __init__(self, vectors: Sequence[nn.Parameter], learning_rate: float) -> None:
        super().__init__(vectors, learning_rate)
        self.g = [torch.ones_like(vector) for vector in self.values]

    def step(self) -> None:
        """Changes the vectors."""
        for vector, gradient, g in zip(self.values, self.gradients, self.g, strict=True):
            g.mul_(0.99).addcmul_(gradient, gradient, value=0.01)
            vector.addcdiv_(gradient, (g + 1e-5).sqrt_(), value=-self.learning_rate)

    def state_dict(self) -> dict[str, list[Tensor]]:
        """The moments."""
        return {"g": self.g}


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"rmsprop": RMSprop, "adam": partial(Adam, epsilon=1e-5)}


def actor(config: Config, weights: Mapping[str, Tensor], greedy: bool, seed: int) -> Act:
    """See `act_by`."""
    return act_by(config, weights, greedy, seed, bounded=True)


def train(config: Config, state: Mapping[str, Any] | None = None) -> Iterator[Event]:
    """Trains, and yields an event at step 0, whenever `log_every` or `eval_every` steps are passed, and at the end.

    The x axis counts environment steps. With the `state` of an earlier event it goes on behind that, and the first
    event is at its step.

    Raises:
        UsageError: the environment or the device cannot be used (before the first event).
        NumericalError: the gradient is NaN or infinite.
    """
    training = Training(config, (DISCRETE, CONTINUOUS), state, config.num_envs * config.n_steps)
    environments, device = training.environments, training.device
    network = ActorCritic(config, environments, bounded=True).to(device)
    optimizer = OPTIMIZERS[config.optimizer]([flatten(network)], config.learning_rate)
    scale = RewardScale(config.num_envs, config.gamma)
    training.keep(network, optimizer=optimizer, scale=scale)
    player = Player(network, environments.action_space)
    recent: deque[Rollout] = deque(maxlen=math.ceil(1000 / training.steps))
    batch = partial(transitions, device=device)

    yield training.begin()

    while training.step < training.total:
        with record_function("rollout"):
            noises = player.noise(training.rng, config.n_steps, config.num_envs)
            rollout = collect(environments, player, noises, config.gamma, scale if config.normalize_rewards else None)
            recent.append(rollout)

        with record_function("update"):
            outputs, values = network(batch(rollout.observations))
            expected = values.detach().cpu().numpy().reshape(rollout.rewards.shape)
            advantages = advantages_of(rollout, expected, config.gamma, config.gae_lambda)
            returns = advantages + expected
            weights = batch(advantages if config.baseline else returns)
            policy_loss = -(weights * network.log_probabilities(outputs, batch(rollout.actions))).mean()
            value_loss = nn.functional.mse_loss(values, batch(returns))
            loss = policy_loss + config.value_coefficient * value_loss
            if config.entropy_coefficient:
                loss = loss - config.entropy_coefficient * network.entropy(outputs)
            left = 1 - training.step / training.total if config.anneal else 1.0
            optimizer.learning_rate = config.learning_rate * left
            norm = descend(loss, optimizer, config.max_grad_norm)

        due = training.count()
        if not math.isfinite(norm):
            raise NumericalError(
                f"the gradient's norm is {norm:g} at step {training.step}: try a smaller --learning-rate"
            )
        if isinstance(network.normalize, RunningMoments) and training.step // training.steps % MOMENTS_EVERY == 1:
            network.normalize.update(rollout.observations.reshape(training.steps, -1))
            player.refresh()
        elif device.type != "cpu":
            player.refresh()

        if not due:
            continue
        scalars = {
            "train/loss": loss.item(),
            "train/policy_loss": policy_loss.item(),
            "train/value_loss": value_loss.item(),
            "train/entropy": network.entropy(outputs).item(),
            "train/explained_variance": explained_variance(advantages, returns),
            "train/grad_norm": norm.item(),
            "train/learning_rate": optimizer.learning_rate,
        }
        if network.log_std is not None:
            scalars["train/std"] = network.log_std.exp().mean().item()
        histograms = {"Actions/taken": partial(player.taken, rollout.actions)}
        yield training.event(scalars, player.greedy, histograms, partial(features, network, player, recent))
    environments.close()
