"""A2C: the advantage actor-critic, which learns from a few steps of several environments at a time.

Papers: V. Mnih et al., "Asynchronous methods for deep reinforcement learning", ICML 2016 (A3C), of which A2C is the
synchronous form: Y. Wu et al., "Scalable trust-region method for deep reinforcement learning using Kronecker-factored
approximation", NeurIPS 2017. Where REINFORCE waits for an episode's end, a critic V(s) tells what is still to come:

    delta_t = r_t + gamma V(s_{t+1}) - V(s_t)                                         one step's surprise
    A_t     = delta_t + gamma lambda A_{t+1}                                          the advantage of a_t
    R_t     = A_t + V(s_t)              at lambda = 1: r_t + gamma r_{t+1} + ... + gamma^n V(s_{t+n})
    L       = E[ -A_t log pi(a_t | s_t) + c_v (R_t - V(s_t))^2 - c_e H(pi(. | s_t)) ]

Without the baseline, `--no-baseline`, A_t is R_t itself: the same gradient in expectation, with REINFORCE's variance.

What matters, and where it is:
- `collect`: V counts for nothing after a terminated episode; a truncated one would have gone on, and its last reward
  carries gamma V of what the step led to.
- `advantages_of`: a recursion that no episode's end is crossed by (Schulman et al., "GAE", 2016, at lambda below 1).
- `ActorCritic`: actor and critic are networks of their own, orthogonal at first, the actor's last layer near zero.
- `train`: the network stays as it is for a rollout, so that one pass over it gives all values, and one step of RMSprop
  follows with the paper's slow decay, its gradient clipped in norm; the moments of the observations change after it.

RESULT
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.spaces import Box, Space
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.profiler import record_function

from agents._environments import CONTINUOUS, DISCRETE, Act, Environment, evaluation, make_environment, passed, sizes
from agents._networks import Floats, Mirror, RunningMoments, flatten, perceptron
from agents._vector import Environments, make_environments
from rlboard.checkpoint import load_weights
from rlboard.config import option
from rlboard.devices import resolve_device
from rlboard.errors import NumericalError
from rlboard.events import Embedding, Event, Image, Video
from rlboard.seeding import seed_everything

MOMENTS_EVERY = 8
"""Updates between those after which the moments of the observations take in the last rollout."""


@dataclass(frozen=True)
class Config:
    env_id: str = option("CartPole-v1", "Gymnasium environment: flat Box observations, discrete or continuous actions",
                         check="agents._environments:check_any")  # fmt: skip
    total_timesteps: int = option(100_000, "environment steps to train, rounded up to whole updates", min=1, smoke=2000)
    num_envs: int = option(8, "environments stepped together: their states differ, which steadies the gradient", min=1,
                           max=4096)  # fmt: skip
    n_steps: int = option(5, "steps of each environment per update: more look further, and learn less often", min=1,
                          max=65536)  # fmt: skip
    learning_rate: float = option(7e-4, "step size of the optimizer", above=0, max=1e30, alias="--lr")
    anneal: bool = option(False, "learning rate linearly to 0 over total_timesteps")
    optimizer: str = option("rmsprop", "rmsprop: the paper's (decay 0.99, eps 1e-5); adam", choices=("rmsprop", "adam"))
    gamma: float = option(0.99, "discount: what a reward one step later is worth", min=0, max=1)
    gae_lambda: float = option(1.0, "1: n-step returns; towards 0: the critic's word for what follows, less variance",
                               min=0, max=1)  # fmt: skip
    baseline: bool = option(True, "advantages R - V(s); without, the return R itself weighs an action, as in REINFORCE")
    entropy_coefficient: float = option(0.0, "weight of the entropy bonus: keeps the policy from settling early", min=0)
    value_coefficient: float = option(0.5, "weight of the critic's squared error in the loss", min=0)
    max_grad_norm: float = option(0.5, "a longer gradient is cut to this norm", above=0)
    hidden_size: int = option(64, "units of each of the two hidden layers", min=1, max=65536)
    normalize_observations: bool = option(False, "observations by their running mean and deviation")
    log_every: int = option(1000, "environment steps between points of the curves", min=1, resume=True)
    eval_every: int = option(25_000, "environment steps between evaluations; there is always one at the end", min=1,
                             resume=True)  # fmt: skip
    eval_episodes: int = option(10, "greedy episodes in an evaluation", min=1, smoke=2, resume=True)
    seed: int = option(1, "seed of the weights, the actions and the environments", min=0)
    device: str = option("cpu", "auto, cpu, cuda, cuda:N or mps; so small networks are fastest on the CPU",
                         check="rlboard.devices:check_device")  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    "acrobot": {"env_id": "Acrobot-v1", "normalize_observations": True, "num_envs": 16},
    "lunarlander": {"env_id": "LunarLander-v3", "gamma": 0.995, "learning_rate": 8.3e-4, "anneal": True,
                    "entropy_coefficient": 1e-5, "total_timesteps": 200_000},  # fmt: skip
    "pendulum": {"env_id": "Pendulum-v1", "gamma": 0.9, "gae_lambda": 0.9, "n_steps": 8, "anneal": True,
                 "value_coefficient": 0.4, "normalize_observations": True, "total_timesteps": 300_000},  # fmt: skip
}


class ActorCritic(nn.Module):
    """pi and V: observations (batch, size) to logits or, of continuous actions, means (batch, actions), and values
    (batch,). Continuous actions are normal, with one deviation for all states."""

    def __init__(self, config: Config, environments: Environment | Environments) -> None:
        super().__init__()
        size, actions = sizes(environments)
        hidden = config.hidden_size, config.hidden_size
        self.moments = RunningMoments(size) if config.normalize_observations else None
        self.actor = perceptron((size, *hidden, actions), output_gain=0.01)
        self.critic = perceptron((size, *hidden, 1), output_gain=1.0)
        continuous = isinstance(environments.action_space, Box)
        self.log_std = nn.Parameter(torch.zeros(actions)) if continuous else None

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        if self.moments is not None:
            observations = self.moments(observations)
        return self.actor(observations), self.critic(observations).squeeze(-1)

    def log_probabilities(self, outputs: Tensor, actions: Tensor) -> Tensor:
        """log pi(a | s), (batch,), by what `forward` has said first and the actions taken."""
        if self.log_std is None:
            return -nn.functional.cross_entropy(outputs, actions, reduction="none")
        deviations = (actions - outputs) * torch.exp(-self.log_std)
        return -0.5 * deviations.square().sum(-1) - (self.log_std + 0.5 * math.log(2 * math.pi)).sum()

    def entropy(self, outputs: Tensor) -> Tensor:
        """The mean entropy of pi(. | s) over a batch."""
        if self.log_std is None:
            log_probabilities = torch.log_softmax(outputs, -1)
            return -(log_probabilities.exp() * log_probabilities).sum(-1).mean()
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()


class RMSprop(torch.optim.Optimizer):
    """T. Tieleman and G. Hinton, 2012, as the paper has it: epsilon under the root, where it damps what is small.

        g = alpha g + (1 - alpha) d^2,    theta = theta - lr d / sqrt(g + epsilon),    d = dL / dtheta

    g begins at 1, as in TensorFlow, so that the first steps are short ones. torch's own has epsilon behind the root.
    """

    def __init__(self, parameters: nn.Parameter, lr: float) -> None:
        super().__init__([parameters], {"lr": lr})
        self.state[parameters]["squares"] = torch.ones_like(parameters)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        (parameters,) = group["params"]
        gradient, squares = parameters.grad, self.state[parameters]["squares"]
        squares.mul_(0.99).addcmul_(gradient, gradient, value=0.01)
        parameters.addcdiv_(gradient, (squares + 1e-5).sqrt_(), value=-group["lr"])


class Player:
    """The network in NumPy, by which it acts: continuous actions go from -1 to 1, to which the bounds are scaled."""

    def __init__(self, network: ActorCritic, space: Space[Any]) -> None:
        self.network, self.space = network, space
        self.actor, self.critic = Mirror(network.actor), Mirror(network.critic)
        self.refresh()

    def refresh(self) -> None:
        """Takes over what does not follow the network by itself: the observations' moments, and all from a GPU."""
        self.actor.refresh()
        self.critic.refresh()
        moments, log_std = self.network.moments, self.network.log_std
        self.moments = None if moments is None else moments.arrays()
        self.log_std = None if log_std is None else log_std.detach().cpu().numpy()

    def normalized(self, observations: Floats) -> Floats:
        if self.moments is None:
            return observations
        mean, inverse_deviation = self.moments
        return ((observations - mean) * inverse_deviation).clip(-10, 10)

    def noise(self, rng: np.random.Generator, *shape: int) -> Floats:
        """What makes a sample of the likeliest action: Gumbel noise for logits, normal noise for means."""
        shape = (*shape, self.actor.layers[-1][1].size)
        return (rng.gumbel(size=shape) if self.log_std is None else rng.normal(size=shape)).astype(np.float32)

    def act(self, observations: Floats, noise: Floats | float = 0.0) -> NDArray[Any]:
        """Actions, (...) or (..., action size), for observations, (..., observation size); without noise the likeliest."""
        outputs = self.actor(self.normalized(observations))
        return (outputs + noise).argmax(-1) if self.log_std is None else outputs + np.exp(self.log_std) * noise

    def taken(self, actions: NDArray[Any]) -> NDArray[Any]:
        """Actions as the environment takes them."""
        if not isinstance(self.space, Box):
            return actions
        low, high = self.space.low, self.space.high
        return low + (high - low) * (0.5 + 0.5 * actions.clip(-1, 1))

    def values(self, observations: Floats) -> Floats:
        """V(s), (batch,), of observations, (batch, observation size)."""
        return self.critic(self.normalized(observations))[:, 0]


