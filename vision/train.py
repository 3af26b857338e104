"""Train an image classifier: on CIFAR-10, MNIST, generated shapes, or any folder or archive of images.

The whole data set lies on the device as bytes, and crops, mirrors and normalises itself in tensor code. The network is
trained on the cross-entropy of its logits z with the true class y, softened by label smoothing s over K classes,

    loss = -sum_k q_k log softmax(z)_k,    q_k = (1 - s) [k = y] + s / K

under a learning rate that rises and falls once. Under torchrun each process takes its part of every batch and of the
test, and they learn what one would, but for the order of sums. Accuracy is in percent, of the test images; at the end,
`Accuracy/val_tta` is that of the mean logits of each image, its mirror image, and both shifted by a pixel.

Sources: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009 (the data); K. Jordan, "94% on
CIFAR-10 in 3.29 Seconds on a Single GPU", 2024, arXiv:2404.00498 (the recipe); the networks and optimizers name theirs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional
from torch.profiler import record_function

from rlboard.config import option
from rlboard.devices import peak_memory, resolve_device
from rlboard.distributed import gather, parallel, sum_over, world
from rlboard.errors import UsageError
from rlboard.events import Event
from rlboard.seeding import seed_everything
from vision._batchnorm import synchronized
from vision._data import Batches, Split, denormalise, load_dataset
from vision._evaluation import curves, pictures, predict, prediction_table, scores, shifted_views
from vision._models import SCALED, build_model, whiten
from vision._optimizers import averaged, finite, make_optimizer, schedule
from vision._pictures import image_grid
from vision._winograd import with_winograd


@dataclass(frozen=True)
class Config:
    data: str = option("auto", "auto, cifar10, mnist, shapes, or the path of a folder or archive of train/CLASS/*",
                       smoke="shapes", check="vision._data:check_data")  # fmt: skip
    data_dir: str = option("", "where downloads and decoded images are kept (default: the user's cache)",
                          resume=True)  # fmt: skip
    images: int = option(0, "use only so many images for training, and for testing; 0: all", min=0, smoke=640)
    model: str = option("laptopnet", "network",
                        choices=("laptopnet", "speednet", "resnet9", "resnet18", "simplecnn", "vit"))  # fmt: skip
    width: int = option(0, "channels of the first stage; 0: the network's own", min=0, max=4096, smoke=8)
    epochs: int = option(6, "how often every training image is seen", min=1, smoke=1)
    batch_size: int = option(128, "images in a step", min=1, smoke=32)
    optimizer: str = option("muon", "how the weights move", choices=("sgd", "adamw", "muon"))
    learning_rate: float = option(0.03, "largest step size", above=0, max=1e30, alias="--lr")
    other_learning_rate: float = option(
        0.0, "muon: of the output layer and the vectors, which move by SGD; 0: the network's own", min=0
    )
    normalize_filters: bool = option(
        True, "muon: keep filters before batch norm, which undoes it, at one length: a step turns them by learning_rate"
    )
    momentum: float = option(0.9, "of sgd and muon; the first beta of adamw", min=0, max=0.9999)
    weight_decay: float = option(0.0, "decay of matrices and filters; vectors do not decay", min=0)
    schedule: str = option("linear", "how the learning rate falls", choices=("cosine", "onecycle", "linear"))
    warmup: float = option(0.1, "share of the training in which the learning rate rises", min=0, max=1)
    label_smoothing: float = option(0.1, "share of the label that is spread over all classes", min=0, max=1)
    ema: float = option(
        0.0, "decay of the averaged weights that are tested; 0: the weights themselves", min=0, max=0.9999
    )
    crop: int = option(2, "pixels by which a crop may be shifted, under reflection at the border", min=0, max=32)
    flip: bool = option(True, "mirror images in every other epoch (never MNIST's digits)")
    cutout: int = option(0, "side of a square that is cut out of every image, in pixels", min=0)
    tta: bool = option(True, "test-time augmentation at the end: mean logits of shifted and mirrored images",
                      resume=True)  # fmt: skip
    progressive: float = option(0.4, "share of the training on images of three quarters of the side, which cost half",
                                min=0, max=1)  # fmt: skip
    precision: str = option("auto", "of the forward pass; auto: bfloat16 on CUDA",
                            choices=("auto", "float32", "bfloat16"))  # fmt: skip
    compile: bool = option(False, "torch.compile: a slow start, then faster steps on a GPU")
    log_every: int = option(50, "steps between two points of the training loss", min=1, smoke=10, resume=True)
    picture_every: int = option(5, "epochs between pictures and curves of the test; there are always some at the end",
                                min=1, resume=True)  # fmt: skip
    threads: int = option(
        0, "threads of the CPU; 0: as many as cores; fewer cost less CPU time in all", min=0, max=1024, resume=True
    )
    seed: int = option(1, "seed of the weights, the order of the images and their augmentation", min=0)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps", check="rlboard.devices:check_device")
    deterministic: bool = option(False, "equal runs on a GPU too, at the price of speed")


PRESETS: dict[str, dict[str, int | float | str | bool]] = {
    "laptop": {"model": "laptopnet", "epochs": 6},
    "patient": {"model": "laptopnet", "width": 48, "epochs": 14, "progressive": 0.55},
    "lesson": {
        "model": "resnet18", "epochs": 10, "optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 1e-4,
        "schedule": "cosine", "warmup": 0.0, "label_smoothing": 0.0, "crop": 4, "progressive": 0.0, "tta": False,
    },
    "speedrun": {
        "model": "speednet", "epochs": 8, "batch_size": 2000, "learning_rate": 0.24, "momentum": 0.6, "warmup": 0.0,
        "label_smoothing": 0.2, "progressive": 0.0, "compile": True,
    },
    "accurate": {
        "model": "resnet18", "epochs": 60, "batch_size": 512, "learning_rate": 0.05, "normalize_filters": False,
        "weight_decay": 0.01, "crop": 4, "schedule": "cosine", "cutout": 12, "ema": 0.999,
        "progressive": 0.0, "compile": True,
    },
}  # fmt: skip


def train(config: Config, state: Mapping[str, Any] | None = None) -> Iterator[Event]:
    """Trains, and yields an event at step 0, after every step, and after every epoch; the x axis counts steps.

    With the `state` of an earlier event it goes on behind that, and the first event is at its step.

    Raises:
        UsageError: the device or the images cannot be used with these options (before the first event).
        DataError: the data cannot be had or read (before the first event).
        NumericalError: the loss is NaN or infinite.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    seed_everything(config.seed, config.deterministic)
    device, here = resolve_device(config.device), world()
    dataset = load_dataset(config.data, config.data_dir, device).first(config.images)
    channels, image_size = dataset.train.images.shape[1], dataset.train.images.shape[-1]
    if config.crop >= image_size:
        raise UsageError(f"--crop {config.crop} is too much for images of {image_size} pixels: give less than that")
    flip = config.flip and dataset.name != "MNIST"
    generator = torch.Generator(device).manual_seed(config.seed)
    prepared = partial(Batches, mean=dataset.mean, std=dataset.std, channels_last=True)
    augmented = partial(prepared, augment=True, flip=flip, cutout=config.cutout, padding=config.crop)
    batches = augmented(dataset.train, batch_size=config.batch_size, generator=generator, world=here)
    truth = dataset.test.labels.cpu()
    if len(truth) < here.size:
        raise UsageError(f"{here.size} processes are too many for {len(truth)} test images: start fewer")
    tests = prepared(Split(*(each[here.part(len(truth))] for each in dataset.test)), batch_size=500, augment=False)

    model = build_model(
        config.model, classes=len(dataset.classes), channels=channels, image_size=image_size, width=config.width
    )
    with_winograd(model.to(device).to(memory_format=torch.channels_last))
    whiten(model, next(iter(prepared(dataset.train.first(4096), batch_size=4096, augment=False)))[0])
    network = parallel(synchronized(model))
    network = cast("nn.Module", torch.compile(network)) if config.compile else network
    average = averaged(model, config.ema) if config.ema else None
    tested = model if average is None else average
    optimizer = make_optimizer(
        model,
        config.optimizer,
        config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        other_learning_rate=config.other_learning_rate or (2.0 if config.model in SCALED else 0.05),
        normalize_filters=config.normalize_filters,
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    bfloat16 = config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bfloat16)

    total = config.epochs * len(batches)
    epoch = done = step = 0  # of which `done` in this epoch
    best = 0.0
    loss_sum, right = torch.zeros((), device=device), torch.zeros((), device=device, dtype=torch.long)
    shuffled = generator.get_state()  # as the epoch began
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if average is not None:
            average.load_state_dict(state["average"])
        epoch, done, step, best = (state[name] for name in ("epoch", "done", "step", "best"))
        loss_sum, right, shuffled = state["loss_sum"].to(device), state["right"].to(device), state["shuffled"]
        generator.set_state(shuffled)
        batches.epoch = epoch

    def snapshot() -> dict[str, Any]:
        counted = {"epoch": epoch, "done": done, "step": step, "best": best, "loss_sum": loss_sum, "right": right}
        learned = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        learned |= {"average": average.state_dict()} if average is not None else {}
        return {**learned, **counted, "shuffled": shuffled, "data": dataset.name}

    shown = augmented(dataset.train.first(64), batch_size=64, generator=torch.Generator(device).manual_seed(0))
    inputs = next(iter(shown))[0]
    samples = denormalise(inputs, dataset.mean, dataset.std)
    images = {"Input/samples": partial(image_grid, samples)}
    yield Event(step, total, model=model, inputs=inputs, images=images, notice=dataset.about, state=snapshot)

    while epoch < config.epochs:
        for inputs, labels in islice(batches, done, None):
            factor = schedule(config.schedule, step / total, config.warmup)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = factor * rate
            if step < config.progressive * total:
                with record_function("resize"):
                    inputs = functional.interpolate(inputs, size=image_size * 3 // 4, mode="bilinear", antialias=True)
            with record_function("forward"):
                with autocast():
                    logits = network(inputs)
                loss = functional.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
            memory = peak_memory(device) if step == 0 else 0.0
            with record_function("backward"):
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
            with record_function("optimizer"):
                optimizer.step()
                if average is not None:
                    average.update_parameters(model)
            step, done = step + 1, done + 1
            hits = (logits.argmax(dim=1) == labels).sum()
            loss, hits = sum_over(loss.detach() / here.size, hits)  # of the whole batch
            loss_sum += loss * batches.batch_size
            right += hits
            scalars: dict[str, float] = {}
            if step == 1 or step % config.log_every == 0:
                scalars = {
                    "Loss/train_step": finite(loss, step),
                    "Learning_Rate": factor * config.learning_rate,
                    "time/images": step * batches.batch_size,
                }
                scalars |= {"Memory/forward_GB": memory} if memory else {}
            yield Event(step, total, scalars, state=snapshot)

        with autocast(), record_function("test"):
            probabilities = gather(predict(tested, tests), len(truth))
        seen = len(batches) * batches.batch_size
        scalars = {
            "Loss/train": finite(loss_sum, step) / seen,
            "Accuracy/train": 100 * right.item() / seen,
            "Memory/total_GB": peak_memory(device),
            **scores(probabilities, truth, dataset.classes),
        }
        best = max(best, scalars["Accuracy/val"])
        epoch, done, shuffled = epoch + 1, 0, generator.get_state()
        loss_sum.zero_()
        right.zero_()
        last = epoch == config.epochs
        if last:
            scalars |= {"hparam/best_accuracy": best, "hparam/final_loss": scalars["Loss/val"]}
        message = (
            f"epoch {epoch}/{config.epochs}: loss {scalars['Loss/train']:.3f}, test loss {scalars['Loss/val']:.3f}, "
            f"accuracy {scalars['Accuracy/train']:.1f} %, test accuracy {scalars['Accuracy/val']:.2f} %"
        )
        if last and config.tta:
            with autocast():
                views = gather(predict(tested, tests, partial(shifted_views, flip=flip)), len(truth))
            scalars["Accuracy/val_tta"] = scores(views, truth, dataset.classes)["Accuracy/val"]
            message += f", {scalars['Accuracy/val_tta']:.2f} % with test-time augmentation"
        draws = last or epoch % config.picture_every == 0
        table = partial(prediction_table, probabilities, truth, dataset.classes)
        yield Event(
            step,
            total,
            scalars,
            "Accuracy/val",
            message,
            model,
            images=pictures(probabilities, dataset) if draws else {},
            curves=curves(probabilities, truth, dataset.classes) if draws else {},
            texts={"Test/sample_predictions": table} if draws else {},
            best="Best/val_accuracy",
            state=snapshot,
        )
