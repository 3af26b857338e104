"""Fair comparisons on a machine that is not quiet.

Contenders run in turn (A B A B ...), so that drift falls on all alike, each time in a fresh process. What
counts is the CPU time of all threads per unit of work; the first contender is the reference, by which the
others are divided. A new benchmark is a module like this one, run by `python -m benchmarks.strings`:

    from functools import partial
    from benchmarks.harness import Benchmark, Function, Measurement, Stopwatch, main

    def join(count: int) -> Measurement:
        numbers = [str(number) for number in range(count)]     # preparation is not timed
        watch = Stopwatch()
        "".join(numbers)
        return watch.stop(work=count)

    def benchmarks(quick: bool) -> list[Benchmark]:
        count = 1_000 if quick else 1_000_000
        ours, theirs = (Function(f.__name__, partial(f, count)) for f in (join, concatenate))
        return [Benchmark("strings", "number", [ours, theirs])]

    if __name__ == "__main__":
        raise SystemExit(main(benchmarks))

Packages that only some contenders need are imported inside their functions: a missing one is then one row of
the table.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import gc
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

NOT_INSTALLED = "not installed: pip install -e '.[bench]'"
SLOW_IMPORTS = ("torch", "torch.utils.tensorboard", "torchvision", "gymnasium", "numba")


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One run of one contender. All times in seconds."""

    work: float
    cpu_seconds: float  # user and system time of all threads, for a command of its children too
    wall_seconds: float
    training_seconds: float | None = None  # CPU time of the calling thread alone, until Stopwatch.lap
    extra: dict[str, float] = dataclasses.field(default_factory=dict)  # further columns: header -> value
    given_up: str = ""  # why the work was not finished; the times are what it had taken until then

    @property
    def cost(self) -> float:
        """CPU seconds per unit of work; infinite where it was given up."""
        return math.inf if self.given_up else self.cpu_seconds / self.work


class Stopwatch:
    """Runs from the moment it is made; `lap` ends what counts as training, `stop` ends the whole."""

    def __init__(self) -> None:
        gc.collect()  # the garbage of the preparation is not the contender's
        time.sleep(0.05)  # nor are its threads that still wait, spinning, for more of it
        self._lap: float | None = None
        self._wall = time.perf_counter()
        self._cpu = time.process_time()
        self._thread = time.thread_time()

    def lap(self) -> None:
        """What follows, such as closing a file, counts in the totals but not as training."""
        self._lap = time.thread_time() - self._thread

    @property
    def cpu_seconds(self) -> float:
        """CPU time of all threads so far."""
        return time.process_time() - self._cpu

    def stop(self, work: float, **extra: float) -> Measurement:
        """The measurement so far; `extra` becomes further columns (underscores are shown as spaces)."""
        training = time.thread_time() - self._thread if self._lap is None else self._lap
        cpu, wall = self.cpu_seconds, time.perf_counter() - self._wall
        return Measurement(work, cpu, wall, training, {name.replace("_", " "): extra[name] for name in extra})


class ContenderError(Exception):
    """A contender could not run; the message becomes its row."""


class Contender(Protocol):
    """Whatever has a name and can be measured once, in an empty directory that is removed afterwards."""

    @property
    def name(self) -> str: ...

    def measure(self, directory: Path) -> Measurement:
        """Raises ContenderError, in whose message the reason stands."""
        ...


@dataclasses.dataclass(frozen=True)
class Function:
    """A function that times itself by a Stopwatch, in a fresh process whose working directory is empty.

    Both callables are pickled: a function of a module's top level, or a `functools.partial` of one. The message of a
    ContenderError that they raise becomes the row as it is.
    """

    name: str
    function: Callable[[], Measurement]
    warm_up: Callable[[], object] | None = None  # called first: imports, caches, compilation

    def measure(self, directory: Path) -> Measurement:
        context = _fresh_processes()
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_report, args=(self, directory, sender))
        process.start()
        sender.close()
        try:
            answer: Measurement | str = receiver.recv()
        except EOFError:
            answer = ""
        process.join()
        receiver.close()
        if isinstance(answer, str):
            raise ContenderError(answer or f"failed: its process ended with exit code {process.exitcode}")
        return answer