class Rollout(NamedTuple):
    """What was seen, done and earned; the first axes are (steps, environments)."""

    observations: Floats
    actions: NDArray[Any]
    rewards: Floats  # with gamma V of what followed where an episode was truncated
    ended: NDArray[np.bool_]
    following: Floats  # V of where the next rollout begins, (environments,)


@np.errstate(over="ignore", invalid="ignore")  # weights that diverge show in the gradient
def collect(environments: Environments, player: Player, noises: Floats, gamma: float) -> Rollout:
    """A step of all environments for each of `noises`, (steps, environments, actions), from where they stand."""
    observations, actions, rewards, ended = [], [], [], []
    for noise in noises:
        observations.append(environments.observations)
        actions.append(player.act(environments.observations, noise))
        step = environments.step(player.taken(actions[-1]))
        earned = step.rewards
        if step.truncated.any():
            earned = earned + gamma * step.truncated * player.values(step.finals)
        rewards.append(earned)
        ended.append(step.terminated | step.truncated)
    following = player.values(environments.observations)
    return Rollout(np.array(observations), np.array(actions), np.array(rewards), np.array(ended), following)


def advantages_of(rollout: Rollout, values: Floats, gamma: float, gae_lambda: float) -> Floats:
    """A_t of every step from its V(s_t), both (steps, environments)."""
    discounts = gamma * ~rollout.ended
    deltas = rollout.rewards + discounts * np.vstack([values[1:], rollout.following]) - values
    advantages, advantage = np.empty_like(values), np.zeros_like(rollout.following)
    for step in reversed(range(len(deltas))):
        advantages[step] = advantage = deltas[step] + gae_lambda * discounts[step] * advantage
    return advantages


