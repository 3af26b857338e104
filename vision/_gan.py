"""The two networks of the GAN: a generator and a discriminator of DCGAN's size, for any image size and channels.

Neither normalises anything: batch norm couples the images of a batch, on which a penalty of each image's own gradient
is not defined, and with that penalty it is not needed (R3GAN). The generator doubles the side by bilinear
interpolation and a 3x3 convolution instead of a transposed convolution, whose overlapping strides draw checkerboards
(Odena et al., "Deconvolution and Checkerboard Artifacts", Distill, 2016).

With labels, a class is an embedding beside the noise, and the discriminator's score has a term of the class:

    D(x, y) = w . phi(x) + b + e_y . phi(x)

Sources: A. Radford et al., "Unsupervised Representation Learning with Deep Convolutional Generative Adversarial
Networks", 2016, arXiv:1511.06434 (the sizes); N. Huang et al., "The GAN is dead; long live the GAN! A Modern Baseline
GAN", 2024, arXiv:2501.05441 (no normalisation); T. Karras et al., "Analyzing and Improving the Image Quality of
StyleGAN", 2020, arXiv:1912.04958 (images painted at every size); T. Miyato, M. Koyama, "cGANs with Projection
Discriminator", 2018, arXiv:1802.05637 (the classes).
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from rlboard.errors import UsageError

NOISE = 100
LABEL = 32
"""Dimensions of the generator's two inputs, the second only where it is conditional."""
SLOPE = 0.2  # of the leaky ReLUs below zero, DCGAN's


class GAN(nn.Module):
    """`discriminator(generator(noise))`: both networks in one module, for one graph and one checkpoint."""

    def __init__(self, channels: int, image_size: int, width: int, classes: int = 0) -> None:
        """
        Args:
            channels: of the images.
            image_size: height and width of the images: a multiple of 4, 16 or more.
            width: channels of the generator's last and the discriminator's first stage.
            classes: of a conditional GAN; 0 for one that knows nothing of labels.

        Raises:
            UsageError: the image size is none of these.
        """
        super().__init__()
        self.classes = classes
        self.generator = Generator(channels, image_size, width, classes)
        self.discriminator = Discriminator(channels, image_size, width, classes)

    def forward(self, noise: Tensor) -> Tensor:
        """The scores (N,) of what is generated from `noise`, (N, 100); of the classes in turn where there are some."""
        labels = torch.arange(len(noise), device=noise.device) % self.classes if self.classes else None
        return cast("Tensor", self.discriminator(self.generator(noise, labels), labels))


class Generator(nn.Module):
    """Images in [-1, 1] of noise and labels. With width w and images 3 x 32 x 32:

    stage    shape after it    layers
    seed     4w x 4 x 4        linear, leaky ReLU
    up       2w x 8 x 8        bilinear upsampling, 3x3 convolution, leaky ReLU
             w x 16 x 16       the same
             w x 32 x 32       the same
    paint    3 x 32 x 32       1x1 convolutions of what comes after each of the four, enlarged and added up; tanh

    Painting at every size lets the coarse colours be learned at once and the details later, as in StyleGAN2.
    """

    def __init__(self, channels: int, image_size: int, width: int, classes: int = 0) -> None:
        super().__init__()
        side, doublings = _pyramid(image_size)
        widths = [width * min(8, 2 ** max(0, doublings - 1 - level)) for level in range(doublings + 1)]
        self.embedding = nn.Embedding(classes, LABEL) if classes else None
        self.seed = nn.Sequential(
            nn.Linear(NOISE + (LABEL if classes else 0), widths[0] * side**2),
            nn.Unflatten(1, (widths[0], side, side)),
            nn.LeakyReLU(SLOPE),
        )
        self.up = nn.ModuleList(
            nn.Sequential(
                nn.Upsample(scale_factor=2, mode="bilinear"),
                nn.Conv2d(before, after, 3, padding=1),
                nn.LeakyReLU(SLOPE),
            )
            for before, after in pairwise(widths)
        )
        self.paint = nn.ModuleList(nn.Conv2d(each, channels, 1) for each in widths)
        _initialise(self)
        with torch.no_grad():
            for layer in self.paint:
                cast("nn.Conv2d", layer).weight.mul_(len(widths) ** -0.5)  # their sum is of size 1

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images (N, C, H, W) of `noise` (N, 100) and, in a conditional GAN, `labels` (N,)."""
        if self.embedding is not None:
            noise = torch.cat((noise, self.embedding(labels)), dim=1)
        features = self.seed(noise)
        first, *others = self.paint
        images = first(features)
        for grow, paint in zip(self.up, others, strict=True):
            features = grow(features)
            images = interpolate(images, scale_factor=2, mode="bilinear") + paint(features)
        return cast("Tensor", images).tanh()


class Discriminator(nn.Module):
    """How real images seem. With width w and images 3 x 32 x 32:

    stage    shape after it    layers
    down     w x 16 x 16       4x4 convolution with stride 2, leaky ReLU
             2w x 8 x 8        the same
             4w x 4 x 4        the same
    score    1                 linear; and the inner product of a class's embedding with the same features
    """

    def __init__(self, channels: int, image_size: int, width: int, classes: int = 0) -> None:
        super().__init__()
        side, halvings = _pyramid(image_size)
        widths = [channels, *(width * min(8, 2**level) for level in range(halvings))]
        self.down = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(before, after, 4, stride=2, padding=1), nn.LeakyReLU(SLOPE))
                for before, after in pairwise(widths)
            )
        )
        features = widths[-1] * side**2
        self.score = nn.Linear(features, 1)
        self.embedding = nn.Embedding(classes, features) if classes else None
        _initialise(self)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Scores (N,), larger for what seems real, of images (N, C, H, W) and, in a conditional GAN, labels (N,).

        They have the weights' precision, autocast or not: all scores may drift together, and only differences count.
        """
        features = self.down(images).flatten(1)
        with torch.autocast(images.device.type, enabled=False):
            features = features.to(self.score.weight.dtype)
            scores: Tensor = self.score(features).squeeze(1)
            if self.embedding is not None:
                scores = scores + (self.embedding(labels) * features).sum(dim=1)
        return scores


def _pyramid(image_size: int) -> tuple[int, int]:
    """The smallest side, 4 or more, from which doubling leads to `image_size`, and how often: 28 is 7 doubled twice."""
    if image_size < 16 or image_size % 4:
        raise UsageError(f"--data: images of {image_size} pixels: a GAN takes a multiple of 4, 16 or more")
    side, doublings = image_size, 0
    while side % 2 == 0 and side >= 8:
        side, doublings = side // 2, doublings + 1
    return side, doublings


def _initialise(network: nn.Module) -> None:
    """Weights that keep the size of what passes through them (He et al., 2015), no biases, small embeddings."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, a=SLOPE)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
