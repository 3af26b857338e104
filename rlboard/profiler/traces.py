"""A trace of torch.profiler, read event by event into columns that take a tenth of the file's text.

A trace is one large JSON object whose `traceEvents` are in the format of Chrome: complete events (`"ph": "X"`) with
start and duration in microseconds, thread by thread, and instant events, of which those named `[memory]` say how much
is allocated. What is damaged or cut off is shown up to there; see `Trace.notice`.
"""

from __future__ import annotations

import codecs
import gzip
import io
import itertools
import json
import math
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from rlboard.config import printable
from rlboard.errors import DataError

PIECE = 1 << 18
"""Characters read at a time, bytes in truth; also about how much text is unpacked to show one event."""
LONGEST_VALUE = 1 << 24
"""Characters of one event at most."""
LONGEST_TEXT = 1 << 30
"""Bytes of a trace, unpacked, that are read; with the columns, that bounds what a hostile file can take."""
MOST_EVENTS = 5_000_000
LATEST = 1e18
"""Microseconds: a time beyond that is none."""
LARGEST = 1 << 62
LONGEST_SHAPES = 300
ROUNDING = 0.002
"""Microseconds by which one event may seem to reach into the next, where times are whole nanoseconds."""

ANNOTATION, OPERATOR = "user_annotation", "cpu_op"
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
"""The categories of what a GPU does; those of the profiler's own spans there are drawn but not counted."""
STEP = "ProfilerStep#"
DEVICES = {0: "CPU", 1: "CUDA", 13: "MPS", 12: "XPU"}
"""What torch numbers the types of devices by, in the records of memory."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass
class Lane:
    """A thread of a process, or a stream of a GPU: its name, and where its events are among all."""

    name: str
    rows: list[tuple[int, int]] = field(default_factory=list)
    """From and up to which event, for each depth."""


@dataclass
class Memory:
    """What one device had allocated: times in microseconds, and bytes after each allocation or release."""

    device: str
    times: Floats
    allocated: Integers


@dataclass
class Trace:
    """The events of a trace in columns, ordered by lane, depth and start. Times are microseconds since the first.

    Attributes:
        starts, durations: when each event began, and how long it took.
        own: its self time: the duration less that of the events directly inside it.
        names, categories, shapes: indices into `name_of`, `category_of` and `shapes_of`.
        outermost: whether it lies in no event of the same name, so that recursion is not counted twice.
        device: time that the GPU spent on what this event launched itself, without what events inside it launched.
        lanes: threads and streams in the order in which they are drawn.
        memory: one curve for each device.
        devices: the names of the GPUs that the trace knows.
        notice: what is wrong with the file, as one line; empty for nothing.
    """

    starts: Floats
    durations: Floats
    own: Floats
    names: NDArray[np.int32]
    categories: NDArray[np.int16]
    shapes: NDArray[np.int32]
    outermost: NDArray[np.bool_]
    device: Floats
    name_of: list[str]
    category_of: list[str]
    shapes_of: list[str]
    lanes: list[Lane]
    memory: list[Memory]
    devices: list[str]
    notice: str
    _places: Integers
    _pieces: list[bytes]

    @property
    def size(self) -> int:
        """About how many bytes it takes."""
        columns = (self.starts, self.durations, self.own, self.device, self._places, self.names, self.shapes)
        return sum(map(len, self._pieces)) + sum(column.nbytes for column in columns)

    @cached_property
    def ends(self) -> Floats:
        return self.starts + self.durations

    @property
    def wall(self) -> float:
        """Microseconds from the first event's start to the last one's end; a nanosecond at least."""
        return max(float(self.ends.max()), 0.001)

    def in_categories(self, *categories: str) -> NDArray[np.bool_]:
        """Which events are of one of these categories."""
        wanted = [number for number, name in enumerate(self.category_of) if name in categories]
        return np.isin(self.categories, wanted)

    def lane_of(self, event: int) -> tuple[Lane, int]:
        """The lane of an event, and its depth there."""
        return next(
            (lane, depth)
            for lane in self.lanes
            for depth, (first, last) in enumerate(lane.rows)
            if first <= event < last
        )

    def around(self, event: int) -> list[int]:
        """The events that `event` lies in, the outermost first."""
        lane, depth = self.lane_of(event)
        return self.at(lane, float(self.starts[event]), depth)

    def at(self, lane: Lane, time: float, depth: int | None = None) -> list[int]:
        """The events of a lane that are under way at a time, the outermost first, down to a depth."""
        found = []
        for first, last in lane.rows[:depth]:
            candidate = first + int(np.searchsorted(self.starts[first:last], time, side="right")) - 1
            if candidate >= first and time <= self.ends[candidate]:
                found.append(candidate)
        return found

    def arguments(self, event: int) -> dict[str, Any]:
        """All that the file says about an event: its `args`."""
        piece, position = divmod(int(self._places[event]), 1 << 32)
        text = zlib.decompress(self._pieces[piece]).decode("utf-8", "surrogatepass")
        value = cast("dict[str, Any]", _scan(text, position)[0]).get("args")
        return value if isinstance(value, dict) else {}


def read_trace(path: Path, progress: Callable[[float], None] = lambda _: None) -> Trace:
    """Reads the trace file `path`, packed or not.

    Args:
        path: the file.
        progress: told now and then which part of it has been read, from 0 to 1.

    Raises:
        DataError: it cannot be read, or holds no event with a duration.
    """
    columns = _Columns()
    try:
        with path.open("rb") as file:
            text = _Text(file, path.stat().st_size, progress)
            for number, (event, place) in enumerate(_events(text, columns.header)):
                columns.add(event, place)
                if number + 1 == MOST_EVENTS:
                    text.problem = f"it has {MOST_EVENTS:,} events or more"
                    break
            text.finish()
    except OSError as error:
        raise DataError(f"{printable(path.name)} cannot be read: {error.strerror or 'the disk fails'}") from None
    problem = text.problem
    if not columns.starts:
        reason = problem or ("it has no traceEvents" if not text.in_events else "no event has a start and a duration")
        raise DataError(f"{printable(path.name)} is no trace of torch.profiler: {reason}")
    notices = [f"{problem}: shown are the {len(columns.starts):,} events before that"] if problem else []
    if columns.skipped:
        notices.append(f"{columns.skipped:,} events left out, which have no usable time or name")
    return columns.finish(text.pieces, "; ".join(notices))


_scan: Callable[[str, int], tuple[Any, int]] = vars(json.JSONDecoder(strict=False))["scan_once"]
_SPACE = re.compile(r"[\s,]*")


class _Text:
    """The text of a file, of which only what has not been taken yet is held as it is."""

    def __init__(self, file: io.BufferedReader, size: int, progress: Callable[[float], None]) -> None:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        self.file, self.size, self.progress = file, size, progress
        self.stream = gzip.GzipFile(fileobj=file) if packed else file
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self.text, self.position, self.began, self.length = "", 0, 0, 0
        self.ended, self.in_events = False, False
        self.problem = ""
        self.pieces: list[bytes] = []

    def more(self) -> bool:
        """Reads on; False at the end."""
        if self.ended:
            return False
        if self.position:
            self.finish()
            self.text, self.position = self.text[self.position :], 0
        wanted = max(PIECE, len(self.text))  # as much again, so that a long value is not scanned too often
        data = b""
        try:
            while len(data) < wanted and (part := self.stream.read1(wanted)):
                data += part
            self.ended = len(data) < wanted
        except EOFError:
            self.ended, self.problem = True, "the file is cut off"
        except (zlib.error, gzip.BadGzipFile):
            self.ended, self.problem = True, "the file is damaged"
        self.length += len(data)
        if self.length > LONGEST_TEXT:
            self.ended, self.problem = True, f"the file is longer than {LONGEST_TEXT >> 30} GiB"
        elif len(self.text) > LONGEST_VALUE:
            self.ended, self.problem = True, "the file is damaged"
        self.text += self.decode(data, self.ended)
        self.progress(self.file.tell() / max(self.size, 1))
        return bool(data)

    def finish(self) -> None:
        """Packs what has been taken, in which `Trace.arguments` looks events up."""
        self.pieces.append(zlib.compress(self.text[: self.position].encode("utf-8", "surrogatepass"), 1))

    def peek(self) -> str:
        """The next character that says something, with `position` at it; empty at the end."""
        while True:
            self.position = cast("re.Match[str]", _SPACE.match(self.text, self.position)).end()
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.more():
                return ""

    def value(self) -> Any:
        """The JSON value at `position`, which then is after it; where it began is `began`.

        Raises:
            ValueError: there is none, or not all of it.
        """
        while True:
            try:
                value, end = _scan(self.text, self.position)
            except (ValueError, StopIteration, RecursionError):
                if not self.more():
                    raise ValueError from None
                continue
            if end < len(self.text) or not self.more():  # a number at the end may go on
                self.began, self.position = self.position, end
                return value


def _events(text: _Text, header: dict[str, Any]) -> Iterator[tuple[Any, int]]:
    """Each event and its place; what is said of GPUs before them goes to `header`, what is wrong to `text.problem`."""
    try:
        opening = text.peek()
        if opening == "{":
            text.position += 1
            while text.peek() == '"':
                name = text.value()
                if text.peek() != ":":
                    raise ValueError
                text.position += 1
                opening = text.peek()
                if name == "traceEvents" and opening == "[":
                    break
                value = text.value()
                if name == "deviceProperties":
                    header[name] = value
            else:
                if text.peek() != "}":
                    raise ValueError
                return
        if opening != "[":
            raise ValueError
        text.in_events = True
        text.position += 1
        while text.peek() != "]":
            event = text.value()
            yield event, len(text.pieces) << 32 | text.began
    except ValueError:
        text.problem = text.problem or ("the file is empty" if not text.length else "the file is cut off or no JSON")


class _Columns:
    """What is kept of the events while they are read."""

    def __init__(self) -> None:
        self.header: dict[str, Any] = {}
        self.starts, self.durations = array("d"), array("d")
        self.names, self.categories, self.lanes, self.shapes = (array("i") for _ in range(4))
        self.launches, self.places = array("q"), array("q")
        self.name_numbers: dict[str, int] = {}
        self.category_numbers: dict[str, int] = {}
        self.shape_numbers: dict[str, int] = {}
        self.lane_numbers: dict[tuple[Any, Any], int] = {}
        self.facts: dict[tuple[str, Any, Any], Any] = {}
        self.memory: dict[tuple[int, int], tuple[array[float], array[int]]] = {}
        self.skipped = 0

    def add(self, event: Any, place: int) -> None:
        """Takes an event up; one that is not as it should be is counted instead."""
        try:
            kind = event["ph"]
            if kind == "X":
                self._complete(event, place)
            elif kind == "i" and event.get("name") == "[memory]":
                self._record(event["ts"], event["args"])
            elif kind == "M":
                process = event["name"].startswith("process_")
                (value,) = event["args"].values()
                self.facts[event["name"], event.get("pid"), 0 if process else event.get("tid")] = value
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            self.skipped += 1

    def _record(self, time: Any, arguments: dict[str, Any]) -> None:
        device = (int(arguments["Device Type"]), int(arguments["Device Id"]))
        when, allocated = _time(time), int(arguments["Total Allocated"])
        if abs(allocated) > LARGEST:
            raise ValueError
        times, values = self.memory.setdefault(device, (array("d"), array("q")))
        times.append(when)
        values.append(allocated)

    def _complete(self, event: dict[str, Any], place: int) -> None:
        category = str(event.get("cat", ""))
        if category == "Trace":  # the profiler's own bar over everything
            return
        name, start, duration = str(event["name"]), _time(event["ts"]), _time(event["dur"])
        if duration < 0:
            raise ValueError
        arguments = event.get("args") or {}
        outer = arguments.get("External id", arguments.get("external id", -1))
        shapes = str(arguments.get("Input Dims") or "")[:LONGEST_SHAPES]
        numbers = (
            _number(self.lane_numbers, (event.get("pid"), event.get("tid"))),
            _number(self.name_numbers, name),
            _number(self.category_numbers, category),
            _number(self.shape_numbers, shapes),
        )
        for column, number in zip((self.lanes, self.names, self.categories, self.shapes), numbers, strict=True):
            column.append(number)
        self.starts.append(start)
        self.durations.append(duration)
        self.launches.append(outer if isinstance(outer, int) and 0 <= outer < LARGEST else -1)
        self.places.append(place)

    def finish(self, pieces: list[bytes], notice: str) -> Trace:
        """Orders the events, nests them, and gives the GPU's time to those that launched it."""
        starts, durations = np.frombuffer(self.starts), np.frombuffer(self.durations)
        names, categories, shapes = (
            np.frombuffer(column, np.intc) for column in (self.names, self.categories, self.shapes)
        )
        keys, lane_names = self._lanes()
        lanes = keys[np.frombuffer(self.lanes, np.intc)]
        category_of = list(self.category_numbers)
        first = float(starts.min())
        order = np.lexsort((-durations, starts, lanes))
        depths, own, outermost = _nest(
            lanes[order], starts[order], durations[order], names[order], ROUNDING + 2 * float(np.spacing(starts.max()))
        )
        drawn = np.lexsort((starts[order], depths, lanes[order]))  # rows lie together
        order = order[drawn]

        trace = Trace(
            starts=starts[order] - first,
            durations=durations[order],
            own=own[drawn],
            names=names[order],
            categories=categories[order].astype(np.int16),
            shapes=shapes[order],
            outermost=outermost[drawn],
            device=np.zeros(len(order)),
            name_of=list(self.name_numbers),
            category_of=category_of,
            shapes_of=list(self.shape_numbers),
            lanes=[Lane(name) for name in lane_names],
            memory=self._memory(first),
            devices=self._devices(),
            notice=notice,
            _places=np.frombuffer(self.places, np.int64)[order],
            _pieces=pieces,
        )
        launches = np.frombuffer(self.launches, np.int64)[order]
        on_device = trace.in_categories(*ON_DEVICE)
        _launched_by(launches, trace.durations, on_device, trace.in_categories(OPERATOR, ANNOTATION), trace.device)
        rows = np.stack((lanes[order], depths[drawn]))
        edges = [0, *(np.flatnonzero(np.any(rows[:, 1:] != rows[:, :-1], axis=0)) + 1).tolist(), len(order)]
        for begin, end in itertools.pairwise(edges):
            trace.lanes[int(rows[0, begin])].rows.append((begin, end))
        return trace

    def _lanes(self) -> tuple[NDArray[np.intc], list[str]]:
        """Where each lane is drawn, from the order in which lanes were met; and the names of those drawn."""
        facts = self.facts

        def rank(lane: tuple[Any, Any]) -> tuple[float, float, str, str]:
            process, thread = lane
            sorts = (
                facts.get(("process_sort_index", process, 0)),
                facts.get(("thread_sort_index", process, thread)),
            )
            first, second = (float(sort) if isinstance(sort, int) else math.inf for sort in sorts)
            return (first, second, str(process), str(thread))

        def name(lane: tuple[Any, Any]) -> str:
            process, thread = lane
            label = facts.get(("process_labels", process, 0)) or facts.get(("process_name", process, 0))
            return f"{label or f'process {process}'} · {facts.get(('thread_name', process, thread)) or thread}".strip()

        ordered = sorted(self.lane_numbers, key=rank)
        places = np.empty(len(ordered), np.intc)
        for place, lane in enumerate(ordered):
            places[self.lane_numbers[lane]] = place
        return places, [name(lane) for lane in ordered]

    def _memory(self, first: float) -> list[Memory]:
        curves = []
        for (kind, number), (times, allocated) in sorted(self.memory.items()):
            device = DEVICES.get(kind, f"device type {kind}")
            when = np.frombuffer(times) - first
            order = np.argsort(when, kind="stable")
            name = f"{device} {number}" if number >= 0 else device
            curves.append(Memory(name, when[order], np.frombuffer(allocated, np.int64)[order]))
        return curves

    def _devices(self) -> list[str]:
        devices = self.header.get("deviceProperties")
        if not isinstance(devices, list):
            return []
        return [str(device["name"]) for device in devices if isinstance(device, dict) and "name" in device]


