"""How the weights move: optimizers, learning-rate schedules and averaged weights; and losses by which they cannot."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rlboard.errors import NumericalError

OPTIMIZERS = ("sgd", "adamw", "muon")
SCHEDULES = ("cosine", "onecycle", "linear")


def make_optimizer(
    model: nn.Module,
    name: str,
    learning_rate: float,
    *,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    other_learning_rate: float = 0.05,
    normalize_filters: bool = False,
) -> torch.optim.Optimizer:
    """An optimizer of the trainable parameters of `model`; vectors, which are biases and norms, never decay.

    Args:
        model: its output layer is `model.head`.
        name: one of `OPTIMIZERS`.
        learning_rate: muon: of all matrices and convolution filters but the output layer's.
        weight_decay: decoupled and times the learning rate for adamw and muon, part of the gradient for sgd.
        momentum: of sgd and muon, both Nesterov's; adamw's first beta.
        other_learning_rate: muon only: of the output layer and the vectors, which move by SGD.
        normalize_filters: muon only: keep filters before batch norm, which have no bias, at one length, see `Muon`.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    vectors: dict[str, Any] = {
        "params": [parameter for parameter in parameters if parameter.ndim < 2],
        "weight_decay": 0.0,
    }
    matrices: dict[str, Any] = {"params": [parameter for parameter in parameters if parameter.ndim >= 2]}
    if name == "sgd":
        return torch.optim.SGD(
            [matrices, vectors], learning_rate, momentum, weight_decay=weight_decay, nesterov=momentum > 0
        )
    if name == "adamw":
        return torch.optim.AdamW([matrices, vectors], learning_rate, (momentum, 0.999), weight_decay=weight_decay)
    if name == "muon":
        head = set(model.get_submodule("head").parameters())
        normed = {module.weight for module in model.modules() if isinstance(module, nn.Conv2d) and module.bias is None}
        hidden = [parameter for parameter in matrices["params"] if parameter not in head]
        filters = {"params": [each for each in hidden if each in normed], "normalized": normalize_filters}
        rest = {"params": [each for each in hidden if each not in normed]}
        outputs = {"params": [parameter for parameter in matrices["params"] if parameter in head]}
        others = {"lr": other_learning_rate, "orthogonal": False}
        return Muon([filters, rest, outputs | others, vectors | others], learning_rate, momentum, weight_decay)
    raise ValueError(f"{name} is none of {', '.join(OPTIMIZERS)}")


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum, whose updates of matrices and convolution filters are made orthogonal.

    With gradient g, momentum mu, learning rate lr and weight decay d:

        buffer <- mu buffer + g
        update  = g + mu buffer,  in groups with orthogonal=True  orthogonalize(update) sqrt(max(1, rows / columns))
        weight <- (1 - lr d) weight - lr update
        weight <- sqrt(rows) weight / |weight|  in groups with normalized=True

    Batch norm undoes the length of the filters before it, but the longer they grow, the less a step turns them. At
    sqrt(rows), the length of an orthogonal update too, lr is the angle of a step, in radians, however many came before.

    Sources: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
    kellerjordan.github.io/posts/muon; the lengths, and three steps of Newton and Schulz in place of five, are from
    airbench94_muon.py in its author's cifar10-airbench. On matrices it is `torch.optim.Muon`, which takes nothing else.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float, weight_decay: float) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        defaults |= {"orthogonal": True, "normalized": False}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            gradients = [weight.grad for weight in weights]
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            buffers = [self.state[weight]["momentum_buffer"] for weight in weights]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, gradients)
            updates = list(torch._foreach_add(gradients, buffers, alpha=group["momentum"]))
            if group["orthogonal"]:
                updates = [_orthogonal(update) for update in updates]
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, updates, alpha=-group["lr"])
            if group["normalized"]:
                for weight, length in zip(weights, torch._foreach_norm(weights), strict=True):
                    weight.mul_(math.sqrt(len(weight)) / length)
        return loss


def _orthogonal(update: Tensor) -> Tensor:
    channels_last = update.movedim(1, -1)  # as filters lie in memory: for what is orthogonal, columns have no order
    matrix = channels_last.flatten(1)
    rows, columns = matrix.shape
    return (orthogonalize(matrix) * math.sqrt(max(1, rows / columns))).view_as(channels_last).movedim(-1, 1)


def orthogonalize(matrix: Tensor, steps: int = 3) -> Tensor:
    """About U V^T of the singular value decomposition U S V^T of a matrix (R, C): singular values of 0.7 to 1.2.

    Each of the Newton-Schulz steps X <- a X + b (X X^T) X + c (X X^T)^2 X = P X moves the singular values towards 1,
    the small ones fastest: by a factor of 3.4. Three steps leave some below 0.7, which training does not mind.
    The matrices P are polynomials of X X^T and commute with it, so it is followed by itself and the wide X is
    multiplied once, by the product of all P: less than half the work for a filter bank.
    """
    x: Tensor = matrix.float()
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    x = x / (x.norm() + 1e-7)
    gram = x @ x.T
    p = product = _polynomial(gram)
    for _ in range(steps - 1):
        gram = p @ gram @ p
        p = _polynomial(gram)
        product = p @ product
    x = product @ x
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)


def _polynomial(gram: Tensor) -> Tensor:
    """P = a I + b G + c G^2 of a symmetric matrix G."""
    a, b, c = 3.4445, -4.7750, 2.0315
    p = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    p.diagonal().add_(a)
    return p


def schedule(name: str, progress: float, warmup: float = 0.0) -> float:
    """The factor of the learning rate after the share `progress` of a run, both in [0, 1].

    It rises during the first `warmup` of the run, to 1, and then falls to 0: `linear` and `cosine` rise in a line and
    fall in a line or half a cosine; `onecycle` begins at 1/25 and rises and falls in half a cosine (L. Smith, N. Topin,
    "Super-Convergence", 2018, as `torch.optim.lr_scheduler.OneCycleLR` does it).
    """
    if name not in SCHEDULES:
        raise ValueError(f"{name} is none of {', '.join(SCHEDULES)}")
    if progress < warmup:
        rise = progress / warmup
        return 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * rise)) / 2 if name == "onecycle" else rise
    fall = (progress - warmup) / (1 - warmup) if warmup < 1 else 0.0
    return 1 - fall if name == "linear" else (1 + math.cos(math.pi * fall)) / 2


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of `model` that follows it: `update_parameters(model)` moves it by 1 - decay, batch norm's buffers too."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)  # type: ignore[no-untyped-call]


def finite(loss: Tensor, step: int) -> float:
    """The number in a loss. Raises NumericalError if it is NaN or infinite."""
    value = loss.item()
    if not math.isfinite(value):
        raise NumericalError(f"the loss is {value} at step {step}: try a smaller --learning-rate")
    return value
