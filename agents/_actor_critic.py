"""What A2C and PPO share: networks of policy and value, their mirror in NumPy that plays, and advantages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from gymnasium.spaces import Box, Space
from numpy.typing import NDArray
from torch import Tensor, nn

from agents._environments import Act, Environment, make_environment, sizes
from agents._networks import Floats, Mirror, RunningMoments, perceptron
from agents._vector import Environments
from rlboard.checkpoint import load_weights
from rlboard.errors import UsageError
from rlboard.events import Embedding


class Settings(Protocol):
    """What an agent's `Config` says about its networks."""

    @property
    def env_id(self) -> str: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def normalize_observations(self) -> bool: ...


class ActorCritic(nn.Module):
    """pi and V: observations (batch, size) to logits or, of continuous actions, means (batch, actions), and values
    (batch,). Continuous actions are normal, with one deviation for all states.

    `bounded` keeps their means within (-1, 1). Beyond it nothing tells one action from another, since all are clipped,
    and a mean that has drifted there does not come back.
    """

    def __init__(self, config: Settings, environments: Environment | Environments, bounded: bool = False) -> None:
        super().__init__()
        size, actions = sizes(environments)
        hidden = config.hidden_size, config.hidden_size
        self.normalize = RunningMoments(size) if config.normalize_observations else nn.Identity()
        self.actor = perceptron((size, *hidden, actions), output_gain=0.01)
        self.critic = perceptron((size, *hidden, 1), output_gain=1.0)
        continuous = isinstance(environments.action_space, Box)
        self.log_std = nn.Parameter(torch.zeros(actions)) if continuous else None
        self.bounded = bounded and continuous

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        inputs = self.normalize(observations)
        outputs = self.actor(inputs)
        return torch.tanh(outputs) if self.bounded else outputs, self.critic(inputs).squeeze(-1)

    def log_probabilities(self, outputs: Tensor, actions: Tensor) -> Tensor:
        """log pi(a | s) of `actions`, (batch,) or (batch, action size), from the actor's outputs: (batch,)."""
        if self.log_std is None:
            return -nn.functional.cross_entropy(outputs, actions, reduction="none")
        deviations = (actions - outputs) * torch.exp(-self.log_std)
        return -0.5 * deviations.square().sum(-1) - (self.log_std + 0.5 * math.log(2 * math.pi)).sum()

    def entropy(self, outputs: Tensor) -> Tensor:
        """The entropy of pi(. | s) from the actor's outputs, in nats, averaged over the batch."""
        if self.log_std is None:
            logs = torch.log_softmax(outputs, dim=-1)
            return -(logs.exp() * logs).sum(-1).mean()
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()


class Player:
    """The networks in NumPy: for acting, and for a few values, observations need no gradient."""

    def __init__(self, network: ActorCritic, space: Space[Any]) -> None:
        self.network, self.space = network, space if isinstance(space, Box) else None
        self.actor, self.critic = Mirror(network.actor), Mirror(network.critic)
        self.refresh()

    def refresh(self) -> None:
        """Takes over what the network has learned; on the CPU only the moments of observations wait for it."""
        self.actor.refresh()
        self.critic.refresh()
        moments, log_std = self.network.normalize, self.network.log_std
        self.moments = moments.arrays() if isinstance(moments, RunningMoments) else None
        self.log_std = None if log_std is None else log_std.detach().cpu().numpy()

    def normalized(self, observations: Floats) -> Floats:
        if self.moments is None:
            return observations
        mean, inverse_deviation = self.moments
        return ((observations - mean) * inverse_deviation).clip(-10, 10)

    def values(self, observations: Floats) -> Floats:
        """V(s), (batch,), of observations (batch, observation size)."""
        return self.critic(self.normalized(observations))[:, 0]

    def noise(self, rng: np.random.Generator, *shape: int) -> Floats:
        """What makes of the most likely actions a sample of all: Gumbel noise for logits, normal noise for means."""
        shape = (*shape, len(self.actor.layers[-1][1]))
        return (rng.gumbel(size=shape) if self.log_std is None else rng.normal(size=shape)).astype(np.float32)

    def act(self, observations: Floats, noise: Floats | float = 0.0) -> NDArray[Any]:
        """Actions, (...,) or (..., action size), for observations (..., size); without noise the likeliest."""
        outputs = self.actor(self.normalized(observations))
        outputs = np.tanh(outputs) if self.network.bounded else outputs
        deviations = noise if self.log_std is None else np.exp(self.log_std) * noise
        actions: NDArray[Any] = outputs + deviations
        return actions.argmax(-1) if self.log_std is None else actions

    def taken(self, actions: NDArray[Any]) -> NDArray[Any]:
        """Actions as the environment takes them: continuous ones clipped to [-1, 1], which its bounds are scaled to."""
        if self.space is None:
            return actions
        low, high = self.space.low, self.space.high
        return low + (high - low) * (0.5 + 0.5 * actions.clip(-1, 1))

    def greedy(self, observation: Floats) -> NDArray[Any]:
        """The likeliest action for an observation, (observation size,), as the environment takes it."""
        return self.taken(self.act(observation))


