"""Pictures of data and of what a classifier makes of it, as arrays (height, width, 3) uint8."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torchvision.utils import make_grid

MANY_CLASSES = 20
"""From this many classes on a confusion matrix has no numbers in its cells: they would be too small to read."""


def image_grid(images: Tensor, columns: int = 8) -> NDArray[np.uint8]:
    """Images (N, C, H, W) uint8, of 1 or 3 channels, in rows of `columns`."""
    grid: Tensor = make_grid(images.cpu(), nrow=columns, padding=1)
    return grid.permute(1, 2, 0).contiguous().numpy()


def confusion_matrix(counts: Tensor, classes: Sequence[str]) -> NDArray[np.uint8]:
    """How many images of each class (row) were taken for each class (column): `counts` is (classes, classes)."""
    size = max(4.0, 0.55 * min(len(classes), MANY_CLASSES) + 1.5)
    figure = Figure((size, size), layout="constrained")
    axes = figure.subplots()
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    places = range(len(classes))
    if len(classes) < MANY_CLASSES:
        axes.set_xticks(places, classes, rotation=60, ha="right")
        axes.set_yticks(places, classes)
        for row in places:
            for column in places:
                color = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, f"{int(counts[row, column])}", ha="center", va="center", color=color, fontsize=7)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    return _drawn(figure)


def worst_mistakes(
    images: Tensor, labels: Tensor, probabilities: Tensor, classes: Sequence[str], count: int = 24
) -> NDArray[np.uint8]:
    """The misclassified images of which the model was surest, each with what it said and what is true.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) true classes.
        probabilities: (N, classes).
        classes: their names.
        count: how many images at most.
    """
    confidences, predictions = probabilities.max(dim=1)
    wrong = torch.nonzero(predictions != labels).flatten()
    chosen = wrong[confidences[wrong].argsort(descending=True)[:count]]
    figure = Figure((9.6, 7.2), layout="constrained")
    for axes, index in zip(figure.subplots(4, 6).flat, chosen.tolist(), strict=False):
        picture = images[index].permute(1, 2, 0).expand(-1, -1, 3).numpy()
        axes.imshow(picture, interpolation="nearest")
        said, true = classes[int(predictions[index])], classes[int(labels[index])]
        axes.set_title(f"{said} {100 * confidences[index]:.0f} %\nis {true}", fontsize=7)
    for axes in figure.axes:
        axes.set_axis_off()
    return _drawn(figure)


def _drawn(figure: Figure) -> NDArray[np.uint8]:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]
