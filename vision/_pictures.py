"""Pictures of data and of what a classifier makes of it, as arrays (height, width, 3) uint8."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
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


def feature_maps(image: Tensor, maps: Tensor, count: int = 16, side: int = 64) -> NDArray[np.uint8]:
    """An image (C, H, W) uint8, and beside it the first channels of what a layer made of it.

    Args:
        image: what the layer saw.
        maps: (K, h, w).
        count: how many channels, at most.
        side: of each of their pictures, in pixels.
    """
    tiles = functional.interpolate(normalised(maps[:count].cpu().float())[:, None], (side, side))
    grid: Tensor = make_grid(torch.from_numpy(_colored(tiles[:, 0], "viridis")), nrow=4, padding=2, pad_value=255)
    height = grid.shape[1]
    shown = functional.interpolate(image.cpu().expand(3, -1, -1)[None], (height, height))[0]
    gap = torch.full((3, height, side // 4), 255, dtype=torch.uint8)
    return torch.cat((shown, gap, grid), dim=2).permute(1, 2, 0).contiguous().numpy()


def normalised(maps: Tensor) -> Tensor:
    """Maps (K, h, w), each stretched to [0, 1]; one that is the same everywhere is 0."""
    maps = maps - maps.amin(dim=(1, 2), keepdim=True)
    return maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)


def _colored(values: Tensor, name: str) -> NDArray[np.uint8]:
    """Values (N, H, W) in [0, 1] in the colours of a map of matplotlib, (N, 3, H, W)."""
    colors = mpl.colormaps[name](values.numpy())[..., :3]
    pixels: NDArray[np.uint8] = (255 * colors).round().astype(np.uint8)
    return pixels.transpose(0, 3, 1, 2)


def heat_maps(
    images: Tensor, heats: Tensor, titles: Sequence[str], right: Sequence[bool], side: int = 160
) -> NDArray[np.uint8]:
    """Images, what of them speaks for a class, and that laid over them: two images in a row, three pictures for each.

    Args:
        images: (N, C, H, W) uint8.
        heats: (N, h, w) in [0, 1].
        titles: of each image.
        right: whether its title is good news.
        side: of each picture, in pixels.
    """
    shown, heat, overlay = _overlaid(images, heats, side)
    return _rows(torch.stack((shown, heat, overlay), dim=1), ("image", "heat map", "overlay"), titles, right)


def rival_heat_maps(
    images: Tensor, said: Tensor, true: Tensor, titles: Sequence[str], side: int = 160
) -> NDArray[np.uint8]:
    """Mistaken images, and over them what speaks for the predicted class and what for the true one.

    Args:
        images: (N, C, H, W) uint8.
        said: (N, h, w) in [0, 1], for the predicted classes.
        true: the same for the true ones.
        titles: of each image.
        side: of each picture, in pixels.
    """
    shown, _, over_said = _overlaid(images, said, side)
    _, _, over_true = _overlaid(images, true, side)
    pictures = torch.stack((shown, over_said, over_true), dim=1)
    return _rows(pictures, ("image", "for what was said", "for what is true"), titles, [False] * len(titles))


def _overlaid(images: Tensor, heats: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, heat maps, and the ones under the others, each (N, 3, side, side) uint8; what is cold is transparent."""
    shown = functional.interpolate(images.cpu().expand(-1, 3, -1, -1), (side, side))
    heats = functional.interpolate(heats.cpu().float()[:, None], (side, side), mode="bicubic").clamp(min=0)
    heats = heats / heats.amax(dim=(1, 2, 3), keepdim=True).clamp(min=1)  # a cubic goes a little beyond its points
    colors = torch.from_numpy(_colored(0.05 + 0.85 * heats[:, 0], "turbo"))  # without its dark ends
    opacity = 0.1 + 0.55 * heats
    overlay = (1 - opacity) * shown + opacity * colors
    return shown, colors, overlay.round().to(torch.uint8)


