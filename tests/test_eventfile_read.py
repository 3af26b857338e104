"""Reading event files: equal to TensorBoard's own readers, and never wrong about a damaged one.

`read_both` reads with the compiled loops and with the same in plain Python, so every test here is also one of that.
"""

import io
import itertools
import math
import os
import random
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import google_crc32c
import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import strategies as st
from tensorboard.backend.event_processing import event_file_loader, plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto import types_pb2
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util import tensor_util

from rlboard.eventfile import read, scan
from rlboard.eventfile.read import (
    Damage,
    ScalarColumns,
    ScalarReader,
    follow,
    read_events,
    read_scalars,
    repair,
    truncate,
    verify,
)
from tests.properties import explored

Row = tuple[str, int, float, float]

INT64 = st.integers(-(2**63), 2**63 - 1)
TAGS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.sampled_from(["보상/평균", "🏆", "a/b/c", "/", "", "x" * 10_000, "reward", "\0"]),
)
FLOATS = st.one_of(
    st.floats(width=32), st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 1e-45, 3.4028234663852886e38])
)


def masked_crc(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def header(length: int) -> bytes:
    """The first twelve bytes of a record, with the right checksum whatever the length."""
    return struct.pack("<Q", length) + masked_crc(struct.pack("<Q", length))


def framed(payloads: Iterable[bytes]) -> bytes:
    return b"".join(header(len(payload)) + payload + masked_crc(payload) for payload in payloads)


def record(payload: bytes) -> bytes:
    return framed([payload])


def serialized(*events: Event) -> bytes:
    return framed(event.SerializeToString() for event in events)


def scalar_event(tag: str, value: float, step: int = 0, wall_time: float = 0.0) -> Event:
    return Event(wall_time=wall_time, step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))


def tensor_event(tag: str, tensor: TensorProto, step: int = 0, plugin: str | None = None) -> Event:
    value = Summary.Value(tag=tag, tensor=tensor)
    if plugin is not None:
        value.metadata.plugin_data.plugin_name = plugin
    return Event(step=step, wall_time=step / 2, summary=Summary(value=[value]))


def float_tensor(value: float) -> TensorProto:
    return TensorProto(dtype=types_pb2.DT_FLOAT, float_val=[value])


VERSION = Event(wall_time=1.5, file_version="brain.Event:2")


def varied_events() -> list[Event]:
    """A short file with a bit of everything."""
    histogram = Summary.Value(tag="weights", histo={"min": 0, "max": 1, "num": 2, "bucket_limit": [1], "bucket": [2]})
    text = tensor_event("note", TensorProto(dtype=types_pb2.DT_STRING, string_val=[b"hello"]), 2, "text")
    two = Summary(value=[Summary.Value(tag="b", simple_value=3.5), Summary.Value(tag="a", simple_value=-1.0)])
    return [
        VERSION,
        scalar_event("a", 1.0, 1, 10.0),
        tensor_event("t", float_tensor(0.25), 1, "scalars"),
        scalar_event("보상", 2.0, 2, 11.0),
        text,
        Event(step=3, wall_time=12.0, summary=two),
        Event(step=3, summary=Summary(value=[histogram])),
        tensor_event("t", TensorProto(dtype=types_pb2.DT_DOUBLE, double_val=[0.1]), 4),
        Event(session_log=SessionLog(status=SessionLog.STOP)),
        scalar_event("a", 5.0, 2**40, 13.0),
    ]


@pytest.fixture
def varied(tmp_path: Path) -> Path:
    path = tmp_path / "events.out.tfevents.1"
    path.write_bytes(serialized(*varied_events()))
    return path


def boundaries(events: Iterable[Event]) -> list[int]:
    """Where the records of a file start and, last, where it ends."""
    return [0, *itertools.accumulate(len(serialized(event)) for event in events)]


# Reading, and what TensorBoard reads.


def with_loops(loops: scan.Loops, function: Callable[[], Any]) -> Any:
    with mock.patch.object(read, "_loops", return_value=loops):
        return function()


def both_ways(function: Callable[[], Any]) -> tuple[Any, Any]:
    return with_loops(scan.compiled(), function), with_loops(scan.PLAIN, function)


def read_both(path: Path, tags: Iterable[str] | None = None) -> ScalarColumns:
    compiled, plain = both_ways(lambda: read_scalars(path, tags))
    assert_same(compiled, plain)
    assert isinstance(compiled, ScalarColumns)
    return compiled


def assert_same(one: ScalarColumns, other: ScalarColumns) -> None:
    assert one.tags == other.tags
    assert one.damage == other.damage
    for name in ("code", "step", "wall_time", "value"):
        ours, theirs = getattr(one, name), getattr(other, name)
        assert ours.dtype == theirs.dtype
        assert ours.tobytes() == theirs.tobytes()


def rows(columns: ScalarColumns) -> list[Row]:
    tags = [columns.tags[code] for code in columns.code]
    return list(zip(tags, columns.step.tolist(), columns.wall_time.tolist(), columns.value.tolist(), strict=True))


def keys(table: Iterable[Row]) -> list[tuple[str, int, bytes, bytes]]:
    """Rows that can be compared: a NaN equals itself, 0.0 does not equal -0.0."""
    return [
        (tag, step, struct.pack("<d", wall_time), b"nan" if math.isnan(value) else struct.pack("<d", value))
        for tag, step, wall_time, value in table
    ]


