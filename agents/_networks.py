"""Small networks and their mirror in NumPy, by which agents act."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Floats = NDArray[np.float32]

ZERO = np.float32(0)  # NumPy converts a Python number in every call


def perceptron(
    sizes: Sequence[int], activation: type[nn.Module] = nn.Tanh, output_gain: float | None = None
) -> nn.Sequential:
    """Linear layers of these sizes, inputs first, with `activation` between them and none at the end.

    With an `output_gain` the weights are orthogonal, scaled by sqrt(2) and by that gain in the last layer, and the
    biases zero (Saxe et al., 2014); without, they are as torch draws them.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    layers.pop()
    if output_gain is not None:
        for number in range(0, len(layers), 2):
            linear = layers[number]
            assert isinstance(linear, nn.Linear)
            nn.init.orthogonal_(linear.weight, output_gain if number == len(layers) - 1 else 2**0.5)
            nn.init.zeros_(linear.bias)
    return nn.Sequential(*layers)


class Pixels(nn.Module):
    """Frames of bytes, (..., frames, height, width), as floats from 0 to 1."""

    def forward(self, frames: Tensor) -> Tensor:
        return frames.float() / 255


def convolutions(shape: Sequence[int]) -> tuple[nn.Sequential, int]:
    """The layers by which deep Q-learning sees frames, and how many features they have (Mnih et al., 2015).

    `shape` is (frames, height, width), both sides 36 pixels or more.
    """
    layers = nn.Sequential(
        Pixels(),
        nn.Conv2d(shape[0], 32, 8, stride=4),
        nn.ReLU(),
        nn.Conv2d(32, 64, 4, stride=2),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3),
        nn.ReLU(),
        nn.Flatten(start_dim=-3),
    )
    with torch.no_grad():
        return layers, layers(torch.zeros(shape, dtype=torch.uint8)).numel()


class Mirror:
    """A perceptron of Tanh or ReLU in NumPy, for acting: a few observations need no gradient, and torch costs more to
    call than their layers do to compute.

    On the CPU the arrays are views of the network's parameters and follow every update by themselves; from a GPU they
    are copied by `refresh`.
    """

    def __init__(self, network: nn.Sequential) -> None:
        self.network = network
        self.linear = [layer for layer in network if isinstance(layer, nn.Linear)]
        self.rectified = any(isinstance(layer, nn.ReLU) for layer in network)
        self.refresh()

    def refresh(self) -> None:
        """Takes over what the network has learned."""
        self.layers: list[tuple[Floats, Floats]] = [
            (layer.weight.detach().cpu().numpy().T, layer.bias.detach().cpu().numpy()) for layer in self.linear
        ]

    def __call__(self, inputs: Floats) -> Floats:
        """What the network says: (batch, inputs) to (batch, outputs), or (inputs,) to (outputs,)."""
        *hidden, (weight, bias) = self.layers
        for each, its_bias in hidden:
            inputs = inputs.dot(each)
            inputs += its_bias
            np.maximum(inputs, ZERO, out=inputs) if self.rectified else np.tanh(inputs, out=inputs)
        outputs: Floats = inputs.dot(weight)
        outputs += bias
        return outputs


class Direct:
    """Any network, called like a `Mirror`: for those whose layers cost more than it costs to call torch."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def refresh(self) -> None:
        """There is nothing to take over."""

    @torch.no_grad()
    def __call__(self, inputs: NDArray[Any]) -> Floats:
        """What the network says: (batch, ...) to (batch, outputs), or one input to (outputs,)."""
        outputs: Tensor = self.network(torch.from_numpy(inputs).to(next(self.network.parameters()).device))
        return outputs.cpu().numpy()


class RunningMoments(nn.Module):
    """Observations, normalised by the mean and the variance of all that `update` has seen, and clipped to [-10, 10].

    Chan et al., "Updating formulae and a pairwise algorithm for computing sample variances", 1979. The moments are
    buffers, so that whatever has the weights has them. Before the first update nothing is changed but the extremes.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("variance", torch.ones(size))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, observations: Tensor) -> Tensor:
        """(..., size) to (..., size)."""
        return ((observations - self.mean) * torch.rsqrt(self.variance + 1e-8)).clamp(-10, 10)

    @torch.no_grad()
    def update(self, observations: NDArray[Any]) -> None:
        """Takes in observations, (batch, size)."""
        batch = torch.as_tensor(observations, dtype=torch.float64, device=self.count.device)
        count, total = len(batch), self.count + len(batch)
        change = batch.mean(0) - self.mean
        squares = self.variance * self.count + batch.var(0, correction=0) * count
        self.variance.copy_((squares + change**2 * self.count * count / total) / total)
        self.mean.copy_(self.mean + change * count / total)
        self.count.copy_(total)

    def arrays(self) -> tuple[Floats, Floats]:
        """The mean and the inverse deviation as NumPy arrays, to normalise by what was seen until now."""
        deviation = torch.sqrt(self.variance + 1e-8)
        return self.mean.cpu().numpy().copy(), (1 / deviation).cpu().numpy()
