"""The loss around trained weights: its values on a square through them, and the square as a mesh.

With two random directions d and e in the space of the weights w, the surface is

    f(a, b) = loss(w + a d + b e),    a, b from -1 to 1

Each filter of d and e has the norm of the filter of w that it moves, so that a step means the same to a layer with
large weights and to one with small ones. Vectors, biases and those of batch norms, stay.

Source: H. Li et al., "Visualizing the Loss Landscape of Neural Nets", 2018, arXiv:1712.09913.
"""

import math
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from rlboard.events import Mesh
from vision._evaluation import evaluating

SIDE = 100
"""Places along each side of a smooth surface, about; TensorBoard's viewer takes no more than 65,536 vertices in all."""
HEIGHT, SPIN, TILT = 0.9, math.radians(20), math.radians(65)
"""Of a mesh with sides of length 2, and how it is turned and shows its top: its eye and light are in front."""
CONTOURS = 8
"""Brighter and darker bands on the way up: a slope is seen by them even where it is of one colour."""

Direction = Mapping[str, Tensor]
"""By how much each parameter moves, by its name."""


@torch.no_grad()
def random_direction(model: nn.Module, generator: torch.Generator) -> Direction:
    """A filter-normalised direction for the filters and matrices that are trained; `generator` is of the CPU."""
    direction = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.ndim > 1:
            noise = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))
            norms, lengths = (each.flatten(1).norm(dim=1) for each in (parameter, noise))
            direction[name] = noise * (norms / lengths).view(-1, *[1] * (parameter.ndim - 1))
    return direction


@torch.no_grad()
def loss_at(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    steps: tuple[float, float],
    directions: tuple[Direction, Direction],
) -> float:
    """The mean cross-entropy of (inputs, labels) in evaluation mode, so far from the weights; they do not change."""
    parameters = dict(model.named_parameters())
    (along, across), (first, second) = steps, directions
    moved = {name: parameters[name] + along * first[name] + across * second[name] for name in first}
    with evaluating(model):
        losses = [
            functional.cross_entropy(torch.func.functional_call(model, moved, inputs), labels, reduction="none")
            for inputs, labels in batches
        ]
    return torch.cat(losses).mean().item()


def smooth_surface(losses: Tensor) -> NDArray[np.float64]:
    """Losses (side, side) at more places: their logarithms are cubic between the points, and none is 0.

    What is not finite is as high as the highest that is.
    """
    highest = max(losses[losses.isfinite()].tolist(), default=1.0) or 1.0
    logarithms = losses.double().nan_to_num(highest, highest, highest).clamp(min=1e-4 * highest).log().numpy()
    cubic = _cubic(len(losses))
    smooth: NDArray[np.float64] = np.exp(cubic @ logarithms @ cubic.T)
    return smooth


def _cubic(points: int) -> NDArray[np.float64]:
    """The matrix that puts places between points, on cubics with the slopes of parabolas through three points each."""
    values, slopes = np.eye(points), np.gradient(np.eye(points), axis=0, edge_order=2)
    parts = max(1, SIDE // (points - 1))
    places = np.arange(parts * (points - 1) + 1) / parts
    left = places.astype(int).clip(max=points - 2)
    t = (places - left)[:, None]
    from_left = (1 + 2 * t) * (1 - t) ** 2 * values[left] + t * (1 - t) ** 2 * slopes[left]
    from_right = t**2 * (3 - 2 * t) * values[left + 1] - t**2 * (1 - t) * slopes[left + 1]
    matrix: NDArray[np.float64] = from_left + from_right
    return matrix


def surface_mesh(losses: NDArray[np.float64]) -> Mesh:
    """Positive losses (side, side) as a landscape in space, its heights and colours by their logarithm."""
    heights = np.log(losses) - np.log(losses.min())
    heights /= max(heights.max(), 1e-6)
    side = len(losses)
    x, z = np.meshgrid(np.linspace(-1, 1, side), np.linspace(-1, 1, side), indexing="ij")
    vertices = np.stack((x, HEIGHT * heights, z), axis=-1).reshape(-1, 3) @ _turned().T
    brightness = 0.9 + 0.1 * np.cos(2 * math.pi * CONTOURS * heights)
    colors = brightness[..., None] * mpl.colormaps["viridis"](heights)[..., :3]
    numbers = np.arange(side * side, dtype=np.int32).reshape(side, side)
    corner, right, down, opposite = numbers[:-1, :-1], numbers[1:, :-1], numbers[:-1, 1:], numbers[1:, 1:]
    # Counter-clockwise as seen from above: the viewer does not draw backs.
    halves = np.stack((corner, down, right), axis=-1), np.stack((right, down, opposite), axis=-1)
    pixels = (255 * colors).round().astype(np.uint8).reshape(-1, 3)
    return Mesh(vertices.astype(np.float32), pixels, np.concatenate(halves).reshape(-1, 3))


def _turned() -> NDArray[np.float64]:
    """The rotation by SPIN around y, upwards, and then by TILT around x, from y towards z, the viewer."""
    spin = [[math.cos(SPIN), 0, math.sin(SPIN)], [0, 1, 0], [-math.sin(SPIN), 0, math.cos(SPIN)]]
    tilt = [[1, 0, 0], [0, math.cos(TILT), -math.sin(TILT)], [0, math.sin(TILT), math.cos(TILT)]]
    turned: NDArray[np.float64] = np.array(tilt) @ np.array(spin)
    return turned