def features(network: ActorCritic, rollouts: Sequence[Rollout]) -> Embedding:
    """What the critic's last hidden layer makes of the last 1,000 observations, with their values and actions."""
    latest = np.concatenate([rollout.observations.reshape(-1, rollout.observations.shape[-1]) for rollout in rollouts])
    actions = np.concatenate([rollout.actions.reshape(len(latest) // len(rollouts), -1) for rollout in rollouts])
    inputs = torch.from_numpy(latest[-1000:]).to(next(network.parameters()).device)
    with torch.no_grad():
        hidden = network.critic[:-1](inputs if network.moments is None else network.moments(inputs))
        values = network.critic[-1](hidden).squeeze(-1).tolist()
    said = [" ".join(f"{each:.4g}" for each in action) for action in actions[-1000:]]
    return Embedding(hidden, list(zip(values, said, strict=True)), ["value", "action"])


def actor(config: Config, weights: Mapping[str, Tensor], greedy: bool, seed: int) -> Act:
    """The policy of a finished run: its most likely action, or a sample of its actions, equal for equal seeds.

    Raises:
        DataError: `weights` are of another network than `config` describes.
    """
    environment = make_environment(config.env_id)
    network = ActorCritic(config, environment)
    load_weights(network, weights)
    player, rng = Player(network, environment.action_space), np.random.default_rng(seed)
    return lambda observation: player.taken(player.act(observation, 0.0 if greedy else player.noise(rng)))


def train(config: Config, state: Mapping[str, Any] | None = None) -> Iterator[Event]:
    """Trains, and yields an event at step 0, whenever `log_every` or `eval_every` steps are passed, and at the end.

    The x axis counts environment steps. With the `state` of an earlier event it goes on behind that, and the first
    event is at its step.

    Raises:
        UsageError: the environment or the device cannot be used (before the first event).
        NumericalError: the gradient is NaN or infinite.
    """
    torch.set_num_threads(1)  # a second thread costs more than layers of 64 units can give it to do
    rng = seed_everything(config.seed)
    device = resolve_device(config.device)
    environments = make_environments(config, (DISCRETE, CONTINUOUS), state and state["environments"])
    network = ActorCritic(config, environments).to(device)
    parameters = flatten(network)
    optimizer: torch.optim.Optimizer
    if config.optimizer == "adam":
        optimizer = torch.optim.Adam([parameters], config.learning_rate, eps=1e-5, fused=True)
    else:
        optimizer = RMSprop(parameters, config.learning_rate)
    per_update = config.num_envs * config.n_steps
    step, total = 0, math.ceil(config.total_timesteps / per_update) * per_update
    if state:
        network.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        rng.bit_generator.state = state["random"]
        step = state["step"]
    player = Player(network, environments.action_space)
    greedy = lambda observation: player.taken(player.act(observation))
    recent: deque[Rollout] = deque(maxlen=math.ceil(1000 / per_update))

    def snapshot() -> dict[str, Any]:
        learner = {"model": network.state_dict(), "optimizer": optimizer.state_dict()}
        return {**learner, "environments": environments.state(), "random": rng.bit_generator.state, "step": step}

    inputs = torch.from_numpy(environments.observations).repeat(2, 1).to(device)
    yield Event(step, total, model=network, inputs=inputs, state=snapshot)

    while step < total:
        with record_function("rollout"):
            noises = player.noise(rng, config.n_steps, config.num_envs)
            rollout = collect(environments, player, noises, config.gamma)
            recent.append(rollout)

        with record_function("update"):
            observations = torch.from_numpy(rollout.observations).to(device).flatten(0, 1)
            outputs, values = network(observations)
            expected = values.detach().cpu().numpy().reshape(rollout.rewards.shape)
            advantages = advantages_of(rollout, expected, config.gamma, config.gae_lambda)
            returns = advantages + expected

            weights = torch.from_numpy(advantages if config.baseline else returns).to(device).flatten()
            log_probabilities = network.log_probabilities(outputs, torch.from_numpy(rollout.actions).to(device).flatten(0, 1))
            policy_loss = -(weights * log_probabilities).mean()
            value_loss = nn.functional.mse_loss(values, torch.from_numpy(returns).to(device).flatten())
            loss = policy_loss + config.value_coefficient * value_loss
            if config.entropy_coefficient:
                loss = loss - config.entropy_coefficient * network.entropy(outputs)

            parameters.grad.zero_()
            loss.backward()
            norm = parameters.grad.norm()
            parameters.grad.mul_((config.max_grad_norm / norm).clamp(max=1))
            learning_rate = config.learning_rate * (1 - step / total if config.anneal else 1)
            optimizer.param_groups[0]["lr"] = learning_rate
            optimizer.step()
        before, step = step, step + per_update
        if not math.isfinite(norm):
            raise NumericalError(f"the gradient's norm is {norm:.3g} at step {step}: try a smaller --learning-rate")
        if network.moments is not None and step // per_update % MOMENTS_EVERY == 1:
            network.moments.update(rollout.observations.reshape(per_update, -1))
            player.refresh()
        elif device.type != "cpu":
            player.refresh()

        last = step == total
        judged = last or passed(config.eval_every, before, step)
        if not judged and not passed(config.log_every, before, step):
            continue
        scalars = {
            **environments.scalars(),
            "train/loss": loss.item(),
            "train/policy_loss": policy_loss.item(),
            "train/value_loss": value_loss.item(),
            "train/entropy": network.entropy(outputs).item(),
            "train/explained_variance": 1 - float(advantages.var()) / max(float(returns.var()), 1e-8),
            "train/grad_norm": norm.item(),
            "train/learning_rate": learning_rate,
            "time/steps": step,
        }
        if network.log_std is not None:
            scalars["train/std"] = network.log_std.exp().mean().item()
        images: Mapping[str, Image] = {}
        videos: Mapping[str, Video] = {}
        if judged:
            told, images, videos = evaluation(config.env_id, greedy, config.eval_episodes, config.seed)
            scalars |= told
        histograms = {"Actions/taken": partial(np.asarray, rollout.actions)}
        embeddings = {"Embeddings/observations": partial(features, network, recent)} if last else {}
        yield Event(step, total, scalars, "rollout/ep_rew_mean", model=network, images=images, videos=videos,
                    histograms=histograms, embeddings=embeddings, state=snapshot)  # fmt: skip
    environments.close()
