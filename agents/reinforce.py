"""REINFORCE: the Monte-Carlo policy gradient, with which deep reinforcement learning begins.

Paper: R. J. Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement learning",
Machine Learning 8, 1992. An action is made more likely in proportion to the return that followed it:

    grad J(theta) = E[ sum_t G_t grad log pi(a_t | s_t; theta) ],    G_t = r_t + gamma G_{t+1}

Every episode is one sample of the expectation and one step of Adam. There is no baseline, so that nothing stands
between the equation and the code; the price is variance, which the reward curve shows.

There are two engines. `GymEngine` below is the algorithm as it is read: acting needs no gradient, so it runs in NumPy
on views of the network's own weights, an episode's log-probabilities are computed again in one batch, and the gradient
is taken once. `_compiled.py` is the same algorithm, environment included, in machine code, some 300 times as fast.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, repeat
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.profiler import record_function

from agents._environments import (
    DISCRETE,
    Act,
    Environment,
    blamed,
    contact_sheet,
    evaluate,
    film,
    make_environment,
    passed,
    sizes,
)
from agents._gradients import Adam, flatten
from rlboard.checkpoint import load_weights
from rlboard.config import option, printable
from rlboard.devices import resolve_device
from rlboard.errors import NumericalError, UsageError
from rlboard.events import Event
from rlboard.seeding import seed_everything

if TYPE_CHECKING:
    from agents._compiled import CompiledEngine

COMPILED_FROM = 1000
"""Episodes from which `--engine auto` takes the compiled engine, whether or not it must be compiled first: equal
commands give equal runs."""


@dataclass(frozen=True)
class Config:
    env_id: str = option("CartPole-v1", "Gymnasium environment: discrete actions, flat Box observations",
                         check="agents._environments:check_discrete")  # fmt: skip
    episodes: int = option(10_000, "episodes to train", min=1, smoke=60, resume=True)
    learning_rate: float = option(2e-4, "step size of Adam", above=0, alias="--lr")
    gamma: float = option(0.98, "discount: what a reward one step later is worth", min=0, max=1)
    hidden_size: int = option(128, "units of the hidden layer", min=1, max=65536)
    engine: str = option("auto", "gym: Gymnasium and torch; compiled: machine code, for three environments; "
                         "auto: compiled where it can be, from 1,000 episodes up",
                         choices=("auto", "gym", "compiled"))  # fmt: skip
    eval_every: int = option(1000, "episodes between evaluations; there is always one at the end", min=1, resume=True)
    eval_episodes: int = option(10, "greedy episodes in an evaluation", min=1, smoke=2, resume=True)
    seed: int = option(1, "seed of the weights, the actions and the environment", min=0)
    device: str = option("cpu", "auto, cpu, cuda, cuda:N or mps; so small a policy is fastest on the CPU",
                         check="rlboard.devices:check_device")  # fmt: skip


PRESETS = {"solve": {"learning_rate": 1e-3, "gamma": 1.0}}

ZERO = np.float32(0)  # NumPy converts a Python number in every call

Weights = list[NDArray[np.float32]]
Episode = tuple[list[NDArray[np.float32]], list[int], list[float]]  # observations, actions and rewards of its steps


class Policy(nn.Module):
    """pi(a | s): observations (batch, observation size) to log-probabilities (batch, actions)."""

    def __init__(self, observation_size: int, hidden_size: int, actions: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(observation_size, hidden_size)
        self.logits = nn.Linear(hidden_size, actions)

    def forward(self, observations: Tensor) -> Tensor:
        hidden = torch.relu(self.hidden(observations))
        return torch.log_softmax(self.logits(hidden), dim=-1)

    def weights(self) -> Weights:
        """The parameters as NumPy arrays: on the CPU views, which follow every update by themselves."""
        return [parameter.detach().cpu().numpy() for parameter in self.parameters()]


def choose(weights: Weights, observation: NDArray[np.float32], noise: NDArray[np.floating[Any]] | float = 0.0) -> int:
    """The action with the largest logit + noise: greedy without noise, with Gumbel noise a sample of the softmax."""
    w_hidden, b_hidden, w_logits, b_logits = weights
    hidden = np.maximum(w_hidden.dot(observation) + b_hidden, ZERO)
    action: int = (w_logits.dot(hidden) + b_logits + noise).argmax()
    return action  # NumPy's integer, which Gymnasium checks faster than Python's


@np.errstate(over="ignore", invalid="ignore")  # weights that diverge show in the loss
def play(environment: Environment, weights: Weights, rng: np.random.Generator) -> Episode:
    """One episode, from a reset until it is terminated or truncated."""
    observations, actions, rewards = [], [], []
    observation, _ = environment.reset()
    ended = False
    blocks = (rng.gumbel(size=(64, len(weights[-1]))).astype(np.float32) for _ in repeat(None))  # many steps at once
    noise = chain.from_iterable(blocks)
    while not ended:
        observation = observation.astype(np.float32, copy=False)
        action = choose(weights, observation, next(noise))
        observations.append(observation)
        actions.append(action)
        observation, reward, terminated, truncated, _ = environment.step(action)
        rewards.append(float(reward))
        ended = terminated or truncated
    return observations, actions, rewards


def discounted(rewards: list[float], gamma: float) -> Tensor:
    """G_t = r_t + gamma G_{t+1} for every step t of an episode, (steps,)."""
    returns, following = [], 0.0
    for reward in reversed(rewards):
        following = reward + gamma * following
        returns.append(following)
    return torch.tensor(returns[::-1])


class GymEngine:
    """REINFORCE in Gymnasium and torch."""

    name, threads = "gym", False

    def __init__(self, config: Config, environment: Environment, policy: Policy, rng: np.random.Generator) -> None:
        self.config, self.environment, self.policy, self.rng = config, environment, policy, rng
        self.optimizer = Adam([flatten(policy)], config.learning_rate)
        environment.reset(seed=config.seed)

    def learn(self, episodes: int) -> tuple[list[float], list[int], float, float]:
        """Plays `episodes` episodes and learns from each.

        Returns:
            The score (sum of rewards) and the length of each, the loss and the mean entropy of the last.
        """
        scores, lengths = [], []
        device = self.policy.hidden.weight.device
        for _ in range(episodes):
            with record_function("play"), blamed(self.config.env_id):
                observations, actions, rewards = play(self.environment, self.policy.weights(), self.rng)
            with record_function("forward"):
                returns = discounted(rewards, self.config.gamma).to(device)
                log_probabilities = self.policy(torch.from_numpy(np.array(observations)).to(device))
                taken = torch.from_numpy(np.array(actions)).to(device)
                loss = (returns * nn.functional.nll_loss(log_probabilities, taken, reduction="none")).sum()
            with record_function("backward"):
                self.optimizer.zero()
                loss.backward()  # type: ignore[no-untyped-call]
            with record_function("optimizer"):
                self.optimizer.step()
            scores.append(sum(rewards))
            lengths.append(len(rewards))
        entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1).mean()
        return scores, lengths, loss.item(), entropy.item()

    def prepare(self) -> str:
        """There is nothing to prepare, and nothing to say about it."""
        return ""

    def evaluate(self, episodes: int) -> float:
        """The mean return of `episodes` greedy episodes; the same ones each time, seeded apart from training."""
        return evaluate(self.config.env_id, partial(choose, self.policy.weights()), episodes, self.config.seed)

    def state(self) -> dict[str, Any]:
        """Everything that decides the next episode."""
        return {
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "actions": self.rng.bit_generator.state,
            "environment": self.environment.unwrapped.np_random.bit_generator.state,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes back to what `state` has returned."""
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rng.bit_generator.state = state["actions"]
        self.environment.unwrapped.np_random.bit_generator.state = state["environment"]


