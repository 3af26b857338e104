"""`rlboard vision profile` and `--profile`: what is recorded, what is made of it, and that it changes nothing else."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.profiler import profile

from rlboard.cli import main
from rlboard.instruments.profiler import mean_spans, operator_tables, span_figure, span_table, spans_of
from rlboard.profiler.traces import Trace, read_trace

pytestmark = [pytest.mark.usefixtures("few_shapes"), pytest.mark.xdist_group("profile")]  # one run for all

SPANS = ("data", "forward", "backward", "optimizer", "synchronize", "logging", "other")
GYM = ("reinforce", "--engine=gym", "--log=minimal")


def run(root: Path, name: str, *arguments: str) -> tuple[Path, dict[str, Any]]:
    """Runs a loop; returns its directory and what its run.json says."""
    assert main([*arguments, "--run-name", name, "--log-dir", str(root)]) == 0
    (path,) = root.rglob(f"{name}/run.json")
    return path.parent, json.loads(path.read_text())


def read(directory: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(directory), {"scalars": 0, "tensors": 0, "images": 0})
    accumulator.Reload()
    return accumulator


def trace(path: Path) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return events


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("profile")
    return run(root, "smoke", "vision", "profile", "--smoke", "--threads=1", "--steps=11")[0]


def test_each_cycle_is_a_trace_of_three_steps(profiled: Path) -> None:
    assert {path.name for path in (profiled / "profile").iterdir()} == {
        "cycle1.trace.json.gz",
        "cycle2.trace.json.gz",
    }
    for cycle, steps in ((1, (2, 3, 4)), (2, (7, 8, 9))):
        events = trace(profiled / f"profile/cycle{cycle}.trace.json.gz")
        marks = [event["name"] for event in events if event.get("cat") == "user_annotation"]
        assert [mark for mark in marks if mark.startswith("ProfilerStep#")] == [f"ProfilerStep#{n}" for n in steps]
        assert {name: marks.count(name) for name in SPANS[:-1]} == dict.fromkeys(SPANS[:-1], 3)
        shapes = [event["args"]["Input Dims"][0] for event in events if event["name"] == "aten::convolution"]
        assert [32, 3, 32, 32] in shapes
        assert any(event["name"] == "[memory]" for event in events)


def test_spans_are_scalars_that_add_up_to_their_step(profiled: Path) -> None:
    events = read(profiled)
    steps = {point.step: point.value for point in events.Scalars("Profile/step_ms")}
    assert list(steps) == [3, 4, 5, 8, 9, 10]
    spans = {name: {point.step: point.value for point in events.Scalars(f"Profile/{name}_ms")} for name in SPANS}
    for step, duration in steps.items():
        assert sum(spans[name][step] for name in SPANS) == pytest.approx(duration, rel=1e-5)
        assert min(spans[name][step] for name in ("data", "forward", "backward", "optimizer")) > 0
    memory = events.Scalars("Profile/peak_memory_MB")
    assert [point.step for point in memory] == [5, 10]
    assert 50 < memory[0].value <= memory[1].value < 100_000
    assert len(events.Scalars("time/images_per_second")) == 11


def test_tables_and_bars_can_be_read(profiled: Path) -> None:
    events = read(profiled)
    first, second = (
        point.tensor_proto.string_val[0].decode() for point in events.Tensors("Profile/operators/text_summary")
    )
    assert first.startswith("Cycle 1, steps 3 to 5; its trace: `profile/cycle1.trace.json.gz`")
    for table in (first, second):
        assert "| `aten::convolution_backward` | 15 |" in table  # one layer is wide enough for Winograd
        assert "| **step** |" in table
    pictures = events.Images("Profile/spans")
    assert [point.step for point in pictures] == [5, 10]
    assert Image.open(io.BytesIO(pictures[0].encoded_image_string)).size == (720, 440)


def mark(name: str, begin: float, duration: float, cat: str = "user_annotation", tid: int = 1) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": tid, "ts": begin, "dur": duration}


def traced(path: Path, events: list[dict[str, Any]]) -> Trace:
    path.write_text(json.dumps({"traceEvents": events}))
    return read_trace(path)


def test_spans_of_a_step_by_hand(tmp_path: Path) -> None:
    events = [
        mark("forward", 1000, 3000),
        mark("ProfilerStep#7", 0, 10_000),
        mark("inner", 1500, 500),
        mark("forward", 5000, 1000),
        mark("backward", 5999.999, 2000),  # torch rounds
        mark("elsewhere", 100, 5000, tid=2),
        mark("aten::add", 0, 900, "cpu_op"),
        mark("ProfilerStep#8", 10_000, 1000),
        mark("forward", 10_000, 1000),
        {"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "ts": 0},
    ]
    found = spans_of(traced(tmp_path / "trace.json", events))
    assert {step: list(spans) for step, spans in found.items()} == {
        7: ["forward", "backward", "other"],
        8: ["forward", "other"],
    }
    assert found[7] == pytest.approx({"forward": 4.0, "backward": 2.0, "other": 4.0}, abs=1e-5)
    assert found[8] == pytest.approx({"forward": 1.0, "other": 0.0}, abs=1e-5)
    means = mean_spans(list(found.values()))
    assert list(means) == ["forward", "other", "backward"]
    assert span_table(list(found.values())).splitlines()[2:] == [
        "| forward | 2.500 | 45.5 % |",
        "| other | 2.000 | 36.4 % |",
        "| backward | 1.000 | 18.2 % |",
        "| **step** | 5.500 | |",
    ]


def test_tables_by_hand(tmp_path: Path) -> None:
    operators = [
        mark("inner", 100, 300, "cpu_op"),
        mark("outer", 0, 1000, "cpu_op"),
        mark("innermost", 200, 100, "cpu_op"),
        mark("inner", 399.999, 200, "cpu_op"),  # torch rounds
        mark("out|er", 1000, 500, "cpu_op"),
        mark("inner", 0, 2000, "cpu_op", tid=2),
    ]
    (table,) = operator_tables(traced(tmp_path / "trace.json", operators))
    assert table.splitlines()[2:] == [
        "| `inner` | 3 | 2.400 | 2.500 | 68.6 % |",
        "| `outer` | 1 | 0.500 | 1.000 | 14.3 % |",
        "| `out∣er` | 1 | 0.500 | 0.500 | 14.3 % |",
        "| `innermost` | 1 | 0.100 | 0.100 | 2.9 % |",
    ]
    kernels = [mark("gemm", 0, 4000, "kernel", tid=7), mark("copy", 1, 9, "gpu_memcpy", 8)]
    tables = operator_tables(traced(tmp_path / "trace.json", [*operators, *kernels]))
    assert tables[0] == table
    assert tables[1].splitlines()[0].startswith("| kernel |")
    assert tables[1].splitlines()[2] == "| `gemm` | 1 | 4.000 | 4.000 | 99.8 % |"


def test_bars_are_as_high_as_their_steps() -> None:
    """The tallest step is where the figure's colours reach highest; `other` is grey, on top."""
    picture = span_figure([(3, {"forward": 1.0, "other": 1.0}), (4, {"forward": 4.0, "other": 0.0})]).astype(int)
    blue = np.all(abs(picture - (31, 119, 180)) < 3, axis=2)
    columns = np.flatnonzero(blue.sum(axis=0) > 20)  # the legend's patch is lower
    left, right = blue[:, columns[0] + 5].sum(), blue[:, columns[-1] - 5].sum()
    assert right == pytest.approx(4 * left, rel=0.05)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("command", "steps"),
    [
        ((*GYM, "--episodes=60", "--eval-episodes=1"), 1),
        (("vision", "train", "--smoke", "--images=160", "--threads=1", "--log=minimal"), 3),
    ],
    ids=["reinforce", "vision"],
)
def test_what_is_learned_is_the_same_bit_for_bit(
    command: tuple[str, ...], steps: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, facts = run(tmp_path, "plain", *command)
    assert "profile:" not in capsys.readouterr().out
    asked, facts_too = run(tmp_path, "profiled", *command, "--profile")
    assert f"profile: {steps} of 6 steps, because the run has ended, " in capsys.readouterr().out
    assert facts["weights_sha256"] == facts_too["weights_sha256"] is not None
    assert not (plain / "profile").exists()
    assert (asked / "profile/cycle1.trace.json.gz").exists()
    assert len(read(asked).Scalars("Profile/step_ms")) == steps
    tags = set(read(asked).Tags()["scalars"])
    assert {f"Profile/{name}_ms" for name in ("forward", "backward", "optimizer", "logging", "step")} <= tags
    assert not any(tag.startswith("Profile/") for tag in read(plain).Tags()["scalars"])


@pytest.mark.slow
def test_the_compiled_engine_learns_in_a_span(tmp_path: Path) -> None:
    directory, _ = run(tmp_path, "a", "reinforce", "--engine=compiled", "--episodes=220", "--log=minimal", "--profile")
    assert len(read(directory).Scalars("Profile/learn_ms")) == 6


def test_a_run_that_ends_before_the_third_step_has_no_profile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, _ = run(tmp_path, "a", *GYM, "--episodes=40", "--eval-episodes=1", "--profile")
    assert "profile: none, because the run has ended at the first 2 of its steps" in capsys.readouterr().out
    assert not list(directory.glob("profile/*"))


@pytest.mark.slow
def test_a_resumed_run_is_profiled_again(tmp_path: Path) -> None:
    directory, _ = run(tmp_path, "a", *GYM, "--episodes=220", "--profile")
    assert main([*GYM[:1], "--resume=a", "--episodes=420", "--profile", "--log-dir", str(tmp_path)]) == 0
    steps = [point.step for point in read(directory).Scalars("Profile/step_ms")]
    assert steps == [60, 80, 100, 160, 180, 200, 280, 300, 320, 380, 400, 420]


def test_a_full_disk_costs_the_profile_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: profile, path: str) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(profile, "export_chrome_trace", full)
    with pytest.warns(RuntimeWarning, match=r"goes on without its profile: .*No space left") as warned:
        directory, facts = run(tmp_path, "a", *GYM, "--episodes=100", "--profile")
    assert len(warned) == 1
    assert (facts["status"], facts["dropped_records"]) == ("completed", 0)
    assert list((directory / "profile").iterdir()) == []
    assert not torch._C._autograd._profiler_enabled()


