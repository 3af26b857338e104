"""Looks into a trained classifier: what its layers respond to, why it said what it said, and how its loss lies.

    rlboard vision explain logs/vision/train/20261122-231707-seed1 --layer features.group2.1.0 --target cat

For a few test images there are Grad-CAM heat maps (the places that speak for a class, `vision._cam.grad_cam`), the
feature maps of the convolutions, and a table of the predictions; for a larger batch of them, the histograms of weights,
gradients and activations. At the end comes the loss surface around the trained weights (`vision._surface`), as a
landscape for the Mesh tab and as contours.

Sources: R. R. Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
2017, arXiv:1610.02391; H. Li et al., "Visualizing the Loss Landscape of Neural Nets", 2018, arXiv:1712.09913.

Nothing is trained here: `train` is only the name under which a loop is run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from itertools import chain, zip_longest

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from rlboard.config import option, printable
from rlboard.devices import resolve_device
from rlboard.errors import UsageError
from rlboard.events import Event, Image
from rlboard.seeding import seed_everything
from vision._cam import convolutions, grad_cam, layer_outputs
from vision._data import Batches, Split
from vision._evaluation import evaluating, predict, prediction_table, scores
from vision._pictures import feature_maps, heat_maps, loss_contours, rival_heat_maps
from vision._saved import SavedClassifier, load_classifier
from vision._surface import loss_at, random_direction, smooth_surface, surface_mesh


@dataclass(frozen=True)
class Config:
    run: str = option("", "directory of a run of vision train, such as logs/vision/train/NAME", argument=True)
    data: str = option("", "images instead of those of the run: cifar10, mnist, shapes, or the path of a folder or "
                       "archive with the same classes")  # fmt: skip
    data_dir: str = option("", "where downloads and decoded images are kept (default: where the run kept them)")
    layer: str = option("", "convolution to look into, such as features.group2.1.0 (default: the last one for Grad-CAM "
                        "and all for feature maps)")  # fmt: skip
    images: int = option(8, "test images to explain", min=1, max=64, smoke=4)
    show: str = option("mixed", "which images: the first ones, the worst mistakes, the surest of every class in turn, "
                       "or half of the surest and half of the mistakes",
                       choices=("mixed", "mistakes", "sure", "first"))  # fmt: skip
    target: str = option("", "class to explain, by name or number (default: of each image, the predicted one)",
                         alias="--class")  # fmt: skip
    surface: int = option(15, "points of the loss surface along each side, of an odd number one is at the weights "
                          "themselves; 0: none", min=0, max=201, smoke=3)  # fmt: skip
    surface_images: int = option(256, "test images, at most, whose loss the surface is; gradients and activations are "
                                 "of the first 256 of them",
                                 min=1, smoke=16)  # fmt: skip
    threads: int = option(0, "threads of the CPU; 0: as many as cores", min=0, max=1024)
    seed: int = option(0, "seed of the directions of the loss surface", min=0)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps", check="rlboard.devices:check_device")


WHAT_TO_LOOK_FOR = """\
**GradCAM** shows where `{layer}` finds evidence for {target}: red speaks for it most, blue not at all. Each map is
scaled to its own largest value, so that its colours say where, never how much; the confidence stands in the title. A
map has {places} places, however smooth it is drawn. In a healthy network the heat lies on the object. Under
`GradCAM/mistakes`, the same image is asked for the class that was said and for the one that is true: where the two
differ is what misled the network.

| what you see | what it may mean |
|---|---|
| heat on the background, the same for all images of a class | a shortcut: the class is told by where it is found |
| heat on borders and corners | padding, or artefacts of the crops, speak louder than the object |
| a map that is blue all over | nothing in this layer speaks for the class, only against it; or its units are dead |
| a map that is red all over | the layer sees no places any more, or is too early for evidence of a class |
| equal maps for all classes | the maps show edges, not reasons: look at a later layer |

**Features** are the first channels of a layer, each scaled to its own range. Early layers draw edges and colours, late
ones few warm places. Channels that are one flat colour for every image are dead: in **Activations** they are a spike at
zero, and in **Gradients** their filters get none; a lower learning rate or another initialisation revives them.

