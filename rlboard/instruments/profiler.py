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
import json
import os
import tempfile
import warnings
from collections import defaultdict
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

if TYPE_CHECKING:
    from rlboard.run import Run

WAIT, WARMUP, ACTIVE, CYCLES = 1, 1, 3, 2
STEP = "ProfilerStep#"
"""What torch calls a step; its number, from 0 on, follows."""
LONGEST_TABLE = 30
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
ROUNDING = 0.01
"""Microseconds by which an event may seem to begin before the one ahead of it has ended; torch rounds to 0.001."""
MEMORY_EVENTS = 100_000
"""How many allocations and releases a snapshot of CUDA's memory tells of."""

Trace = Sequence[Mapping[str, Any]]
"""The events of a Chrome trace: name, category `cat`, thread `tid`, start `ts` and duration `dur` in microseconds."""
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
        trace = json.loads(content)["traceEvents"]
        with replacing(path, durable=False) as file:
            file.write(gzip.compress(content, 6))
        found = spans_of(trace)  # in a run that has ended also of the step that no event ends
        steps = [(step, found[number]) for number, step in enumerate(self.steps) if number in found]
        if not steps:
            path.unlink()
            return
        self.measured += steps
        writer, last = self.run.writer, steps[-1][0]
        for step, spans in steps:
            scalars = {f"Profile/{name}_ms": duration for name, duration in spans.items()}
            writer.log(step, scalars | {"Profile/step_ms": sum(spans.values())})
        writer.log(last, {"Profile/peak_memory_MB": 1024 * peak_memory(self.device)})
        tables = [span_table([spans for _, spans in steps]), *operator_tables(trace)]
        where = (
            f"Cycle {self.cycles}, steps {steps[0][0]:,} to {last:,}; its trace: `{self.directory.name}/{path.name}`"
        )
        writer.add_text("Profile/operators", "\n\n".join([where, *tables]), last)
        writer.add_image("Profile/spans", span_figure(self.measured), last, dataformats="HWC")

    def _summary(self) -> str:
        if not self.measured:
            return f"profile: none, because the run has ended at the first {len(self.steps)} of its steps"
        wanted, count = CYCLES * ACTIVE, len(self.measured)
        steps = f"{count} steps" if count == wanted else f"{count} of {wanted} steps, because the run has ended"
        spans = mean_spans([spans for _, spans in self.measured])
        total = sum(spans.values())
        shares = ", ".join(f"{name} {100 * duration / total:.0f} %" for name, duration in spans.items())
        return f"profile: {steps}, {total:.4g} ms each: {shares}; see {self.directory}"


def spans_of(trace: Trace) -> dict[int, Spans]:
    """Where the time of every step went, by the number of the step: its spans in order, and `other` last.

    A span within a span is part of the outer one.
    """
    marks = [event for event in trace if event.get("cat") == "user_annotation" and event.get("ph") == "X"]
    marks.sort(key=lambda mark: (mark["ts"], -mark["dur"]))
    found: dict[int, Spans] = {}
    for step in marks:
        if not step["name"].startswith(STEP):
            continue
        begin, end = step["ts"], step["ts"] + step["dur"]
        spans: dict[str, float] = defaultdict(float)
        for mark in marks:
            if mark is not step and mark["tid"] == step["tid"] and begin - ROUNDING <= mark["ts"] < end - ROUNDING:
                spans[mark["name"]] += mark["dur"] / 1000
                begin = mark["ts"] + mark["dur"]
        rest = step["dur"] / 1000 - sum(spans.values())
        found[int(step["name"].removeprefix(STEP))] = {**spans, "other": max(0.0, rest)}
    return found


def mean_spans(steps: Sequence[Spans]) -> Spans:
    """Of every span the mean over all steps, also over those that have none of it; the longest first."""
    names = dict.fromkeys(name for spans in steps for name in spans)
    means = {name: fmean(spans.get(name, 0.0) for spans in steps) for name in names}
    return dict(sorted(means.items(), key=lambda item: -item[1]))


def span_table(steps: Sequence[Spans]) -> str:
    """The mean step as a Markdown table."""
    means = mean_spans(steps)
    total = sum(means.values())
    rows = [f"| {name} | {duration:.3f} | {100 * duration / total:.1f} % |" for name, duration in means.items()]
    return "\n".join(["| span | ms a step | share |", "|---|---:|---:|", *rows, f"| **step** | {total:.3f} | |"])


def operator_tables(trace: Trace) -> list[str]:
    """The operators of the CPU, and the kernels of a GPU where there are any, as Markdown tables, the longest first.

    The self time of an operator is without the operators that it calls; its share is that of all self times.
    """
    operators = [event for event in trace if event.get("cat") == "cpu_op" and event.get("ph") == "X"]
    kernels = [event for event in trace if event.get("cat") in KERNELS and event.get("ph") == "X"]
    return [_table(title, events) for title, events in (("operator", operators), ("kernel", kernels)) if events]


def _table(title: str, events: Trace) -> str:
    calls, own, total = defaultdict[str, int](int), defaultdict[str, float](float), defaultdict[str, float](float)
    for event, self_time in zip(events, self_times(events), strict=True):
        name = event["name"]
        calls[name] += 1
        own[name] += self_time / 1000
        total[name] += event["dur"] / 1000
    everything = sum(own.values())
    longest = sorted(own, key=lambda name: -own[name])
    rows = [
        f"| `{printable(name, 80).replace('|', '∣')}` | {calls[name]:,} | {own[name]:.3f} | {total[name]:.3f} "
        f"| {100 * own[name] / everything:.1f} % |"
        for name in longest[:LONGEST_TABLE]
    ]
    more = [f"\n{len(longest) - LONGEST_TABLE} more are shorter."] if len(longest) > LONGEST_TABLE else []
    head = [f"| {title} | calls | self, ms | total, ms | share |", "|---|---:|---:|---:|---:|"]
    return "\n".join([*head, *rows, *more])


def self_times(events: Trace) -> list[float]:
    """Of each event the microseconds that are not those of the events directly within it, on its thread."""

    def end(index: int) -> float:
        return float(events[index]["ts"] + events[index]["dur"])

    own = [float(event["dur"]) for event in events]
    running: dict[tuple[Any, Any], list[int]] = defaultdict(list)
    for index in sorted(range(len(events)), key=lambda index: (events[index]["ts"], -events[index]["dur"])):
        outer = running[events[index]["pid"], events[index]["tid"]]
        while outer and end(outer[-1]) + ROUNDING < end(index):
            outer.pop()
        if outer:
            own[outer[-1]] -= events[index]["dur"]
        outer.append(index)
    return own


def span_figure(steps: Sequence[tuple[int, Spans]]) -> NDArray[np.uint8]:
    """A bar a step, of its spans one upon the other, (height, width, 3)."""
    from matplotlib.figure import Figure  # half a second, for those alone who profile

    figure = Figure((7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    places = range(len(steps))
    height = np.zeros(len(steps))
    names = dict.fromkeys(name for _, spans in steps for name in spans if name != "other")
    for name in [*names, "other"]:
        durations = np.array([spans.get(name, 0.0) for _, spans in steps])
        axes.bar(places, durations, 0.7, height, label=name, color="lightgrey" if name == "other" else None)
        height += durations
    axes.set_xticks(places, [f"{step:,}" for step, _ in steps])
    axes.set_xlabel("step")
    axes.set_ylabel("ms")
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False)  # as they lie on each other
    return pixels(figure)
