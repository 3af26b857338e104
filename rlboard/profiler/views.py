"""What the page shows of a trace: plain values for JSON, times in microseconds.

Every function is pure, and none returns more than a page can draw.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlboard.profiler.traces import ANNOTATION, ON_DEVICE, OPERATOR, STEP, Floats, Lane, Trace

MOST_STEPS = 1_000
MOST_SPANS = 10
MOST_OPERATORS = 20_000
MOST_RECTANGLES = 5_000
MOST_POINTS = 3_000
TOP = 10
OTHER = "other"
"""The part of a step that lies in no span."""
WHOLE = "whole trace"
"""What stands for a step where none are marked."""
Indices = NDArray[np.intp]
ORDER = ("data", "forward", "backward", "optimizer")

SPANS = (
    (re.compile(r"enumerate\(DataLoader\)"), "data"),
    (re.compile(r"Optimizer\.(step|zero_grad)#"), "optimizer"),
)
"""What torch marks by itself, where the loop marks nothing around it."""


@dataclass
class Step:
    """A step of the profiler's schedule: `ProfilerStep#N`, or the whole trace where there are none."""

    name: str
    lane: Lane
    start: float
    end: float
    spans: dict[str, float]


def steps(trace: Trace) -> list[Step]:
    """The steps in their order, with the time of each span in them; what no span covers is `other`."""
    annotations = np.flatnonzero(trace.in_categories(ANNOTATION))
    spans_of = {id(lane): _spans(trace, annotations, lane) for lane in trace.lanes}
    found = []
    for event in annotations:
        name = trace.name_of[trace.names[event]]
        if name.startswith(STEP):
            lane, _ = trace.lane_of(int(event))
            start, end = float(trace.starts[event]), float(trace.ends[event])
            found.append(_step(trace, spans_of[id(lane)], f"step {name.removeprefix(STEP)}", lane, start, end))
    if not found:
        lane = max(trace.lanes, key=lambda lane: (len(spans_of[id(lane)]), lane.rows[-1][1] - lane.rows[0][0]))
        found.append(_step(trace, spans_of[id(lane)], WHOLE, lane, 0.0, trace.wall))
    return sorted(found, key=lambda step: step.start)


def _spans(trace: Trace, annotations: Indices, lane: Lane) -> Indices:
    """The spans of a lane, other than steps, by start; of equal starts the outer one comes first."""
    inside = annotations[(annotations >= lane.rows[0][0]) & (annotations < lane.rows[-1][1])]
    inside = inside[[not trace.name_of[name].startswith(STEP) for name in trace.names[inside]]]
    return inside[np.argsort(trace.starts[inside], kind="stable")]


def _step(trace: Trace, spans: Indices, name: str, lane: Lane, start: float, end: float) -> Step:
    first, last = np.searchsorted(trace.starts[spans], (start, end))
    times: dict[str, float] = {}
    covered = start
    for event in spans[first:last]:
        if trace.ends[event] <= covered:
            continue  # it lies within one that has been counted
        label = trace.name_of[trace.names[event]]
        label = next((short for pattern, short in SPANS if pattern.match(label)), label.strip("# ") or label)
        begun, covered = max(covered, float(trace.starts[event])), min(end, float(trace.ends[event]))
        times[label] = times.get(label, 0.0) + covered - begun
    times[OTHER] = end - start - sum(times.values())
    return Step(name, lane, start, end, times)