**Loss_surface** is the loss around the trained weights, its logarithm as height and colour; drag it to turn it. A wide,
smooth valley is what well-trained networks have; sharp ridges, and weights beside the deepest place, say that training
was stopped early or its steps were too large.{remark}
"""

ONE_CONVOLUTION = """

This network has one convolution, which cuts the image into patches before they see each other: its heat is evidence of
single patches, and what attention makes of them later is not in it."""


def find_layer(name: str, model: nn.Module) -> str:
    """The convolution called `name`, the last one without a name. Raises UsageError if there is none of that name."""
    names = convolutions(model)
    if name and name not in names:
        near = get_close_matches(name, names, n=1, cutoff=0)
        raise UsageError(
            f"--layer {printable(name)} is no convolution of this network: did you mean {near[0]}? "
            f"There are {', '.join(names)}"
        )
    return name or names[-1]


def find_class(name: str, classes: Sequence[str]) -> int:
    """The number of the class called `name`, or numbered so. Raises UsageError if there is none."""
    if name in classes:
        return classes.index(name)
    if name.isascii() and name.isdecimal() and len(name) < 10 and int(name) < len(classes):
        return int(name)
    known = printable(", ".join(classes), 300)
    raise UsageError(f"--target {printable(name)} is no class: give one of {known}, or a number to {len(classes) - 1}")


def choose(probabilities: Tensor, labels: Tensor, show: str, count: int) -> list[int]:
    """The numbers of the `count` test images that `show` asks for, from (N, classes) and (N,).

    A mistake is the worse, the more probable a wrong class is than the true one; an image is the surer, the less so.
    Where there are too few mistakes, the images that came next to being one stand in for them.
    """
    if show == "first":
        return list(range(count))
    if show == "mixed":
        sure = choose(probabilities, labels, "sure", count - count // 2)
        mistakes = choose(probabilities, labels, "mistakes", count)
        return (sure + [number for number in mistakes if number not in sure])[:count]
    truth = functional.one_hot(labels, probabilities.shape[1]).bool()
    lead = probabilities.masked_fill(truth, 0).amax(dim=1) - probabilities[truth]
    if show == "mistakes":
        return lead.argsort(descending=True, stable=True)[:count].tolist()
    order = lead.argsort(stable=True)
    by_class = [order[labels[order] == label].tolist() for label in range(probabilities.shape[1])]
    in_turn = (number for turn in zip_longest(*by_class) for number in turn if number is not None)
    return [number for number, _ in zip(in_turn, range(count), strict=False)]


def about(saved: SavedClassifier, layer: str) -> str:
    """What is explained, in a line."""
    run = saved.run
    what = f"{run.directory}, {run.config['model']} on {saved.dataset.name} at step {run.step:,}"
    ended = "" if run.status == "completed" else f", a run that was {run.status}"
    return printable(f"explaining {what}{ended}; Grad-CAM of {layer}", 300)


def loss_gradients(model: nn.Module, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The gradient of the mean cross-entropy by each trained parameter, in evaluation mode."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with evaluating(model):
        loss = functional.cross_entropy(model(inputs), labels)
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def train(config: Config) -> Iterator[Event]:
    """Explains, and yields an event at step 0, one with all but the surface, and one after each row of the surface.

    Raises:
        UsageError: there is no such run, layer, class or number of images (before the first event).
        DataError: the run or its images cannot be read (before the first event).
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    seed_everything(config.seed)
    if config.surface in (1, 2):
        raise UsageError(f"--surface {config.surface} is too few points for a surface: give 3 or more, or 0 for none")
    saved = load_classifier(config.run, resolve_device(config.device), config.data, config.data_dir)
    model, dataset = saved.model, saved.dataset
    classes, test = dataset.classes, dataset.test
    layer = find_layer(config.layer, model)
    target = find_class(config.target, classes) if config.target else None
    if config.images > len(test.labels):
        raise UsageError(f"--images {config.images} is more than there are: give {len(test.labels)} or less")
    total = 1 + config.surface
    yield Event(0, total, notice=about(saved, layer))

    prepared = partial(Batches, mean=dataset.mean, std=dataset.std, augment=False, channels_last=True)
    truth = test.labels.cpu()
    probabilities = predict(model, prepared(test, batch_size=1000))
    measured = scores(probabilities, truth, classes)
    chosen = choose(probabilities, truth, config.show, config.images)
    pictures, labels = test.images[chosen], test.labels[chosen]
    ((inputs, _),) = prepared(Split(pictures, labels), batch_size=len(chosen))
    confidences, predicted = probabilities[chosen].max(dim=1)
    targets = predicted if target is None else torch.full_like(predicted, target)
    heats = grad_cam(model, layer, inputs, targets.to(inputs.device))
    right = (predicted == labels.cpu()).tolist()
    titles = [
        f"is {classes[true]}, said {classes[said]} ({share:.0%})"
        for true, said, share in zip(labels.tolist(), predicted.tolist(), confidences.tolist(), strict=True)
    ]

    images: dict[str, Image] = {"GradCAM": partial(heat_maps, pictures, heats, titles, right)}
    mistakes = [number for number, is_right in enumerate(right) if not is_right]
    if mistakes and target is None:
        for_true = grad_cam(model, layer, inputs[mistakes], labels[mistakes])
        mistaken = [titles[number] for number in mistakes]
        images["GradCAM/mistakes"] = partial(rival_heat_maps, pictures[mistakes], heats[mistakes], for_true, mistaken)
    names = [layer] if config.layer else convolutions(model)
    for name, maps in layer_outputs(model, inputs[:1], names).items():
        images[f"Features/{name}"] = partial(feature_maps, pictures[0], maps[0])

    batch = test.first(config.surface_images)
    batches = list(prepared(batch, batch_size=256))
    stages = [*(f"features.{name}" for name, _ in model.features.named_children()), "head"]
    histograms = {f"Weights/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    histograms |= {f"Gradients/{name}": each for name, each in loss_gradients(model, *batches[0]).items()}
    histograms |= {f"Activations/{name}": each for name, each in layer_outputs(model, batches[0][0], stages).items()}
    yield Event(
        1,
        total,
        measured,
        "Accuracy/val",
        f"explained {len(chosen)} test images, of which {len(mistakes)} are mistakes: "
        f"the network is right about {measured['Accuracy/val']:.2f} % of {len(truth):,}",
        images=images,
        histograms={tag: values.clone for tag, values in histograms.items()},
        texts={
            "Test/sample_predictions": partial(prediction_table, probabilities, truth, classes, chosen),
            "Explain/what_to_look_for": partial(
                WHAT_TO_LOOK_FOR.format,
                layer=layer,
                places=f"{heats.shape[1]} x {heats.shape[2]}",
                target="the predicted class" if target is None else f"the class {printable(classes[target])}",
                remark=ONE_CONVOLUTION if len(convolutions(model)) == 1 else "",
            ),
        },
        best="Best/val_accuracy",
    )

    generator = torch.Generator().manual_seed(config.seed)
    directions = random_direction(model, generator), random_direction(model, generator)
    steps: list[float] = np.linspace(-1, 1, config.surface).tolist()
    rows: list[list[float]] = []
    for row, along in enumerate(steps, start=1):
        rows.append([loss_at(model, batches, (along, across), directions) for across in steps])
        if row < config.surface:
            yield Event(1 + row, total)
    if rows:
        losses = smooth_surface(torch.tensor(rows))
        centre = loss_at(model, batches, (0, 0), directions)
        yield Event(
            total,
            total,
            message=f"loss surface of {len(batch.labels):,} test images: {centre:.3g} at the trained weights, "
            f"{min(chain(*rows)):.3g} to {max(chain(*rows)):.3g} around them",
            images={"Loss_surface/contours": partial(loss_contours, losses)},
            meshes={"Loss_surface": partial(surface_mesh, losses)},
        )
