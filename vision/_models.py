"""The classifiers, each a few lines: `build_model` makes one, for any image size, channels and number of classes.

Every model is `head(features(inputs))`: `features` maps images (N, C, H, W) to vectors (N, F), which is what an
embedding shows and what a class activation map asks about, and `head` maps those to logits (N, classes).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlboard.config import printable
from rlboard.errors import UsageError

WIDTHS = {"speednet": 64, "laptopnet": 32, "resnet9": 64, "resnet18": 64, "simplecnn": 32, "vit": 192}
MODELS = tuple(WIDTHS)
SCALED = ("laptopnet", "speednet")
"""Those that divide their logits by their number of features: their last layer wants larger steps."""


def build_model(name: str, *, classes: int, channels: int = 3, image_size: int = 32, width: int = 0) -> Classifier:
    """The model called `name` (one of `MODELS`), its weights drawn from torch's global generator.

    Args:
        name: which model.
        classes: logits to put out.
        channels: of the images.
        image_size: height and width of the images, 16 or more; only simplecnn's weights depend on it.
        width: channels of its first stage, to which all others are in proportion; 0 is the model's own. vit: the size
            of its tokens, a multiple of 64.

    Raises:
        UsageError: there is no such model, or not in this width or for images so small.
    """
    if name not in MODELS:
        raise UsageError(f"--model {printable(name)} is not one of {', '.join(MODELS)}")
    if image_size < 16:
        raise UsageError(f"images of {image_size} pixels are too small: every model needs 16 or more")
    width = width or WIDTHS[name]
    if name == "vit" and width % 64:
        raise UsageError(f"--width {width}: vit's is a multiple of 64, such as 192")
    match name:
        case "speednet":
            return SpeedNet(channels, classes, width)
        case "laptopnet":
            return LaptopNet(channels, classes, width)
        case "resnet9":
            return ResNet9(channels, classes, width)
        case "resnet18":
            return ResNet18(channels, classes, width)
        case "simplecnn":
            return SimpleCNN(channels, classes, width, image_size)
        case _:
            return VisionTransformer(channels, classes, width)


class Classifier(nn.Module):
    """`head(features(inputs))`, with the stages of `features` by name."""

    def __init__(self, stages: dict[str, nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.features = nn.Sequential(OrderedDict(stages))
        self.head = head

    def forward(self, inputs: Tensor) -> Tensor:
        return cast("Tensor", self.head(self.features(inputs)))


class ScaledLinear(nn.Linear):
    """A linear layer without bias whose output is multiplied by `scale`, which calms the first steps."""

    def __init__(self, inputs: int, outputs: int, scale: float) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name for it
        return super().forward(input) * self.scale


class Residual(nn.Module):
    """inputs + block(inputs)."""

    def __init__(self, *block: nn.Module) -> None:
        super().__init__()
        self.block = nn.Sequential(*block)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + cast("Tensor", self.block(inputs))


class SpeedNet(Classifier):
    """The net of the airbench speed records: few layers, each made to learn from the first step on.

    The first layer whitens 2x2 patches: `whiten` sets its filters from training images, and they are never trained.
    Convolutions begin as the identity on as many channels as they can, batch norms have no trained scale, and the
    logits are divided by the number of features. With width w and images 3 x 32 x 32:

        stage            shape after it    parameters
        whiten           24 x 31 x 31      24 trained biases
        group1           w x 15 x 15       two 3x3 convolutions, max-pool after the first
        group2           4w x 7 x 7        the same
        group3           4w x 3 x 3        the same
        pool             4w                maximum over all places
        head             classes           4w x classes

    Source: K. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024, arXiv:2404.00498, and its repository
    cifar10-airbench, which descends from tysam-code/hlb-CIFAR10.
    """

    def __init__(self, channels: int, classes: int, width: int) -> None:
        whitened = 2 * channels * 2 * 2
        super().__init__(
            {
                "whiten": nn.Conv2d(channels, whitened, 2),
                "activation": nn.GELU(),
                "group1": _convolution_group(whitened, width),
                "group2": _convolution_group(width, 4 * width),
                "group3": _convolution_group(4 * width, 4 * width),
                "pool": nn.AdaptiveMaxPool2d(1),
                "flatten": nn.Flatten(),
            },
            ScaledLinear(4 * width, classes, 1 / (4 * width)),
        )
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.requires_grad_(False)
        _begin_as_identity(self)


def _convolution_group(inputs: int, outputs: int) -> nn.Sequential:
    def normalization() -> nn.BatchNorm2d:
        return nn.BatchNorm2d(outputs, eps=1e-12, momentum=0.4)  # a run is too short for the usual 0.1

    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.MaxPool2d(2),
        normalization(),
        nn.GELU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        normalization(),
        nn.GELU(),
    )


class LaptopNet(Classifier):
    """SpeedNet's ideas for a CPU: from the first layer on there are only a quarter as many places as pixels.

    The first layer whitens 3x3 patches with stride 2 and keeps the directions of largest variance; nothing in it is
    trained, so that no gradient is taken at full size. SiLU takes a CPU half as long as GELU. With width w and images
    3 x 32 x 32:

        stage            shape after it    layers
        whiten           32 x 16 x 16      3x3 convolution with stride 2, ReLU
        group1           w x 16 x 16       3x3 convolution, batch norm, SiLU, and a residual of the same
        group2           2w x 8 x 8        max-pool, the same, and a residual of the same
        group3           4w x 4 x 4        max-pool, the same, and a residual of the same
        pool             4w                maximum over all places
        head             classes           4w x classes
    """

    def __init__(self, channels: int, classes: int, width: int) -> None:
        w, kept = width, min(16, 9 * channels)
        super().__init__(
            {
                "whiten": nn.Conv2d(channels, 2 * kept, 3, stride=2, padding=1, bias=False),
                "activation": nn.ReLU(inplace=True),
                "group1": nn.Sequential(_normalized(2 * kept, w), Residual(_normalized(w, w))),
                "group2": nn.Sequential(nn.MaxPool2d(2), _normalized(w, 2 * w), Residual(_normalized(2 * w, 2 * w))),
                "group3": nn.Sequential(
                    nn.MaxPool2d(2), _normalized(2 * w, 4 * w), Residual(_normalized(4 * w, 4 * w))
                ),
                "pool": nn.AdaptiveMaxPool2d(1),
                "flatten": nn.Flatten(),
            },
            ScaledLinear(4 * w, classes, 1 / (4 * w)),
        )
        _begin_as_identity(self)


def _normalized(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs, momentum=0.4),
        nn.SiLU(),
    )


def _begin_as_identity(model: SpeedNet | LaptopNet) -> None:
    """Convolutions pass on what comes in, the head's logits are of size 1, and the whitening filters stay."""
    cast("nn.Conv2d", model.features.whiten).weight.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.requires_grad:
            nn.init.dirac_(module.weight.data[: module.in_channels])
    nn.init.normal_(cast("ScaledLinear", model.head).weight)


