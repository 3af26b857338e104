"""What a classifier makes of test images: probabilities, and the numbers, pictures and curves made of them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlboard.config import printable
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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def predict(model: nn.Module, batches: Batches, views: Views = one_view) -> Tensor:
    """The probabilities (N, classes) that `model` gives to each class for each image, on the CPU.

    Logits are the means over `views` of an image, as in airbench.
    """
    with evaluating(model):
        logits = [torch.stack([model(view).float() for view in views(inputs)]).mean(dim=0) for inputs, _ in batches]
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


def prediction_table(
    probabilities: Tensor, labels: Tensor, classes: Sequence[str], numbers: Sequence[int] = range(16)
) -> str:
    """What was said about the images `numbers` of a test, as a Markdown table; what is wrong is bold.

    Args:
        probabilities: (N, classes), of all test images.
        labels: (N,) true classes.
        classes: their names.
        numbers: which images; those that are not there are left out.
    """
    names = [printable(name).replace("|", "\\|") for name in classes]
    rows = ["| image | true | predicted | confidence | runner-up |", "|---:|---|---|---:|---|"]
    for number in (number for number in numbers if number < len(labels)):
        confidences, found = probabilities[number].topk(min(2, len(names)))
        true, (predicted, *others) = names[int(labels[number])], [names[index] for index in found.tolist()]
        first, *rest = (f"{share:.1%}" for share in confidences.tolist())
        said = predicted if predicted == true else f"**{predicted}**"
        runner_up = " ".join((*others, *rest))
        rows.append(f"| {number} | {true} | {said} | {first} | {runner_up} |")
    return "\n".join(rows)