@functools.cache
def _fresh_processes() -> multiprocessing.context.ForkServerContext:
    """Forks from a server that has imported what this process has that is slow to import, but has run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([name for name in SLOW_IMPORTS if name in sys.modules])
    return context


def _report(contender: Function, directory: Path, sender: multiprocessing.connection.Connection) -> None:
    gc.freeze()  # collections leave alone what the server imported, instead of copying its memory
    os.chdir(directory)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        if contender.warm_up is not None:
            contender.warm_up()
        sender.send(contender.function())
    except ModuleNotFoundError as error:
        sender.send(f"{NOT_INSTALLED} ({error.name})")
    except ContenderError as error:
        sender.send(str(error))
    except Exception as error:  # noqa: BLE001 - whatever it is becomes the contender's row
        first_line = str(error).strip().partition("\n")[0]
        sender.send(f"failed: {type(error).__name__}: {first_line}")


@dataclasses.dataclass(frozen=True)
class Command:
    """A whole process, interpreter start and imports included, run in an empty working directory."""

    name: str
    argv: Sequence[str]
    work: Callable[[Path, str], float]  # from its working directory and what it printed

    def measure(self, directory: Path) -> Measurement:
        wall, cpu = time.perf_counter(), _cpu_seconds_of_children()
        try:
            done = subprocess.run(self.argv, cwd=directory, capture_output=True, text=True, check=False)
        except OSError as error:
            raise ContenderError(f"failed: {error}") from error
        cpu, wall = _cpu_seconds_of_children() - cpu, time.perf_counter() - wall
        if done.returncode != 0:
            reason = done.stderr.strip().rpartition("\n")[2]
            missing = reason.startswith("ModuleNotFoundError")
            what = NOT_INSTALLED if missing else f"failed: exit code {done.returncode}"
            raise ContenderError(f"{what} ({reason})")
        return Measurement(self.work(directory, done.stdout), cpu, wall)


def _cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Contenders that do the same `unit` of work; the first is the reference."""

    name: str
    unit: str
    contenders: Sequence[Contender]
    note: str = ""  # sizes and circumstances, shown in the table's title


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a benchmark: in `measurements` or in `errors` by contender, `order` as they were run."""

    benchmark: Benchmark
    order: list[str]
    measurements: dict[str, list[Measurement]]
    errors: dict[str, str]

    def ratio_of_medians(self, name: str) -> float:
        """How many times the reference's cost a unit of work costs contender `name`."""
        return self._median_cost(name) / self._median_cost(self.reference)

    def median_ratio(self, name: str) -> float:
        """The same as the median over rounds: contender and reference ran at nearly the same time."""
        pairs = zip(self.measurements[name], self.measurements[self.reference], strict=True)
        return statistics.median(theirs.cost / ours.cost for theirs, ours in pairs if not ours.given_up)

    @property
    def reference(self) -> str:
        return self.benchmark.contenders[0].name

    @property
    def has_reference(self) -> bool:
        """Whether there is something to compare with: the reference finished more than half of its runs."""
        return self.reference in self.measurements and self._median_cost(self.reference) < math.inf

    def _median_cost(self, name: str) -> float:
        return statistics.median(measurement.cost for measurement in self.measurements[name])


def run(benchmark: Benchmark, repeats: int) -> Result:
    """Measures every contender `repeats` times in turn; one that fails is not asked again."""
    result = Result(benchmark, [], {contender.name: [] for contender in benchmark.contenders}, {})
    for _, contender in itertools.product(range(repeats), benchmark.contenders):
        if contender.name in result.errors:
            continue
        with tempfile.TemporaryDirectory(prefix="rlboard-benchmark-") as directory:
            result.order.append(contender.name)
            try:
                result.measurements[contender.name].append(contender.measure(Path(directory)))
            except ContenderError as error:
                result.errors[contender.name] = str(error)
                del result.measurements[contender.name]
    return result


