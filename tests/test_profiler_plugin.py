"""The tab Profile: what it shows of a trace summed up by hand, and what it does with files that are none."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from tensorboard.plugins.base_plugin import TBContext
from werkzeug.test import Client

from rlboard.errors import DataError
from rlboard.profiler import find, traces, views
from rlboard.profiler.plugin import PAGE, Plugin
from rlboard.profiler.traces import Trace, read_trace
from tests.browser import chromium, eventually, get, tensorboard

RUN = "vision/train/one"
NAME = "profile/cycle1.trace.json.gz"
BEGIN = 1_000_000.0  # of the first event; traces count from when the machine was started


def event(name: str, start: float, duration: float, category: str = "cpu_op", **arguments: Any) -> dict[str, Any]:
    process, thread = (0, 7) if category in ("kernel", "gpu_memcpy") else (10, 11)
    args = {key.replace("_", " "): each for key, each in arguments.items()}
    known = {"ph": "X", "cat": category, "name": name, "pid": process, "tid": thread}
    return {**known, "ts": BEGIN + start, "dur": duration, "args": args}


def allocated(start: float, size: int, device: tuple[int, int] = (0, -1)) -> dict[str, Any]:
    arguments = {"Total Allocated": size, "Bytes": 1, "Device Type": device[0], "Device Id": device[1]}
    return {"ph": "i", "name": "[memory]", "pid": 10, "tid": 11, "ts": BEGIN + start, "args": arguments}


def fact(name: str, process: Any, thread: Any, value: Any) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": process, "tid": thread, "ts": 0, "args": {name.split("_")[-1]: value}}


SPAN = "user_annotation"
EVENTS = [
    fact("process_labels", 10, 0, "CPU"),
    fact("process_labels", 0, 0, "GPU 0"),
    fact("thread_name", 10, 11, "main"),
    fact("process_sort_index", 10, 0, 10),
    fact("process_sort_index", 0, 0, 5_000_000),
    event("PyTorch Profiler (0)", -50, 5_000, "Trace"),
    event("ProfilerStep#4", 0, 100, SPAN),
    event("data", 0, 40, SPAN),
    event("aten::index", 10, 20, External_id=1, Input_Dims=[[8, 3], []]),
    event("forward", 40, 50, SPAN),
    event("aten::linear", 40, 30, External_id=2, Input_Dims=[[8, 3], [4, 3]]),
    event("aten::mm", 45, 20, External_id=3, Input_Dims=[[8, 3], [3, 4]]),
    event("cudaLaunchKernel", 50, 5, "cuda_runtime", External_id=3),
    event("aten::linear", 72, 8, External_id=4, Input_Dims=[[8, 4], [2, 4]]),
    event("ProfilerStep#5", 100, 300, SPAN),
    event("data", 100, 60, SPAN),
    event("optimizer", 160, 90, SPAN),
    event("Optimizer.step#AdamW.step", 170, 80, SPAN),
    event("aten::outer", 170, 50, External_id=5),
    event("aten::outer", 180, 30, External_id=6),  # calls itself
    event("void gemm<float>(float*)", 60, 30, "kernel", External_id=3),
    {**event("void gemm<float>(float*)", 80, 30, "kernel", External_id=3), "tid": 8},  # beside the one before
    event("Memcpy HtoD", 300, 20, "gpu_memcpy", External_id=99),
    allocated(20, 500),
    allocated(48, 4_000),
    allocated(60, 1_000),
    allocated(61, 7, device=(1, 0)),
]


def document(events: list[Any], **members: Any) -> bytes:
    return json.dumps({"schemaVersion": 1, **members, "traceEvents": events, "traceName": "x"}).encode()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("logs")
    write(root / RUN / NAME, document(EVENTS, deviceProperties=[{"id": 0, "name": "Fast GPU"}]))
    return root


@pytest.fixture(scope="module")
def trace(logs: Path) -> Trace:
    return read_trace(logs / RUN / NAME)


class Asked:
    """The plugin of a log directory, asked as the page does."""

    def __init__(self, root: Path) -> None:
        self.plugin = Plugin(TBContext(logdir=str(root)))
        self.apps = self.plugin.get_plugin_apps()

    def __call__(self, route: str, run: str = RUN, trace: str = NAME, **query: Any) -> tuple[int, Any]:
        answer = self.raw(route, run=run, trace=trace, **query)
        while answer.status_code == 202:
            assert 0 <= json.loads(answer.data)["reading"] <= 1
            answer = self.raw(route, run=run, trace=trace, **query)
        return answer.status_code, json.loads(answer.data)

    def raw(self, route: str, **query: Any) -> Any:
        return Client(self.apps[route]).get("/", query_string=query, buffered=True)

    def listed(self) -> dict[str, list[str]]:
        found = json.loads(self.raw("/traces").data)
        return {each["run"]: [one["name"] for one in each["traces"]] for each in found}


@pytest.fixture
def ask(logs: Path) -> Asked:
    return Asked(logs)


# What is shown


def test_steps_are_summed_up_by_span(ask: Asked) -> None:
    status, answer = ask("/overview")
    assert status == 200
    assert answer["wall"] == 400
    assert (answer["step_count"], answer["step_mean"]) == (2, 200)
    assert [step["name"] for step in answer["steps"]] == ["step 4", "step 5"]
    assert [span["name"] for span in answer["spans"]] == ["data", "forward", "optimizer", "other"]
    assert [step["spans"] for step in answer["steps"]] == [[40, 50, 0, 10], [60, 0, 90, 150]]
    assert [span["time"] for span in answer["spans"]] == [50, 25, 45, 80]
    assert [span["share"] for span in answer["spans"]] == [0.25, 0.125, 0.225, 0.4]
    assert answer["hints"][0].startswith("data takes 25 % of a step:")
    assert answer["hints"][1].startswith("40 % of a step is in no span:")
    assert answer["hints"][2].startswith("The GPU is busy 18 % of the time")
    assert answer["gpu_busy"] == pytest.approx(70 / 400)  # 60 to 110 and 300 to 320
    assert answer["devices"] == ["Fast GPU"]
    assert answer["memory"] == [{"device": "CPU", "peak": 4_000}, {"device": "CUDA 0", "peak": 7}]
    assert [(row["name"], row["self"], row["device"]) for row in answer["top"][:2]] == [
        ("aten::mm", 15, 60),
        ("aten::outer", 50, 0),
    ]
    assert answer["notice"] == ""


def test_self_time_is_the_total_less_what_is_inside(ask: Asked) -> None:
    _, answer = ask("/operators", by_shape="0")
    rows = {row["name"]: row for row in answer["rows"]}
    figures = {name: (row["calls"], row["total"], row["self"], row["device"]) for name, row in rows.items()}
    assert figures == {
        "ProfilerStep#4": (1, 100, 10, 0),
        "ProfilerStep#5": (1, 300, 150, 0),
        "data": (2, 100, 80, 0),
        "forward": (1, 50, 12, 0),
        "optimizer": (1, 90, 10, 0),
        "Optimizer.step#AdamW.step": (1, 80, 30, 0),
        "aten::index": (1, 20, 20, 0),
        "aten::linear": (2, 38, 18, 0),
        "aten::mm": (1, 20, 15, 60),
        "cudaLaunchKernel": (1, 5, 5, 0),
        "aten::outer": (2, 50, 50, 0),  # what calls itself counts once
        "void gemm<float>(float*)": (2, 60, 60, 0),
        "Memcpy HtoD": (1, 20, 20, 0),
    }
    assert rows["void gemm<float>(float*)"]["category"] == "kernel"
    assert rows["aten::index"]["shapes"] == "[[8, 3], []]"
    assert rows["aten::linear"]["shapes"] == "2 shapes"
    own = [row["self"] for row in answer["rows"]]
    assert own == sorted(own, reverse=True)
    _, answer = ask("/operators", by_shape="1")
    linear = [(row["shapes"], row["self"]) for row in answer["rows"] if row["name"] == "aten::linear"]
    assert linear == [("[[8, 3], [4, 3]]", 10), ("[[8, 4], [2, 4]]", 8)]


def test_the_timeline_has_a_lane_for_each_thread_and_a_row_for_each_depth(ask: Asked) -> None:
    status, answer = ask("/timeline", begin=0, end=400, pixels=4_000, text="LINEAR")
    assert status == 200
    assert [lane["name"] for lane in answer["lanes"]] == ["CPU · main", "GPU 0 · 7", "GPU 0 · 8"]
    rows = [[answer["names"][name] for name in row["name"]] for row in answer["lanes"][0]["rows"]]
    assert rows[:2] == [["ProfilerStep#4", "ProfilerStep#5"], ["data", "forward", "data", "optimizer"]]
    assert rows[2] == ["aten::index", "aten::linear", "aten::linear", "Optimizer.step#AdamW.step"]
    second = answer["lanes"][0]["rows"][2]
    assert (second["start"], second["width"]) == ([10, 40, 72, 170], [20, 30, 8, 80])
    assert second["found"] == [0, 1, 1, 0]
    assert (answer["found"], answer["found_time"]) == (2, 38)
    _, part = ask("/timeline", begin=185, end=200, pixels=100, text="")
    assert [len(row["start"]) for row in part["lanes"][0]["rows"]] == [1, 1, 1, 1, 1]
    assert part["found"] is None


def test_narrow_neighbours_are_drawn_as_one(tmp_path: Path) -> None:
    many = [event(f"aten::{number % 7}", 10 * number, 5) for number in range(20_000)]
    path = write(tmp_path / "many.trace.json", document([*many, event("long", 300_000, 1_000)]))
    whole = read_trace(path)
    answer = views.timeline(whole, 0, whole.wall, 100, "aten::3")
    (row,) = answer["lanes"][0]["rows"]
    assert len(row["start"]) < 101
    assert sum(row["count"]) == 20_001
    assert row["name"][-1] == 0
    assert answer["names"] == ["long"]
    several = [place for place, count in enumerate(row["count"]) if count > 1]
    assert {(row["event"][place], row["name"][place]) for place in several} == {(-1, -1)}
    (finest,) = views.timeline(whole, 0, whole.wall, 1_000_000, "")["lanes"][0]["rows"]
    assert len(finest["start"]) <= views.MOST_RECTANGLES
    (near,) = views.timeline(whole, 1_000, 1_100, 1_000, "")["lanes"][0]["rows"]
    assert near["count"] == [1] * 11


def test_all_that_the_file_says_about_an_event_can_be_read(ask: Asked) -> None:
    status, found = ask("/find", text="aten::MM", time=-1, backwards="0")
    assert (status, found["name"], found["duration"], found["self"], found["device"]) == (200, "aten::mm", 20, 15, 60)
    assert found["around"] == ["ProfilerStep#4", "forward", "aten::linear"]
    assert found["arguments"] == {"External id": "3", "Input Dims": "[[8, 3], [3, 4]]"}
    assert ask("/event", number=found["event"])[1] == found
    _, first = ask("/find", text="data", time=-1, backwards="0")
    _, second = ask("/find", text="data", time=first["start"], backwards="0")
    assert (first["start"], second["start"]) == (0, 100)
    assert ask("/find", text="data", time=second["start"], backwards="0")[1] == first  # and from the start again
    assert ask("/find", text="data", time=second["start"], backwards="1")[1] == first
    assert ask("/find", text="nothing", time=0, backwards="0") == (200, None)


def test_the_events_of_a_long_trace_are_found_in_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "PIECE", 1_000)
    many = [event("한국어 🙂", 10 * number, 5, number=number) for number in range(300)]
    content = json.dumps({"traceEvents": many}, ensure_ascii=False).encode()
    trace = read_trace(write(tmp_path / "many.trace.json.gz", content))
    assert [trace.arguments(number) for number in range(300)] == [{"number": number} for number in range(300)]


def test_the_memory_curve_has_its_peak(ask: Asked) -> None:
    _, answer = ask("/memory")
    cpu, gpu = answer["curves"]
    assert (cpu["device"], cpu["times"], cpu["bytes"]) == ("CPU", [20, 48, 60], [500, 4_000, 1_000])
    assert cpu["peak"] == {
        "time": 48,
        "bytes": 4_000,
        "inside": ["ProfilerStep#4", "forward", "aten::linear", "aten::mm"],
    }
    assert gpu["device"] == "CUDA 0"
    assert [step["name"] for step in answer["steps"]] == ["step 4", "step 5"]


def test_a_long_memory_curve_keeps_its_peak(tmp_path: Path) -> None:
    levels = [event("aten::empty", 0, 1), *(allocated(number, number % 10) for number in range(20_000))]
    levels[7_777] = allocated(7_776, 1_000)
    (curve,) = views.memory(read_trace(write(tmp_path / "long.trace.json", document(levels))))["curves"]
    assert len(curve["times"]) <= views.MOST_POINTS + 2
    assert curve["bytes"].count(1_000) == 1
    assert curve["times"][curve["bytes"].index(1_000)] == 7_776


@pytest.mark.usefixtures("one_thread")
def test_self_times_are_those_of_torch(tmp_path: Path) -> None:
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    linear, inputs = torch.nn.Linear(64, 64), torch.ones(32, 64)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as profiler:
        with record_function("forward"):
            loss = linear(inputs).relu().sum()
        with record_function("backward"):
            loss.backward()
    profiler.export_chrome_trace(str(tmp_path / "torch.trace.json.gz"))
    trace = read_trace(tmp_path / "torch.trace.json.gz")
    rows = {row["name"]: row for row in views.operators(trace, by_shape=False)["rows"]}
    expected = {average.key: average for average in profiler.key_averages()}
    assert {"aten::addmm", "aten::relu", "forward", "backward"} <= rows.keys() <= expected.keys()
    for name, row in rows.items():
        assert row["calls"] >= expected[name].count, name  # torch makes one call of one that only calls its like
        assert row["self"] == pytest.approx(expected[name].self_cpu_time_total, abs=0.1), name
    assert [span["name"] for span in views.overview(trace)["spans"]] == ["forward", "backward", "other"]
    assert views.overview(trace)["hints"][0].startswith("No steps are marked")
    assert views.memory(trace)["curves"][0]["peak"]["bytes"] > 0


# Which traces there are


def test_traces_are_found_at_any_depth_under_the_names_of_their_runs(tmp_path: Path) -> None:
    content = document(EVENTS)
    places = {
        "REINFORCE/a/profile/cycle10.trace.json.gz": ("REINFORCE/a", "profile/cycle10.trace.json.gz"),
        "REINFORCE/a/profile/cycle2.trace.json.gz": ("REINFORCE/a", "profile/cycle2.trace.json.gz"),
        "b/host_1.171.pt.trace.json": ("b", "host_1.171.pt.trace.json"),
        "b/plugins/profile/w.pt.trace.json.gz": ("b", "plugins/profile/w.pt.trace.json.gz"),
        "b/plugins/profile/2026/w.trace.json": ("b", "plugins/profile/2026/w.trace.json"),
        "trace.json": (".", "trace.json"),
    }
    for place in places:
        write(tmp_path / place, content)
    for other in ("b/x.json", "b/x.trace.json.bak", "b/notrace.json", "b/profile/x.trace.json.tmp"):
        write(tmp_path / other, content)
    (tmp_path / "b" / "directory.trace.json").mkdir()
    ask = Asked(tmp_path)
    listed = ask.listed()
    assert {(run, name) for run, names in listed.items() for name in names} == set(places.values())
    assert listed["REINFORCE/a"] == ["profile/cycle2.trace.json.gz", "profile/cycle10.trace.json.gz"]
    for run, name in places.values():
        assert ask("/overview", run, name)[1]["wall"] == 400


def test_new_traces_appear_and_a_changed_one_is_read_again(tmp_path: Path) -> None:
    ask = Asked(tmp_path / "logs")
    assert not ask.plugin.is_active()
    write(tmp_path / "logs" / RUN / NAME, document(EVENTS))
    assert eventually(ask.plugin.is_active, seconds=20)
    assert ask("/overview")[1]["wall"] == 400
    path = write(tmp_path / "logs" / RUN / NAME, document([*EVENTS, event("late", 900, 100)]))
    os.utime(path, ns=(1, 1))
    assert ask("/overview")[1]["wall"] == 1_000
    path.unlink()
    assert ask("/overview")[0] == 404
    eventually(lambda: not ask.plugin.is_active(), seconds=20)


def test_no_request_leads_out_of_the_log_directory(tmp_path: Path, ask: Asked) -> None:
    secret = write(tmp_path / "secret" / "x.trace.json", document(EVENTS))
    root = tmp_path / "logs"
    write(root / "run" / "profile" / "own.trace.json", document(EVENTS))
    (root / "run" / "profile" / "file.trace.json").symlink_to(secret)
    (root / "run" / "plugins").mkdir()
    (root / "run" / "plugins" / "profile").symlink_to(secret.parent)
    (root / "run" / "loop").symlink_to(root)
    (root / "within.trace.json").symlink_to(root / "run" / "profile" / "own.trace.json")
    (root / "linked").symlink_to(root / "run")  # a run, as TensorBoard takes it for one
    ask = Asked(root)
    assert ask.listed() == {
        ".": ["within.trace.json"],
        "linked": ["profile/own.trace.json"],
        "run": ["profile/own.trace.json"],
    }
    up = "../secret"
    for run, name in (
        (up, "x.trace.json"),
        ("run", f"../{up}/x.trace.json"),
        ("run", str(secret)),
        (str(secret.parent), secret.name),
        ("run", "profile/file.trace.json"),
        ("run", "profile/own.trace.json\0"),
        ("", ""),
    ):
        assert ask("/overview", run, name) == (404, {"error": ask("/overview", run, name)[1]["error"]}), (run, name)
        assert ask.raw("/download", run=run, trace=name).status_code == 404
    own = root / "run" / "profile" / "own.trace.json"
    own.unlink()
    own.symlink_to(secret)  # after it was found
    assert ask("/overview", "run", "profile/own.trace.json")[0] == 404
    assert ask.raw("/download", run="run", trace="profile/own.trace.json").status_code == 404


def test_the_file_itself_can_be_had(ask: Asked, logs: Path) -> None:
    answer = ask.raw("/download", run=RUN, trace=NAME)
    assert answer.data == (logs / RUN / NAME).read_bytes()
    assert answer.headers["Content-Type"] == "application/gzip"
    assert "attachment; filename=vision_train_one-cycle1.trace.json.gz" in answer.headers["Content-Disposition"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


# What is no trace

GOOD = document(EVENTS)
OPERATOR = EVENTS[8]
WRONG = {
    "empty": (b"", "the file is empty"),
    "no json": (b"\x00\xff\x80" * 100, "the file is cut off or no JSON"),
    "other json": (b'{"a": [1, 2]}', "it has no traceEvents"),
    "a number": (b"12", "the file is cut off or no JSON"),
    "no list": (b'{"traceEvents": {"a": 1}}', "it has no traceEvents"),
    "no events": (b'{"traceEvents": []}', "no event has a start and a duration"),
    "odd events": (b'{"traceEvents": [1, null, "x", [], {}, {"ph": 3}]}', "no event has a start and a duration"),
    "bad times": (document([{**OPERATOR, "ts": "x"}, {**OPERATOR, "dur": -1}, {**OPERATOR, "ts": 1e999}]), "no event"),
    "bad types": (document([{**OPERATOR, "pid": [1]}, {**OPERATOR, "args": "a"}, {**OPERATOR, "ts": []}]), "no event"),
    "deep": (b'{"traceEvents": ' + b"[" * 100_000, "the file is cut off or no JSON"),
    "cut at once": (GOOD[:40], "the file is cut off or no JSON"),
    "no gzip": (b"\x1f\x8b" + b"\x00" * 100, "the file is damaged"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "says"), WRONG.values(), ids=WRONG)
def test_what_is_no_trace_is_told_in_one_line(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "run" / "profile" / "x.trace.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    ask = Asked(tmp_path)
    for route in ("/overview", "/operators", "/memory"):
        status, answer = ask(route, "run", "profile/x.trace.json")
        assert status == 422
        assert answer["error"].startswith("x.trace.json is no trace of torch.profiler: ")
        assert says in answer["error"]
        assert "\n" not in answer["error"]


def test_what_comes_before_the_damage_is_shown(tmp_path: Path) -> None:
    many = document([event("aten::mm", number, 1) for number in range(5_000)])
    packed = gzip.compress(many)
    middle = many.index(b"{", len(many) // 2)
    for content in (many[:-2_000], packed[: len(packed) // 2], many[:middle] + b"#" + many[middle:]):
        path = tmp_path / "x.trace.json"
        path.write_bytes(content)
        trace = read_trace(path)
        assert 1_000 < len(trace.starts) < 5_000
        assert re.fullmatch(r"the file is cut off.*: shown are the [\d,]+ events before that", trace.notice)
    nameless = {key: value for key, value in OPERATOR.items() if key != "name"} | {"tid": "a thread of its own"}
    strange = [{"ph": "X"}, 7, nameless, allocated(5, 1 << 70, device=(1, 1))]
    odd = read_trace(write(tmp_path / "y.trace.json", document([*EVENTS, *strange])))
    assert odd.notice == "4 events left out, which have no usable time or name"
    plain = read_trace(write(tmp_path / "z.trace.json", document(EVENTS)))
    assert {**views.overview(odd), "notice": ""} == views.overview(plain)


def test_hostile_files_take_no_more_than_they_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "LONGEST_TEXT", 1 << 20)
    monkeypatch.setattr(traces, "LONGEST_VALUE", 1 << 18)
    event_of_spaces = json.dumps(event("aten::mm", 0, 1)).encode() + b"," + b" " * (1 << 22)
    bombs = {
        "spaces": b" " * (1 << 22),
        "a string": b'{"a": "' + b"x" * (1 << 22),
        "a name": b'{"traceEvents": [{"name": "' + b"x" * (1 << 22),
    }
    for content in bombs.values():
        path = write(tmp_path / "bomb.trace.json.gz", content)
        assert path.stat().st_size < 50_000
        with pytest.raises(DataError, match=r"the file is (longer than|damaged)"):
            read_trace(path)
    trace = read_trace(write(tmp_path / "tail.trace.json.gz", b'{"traceEvents": [' + event_of_spaces))
    assert len(trace.starts) == 1
    assert "longer than" in trace.notice
    monkeypatch.setattr(traces, "MOST_EVENTS", 100)
    trace = read_trace(write(tmp_path / "many.trace.json.gz", document([event("aten::mm", 0, 1)] * 200)))
    assert trace.notice == "it has 100 events or more: shown are the 100 events before that"


@pytest.mark.parametrize(
    ("route", "query"),
    [
        ("/timeline", {"begin": "x", "end": 1, "pixels": 9, "text": ""}),
        ("/timeline", {"begin": 5, "end": 5, "pixels": 9, "text": ""}),
        ("/timeline", {"begin": "nan", "end": "inf", "pixels": 9, "text": ""}),
        ("/timeline", {}),
        ("/event", {"number": "one"}),
        ("/find", {"text": "a", "time": "", "backwards": "0"}),
    ],
)
def test_a_wrong_parameter_is_told(ask: Asked, route: str, query: dict[str, Any]) -> None:
    status, answer = ask(route, **query)
    assert status == 400
    assert answer["error"].startswith("a parameter cannot be used")


def test_an_event_that_is_not_there_is_told(ask: Asked) -> None:
    assert [ask("/event", number=number)[0] for number in (-1, 10_000)] == [404, 404]


def test_traces_asked_for_long_ago_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlboard.profiler.plugin.MOST_MEMORY", 1)
    for name in "ab":
        write(tmp_path / name / NAME, document(EVENTS))
    ask = Asked(tmp_path)
    for name in "abab":
        assert ask("/overview", name)[1]["wall"] == 400
    assert len(ask.plugin._shelf._readings) == 1


# The plugin


def test_the_plugin_is_registered_and_imports_nothing_heavy() -> None:
    (entry,) = entry_points(group="tensorboard_plugins", name="rlboard_profile")
    assert entry.value == "rlboard.profiler.plugin:Plugin"
    code = (
        "import sys, rlboard.profiler.plugin as plugin; from tensorboard.plugins.base_plugin import TBContext\n"
        "made = plugin.Plugin(TBContext(logdir='.')); made.get_plugin_apps(); made.is_active()\n"
        "print({name.partition('.')[0] for name in sys.modules} & {'torch', 'numpy', 'numba', 'gymnasium', 'pandas'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PAGE)
    assert done.stdout == "set()\n"


def test_without_a_log_directory_it_is_not_active() -> None:
    for logdir in (None, "", "/nowhere/at/all", "gs://bucket/logs"):
        assert not Plugin(TBContext(logdir=logdir)).is_active()


def test_the_page_is_whole_and_asks_nobody_else(ask: Asked) -> None:
    texts = {path.name: path.read_text("utf-8") for path in PAGE.iterdir()}
    for name, text in texts.items():
        answer = ask.raw(f"/{name}")
        assert answer.get_data(as_text=True) == text
        assert answer.headers["Content-Type"].startswith("text/css" if name.endswith("css") else "text/javascript")
        for imported in re.findall(r"""from '\./(.*?)'""", text):
            assert imported in texts
        assert set(re.findall(r"https?://[\w.]+", text)) <= {"https://ui.perfetto.dev"}  # a link
        assert not re.search(r"\beval\(|innerHTML|new Function", text)


def test_links_in_circles_end(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "x.trace.json", GOOD)
    for name in ("up", "self"):
        (tmp_path / "a" / "b" / name).symlink_to(tmp_path / "a" if name == "up" else tmp_path / "a" / "b")
    started = time.monotonic()
    assert list(find.find_traces(tmp_path)) == [("a/b", "x.trace.json")]
    assert time.monotonic() - started < 30


@pytest.fixture
def served(logs: Path) -> Iterator[str]:
    with tensorboard(logs) as url:
        yield url


@pytest.mark.browser
@pytest.mark.slow  # starts TensorBoard and a browser
def test_all_views_are_drawn(served: str, logs: Path) -> None:
    assert get(served, "plugins_listing")["rlboard_profile"]["enabled"]
    write(logs / "bad" / "trace.json", b"{}")
    with chromium() as page:
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{served}/#rlboard_profile")
        frame = page.frame_locator("iframe")
        frame.locator("#run").select_option(RUN)
        frame.get_by_text("mean of 2").wait_for()
        assert frame.locator(".step .number").all_inner_texts() == ["100 µs", "300 µs"]
        assert "data takes 25 %" in frame.locator(".hints").inner_text()

        frame.get_by_role("tab", name="Operators").click()
        names = frame.locator("table.operators th.name .link")
        names.first.wait_for()
        assert names.first.inner_text() == "aten::outer"
        frame.get_by_role("button", name="Calls").click()
        assert frame.locator("th.calls").get_attribute("aria-sort") == "descending"
        frame.get_by_label("Filter by name").fill("LINEAR")
        assert names.all_inner_texts() == ["aten::linear"]
        names.first.click()

        frame.get_by_text("2 found, 38.0 µs in all").wait_for()
        frame.locator("#search").press("Enter")
        frame.locator(".details").get_by_text("in ProfilerStep#4 › forward").wait_for()
        drawn: Callable[[str], Any] = lambda selector: frame.locator(selector).evaluate(COLOURS)  # noqa: E731
        before = drawn(".pane canvas")
        assert before > 5
        frame.locator(".pane canvas").press("w")
        frame.locator(".pane canvas").click(position={"x": 300, "y": 64})

        frame.get_by_role("tab", name="Memory").click()
        frame.get_by_text("Allocated on CUDA 0").wait_for()
        eventually(lambda: frame.locator(".chart canvas").first.evaluate(COLOURS) > 5, seconds=20)

        page.reload()
        frame.get_by_text("Allocated on CPU").wait_for()  # the same view of the same trace
        frame.locator("#run").select_option("bad")
        frame.get_by_text("trace.json is no trace of torch.profiler: it has no traceEvents").wait_for()
        assert not errors


COLOURS = """canvas => new Set(new Uint32Array(
  canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.buffer)).size"""