def overview(trace: Trace) -> dict[str, Any]:
    """The first page: steps and their spans, what the devices did, the operators that took longest, and hints."""
    found = steps(trace)
    has_steps = found[0].name != WHOLE
    totals: dict[str, float] = {}
    for step in found:
        for span, time in step.spans.items():
            totals[span] = totals.get(span, 0.0) + time
    rest = totals.pop(OTHER)
    known = [span for span in ORDER if span in totals]
    named = known + sorted(totals.keys() - set(known), key=lambda span: -totals[span])
    kept = named[:MOST_SPANS]
    rest += sum(totals[span] for span in named[MOST_SPANS:])
    whole = sum(step.end - step.start for step in found)
    spans = [*kept, OTHER]
    times = {**totals, OTHER: rest}
    shares = {span: times[span] / whole if whole else 0.0 for span in spans}

    busy = _busy(trace)
    gpu = float(np.sum(busy[1] - busy[0])) / trace.wall if len(busy[0]) and trace.wall else None
    drawn = [
        {"name": step.name, "time": step.end - step.start, "spans": _kept(step, kept)} for step in found[:MOST_STEPS]
    ]
    return {
        "notice": trace.notice,
        "events": len(trace.starts),
        "wall": trace.wall,
        "steps": drawn,
        "step_count": len(found) if has_steps else 0,
        "step_mean": whole / len(found) if has_steps else None,
        "spans": [
            {"name": span, "time": times[span] / len(found), "share": shares[span]} for span in spans if times[span]
        ],
        "devices": trace.devices,
        "gpu_busy": gpu,
        "top": top_operators(trace),
        "memory": [{"device": curve.device, "peak": int(curve.allocated.max())} for curve in trace.memory],
        "hints": hints(found, shares, gpu) if whole else [],
    }


def _kept(step: Step, kept: list[str]) -> list[float]:
    """A step's time in each of the spans `kept`, and in all others."""
    times = [step.spans.get(span, 0.0) for span in kept]
    return [*times, max(0.0, step.end - step.start - sum(times))]


def _busy(trace: Trace) -> tuple[Floats, Floats]:
    """When the GPUs did anything: starts and ends of stretches that do not overlap."""
    events = np.flatnonzero(trace.in_categories(*ON_DEVICE))
    if not len(events):
        return np.zeros(0), np.zeros(0)
    events = events[np.argsort(trace.starts[events], kind="stable")]
    starts, reached = trace.starts[events], np.maximum.accumulate(trace.ends[events])
    first = np.flatnonzero(np.concatenate(([True], starts[1:] > reached[:-1])))
    last = np.append(first[1:] - 1, len(events) - 1)
    return starts[first], reached[last]


def top_operators(trace: Trace) -> list[dict[str, Any]]:
    """The operators with the most self time, on the host and on the GPU together."""
    rows = [row for row in _grouped(trace, by_shape=False) if row["category"] == OPERATOR]
    whole = sum(row["self"] + row["device"] for row in rows)
    rows.sort(key=lambda row: -(row["self"] + row["device"]))
    return [
        {
            **{key: row[key] for key in ("name", "calls", "self", "device")},
            "share": (row["self"] + row["device"]) / whole if whole else 0.0,
        }
        for row in rows[:TOP]
    ]


def hints(found: list[Step], shares: dict[str, float], gpu: float | None) -> list[str]:
    """What is worth looking at, each as one line with the number that says so."""
    said = []
    per = "a step"
    data, optimizer, other = (shares.get(span, 0.0) for span in ("data", "optimizer", OTHER))
    if found[0].name == WHOLE:
        per = "the time"
        said.append("No steps are marked: call profiler.step() at the end of each, and they are compared here.")
    if data >= 0.2:
        said.append(
            f"data takes {_percent(data)} of {per}: prepare batches ahead (workers, pinned memory), or keep the data "
            "as one tensor on the device."
        )
    if optimizer >= 0.25:
        said.append(
            f"optimizer takes {_percent(optimizer)} of {per}: fused=True or foreach=True, where it has that, updates "
            "all weights in a few calls; a larger batch needs fewer updates."
        )
    if len(shares) == 1:
        said.append('No spans are marked: with record_function("forward"): ... shows where the time goes.')
    elif other >= 0.25:
        said.append(
            f"{_percent(other)} of {per} is in no span: give it a name with record_function, and look for .item(), "
            "print and logging in it."
        )
    if gpu is not None and gpu < 0.5:
        said.append(
            f"The GPU is busy {_percent(gpu)} of the time: it waits for the host. Larger batches, torch.compile or "
            "CUDA graphs give it more at once."
        )
    times = np.array([step.end - step.start for step in found])
    if len(times) >= 3 and times[0] > 1.5 * np.median(times[1:]):
        ratio = times[0] / np.median(times[1:])
        said.append(f"{found[0].name} took {ratio:.1f} times as long as the others: warm-up, so look at later ones.")
    return said


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def operators(trace: Trace, *, by_shape: bool) -> dict[str, Any]:
    """Every operator, kernel and span with its times, those with the most self time first."""
    rows = sorted(_grouped(trace, by_shape=by_shape), key=lambda row: -row["self"])
    return {
        "rows": rows[:MOST_OPERATORS],
        "left_out": max(0, len(rows) - MOST_OPERATORS),
        "has_device": bool(trace.device.any()),
        "has_shapes": any(trace.shapes_of),
    }


