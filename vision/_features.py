"""Penultimate features of images: taken from a network, judged by their nearest neighbours, laid out in the plane."""

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from rlboard.errors import UsageError
from rlboard.events import Embedding
from vision._data import Batches, Dataset, Split
from vision._evaluation import evaluating
from vision._models import Classifier
from vision._pictures import scatter

NEIGHBOURS = 20
TEMPERATURE = 0.07
"""Of the neighbours' votes, as in Wu et al."""
TSNE_POINTS, TSNE_ITERATIONS = 1000, 500
"""More would take longer than the training of a small network, and show no more."""
CHUNK = 500  # queries compared at once: with 50,000 training images, 100 MB
SPRITE_SIDE = 8192
"""Pixels: the widest and highest sprite that the Projector loads."""


class Judged(NamedTuple):
    """What a network makes of N test images, on their device.

    features: (N, F). votes: what the neighbours of each say about its class, (N, classes). probabilities: what the
    network itself says, the softmax of whatever its head puts out. accuracy: of the votes, in percent.
    """

    features: Tensor
    votes: Tensor
    probabilities: Tensor
    accuracy: float


def judge(model: Classifier, dataset: Dataset, bank: int) -> Judged:
    """Tests the features of `model` by neighbours among the first `bank` training images, or all of them where 0."""
    known = dataset.train.first(bank or len(dataset.train.labels))
    prepared = partial(Batches, mean=dataset.mean, std=dataset.std, batch_size=1000, augment=False, channels_last=True)
    features, outputs = extract(model, prepared(dataset.test))
    votes = neighbour_votes(features, extract(model, prepared(known))[0], known.labels, len(dataset.classes))
    return Judged(features, votes, outputs.softmax(dim=1), percent_right(votes, dataset.test.labels))


def percent_right(shares: Tensor, labels: Tensor) -> float:
    """How often the class with the largest share, of (N, classes), is the true one, of (N,)."""
    return 100 * (shares.argmax(dim=1) == labels).float().mean().item()


@torch.no_grad()
def extract(model: Classifier, batches: Batches) -> tuple[Tensor, Tensor]:
    """The features (N, F) of all images, `model` in evaluation mode, and what its head makes of them; both float32."""
    found = []
    with evaluating(model):
        for inputs, _ in batches:
            features = model.features(inputs)
            found.append((features.float(), model.head(features).float()))
    features, outputs = zip(*found, strict=True)
    return torch.cat(features), torch.cat(outputs)


def neighbour_votes(
    queries: Tensor, bank: Tensor, labels: Tensor, classes: int, neighbours: int = NEIGHBOURS
) -> Tensor:
    """What the nearest neighbours of each query in the bank say about its class: shares of their votes, (Q, classes).

        votes for c = sum over the k nearest i of class c of exp(s_i / t),    s_i = cosine(query, i)

    Nothing is trained, so that this judges the features alone: images of one class lie together or they do not.

    Args:
        queries: (Q, F).
        bank: (N, F), with the classes `labels`, (N,), on the same device.
        classes: how many there are.
        neighbours: k; all of the bank where it has fewer.

    Source: Z. Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", 2018,
    arXiv:1805.01978.
    """
    directions = functional.normalize(bank, dim=1).T
    shares = []
    for chunk in torch.split(functional.normalize(queries, dim=1), CHUNK):
        similarities, nearest = (chunk @ directions).topk(min(neighbours, len(bank)), dim=1)
        weights = (similarities / TEMPERATURE).softmax(dim=1)
        shares.append(weights.new_zeros(len(chunk), classes).scatter_add_(1, labels[nearest], weights))
    return torch.cat(shares)


def principal_components(points: Tensor, dimensions: int = 2) -> Tensor:
    """Points (N, F) in the plane in which they vary most, (N, dimensions), float32 on the CPU.

    The covariance is small and exact where a random projection would draw from the training's generator.
    """
    centred = points.double().cpu()
    centred -= centred.mean(dim=0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :dimensions]
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    layout: Tensor = centred @ (axes * largest.sign())
    return layout.float()


def tsne(points: Tensor) -> Tensor:
    """Points (N, F) in a plane where near ones stay near, (N, 2): equal points are laid out equally.

    Distances between clusters, and their sizes, mean nothing there.

    Source: L. van der Maaten, G. Hinton, "Visualizing Data using t-SNE", JMLR 9, 2008.
    """
    from sklearn.manifold import TSNE  # a second that only those pay who want the picture

    layout = TSNE(perplexity=min(30, (len(points) - 1) / 3), init="pca", max_iter=TSNE_ITERATIONS, random_state=0)
    return torch.from_numpy(layout.fit_transform(principal_components(points, 50).numpy()))


def in_the_plane(features: Tensor, dataset: Dataset, *, by_tsne: bool = False) -> NDArray[np.uint8]:
    """A picture of the features (N, F) of the first N test images, coloured by class; t-SNE's of some of them."""
    features = features[: TSNE_POINTS if by_tsne else None]
    labels = dataset.test.labels[: len(features)].cpu()
    layout = tsne(features) if by_tsne else principal_components(features)
    title = f"Features of {len(features):,} test images, {'t-SNE' if by_tsne else 'principal components'}"
    return scatter(layout, labels, dataset.classes, title)


def fitting(images: Tensor) -> int:
    """How many images of the size of `images` (N, C, H, W) fit into the sprite of the Projector."""
    return int(SPRITE_SIDE // max(images.shape[2:])) ** 2


def check_limit(limit: int, test: Split) -> None:
    """Raises UsageError where `limit` test images are asked for and there, but do not fit into a sprite."""
    most = fitting(test.images)
    if min(limit, len(test.labels)) > most:
        size = "x".join(map(str, test.images.shape[2:]))
        raise UsageError(f"--limit {limit}: the Projector can show {most} images of {size} pixels: give that or less")


def presented(judged: Judged, dataset: Dataset, limit: int, believed: Tensor) -> dict[str, Any]:
    """What an event offers to be drawn of the first `limit` test images, or of as many as fit where 0.

    Args:
        judged: what the network makes of all of them.
        dataset: the images.
        limit: see `check_limit`.
        believed: the probabilities (N, classes) that stand beside the points.
    """
    count = min(limit or len(dataset.test.labels), fitting(dataset.test.images))
    shown = dataset.test.first(count)
    draw = partial(in_the_plane, judged.features[:count], dataset)
    points = partial(labelled, judged.features[:count], shown, believed[:count], dataset.classes)
    return {
        "images": {"Embeddings/pca": draw, "Embeddings/tsne": partial(draw, by_tsne=True)},
        "embeddings": {"Embeddings/test_set": points},
    }


def labelled(points: Tensor, split: Split, probabilities: Tensor, classes: tuple[str, ...]) -> Embedding:
    """Points for the Projector, each with its image and with what is true and what is believed of it.

    Args:
        points: (N, F).
        split: their images and classes.
        probabilities: (N, classes).
        classes: their names.
    """
    labels = split.labels.tolist()
    confidences, predictions = (tensor.tolist() for tensor in probabilities.max(dim=1))
    rows = [
        (classes[label], classes[prediction], "yes" if label == prediction else "no", f"{confidence:.3f}")
        for label, prediction, confidence in zip(labels, predictions, confidences, strict=True)
    ]
    return Embedding(points, rows, ("label", "predicted", "correct", "confidence"), split.images)