class RewardScale:
    """Rewards, divided by the deviation of the discounted return so far, and clipped to [-10, 10]."""

    def __init__(self, count: int, gamma: float) -> None:
        self.gamma, self.returns = gamma, np.zeros(count)
        self.sums = np.zeros(3)  # how many returns there were, their sum, and that of their squares

    def __call__(self, rewards: Floats, ended: NDArray[np.bool_]) -> Floats:
        """The rewards of a step, (environments,), after they have been taken in."""
        returns = rewards + self.gamma * self.returns
        self.returns = returns * ~ended
        self.sums += len(returns), returns.sum(), np.square(returns).sum()
        count, total, squares = self.sums
        deviation = math.sqrt(max(squares / count - (total / count) ** 2, 1e-8))
        return (rewards / np.float32(deviation)).clip(-10, 10)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how the next rewards are scaled."""
        return {"returns": self.returns.tolist(), "sums": self.sums.tolist()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes back to what `state_dict` has returned."""
        self.returns, self.sums = np.array(state_dict["returns"]), np.array(state_dict["sums"])


class Rollout(NamedTuple):
    """What was seen, done and earned, (steps, environments, ...), and V of where it stopped, (environments,).

    The reward of a step at which an episode was truncated has gamma V of what the step led to in it.
    """

    observations: Floats
    actions: NDArray[Any]
    rewards: Floats
    ended: NDArray[np.bool_]
    next_values: Floats


def check_batches(num_envs: int, n_steps: int, batch_size: int) -> None:
    """Raises UsageError, naming batch sizes that would do, where this one does not divide a rollout."""
    count = num_envs * n_steps
    if count % batch_size:
        small = [size for size in range(1, math.isqrt(count) + 1) if count % size == 0]
        divisors = {*small, *(count // size for size in small)} - {1}
        near = sorted(divisors, key=lambda size: abs(math.log(size / batch_size)))[:3]
        raise UsageError(
            f"--batch-size {batch_size} does not divide --num-envs {num_envs} x --n-steps {n_steps} = {count}: "
            f"give {' or '.join(map(str, sorted(near)))}"
        )


def transitions(array: NDArray[Any], device: torch.device) -> Tensor:
    """A part of a rollout, (steps, environments, ...), as a tensor (steps x environments, ...) on the device."""
    return torch.from_numpy(array).to(device).flatten(0, 1)


@np.errstate(over="ignore", invalid="ignore")  # weights that diverge show in the gradient
def collect(
    environments: Environments, player: Player, noises: Floats, gamma: float, scale: RewardScale | None
) -> Rollout:
    """A step of all environments for each of `noises`, (steps, environments, actions), from where they stand."""
    observations, actions, rewards, ended = [], [], [], []
    for noise in noises:
        observations.append(environments.observations)
        actions.append(player.act(environments.observations, noise))
        step = environments.step(player.taken(actions[-1]))
        ended.append(step.terminated | step.truncated)
        rewards.append(step.rewards if scale is None else scale(step.rewards, ended[-1]))
        if step.truncated.any():
            rewards[-1] = rewards[-1] + gamma * step.truncated * player.values(step.finals)
    next_values = player.values(environments.observations)
    earned = np.array(rewards, np.float32)
    return Rollout(np.array(observations), np.array(actions), earned, np.array(ended), next_values)


@np.errstate(over="ignore", invalid="ignore")
def advantages_of(rollout: Rollout, values: Floats, gamma: float, gae_lambda: float) -> Floats:
    """A_t of every step from V(s_t), both (steps, environments) (Schulman et al., 2016, equations 11, 12 and 16).

        delta_t = r_t + gamma V(s_t+1) - V(s_t),    A_t = delta_t + gamma lambda A_t+1

    With V(s_t+1) = 0 where the episode was terminated, and A_t+1 = 0 where it ended.
    """
    discounts = gamma * ~rollout.ended
    deltas = rollout.rewards + discounts * np.vstack([values[1:], rollout.next_values]) - values
    advantages, advantage = np.empty_like(values), np.zeros_like(rollout.next_values)
    for step in reversed(range(len(deltas))):
        advantages[step] = advantage = deltas[step] + gae_lambda * discounts[step] * advantage
    return advantages


def explained_variance(advantages: Floats, returns: Floats) -> float:
    """How much of the returns' variance the values explain, which miss them by the advantages: 1 at best."""
    return 1 - float(advantages.var()) / max(float(returns.var()), 1e-8)


def features(network: ActorCritic, player: Player, rollouts: Iterable[Rollout]) -> Embedding:
    """The last 1,000 observations of `rollouts` as the critic's last hidden layer sees them."""
    seen = [(*step,) for rollout in rollouts for step in zip(rollout.observations, rollout.actions, strict=True)]
    observations, actions = (np.concatenate(each)[-1000:] for each in zip(*seen, strict=True))
    device = next(network.parameters()).device
    with torch.no_grad():
        inputs = network.normalize(torch.from_numpy(observations).to(device))
        hidden, values = network.critic[:-1](inputs), network.critic(inputs).squeeze(-1).tolist()
    taken = [" ".join(f"{each:.4g}" for each in np.ravel(action)) for action in player.taken(actions)]
    return Embedding(hidden, list(zip(values, taken, strict=True)), ["value", "action"])


def act_by(config: Settings, weights: Mapping[str, Tensor], greedy: bool, seed: int, bounded: bool = False) -> Act:
    """The policy of a finished run: its most likely action, or a sample of its actions, equal for equal seeds.

    Raises:
        DataError: `weights` are of another network than `config` describes.
    """
    environment = make_environment(config.env_id)
    network = ActorCritic(config, environment, bounded)
    load_weights(network, weights)
    player, rng = Player(network, environment.action_space), np.random.default_rng(seed)
    return lambda observation: player.taken(player.act(observation, 0.0 if greedy else player.noise(rng)))