def _rows(pictures: Tensor, captions: Sequence[str], titles: Sequence[str], right: Sequence[bool]) -> NDArray[np.uint8]:
    """Pictures (N, kinds, 3, side, side), those of two images in a row: captions are of the kinds, titles of images."""
    count, kinds, _, side, _ = pictures.shape
    columns, gap = min(2, count), 4
    rows = -(-count // columns)
    width = kinds * (side + gap) - gap
    spacing = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.05)
    figure = Figure((columns * (width + 24) / 100, rows * (side + 44) / 100), layout=spacing)
    places = figure.subplots(rows, columns, squeeze=False).flat
    for axes in places:
        axes.set_axis_off()
    for number, axes in zip(range(count), figure.axes, strict=False):
        strip = np.full((side, width, 3), 255, np.uint8)
        for kind, picture in enumerate(pictures[number]):
            left = kind * (side + gap)
            strip[:, left : left + side] = picture.permute(1, 2, 0).numpy()
        axes.imshow(strip, interpolation="antialiased")
        axes.set_axis_on()
        axes.set_frame_on(False)
        axes.set_yticks([])
        centres = [side / 2 + kind * (side + gap) for kind in range(kinds)]
        axes.set_xticks(centres, captions, fontsize=7, color="0.4")
        axes.tick_params(length=0, pad=1)
        axes.set_title(titles[number], fontsize=9, color="#1a7f37" if right[number] else "#c62828", pad=3)
    return _drawn(figure)


def loss_contours(losses: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Positive losses (side, side) over the steps -1 to 1 along a first and a second direction, as a map."""
    places = np.linspace(-1, 1, len(losses))
    heights = losses.T
    levels = np.geomspace(0.9999 * heights.min(), 1.0001 * heights.max(), 41)
    figure = Figure((6.8, 5.4), layout="constrained")
    axes = figure.subplots()
    filled = axes.contourf(places, places, heights, levels, cmap="viridis", norm="log")
    filled.set_edgecolor("face")  # or hairlines show between the levels
    lines = axes.contour(places, places, heights, levels[4:-1:4], colors="white", linewidths=0.7, alpha=0.85)
    axes.clabel(lines, fontsize=7, fmt="%.3g")
    axes.plot(0, 0, marker="*", color="white", markeredgecolor="black", markersize=15)
    axes.set_xlabel("along the first direction")
    axes.set_ylabel("along the second direction")
    axes.set_title("Loss around the trained weights (the star)", fontsize=11)
    bar = figure.colorbar(filled, label="cross-entropy", ticks=levels[::5])
    bar.ax.minorticks_off()
    bar.ax.set_yticklabels([f"{level:.3g}" for level in levels[::5]])
    return _drawn(figure)


def scatter(
    points: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    title: str,
    names: Sequence[str] = (),
    lines: Sequence[tuple[int, int]] = (),
) -> NDArray[np.uint8]:
    """Points in the plane, coloured by class, with a legend where there are not too many of them.

    Args:
        points: (N, 2).
        labels: (N,) classes.
        classes: their names.
        title: what stands above.
        names: of each point, written where it lies; none where there are none.
        lines: the numbers of the points to be joined.
    """
    figure = Figure((9.6, 7.2), layout="constrained")
    axes = figure.subplots()
    few = len(classes) <= MANY_CLASSES
    palette = mpl.colormaps["tab20" if len(classes) > 10 else "tab10"] if few else mpl.colormaps["turbo"]
    size = 36 if names else max(3.0, min(36.0, 18_000 / len(points)))
    for ends in lines:
        axes.plot(*points[list(ends)].numpy().T, color="0.8", linewidth=1, zorder=0)
    for label, name in enumerate(classes):
        color = palette(label if few else label / (len(classes) - 1))
        chosen = labels == label
        x, y = points[chosen].numpy().T
        axes.scatter(x, y, size, color=color, label=name, alpha=0.75, linewidths=0)
        for index in chosen.nonzero().flatten().tolist() if names else ():
            left, height = points[index].tolist()
            axes.annotate(names[index], (left, height), (3, 3), textcoords="offset points", fontsize=7, color=color)
    axes.set_title(title)
    axes.set_xticks([])
    axes.set_yticks([])
    if len(classes) <= 3 * MANY_CLASSES:  # more would leave no place for the points
        columns = -(-len(classes) // 30)
        figure.legend(loc="outside right upper", ncols=columns, fontsize=8, markerscale=max(1.0, (36 / size) ** 0.5))
    return _drawn(figure)


def _drawn(figure: Figure) -> NDArray[np.uint8]:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]