def make_engine(
    config: Config, environment: Environment, policy: Policy, rng: np.random.Generator
) -> tuple[GymEngine | CompiledEngine, str]:
    """The engine that `config` asks for, or the other one and why.

    Raises:
        UsageError: the compiled engine is asked for, and does not fit the environment or the device.
    """
    reason = ""
    if config.engine == "compiled" or (config.engine == "auto" and config.episodes >= COMPILED_FROM):
        try:
            from agents._compiled import CompiledEngine

            return CompiledEngine(config.env_id, policy, config.learning_rate, config.gamma, config.seed), ""
        except UsageError as error:
            if config.engine == "compiled":
                raise
            reason = f": {error}"
        except (ImportError, RuntimeError) as error:  # no numba, one too old for this NumPy, no place for its cache
            reason = f": numba cannot be used ({printable(error, 120)})"
    return GymEngine(config, environment, policy, rng), reason


def actor(config: Config, weights: Mapping[str, Tensor], greedy: bool, seed: int) -> Act:
    """The policy of a finished run: its most likely action, or a sample of its actions, equal for equal seeds.

    Raises:
        DataError: `weights` are of another network than `config` describes.
    """
    environment = make_environment(config.env_id)
    observation_size, action_count = sizes(environment)
    policy = Policy(observation_size, config.hidden_size, action_count)
    load_weights(policy, weights)
    arrays, rng = policy.weights(), np.random.default_rng(seed)
    return partial(choose, arrays) if greedy else lambda state: choose(arrays, state, rng.gumbel(size=len(arrays[-1])))


