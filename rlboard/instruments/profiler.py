"""Where the time of a step goes: `--profile`, by torch.profiler.

What a loop does for one event is one step of the profile. Two cycles are recorded, each after a step that is left alone
and one that warms the profiler up; then the run goes on as if nothing had been. The parts of a step are the spans that
a loop marks with `record_function("forward")`; `logging` is what the instruments do with its event, and `other` is what
is left. On a CUDA device a span is the time in which the CPU starts the work: the kernels have a table of their own.

The CUDA part follows torch's documentation and has not been run on a GPU yet.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from rlboard.config import printable
from rlboard.devices import peak_memory, resolve_device
from rlboard.events import Events
from rlboard.files import replacing
from rlboard.instruments.drawing import pixels
from rlboard.profiler.traces import ON_DEVICE, OPERATOR, Trace, read_trace
from rlboard.profiler.views import WHOLE, operators, steps

if TYPE_CHECKING:
    from rlboard.run import Run

WAIT, WARMUP, ACTIVE, CYCLES = 1, 1, 3, 2
LONGEST_TABLE = 30
MEMORY_EVENTS = 100_000
"""How many allocations and releases a snapshot of CUDA's memory tells of."""

Spans = Mapping[str, float]
"""What the parts of one step took, in milliseconds; together they are the step."""


def profiler(events: Events, run: Run) -> Events:
    """Profile, where `--profile` asks for it, and always for a loop whose module says `PROFILED = True`.

    It is the innermost instrument, so that a step is the loop's own work and, as `logging`, what becomes of its event.
    A profiler or a disk that fails costs the profile, not the run.
    """
    if run.options.profile or getattr(run.loop.load(), "PROFILED", False):
        yield from islice(events, 1)  # it presents the model: nothing is done yet
        yield from _profiled(events, run)
    yield from events


def _profiled(events: Events, run: Run) -> Events:
    """The first events, as many as there are steps to profile."""
    session = Session(run)
    try:
        session.attempt(session.start)
        while not session.ended and (event := next(events, None)):
            with record_function("logging"):
                yield event
            session.steps.append(event.step)
            session.attempt(session.profile.step)
        session.attempt(session.finish)
    finally:
        session.close()


