"""Ten shapes: a data set that needs no file and no network.

Each image shows one filled shape of a random size, place, angle and colour on a background that runs from one random
colour to another, under pixel noise. Whether a shape is lighter or darker than its background is chance, so that no
pixel by itself says anything: a linear classifier stays below 25 %, while a small convolutional network learns them.

A shape is a function of the plane, positive inside and negative outside, that falls by about one per unit of length;
clipping it at the width of a pixel draws an anti-aliased edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

SIDE = 32  # pixels


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return 0.9 - torch.hypot(x, y)


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return 0.2 - (torch.hypot(x, y) - 0.75).abs()


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(1 - torch.hypot(x, y), torch.hypot(x - 0.5, y) - 0.75)


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return 0.55 - torch.maximum(y, x.abs() * 0.75**0.5 - y / 2)


def _square(x: Tensor, y: Tensor) -> Tensor:
    return 0.75 - torch.maximum(x.abs(), y.abs())


def _cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    return torch.minimum(1 - torch.maximum(x, y), 0.28 - torch.minimum(x, y))


def _star(x: Tensor, y: Tensor) -> Tensor:
    half = math.pi / 5
    angle = (torch.atan2(y, x) % (2 * half) - half).abs()  # 0 in a notch between two tips, `half` at a tip
    notch = 0.42  # its distance from the centre, where a tip's is 1
    normal_x, normal_y = math.sin(half), notch - math.cos(half)  # of the edge from the notch to the tip
    length = math.hypot(normal_x, normal_y)
    along = normal_x * angle.cos() + normal_y * angle.sin()
    return (normal_x * notch - torch.hypot(x, y) * along) / length


def _heart(x: Tensor, y: Tensor) -> Tensor:
    x = x.abs()
    lobe = 0.5 - torch.hypot(x - 0.42, y + 0.3)
    point = 0.66 - torch.maximum(x + (y + 0.02).abs() * 0.85, -y - 0.3)
    return torch.maximum(lobe, point)


def _bars(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(0.9 - y.abs(), 0.22 - (x.abs() - 0.55).abs())


def _hourglass(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(0.9 - y.abs(), 0.8 * y.abs() + 0.05 - x.abs())


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    function.__name__[1:]: function
    for function in (_circle, _ring, _crescent, _triangle, _square, _cross, _star, _heart, _bars, _hourglass)
}


def draw_shapes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` images, (count, 3, 32, 32) uint8, and their labels, (count,): of each class as many as of any other.

    Equal seeds draw equal images; the label is the position of the name in `SHAPES`.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(count) % len(SHAPES))[torch.randperm(count, generator=generator)]
    images = torch.empty(count, 3, SIDE, SIDE, dtype=torch.uint8)
    for start in range(0, count, 500):  # blocks that stay in the processor's cache
        images[start : start + 500] = _draw(labels[start : start + 500], generator)
    return images, labels


def _draw(labels: Tensor, generator: torch.Generator) -> Tensor:
    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(labels), *shape, generator=generator)

    radius, angle = uniform(7, 13, 1, 1), uniform(-0.6, 0.6, 1, 1)
    axis = torch.arange(SIDE) - (SIDE - 1) / 2
    x = (axis - uniform(-5, 5, 1, 1)) / radius
    y = (axis[:, None] - uniform(-5, 5, 1, 1)) / radius
    x, y = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    inside = torch.empty_like(x)
    for label, shape in enumerate(SHAPES.values()):
        chosen = labels == label
        inside[chosen] = shape(x[chosen], y[chosen])
    coverage = (inside * radius + 0.5).clamp(0, 1)[:, None]

    direction = uniform(0, 2 * math.pi, 1, 1)
    ramp = 0.5 + (axis * direction.cos() + axis[:, None] * direction.sin()) / (2 * SIDE)
    near, far = uniform(40, 215, 3, 1, 1), uniform(40, 215, 3, 1, 1)
    background = near.lerp(far, ramp[:, None])
    sign = uniform(-1, 1, 1, 1, 1).sign()
    shade = (near + far) / 2 + sign * uniform(60, 110, 3, 1, 1)
    noise = 12 * torch.randn(background.shape, generator=generator)
    return (background.lerp(shade, coverage) + noise).clamp(0, 255).to(torch.uint8)
