"""Small networks and their mirror in NumPy, by which agents act."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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


def flatten(network: nn.Module) -> nn.Parameter:
    """All parameters of `network` in one vector, and their gradients in its gradient: they become views of the two.

    An optimizer then changes one tensor and not one for each layer, which for small networks is most of its work, and
    the norm of all gradients is that of one. From then on they are set to zero in place, never to None.
    """
    parameters = list(network.parameters())
    lengths = [parameter.numel() for parameter in parameters]
    vector = nn.Parameter(nn.utils.parameters_to_vector(parameters).detach())
    vector.grad = torch.zeros_like(vector)
    parts = zip(parameters, torch.split(vector.detach(), lengths), torch.split(vector.grad, lengths), strict=True)
    for parameter, values, gradients in parts:
        parameter.data, parameter.grad = values.view_as(parameter), gradients.view_as(parameter)
    return vector


class Optimizer(ABC):
    """What changes a few vectors (`flatten`) by their gradients.

    torch's own optimizers do more in Python, around a step, than an update of a small network takes.

    Attributes:
        learning_rate: the size of steps; may be changed between them. gradients: those of the vectors.
    """

    def __init__(self, vectors: Sequence[nn.Parameter], learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self.values = [vector.detach() for vector in vectors]
        self.gradients: list[Tensor] = []
        for vector in vectors:
            vector.grad = torch.zeros_like(vector) if vector.grad is None else vector.grad
            self.gradients.append(vector.grad)

    def zero(self) -> None:
        """Sets the gradients to zero."""
        for gradient in self.gradients:
            gradient.zero_()

    @abstractmethod
    def step(self) -> None:
        """Changes the vectors."""

    @abstractmethod
    def state_dict(self) -> dict[str, list[Tensor]]:
        """What it knows of earlier steps."""

    def load_state_dict(self, state_dict: Mapping[str, Sequence[Tensor]]) -> None:
        """Goes back to what `state_dict` has returned."""
        for name, kept in self.state_dict().items():
            for tensor, before in zip(kept, state_dict[name], strict=True):
                tensor.copy_(before)


class Adam(Optimizer):
    """Adam (Kingma and Ba, 2015) by torch's fused kernel, called directly."""

    def __init__(self, vectors: Sequence[nn.Parameter], learning_rate: float, epsilon: float = 1e-8) -> None:
        super().__init__(vectors, learning_rate)
        self.epsilon = epsilon
        self.means = [torch.zeros_like(vector) for vector in self.values]
        self.squares = [torch.zeros_like(vector) for vector in self.values]
        self.steps = [torch.zeros((), device=vector.device) for vector in vectors]

    def step(self) -> None:
        """Changes the vectors."""
        for step in self.steps:
            step += 1
        torch._fused_adam_(
            self.values, self.gradients, self.means, self.squares, [], self.steps, lr=self.learning_rate, beta1=0.9,
            beta2=0.999, weight_decay=0.0, eps=self.epsilon, amsgrad=False, maximize=False,
        )  # fmt: skip

    def state_dict(self) -> dict[str, list[Tensor]]:
        """The moments, and how many steps there were."""
        return {"means": self.means, "squares": self.squares, "steps": self.steps}


def descend(loss: Tensor, optimizer: Optimizer, max_grad_norm: float) -> Tensor:
    """Takes a step of `optimizer`, which has one vector (`flatten`), down the gradient of `loss`.

    Returns the gradient's norm, see `clipped_step`.
    """
    optimizer.zero()
    loss.backward()  # type: ignore[no-untyped-call]
    return clipped_step(optimizer, max_grad_norm)


def clipped_step(optimizer: Optimizer, max_grad_norm: float) -> Tensor:
    """Takes a step of `optimizer`, which has one vector (`flatten`), down the gradient that it has.

    Returns the gradient's norm; where it is larger than `max_grad_norm`, the gradient is scaled down to that before.
    """
    (gradient,) = optimizer.gradients
    norm: Tensor = torch.linalg.vector_norm(gradient)
    gradient.mul_((max_grad_norm / norm).clamp_(max=1))
    optimizer.step()
    return norm


class Backpropagation:
    """The gradient of a network whose parameters are one vector (`flatten`), from the slopes of a loss by its outputs.

    For a perceptron the chain rule is written out, which takes a third to a half of autograd's time: layers as small as
    these cost less to compute than to keep the books of. Every other network is left to autograd.

    The forward pass keeps x_0, the inputs, and x_i = f(W_i x_i-1 + b_i); the backward pass goes with g, the slopes by
    W_i x_i-1 + b_i, from the last layer to the first: dL/dW_i = g^T x_i-1, dL/db_i = sum g, and g for the layer before
    is g W_i times f' there (Rumelhart et al., "Learning representations by back-propagating errors", 1986).
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        layers = list(network) if isinstance(network, nn.Sequential) else [network]
        self.linear = [
            (layer.weight.detach(), layer.weight.detach().t(), layer.bias.detach(), layer.weight.grad, layer.bias.grad)
            for layer in layers
            if isinstance(layer, nn.Linear)
        ]
        others = {type(layer) for layer in layers if not isinstance(layer, nn.Linear)}
        self.written_out = others in ({nn.ReLU}, {nn.Tanh})
        self.rectified = others == {nn.ReLU}

    def forward(self, inputs: Tensor) -> Tensor:
        """The outputs, (batch, outputs), of inputs (batch, ...)."""
        if not self.written_out:
            self.outputs: Tensor = self.network(inputs)
            detached: Tensor = self.outputs.detach()
            return detached
        *hidden, (_, last_transposed, last_bias, *_) = self.linear
        self.inputs = [inputs]
        for _, transposed, bias, *_ in hidden:
            inputs = torch.addmm(bias, inputs, transposed)
            self.inputs.append(inputs.relu_() if self.rectified else inputs.tanh_())
        outputs: Tensor = torch.addmm(last_bias, inputs, last_transposed)
        return outputs

    def backward(self, slopes: Tensor) -> None:
        """Sets the parameters' gradients, from dL/d outputs, (batch, outputs), of the last `forward`."""
        if not self.written_out:
            for parameter in self.network.parameters():
                assert parameter.grad is not None
                parameter.grad.zero_()
            self.outputs.backward(slopes)  # type: ignore[no-untyped-call]
            return
        for number in reversed(range(len(self.linear))):
            (weight, _, _, weight_gradient, bias_gradient), inputs = self.linear[number], self.inputs[number]
            torch.mm(slopes.t(), inputs, out=weight_gradient)
            torch.sum(slopes, 0, out=bias_gradient)
            if number:
                slopes = slopes.mm(weight)
                slopes *= inputs.sign() if self.rectified else 1 - inputs.square()


@contextmanager
def no_denormals() -> Iterator[None]:
    """Numbers too small for a float's full precision count as zero: a CPU takes a hundred times as long for each, and
    the moments of units that get no gradient any more fade into them. As a decorator, for an update as a whole."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


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
