"""What a checkpoint costs, and how soon a resumed run is where a fresh one would be.

    python -m benchmarks.resume

`saving` is a checkpoint of a run that trains: state, hash, and both forced to the disk. Its share of training is its
wall time over the interval, 30 s by default, and longer where it would be more than 2 %. `starting` is the time from
the start of a process to the first line of new results: 20 episodes of REINFORCE, one epoch of 640 shapes.
"""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from benchmarks.harness import Benchmark, Contender, ContenderError, Function, Measurement, Stopwatch, main
from rlboard.checkpoint import CHECKPOINT
from rlboard.config import Value
from rlboard.instruments.checkpoints import SHARE, Keeper
from rlboard.registry import find_loop
from rlboard.run import RunOptions, Stop, begin, open_run

INTERVAL = float(RunOptions().save_every)  # seconds
REINFORCE = ("reinforce", "--engine", "gym", "--episodes", "100000", "--log", "minimal")
VISION = ("vision", "train", "--data", "shapes", "--images", "640", "--epochs", "1000", "--picture-every", "1000")
FIRST_LINE = {"reinforce": "# of episode", "vision": "epoch "}


def saving(name: str, options: Mapping[str, Value], count: int) -> Measurement:
    """`count` checkpoints of a run of the loop `name`, one after the other."""
    loop = find_loop(name)
    config = loop.load().Config(**{**loop.defaults(), **options})
    events = begin(loop, config)
    with open_run(loop, config, RunOptions(), [], stop=Stop()) as run:
        keeper = Keeper(run)
        for event in islice(events, 3):  # the optimizer has its state
            keeper.take(event)
        watch = Stopwatch()
        for _ in range(count):
            keeper.event = event
            keeper.save()
        wall = watch.stop(work=count).wall_seconds / count
        size = (run.directory / CHECKPOINT).stat().st_size / 1e6
        return watch.stop(work=count, MB=size, **{"%_of_training": 100 * wall / max(INTERVAL, wall / SHARE)})


@dataclass(frozen=True)
class UntilTheFirstLine:
    """A process, from its start until it has printed a line of new results; then it is killed.

    `resumed` says that it goes on with a run, which another process has begun before the clock starts.
    """

    name: str
    command: Sequence[str]
    resumed: bool

    def measure(self, directory: Path) -> Measurement:
        again = ["--resume"] if self.resumed else []
        command = [sys.executable, "-m", "rlboard", *self.command, "--log-dir", "logs", "--save-every", "0"]
        if self.resumed:
            self._until_the_line(command, directory)
        return self._until_the_line([*command, *again], directory)

    def _until_the_line(self, command: Sequence[str], directory: Path) -> Measurement:
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        found = any(line.startswith(FIRST_LINE[self.command[0]]) for line in lines)
        wall = time.perf_counter() - began
        process.kill()
        _, _, usage = os.wait4(process.pid, 0)
        if not found:
            raise ContenderError("failed: it ended before it had results")
        return Measurement(1, usage.ru_utime + usage.ru_stime, wall)


def benchmarks(quick: bool) -> list[Benchmark]:
    count = 2 if quick else 20
    shapes: dict[str, Value] = {"data": "shapes", "images": 640}
    trained: dict[str, tuple[str, Mapping[str, Value]]] = {
        "reinforce": ("agents/reinforce", {"engine": "gym"}),
        "vision, laptopnet": ("vision/train", shapes),
        "vision, resnet18": ("vision/train", {**shapes, "model": "resnet18", "batch_size": 16, "optimizer": "adamw"}),
    }
    savers = [Function(name, partial(saving, *each, count)) for name, each in trained.items()]
    starts: dict[str, Sequence[Contender]] = {
        name: [UntilTheFirstLine("fresh", command, False), UntilTheFirstLine("resumed", command, True)]
        for name, command in (("reinforce", REINFORCE), ("vision", VISION))
    }
    return [
        Benchmark("saving", "checkpoint", savers, f"one in {INTERVAL:g} s"),
        *(Benchmark(f"starting-{name}", "start", contenders) for name, contenders in starts.items()),
    ]


if __name__ == "__main__":
    raise SystemExit(main(benchmarks))
