"""`rlboard runs export` and `list` against TensorBoard's EventAccumulator.

    python -m benchmarks.runs                       # 5,000,000 points: EventAccumulator takes minutes
    python -m benchmarks.runs --points 100000

EventAccumulator reads and does nothing else. Ours is the whole command but for Python's start: it loads the compiled
reader, reads, sorts, and writes. `export` is of one run, and every value that comes out of either is compared with what
was logged, after the clock has stopped. `list` is of many runs of 3 tags with 200 points each.
"""

import argparse
import json
import resource
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Benchmark, Function, Measurement, Stopwatch, main
from rlboard.eventfile import EventFile

POINTS = 5_000_000
FORMATS = ("csv", "parquet", "json")


def points(count: int) -> dict[str, Any]:
    """What is logged: steps, seconds since 1970 with all their digits, and numbers that are float32."""
    step = np.arange(count)
    return {"step": step, "wall_time": 1.7e9 + 0.00137 * step, "value": np.sin(step).astype(np.float32).astype(float)}


def write_run(count: int) -> Path:
    """A run `logs/run` here, of one tag."""
    logged = points(count)
    with EventFile("logs/run") as file:
        file.scalar_series("reward", logged["step"], logged["value"], logged["wall_time"])
    return file.path


def check(columns: Any, count: int) -> None:
    for name, logged in points(count).items():
        if not np.array_equal(columns[name], logged):
            raise RuntimeError(f"{name} is not what was logged")


def export(extension: str, count: int) -> Measurement:
    import polars as pl

    from rlboard import cli

    write_run(count)
    watch = Stopwatch()
    if cli.main(["runs", "export", "--format", extension, "--output", "tables"]):
        raise RuntimeError("rlboard runs export failed")
    file = Path("tables") / f"scalars.{extension}"
    measurement = watch.stop(work=count, MB=file.stat().st_size / 1e6)
    reader: Any = {"csv": pl.read_csv, "parquet": pl.read_parquet, "json": pl.read_json}[extension]
    check(reader(file), count)
    return measurement


def event_accumulator(count: int) -> Measurement:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(write_run(count)), size_guidance={"scalars": 0})
    watch = Stopwatch()
    events.Reload()
    measurement = watch.stop(work=count)
    read = events.Scalars("reward")
    check({name: [getattr(event, name) for event in read] for name in ("step", "wall_time", "value")}, count)
    return measurement


def write_runs(count: int) -> list[Path]:
    """`count` runs in `logs/AGENT` here, all alike."""
    template = Path("template")
    with EventFile(template) as file:
        for tag in ("reward", "train/loss", "time/fps"):
            file.scalar_series(tag, np.arange(200), np.sin(np.arange(200)))
    facts = {"loop": "agents/agent", "config": {"seed": 1}, "seed": 1, "status": "completed", "best": {"reward": {}}}
    (template / "run.json").write_text(json.dumps(facts))
    return [Path(shutil.copytree(template, f"logs/AGENT/{number}")) for number in range(count)]


def list_runs(count: int) -> Measurement:
    from rlboard import cli

    write_runs(count)
    watch = Stopwatch()
    if cli.main(["runs", "list", "--sort", "best"]):
        raise RuntimeError("rlboard runs list failed")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return watch.stop(work=count, seconds=watch.cpu_seconds, MB=peak)


def accumulate_runs(count: int) -> Measurement:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directories = write_runs(count)
    watch = Stopwatch()
    for directory in directories:
        events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
        events.Reload()
        assert len(events.Scalars("reward")) == 200
    return watch.stop(work=count, seconds=watch.cpu_seconds)


def benchmarks(quick: bool, count: int = POINTS) -> list[Benchmark]:
    count = 1_000 if quick else count
    many, fewer, few = (20, 10, 5) if quick else (10_000, 2_000, 200)
    exporting = [Function(extension, partial(export, extension, count)) for extension in FORMATS]
    exporting.append(Function(event_accumulator.__name__, partial(event_accumulator, count)))
    listing = [Function(f"{each:,} runs", partial(list_runs, each)) for each in (many, fewer)]
    listing.append(Function(f"event_accumulator, {few:,} runs", partial(accumulate_runs, few)))
    return [
        Benchmark("export", "point", exporting, f"{count:,} points of one run"),
        Benchmark("list", "run", listing, "3 tags of 200 points"),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--points", type=int, default=POINTS)
    chosen, arguments = parser.parse_known_args()
    raise SystemExit(main(partial(benchmarks, count=chosen.points), arguments))
