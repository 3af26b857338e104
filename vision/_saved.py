"""A classifier read back from a run of `rlboard vision train`, with the images that it was trained on."""

from dataclasses import dataclass

import torch

from rlboard.checkpoint import SavedRun, load_weights, read_run
from rlboard.config import printable
from rlboard.errors import DataError, UsageError
from vision._data import Dataset, load_dataset
from vision._models import Classifier, build_model

AVERAGED = "module."
"""What the names of averaged weights begin with."""


@dataclass(frozen=True)
class SavedClassifier:
    """model: as it was tested, in evaluation mode, on the device of `dataset`'s images. run: where it comes from."""

    model: Classifier
    dataset: Dataset
    run: SavedRun


def load_classifier(
    name: str, device: torch.device, data: str = "", data_dir: str = "", images: int = 0
) -> SavedClassifier:
    """The classifier of the run `name`: its directory, or a checkpoint in it.

    Args:
        name: the run.
        device: where to.
        data: images instead of those it was trained on, as `vision._data.load_dataset` takes them.
        data_dir: where downloads and decoded images are kept (default: where the run kept them).
        images: so many of them only, for training and for testing (default: as many as the run had; of `data`, all).

    Raises:
        UsageError: there is no such run, or it is not of `rlboard vision train`.
        DataError: the run or its images cannot be read, or the images are of other classes or channels.
    """
    run = read_run(name)
    if run.loop.track.package != __package__ or run.loop.name != "train":
        of = f"{run.loop.track.package}/{run.loop.name}"
        raise UsageError(f"RUN {printable(run.directory, 200)} is of {of}: give a run of rlboard vision train")
    config = run.config
    dataset = load_dataset(data or str(config["data"]), data_dir or str(config["data_dir"]), device)
    trained_on = run.state["data"] if run.state else dataset.name
    if not data and dataset.name != trained_on:
        raise DataError(
            f"RUN {printable(run.directory, 200)} was trained on {trained_on}, and --data {config['data']} is now "
            f"{dataset.name}: give the images with --data"
        )
    weights = run.weights
    if run.state and "average" in run.state:
        weights = {
            key.removeprefix(AVERAGED): tensor
            for key, tensor in run.state["average"].items()
            if key.startswith(AVERAGED)
        }
    dataset = dataset.first(images or (0 if data else int(config["images"])))
    channels, image_size = dataset.train.images.shape[1], dataset.train.images.shape[-1]
    model = build_model(
        str(config["model"]),
        classes=len(dataset.classes),
        channels=channels,
        image_size=image_size,
        width=int(config["width"]),
    )
    load_weights(model, weights)
    return SavedClassifier(model.to(device).to(memory_format=torch.channels_last).eval(), dataset, run)