def test_a_profiler_that_does_not_start_costs_the_profile_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: profile) -> None:
        raise RuntimeError("no tracer here")

    monkeypatch.setattr(profile, "start", refuse)
    with pytest.warns(RuntimeWarning, match="without its profile: RuntimeError: no tracer here") as warned:
        _, facts = run(tmp_path, "a", *GYM, "--episodes=20", "--profile")
    assert len(warned) == 1
    assert facts["status"] == "completed"


def test_a_loop_that_fails_leaves_no_profiler_on(tmp_path: Path) -> None:
    arguments = [*GYM, "--profile", "--lr=1e30", "--episodes=200", "--log-dir", str(tmp_path)]
    assert main(arguments) == 4
    assert not torch._C._autograd._profiler_enabled()


def test_several_seeds_are_not_profiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reinforce", "--seeds=2", "--profile", "--log-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "rlboard: --seeds and --profile do not go together: profile one seed\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_and_memory_on_a_gpu(tmp_path: Path) -> None:
    directory, _ = run(tmp_path, "a", "vision", "profile", "--smoke", "--device=cuda")
    assert (directory / "profile/memory_snapshot.pickle").stat().st_size > 0
    events = read(directory)
    assert "| kernel |" in events.Tensors("Profile/operators/text_summary")[0].tensor_proto.string_val[0].decode()
    forward, total = (events.Scalars(f"Memory/{name}_GB")[-1].value for name in ("forward", "total"))
    assert 0 < forward <= total
