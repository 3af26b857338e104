"""REINFORCE on CartPole-v1 as blog posts teach it, after minimalRL: what `rlboard reinforce` is compared with.

Every step runs the policy with gradients, samples from `torch.distributions.Categorical`, and keeps its
probability; every episode walks back over its steps, with one `backward` a step, and ends in one step of Adam.
One thing is not as in the blog: an episode ends when it is truncated too, where the blog's pole went on for
thousands of steps.
"""

import argparse
from collections import deque
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor, nn, optim
from torch.distributions import Categorical
from torch.utils.tensorboard import SummaryWriter

LEARNING_RATE = 0.0002
GAMMA = 0.98


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 128)
        self.fc2 = nn.Linear(128, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.fc1(x))
        return torch.softmax(self.fc2(x), dim=0)


def train(episodes: int, seed: int, writer: Any = None) -> int:
    """Trains, logs to `writer` where there is one, and returns the number of environment steps."""
    torch.manual_seed(seed)
    env = gym.make("CartPole-v1")
    policy = Policy()
    optimizer = optim.Adam(policy.parameters(), lr=LEARNING_RATE)
    if writer is not None:
        writer.add_graph(policy, torch.zeros(4))
    scores: deque[float] = deque(maxlen=20)
    steps = 0
    for episode in range(1, episodes + 1):
        observation, _ = env.reset(seed=seed if episode == 1 else None)
        history: list[tuple[float, Tensor]] = []
        ended = False
        while not ended:
            probabilities = policy(torch.from_numpy(observation).float())
            action = Categorical(probabilities).sample()  # type: ignore[no-untyped-call]
            observation, reward, terminated, truncated, _ = env.step(action.item())
            history.append((float(reward), probabilities[action]))
            ended = terminated or truncated

        following = 0.0
        optimizer.zero_grad()
        for reward, probability in reversed(history):
            following = reward + GAMMA * following
            loss = -torch.log(probability) * following
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

        scores.append(sum(reward for reward, _ in history))
        steps += len(history)
        if episode % 20 == 0:
            average = sum(scores) / len(scores)
            print(f"# of episode :{episode}, avg score : {average:.1f}")
            if writer is not None:
                writer.add_scalar("reward", average, episode)
    env.close()
    return steps


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--logdir", default="logs/REINFORCE-blog")
    options = parser.parse_args()
    writer = SummaryWriter(options.logdir)
    steps = train(options.episodes, options.seed, writer)
    writer.close()
    print(f"environment steps: {steps}")


if __name__ == "__main__":
    main()
