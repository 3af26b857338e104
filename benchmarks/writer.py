"""rlboard's writer against torch's SummaryWriter and tensorboardX: CPU time and bytes on the disk by kind of data.

    python -m benchmarks.writer --only scalars --only images

A library's time starts with its writer open and ends when that is closed and everything is on the disk; `training
thread` is the part of it that holds up training: the calls themselves, without other threads and closing.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.tensorboard
import torchvision.models

from benchmarks.harness import Benchmark, Function, Measurement, Stopwatch, main

Write = Callable[[Any], None]
"""Writes all of a benchmark's data with the writer it is given."""


def open_ours(directory: str) -> Any:
    from rlboard.writer import open_writer

    return open_writer(Path(directory))


def open_torch(directory: str) -> Any:
    return torch.utils.tensorboard.SummaryWriter(directory)


def open_tensorboardx(directory: str) -> Any:
    from tensorboardX import SummaryWriter

    return SummaryWriter(directory)


LIBRARIES = {"rlboard": open_ours, "torch": open_torch, "tensorboardX": open_tensorboardx}


def measure(library: str, prepare: Callable[[], Write], work: int, bytes_each: int = 0) -> Measurement:
    """What `library` needs to write what `prepare` makes: `work` items of `bytes_each` bytes in memory."""
    write = prepare()
    directory = tempfile.mkdtemp(dir=".")
    writer = LIBRARIES[library](directory)
    watch = Stopwatch()
    write(writer)
    watch.lap()
    writer.close()
    measurement = watch.stop(work=work)
    if dropped := getattr(writer, "dropped", 0):
        raise RuntimeError(f"{dropped} of its records were dropped")
    on_disk = sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())
    measurement.extra["bytes on disk each"] = on_disk / work
    if bytes_each:
        measurement.extra["MB per CPU s"] = bytes_each / measurement.cost / 1e6
    return measurement


def scalars(count: int) -> Write:
    def write(writer: Any) -> None:
        for step in range(count):
            writer.add_scalar("train/loss", 0.5, step)

    return write


METRICS = {f"train/metric_{index}": 0.1 * index for index in range(10)}


