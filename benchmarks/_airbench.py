"""airbench94 (K. Jordan) and `--preset speedrun` in turn: the same images, the same card, the same clock.

Its script, airbench94_muon.py of github.com/KellerJordan/cifar10-airbench, is fetched by whoever runs the comparison.
It finds our images where it looks for its own, in cifar10/train.pt and test.pt of the working directory, and downloads
nothing. It needs CUDA.

What its clock counts, CUDA events between two synchronisations, ours counts as well:

    in     normalising, padding and mirroring the images; the whitening; every step; the last test, with augmentation
    out    loading the images; making the network and the optimizers; the plain test after each epoch and what is
           printed of it; a whole training before the first that counts, which compiles and warms up

Two of ours are in that it has not: padding the test images, and reading the loss every `log_every` steps.
"""

import ast
import contextlib
import functools
import importlib.util
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch

from benchmarks.harness import ContenderError, Measurement, Stopwatch
from rlboard.errors import UsageError
from vision import train as module
from vision._data import Dataset, load_dataset

SCRIPT = "airbench94_muon.py"
SOURCE = f"github.com/KellerJordan/cifar10-airbench: {SCRIPT}"


def synchronize(device: str) -> None:
    """Waits until `device` has done what it was given; the CPU always has."""
    if device != "cpu":
        torch.accelerator.synchronize(torch.device(device))


