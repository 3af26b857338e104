"""PPO: proximal policy optimisation, many careful steps on the same experience.

Paper: J. Schulman et al., "Proximal Policy Optimization Algorithms", 2017, with the advantages of J. Schulman et al.,
"High-Dimensional Continuous Control Using Generalized Advantage Estimation", 2016. Several environments are played for
n steps; how much better each action was than expected is estimated backwards in time,

    delta_t = r_t + gamma V(s_t+1) - V(s_t),    A_t = delta_t + gamma lambda A_t+1

with V(s_t+1) = 0 where the episode was terminated, and A_t+1 = 0 where it ended; and then the whole experience is
learned from several times over, in batches. So many steps are safe only near the policy that has played, to which the
ratio of probabilities is held:

    ratio_t = pi(a_t | s_t) / pi_old(a_t | s_t)
    loss    = -mean min(ratio_t A_t, clip(ratio_t, 1 - epsilon, 1 + epsilon) A_t)
              + c_v mean (V(s_t) - A_t - V_old(s_t))^2 - c_e mean H(pi(. | s_t))

Of "The 37 Implementation Details of Proximal Policy Optimization" (S. Huang et al., 2022) these are here:

    collect        several environments, played on from rollout to rollout
    collect        the value of what follows where an episode is truncated
    ActorCritic    orthogonal weights, biases 0, output gains 0.01 and 1
    ActorCritic    networks of their own for policy and value
    ActorCritic    a Gaussian whose deviations are the same in every state
    ActorCritic    observations normalised (--normalize-observations)
    Player.taken   continuous actions clipped to their bounds
    RewardScale    rewards scaled and clipped (--normalize-rewards)
    advantages_of  generalised advantages
    shuffled       batches in a new order in every epoch
    losses         advantages normalised in each batch
    losses         clipped surrogate, value coefficient, entropy bonus
    train          Adam with epsilon 1e-5; rate and clip range annealed
    train          the norm of all gradients together clipped
    train          approximate KL, clip fraction, explained variance

The clipped value loss is not: it was seen to hurt (M. Andrychowicz et al., "What Matters in On-Policy Reinforcement
Learning?", 2021).

Result: `rlboard ppo --preset solve`, CartPole-v1, 19,968 steps, seeds 1 to 10: a greedy mean return of 100 episodes of
500 on nine seeds and 491 on one; first above 475 after 6,144 steps (median; 3,072 to 15,360, looked at every 1,024).
`--preset acrobot`: -84 to -79, `pendulum`: -166 to -154, `lunarlander`, which counts as solved at 200: 261 to 275, all
on seeds 1 to 10. MountainCar's preset, after rl-baselines3-zoo's, is not measured yet.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
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
    check_batches,
    collect,
    explained_variance,
    features,
    transitions,
)
from agents._environments import CONTINUOUS, DISCRETE, Act
from agents._gradients import Adam, descend, flatten
from agents._networks import RunningMoments
from agents._training import Training
from rlboard.config import option
from rlboard.errors import NumericalError
from rlboard.events import Event


@dataclass(frozen=True)
class Config:
    env_id: str = option("CartPole-v1", "Gymnasium environment: flat Box observations, any actions",
                         check="agents._environments:check_any")  # fmt: skip
    total_timesteps: int = option(100_000, "environment steps to train, rounded up to whole rollouts",
                                  min=1, smoke=2048)  # fmt: skip
    num_envs: int = option(8, "environments stepped together", min=1, max=4096)
    n_steps: int = option(32, "steps of each environment in a rollout", min=2, max=65536, smoke=32)
    batch_size: int = option(256, "transitions in a gradient step; must divide num-envs x n-steps", min=2, smoke=64)
    n_epochs: int = option(20, "times that a rollout is learned from", min=1, max=1000, smoke=4)
    learning_rate: float = option(1e-3, "step size of Adam", above=0, max=1e30, alias="--lr")
    anneal: bool = option(True, "let learning rate and clip range fall linearly to 0 at the end")
    gamma: float = option(0.98, "discount: what a reward one step later is worth", min=0, max=1)
    gae_lambda: float = option(0.8, "0: advantages trust the next value; 1: only rewards, with more variance",
                               min=0, max=1)  # fmt: skip
    clip_range: float = option(0.2, "how far from 1 a probability ratio still earns", above=0, max=10)
    entropy_coefficient: float = option(0.0, "what a nat of entropy is worth: more explores longer", min=0, max=1e3)
    value_coefficient: float = option(0.5, "weight of the value loss", min=0, max=1e3)
    max_grad_norm: float = option(0.5, "longer gradients are scaled down to this", above=0, max=1e30)
    hidden_size: int = option(64, "units of each of the two hidden layers", min=1, max=65536)
    normalize_observations: bool = option(False, "subtract the running mean of observations, divide by their deviation")
    normalize_rewards: bool = option(False, "divide rewards by the running deviation of the discounted return")
    log_every: int = option(1000, "environment steps between points of the curves", min=1, resume=True)
    eval_every: int = option(10_000, "environment steps between evaluations; there is always one at the end",
                             min=1, resume=True)  # fmt: skip
    eval_episodes: int = option(10, "greedy episodes in an evaluation", min=1, smoke=2, resume=True)
    engine: str = option("auto", "gym: Gymnasium's environments; compiled: machine code, for those it knows; "
                         "auto: compiled where it can be, from 20,000 steps up",
                         choices=("auto", "gym", "compiled"))  # fmt: skip
    seed: int = option(1, "seed of the weights, the actions and the environments", min=0)
    device: str = option("cpu", "auto, cpu, cuda, cuda:N or mps; so small a network is fastest on the CPU",
                         check="rlboard.devices:check_device")  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    "solve": {"total_timesteps": 19_968, "learning_rate": 3e-3, "gamma": 0.99, "gae_lambda": 0.9},
    "acrobot": {"env_id": "Acrobot-v1", "total_timesteps": 200_000, "num_envs": 16, "n_steps": 256, "batch_size": 64,
                "n_epochs": 4, "learning_rate": 3e-4, "anneal": False, "gamma": 0.99, "gae_lambda": 0.94,
                "normalize_observations": True, "normalize_rewards": True},
    "lunarlander": {"env_id": "LunarLander-v3", "total_timesteps": 400_000, "num_envs": 16, "n_steps": 256,
                    "n_epochs": 10, "gamma": 0.995, "gae_lambda": 0.98, "normalize_rewards": True,
                    "eval_every": 50_000},
    "mountaincar": {"env_id": "MountainCar-v0", "total_timesteps": 1_000_000, "num_envs": 16, "n_steps": 16,
                    "batch_size": 64, "n_epochs": 4, "learning_rate": 3e-4, "anneal": False, "gamma": 0.99,
                    "gae_lambda": 0.98, "normalize_observations": True, "normalize_rewards": True},
    "pendulum": {"env_id": "Pendulum-v1", "total_timesteps": 100_000, "num_envs": 4, "n_steps": 1024, "batch_size": 64,
                 "n_epochs": 10, "gamma": 0.9, "gae_lambda": 0.95},
}  # fmt: skip


def shuffled(experience: Sequence[Tensor], size: int, rng: np.random.Generator) -> Iterator[Sequence[Tensor]]:
    """All transitions once, in batches of `size` in random order; the first axis of the tensors is (transitions,)."""
    count, device = len(experience[0]), experience[0].device
    if size == count:
        yield experience  # whose gradient no order changes
        return
    for chosen in torch.from_numpy(rng.permutation(count)).to(device).split(size):  # type: ignore[no-untyped-call]
        yield [tensor[chosen] for tensor in experience]


def losses(network: ActorCritic, config: Config, clip_range: float, inputs: Tensor, actions: Tensor,
           old_log_probabilities: Tensor, advantages: Tensor, returns: Tensor) -> tuple[Tensor, ...]:  # fmt: skip
    """The loss of a batch, its policy's and value's part, and of each transition the actor's outputs and log ratio_t.

    `inputs` are observations as the network normalises them; the first axis of all is (transitions,).
    """
    outputs, values = network.actor(inputs), network.critic(inputs).squeeze(-1)
    log_ratios = network.log_probabilities(outputs, actions) - old_log_probabilities
    ratios = log_ratios.exp()
    deviation, mean = torch.std_mean(advantages)
    advantages = (advantages - mean) / (deviation + 1e-8)
    clipped = ratios.clamp(1 - clip_range, 1 + clip_range)
    policy_loss = -torch.min(ratios * advantages, clipped * advantages).mean()
    value_loss = nn.functional.mse_loss(values, returns)
    total = policy_loss + config.value_coefficient * value_loss
    if config.entropy_coefficient:  # its gradient takes a tenth of the time, with a weight of 0 too
        total = total - config.entropy_coefficient * network.entropy(outputs)
    return total, policy_loss, value_loss, outputs, log_ratios


def actor(config: Config, weights: Mapping[str, Tensor], greedy: bool, seed: int) -> Act:
    """See `act_by`."""
    return act_by(config, weights, greedy, seed)


def train(config: Config, state: Mapping[str, Any] | None = None) -> Iterator[Event]:
    """Trains, and yields an event at step 0, whenever `log_every` or `eval_every` steps are passed, and at the end.

    The x axis counts environment steps. With the `state` of an earlier event it goes on behind that, and the first
    event is at its step.

    Raises:
        UsageError: the environment, the batch size or the device cannot be used (before the first event).
        NumericalError: the loss is NaN or infinite.
    """
    check_batches(config.num_envs, config.n_steps, config.batch_size)
    shape = config.n_steps, config.num_envs
    training = Training(config, (DISCRETE, CONTINUOUS), state, math.prod(shape))
    environments, device = training.environments, training.device
    network = ActorCritic(config, environments).to(device)
    optimizer = Adam([flatten(network)], config.learning_rate, epsilon=1e-5)
    scale = RewardScale(config.num_envs, config.gamma)
    training.keep(network, optimizer=optimizer, scale=scale)
    player = Player(network, environments.action_space)
    recent: deque[Rollout] = deque(maxlen=math.ceil(1000 / training.steps))
    of_all = partial(transitions, device=device)

    yield training.begin()

    while training.step < training.total:
        left = 1 - training.step / training.total if config.anneal else 1.0
        clip_range = config.clip_range * left
        optimizer.learning_rate = config.learning_rate * left

        with record_function("rollout"):
            noises = player.noise(training.rng, *shape)
            rollout = collect(environments, player, noises, config.gamma, scale if config.normalize_rewards else None)
            recent.append(rollout)

        with record_function("update"):
            actions = of_all(rollout.actions)
            with torch.no_grad():
                inputs = network.normalize(of_all(rollout.observations))
                log_probabilities = network.log_probabilities(network.actor(inputs), actions)
                values = network.critic(inputs).view(shape).cpu().numpy()
            advantages = advantages_of(rollout, values, config.gamma, config.gae_lambda)
            returns = advantages + values
            experience = inputs, actions, log_probabilities, of_all(advantages), of_all(returns)
            for _ in range(config.n_epochs):
                for batch in shuffled(experience, config.batch_size, training.rng):
                    loss, *_ = losses(network, config, clip_range, *batch)
                    norm = descend(loss, optimizer, config.max_grad_norm)
            if isinstance(network.normalize, RunningMoments):
                network.normalize.update(rollout.observations.reshape(training.steps, -1))
            player.refresh()

        due = training.count()
        if not math.isfinite(loss.detach()):
            raise NumericalError(
                f"the loss is {loss.item():.3g} at step {training.step}: try a smaller --learning-rate"
            )
        if not due:
            continue
        with torch.no_grad():
            loss, policy_loss, value_loss, outputs, log_ratios = losses(network, config, clip_range, *experience)
            ratios = log_ratios.exp()
            scalars = {
                "train/loss": loss.item(),
                "train/policy_loss": policy_loss.item(),
                "train/value_loss": value_loss.item(),
                "train/entropy": network.entropy(outputs).item(),
                "train/approx_kl": (ratios - 1 - log_ratios).mean().item(),
                "train/clip_fraction": ((ratios - 1).abs() > clip_range).float().mean().item(),
                "train/explained_variance": explained_variance(advantages, returns),
                "train/grad_norm": norm.item(),
                "train/learning_rate": config.learning_rate * left,
                "train/clip_range": clip_range,
            }
        if network.log_std is not None:
            scalars["train/std"] = network.log_std.exp().mean().item()
        histograms = {"Actions/taken": partial(player.taken, rollout.actions)}
        yield training.event(scalars, player.greedy, histograms, partial(features, network, player, recent))
    environments.close()
