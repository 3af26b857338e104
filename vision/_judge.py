"""How good generated images are, in numbers: a classifier's eye for them, and Inception's where it can be had.

The judge is one of our own classifiers. It never meets the GAN in training: what is compared are its penultimate
features of generated and of real images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rlboard.checkpoint import read_run
from rlboard.config import printable
from rlboard.errors import DataError, UsageError
from vision._data import Batches, Dataset, Split
from vision._features import extract
from vision._frechet import Gaussian, fit, frechet_distance, mean_distance
from vision._models import Classifier, build_model, whiten
from vision._optimizers import make_optimizer, schedule
from vision._saved import load_classifier

REFERENCE = 10_000
"""Training images, at most, to whose features those of generated images are compared."""
PAIRED = 1_000
"""Images, at most, of which all pairs are compared."""
WIDTH, EPOCHS, BATCH_SIZE = 16, 2, 128
"""Of a judge that is trained here."""


@dataclass(frozen=True)
class Judge:
    """A classifier, and what its features of real images are like.

    Attributes:
        model: the classifier, in evaluation mode.
        dataset: the real images.
        reference: the features of training images.
        variety: the mean distance between the features of two test images.
        real_distance: from the features of test images to those of training images: what no generator can be
            expected to fall below, as far as the judge can tell.
    """

    model: Classifier
    dataset: Dataset
    reference: Gaussian
    variety: float
    real_distance: float

    @classmethod
    def of(cls, model: Classifier, dataset: Dataset, count: int) -> Judge:
        """The judge that `model` is, for comparisons of `count` images: as many test images make `real_distance`.

        Raises:
            UsageError: there are not two images of each kind, so that nothing can be compared.
        """
        if min(len(dataset.train.labels), len(dataset.test.labels)) < 2:
            raise UsageError("--images, --data: a judge compares two training and two test images, or more: give them")
        real = features(model, dataset.test.images[:count], dataset)
        reference = fit(features(model, dataset.train.images[:REFERENCE], dataset))
        return cls(model, dataset, reference, mean_distance(real[:PAIRED]), frechet_distance(fit(real), reference))

    def scores(self, images: Tensor) -> dict[str, float]:
        """What generated `images`, (N, C, H, W) uint8, are worth.

        Quality/feature_distance: squared Fréchet distance of their features to those of training images.
        Quality/score: test images' distance over theirs, larger is better: 1 is as close as real images come. Unlike
            the distance it does not depend on the scale of the judge's features.
        Quality/diversity: the mean distance between two of them over that between two test images: 1 is as diverse,
            0 is one image again and again, the collapse of a GAN.
        """
        found = features(self.model, images, self.dataset)
        distance = frechet_distance(fit(found), self.reference)
        return {
            "Quality/feature_distance": distance,
            "Quality/score": self.real_distance / max(distance, torch.finfo(torch.float32).tiny),
            "Quality/diversity": mean_distance(found[:PAIRED]) / max(self.variety, torch.finfo(torch.float32).tiny),
        }


def features(model: Classifier, images: Tensor, dataset: Dataset) -> Tensor:
    """The penultimate features (N, F), on the CPU, of `images`, (N, C, H, W) uint8, that look like `dataset`'s."""
    split = Split(images, torch.zeros(len(images), dtype=torch.long, device=images.device))
    batches = Batches(split, dataset.mean, dataset.std, 500, augment=False, channels_last=True)
    return extract(model, batches)[0].cpu()


def find_judge(
    name: str, dataset: Dataset, data: str, data_dir: str, images: int, weights: Mapping[str, Tensor] | None
) -> Classifier:
    """The classifier of the run `name`; without a name the one that has these `weights`; without them a new one.

    Args:
        name: a run of `rlboard vision train` on `dataset`, which `data` and `data_dir` name.
        dataset: the real images.
        data, data_dir: see `vision._data.load_dataset`.
        images: of how many a new one learns.
        weights: of one that `train_judge` has made of the same images.

    Raises:
        UsageError: there is no such run, or it is not of `rlboard vision train`, or was trained on other images.
        DataError: the run cannot be read.
    """
    if name:
        return load_judge(name, dataset, data, data_dir)
    if weights is None:
        return train_judge(dataset, images)
    model = make_judge(dataset)
    model.load_state_dict(weights)
    return model


