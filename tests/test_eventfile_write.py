"""EventFile: what is written is what TensorBoard reads, byte by byte where it matters."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.compat.proto.event_pb2 import Event, LogMessage
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub import errors
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

from rlboard.eventfile import EventFile, LogWarning, wire

Point = tuple[str, int, float, float]
"""tag, step, value, wall time"""


def whole_records(path: Path) -> Iterator[bytes]:
    """Yields the records of a file, and raises DataLossError at a damaged one: TensorBoard's loader would stop there.

    A record that is cut off at the end of the file is left out, as TensorBoard waits for its rest.
    """
    reader = PyRecordReader_New(str(path))
    while True:
        try:
            reader.GetNext()
        except errors.OutOfRangeError:
            return
        yield reader.record()


def whole_events(path: Path) -> Iterator[Event]:
    """Yields the events of a file, as `whole_records` does."""
    yield from map(Event.FromString, whole_records(path))


def points(path: Path) -> list[Point]:
    """Returns the scalars of a file in their order."""
    return [
        (value.tag, event.step, value.simple_value, event.wall_time)
        for event in whole_events(path)
        for value in event.summary.value
    ]


def is_whole(path: Path) -> bool:
    """Returns whether the file ends with a whole record."""
    return sum(16 + len(record) for record in whole_records(path)) == path.stat().st_size


def exactly(points: list[Point]) -> list[tuple[str, int, str, float]]:
    """Returns points that are equal if they print the same value: NaN is itself, and -0.0 is not 0.0."""
    return [(tag, step, repr(value), wall_time) for tag, step, value, wall_time in points]


def as_float32(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(value))


class Long(str):
    """A tag of one letter, again and again; hypothesis refuses to print it in full."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"Long({self[0]!r} * {len(self)})"


TAGS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.sampled_from(["손실/학습", "🎯/정확도", "a/b//c/", "nul\0", " ", Long("한" * 3_333), Long("y" * 10_000)]),
)
STEPS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(0, 300), st.sampled_from([2**63 - 1, -(2**63), -1]))
VALUES = st.one_of(
    st.floats(), st.floats(width=32), st.sampled_from([math.nan, math.inf, -math.inf, 1e-45, -0.0, 1e39])
)
WALL_TIMES = st.floats(0, 1e11)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("scalar"), TAGS, VALUES, STEPS, WALL_TIMES),
            st.tuples(st.just("scalars"), st.dictionaries(TAGS, VALUES, max_size=5), STEPS, WALL_TIMES),
            st.tuples(st.just("series"), TAGS, st.lists(st.tuples(STEPS, VALUES, WALL_TIMES), max_size=5)),
        ),
        max_size=20,
    )
)
def test_whatever_is_written_is_read_in_the_same_order(
    tmp_path_factory: pytest.TempPathFactory, calls: list[tuple[Any, ...]]
) -> None:
    expected: list[Point] = []
    with EventFile(tmp_path_factory.mktemp("run")) as file:
        for kind, *arguments in calls:
            if kind == "scalar":
                tag, value, step, wall_time = arguments
                file.scalar(tag, value, step, wall_time)
                expected.append((tag, step, as_float32(value), wall_time))
            elif kind == "scalars":
                mapping, step, wall_time = arguments
                file.scalars(mapping, step, wall_time)
                expected.extend((tag, step, as_float32(value), wall_time) for tag, value in mapping.items())
            else:
                tag, rows = arguments
                steps, values, wall_times = zip(*rows, strict=True) if rows else ((), (), ())
                file.scalar_series(tag, steps, values, wall_times)
                expected.extend((tag, *row[:1], as_float32(row[1]), row[2]) for row in rows)
    assert exactly(points(file.path)) == exactly(expected)
    assert is_whole(file.path)
    assert file.dropped == 0


