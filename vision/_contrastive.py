"""Features without labels: two random views of every image, and the loss that brings the two together.

Everything is tensor code on the device, a whole batch at a time, with crops, colours and mirror images of its own for
each image.

Source: T. Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", 2020,
arXiv:2002.05709.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

RED_GREEN_BLUE_TO_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))
"""Rows: lightness, which the eye sees first, and two axes of colour, in whose plane hue is an angle."""
JITTERED, GREY = 0.8, 0.2
"""Shares of the views whose colours change, and that lose them (the paper's appendix A)."""


def nt_xent(projections: Tensor, temperature: float) -> Tensor:
    """The normalised, temperature-scaled cross-entropy: how well each view finds its other half among all views.

        loss = mean over i of  -log( exp(s_ij / t) / sum over k != i of exp(s_ik / t) ),    s_ik = cosine(z_i, z_k)

    where j is the other view of the image of i: a classification among 2N - 1 candidates, for N images, so that the
    loss of features that tell nothing is log(2N - 1).

    Args:
        projections: z, (2N, D): first one view of every image, then the other view of each, in the same order.
        temperature: t, small to weigh the most similar of the wrong candidates most.
    """
    directions = functional.normalize(projections, dim=1)
    itself = torch.eye(len(directions), dtype=torch.bool, device=directions.device)
    similarities = (directions @ directions.T / temperature).masked_fill(itself, -torch.inf)
    partners = torch.arange(len(directions), device=directions.device).roll(len(directions) // 2)
    return functional.cross_entropy(similarities, partners)


def projection_head(features: int, width: int = 64) -> nn.Sequential:
    """From features (N, F) to what the loss sees of them, (N, width).

    It can forget what two views of an image do not share, such as colour, so that the features need not.
    """
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, width))


class Views:
    """Random views of images: cropped and scaled back, mirrored, and recoloured, each image by chances of its own.

    Every change of colour is linear, so that one matrix for each image does them all:

        pixel <- brightness (contrast C pixel + (1 - contrast) mean)

    where C turns the hue and scales the saturation, to nothing where the view is in shades of grey.
    """

    def __init__(self, generator: torch.Generator, *, flip: bool, crop: float, color: float) -> None:
        """
        Args:
            generator: on the device of the images.
            flip: whether views may be mirrored; not for digits.
            crop: share of the image's area that a view shows at least, in (0, 1].
            color: by how much colours change, from 0 to 1; the paper's strength s, 0.5 for CIFAR-10, 1 for ImageNet.
        """
        self._generator, self._flip, self._crop = generator, flip, crop
        self._jitter, self._hue = 0.8 * color, 0.2 * color  # shares of themselves; turns
        to_yiq = torch.tensor(RED_GREEN_BLUE_TO_YIQ)
        self._to_yiq, self._from_yiq = to_yiq.to(generator.device), to_yiq.inverse().to(generator.device)

    def __call__(self, images: Tensor) -> Tensor:
        """A view of each of `images`, (N, C, H, W) from 0 to 1; so is what is returned."""
        return self._recoloured(self._cropped(images)).clamp(0, 1)

    def _uniform(self, low: float, high: float, like: Tensor) -> Tensor:
        drawn = torch.rand(len(like), generator=self._generator, device=like.device)
        return low + (high - low) * drawn

    def _cropped(self, images: Tensor) -> Tensor:
        area = self._uniform(self._crop, 1, images)
        aspect = self._uniform(math.log(3 / 4), math.log(4 / 3), images).exp()
        width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
        right = (1 - width) * self._uniform(-1, 1, images)
        down = (1 - height) * self._uniform(-1, 1, images)
        if self._flip:
            width = torch.where(self._uniform(0, 1, images) < 0.5, -width, width)
        nothing = torch.zeros_like(width)
        windows = torch.stack((width, nothing, right, nothing, height, down), dim=1).view(-1, 2, 3)
        grid = functional.affine_grid(windows, list(images.shape), align_corners=False)
        return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)

    def _recoloured(self, images: Tensor) -> Tensor:
        changed = (self._uniform(0, 1, images) < JITTERED).float()
        brightness, contrast, saturation = (
            1 + changed * self._uniform(-self._jitter, self._jitter, images) for _ in range(3)
        )
        angle = 2 * math.pi * changed * self._uniform(-self._hue, self._hue, images)
        saturation = saturation * (self._uniform(0, 1, images) >= GREY)
        pixels = images.flatten(2)
        if images.shape[1] == 3:
            pixels = self._colours(saturation, angle) @ pixels
        means = pixels.mean(dim=(1, 2), keepdim=True)
        pixels = means.lerp(pixels, contrast[:, None, None]) * brightness[:, None, None]
        return pixels.view(images.shape)

    def _colours(self, saturation: Tensor, angle: Tensor) -> Tensor:
        """Matrices (N, 3, 3) that turn and scale colours around the greys."""
        turned = torch.zeros(len(angle), 3, 3, device=angle.device)
        turned[:, 0, 0] = 1
        turned[:, 1, 1] = turned[:, 2, 2] = saturation * angle.cos()
        turned[:, 2, 1] = saturation * angle.sin()
        turned[:, 1, 2] = -turned[:, 2, 1]
        return self._from_yiq @ turned @ self._to_yiq