def markdown(result: Result) -> str:
    """The result as a Markdown table under a bold title."""
    benchmark, unit = result.benchmark, result.benchmark.unit
    measured = list(itertools.chain.from_iterable(result.measurements.values()))
    extra = list(dict.fromkeys(name for measurement in measured for name in measurement.extra))
    with_training = any(measurement.training_seconds is not None for measurement in measured)
    compared = len(benchmark.contenders) > 1 and result.has_reference
    with_rate = any(measurement.work != 1 for measurement in measured)
    header = ["", f"CPU per {unit}", "min – max", *[f"{unit}s per CPU s"] * with_rate, "wall"]
    header += ["training thread"] * with_training + extra
    header += [f"× {result.reference}", "× in pairs"] * compared
    rows = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for contender in benchmark.contenders:
        name = contender.name
        if name in result.errors:
            rows.append([name, result.errors[name].replace("|", "\\|")] + [""] * (len(header) - 2))
            continue
        runs = result.measurements[name]
        costs = [each.cost for each in runs]
        given_up = [each.given_up for each in runs if each.given_up]
        label = f"{name} ({given_up[0]}: {len(given_up)} of {len(runs)} runs)" if given_up else name
        row = [label, duration(statistics.median(costs)), f"{duration(min(costs))} – {duration(max(costs))}"]
        if with_rate:
            row.append(number(1 / statistics.median(costs)))
        row.append(duration(statistics.median(each.wall_seconds / each.work for each in runs)))
        if with_training:
            training = [each.training_seconds / each.work for each in runs if each.training_seconds is not None]
            row.append(duration(statistics.median(training)) if training else "")
        for column in extra:
            values = [each.extra[column] for each in runs if column in each.extra]
            row.append(number(statistics.median(values)) if values else "")
        if compared:
            row += [number(result.ratio_of_medians(name)), number(result.median_ratio(name))]
        rows.append(row)
    runs_each = max(map(len, result.measurements.values()), default=0)
    note = f"{benchmark.note}; " if benchmark.note else ""
    title = f"**{benchmark.name}**: {note}{runs_each} run{'s' * (runs_each != 1)} each, in turn"
    return "\n".join([title, "", *("| " + " | ".join(row) + " |" for row in rows)])


def duration(seconds: float) -> str:
    """Three significant digits and the unit: `1.70 µs`."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= scale:
            return f"{number(seconds / scale)} {unit}"
    return f"{number(seconds / 1e-9)} ns"


def number(value: float) -> str:
    """Three significant digits, thousands apart: `12,300`, `135`, `1.70`, `0.0720`."""
    if value == 0:
        return "0"
    if math.isinf(value):
        return "∞"
    digits = 2 - int(f"{value:.2e}".partition("e")[2])
    return f"{round(value, digits):,.{max(digits, 0)}f}"


def machine() -> str:
    """One line: what ran here, with which versions, and when."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    versions = [f"Python {platform.python_version()}"]
    for package in ("torch", "numpy", "tensorboard"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    return f"{model}, {os.cpu_count()} cores, {', '.join(versions)}, {today}"


def main(benchmarks: Callable[[bool], list[Benchmark]], argv: Sequence[str] | None = None) -> int:
    """The command line of a benchmark module: prints Markdown and returns 1 if a reference failed, else 0.

    `benchmarks(quick)` returns the module's benchmarks, small ones if `quick`.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, metavar="N", help="runs of each contender (5; quick: 1)")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run at all?")
    parser.add_argument("--only", action="append", metavar="NAME", help="this benchmark alone; can be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single measurement there")
    options = parser.parse_args(argv)
    repeats = options.repeats if options.repeats is not None else (1 if options.quick else 5)
    if repeats < 1:
        parser.error("--repeats: at least 1")
    chosen = benchmarks(options.quick)
    if options.only:
        names = [benchmark.name for benchmark in chosen]
        if unknown := set(options.only) - set(names):
            parser.error(f"--only {min(unknown)}: there is {', '.join(names)}")
        chosen = [benchmark for benchmark in chosen if benchmark.name in options.only]

    print(f"{machine()}\n")
    results = []
    for benchmark in chosen:
        print(f"{benchmark.name} ...", file=sys.stderr)
        results.append(run(benchmark, repeats))
        print(markdown(results[-1]) + "\n", flush=True)
    if options.json:
        options.json.write_text(json.dumps(as_json(results), indent=1) + "\n", encoding="utf-8")
    return int(not all(result.has_reference for result in results))


def as_json(results: Sequence[Result]) -> dict[str, object]:
    """Everything measured, ready for `json.dumps`."""
    return {
        "machine": machine(),
        "benchmarks": [
            {
                "name": result.benchmark.name,
                "unit": result.benchmark.unit,
                "order": result.order,
                "errors": result.errors,
                "measurements": {
                    name: [dataclasses.asdict(measurement) for measurement in measurements]
                    for name, measurements in result.measurements.items()
                },
            }
            for result in results
        ],
    }
