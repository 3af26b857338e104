"""REINFORCE: the Monte-Carlo policy gradient, with which deep reinforcement learning begins.

Paper: R. J. Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement learning",
Machine Learning 8, 1992. An action is made more likely in proportion to the return that followed it:

    grad J(theta) = E[ sum_t G_t grad log pi(a_t | s_t; theta) ],    G_t = r_t + gamma G_{t+1}

Every episode is one sample of the expectation and one step of Adam. There is no baseline, so that nothing stands
between the equation and the code; the price is variance, which the reward curve shows.

The one trick is speed: acting needs no gradient, so it runs in NumPy on views of the network's own weights, an
episode's log-probabilities are computed again in one batch, and the gradient is taken once.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from agents._environments import Environment, contact_sheet, evaluate, make_environment, sizes
from rlboard.config import option
from rlboard.devices import resolve_device
from rlboard.errors import NumericalError
from rlboard.events import Event
from rlboard.seeding import seed_everything


@dataclass(frozen=True)
class Config:
    env_id: str = option("CartPole-v1", "Gymnasium environment: discrete actions, flat Box observations",
                         check="agents._environments:check_environment")  # fmt: skip
    episodes: int = option(10_000, "episodes to train", min=1, smoke=60)
    learning_rate: float = option(2e-4, "step size of Adam", above=0, alias="--lr")
    gamma: float = option(0.98, "discount: what a reward one step later is worth", min=0, max=1)
    hidden_size: int = option(128, "units of the hidden layer", min=1, max=65536)
    eval_every: int = option(1000, "episodes between evaluations; there is always one at the end", min=1)
    eval_episodes: int = option(10, "greedy episodes in an evaluation", min=1, smoke=2)
    seed: int = option(1, "seed of the weights, the actions and the environment", min=0)
    device: str = option("cpu", "auto, cpu, cuda, cuda:N or mps; so small a policy is fastest on the CPU",
                         check="rlboard.devices:check_device")  # fmt: skip


PRESETS = {"solve": {"learning_rate": 1e-3, "gamma": 1.0}}

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


def choose(weights: Weights, observation: NDArray[np.float32], noise: NDArray[np.float64] | float = 0.0) -> int:
    """The action with the largest logit + noise: greedy without noise, with Gumbel noise a sample of the softmax."""
    w_hidden, b_hidden, w_logits, b_logits = weights
    hidden = np.maximum(w_hidden @ observation + b_hidden, 0)
    return int((w_logits @ hidden + b_logits + noise).argmax())


@np.errstate(over="ignore", invalid="ignore")  # weights that diverge show in the loss
def play(environment: Environment, weights: Weights, rng: np.random.Generator) -> Episode:
    """One episode, from a reset until it is terminated or truncated."""
    observations, actions, rewards = [], [], []
    observation, _ = environment.reset()
    ended = False
    while not ended:
        observation = observation.astype(np.float32, copy=False)
        action = choose(weights, observation, rng.gumbel(size=len(weights[-1])))
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


def train(config: Config) -> Iterator[Event]:
    """Trains, and yields an event at step 0, every 20 episodes, and at the last one; the x axis counts episodes.

    Raises:
        UsageError: the environment or the device cannot be used (before the first event).
        NumericalError: the loss is NaN or infinite.
    """
    torch.set_num_threads(1)  # a second thread costs more than a layer of 128 units can give it to do
    rng = seed_everything(config.seed)
    device = resolve_device(config.device)
    environment = make_environment(config.env_id)
    environment.reset(seed=config.seed)
    observation_size, action_count = sizes(environment)
    policy = Policy(observation_size, config.hidden_size, action_count).to(device)
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.learning_rate, fused=True)
    scores: deque[float] = deque(maxlen=100)
    lengths: deque[int] = deque(maxlen=100)
    steps = 0
    yield Event(0, config.episodes, model=policy, inputs=torch.zeros(1, observation_size, device=device))

    for episode in range(1, config.episodes + 1):
        observations, actions, rewards = play(environment, policy.weights(), rng)
        returns = discounted(rewards, config.gamma).to(device)
        log_probabilities = policy(torch.from_numpy(np.array(observations)).to(device))
        taken = log_probabilities[torch.arange(len(actions)), torch.tensor(actions)]
        loss = -(returns * taken).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        scores.append(sum(rewards))
        lengths.append(len(rewards))
        steps += len(rewards)
        last = episode == config.episodes
        if episode % 20 and not last:
            continue
        if not loss.isfinite():
            raise NumericalError(f"the loss is {loss.item()} at episode {episode}: try a smaller --learning-rate")
        score = float(np.mean(list(scores)[-20:]))
        entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1).mean()
        gradients = [parameter.grad for parameter in policy.parameters() if parameter.grad is not None]
        scalars = {
            "reward": score,
            "rollout/ep_rew_mean": float(np.mean(scores)),
            "rollout/ep_rew_min": min(scores),
            "rollout/ep_rew_max": max(scores),
            "rollout/ep_len_mean": float(np.mean(lengths)),
            "train/loss": loss.item(),
            "train/entropy": entropy.item(),
            "train/grad_norm": nn.utils.get_total_norm(gradients).item(),
            "time/steps": steps,
        }
        images = {}
        if episode % config.eval_every == 0 or last:
            greedy = partial(choose, policy.weights())
            scalars["eval/mean_reward"] = evaluate(config.env_id, greedy, config.eval_episodes, config.seed)
            images["eval/episode"] = partial(contact_sheet, config.env_id, greedy, config.seed)
        message = f"# of episode :{episode}, avg score : {score:.1f}"
        yield Event(episode, config.episodes, scalars, "reward", message, policy, images=images)
    environment.close()