def _time(value: Any) -> float:
    number = float(value)
    if not abs(number) < LATEST:  # nor NaN
        raise ValueError
    return number


def _number(numbers: dict[Any, int], key: Any) -> int:
    """The number of `key`, which gets the next one if it is new."""
    return numbers.setdefault(key, len(numbers))


def _nest(
    lanes: NDArray[Any], starts: Floats, durations: Floats, names: NDArray[Any], rounding: float
) -> tuple[NDArray[np.int32], Floats, NDArray[np.bool_]]:
    """The depth and self time of each event, and whether it is the outermost of its name.

    Args:
        lanes, starts, durations, names: of the events, ordered by lane, then start, then longest first.
        rounding: by how much an event that follows another may seem to begin before that one has ended.
    """
    depths = array("i", bytes(4 * len(starts)))
    own, outermost = array("d", durations.tolist()), array("b", bytes(len(starts)))
    open_events: list[tuple[float, int, int]] = []  # ends, which, names
    open_names: Counter[int] = Counter()
    lane_before = -1
    columns = zip(lanes.tolist(), starts.tolist(), (starts + durations).tolist(), names.tolist(), strict=True)
    for event, (lane, start, end, name) in enumerate(columns):
        if lane != lane_before:
            open_events.clear()
            open_names.clear()
            lane_before = lane
        while open_events:
            outer_end, outer, outer_name = open_events[-1]
            left = outer_end - start
            if left > 0 and (end <= outer_end or left > rounding):
                own[outer] -= min(end, outer_end) - start
                break
            open_events.pop()
            open_names[outer_name] -= 1
        depths[event] = len(open_events)
        outermost[event] = not open_names[name]
        open_names[name] += 1
        open_events.append((end, event, name))
    return (
        np.frombuffer(depths, np.int32),
        np.maximum(np.frombuffer(own), 0),
        np.frombuffer(outermost, np.bool_),
    )


def _launched_by(
    launches: Integers, durations: Floats, on_device: NDArray[np.bool_], on_host: NDArray[np.bool_], sums: Floats
) -> None:
    """Adds to `sums` of each event on the host the durations of the events on the device with the same number."""
    hosts = np.flatnonzero(on_host & (launches >= 0))
    kernels = np.flatnonzero(on_device & (launches >= 0))
    if len(hosts) and len(kernels):
        hosts = hosts[np.argsort(launches[hosts], kind="stable")]
        found = np.searchsorted(launches[hosts], launches[kernels])
        found = np.minimum(found, len(hosts) - 1)
        same = launches[hosts[found]] == launches[kernels]
        np.add.at(sums, hosts[found[same]], durations[kernels[same]])