@settings(max_examples=15, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.one_of(st.integers(-(2**63), 2**63 - 600), st.integers(-300, 17_000)),
    st.integers(1, 2**50),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_a_long_series_is_what_its_points_are(
    tmp_path_factory: pytest.TempPathFactory, tag: str, first: int, stride: int, shuffled: bool, random: Any
) -> None:
    steps = [min(first + index * stride, 2**63 - 1) for index in range(600)]
    if shuffled:
        random.shuffle(steps)
    bits = np.random.default_rng(random.randrange(2**32)).integers(0, 2**32, 600, dtype=np.uint32)
    values = np.where(np.isnan(bits.view(np.float32)), np.float32(np.nan), bits.view(np.float32))
    wall_times = np.linspace(-5.0, 1e10, 600)
    directory = tmp_path_factory.mktemp("run")
    with EventFile(directory) as file:
        file.scalar_series(tag, steps, values, wall_times)
    expected = list(zip([tag] * 600, steps, values.tolist(), wall_times.tolist(), strict=True))
    assert exactly(points(file.path)) == exactly(expected)
    assert is_whole(file.path)


def test_a_series_of_many_chunks_has_one_wall_time_by_default(tmp_path: Path) -> None:
    with EventFile(tmp_path, clock=lambda: 12.5) as file:
        file.scalar_series("loss", range(10_000), np.arange(10_000) / 2)
    assert points(file.path) == [("loss", step, step / 2, 12.5) for step in range(10_000)]


@pytest.mark.parametrize(
    ("steps", "values", "wall_times"),
    [
        ([1, 2], [1.0], None),
        ([[1], [2]], [[1.0], [2.0]], None),
        ([1.5, 2.5], [1.0, 2.0], None),
        ([1, 2**63], [1.0, 2.0], None),
        ([1, 2**70], [1.0, 2.0], None),
        ([1, 2], [1j, 2j], None),
        ([1, 2], ["1", "2"], None),
        ([1, 2], [None, 1.0], None),
        ([1, 2], [1.0, 2.0], [1.0, 2.0, 3.0]),
    ],
)
def test_a_series_that_is_none_is_refused(tmp_path: Path, steps: Any, values: Any, wall_times: Any) -> None:
    with EventFile(tmp_path) as file:
        with pytest.raises((TypeError, ValueError)):
            file.scalar_series("loss", steps, values, wall_times)
        file.scalar("after", 1.0, 1)
    assert [point[0] for point in points(file.path)] == ["after"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, 3.0),
        (True, 1.0),
        (Decimal("0.5"), 0.5),
        (Fraction(1, 4), 0.25),
        pytest.param(10**400, math.inf, id="huge"),
        pytest.param(-(10**400), -math.inf, id="-huge"),
        (1e300, math.inf),
        (np.float16(1.5), 1.5),
        (np.int64(-7), -7.0),
        (np.array(2.5), 2.5),
        (np.array([[2.5]]), 2.5),
        (torch.tensor(0.25), 0.25),
        (torch.tensor([0.25]), 0.25),
        (torch.tensor(1.5, dtype=torch.bfloat16), 1.5),
        (torch.tensor(0.5, requires_grad=True), 0.5),
        (torch.tensor(True), 1.0),
    ],
)
def test_one_number_of_any_kind(tmp_path: Path, value: Any, expected: float) -> None:
    with EventFile(tmp_path) as file:
        file.scalar("one", value, 1)
        file.scalars({"one": value}, 2)
    assert [point[2] for point in points(file.path)] == [expected, expected]


@pytest.mark.parametrize(
    "value", [None, "1.5", b"1", 1j, [1.0], {}, np.zeros(2), torch.zeros(2), np.array("x"), object()]
)
def test_what_is_no_number_is_refused(tmp_path: Path, value: Any) -> None:
    with EventFile(tmp_path) as file:
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            file.scalar("none", value, 1)
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            file.scalars({"good": 1.0, "none": value}, 1)
        file.scalar("after", 1.0, 1)
    assert [point[0] for point in points(file.path)] == ["after"]


