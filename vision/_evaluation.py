"""What a classifier makes of test images: probabilities, and the numbers, pictures and curves made of them."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlboard.events import Curve, Image
from vision._data import Batches, Dataset
from vision._pictures import confusion_matrix, worst_mistakes

Views = Callable[[Tensor], Iterable[Tensor]]


def one_view(inputs: Tensor) -> list[Tensor]:
    return [inputs]


def shifted_views(inputs: Tensor, flip: bool) -> list[Tensor]:
    """Images, as they are and moved by a pixel up left and down right, and the mirror images of all of them."""
    padded = functional.pad(inputs, (1, 1, 1, 1), mode="reflect")
    views = [inputs, padded[..., :-2, :-2], padded[..., 2:, 2:]]
    return [*views, *(view.flip(3) for view in views)] if flip else views


@torch.no_grad()
def predict(model: nn.Module, batches: Batches, views: Views = one_view) -> Tensor:
    """The probabilities (N, classes) that `model` gives to each class for each image, on the CPU.

    Logits are the means over `views` of an image, as in airbench.
    """
    model.eval()
    logits = [torch.stack([model(view).float() for view in views(inputs)]).mean(dim=0) for inputs, _ in batches]
    model.train()
    return torch.cat(logits).softmax(dim=1).cpu()


def scores(probabilities: Tensor, labels: Tensor, classes: tuple[str, ...]) -> dict[str, float]:
    """Loss and accuracy of the test, and the accuracy of each class, from (N, classes) and (N,)."""
    right = probabilities.argmax(dim=1) == labels
    counts = labels.bincount(minlength=len(classes)).clamp(min=1)
    by_class = 100 * labels[right].bincount(minlength=len(classes)) / counts
    scalars = {
        "Loss/val": functional.nll_loss(probabilities.clamp(min=1e-30).log(), labels).item(),
        "Accuracy/val": 100 * right.float().mean().item(),
    }
    return scalars | {f"Accuracy/class_{name}": by_class[index].item() for index, name in enumerate(classes)}


def pictures(probabilities: Tensor, dataset: Dataset) -> dict[str, Image]:
    """What was taken for what in a test, and where the model was surest and wrong."""
    images, labels, classes = dataset.test.images.cpu(), dataset.test.labels.cpu(), dataset.classes
    pairs = labels * len(classes) + probabilities.argmax(dim=1)
    counts = pairs.bincount(minlength=len(classes) ** 2).reshape(len(classes), len(classes))
    return {
        "Test/confusion_matrix": partial(confusion_matrix, counts, classes),
        "Test/worst_mistakes": partial(worst_mistakes, images, labels, probabilities, classes),
    }


def curves(probabilities: Tensor, labels: Tensor, classes: tuple[str, ...]) -> dict[str, Curve]:
    """What the precision-recall curve of each class is made of."""
    return {
        f"PR/{name}": ((labels == index).numpy(), probabilities[:, index].numpy()) for index, name in enumerate(classes)
    }