def train(config: Config, state: Mapping[str, Any] | None = None) -> Iterator[Event]:
    """Trains, and yields an event at step 0, every 20 episodes, and at the last one; the x axis counts episodes.

    With the `state` of an earlier event it goes on behind that, and the first event is at its step.

    Raises:
        UsageError: the environment, the engine or the device cannot be used (before the first event).
        NumericalError: the loss is NaN or infinite.
    """
    torch.set_num_threads(1)  # a second thread costs more than a layer of 128 units can give it to do
    rng = seed_everything(config.seed)
    device = resolve_device(config.device)
    environment = make_environment(config.env_id, kinds=[DISCRETE])
    observation_size, action_count = sizes(environment)
    policy = Policy(observation_size, config.hidden_size, action_count).to(device)
    engine, reason = make_engine(replace(config, engine=state["engine"]) if state else config, environment, policy, rng)
    scores: deque[float] = deque(maxlen=100)
    lengths: deque[int] = deque(maxlen=100)
    episode = steps = 0
    if state:
        engine.restore(state["learner"])
        episode, steps = state["episode"], state["steps"]
        scores.extend(state["scores"])
        lengths.extend(state["lengths"])

    def snapshot() -> dict[str, Any]:
        counted = {"episode": episode, "steps": steps, "scores": list(scores), "lengths": list(lengths)}
        return {"model": policy.state_dict(), "engine": engine.name, "learner": engine.state(), **counted}

    inputs = torch.zeros(1, observation_size, device=device)
    notice = f"engine: {engine.name}{reason}"
    yield Event(episode, config.episodes, model=policy, inputs=inputs, notice=notice, threads=engine.threads,
                state=snapshot)  # fmt: skip
    if notice := engine.prepare():
        yield Event(episode, config.episodes, notice=notice, state=snapshot)

    while episode < config.episodes:
        new = min(20, config.episodes - episode)
        new_scores, new_lengths, loss, entropy = engine.learn(new)
        episode, steps = episode + new, steps + sum(new_lengths)
        scores.extend(new_scores)
        lengths.extend(new_lengths)
        if not math.isfinite(loss):
            raise NumericalError(f"the loss is {loss} at episode {episode}: try a smaller --learning-rate")
        score = fmean(list(scores)[-20:])
        gradients = [parameter.grad for parameter in policy.parameters() if parameter.grad is not None]
        scalars = {
            "reward": score,
            "rollout/ep_rew_mean": fmean(scores),
            "rollout/ep_rew_min": min(scores),
            "rollout/ep_rew_max": max(scores),
            "rollout/ep_len_mean": fmean(lengths),
            "train/loss": loss,
            "train/entropy": entropy,
            "train/grad_norm": math.hypot(*(gradient.norm().item() for gradient in gradients)),
            "time/steps": steps,
        }
        images, videos = {}, {}
        if passed(config.eval_every, episode - new, episode) or episode == config.episodes:
            scalars["eval/mean_reward"] = engine.evaluate(config.eval_episodes)
            greedy = partial(choose, policy.weights())
            images["eval/episode"] = partial(contact_sheet, config.env_id, greedy, config.seed)
            videos["eval/video"] = partial(film, config.env_id, greedy, config.seed)
        message = f"# of episode :{episode}, avg score : {score:.1f}"
        yield Event(episode, config.episodes, scalars, "reward", message, policy, images=images, videos=videos,
                    state=snapshot)  # fmt: skip
    environment.close()