def test_steps_of_any_kind_but_no_more_than_64_bits(tmp_path: Path) -> None:
    good: list[Any] = [np.int32(-5), np.uint8(200), torch.tensor(300), 7.9, True]
    bad: list[Any] = [2**63, -(2**63) - 1, math.inf, math.nan, None, "x"]
    with EventFile(tmp_path) as file:
        for step in good:
            file.scalar("loss", 0.0, step)
        for step in bad:
            with pytest.raises((OverflowError, TypeError, ValueError)):
                file.scalar("loss", 0.0, step)
    assert [point[1] for point in points(file.path)] == [-5, 200, 300, 7, 1]


def test_messages_and_serialized_events(tmp_path: Path) -> None:
    event = Event(wall_time=1.0, step=2, log_message=LogMessage(message="hello"))
    summary = Summary(value=[Summary.Value(tag="text", simple_value=1.0)])
    with EventFile(tmp_path, clock=lambda: 5.0) as file:
        file.event(event)
        file.event(event.SerializeToString())
        file.summary(summary, 3)
        file.summary(summary, 4, 6.0)
    expected = [
        event,
        event,
        Event(wall_time=5.0, step=3, summary=summary),
        Event(wall_time=6.0, step=4, summary=summary),
    ]
    assert list(whole_events(file.path))[1:] == expected


GOLDEN = bytes.fromhex(
    "1a00000000000000129bd82d090000000000408f4010001a0d627261696e2e4576656e743a326c6117dd1a0000000000"
    "0000129bd82d090000000000408f4010012a0d0a0b0a046c6f7373150000003f0729077e1d00000000000000602fdf23"
    "090000000000001d4010ac022a0f0a0d0a06ec8690ec8ba4150000807f3104b11e2f000000000000006d5d1d50090000"
    "000000408f4010ffffffffffffffffff012a190a0b0a046c6f7373150000803e0a0a0a03616363150000803fafb5a770"
)


def write_golden(directory: Path, hostname: str) -> bytes:
    with EventFile(directory, clock=lambda: 1_000.0, hostname=hostname) as file:
        file.scalar("loss", 0.5, 1)
        file.scalar("손실", math.inf, 300, 7.25)
        file.scalars({"loss": 0.25, "acc": 1.0}, -1)
    return file.path.read_bytes()


def test_a_fixed_clock_makes_a_file_of_fixed_bytes(tmp_path: Path) -> None:
    assert write_golden(tmp_path / "one", "a") == GOLDEN
    assert write_golden(tmp_path / "two", "b") == GOLDEN


def test_the_first_event_is_the_version_and_is_in_the_file_at_once(tmp_path: Path) -> None:
    with EventFile(tmp_path / "new" / "run", clock=lambda: 3.0) as file:
        assert list(whole_events(file.path)) == [Event(wall_time=3.0, file_version="brain.Event:2")]