class Session:
    """The profile of one run.

    Attributes:
        profile: torch's, whose steps are counted from 0 on.
        steps: of the run, for each of the profile's.
        measured: the run's step, and where its time went, of each that was recorded.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.directory = run.directory / "profile"
        self.device = resolve_device(str(run.hyperparameters.get("device", "cpu")))
        self.on_cuda = self.device.type == "cuda"
        self.profile = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_cuda else [])],
            schedule=schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=CYCLES),
            on_trace_ready=self._save,
            record_shapes=True,
            profile_memory=True,
        )
        self.steps: list[int] = []
        self.measured: list[tuple[int, Spans]] = []
        self.cycles = 0
        self.started = self.failed = False

    @property
    def ended(self) -> bool:
        return self.failed or len(self.steps) == CYCLES * (WAIT + WARMUP + ACTIVE)

    def attempt(self, action: Callable[[], None]) -> None:
        """Does it, unless something has failed; a failure is a warning, and the last that is heard of the profile."""
        if self.failed:
            return
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Warning: Profiler clears events at the end of each cycle")
                action()
        except Exception as error:  # noqa: BLE001 - any disk, any driver
            self.failed = True
            reason = f"{type(error).__name__}: {printable(error, 200)}"
            warnings.warn(f"the run goes on without its profile: {reason}", RuntimeWarning, stacklevel=2)

    def start(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or torch's tracer tells of itself on standard error
        self.started = True
        if self.on_cuda:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        self.profile.start()

    def finish(self) -> None:
        """Ends the profile, saves the cycle that a short run has begun, and says what was found."""
        self.started = False
        self.profile.stop()
        if self.on_cuda:
            self.directory.mkdir(exist_ok=True)
            with replacing(self.directory / "memory_snapshot.pickle", durable=False) as file:
                torch.cuda.memory._dump_snapshot(file.name)  # type: ignore[no-untyped-call]
        Console(soft_wrap=True, highlight=False).print(self._summary(), markup=False)

    def close(self) -> None:
        """Stops whatever still records, and saves nothing."""
        self.profile.on_trace_ready = None
        with contextlib.suppress(Exception):  # it may have failed in any state
            if self.started:
                self.profile.stop()
        with contextlib.suppress(Exception):
            if self.on_cuda:
                torch.cuda.memory._record_memory_history(enabled=None)

    def _save(self, ready: profile) -> None:
        """Writes the cycle that has been recorded: a file, and what the tabs show of it."""
        self.directory.mkdir(exist_ok=True)
        self.cycles += 1
        path = self.directory / f"cycle{self.cycles}.trace.json.gz"
        with tempfile.TemporaryDirectory() as folder:
            raw = Path(folder, "trace.json")  # torch packs a file a line at a time, which takes ten times as long
            ready.export_chrome_trace(str(raw))
            content = raw.read_bytes()
            trace = read_trace(raw)
        with replacing(path, durable=False) as file:
            file.write(gzip.compress(content, 6))
        found = spans_of(trace)  # in a run that has ended also of the step that no event ends
        recorded = [(step, found[number]) for number, step in enumerate(self.steps) if number in found]
        if not recorded:
            path.unlink()
            return
        self.measured += recorded
        writer, last = self.run.writer, recorded[-1][0]
        for step, spans in recorded:
            scalars = {f"Profile/{name}_ms": duration for name, duration in spans.items()}
            writer.log(step, scalars | {"Profile/step_ms": sum(spans.values())})
        writer.log(last, {"Profile/peak_memory_MB": 1024 * peak_memory(self.device)})
        tables = [span_table([spans for _, spans in recorded]), *operator_tables(trace)]
        where = (
            f"Cycle {self.cycles}, steps {recorded[0][0]:,} to {last:,}; its trace: `{self.directory.name}/{path.name}`"
        )
        writer.add_text("Profile/operators", "\n\n".join([where, *tables]), last)
        writer.add_image("Profile/spans", span_figure(self.measured), last, dataformats="HWC")

    def _summary(self) -> str:
        if not self.measured:
            return f"profile: none, because the run has ended at the first {len(self.steps)} of its steps"
        wanted, count = CYCLES * ACTIVE, len(self.measured)
        seen = f"{count} steps" if count == wanted else f"{count} of {wanted} steps, because the run has ended"
        spans = mean_spans([spans for _, spans in self.measured])
        total = sum(spans.values())
        shares = ", ".join(f"{name} {100 * duration / total:.0f} %" for name, duration in spans.items())
        return f"profile: {seen}, {total:.4g} ms each: {shares}; see {self.directory}"


def spans_of(trace: Trace) -> dict[int, Spans]:
    """Where the time of every step went, by the number of the step: its spans in order, and `other` last."""
    return {
        int(step.name.rpartition(" ")[2]): {name: time / 1000 for name, time in step.spans.items()}
        for step in steps(trace)
        if step.name != WHOLE
    }


def mean_spans(each: Sequence[Spans]) -> Spans:
    """Of every span the mean over all steps, also over those that have none of it; the longest first."""
    names = dict.fromkeys(name for spans in each for name in spans)
    means = {name: fmean(spans.get(name, 0.0) for spans in each) for name in names}
    return dict(sorted(means.items(), key=lambda item: -item[1]))


def span_table(each: Sequence[Spans]) -> str:
    """The mean step as a Markdown table."""
    means = mean_spans(each)
    total = sum(means.values())
    rows = [f"| {name} | {duration:.3f} | {100 * duration / total:.1f} % |" for name, duration in means.items()]
    return "\n".join(["| span | ms a step | share |", "|---|---:|---:|", *rows, f"| **step** | {total:.3f} | |"])


def operator_tables(trace: Trace) -> list[str]:
    """The operators of the CPU, and the kernels of a GPU where there are any, as Markdown tables, the longest first.

    The self time of an operator is without the operators that it calls; its share is that of all self times.
    """
    rows = operators(trace, by_shape=False)["rows"]
    kinds = {"operator": (OPERATOR,), "kernel": ON_DEVICE}
    chosen = {title: [row for row in rows if row["category"] in kind] for title, kind in kinds.items()}
    return [_table(title, found) for title, found in chosen.items() if found]


def _table(title: str, found: Sequence[Mapping[str, Any]]) -> str:
    everything = sum(row["self"] for row in found)
    rows = [
        f"| `{printable(row['name'], 80).replace('|', '∣')}` | {row['calls']:,} | {row['self'] / 1000:.3f} "
        f"| {row['total'] / 1000:.3f} | {100 * row['self'] / everything:.1f} % |"
        for row in found[:LONGEST_TABLE]
    ]
    more = [f"\n{len(found) - LONGEST_TABLE} more are shorter."] if len(found) > LONGEST_TABLE else []
    head = [f"| {title} | calls | self, ms | total, ms | share |", "|---|---:|---:|---:|---:|"]
    return "\n".join([*head, *rows, *more])


def span_figure(recorded: Sequence[tuple[int, Spans]]) -> NDArray[np.uint8]:
    """A bar a step, of its spans one upon the other, (height, width, 3)."""
    from matplotlib.figure import Figure  # half a second, for those alone who profile

    figure = Figure((7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    places = range(len(recorded))
    height = np.zeros(len(recorded))
    names = dict.fromkeys(name for _, spans in recorded for name in spans if name != "other")
    for name in [*names, "other"]:
        durations = np.array([spans.get(name, 0.0) for _, spans in recorded])
        axes.bar(places, durations, 0.7, height, label=name, color="lightgrey" if name == "other" else None)
        height += durations
    axes.set_xticks(places, [f"{step:,}" for step, _ in recorded])
    axes.set_xlabel("step")
    axes.set_ylabel("ms")
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False)  # as they lie on each other
    return pixels(figure)
