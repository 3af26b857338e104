"""`rlboard vision train`: loading against torchvision's transforms, the cost of logging, and accuracy over seeds.

    python -m benchmarks.vision                                        # loading and logging, on generated shapes
    python -m benchmarks.vision --data cifar10 --only laptop           # one preset: accuracy and CPU time of each seed
    python -m benchmarks.vision --data cifar10 --device cuda           # the presets for a GPU

Accuracies are those of the data that is given: name it beside the number. Trainings on the CPU use one thread, which
costs the least CPU time in all.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Benchmark, Function, Measurement, Stopwatch, main
from rlboard.cli import main as rlboard
from rlboard.events import Event
from rlboard.registry import TRACKS
from vision import train as module
from vision._data import Batches, load_dataset
from vision.train import Config, train

SEEDS = 5
CPU_PRESETS = ("laptop", "patient")
CUDA_PRESETS = ("speedrun", "lesson", "accurate")


def our_batches(epochs: int, batch_size: int, cutout: int) -> Measurement:
    torch.set_num_threads(1)
    data = load_dataset("shapes")
    batches = Batches(data.train, data.mean, data.std, batch_size, augment=True, cutout=cutout, channels_last=True)
    watch = Stopwatch()
    for _ in range(epochs):
        for _ in batches:
            pass
    return watch.stop(work=epochs * len(batches) * batch_size)


def torchvision_batches(epochs: int, batch_size: int, cutout: int) -> Measurement:
    """In this process: worker processes hide the time, they do not save it."""
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.transforms.functional import to_pil_image

    torch.set_num_threads(1)
    data = load_dataset("shapes")
    steps = [
        transforms.RandomCrop(32, padding=4, padding_mode="reflect"),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(data.mean.tolist(), data.std.tolist()),
    ]
    if cutout:
        area = (cutout / 32) ** 2
        steps.append(transforms.RandomErasing(p=1, scale=(area, area), ratio=(1, 1)))
    transform = transforms.Compose(steps)
    pairs = [(to_pil_image(image), int(label)) for image, label in zip(*data.train, strict=True)]

    class Images(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
        def __len__(self) -> int:
            return len(pairs)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            image, label = pairs[index]
            return transform(image), label

    loader = DataLoader(Images(), batch_size, shuffle=True, drop_last=True)
    watch = Stopwatch()
    for _ in range(epochs):
        for _ in loader:
            pass
    return watch.stop(work=epochs * len(loader) * batch_size)


def logged(options: dict[str, Any], level: str) -> Measurement:
    """Trains by the command line; logging is what happens outside of the loop, from the first event on."""
    original, inside, begun = module.train, 0.0, 0.0

    def timed(config: Config) -> Iterator[Event]:
        nonlocal inside, begun
        events = original(config)
        yield next(events)  # the data are there
        begun = time.process_time()
        while True:
            start = time.process_time()
            event = next(events, None)
            inside += time.process_time() - start
            if event is None:
                return
            yield event

    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    module.train = timed
    watch = Stopwatch()
    code = rlboard(["vision", "train", *arguments, f"--log={level}"])
    whole = time.process_time() - begun
    if code:
        raise RuntimeError(f"rlboard vision train ended with exit code {code}")
    share = 100 * (whole / inside - 1)
    return watch.stop(work=1, **{"training_s": inside, "logging_s": whole - inside, "logging_%": share})


def seeds(preset: str, data: str, device: str, count: int) -> Measurement:
    """Trains `count` seeds; the columns are the accuracies and what a training took, without data and imports."""
    (loop,) = (loop for track in TRACKS for loop in track.loops() if loop.name == "train")
    accuracies, plain, seconds, total = [], [], [], 0.0
    for seed in range(1, count + 1):
        options: dict[str, Any] = loop.defaults(preset) | {"data": data, "device": device, "seed": seed}
        options["threads"] = 1 if device == "cpu" else 0
        events = train(Config(**options))
        next(events)
        watch = Stopwatch()
        for event in events:
            if "Accuracy/val" in event.scalars:
                accuracy = event.scalars["Accuracy/val"]
                with_tta = event.scalars.get("Accuracy/val_tta", accuracy)
            total = max(total, event.scalars.get("time/images", 0.0))
        taken = watch.stop(work=1)
        accuracies.append(with_tta)
        plain.append(accuracy)
        seconds.append(taken.cpu_seconds if device == "cpu" else taken.wall_seconds)
        print(f"{preset}, seed {seed}: {accuracy:.2f} %, {seconds[-1]:.1f} s", file=sys.stderr, flush=True)
    return Measurement(
        count,
        sum(seconds),
        sum(seconds),
        extra={
            "mean %": statistics.fmean(accuracies),
            "without TTA": statistics.fmean(plain),
            "lowest %": min(accuracies),
            "highest %": max(accuracies),
            "median s": statistics.median(seconds),
            "images per s": total / statistics.median(seconds),
        },
    )


def benchmarks(quick: bool, data: str = "", device: str = "cpu", count: int = SEEDS) -> list[Benchmark]:
    epochs, batch_size = (1, 512) if quick else (5, 256)
    options: dict[str, Any] = {"data": data or "shapes", "threads": 1}
    options |= {"images": 640, "epochs": 1} if quick else {}
    return [
        *(
            Benchmark(
                "loading-cutout" if cutout else "loading",
                "image",
                [
                    Function("rlboard", partial(our_batches, epochs, batch_size, cutout)),
                    Function("torchvision", partial(torchvision_batches, 1, batch_size, cutout)),
                ],
                f"20,000 images: crop, flip, {'cutout, ' if cutout else ''}normalise, batches of {batch_size}",
            )
            for cutout in (0, 8)
        ),
        Benchmark(
            "logging",
            "training",
            [
                Function("--log minimal", partial(logged, options, "minimal")),
                Function("--log full", partial(logged, options, "full")),
            ],
            f"the default training on {Path(options['data']).name}, one thread",
        ),
        *(
            Benchmark(
                preset,
                "training",
                [Function("rlboard", partial(seeds, preset, data, device, count))],
                f"--preset {preset} on {Path(data).name}, {device}, {count} seeds",
            )
            for preset in (CPU_PRESETS if device == "cpu" else CUDA_PRESETS)
            if data
        ),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--data", default="")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    own, others = parser.parse_known_args()
    if own.data and Path(own.data).exists():
        own.data = str(Path(own.data).absolute())  # each contender runs in a directory of its own
    chosen: Callable[[bool], list[Benchmark]] = partial(benchmarks, data=own.data, device=own.device, count=own.seeds)
    raise SystemExit(main(chosen, others))