def test_names_sort_in_the_order_of_opening_even_if_the_clock_goes_back(tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.1700000000.zzz.999.9").touch()
    (tmp_path / "events.out.tfevents.nonsense").touch()
    files = [EventFile(tmp_path, clock=seconds.__float__) for seconds in (1.0, 1.8e9, 1.7e9, 1.8e9)]
    names = [file.path.name for file in files]
    for file in files:
        file.close()
    assert names == sorted(names)
    assert names[0] > "events.out.tfevents.1700000000.zzz.999.9"
    assert len(set(names)) == 4
    assert names[1].startswith("events.out.tfevents.1800000000.")


def test_the_name_is_tensorboards(tmp_path: Path) -> None:
    with EventFile(tmp_path, clock=lambda: 1.7e9, hostname="host", filename_suffix=".v2") as file:
        pass
    stem, number = file.path.name.removesuffix(".v2").rsplit(".", 1)
    assert stem == f"events.out.tfevents.1700000000.host.{os.getpid()}"
    assert number.isdigit()


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        EventFile(tmp_path / "file" / "run")


def test_threads_share_a_file(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(functools.partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-6)
    with EventFile(tmp_path) as file:

        def log(tag: str) -> None:
            for step in range(1_000):
                file.scalar(tag, step, step)
                if step % 10 == 0:
                    file.flush()
            file.scalar_series(tag, range(1_000, 2_000), range(1_000, 2_000))

        threads = [threading.Thread(target=log, args=(f"thread{index}",)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    read = points(file.path)
    assert is_whole(file.path)
    for index in range(8):
        assert [step for tag, step, _, _ in read if tag == f"thread{index}"] == list(range(2_000))


def test_a_flush_interval_passes_on_the_files_own_clock(tmp_path: Path) -> None:
    now = 0.0
    with EventFile(tmp_path, clock=lambda: now, flush_seconds=0.25) as file:
        file.scalar("loss", 1.0, 1)
        now = 0.25
        file.scalar("loss", 2.0, 2)
        assert len(points(file.path)) == 2


def test_full_buffers_are_written_at_once(tmp_path: Path) -> None:
    with EventFile(tmp_path, clock=lambda: 0.0) as file:
        file.summary(Summary(value=[Summary.Value(tag="big", simple_value=1.0, node_name="x" * (1 << 16))]))
        assert is_whole(file.path)
        assert len(points(file.path)) == 1


def test_a_burst_is_written_within_a_second_though_nothing_follows(tmp_path: Path) -> None:
    with EventFile(tmp_path, clock=lambda: 0.0) as file:
        file.scalar("loss", 1.0, 1)
        deadline = time.monotonic() + 5
        while not points(file.path) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(points(file.path)) == 1


def test_tell_is_a_place_to_truncate_to(tmp_path: Path) -> None:
    with EventFile(tmp_path) as file:
        file.scalar("loss", 1.0, 1)
        end = file.tell()
        assert file.path.stat().st_size == end
        file.scalar("loss", 2.0, 2)
    os.truncate(file.path, end)
    assert [step for _, step, _, _ in points(file.path)] == [1]
    assert is_whole(file.path)


def test_a_file_that_nobody_closes_is_written_when_it_is_forgotten(tmp_path: Path) -> None:
    file = EventFile(tmp_path, clock=lambda: 0.0)
    path = file.path
    file.scalar("loss", 1.0, 1)
    del file
    assert len(points(path)) == 1


def test_closing_twice_is_closing_once_and_what_comes_later_is_counted(tmp_path: Path) -> None:
    file = EventFile(tmp_path)
    file.close()
    file.close()
    with pytest.warns(LogWarning, match="closed"):
        file.scalar("late", 1.0, 1)
    file.scalars({"late": 1.0, "later": 2.0}, 2)  # a second warning would be an error
    file.flush(sync=True)
    assert file.dropped == 2
    assert points(file.path) == []


def test_it_stands_alone_and_imports_little() -> None:
    heavy = ("torch", "tensorboard", "numba", "PIL", "google.protobuf")
    others = (
        "[name for name in sys.modules if name.startswith('rlboard.') and not name.startswith('rlboard.eventfile')]"
    )
    code = f"import sys, rlboard.eventfile; print([name for name in {heavy} if name in sys.modules] + {others})"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_nothing_is_deprecated_in_what_it_does(tmp_path: Path) -> None:
    with warnings.catch_warnings(), EventFile(tmp_path) as file:
        warnings.simplefilter("error")
        file.scalar("loss", torch.ones(1, requires_grad=True), torch.tensor(3))
        file.scalar_series("loss", np.arange(300), np.full(300, 1e300))
    assert len(points(file.path)) == 301


@given(st.integers(-(2**63), 2**63 - 1))
def test_varints_are_those_of_protocol_buffers(number: int) -> None:
    assert wire.STEP + wire.varint(number) == Event(step=number).SerializeToString() or number == 0


def test_records_are_counted_by_their_lengths() -> None:
    assert wire.count_records(b"".join(wire.frame(b"x" * size) for size in (0, 1, 300, 70_000))) == 4