class Clock:
    """Adds up the `seconds` from each `start` to the next `stop`, with all that the device was given in between."""

    def __init__(self, device: str) -> None:
        self.seconds = 0.0
        self._device = device
        self._begun: float | None = None

    def start(self) -> None:
        synchronize(self._device)
        self._begun = time.perf_counter()

    def stop(self) -> None:
        """Does nothing where the clock stands still."""
        if self._begun is not None:
            synchronize(self._device)
            self.seconds += time.perf_counter() - self._begun
            self._begun = None

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, during which the clock runs, and after which it does not."""

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self.start()
            answer = function(*args, **kwargs)
            self.stop()
            return answer

        return wrapper


@dataclass(frozen=True)
class Training:
    """What came of one training.

    Attributes:
        accuracy: of the test with augmentation, where there is one, in percent.
        plain: of the last plain test, in percent.
        seconds: by the clock of the module's docstring.
        whole: of all from the first step to the end of the last test; its work is the images trained on.
    """

    accuracy: float
    plain: float
    seconds: float
    whole: Measurement


def our_training(options: dict[str, Any]) -> Training:
    """Trains by `Config(**options)` and logs nothing; `device` is among the options, and none is `auto`."""
    clock = Clock(options["device"])
    parts: dict[str, Any] = {name: clock.timed(getattr(module, name)) for name in ("Batches", "whiten", "predict")}
    augmented_test, plain_test = parts["predict"], parts["predict"].__wrapped__

    def predict(*arguments: Any) -> torch.Tensor:
        clock.stop()
        return cast("torch.Tensor", (augmented_test if len(arguments) > 2 else plain_test)(*arguments))

    with mock.patch.multiple(module, **parts | {"predict": predict}):
        events = module.train(module.Config(**options))
        last = next(events)
        batch_size, watch = 0.0, Stopwatch()
        clock.start()
        for last in events:
            clock.stop()
            if "time/images" in last.scalars:
                batch_size = last.scalars["time/images"] / last.step
            clock.start()
        clock.stop()
    whole = watch.stop(work=last.step * batch_size)
    plain = last.scalars["Accuracy/val"]
    return Training(last.scalars.get("Accuracy/val_tta", plain), plain, clock.seconds, whole)


def check_script(path: Path) -> Path:
    """The script at `path`, or in the folder `path`. Raises UsageError where it is not airbench's."""
    script = path / SCRIPT if path.is_dir() else path
    try:
        with warnings.catch_warnings(action="ignore"):  # a backslash in its docstring
            tree = ast.parse(script.read_bytes())
    except (OSError, SyntaxError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--airbench {path}: {reason}: give a copy of {SOURCE}") from None
    names = {getattr(node, "name", None) or getattr(node, "id", None) for node in ast.walk(tree)}
    if missing := {"main", "CifarNet", "print_training_details", "time_seconds"} - names:
        raise UsageError(f"--airbench {path}: there is no {min(missing)} in it: give a copy of {SOURCE}")
    return script.absolute()


class Airbench:
    """The script at `path`, imported, with one network that is compiled once for all trainings, as its own main does.

    It has cuDNN search for its fastest algorithms; that is put back after each of its turns.
    """

    def __init__(self, path: Path) -> None:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        self._module = importlib.util.module_from_spec(spec)
        with mock.patch.object(sys, "argv", [str(path)]), cudnn_benchmark(False):  # it reads itself by that name
            spec.loader.exec_module(self._module)
        self._model = self._module.CifarNet().cuda().to(memory_format=torch.channels_last)
        self._model.compile(mode="max-autotune")

    def training(self, run: int | str) -> Training:
        """Run number `run`; `warmup` is the first, on random labels."""
        found: dict[str, float] = {}

        def take(variables: dict[str, Any], is_final_entry: bool) -> None:  # noqa: ARG001 - its names
            found.update(plain=100 * variables["val_acc"], seconds=variables["time_seconds"])

        watch = Stopwatch()
        with mock.patch.object(self._module, "print_training_details", take), cudnn_benchmark(True):
            accuracy = 100 * self._module.main(run, self._model)
        return Training(accuracy, found["plain"], found["seconds"], watch.stop(work=1))


@contextlib.contextmanager
def cudnn_benchmark(enabled: bool) -> Iterator[None]:
    kept = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = enabled
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = kept


def write_images(dataset: Dataset, directory: Path) -> None:
    """Writes `train.pt` and `test.pt` as airbench keeps them: images (N, H, W, C) uint8, labels (N,) int64, classes."""
    directory.mkdir()
    for name, (images, labels) in (("train", dataset.train), ("test", dataset.test)):
        kept = {"images": images.permute(0, 2, 3, 1).contiguous(), "labels": labels, "classes": list(dataset.classes)}
        torch.save(kept, directory / f"{name}.pt")


def in_turn(path: Path, options: dict[str, Any], count: int) -> Measurement:
    """`count` trainings of ours, by `options`, and of the script at `path`, one after the other, in this process.

    The columns are means of accuracies and medians of seconds, and the ratio of our seconds to airbench's.
    """
    if options["device"] != "cpu":
        torch.cuda.set_device(torch.device(options["device"]).index or 0)  # airbench takes the current one
    dataset = load_dataset(options["data"])
    if dataset.train.images.shape[1:] != (3, 32, 32) or len(dataset.classes) != 10:
        raise ContenderError(f"{dataset.name}: airbench94 takes 10 classes of images of 3 x 32 x 32")
    write_images(dataset, Path("cifar10"))

    airbench = Airbench(path)
    airbench.training("warmup")
    our_training(options | {"seed": 0})
    watch, ours, theirs = Stopwatch(), [], []
    for seed in range(1, count + 1):
        ours.append(our_training(options | {"seed": seed}))
        torch.manual_seed(seed)
        theirs.append(airbench.training(seed))
    our_seconds, their_seconds = ([each.seconds for each in side] for side in (ours, theirs))
    return watch.stop(
        work=2 * count,
        **{
            "mean_%": statistics.fmean(each.accuracy for each in ours),
            "median_s": statistics.median(our_seconds),
            "airbench94's_%": statistics.fmean(each.accuracy for each in theirs),
            "airbench94's_s": statistics.median(their_seconds),
            "times_its_s": statistics.median(our_seconds) / statistics.median(their_seconds),
            "in_pairs": statistics.median(our / their for our, their in zip(our_seconds, their_seconds, strict=True)),
        },
    )