def scalar_of(tensor: TensorProto) -> float | None:
    """What TensorBoard's own code makes of a tensor, and what its NumPy lacks."""
    if tensor.tensor_content == b"" and tensor.dtype in (types_pb2.DT_UINT32, types_pb2.DT_UINT64):
        elements = tensor.uint32_val if tensor.dtype == types_pb2.DT_UINT32 else tensor.uint64_val
        array = np.array(list(elements))
        if any(dimension.size != 1 for dimension in tensor.tensor_shape.dim):
            return None
    elif tensor.dtype == types_pb2.DT_BFLOAT16:
        half = TensorProto()
        half.CopyFrom(tensor)
        half.dtype = types_pb2.DT_UINT16
        half.int_val.extend(tensor.half_val)
        bits = scalar_of(half)
        return None if bits is None else struct.unpack("<f", struct.pack("<I", int(bits) << 16))[0]
    else:
        try:
            array = tensor_util.make_ndarray(tensor)
        except (TypeError, ValueError, OverflowError, KeyError):
            return None
    if array.size != 1 or array.dtype.kind not in "fiub":
        return None
    return float(array.item())


def rows_by_protobuf(events: Iterable[Event]) -> list[Row]:
    """The scalars of events by the rules of tensorboard/data_compat.py and dataclass_compat.py."""
    plugins: dict[str, str] = {}
    table = []
    for event in events:
        for value in event.summary.value:
            simple = value.WhichOneof("value") == "simple_value"
            plugin = "scalars" if simple else value.metadata.plugin_data.plugin_name
            if plugin:
                plugins.setdefault(value.tag, plugin)
            number = None
            if simple:
                number = value.simple_value
            elif value.HasField("tensor") and plugins.get(value.tag) == "scalars":
                number = scalar_of(value.tensor)
            if number is not None:
                table.append((value.tag, event.step, event.wall_time, number))
    return table


def rows_by_tensorboard(path: Path) -> dict[str, list[Row]]:
    """What TensorBoard's Scalars tab has, by tag."""
    accumulator = plugin_event_accumulator.EventAccumulator(
        str(path), size_guidance={"tensors": 0}, purge_orphaned_data=False
    )
    accumulator.Reload()
    try:
        tags = accumulator.PluginTagToContent("scalars")
    except KeyError:
        return {}
    return {
        tag: [
            (tag, event.step, event.wall_time, float(tensor_util.make_ndarray(event.tensor_proto).item()))
            for event in accumulator.Tensors(tag)
        ]
        for tag in tags
    }


def by_tag(columns: ScalarColumns) -> dict[str, list[Row]]:
    return {
        tag: list(
            zip(
                itertools.repeat(tag),
                series.step.tolist(),
                series.wall_time.tolist(),
                series.value.tolist(),
            )
        )
        for tag, series in columns.items()
    }


# Equal to other readers.


def test_the_files_of_these_tests_are_framed_as_tensorboard_frames_them() -> None:
    file = io.BytesIO()
    writer = RecordWriter(file)
    payloads = [event.SerializeToString() for event in varied_events()]
    for payload in payloads:
        writer.write(payload)
    assert file.getvalue() == framed(payloads)


def test_the_loops_are_compiled_here() -> None:
    assert scan.compiled() is not scan.PLAIN


@pytest.fixture(scope="module")
def torch_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run written by torch's SummaryWriter with several kinds of data."""
    from torch.utils.tensorboard import SummaryWriter

    directory = tmp_path_factory.mktemp("run")
    generator = random.Random(0)
    with SummaryWriter(directory) as writer:
        for step in range(200):
            writer.add_scalar("reward", generator.gauss(0, 1), step)
            writer.add_scalar("손실/훈련", generator.random(), step * 1_000_003)
            if step % 50 == 0:
                writer.add_histogram("weights", np.arange(10), step)
                writer.add_text("note", "**bold**", step)
                writer.add_image("image", np.zeros((3, 4, 4), np.uint8), step)
                writer.add_scalar("new", step / 7, step, new_style=True)
                writer.add_scalar("double", step / 7, step, new_style=True, double_precision=True)
        writer.add_pr_curve("curve", np.array([0, 1, 1]), np.array([0.1, 0.7, 0.9]), 0)
        writer.add_scalar("reward", math.nan, -1)
    return directory


