"""What a generator draws: images of fixed noise, so that one sees the same ones improve, and ways between them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vision._gan import NOISE
from vision._pictures import image_grid

COLUMNS = 8
MOST_ROWS = 16
"""Classes, at most, of which a conditional generator's samples are shown."""
BATCH = 500


class Wish(NamedTuple):
    """What a generator is asked for: noise (N, 100), and for a conditional one labels (N,)."""

    noise: Tensor
    labels: Tensor | None


@torch.no_grad()
def sample(generator: nn.Module, wish: Wish) -> Tensor:
    """The images that `generator` makes of `wish`, (N, C, H, W) uint8."""
    images = []
    for start in range(0, len(wish.noise), BATCH):
        noise, labels = (None if each is None else each[start : start + BATCH] for each in wish)
        images.append(generator(noise, labels).float())
    return torch.cat(images).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def draw(generator: nn.Module, wish: Wish) -> NDArray[np.uint8]:
    """The same images in rows of eight."""
    return image_grid(sample(generator, wish), COLUMNS)


def grid(classes: int, chance: torch.Generator) -> Wish:
    """64 images; of a conditional generator, by the number of its `classes`, eight of each class, a row for a class.

    A column of classes has the same noise: what differs is what the generator has learned of the class.
    """
    noise = torch.randn(COLUMNS**2, NOISE, generator=chance, device=chance.device)
    if not classes:
        return Wish(noise, None)
    rows = torch.arange(min(classes, MOST_ROWS), device=chance.device)
    return Wish(noise[:COLUMNS].repeat(len(rows), 1), rows.repeat_interleave(COLUMNS))


def interpolation(classes: int, chance: torch.Generator) -> Wish:
    """Four ways of eight steps, from one noise to the next and back to the first: a row for each, of one class.

    They lie on great circles: half way on a straight line, noise would be shorter than any the generator has seen.
    """
    ends = torch.randn(4, NOISE, generator=chance, device=chance.device)
    share = torch.linspace(0, 1, COLUMNS + 1, device=chance.device)[:-1, None]
    steps = []
    for start, end in zip(ends, ends.roll(-1, dims=0), strict=True):
        angle = torch.acos(torch.cosine_similarity(start, end, dim=0))
        steps.append((torch.sin((1 - share) * angle) * start + torch.sin(share * angle) * end) / torch.sin(angle))
    labels = torch.zeros(len(ends) * COLUMNS, dtype=torch.long, device=chance.device) if classes else None
    return Wish(torch.cat(steps), labels)


def likeness(labels: Tensor | None, count: int, chance: torch.Generator) -> Wish:
    """`count` images whose classes, where `labels` of real images are given, are as frequent as those."""
    noise = torch.randn(count, NOISE, generator=chance, device=chance.device)
    if labels is None:
        return Wish(noise, None)
    return Wish(noise, labels[torch.randint(len(labels), (count,), generator=chance, device=chance.device)])