def _grouped(trace: Trace, *, by_shape: bool) -> list[dict[str, Any]]:
    """A row for each name in each category, and for each input shape if `by_shape`."""
    shapes = trace.shapes.astype(np.int64)
    kind = trace.names.astype(np.int64) * len(trace.category_of) + trace.categories
    key = kind * len(trace.shapes_of) + shapes if by_shape else kind
    _, first, group = np.unique(key, return_index=True, return_inverse=True)
    calls = np.bincount(group)
    total = np.bincount(group, trace.durations * trace.outermost)
    own = np.bincount(group, trace.own)
    device = np.bincount(group, trace.device)
    pairs = np.unique(np.stack((group, shapes)), axis=1) if not by_shape else np.zeros((2, 0), np.int64)
    variants = np.bincount(pairs[0], minlength=len(first))
    return [
        {
            "name": trace.name_of[trace.names[event]],
            "category": trace.category_of[trace.categories[event]],
            "calls": int(calls[row]),
            "total": float(total[row]),
            "self": float(own[row]),
            "device": float(device[row]),
            "shapes": f"{variants[row]} shapes" if variants[row] > 1 else trace.shapes_of[trace.shapes[event]],
        }
        for row, event in enumerate(first)
    ]


def timeline(trace: Trace, begin: float, end: float, pixels: int, text: str) -> dict[str, Any]:
    """The events between two times, as rectangles for a chart that is `pixels` wide.

    Neighbours that are too narrow to be seen become one rectangle, the more of them the fewer would be left: at most
    about `MOST_RECTANGLES` are sent. Of `text`, which is searched for in names, `found` says how many events have it.

    Raises:
        ValueError: `begin` is not before `end`.
    """
    if not begin < end:
        raise ValueError("begin is not before end")
    matching = _matching(trace, text)
    width = 1
    while True:
        finest = (end - begin) / pixels * width
        lanes = [[_row(trace, row, begin, end, finest, matching) for row in lane.rows] for lane in trace.lanes]
        count = sum(len(row["start"]) for lane in lanes for row in lane)
        if count <= MOST_RECTANGLES or width >= pixels:
            break
        width *= 2
    names = sorted({name for lane in lanes for row in lane for name in row["name"]} - {-1})
    places = {name: place for place, name in enumerate(names)} | {-1: -1}
    for lane in lanes:
        for row in lane:
            row["name"] = [places[name] for name in row["name"]]
    return {
        "begin": begin,
        "end": end,
        "wall": trace.wall,
        "names": [trace.name_of[name] for name in names],
        "categories": trace.category_of,
        "lanes": [{"name": lane.name, "rows": rows} for lane, rows in zip(trace.lanes, lanes, strict=True)],
        "found": int(np.count_nonzero(matching)) if text else None,
        "found_time": float(trace.durations[matching & trace.outermost].sum()) if text else None,
    }


def _matching(trace: Trace, text: str) -> NDArray[np.bool_]:
    wanted = text.casefold()
    hits = [number for number, name in enumerate(trace.name_of) if wanted and wanted in name.casefold()]
    return np.isin(trace.names, hits)