def test_equals_event_accumulator(torch_run: Path) -> None:
    accumulator = EventAccumulator(str(torch_run), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    accumulator.Reload()
    columns = read_both(torch_run)
    for tag in accumulator.Tags()["scalars"]:
        theirs = [(tag, event.step, event.wall_time, event.value) for event in accumulator.Scalars(tag)]
        assert keys(by_tag(columns)[tag]) == keys(theirs)
    assert set(columns) - set(accumulator.Tags()["scalars"]) == {"new", "double"}


def test_equals_what_the_scalars_tab_has(torch_run: Path) -> None:
    theirs = rows_by_tensorboard(torch_run)
    ours = by_tag(read_both(torch_run))
    assert {tag: keys(table) for tag, table in ours.items()} == {tag: keys(table) for tag, table in theirs.items()}
    assert set(theirs) == {"reward", "손실/훈련", "new", "double"}


@pytest.mark.filterwarnings("ignore:The inplace keyword")
def test_equals_tbparse(torch_run: Path) -> None:
    from tbparse import SummaryReader

    frame = SummaryReader(str(torch_run), extra_columns={"wall_time"}).scalars
    columns = read_both(torch_run, tags=["reward", "손실/훈련"])
    assert set(frame["tag"]) == set(columns)
    for tag, series in columns.items():
        theirs = frame[frame["tag"] == tag].sort_values("step", kind="stable")
        order = np.argsort(series.step, kind="stable")
        np.testing.assert_array_equal(series.step[order], theirs["step"])
        np.testing.assert_array_equal(series.value[order], theirs["value"])
        np.testing.assert_array_equal(series.wall_time[order], theirs["wall_time"])


def test_events_equal_the_event_file_loader(torch_run: Path) -> None:
    (path,) = torch_run.iterdir()
    theirs = list(event_file_loader.LegacyEventFileLoader(str(path)).Load())
    ours_compiled, ours_plain = both_ways(lambda: list(read_events(torch_run)))
    assert ours_compiled == ours_plain == theirs
    assert len(theirs) > 400


ONE_OF_EACH_DTYPE = [
    TensorProto(dtype=types_pb2.DT_FLOAT, float_val=[0.1]),
    TensorProto(dtype=types_pb2.DT_FLOAT, tensor_content=struct.pack("<f", 0.1)),
    TensorProto(dtype=types_pb2.DT_DOUBLE, double_val=[0.1]),
    TensorProto(dtype=types_pb2.DT_DOUBLE, tensor_content=struct.pack("<d", -1e300)),
    TensorProto(dtype=types_pb2.DT_HALF, half_val=[0x3555]),
    TensorProto(dtype=types_pb2.DT_HALF, tensor_content=b"\x55\xb5"),
    TensorProto(dtype=types_pb2.DT_BFLOAT16, half_val=[0xC049]),
    TensorProto(dtype=types_pb2.DT_BFLOAT16, tensor_content=b"\x49\x40"),
    TensorProto(dtype=types_pb2.DT_INT8, int_val=[-128]),
    TensorProto(dtype=types_pb2.DT_INT8, tensor_content=b"\x80"),
    TensorProto(dtype=types_pb2.DT_UINT8, int_val=[255]),
    TensorProto(dtype=types_pb2.DT_UINT8, tensor_content=b"\xff"),
    TensorProto(dtype=types_pb2.DT_INT16, int_val=[-32768]),
    TensorProto(dtype=types_pb2.DT_INT16, tensor_content=b"\x00\x80"),
    TensorProto(dtype=types_pb2.DT_UINT16, int_val=[65535]),
    TensorProto(dtype=types_pb2.DT_UINT16, tensor_content=b"\xff\xff"),
    TensorProto(dtype=types_pb2.DT_INT32, int_val=[-(2**31)]),
    TensorProto(dtype=types_pb2.DT_INT32, tensor_content=struct.pack("<i", -7)),
    TensorProto(dtype=types_pb2.DT_UINT32, uint32_val=[2**32 - 1]),
    TensorProto(dtype=types_pb2.DT_UINT32, tensor_content=b"\xff\xff\xff\xff"),
    TensorProto(dtype=types_pb2.DT_INT64, int64_val=[2**53 - 1]),
    TensorProto(dtype=types_pb2.DT_INT64, int64_val=[-(2**63)]),
    TensorProto(dtype=types_pb2.DT_INT64, tensor_content=struct.pack("<q", -5)),
    TensorProto(dtype=types_pb2.DT_UINT64, uint64_val=[2**64 - 2**11]),
    TensorProto(dtype=types_pb2.DT_UINT64, tensor_content=struct.pack("<Q", 2**63)),
    TensorProto(dtype=types_pb2.DT_BOOL, bool_val=[True]),
    TensorProto(dtype=types_pb2.DT_BOOL, tensor_content=b"\x01"),
]


@pytest.mark.parametrize("tensor", ONE_OF_EACH_DTYPE, ids=str)
@pytest.mark.parametrize("shape", [[], [1], [1, 1]])
def test_tensor_scalars_of_every_dtype(tmp_path: Path, tensor: TensorProto, shape: list[int]) -> None:
    shaped = TensorProto()
    shaped.CopyFrom(tensor)
    for size in shape:
        shaped.tensor_shape.dim.add(size=size)
    path = tmp_path / "events"
    path.write_bytes(serialized(tensor_event("t", shaped, 3, "scalars")))
    expected = scalar_of(shaped)
    assert expected is not None
    assert keys(rows(read_both(path))) == keys([("t", 3, 1.5, expected)])


@pytest.mark.parametrize(
    "tensor",
    [
        TensorProto(dtype=types_pb2.DT_FLOAT),
        TensorProto(dtype=types_pb2.DT_FLOAT, float_val=[1, 2]),
        TensorProto(dtype=types_pb2.DT_FLOAT, tensor_content=bytes(8)),
        TensorProto(dtype=types_pb2.DT_FLOAT, tensor_content=bytes(3)),
        TensorProto(dtype=types_pb2.DT_FLOAT, double_val=[1]),
        TensorProto(dtype=types_pb2.DT_FLOAT, float_val=[1], tensor_shape={"dim": [{"size": 3}]}),
        TensorProto(dtype=types_pb2.DT_FLOAT, float_val=[1], tensor_shape={"dim": [{"size": 0}]}),
        TensorProto(dtype=types_pb2.DT_UINT8, int_val=[256]),
        TensorProto(dtype=types_pb2.DT_UINT8, int_val=[-1]),
        TensorProto(dtype=types_pb2.DT_HALF, half_val=[65536]),
        TensorProto(dtype=types_pb2.DT_STRING, string_val=[b"1"]),
        TensorProto(dtype=types_pb2.DT_COMPLEX64, scomplex_val=[1, 0]),
        TensorProto(dtype=types_pb2.DT_FLOAT_REF, float_val=[1]),
        TensorProto(float_val=[1]),
    ],
    ids=str,
)
def test_tensors_that_are_no_scalar_are_passed_over(tmp_path: Path, tensor: TensorProto) -> None:
    path = tmp_path / "events"
    path.write_bytes(serialized(tensor_event("t", tensor, 1, "scalars"), tensor_event("t", float_tensor(2.0), 2)))
    assert scalar_of(tensor) is None
    assert rows(read_both(path)) == [("t", 2, 1.0, 2.0)]


def test_a_tags_first_metadata_says_what_it_is(tmp_path: Path) -> None:
    events = [
        tensor_event("first only", float_tensor(1), 1, "scalars"),
        tensor_event("first only", float_tensor(2), 2),
        tensor_event("first only", float_tensor(3), 3, "text"),
        tensor_event("text", TensorProto(dtype=types_pb2.DT_STRING, string_val=[b"x"]), 1, "text"),
        tensor_event("text", float_tensor(4), 2, "scalars"),
        scalar_event("after simple", 5, 1),
        tensor_event("after simple", float_tensor(6), 2),
        tensor_event("nothing said", float_tensor(7), 1),
        tensor_event("scalarz", float_tensor(8), 1, "scalarz"),
        tensor_event("scalars2", float_tensor(9), 1, "scalars2"),
    ]
    # The second file of a run may hold no metadata any more.
    (tmp_path / "events.out.tfevents.1").write_bytes(serialized(*events))
    (tmp_path / "events.out.tfevents.2").write_bytes(serialized(tensor_event("first only", float_tensor(10), 4)))
    columns = read_both(tmp_path)
    assert by_tag(columns) == rows_by_tensorboard(tmp_path)
    assert columns["first only"].value.tolist() == [1, 2, 3, 10]
    assert columns["after simple"].value.tolist() == [5, 6]
    assert len(columns) == 2


def test_simple_value_is_a_scalar_whatever_its_metadata(tmp_path: Path) -> None:
    event = scalar_event("a", 1.0)
    event.summary.value[0].metadata.plugin_data.plugin_name = "custom"
    path = tmp_path / "events.out.tfevents.1"
    path.write_bytes(serialized(event, scalar_event("a", 2.0)))
    assert by_tag(read_both(path)) == rows_by_tensorboard(path)
    assert read_both(path)["a"].value.tolist() == [1, 2]


def test_fields_in_any_order_and_the_last_of_a_oneof_counts(tmp_path: Path) -> None:
    summary = scalar_event("a", 1.5).SerializeToString()
    late = Event(step=7, wall_time=8.0).SerializeToString()
    replaced = Event(log_message={"message": "m"}).SerializeToString()
    path = tmp_path / "events"
    payloads = [summary + late, late + summary + replaced, summary + replaced + summary, summary + summary, late, b""]
    path.write_bytes(framed(payloads))
    expected = rows_by_protobuf(Event.FromString(payload) for payload in payloads)
    assert rows(read_both(path)) == expected
    assert len(expected) == 4


@st.composite
def event_lists(draw: st.DrawFn) -> list[Event]:
    tags = draw(st.lists(TAGS, min_size=1, max_size=4))
    events = []
    for _ in range(draw(st.integers(0, 8))):
        event = Event(step=draw(INT64), wall_time=draw(st.floats()))
        for tag in draw(st.lists(st.sampled_from(tags), max_size=4)):
            value = event.summary.value.add(tag=tag)
            if draw(st.booleans()):
                value.simple_value = draw(FLOATS)
            else:
                value.tensor.CopyFrom(draw(st.sampled_from(ONE_OF_EACH_DTYPE)))
                value.metadata.plugin_data.plugin_name = draw(st.sampled_from(["", "scalars", "text"]))
        events.append(event)
    return events


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file for all examples of a property."""
    return tmp_path_factory.mktemp("scratch") / "events.out.tfevents.1"


@explored(events=event_lists())
def test_any_scalars_are_read_as_written(scratch: Path, events: list[Event]) -> None:
    scratch.write_bytes(serialized(*events))
    columns = read_both(scratch)
    assert keys(rows(columns)) == keys(rows_by_protobuf(events))
    assert columns.damage == ()
    assert keys(rows(columns)) == keys(rows_by_protobuf(event_file_loader.LegacyEventFileLoader(str(scratch)).Load()))


@explored(patterns=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20))
def test_every_float32_keeps_its_bits(scratch: Path, patterns: list[int]) -> None:
    # Written by hand: Python's float, on the way through protobuf, may quieten a signalling NaN.
    payloads = [b"\x2a\x0a\x0a\x08\x0a\x01a\x15" + struct.pack("<I", pattern) for pattern in patterns]
    scratch.write_bytes(framed(payloads))
    columns = read_both(scratch)
    assert columns.value.dtype == np.float32
    assert columns.value.view(np.uint32).tolist() == patterns


def test_value_is_float32_unless_a_row_needs_more(tmp_path: Path) -> None:
    path = tmp_path / "events"
    narrow = [scalar_event("a", 0.1), tensor_event("t", ONE_OF_EACH_DTYPE[4], 0, "scalars")]
    path.write_bytes(serialized(*narrow))
    assert read_both(path).value.dtype == np.float32
    path.write_bytes(serialized(*narrow, tensor_event("t", ONE_OF_EACH_DTYPE[2])))
    columns = read_both(path)
    assert columns.value.tolist() == [np.float32(0.1), np.float16(0.33325195), 0.1]


# Columns.


def test_columns_are_a_mapping_of_series(varied: Path) -> None:
    columns = read_both(varied)
    assert columns.tags == ("a", "t", "보상", "b")
    assert list(columns) == list(columns.tags)
    assert len(columns) == 4
    assert "t" in columns
    assert "note" not in columns
    assert columns["a"].step.tolist() == [1, 3, 2**40]
    assert columns["a"].value.tolist() == [1.0, -1.0, 5.0]
    assert columns["a"].wall_time.tolist() == [10.0, 12.0, 13.0]
    assert {tag: series.value.tolist() for tag, series in dict(columns).items()}["t"] == [0.25, 0.1]
    with pytest.raises(KeyError):
        columns["note"]
    assert [row[0] for row in rows(columns)] == ["a", "t", "보상", "b", "a", "t", "a"]


def test_columns_are_equal_only_to_themselves(varied: Path) -> None:
    columns = read_scalars(varied)
    assert columns == columns
    assert columns != read_scalars(varied)
    assert len({columns, read_scalars(varied)}) == 2


def test_only_the_tags_asked_for(varied: Path) -> None:
    everything = rows(read_both(varied))
    for wanted in (["a"], ["t", "b"], ["note"], [], ["보상", "nowhere"]):
        assert rows(read_both(varied, wanted)) == [row for row in everything if row[0] in wanted]
    assert rows(read_both(varied, "a")) == rows(read_both(varied, ["a"]))


def test_many_tags_and_long_ones(tmp_path: Path) -> None:
    tags = [f"tag/{number}" * (1 + number % 50) for number in range(3_000)]
    path = tmp_path / "events"
    path.write_bytes(serialized(*(scalar_event(tag, number) for number, tag in enumerate([*tags, *tags]))))
    columns = read_both(path)
    assert columns.tags == tuple(tags)
    assert all(columns[tag].value.tolist() == [number, number + 3_000] for number, tag in enumerate(tags))


def test_more_scalars_in_an_event_than_are_taken_at_once(tmp_path: Path) -> None:
    one = [Summary.Value(tag="a", simple_value=number) for number in range(2 * read.ROWS + 3)]
    path = tmp_path / "events"
    path.write_bytes(serialized(scalar_event("a", -1.0), Event(step=1, summary=Summary(value=one)), Event()))
    columns = read_both(path)
    assert columns.value.tolist() == list(range(-1, 2 * read.ROWS + 3))
    assert set(columns.step[1:].tolist()) == {1}


def test_tags_that_crowd_one_place_of_the_hash_table(tmp_path: Path) -> None:
    crowded = (tag for tag in map(str, itertools.count()) if masked_crc(tag.encode())[0] == 0)
    tags = list(itertools.islice(crowded, scan.TagTable.PROBES + 10))
    path = tmp_path / "events"
    path.write_bytes(serialized(*(scalar_event(tag, number) for number, tag in enumerate([*tags, *tags]))))
    columns = read_both(path)
    assert [row[0] for row in rows(columns)] == [*tags, *tags]


def test_tags_that_are_not_utf8_stay_apart(tmp_path: Path) -> None:
    tags = [b"\xff", b"\xfe", "é".encode(), b"\xed\xa0\x80"]
    path = tmp_path / "events"
    path.write_bytes(framed(serialized_value(tag) for tag in [*tags, *tags]))
    columns = read_both(path)
    assert [tag.encode("utf-8", "surrogateescape") for tag in columns.tags] == tags
    assert [len(series.step) for series in columns.values()] == [2, 2, 2, 2]


def serialized_value(tag: bytes) -> bytes:
    value = b"\x0a" + bytes([len(tag)]) + tag + b"\x15\x00\x00\x80\x3f"
    return b"\x2a" + bytes([len(value) + 2]) + b"\x0a" + bytes([len(value)]) + value


# Directories.


def test_a_directory_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name, value in [
        ("events.out.tfevents.2", 2.0),
        ("events.out.tfevents.10", 10.0),
        ("events.out.tfevents.1", 1.0),
        ("events.out.tfevents.3.profile-empty", 3.0),
        ("notes.txt", 4.0),
    ]:
        (tmp_path / name).write_bytes(serialized(scalar_event("a", value)))
    (tmp_path / "other run").mkdir()
    (tmp_path / "other run" / "events.out.tfevents.0").write_bytes(serialized(scalar_event("a", 0.0)))
    assert read_both(tmp_path)["a"].value.tolist() == [1.0, 10.0, 2.0]
    assert by_tag(read_both(tmp_path)) == rows_by_tensorboard(tmp_path)
    assert [event.summary.value[0].simple_value for event in read_events(tmp_path)] == [1.0, 10.0, 2.0]
    (tmp_path / "tfevents").mkdir()
    assert len(read_both(tmp_path)["a"].value) == 3


@pytest.mark.parametrize("function", [read_scalars, lambda path: list(read_events(path))])
def test_where_there_is_no_event_file(tmp_path: Path, function: Callable[[Path], object]) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match="no event file"):
        function(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        function(tmp_path / "nowhere")


# Damage.


EVERY = pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])  # of the bytes of a file


@EVERY
def test_truncated_anywhere(every: int, varied: Path) -> None:
    whole = varied.read_bytes()
    edges = boundaries(varied_events())
    for size in sorted({*edges, *range(0, len(whole) + 1, every)}):
        varied.write_bytes(whole[:size])
        records = sum(edge <= size for edge in edges[1:])
        columns = read_both(varied)
        assert rows(columns) == rows_by_protobuf(varied_events()[:records])
        assert columns.damage == ()
        compiled, plain = both_ways(lambda: verify(varied))
        assert compiled == plain
        torn = edges[records] if size > edges[records] else None
        assert (compiled.records, compiled.torn_tail, compiled.damage) == (records, torn, ())
        assert compiled.ok == (torn is None)


@EVERY
def test_any_byte_flipped(every: int, varied: Path) -> None:
    whole = varied.read_bytes()
    events = varied_events()
    edges = boundaries(events)
    for offset in sorted({*edges[:-1], *range(0, len(whole), every)}):
        varied.write_bytes(whole[:offset] + bytes([whole[offset] ^ 0x10]) + whole[offset + 1 :])
        hit = sum(edge <= offset for edge in edges) - 1
        start, stop = edges[hit], edges[hit + 1]
        reason = read.BAD_HEADER if offset - start < 12 else read.BAD_PAYLOAD
        expected = (Damage(varied, start, stop - start, reason),)
        report = verify(varied)
        assert (report.records, report.damage, report.torn_tail) == (len(events) - 1, expected, None)
        columns = read_both(varied)
        # A live file's last bytes might yet become a header.
        assert columns.damage == expected or hit == len(events) - 1
        assert list(read_events(varied)) == events[:hit] + events[hit + 1 :]
        left = rows_by_protobuf(events[:hit] + events[hit + 1 :])
        assert rows(columns) == left


@st.composite
def mutations(draw: st.DrawFn, limit: int = 4) -> Callable[[bytes], bytes]:
    """Bytes changed, removed, inserted, and stretches doubled or zeroed."""
    numbers = st.integers(0, 10**6)
    steps = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["flip", "cut", "insert", "double", "zero"]), numbers, numbers, st.binary(max_size=20)
            ),
            min_size=1,
            max_size=limit,
        )
    )

    def mutate(data: bytes) -> bytes:
        for kind, first, second, extra in steps:
            start = first % (len(data) + 1)
            stop = start + second % 40
            match kind:
                case "flip":
                    middle = bytes(byte ^ (1 << second % 8) for byte in data[start : start + 1])
                    data = data[:start] + middle + data[start + 1 :]
                case "cut":
                    data = data[:start] + data[stop:]
                case "insert":
                    data = data[:start] + extra + data[start:]
                case "double":
                    data = data[:stop] + data[start:]
                case "zero":
                    data = data[:start] + bytes(len(data[start:stop])) + data[stop:]
        return data

    return mutate


@explored(mutate=mutations())
def test_a_mutated_file_yields_no_wrong_value(scratch: Path, mutate: Callable[[bytes], bytes]) -> None:
    events = varied_events()
    scratch.write_bytes(mutate(serialized(*events)))
    original = {event.SerializeToString() for event in events}
    # The second value of tag "t" is a scalar only while the first, which says so, is there.
    assert set(keys(rows(read_both(scratch)))) <= set(keys(rows_by_protobuf(events)))
    assert {event.SerializeToString() for event in read_events(scratch)} <= original
    compiled, plain = both_ways(lambda: verify(scratch))
    assert compiled == plain
    lost = sum(damage.length for damage in compiled.damage)
    torn = 0 if compiled.torn_tail is None else compiled.size - compiled.torn_tail
    assert compiled.valid_bytes + lost + torn == compiled.size == scratch.stat().st_size


@explored(data=st.binary(max_size=300))
def test_arbitrary_bytes(scratch: Path, data: bytes) -> None:
    scratch.write_bytes(data)
    assert rows(read_both(scratch)) == []
    assert list(read_events(scratch)) == []
    report = verify(scratch)
    assert report.records == 0
    assert report.ok == (data == b"")


@explored(events=event_lists(), mutate=mutations(), at=st.integers(0, 11))
def test_valid_records_around_malformed_events(
    scratch: Path, events: list[Event], mutate: Callable[[bytes], bytes], at: int
) -> None:
    payloads = [event.SerializeToString() for event in events]
    if payloads:
        payloads[at % len(payloads)] = mutate(payloads[at % len(payloads)])
    scratch.write_bytes(framed(payloads))
    columns = read_both(scratch)
    try:
        parsed = [Event.FromString(payload) for payload in payloads]
    except DecodeError:
        return
    assert keys(rows(columns)) == keys(rows_by_protobuf(parsed))


@explored(payload=st.binary(max_size=60))
def test_any_payload_harms_no_other_record(scratch: Path, payload: bytes) -> None:
    scratch.write_bytes(record(payload) + serialized(scalar_event("a", 1.0)))
    assert ("a", 0, 0.0, 1.0) in rows(read_both(scratch))
    assert list(read_events(scratch))[-1] == scalar_event("a", 1.0)


@pytest.mark.parametrize(
    "payload",
    [
        b"\x10" + b"\xff" * 10,  # a varint without end
        b"\x10" + b"\x80" * 3,
        b"\x2a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  # a length of 2**63 - 1
        b"\x2a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # and of -1
        b"\x2a\x05\x0a",
        b"\x09\x00\x00",
        b"\x2a\x06\x0a\x04\x15\x00\x00\x80",
        b"\x2a\x04\x0a\x02\x42\x7f",
        b"\x2a\x06\x0a\x04\x42\x02\x12\x09",
        b"\x2a\x08\x0a\x06\x42\x04\x08\x01\x2a\x03",
        b"\x2a\x06\x0a\x04\x4a\x02\x0a\x7f",
        b"\x03\x04",  # a group
        b"\x07",  # wire type 7
        b"\x00\x00",  # field 0
    ],
)
def test_malformed_in_every_place(tmp_path: Path, payload: bytes) -> None:
    path = tmp_path / "events"
    good = serialized(scalar_event("a", 1.0))
    path.write_bytes(good + record(scalar_event("b", 9.0).SerializeToString() + payload) * 2 + good)
    columns = read_both(path)
    assert rows(columns) == [("a", 0, 0.0, 1.0)] * 2
    size = path.stat().st_size - 2 * len(good)
    assert columns.damage == (Damage(path, len(good), size, read.NO_EVENT),)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**31])
def test_a_length_that_no_event_has_is_damage(tmp_path: Path, length: int) -> None:
    path = tmp_path / "events"
    good = serialized(scalar_event("a", 1.0))
    path.write_bytes(good + header(length) + good)
    columns = read_both(path)
    assert len(columns["a"].value) == 2
    assert columns.damage == (Damage(path, len(good), 12, read.BAD_HEADER),)


@pytest.mark.parametrize("window", [read.WINDOW_BYTES, 64])
def test_records_appended_to_one_that_was_cut_short(
    tmp_path: Path, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "WINDOW_BYTES", window)
    path = tmp_path / "events"
    long = record(b"\x22" + b"\xd0\x0f" + bytes(2000))
    good = serialized(*(scalar_event("a", value) for value in range(100)))
    assert len(good) > 2500
    for kept in (5, 12, 300, 1900):
        # The record claims some of what follows it, or more than there is.
        path.write_bytes(good + long[:kept] + good)
        reason = read.BAD_HEADER if kept < 12 else read.BAD_PAYLOAD
        assert read_both(path)["a"].value.tolist() == [*range(100), *range(100)]
        assert verify(path).damage == (Damage(path, len(good), kept, reason),)

        # A live file might still get the rest of the record; one that nobody writes will not.
        path.write_bytes(good + long[:kept] + good[:60])
        if kept >= 12:
            assert read_both(path)["a"].value.tolist() == list(range(100))
            assert verify(path).damage == (Damage(path, len(good), kept, read.CUT_SHORT),)
            assert (verify(path).records, verify(path).torn_tail) == (102, len(good) + kept + 56)


@explored(mutate=mutations(8), window=st.integers(16, 300))
def test_the_size_of_the_windows_changes_nothing(scratch: Path, mutate: Callable[[bytes], bytes], window: int) -> None:
    scratch.write_bytes(mutate(serialized(*varied_events())))
    columns, report = read_both(scratch), verify(scratch)
    with mock.patch.multiple(read, WINDOW_BYTES=window, ROWS=1):
        assert_same(read_both(scratch), columns)
        assert verify(scratch) == report


def test_records_longer_than_a_window(tmp_path: Path) -> None:
    big = tensor_event(
        "note", TensorProto(dtype=types_pb2.DT_STRING, string_val=[bytes(2 * read.WINDOW_BYTES)]), 1, "text"
    )
    events = [scalar_event("a", 1.0), big, scalar_event("a", 2.0), big, scalar_event("a", 3.0)]
    path = tmp_path / "events"
    path.write_bytes(serialized(*events))
    assert read_both(path)["a"].value.tolist() == [1.0, 2.0, 3.0]
    assert verify(path).ok
    damaged = bytearray(path.read_bytes())
    damaged[500_000] ^= 1  # a record of the size of several windows, and others behind it
    path.write_bytes(damaged)
    columns = read_both(path)
    assert columns["a"].value.tolist() == [1.0, 2.0, 3.0]
    assert [damage.length for damage in columns.damage] == [len(serialized(big))]


@pytest.mark.parametrize("filler", [bytes(12), b"\xff" * 12, b"\0\0\0\0\0\0\0\1\0\0\0\0"])
def test_a_long_stretch_of_foreign_bytes(tmp_path: Path, filler: bytes) -> None:
    path = tmp_path / "events"
    good = serialized(scalar_event("a", 1.0))
    path.write_bytes(good + filler * 5_000 + good)
    columns = read_both(path)
    assert columns["a"].value.tolist() == [1.0, 1.0]
    assert columns.damage == (Damage(path, len(good), 60_000, read.BAD_HEADER),)


def test_no_file_takes_quadratic_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers without number, each with a length that reaches to the end of the file."""
    path = tmp_path / "events"
    count = 1_500
    path.write_bytes(b"".join(header(12 * (count - number)) for number in range(1, count)) + bytes(50))
    checked = 0
    masked_crc_of = scan.masked_crc

    def counted(data: bytearray, start: int, stop: int) -> int:
        nonlocal checked
        checked += stop - start
        return masked_crc_of(data, start, stop)

    monkeypatch.setattr(scan, "masked_crc", counted)
    with_loops(scan.PLAIN, lambda: verify(path))
    size = path.stat().st_size
    assert size < checked < 10 * size


# Growth.


def concatenated(parts: Sequence[ScalarColumns]) -> list[Row]:
    return [row for part in parts for row in rows(part)]


@explored(cuts=st.lists(st.integers(0, 700), max_size=12), mutate=st.one_of(st.none(), mutations()))
def test_a_file_read_while_it_grows(scratch: Path, cuts: list[int], mutate: Callable[[bytes], bytes] | None) -> None:
    whole = serialized(*varied_events())
    whole = mutate(whole) if mutate else whole
    for loops in (scan.compiled(), scan.PLAIN):
        scratch.write_bytes(b"")
        reader = ScalarReader(scratch)
        parts = []
        for size in [*sorted(cuts), len(whole)]:
            scratch.write_bytes(whole[:size])
            parts.append(with_loops(loops, reader.read))
        at_once = with_loops(loops, lambda: read_scalars(scratch))
        if mutate is None:
            assert concatenated(parts) == rows(at_once) == rows_by_protobuf(varied_events())
        else:
            assert set(keys(concatenated(parts))) <= set(keys(rows_by_protobuf(varied_events())))
        assert with_loops(loops, reader.read).tags == ()


def test_follow_sees_new_records_and_new_files(tmp_path: Path) -> None:
    stop = threading.Event()
    first, second = tmp_path / "events.out.tfevents.1", tmp_path / "events.out.tfevents.2"
    torn = serialized(scalar_event("b", 3.0))
    first.write_bytes(serialized(VERSION, scalar_event("a", 1.0)))
    columns = follow(tmp_path, poll_seconds=0.001, stop=stop)
    assert rows(next(columns)) == [("a", 0, 0.0, 1.0)]
    with first.open("ab") as file:
        file.write(serialized(scalar_event("a", 2.0)) + torn[:20])
    assert rows(next(columns)) == [("a", 0, 0.0, 2.0)]
    with first.open("ab") as file:
        file.write(torn[20:])
    second.write_bytes(serialized(scalar_event("c", 4.0)))
    part = next(columns)
    assert rows(part) == [("b", 0, 0.0, 3.0), ("c", 0, 0.0, 4.0)]
    assert part.tags == ("b", "c")
    first.unlink()
    with second.open("ab") as file:
        file.write(serialized(scalar_event("c", 5.0)))
    assert rows(next(columns)) == [("c", 0, 0.0, 5.0)]
    stop.set()
    with second.open("ab") as file:
        file.write(serialized(scalar_event("c", 6.0)))
    assert [rows(part) for part in columns] == [[("c", 0, 0.0, 6.0)]]


def test_follow_waits_for_what_comes(tmp_path: Path) -> None:
    stop = threading.Event()
    path = tmp_path / "events.out.tfevents.1"

    def write_later() -> None:
        path.write_bytes(serialized(scalar_event("a", 1.0)))

    timer = threading.Timer(0.05, write_later)
    timer.start()
    columns = follow(tmp_path, tags=["a"], poll_seconds=0.005, stop=stop)
    assert rows(next(columns)) == [("a", 0, 0.0, 1.0)]
    timer.join()
    stop.set()
    assert list(columns) == []
    with pytest.raises(FileNotFoundError):
        next(follow(tmp_path / "nowhere"))


def test_a_followed_file_that_is_truncated_is_read_on_from_its_end(varied: Path) -> None:
    reader = ScalarReader(varied)
    reader.read()
    truncate(varied, boundaries(varied_events())[4])
    assert rows(reader.read()) == []
    with varied.open("ab") as file:
        file.write(serialized(scalar_event("new", 1.0)))
    assert rows(reader.read()) == [("new", 0, 0.0, 1.0)]


# Verify, repair, truncate.


def test_verify_a_good_file(varied: Path) -> None:
    report = verify(varied)
    assert report.ok
    size = varied.stat().st_size
    assert report == read.Report(varied, size, len(varied_events()), size, (), None)


@explored(mutate=mutations())
def test_repair_recovers_every_valid_record(scratch: Path, mutate: Callable[[bytes], bytes]) -> None:
    scratch.write_bytes(mutate(serialized(*varied_events())))
    target = scratch.with_name("repaired.tfevents")
    target.unlink(missing_ok=True)
    report = verify(scratch)
    before = scratch.read_bytes()
    if report.size and not report.records:
        with pytest.raises(ValueError, match="no valid record"):
            repair(scratch, target)
        assert not target.exists()
        return
    assert repair(scratch, target) == report
    assert scratch.read_bytes() == before
    assert verify(target).ok
    assert verify(target).records == report.records
    theirs = list(event_file_loader.LegacyEventFileLoader(str(target)).Load())
    assert len(theirs) == report.records
    assert rows(read_both(target)) == rows_by_protobuf(theirs)


def test_repair_replaces_a_file_only_when_told_to(varied: Path) -> None:
    whole = varied.read_bytes()
    varied.write_bytes(whole + b"torn")
    varied.chmod(0o640)
    with pytest.raises(FileExistsError, match="overwrite"):
        repair(varied, varied)
    assert varied.read_bytes() == whole + b"torn"
    report = repair(varied, varied, overwrite=True)
    assert report.torn_tail == len(whole)
    assert varied.read_bytes() == whole
    assert varied.stat().st_mode & 0o777 == 0o640


def test_a_repair_that_fails_leaves_nothing_behind(varied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    before = varied.read_bytes()
    with pytest.raises(OSError, match="No space"):
        repair(varied, varied, overwrite=True)
    assert varied.read_bytes() == before
    assert list(varied.parent.iterdir()) == [varied]


def test_truncate_cuts_only_at_a_boundary(varied: Path) -> None:
    whole = varied.read_bytes()
    edges = boundaries(varied_events())
    for offset in [-1, *range(len(whole) + 2)]:
        varied.write_bytes(whole)
        if offset in edges:
            truncate(varied, offset)
            assert varied.read_bytes() == whole[:offset]
        else:
            with pytest.raises(ValueError, match=f"byte {offset}$"):
                truncate(varied, offset)
            assert varied.read_bytes() == whole


# Without numba.


def test_without_numba_the_plain_loops_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.warns(RuntimeWarning, match="without numba"):
        assert scan.compiled.__wrapped__() is scan.PLAIN


@pytest.mark.parametrize("error", [RuntimeError("no locator available"), OSError(28, "No space left"), EOFError()])
def test_where_numbas_cache_fails_the_plain_loops_are_used(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    import numba

    monkeypatch.setattr(numba, "njit", mock.Mock(side_effect=error))
    with pytest.warns(RuntimeWarning, match="without numba"):
        assert scan.compiled.__wrapped__() is scan.PLAIN


def test_a_small_file_does_not_start_numba(varied: Path) -> None:
    program = (
        "import sys; from rlboard.eventfile import read_scalars;"
        f"assert len(read_scalars({str(varied)!r}).step) == 7;"
        "assert not {'numba', 'torch', 'tensorboard'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
