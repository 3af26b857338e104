"""REINFORCE with a learned baseline: the same gradient with less noise, and the first half of an actor-critic.

Source: R. S. Sutton and A. G. Barto, "Reinforcement Learning: An Introduction", 2nd edition, 2018, section 13.4; the
baseline is R. J. Williams' own, "Simple statistical gradient-following algorithms for connectionist reinforcement
learning", Machine Learning 8, 1992. What may be subtracted from a return without changing the gradient's expectation is
anything that does not depend on the action; best is what was to be expected anyway, V(s), which is learned beside:

    grad J(theta) = E[ sum_t (G_t - V(s_t; w)) grad log pi(a_t | s_t; theta) ],    G_t = r_t + gamma G_{t+1}
    loss(w)       = sum_t (G_t - V(s_t; w))^2

Every episode is one sample of both and one step of Adam, as in `reinforce.py`, from which three things differ: the
second network; actions no longer count by how much followed but by how much more than expected, so that some become
less likely; and an episode cut short by a time limit goes on in V(s_T), which stands for the G of what was not played.
Policy and value share no weights and Adam divides by the size of each gradient: the two losses need no weights either.

Result (CartPole-v1, learning rate 1e-3, gamma 0.99, seeds 1 to 5): a mean of 475 over 100 episodes after 600 to 680
episodes, median 620; `rlboard reinforce --engine gym` with the same numbers needs 800 to 1,380, median 1,240.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.profiler import record_function

from agents._environments import DISCRETE, Act, Environment, blamed, evaluation, make_environment, passed, sizes
from agents._gradients import Adam, flatten
from agents._networks import Floats, Mirror, perceptron
from rlboard.checkpoint import load_weights
from rlboard.config import option
from rlboard.devices import resolve_device
from rlboard.errors import NumericalError
from rlboard.events import Event, Image, Video
from rlboard.seeding import seed_everything


@dataclass(frozen=True)
class Config:
    env_id: str = option("CartPole-v1", "Gymnasium environment: discrete actions, flat Box observations",
                         check="agents._environments:check_discrete")  # fmt: skip
    episodes: int = option(1000, "episodes to train", min=1, smoke=60, resume=True)
    learning_rate: float = option(1e-3, "step size of Adam, for policy and value", above=0, max=1e30, alias="--lr")
    gamma: float = option(0.99, "discount: what a reward one step later is worth", min=0, max=1)
    hidden_size: int = option(128, "units of the hidden layer of each network", min=1, max=65536)
    eval_every: int = option(250, "episodes between evaluations; there is always one at the end", min=1, resume=True)
    eval_episodes: int = option(10, "greedy episodes in an evaluation", min=1, smoke=2, resume=True)
    seed: int = option(1, "seed of the weights, the actions and the environment", min=0)
    device: str = option("cpu", "auto, cpu, cuda, cuda:N or mps; so small a policy is fastest on the CPU",
                         check="rlboard.devices:check_device")  # fmt: skip


class PolicyAndValue(nn.Module):
    """pi and V: observations (batch, observation size) to logits (batch, actions) and values (batch,)."""

    def __init__(self, observation_size: int, hidden_size: int, actions: int) -> None:
        super().__init__()
        self.policy = perceptron((observation_size, hidden_size, actions), nn.ReLU)
        self.value = perceptron((observation_size, hidden_size, 1), nn.ReLU)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        return self.policy(observations), self.value(observations).squeeze(-1)


class Episode(NamedTuple):
    """The observations, actions and rewards of its steps, and where a time limit has cut it short; none if it ended."""

    observations: list[Floats]
    actions: list[np.integer[Any]]
    rewards: list[float]
    cut_at: Floats | None


def choose(policy: Mirror, observation: Floats, noise: NDArray[np.floating[Any]] | float = 0.0) -> np.integer[Any]:
    """The action with the largest logit + noise: greedy without noise, with Gumbel noise a sample of the softmax."""
    return np.argmax(policy(observation) + noise)


@np.errstate(over="ignore", invalid="ignore")  # weights that diverge show in the loss
def play(environment: Environment, policy: Mirror, rng: np.random.Generator) -> Episode:
    """One episode, from a reset until it is terminated or truncated."""
    observations, actions, rewards = [], [], []
    observation, _ = environment.reset()
    size = (64, len(policy.layers[-1][1]))
    noise = chain.from_iterable(rng.gumbel(size=size).astype(np.float32) for _ in repeat(None))  # many steps at once
    terminated = truncated = False
    while not (terminated or truncated):
        observation = observation.astype(np.float32, copy=False)
        action = choose(policy, observation, next(noise))
        observations.append(observation)
        actions.append(action)
        observation, reward, terminated, truncated, _ = environment.step(action)
        rewards.append(float(reward))
    return Episode(observations, actions, rewards, None if terminated else observation.astype(np.float32))


def discounted(rewards: list[float], following: float, gamma: float) -> Tensor:
    """G_t = r_t + gamma G_{t+1} for every step t of an episode, (steps,); `following` is the G behind its last."""
    returns = []
    for reward in reversed(rewards):
        following = reward + gamma * following
        returns.append(following)
    return torch.tensor(returns[::-1])


def actor(config: Config, weights: Mapping[str, Tensor], greedy: bool, seed: int) -> Act:
    """The policy of a finished run: its most likely action, or a sample of its actions, equal for equal seeds.

    Raises:
        DataError: `weights` are of another network than `config` describes.
    """
    observation_size, action_count = sizes(make_environment(config.env_id))
    network = PolicyAndValue(observation_size, config.hidden_size, action_count)
    load_weights(network, weights)
    policy, rng = Mirror(network.policy), np.random.default_rng(seed)
    return lambda state: choose(policy, state, 0.0 if greedy else rng.gumbel(size=action_count))


def train(config: Config, state: Mapping[str, Any] | None = None) -> Iterator[Event]:
    """Trains, and yields an event at step 0, every 20 episodes, and at the last one; the x axis counts episodes.

    With the `state` of an earlier event it goes on behind that, and the first event is at its step.

    Raises:
        UsageError: the environment or the device cannot be used (before the first event).
        NumericalError: the loss is NaN or infinite.
    """
    torch.set_num_threads(1)  # a second thread costs more than a layer of 128 units can give it to do
    rng = seed_everything(config.seed)
    device = resolve_device(config.device)
    environment = make_environment(config.env_id, kinds=[DISCRETE])
    environment.reset(seed=config.seed)
    observation_size, action_count = sizes(environment)
    network = PolicyAndValue(observation_size, config.hidden_size, action_count).to(device)
    optimizer = Adam([flatten(network)], config.learning_rate)
    scores: deque[float] = deque(maxlen=100)
    lengths: deque[int] = deque(maxlen=100)
    episode = steps = 0
    if state:
        network.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        rng.bit_generator.state = state["actions"]
        environment.unwrapped.np_random.bit_generator.state = state["environment"]
        episode, steps = state["episode"], state["steps"]
        scores.extend(state["scores"])
        lengths.extend(state["lengths"])
    policy, value = Mirror(network.policy), Mirror(network.value)

    def snapshot() -> dict[str, Any]:
        counted = {"episode": episode, "steps": steps, "scores": list(scores), "lengths": list(lengths)}
        learner = {"model": network.state_dict(), "optimizer": optimizer.state_dict()}
        environment_random = environment.unwrapped.np_random.bit_generator.state
        return {**learner, "actions": rng.bit_generator.state, "environment": environment_random, **counted}

    inputs = torch.zeros(2, observation_size, device=device)
    yield Event(episode, config.episodes, model=network, inputs=inputs, state=snapshot)

    while episode < config.episodes:
        with record_function("play"), blamed(config.env_id):
            observations, actions, rewards, cut_at = play(environment, policy, rng)
        with record_function("update"):
            following = 0.0 if cut_at is None else float(value(cut_at)[0])
            returns = discounted(rewards, following, config.gamma).to(device)
            logits, values = network(torch.from_numpy(np.array(observations)).to(device))
            taken = torch.from_numpy(np.array(actions)).to(device)
            advantages = returns - values.detach()
            policy_loss = (advantages * nn.functional.cross_entropy(logits, taken, reduction="none")).sum()
            value_loss = nn.functional.mse_loss(values, returns, reduction="sum")
            loss = policy_loss + value_loss
            optimizer.zero()
            loss.backward()
            optimizer.step()
        if device.type != "cpu":
            policy.refresh()
            value.refresh()
        episode, steps = episode + 1, steps + len(rewards)
        scores.append(sum(rewards))
        lengths.append(len(rewards))

        last = episode == config.episodes
        judged = last or passed(config.eval_every, episode - 1, episode)
        if episode % 20 and not judged:
            continue
        if not math.isfinite(loss.item()):
            raise NumericalError(f"the loss is {loss.item()} at episode {episode}: try a smaller --learning-rate")
        score = fmean(list(scores)[-20:])
        log_probabilities, spread = torch.log_softmax(logits, dim=-1), returns.var(correction=0).item()
        scalars = {
            "reward": score,
            "rollout/ep_rew_mean": fmean(scores),
            "rollout/ep_rew_min": min(scores),
            "rollout/ep_rew_max": max(scores),
            "rollout/ep_len_mean": fmean(lengths),
            "train/loss": loss.item(),
            "train/policy_loss": policy_loss.item(),
            "train/value_loss": value_loss.item() / len(rewards),
            "train/explained_variance": 1 - advantages.var(correction=0).item() / max(spread, 1e-8),
            "train/entropy": -(log_probabilities.exp() * log_probabilities).sum(dim=-1).mean().item(),
            "train/grad_norm": optimizer.gradients[0].norm().item(),
            "time/steps": steps,
        }
        images: Mapping[str, Image] = {}
        videos: Mapping[str, Video] = {}
        if judged:
            greedy = partial(choose, policy)
            found, images, videos = evaluation(config.env_id, greedy, config.eval_episodes, config.seed)
            scalars |= found
        message = f"# of episode :{episode}, avg score : {score:.1f}"
        yield Event(episode, config.episodes, scalars, "reward", message, network, images=images, videos=videos,
                    state=snapshot)  # fmt: skip
    environment.close()