def load_judge(name: str, dataset: Dataset, data: str, data_dir: str) -> Classifier:
    """The classifier of the run `name`, if it was trained on `dataset`; see `find_judge`."""
    try:
        run = read_run(name)
        trained_on = run.state.get("data", dataset.name) if run.state else dataset.name
        if trained_on != dataset.name:
            raise UsageError(f"it was trained on {printable(trained_on)}, not on {dataset.name}: give another run")
        return load_classifier(name, dataset.train.images.device, data, data_dir).model
    except (UsageError, DataError) as error:
        raise type(error)(f"--judge {printable(name, 200)}: {error}") from None


def train_judge(dataset: Dataset, images: int) -> Classifier:
    """A small LaptopNet, trained on the first `images` of `dataset` as `rlboard vision train` does it, in brief.

    It is the same one for equal images, whatever a run's seed, so that runs can be compared; and it leaves the global
    generators as they were.
    """
    split = dataset.train.first(images)
    device, side = split.images.device, split.images.shape[-1]
    with apart(device):
        torch.manual_seed(0)
        model = make_judge(dataset)
        patches = Batches(split.first(4096), dataset.mean, dataset.std, 4096, augment=False)
        whiten(model, next(iter(patches))[0])
        generator = torch.Generator(device).manual_seed(0)
        batches = Batches(
            split, dataset.mean, dataset.std, BATCH_SIZE, augment=True, flip=dataset.name != "MNIST",
            padding=side // 16, generator=generator, channels_last=True,
        )  # fmt: skip
        optimizer = make_optimizer(model, "muon", 0.12, other_learning_rate=2.0)
        rates = [group["lr"] for group in optimizer.param_groups]
        step, total = 0, EPOCHS * len(batches)
        model.train()
        for _ in range(EPOCHS):
            for inputs, labels in batches:
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * schedule("linear", step / total, warmup=0.1)
                loss = functional.cross_entropy(model(inputs), labels, label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                step += 1
    return model.eval()


def make_judge(dataset: Dataset) -> Classifier:
    """The network of `train_judge`, in evaluation mode, with weights from the global generator."""
    channels, side = dataset.train.images.shape[1], dataset.train.images.shape[-1]
    model = build_model("laptopnet", classes=len(dataset.classes), channels=channels, image_size=side, width=WIDTH)
    return model.to(dataset.train.images.device).to(memory_format=torch.channels_last).eval()


@contextmanager
def apart(device: torch.device) -> Iterator[None]:
    """Random numbers that are drawn here leave the global generators as they were."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
        yield


class Inception:
    """The Fréchet Inception Distance and the kernel one, as papers report them, by torchmetrics.

    Sources: M. Heusel et al., 2017, arXiv:1706.08500 (FID); M. Binkowski et al., "Demystifying MMD GANs", 2018,
    arXiv:1801.01401 (KID).
    """

    def __init__(self, device: torch.device, count: int) -> None:
        """
        Args:
            device: where Inception runs.
            count: how many real and generated images are going to be compared.

        Raises:
            UsageError: torchmetrics or torch-fidelity is not installed.
            DataError: the weights of Inception cannot be had.
        """
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance
            from torchmetrics.image.kid import KernelInceptionDistance

            with apart(device):
                self._fid: Any = FrechetInceptionDistance().to(device)
                self._kid: Any = KernelInceptionDistance(subset_size=min(1000, count)).to(device)
        except ImportError:  # ModuleNotFoundError of torchmetrics itself, too
            hint = 'python -m pip install -e ".[fid]"'
            raise UsageError(f"--fid needs torchmetrics with torch-fidelity: {hint}") from None
        except (OSError, RuntimeError) as error:
            why = printable(error, 200)
            raise DataError(f"--fid: the weights of Inception cannot be had ({why}): try again online") from None

    @torch.no_grad()
    def scores(self, real: Tensor, generated: Tensor) -> dict[str, float]:
        """`Quality/fid` and `Quality/kid` of images (N, C, H, W) uint8, of 1 or 3 channels."""
        for metric in (self._fid, self._kid):
            for images, is_real in ((real, True), (generated, False)):
                for start in range(0, len(images), 100):
                    metric.update(images[start : start + 100].expand(-1, 3, -1, -1), real=is_real)
        with apart(real.device):  # KID draws subsets
            torch.manual_seed(0)
            kid, _ = self._kid.compute()
        return {"Quality/fid": float(self._fid.compute()), "Quality/kid": float(kid)}