@torch.no_grad()
def whiten(model: nn.Module, images: Tensor, epsilon: float = 5e-4) -> None:
    """Sets the first layer of a SpeedNet or LaptopNet from a few thousand normalised training images (N, C, H, W).

    The filters are the eigenvectors v_i of the covariance of patches, those of the largest eigenvalues l_i, over
    sqrt(l_i + epsilon), and their negatives, so that after the activation both signs survive: the outputs have unit
    covariance. Other models stay as they are.
    """
    if not isinstance(model, SpeedNet | LaptopNet):
        return
    layer = cast("nn.Conv2d", model.features.whiten)
    patches = functional.unfold(images.float(), layer.kernel_size).transpose(1, 2).flatten(0, 1)
    eigenvalues, eigenvectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (eigenvectors / (eigenvalues + epsilon).sqrt()).T[-(layer.out_channels // 2) :]
    layer.weight.copy_(torch.cat((filters, -filters)).view_as(layer.weight))


class ResNet9(Classifier):
    """The small residual net of the DAWNBench records. With width w and images 3 x 32 x 32:

        stage     shape after it    layers
        stem      w x 32 x 32       3x3 convolution, batch norm, ReLU
        layer1    2w x 16 x 16      the same and max-pool, then a residual of two of the same
        layer2    4w x 8 x 8        the same and max-pool
        layer3    8w x 4 x 4        the same and max-pool, then a residual of two of the same
        pool      8w                maximum over all places
        head      classes           8w x classes, times 1/8

    Source: D. Page, "How to Train Your ResNet", 2018, and its repository davidcpage/cifar10-fast.
    """

    def __init__(self, channels: int, classes: int, width: int) -> None:
        w = width
        super().__init__(
            {
                "stem": _unit(channels, w),
                "layer1": nn.Sequential(_unit(w, 2 * w, pool=True), Residual(_unit(2 * w, 2 * w), _unit(2 * w, 2 * w))),
                "layer2": _unit(2 * w, 4 * w, pool=True),
                "layer3": nn.Sequential(
                    _unit(4 * w, 8 * w, pool=True), Residual(_unit(8 * w, 8 * w), _unit(8 * w, 8 * w))
                ),
                "pool": nn.AdaptiveMaxPool2d(1),
                "flatten": nn.Flatten(),
            },
            ScaledLinear(8 * w, classes, 1 / 8),
        )


def _unit(inputs: int, outputs: int, *, pool: bool = False) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.MaxPool2d(2)) if pool else nn.Sequential(*layers)


class ResNet18(Classifier):
    """ResNet-18 with the stem that small images need: 3x3, no max-pool. With width w and images 3 x 32 x 32:

        stage     shape after it    layers
        stem      w x 32 x 32       3x3 convolution, batch norm, ReLU
        layer1    w x 32 x 32       two basic blocks
        layer2    2w x 16 x 16      two basic blocks, the first with stride 2
        layer3    4w x 8 x 8        the same
        layer4    8w x 4 x 4        the same
        pool      8w                mean over all places
        head      classes           8w x classes and bias

    Source: K. He et al., "Deep Residual Learning for Image Recognition", 2015, arXiv:1512.03385. Its weights lie in
    the order of torchvision's `resnet18`.
    """

    def __init__(self, channels: int, classes: int, width: int) -> None:
        w = width
        super().__init__(
            {
                "stem": nn.Sequential(
                    nn.Conv2d(channels, w, 3, padding=1, bias=False), nn.BatchNorm2d(w), nn.ReLU(inplace=True)
                ),
                "layer1": nn.Sequential(BasicBlock(w, w), BasicBlock(w, w)),
                "layer2": nn.Sequential(BasicBlock(w, 2 * w, stride=2), BasicBlock(2 * w, 2 * w)),
                "layer3": nn.Sequential(BasicBlock(2 * w, 4 * w, stride=2), BasicBlock(4 * w, 4 * w)),
                "layer4": nn.Sequential(BasicBlock(4 * w, 8 * w, stride=2), BasicBlock(8 * w, 8 * w)),
                "pool": nn.AdaptiveAvgPool2d(1),
                "flatten": nn.Flatten(),
            },
            nn.Linear(8 * w, classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class BasicBlock(nn.Module):
    """relu(shortcut(inputs) + block(inputs)), where the shortcut is a 1x1 convolution if the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.relu(self.block(inputs) + self.shortcut(inputs))


class SimpleCNN(Classifier):
    """The convolutional net of a first lesson. With width w and images 3 x 32 x 32:

    stage      shape after it    layers
    layer1     w x 16 x 16       3x3 convolution, ReLU, max-pool
    layer2     2w x 8 x 8        the same
    layer3     4w x 4 x 4        the same
    hidden     8w                linear, ReLU
    head       classes           8w x classes and bias
    """

    def __init__(self, channels: int, classes: int, width: int, image_size: int) -> None:
        w = width
        super().__init__(
            {
                "layer1": _plain_unit(channels, w),
                "layer2": _plain_unit(w, 2 * w),
                "layer3": _plain_unit(2 * w, 4 * w),
                "pool": nn.AdaptiveAvgPool2d(image_size // 8),  # changes nothing but for images of another size
                "flatten": nn.Flatten(),
                "hidden": nn.Sequential(nn.Linear(4 * w * (image_size // 8) ** 2, 8 * w), nn.ReLU()),
            },
            nn.Linear(8 * w, classes),
        )


def _plain_unit(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))


class VisionTransformer(Classifier):
    """A small Vision Transformer. With width w and images 3 x 32 x 32:

        stage      shape after it    layers
        patches    64 x w            4x4 convolution with stride 4, a token for each patch, plus sines of its place
        blocks     64 x w            six times self-attention with w / 64 heads, then an MLP with 2w units
        pool       w                 layer norm, mean over all tokens
        head       classes           w x classes and bias

    Source: A. Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020, arXiv:2010.11929; fixed positions and the
    mean in place of a class token after L. Beyer et al., "Better plain ViT baselines", 2022, arXiv:2205.01580.
    """

    def __init__(self, channels: int, classes: int, width: int) -> None:
        blocks = {
            f"block{i}": nn.Sequential(
                Residual(nn.LayerNorm(width), SelfAttention(width, heads=width // 64)),
                Residual(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)),
            )
            for i in range(1, 7)
        }
        super().__init__(
            {"patches": Patches(channels, width), **blocks, "norm": nn.LayerNorm(width), "pool": TokenMean()},
            nn.Linear(width, classes),
        )


class Patches(nn.Module):
    """Images (N, C, H, W) to tokens (N, H/4 * W/4, width), each a patch of 4x4 pixels and its place."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, width, 4, stride=4)

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = cast("Tensor", self.project(inputs))
        return (tokens + _places(tokens)).flatten(2).transpose(1, 2)


def _places(tokens: Tensor) -> Tensor:
    """Sines and cosines of the row and the column of every place of (N, width, H, W), as (width, H, W)."""
    width, height, breadth = tokens.shape[1:]
    frequencies = torch.logspace(0, -4, width // 4, device=tokens.device)
    rows = (torch.arange(height, device=tokens.device) * frequencies[:, None])[:, :, None].expand(-1, -1, breadth)
    columns = (torch.arange(breadth, device=tokens.device) * frequencies[:, None])[:, None].expand(-1, height, -1)
    return torch.cat((rows.sin(), rows.cos(), columns.sin(), columns.cos())).to(tokens.dtype)


class SelfAttention(nn.Module):
    """Tokens (N, T, width) to tokens of the same shape, each a mean of all, weighted by softmax(q . k / sqrt(d))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        projected = cast("Tensor", self.query_key_value(tokens))
        query, key, value = projected.reshape(*tokens.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return cast("Tensor", self.output(mixed.transpose(1, 2).flatten(2)))


class TokenMean(nn.Module):
    """Tokens (N, T, width) to their means (N, width)."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(dim=1)