def ten_calls(count: int) -> Write:
    def write(writer: Any) -> None:
        for step in range(count // 10):
            for tag, value in METRICS.items():
                writer.add_scalar(tag, value, step)

    return write


def ten_at_once(count: int) -> Write:
    def write(writer: Any) -> None:
        for step in range(count // 10):
            writer.log(step, METRICS)

    return write


def series(count: int) -> Write:
    steps, values = np.arange(count), np.linspace(0, 1, count, dtype=np.float32)

    def write(writer: Any) -> None:
        writer.add_scalar_series("train/loss", steps, values)

    return write


def images(count: int) -> Write:
    """Large soft shapes with a little noise compress like photographs; plain noise would not compress at all."""
    torch.manual_seed(0)
    shapes = torch.nn.functional.interpolate(torch.rand(count, 3, 14, 14), size=224, mode="bicubic")
    pictures = (shapes + 0.02 * torch.randn(shapes.shape)).clamp(0, 1)

    def write(writer: Any) -> None:
        for step, picture in enumerate(pictures):
            writer.add_image("Input/samples", picture, step)

    return write


def histograms(count: int, size: int) -> Write:
    torch.manual_seed(0)
    values = torch.randn(size)

    def write(writer: Any) -> None:
        for step in range(count):
            writer.add_histogram("Weights/layer", values, step)

    return write


def embedding(points: int, dimensions: int) -> Write:
    torch.manual_seed(0)
    labels = torch.arange(points) % 10
    features = torch.randn(points, dimensions) + 12 * torch.eye(10, dimensions)[labels]
    sprites = torch.nn.functional.interpolate(torch.rand(points, 3, 4, 4), size=32, mode="bicubic").clamp(0, 1)

    def write(writer: Any) -> None:
        writer.add_embedding(features, [str(label) for label in labels.tolist()], sprites, global_step=0)

    return write


def graph(model: str, fast_path: bool) -> Write:
    """torch.jit cannot trace the fast path of attention."""
    network = getattr(torchvision.models, model)(weights=None).eval()
    inputs = torch.zeros(1, 3, 224, 224)

    def write(writer: Any) -> None:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        writer.add_graph(network, inputs)

    return write


def loop(library: str, metrics: int, blocks: int, steps: int, turns: int) -> Measurement:
    """Blocks of `steps` steps, each of which is `turns` turns of plain Python and logs `metrics` scalars.

    They take turns with blocks that log nothing, because a tenth of a step is less than what the speed of a shared
    machine varies by in a second.
    """
    writer = LIBRARIES[library](tempfile.mkdtemp(dir="."))
    values = dict(list(METRICS.items())[:metrics])
    at_once = library == "rlboard" and metrics > 1
    logging, overheads = [], []
    for block in range(blocks):
        watch = Stopwatch()
        for _ in range(steps):
            _spin(turns)
        silent = watch.stop(work=steps)

        watch = Stopwatch()
        for step in range(block * steps, (block + 1) * steps):
            _spin(turns)
            if at_once:
                writer.log(step, values)
            else:
                for tag, value in values.items():
                    writer.add_scalar(tag, value, step)
        watch.lap()
        writer.flush()
        logging.append(watch.stop(work=steps))
        overheads.append(logging[-1].cost / silent.cost - 1)
    writer.close()
    median = sorted(logging, key=lambda measurement: measurement.cost)[blocks // 2]
    median.extra["overhead %"] = 100 * statistics.median(overheads)
    return median


def _spin(turns: int) -> float:
    """Stands for a step of training. A wait by the clock would hide what a second thread takes from it."""
    x = 0.5
    for _ in range(turns):
        x = 3.9 * x * (1 - x)
    return x


def turns_in(seconds: float) -> int:
    """How many turns of `_spin` take `seconds` on this machine, at its best.

    By the wall clock, because some machines count CPU time in steps longer than a turn; nothing came between the best.
    """
    turns, best = 1_000, math.inf
    for _ in range(2_000):
        start = time.perf_counter()
        _spin(turns)
        best = min(best, time.perf_counter() - start)
    return round(turns * seconds / best)


def contender(
    library: str, prepare: Callable[..., Write], count: int, *arguments: int, bytes_each: int = 0, name: str = ""
) -> Function:
    """`library` writing `prepare(count, *arguments)`, warmed up by a few of the same."""
    few = 10  # at least the ten of a step
    return Function(
        name or library,
        partial(measure, library, partial(prepare, count, *arguments), count, bytes_each),
        partial(measure, library, partial(prepare, few, *arguments), few),
    )


def first_graph(name: str, library: str, model: str, fast_path: bool = True) -> Function:
    """`library` drawing its first graph, imports included, as a training run does."""
    return Function(name, partial(measure, library, partial(graph, model, fast_path), 1))


def benchmarks(quick: bool) -> list[Benchmark]:
    many, few, size, points, width = (200, 2, 1_000, 50, 8) if quick else (50_000, 50, 1_000_000, 10_000, 512)
    bulk, blocks, steps = (1_000, 2, 200) if quick else (5_000_000, 20, 2_000)
    turns = turns_in(20e-6)
    chosen = [
        Benchmark(
            "scalars",
            "scalar",
            [contender(library, scalars, many) for library in LIBRARIES],
            f"{many:,} calls of add_scalar",
        ),
        Benchmark(
            "ten-scalars",
            "scalar",
            [
                contender("rlboard", ten_at_once, 10 * many),
                contender("rlboard", ten_calls, many, name="rlboard, ten calls"),
                contender("torch", ten_calls, many),
                contender("tensorboardX", ten_calls, many),
            ],
            "ten scalars of one step, by rlboard's log(step, mapping)",
        ),
        Benchmark(
            "series",
            "scalar",
            [
                contender("rlboard", series, bulk),
                contender("torch", scalars, many),
                contender("tensorboardX", scalars, many),
            ],
            f"an array of {bulk:,} values by rlboard's add_scalar_series, {many:,} calls of add_scalar",
        ),
        Benchmark(
            "images",
            "image",
            [contender(library, images, few, bytes_each=3 * 224 * 224) for library in LIBRARIES],
            f"{few} images of 3 x 224 x 224 as float32; MB of pixels",
        ),
        Benchmark(
            "histograms",
            "histogram",
            [contender(library, histograms, few, size, bytes_each=4 * size) for library in LIBRARIES],
            f"{few} histograms of {size:,} values",
        ),
        Benchmark(
            "embedding",
            "point",
            [
                contender(library, embedding, points, width, bytes_each=4 * (width + 3 * 32 * 32))
                for library in LIBRARIES
            ],
            f"{points:,} points of {width} dimensions with labels and 32 x 32 sprites",
        ),
        Benchmark(
            "graph-resnet18",
            "graph",
            [first_graph(library, library, "resnet18") for library in LIBRARIES],
            "the first graph of a process",
        ),
        Benchmark(
            "graph-vit",
            "graph",
            [
                first_graph("rlboard", "rlboard", "vit_b_16"),
                first_graph("torch", "torch", "vit_b_16"),
                first_graph("torch, fast path off", "torch", "vit_b_16", fast_path=False),
                first_graph("tensorboardX, fast path off", "tensorboardX", "vit_b_16", fast_path=False),
            ],
            "vit_b_16, the first graph of a process",
        ),
    ]
    chosen += [
        Benchmark(
            f"loop-{metrics}",
            "step",
            [
                Function(
                    library,
                    partial(loop, library, metrics, blocks, steps, turns),
                    partial(loop, library, metrics, 1, 100, turns),
                )
                for library in LIBRARIES
            ],
            f"steps of 20 µs, each logging {metrics} scalar{'s' * (metrics > 1)}; overhead over equal steps without",
        )
        for metrics in (1, 5)
    ]
    return chosen


if __name__ == "__main__":
    raise SystemExit(main(benchmarks))
