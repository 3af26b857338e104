"""How small networks learn fast: all parameters in one vector, and what changes it without torch's bookkeeping."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


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