def _row(
    trace: Trace, row: tuple[int, int], begin: float, end: float, finest: float, matching: NDArray[np.bool_]
) -> dict[str, list[Any]]:
    """The rectangles of one depth of a lane; `event` is -1 and `name` too where several events are one of them."""
    first = row[0] + int(np.searchsorted(trace.ends[row[0] : row[1]], begin, side="left"))
    last = row[0] + int(np.searchsorted(trace.starts[row[0] : row[1]], end, side="right"))
    chosen = slice(first, max(first, last))
    starts, ends, own = trace.starts[chosen], trace.ends[chosen], np.arange(first, max(first, last))
    if not len(starts):
        return {key: [] for key in ("start", "width", "name", "category", "event", "count", "found")}
    narrow = trace.durations[chosen] < finest
    cell = np.where(narrow, np.floor(starts / finest), -1 - own)
    edges = np.flatnonzero(np.concatenate(([True], cell[1:] != cell[:-1])))
    counts = np.diff(np.append(edges, len(starts)))
    single = counts == 1
    reached = ends[edges + counts - 1]
    return {
        "start": np.round(starts[edges], 3).tolist(),
        "width": np.round(reached - starts[edges], 3).tolist(),
        "name": np.where(single, trace.names[chosen][edges], -1).tolist(),
        "category": trace.categories[chosen][edges].tolist(),
        "event": np.where(single, own[edges], -1).tolist(),
        "count": counts.tolist(),
        "found": np.logical_or.reduceat(matching[chosen], edges).astype(int).tolist(),
    }


def find(trace: Trace, text: str, time: float, *, backwards: bool) -> dict[str, Any] | None:
    """The first event after, or the last before, `time` whose name has `text`; the outermost first; round the ends."""
    events = np.flatnonzero(_matching(trace, text))
    if not len(events):
        return None
    starts = np.unique(trace.starts[events])
    place = np.searchsorted(starts, time, side="left") - 1 if backwards else np.searchsorted(starts, time, side="right")
    wanted = starts[place % len(starts)]
    return event(trace, int(events[np.flatnonzero(trace.starts[events] == wanted)[0]]))


def event(trace: Trace, number: int) -> dict[str, Any]:
    """Everything about one event. Raises IndexError where there is none of that number."""
    if not 0 <= number < len(trace.starts):
        raise IndexError(number)
    lane, depth = trace.lane_of(number)
    return {
        "event": number,
        "name": trace.name_of[trace.names[number]],
        "category": trace.category_of[trace.categories[number]],
        "lane": trace.lanes.index(lane),
        "depth": depth,
        "start": float(trace.starts[number]),
        "duration": float(trace.durations[number]),
        "self": float(trace.own[number]),
        "device": float(trace.device[number]),
        "around": [trace.name_of[trace.names[outer]] for outer in trace.around(number)],
        "arguments": {str(key): _short(value) for key, value in trace.arguments(number).items()},
    }


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 500 else f"{text[:500]}…"


def memory(trace: Trace) -> dict[str, Any]:
    """The curve of each device, its highest and lowest points kept where there are many, and where it was highest."""
    found = steps(trace)
    curves = []
    for curve in trace.memory:
        peak = int(curve.allocated.argmax())
        kept = _extremes(curve.allocated, MOST_POINTS)
        time = float(curve.times[peak])
        inside = trace.at(found[0].lane, time)
        curves.append(
            {
                "device": curve.device,
                "times": np.round(curve.times[kept], 3).tolist(),
                "bytes": curve.allocated[kept].tolist(),
                "peak": {
                    "time": time,
                    "bytes": int(curve.allocated[peak]),
                    "inside": [trace.name_of[trace.names[event]] for event in inside],
                },
            }
        )
    marked = [{"name": step.name, "start": step.start, "end": step.end} for step in found[:MOST_STEPS]]
    return {"wall": trace.wall, "curves": curves, "steps": marked if found[0].name != WHOLE else []}


def _extremes(values: NDArray[np.int64], most: int) -> NDArray[np.intp]:
    """The indices of at most `most` values: of each of equally many in turn, the least and the greatest."""
    if len(values) <= most:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), most // 2 + 1).astype(int)
    picked = [place + pick(values[place:stop]) for place, stop in itertools.pairwise(edges) for pick in PICKS]
    return np.unique(np.array([0, len(values) - 1, *picked]))


PICKS = (np.argmin, np.argmax)
