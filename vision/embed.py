"""Look at what a network sees in images: its penultimate features in the Projector, learned with labels or without.

    rlboard vision embed logs/vision/train/NAME
    rlboard vision embed --epochs 10

With RUN, a run of `rlboard vision train`, nothing is trained: these are the features of that classifier. Without it
they are trained first. `--method supervised` does so by the cross-entropy of the classes; `--method simclr` by no label
at all: two random views of each of N images, cropped, mirrored and recoloured, shall find each other among the views of
all, by the NT-Xent loss

    loss = mean over i of  -log( exp(s_ij / t) / sum over k != i of exp(s_ik / t) ),    s_ik = cosine(z_i, z_k)

where j is the other view of the image of i, z a small network's projection of the features, and t the temperature.

`Accuracy/knn` judges features of either kind: the share of the test images, in percent, whose class the 20 nearest
training images by cosine know, in a vote weighted with exp(cosine / 0.07). At step 0 it is that of random weights. In
the Projector, `predicted` and `confidence` are the classifier's own, or that vote's after simclr, which knows no
classes. `Embeddings/pca` and `Embeddings/tsne` are the same points in the plane.

With 5,000 shapes for training, --width 16 and 3 epochs, in half a minute of CPU, `Accuracy/knn` goes from 30 % to 62 %
by simclr and to 100 % by labels (2,000 test images, seed 1).

Sources: T. Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", 2020,
arXiv:2002.05709; Z. Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", 2018,
arXiv:1805.01978 (the vote).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import record_function

from rlboard.config import option, printable
from rlboard.devices import resolve_device
from rlboard.events import Event
from rlboard.seeding import seed_everything
from vision._contrastive import Views, nt_xent, projection_head
from vision._data import Batches, denormalise, load_dataset
from vision._features import check_limit, in_the_plane, judge, percent_right, presented
from vision._models import SCALED, build_model, whiten
from vision._optimizers import finite, make_optimizer, schedule
from vision._pictures import image_grid
from vision._saved import load_classifier
from vision._winograd import with_winograd


@dataclass(frozen=True)
class Config:
    run: str = option("", "run of vision train whose features these shall be, such as logs/vision/train/NAME; "
                      "without it they are trained", argument=True, required=False)  # fmt: skip
    data: str = option("auto", "auto (RUN's own), cifar10, mnist, shapes, or the path of a folder or archive of "
                       "train/CLASS/*", smoke="shapes", check="vision._data:check_data")  # fmt: skip
    data_dir: str = option("", "where downloads and decoded images are kept (default: the user's cache)",
                          resume=True)  # fmt: skip
    images: int = option(0, "use only so many images for training, and for testing; 0: all (of RUN's)",
                         min=0, smoke=320)  # fmt: skip
    bank: int = option(10_000, "training images among which neighbours are looked for; 0: all", min=0)
    limit: int = option(0, "test images in the Projector; 0: as many as fit", min=0, smoke=100)
    method: str = option("simclr", "how features are learned: simclr, without labels, or supervised, with them",
                         choices=("simclr", "supervised"))  # fmt: skip
    model: str = option("laptopnet", "network",
                        choices=("laptopnet", "speednet", "resnet9", "resnet18", "simplecnn", "vit"))  # fmt: skip
    width: int = option(0, "channels of the first stage; 0: the network's own", min=0, max=4096, smoke=8)
    epochs: int = option(5, "how often every training image is seen, by simclr twice each time", min=1, smoke=1)
    batch_size: int = option(256, "images in a step; simclr finds more to tell apart in more", min=2, smoke=64)
    optimizer: str = option("muon", "how the weights move", choices=("sgd", "adamw", "muon"))
    learning_rate: float = option(0.12, "largest step size", above=0, max=1000, alias="--lr")
    temperature: float = option(0.2, "simclr: t; a small one asks most of the views that are most alike", min=0.01)
    color: float = option(0.5, "simclr: how much the colours of views change", min=0, max=1)
    crop: float = option(0.2, "simclr: share of an image that a view shows at least", above=0, max=1)
    log_every: int = option(20, "steps between two points of the training loss", min=1, smoke=1, resume=True)
    test_every: int = option(1, "epochs between two tests by neighbours", min=1, resume=True)
    picture_every: int = option(5, "epochs between pictures of the features, where they are tested; there are always "
                                "some at the end", min=1, resume=True)  # fmt: skip
    threads: int = option(
        0, "threads of the CPU; 0: as many as cores; fewer cost less CPU time in all", min=0, max=1024, resume=True
    )
    seed: int = option(1, "seed of the weights, the order of the images and their views", min=0)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps", check="rlboard.devices:check_device")
    deterministic: bool = option(False, "equal runs on a GPU too, at the price of speed")


def look(config: Config) -> Iterator[Event]:
    """The features of a run: an event at step 0, and one with all there is to see."""
    data = "" if config.data == "auto" else config.data
    saved = load_classifier(config.run, resolve_device(config.device), data, config.data_dir, config.images)
    dataset = saved.dataset
    check_limit(config.limit, dataset.test)
    what = f"features of {saved.run.directory}, {saved.run.config['model']} at step {saved.run.step:,}"
    yield Event(0, 1, notice=printable(f"{what}, {dataset.name}", 300))

    judged = judge(saved.model, dataset, config.bank)
    scalars = {
        "Accuracy/knn": judged.accuracy,
        "Accuracy/val": percent_right(judged.probabilities, dataset.test.labels),
    }
    yield Event(
        1,
        1,
        scalars,
        "Accuracy/knn",
        f"neighbours are right about {scalars['Accuracy/knn']:.2f} % of {len(dataset.test.labels):,} test images, the "
        f"classifier about {scalars['Accuracy/val']:.2f} %",
        best="Best/knn_accuracy",
        **presented(judged, dataset, config.limit, judged.probabilities),
    )


def train(config: Config, state: Mapping[str, Any] | None = None) -> Iterator[Event]:
    """Trains unless there is a run to look at, and yields an event at step 0, after every step, and after every epoch.

    The x axis counts steps. With the `state` of an earlier event it goes on behind that, and the first event is at its
    step.

    Raises:
        UsageError: there is no such run, or the device or the images cannot be used with these options (before the
            first event).
        DataError: the run or the data cannot be had or read (before the first event).
        NumericalError: the loss is NaN or infinite.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    seed_everything(config.seed, config.deterministic)
    if config.run:
        yield from look(config)
        return
    device = resolve_device(config.device)
    dataset = load_dataset(config.data, config.data_dir, device).first(config.images)
    check_limit(config.limit, dataset.test)
    channels, image_size = dataset.train.images.shape[1], dataset.train.images.shape[-1]
    simclr = config.method == "simclr"
    flip = dataset.name != "MNIST"
    order, chance = (torch.Generator(device).manual_seed(config.seed + number) for number in range(2))
    mean, std = dataset.mean[:, None, None], dataset.std[:, None, None]
    if simclr:  # pixels from 0 to 1, which are recoloured before they are normalised
        nothing = torch.zeros_like(dataset.mean)
        batched = partial(Batches, mean=nothing, std=nothing + 1, augment=True, flip=False, padding=0)
    else:
        batched = partial(
            Batches, mean=dataset.mean, std=dataset.std, augment=True, flip=flip, padding=2, channels_last=True
        )
    batches = batched(dataset.train, batch_size=config.batch_size, generator=order)

    def two_views(pixels: Tensor, generator: torch.Generator) -> Tensor:
        view = Views(generator, flip=flip, crop=config.crop, color=config.color)
        views = torch.cat((view(pixels), view(pixels)))
        return ((views - mean) / std).contiguous(memory_format=torch.channels_last)

    model = build_model(
        config.model, classes=len(dataset.classes), channels=channels, image_size=image_size, width=config.width
    )
    if simclr:
        model.head = projection_head(cast("nn.Linear", model.head).in_features)
    with_winograd(model.to(device).to(memory_format=torch.channels_last))
    some = Batches(dataset.train.first(4096), dataset.mean, dataset.std, 4096, augment=False)
    whiten(model, next(iter(some))[0])
    scaled = not simclr and config.model in SCALED
    optimizer = make_optimizer(
        model, config.optimizer, config.learning_rate, other_learning_rate=2.0 if scaled else 0.05
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=device.type == "cuda")

    total = config.epochs * len(batches)
    epoch = done = step = 0  # of which `done` in this epoch
    tested = False  # whether the weights that were drawn have been
    loss_sum = torch.zeros((), device=device)
    shuffled = order.get_state()  # as the epoch began
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        epoch, done, step, tested = (state[name] for name in ("epoch", "done", "step", "tested"))
        loss_sum, shuffled = state["loss_sum"].to(device), state["shuffled"]
        order.set_state(shuffled)
        chance.set_state(state["chance"])
        batches.epoch = epoch

    def snapshot() -> dict[str, Any]:
        learned = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        counted = {"epoch": epoch, "done": done, "step": step, "tested": tested, "loss_sum": loss_sum}
        return {**learned, **counted, "shuffled": shuffled, "chance": chance.get_state(), "data": dataset.name}

    inputs, _ = next(iter(batched(dataset.train.first(64), batch_size=64, generator=torch.Generator(device))))
    if simclr:
        inputs = torch.stack(two_views(inputs[:32], torch.Generator(device)).chunk(2), dim=1).flatten(0, 1)
    images = {"Input/samples": partial(image_grid, denormalise(inputs, dataset.mean, dataset.std))}
    yield Event(step, total, model=model, inputs=inputs, images=images, notice=dataset.about, state=snapshot)

    if not tested:
        judged, tested = judge(model, dataset, config.bank), True
        picture = partial(in_the_plane, judged.features, dataset)
        message = f"random weights: neighbours are right about {judged.accuracy:.2f} % of the test images"
        scalars = {"Accuracy/knn": judged.accuracy}
        images = {"Embeddings/pca": picture}
        yield Event(0, total, scalars, "Accuracy/knn", message, images=images, best="Best/knn_accuracy", state=snapshot)

    while epoch < config.epochs:
        for inputs, labels in islice(batches, done, None):
            factor = schedule("cosine", step / total, 0.1)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = factor * rate
            if simclr:
                with record_function("data"):
                    inputs = two_views(inputs, chance)
            with record_function("forward"):
                with autocast():
                    outputs = model(inputs)
                if simclr:
                    loss = nt_xent(outputs.float(), config.temperature)
                else:
                    loss = functional.cross_entropy(outputs.float(), labels, label_smoothing=0.1)
            with record_function("backward"):
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
            with record_function("optimizer"):
                optimizer.step()
            step, done = step + 1, done + 1
            loss_sum += loss.detach()
            scalars = {}
            if step == 1 or step % config.log_every == 0:
                scalars = {
                    "Loss/train_step": finite(loss, step),
                    "Learning_Rate": factor * config.learning_rate,
                    "time/images": step * batches.batch_size,
                }
            yield Event(step, total, scalars, state=snapshot)

        scalars = {"Loss/train": finite(loss_sum, step) / len(batches)}
        epoch, done, shuffled = epoch + 1, 0, order.get_state()
        loss_sum.zero_()
        message = f"epoch {epoch}/{config.epochs}: loss {scalars['Loss/train']:.3f}"
        last = epoch == config.epochs
        offered: dict[str, Any] = {}
        if last or epoch % config.test_every == 0:
            with record_function("test"):
                judged = judge(model, dataset, config.bank)
            scalars["Accuracy/knn"] = judged.accuracy
            message += f", neighbours are right about {judged.accuracy:.2f} % of the test images"
            if not simclr:
                scalars["Accuracy/val"] = percent_right(judged.probabilities, dataset.test.labels)
                message += f", the classifier about {scalars['Accuracy/val']:.2f} %"
            if epoch % config.picture_every == 0:
                picture = partial(in_the_plane, judged.features, dataset)
                offered = {"images": {"Embeddings/pca": picture}}
            if last:
                offered = presented(judged, dataset, config.limit, judged.votes if simclr else judged.probabilities)
        headline = "Accuracy/knn" if "Accuracy/knn" in scalars else ""
        yield Event(step, total, scalars, headline, message, model, best="Best/knn_accuracy", state=snapshot, **offered)
