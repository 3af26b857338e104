"""`read_scalars` against TensorBoard's EventAccumulator and tbparse: CPU time for each scalar of an event file.

    python -m benchmarks.reader
    python -m benchmarks.reader --full          # a million scalars in each file; the others take a minute a read

All read the whole file, every step and both checksums, and hand out the values tag by tag. Compiled loops are loaded
before the clock starts, as are the others' imports; what that costs is the benchmark `start`.
"""

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.harness import Benchmark, Command, Function, Measurement, Stopwatch, main
from rlboard.eventfile import EventFile, read_scalars, scan

FULL = 1_000_000
TAGS = {1: ["reward"], 10: [f"train/metric_{index}" for index in range(10)]}


def write_file(tags: Sequence[str], count: int) -> Path:
    """An event file here with `count` scalars in as many events, the tags in turn."""
    with EventFile(".") as file:
        for index in range(count):
            file.scalar(tags[index % len(tags)], math.sin(index), index // len(tags))
    return file.path


def ours(path: Path, tags: Sequence[str]) -> int:
    columns = read_scalars(path)
    return sum(len(columns[tag].value) for tag in tags)


def event_accumulator(path: Path, tags: Sequence[str]) -> int:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    return sum(len(events.Scalars(tag)) for tag in tags)


def tbparse(path: Path, tags: Sequence[str]) -> int:
    from tbparse import SummaryReader

    table = SummaryReader(str(path)).scalars
    return sum(len(series) for tag, series in table.groupby("tag") if tag in tags)


def measure(reader: Callable[[Path, Sequence[str]], int], tags: Sequence[str], count: int) -> Measurement:
    path = write_file(tags, count)
    watch = Stopwatch()
    read = reader(path, tags)
    measurement = watch.stop(work=count)
    if read != count:
        raise RuntimeError(f"read {read} of {count} scalars")
    return measurement


def warm_up(reader: Callable[[Path, Sequence[str]], int]) -> None:
    scan.compiled()
    tags = TAGS[10]
    reader(write_file(tags, 100), tags)


def contender(reader: Callable[[Path, Sequence[str]], int], tags: Sequence[str], count: int) -> Function:
    return Function(reader.__name__, partial(measure, reader, tags, count), partial(warm_up, reader))


def start(name: str, program: str) -> Command:
    """A fresh interpreter that gets ready to read."""
    return Command(name, [sys.executable, "-c", program], lambda _directory, _printed: 1)


def benchmarks(quick: bool, full: bool = False) -> list[Benchmark]:
    count = 1_000 if quick else FULL if full else FULL // 10
    reading = [
        Benchmark(
            f"reading {number} tag{'s' * (number > 1)}",
            "scalar",
            [contender(reader, tags, count) for reader in (ours, event_accumulator, tbparse)],
            f"{count:,} scalars",
        )
        for number, tags in TAGS.items()
    ]
    starting = [
        start("ours", "import rlboard.eventfile.scan; rlboard.eventfile.scan.compiled()"),
        start("ours, small files", "import rlboard.eventfile"),
        start("numba alone", "import numba"),
        start("event_accumulator", "import tensorboard.backend.event_processing.event_accumulator"),
        start("tbparse", "import tbparse"),
    ]
    return [*reading, Benchmark("start", "start", starting, "imports, and compiled loops from numba's cache")]


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--full"]
    raise SystemExit(main(partial(benchmarks, full="--full" in sys.argv[1:]), arguments))
