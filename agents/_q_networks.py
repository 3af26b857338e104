"""Networks that tell what actions are worth: those of DQN and of SAC."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, nn

from agents._gradients import Backpropagation
from agents._networks import Direct, Mirror, convolutions, perceptron


class QNetwork(nn.Module):
    """Q(s, a) of discrete actions: observations (batch, *shape), flat ones or frames, to (batch, actions).

    Dueling (Wang et al., 2016), it is V(s) + A(s, a) - mean_b A(s, b).
    """

    def __init__(self, shape: Sequence[int], hidden_size: int, actions: int, dueling: bool) -> None:
        super().__init__()
        self.body, features = nn.Sequential(nn.Linear(shape[0], hidden_size), nn.ReLU()), hidden_size
        if len(shape) == 3:
            self.body, features = convolutions(shape)
        self.advantage = perceptron((features, hidden_size, actions), nn.ReLU)  # Q itself where nothing is added
        self.value = perceptron((features, hidden_size, 1), nn.ReLU) if dueling else None

    def forward(self, observations: Tensor) -> Tensor:
        hidden = self.body(observations)
        advantages: Tensor = self.advantage(hidden)
        if self.value is None:
            return advantages
        value: Tensor = self.value(hidden)
        return value + advantages - advantages.mean(-1, keepdim=True)

    def features(self, observations: Tensor) -> Tensor:
        """What the last layer sees of observations: (batch, hidden size)."""
        features: Tensor = self.advantage[:-1](self.body(observations))
        return features

    def _advantages(self) -> nn.Sequential:
        """A(s, a), or Q(s, a) itself, as one sequence of layers."""
        return nn.Sequential(*self.body, *self.advantage)

    @cached_property
    def backpropagation(self) -> Backpropagation:
        """What makes its gradient, once `flatten` has given it one."""
        return Backpropagation(self if self.value else self._advantages())

    def mirror(self) -> Mirror | Direct:
        """What acting needs: the best action has the largest advantage, whatever the state is worth."""
        layers = self._advantages()
        return Mirror(layers) if isinstance(layers[0], nn.Linear) else Direct(layers)


class Critics(nn.Module):
    """Q_1(s, a) and Q_2(s, a) as one network: observations and actions, (batch, size) each, to values (2, batch)."""

    def __init__(self, inputs: int, hidden_size: int) -> None:
        super().__init__()
        bounds = [(of**-0.5, of, to) for of, to in pairwise((inputs, hidden_size, hidden_size, 1))]
        self.weights = nn.ParameterList(torch.empty(2, of, to).uniform_(-bound, bound) for bound, of, to in bounds)
        self.biases = nn.ParameterList(torch.empty(2, 1, to).uniform_(-bound, bound) for bound, _, to in bounds)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        hidden = torch.cat((observations, actions), dim=-1).expand(2, -1, -1)
        *earlier, (last_weight, last_bias) = zip(self.weights, self.biases, strict=True)
        for weight, bias in earlier:
            hidden = torch.baddbmm(bias, hidden, weight).relu_()
        return torch.baddbmm(last_bias, hidden, last_weight).squeeze(-1)


class SoftActorCritic(nn.Module):
    """All that SAC learns. Called, it is the policy without its noise: observations (batch, size) to actions."""

    def __init__(self, observation_size: int, action_size: int, hidden_size: int) -> None:
        super().__init__()
        self.action_size = action_size
        self.actor = perceptron((observation_size, hidden_size, hidden_size, 2 * action_size), nn.ReLU)
        self.critics = Critics(observation_size + action_size, hidden_size)
        self.targets = Critics(observation_size + action_size, hidden_size).requires_grad_(False)
        self.targets.load_state_dict(self.critics.state_dict())
        self.log_temperature = nn.Parameter(torch.zeros(()))

    def forward(self, observations: Tensor) -> Tensor:
        mean, _ = self.actor(observations).chunk(2, dim=-1)
        return torch.tanh(mean)
