"""DiffAugment: random changes of images that gradients pass through, so that real and generated ones get the same.

A discriminator that sees the same few images again and again learns them by heart; one that sees them under random
colours, places and holes cannot. Because the generated images are changed likewise, and the change is differentiable,
the generator learns the images and not their changes.

Source: S. Zhao et al., "Differentiable Augmentation for Data-Efficient GAN Training", 2020, arXiv:2006.10738.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def diffaugment(images: Tensor, policy: str, generator: torch.Generator) -> Tensor:
    """`images` (N, C, H, W) in [-1, 1], each changed in its own way; the same shape, sometimes beyond that range.

    Args:
        images: what is changed.
        policy: the names of `CHANGES` between commas, in their order; `none` changes nothing.
        generator: on the device of `images`.
    """
    for name in policy.split(","):
        if name != "none":
            images = CHANGES[name](images, generator)
    return images


def color(images: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness up or down by a quarter of the range, saturation from 0 to 2 times, contrast from a half to 1.5."""
    brightness, saturation, contrast = (_uniform(images, generator) for _ in range(3))
    images = images + (brightness - 0.5)
    gray = images.mean(dim=1, keepdim=True)
    images = gray + (images - gray) * (2 * saturation)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (images - mean) * (contrast + 0.5)


def translation(images: Tensor, generator: torch.Generator) -> Tensor:
    """Moved by up to an eighth of the side, down and right or up and left; what comes in is 0."""
    count, _, height, width = images.shape
    by = max(1, round(height / 8)), max(1, round(width / 8))
    rows, columns = (
        torch.randint(2 * most + 1, (count, 1), generator=generator, device=images.device)
        + torch.arange(side, device=images.device)
        for most, side in zip(by, (height, width), strict=True)
    )
    padded = pad(images, (by[1], by[1], by[0], by[0])).permute(0, 2, 3, 1)
    each = torch.arange(count, device=images.device)[:, None, None]
    return padded[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cutout(images: Tensor, generator: torch.Generator) -> Tensor:
    """A square of half the side, around any pixel, is 0."""

    def inside(length: int) -> Tensor:
        centre = torch.randint(length, (len(images), 1), generator=generator, device=images.device)
        offset = torch.arange(length, device=images.device) - centre + length // 4
        return (offset >= 0) & (offset < length // 2)

    height, width = images.shape[2:]
    hole = inside(height)[:, None, :, None] & inside(width)[:, None, None, :]
    return images.masked_fill(hole, 0)


def _uniform(images: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device, dtype=images.dtype)


CHANGES = {"color": color, "translation": translation, "cutout": cutout}
