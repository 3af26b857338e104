"""What the layers of a classifier respond to: their outputs, and for which places of an image a class is given.

Everything here runs in evaluation mode and leaves the model as it was: modes, weights, gradients and hooks.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vision._evaluation import evaluating


def convolutions(model: nn.Module) -> list[str]:
    """The names of the convolutions of `model`, in the order in which it was made of them."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


@torch.no_grad()
def layer_outputs(model: nn.Module, inputs: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
    """What each of the named modules puts out for `inputs`."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        outputs[name] = output.clone()  # the next layer may write into it

    with _watched(model, names, keep):
        model(inputs)
    return outputs


def grad_cam(model: nn.Module, layer: str, inputs: Tensor, targets: Tensor) -> Tensor:
    """Gradient-weighted class activation maps: how much each place of a convolution speaks for a class.

    With the feature maps A^k of the layer, K of height h and width w, and the logit y^c of the class c,

        L^c = ReLU(sum_k alpha_k A^k),    alpha_k = 1 / (h w) sum_ij dy^c / dA^k_ij

    Source: R. R. Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
    Localization", 2017, arXiv:1610.02391.

    Args:
        model: gives logits (N, classes).
        layer: the name of a module of it that puts out (N, K, h, w).
        inputs: (N, C, H, W), normalised.
        targets: (N,), the class c of each image.

    Returns:
        The maps (N, h, w), each divided by its largest value; one that is zero everywhere stays so.
    """
    features = torch.empty(0)

    def take(_: str, output: Tensor) -> Tensor:
        nonlocal features
        features = output.detach().requires_grad_()
        return features.clone()  # the next layer may write into it

    with torch.enable_grad(), _watched(model, [layer], take):
        # The logits of an image depend on its own features alone, so that one sum has the gradients of all images.
        score = model(inputs).gather(1, targets[:, None]).sum()
        (gradients,) = torch.autograd.grad(score, features)
    weights = gradients.mean(dim=(2, 3), keepdim=True)
    maps = (weights * features.detach()).sum(dim=1).relu()
    return maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)


@contextmanager
def _watched(model: nn.Module, names: Iterable[str], see: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Evaluation mode in which `see` gets what each of the named modules puts out, and may return something else."""

    def hook(name: str, _: nn.Module, __: Any, output: Tensor) -> Tensor | None:
        return see(name, output)

    with ExitStack() as stack:
        for name in names:
            stack.enter_context(model.get_submodule(name).register_forward_hook(partial(hook, name)))
        stack.enter_context(evaluating(model))
        yield
