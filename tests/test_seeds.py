"""Several seeds side by side: each as it would be alone, and together a group with its own run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlboard import cli, seeds
from rlboard.cli import build_app, main
from rlboard.registry import Track
from rlboard.statistics import interquartile_mean, interval
from rlboard.writer import Writer
from tests.browser import chromium, tensorboard
from tests.conftest import ROOT

pytestmark = pytest.mark.xdist_group("compiled")

TAGS = {f"reward/{name}" for name in ("mean", "lower", "upper", "iqm", "iqm_lower", "iqm_upper")}


def curve(directory: Path, tag: str) -> tuple[list[int], list[float]]:
    accumulator = EventAccumulator(str(directory), {"scalars": 0})
    accumulator.Reload()
    points = accumulator.Scalars(tag)
    return [point.step for point in points], [point.value for point in points]


def facts(directory: Path) -> Any:
    return json.loads((directory / "run.json").read_text())


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A group of five compiled seeds, and its third seed alone."""
    root = tmp_path_factory.mktemp("seeds") / "logs"
    options = ["--episodes=100", "--eval-every=50", "--engine=compiled", f"--log-dir={root}", "--preset=solve"]
    assert main(["reinforce", *options, "--seeds=5", "--seed=3", "--run-name=group"]) == 0
    assert main(["reinforce", *options, "--seed=5", "--run-name=alone"]) == 0
    return root / "REINFORCE"


def test_each_seed_is_a_run_below_the_group(log_dir: Path) -> None:
    directories = sorted(path.name for path in (log_dir / "group").iterdir() if path.is_dir())
    assert directories == ["seed3", "seed4", "seed5", "seed6", "seed7"]
    for name in directories:
        about = facts(log_dir / "group" / name)
        assert (f"seed{about['seed']}", about["status"]) == (name, "completed")
        assert curve(log_dir / "group" / name, "reward")[0] == [20, 40, 60, 80, 100]
        accumulator = EventAccumulator(str(log_dir / "group" / name), {"histograms": 0})
        accumulator.Reload()
        assert accumulator.Tags()["graph"]
        assert [histogram.step for histogram in accumulator.Histograms("Weights/hidden.weight")][:2] == [0, 20]
    assert facts(log_dir / "group")["seeds"] == [3, 4, 5, 6, 7]


def test_a_seed_of_a_group_is_what_it_is_alone(log_dir: Path) -> None:
    together, alone = log_dir / "group/seed5", log_dir / "alone"
    assert facts(together)["weights_sha256"] == facts(alone)["weights_sha256"]
    for tag in ("reward", "train/loss", "eval/mean_reward"):
        assert curve(together, tag) == curve(alone, tag)


def test_the_group_has_the_statistics_of_its_seeds(log_dir: Path) -> None:
    scores = np.array([curve(log_dir / f"group/seed{seed}", "reward")[1] for seed in range(3, 8)])
    steps, means = curve(log_dir / "group", "reward/mean")
    assert steps == [20, 40, 60, 80, 100]
    np.testing.assert_allclose(means, scores.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(
        curve(log_dir / "group", "reward/iqm")[1], np.sort(scores, axis=0)[1:4].mean(axis=0), rtol=1e-6
    )
    for name, ends in {"": interval(scores), "iqm_": interval(scores, interquartile_mean)}.items():
        for end, values in zip(("lower", "upper"), ends, strict=True):
            np.testing.assert_allclose(curve(log_dir / "group", f"reward/{name}{end}")[1], values, rtol=1e-6)
    assert facts(log_dir / "group")["results"].keys() == TAGS


def test_the_bands_are_a_margin_chart(log_dir: Path) -> None:
    from tensorboard.plugins.custom_scalar import layout_pb2

    accumulator = EventAccumulator(str(log_dir / "group"))
    accumulator.Reload()
    (event,) = accumulator.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    (category,) = layout.category
    charts = {chart.title: chart.margin.series[0] for chart in category.chart}
    series = charts["reward, mean"]
    assert (series.value, series.lower, series.upper) == ("reward/mean", "reward/lower", "reward/upper")
    assert charts["reward, interquartile mean"].value == "reward/iqm"


@pytest.mark.parametrize(
    ("seeds", "jobs"), [(2, ["--jobs=1"]), pytest.param(3, [], marks=pytest.mark.slow)], ids=["one by one", "at once"]
)
def test_processes_train_what_has_no_compiled_engine(
    seeds: int, jobs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--episodes=40", "--eval-episodes=1", "--engine=gym", f"--log-dir={tmp_path}", "--log=minimal"]
    assert main(["reinforce", *options, f"--seeds={seeds}", *jobs, "--run-name=group"]) == 0
    assert main(["reinforce", *options, "--seed=2", "--run-name=alone"]) == 0
    together, alone = tmp_path / "REINFORCE/group/seed2", tmp_path / "REINFORCE/alone"
    assert facts(together)["weights_sha256"] == facts(alone)["weights_sha256"]
    assert curve(tmp_path / "REINFORCE/group", "reward/mean")[0] == [20, 40]
    output = capsys.readouterr().out
    assert all(f"seed {seed}: reward " in output for seed in range(1, seeds + 1))
    assert f"({seeds} of {seeds})" in output
    assert f"over {seeds} of {seeds} seeds: mean " in output


def test_a_seed_that_fails_is_named_and_the_others_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In threads, of a loop whose third seed ends in NaN."""
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo/odd.py").write_text('''"""Odd: fails for the seed 3."""
from dataclasses import dataclass
from rlboard.config import option
from rlboard.errors import NumericalError
from rlboard.events import Event
@dataclass(frozen=True)
class Config:
    seed: int = option(1, "seed")
def train(config):
    for step in range(11):
        yield Event(step, 10, {"score": float(config.seed * step)}, "score", threads=True)
        if config.seed == 3 and step == 5:
            raise NumericalError("the score is nan")
''')
    app = build_app([Track("zoo", root=tmp_path)])
    monkeypatch.setattr(cli, "build_app", lambda: app)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["odd", "--seeds=4", f"--log-dir={tmp_path}", "--run-name=group"]) == 4
    group = tmp_path / "ODD/group"
    assert facts(group)["status"] == "failed"
    assert facts(group / "seed3")["status"] == "failed"
    steps, values = curve(group, "score/mean")
    assert steps == list(range(11))
    np.testing.assert_allclose(values, [(1 + 2 + 4) / 3 * step for step in range(11)], rtol=1e-6)


@pytest.mark.parametrize(("arguments", "complaint"), [
    (["reinforce", "--seeds=0"], "--seeds 0 is out of range: give 1 or more"),
    (["reinforce", "--seeds=two"], "--seeds two is not a whole number"),
    (["reinforce", "--seeds=3", "--env-id=CartPol-v1"], "did you mean CartPole-v1"),
])  # fmt: skip
def test_mistakes_are_one_line(
    arguments: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, f"--log-dir={tmp_path}"]) == 2
    assert complaint in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


ENDLESS = ["reinforce", "--seeds=3", "--episodes=100000000", "--log=minimal", "--run-name=group"]


def has_begun(group: Path) -> bool:
    return any(path.stat().st_size > 2**13 for path in group.glob("seed*/events.out.tfevents.*"))


def assert_interrupted(group: Path, output: str, complaint: str) -> None:
    assert "Traceback" not in complaint
    assert "reinforce: interrupted" in output
    assert facts(group)["status"] == "interrupted"
    begun = [facts(path) for path in group.glob("seed*")]
    assert begun
    assert all(about["status"] == "interrupted" and about["weights_sha256"] for about in begun)


def test_a_signal_ends_all_seeds_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    group, ended = tmp_path / "REINFORCE/group", threading.Event()

    def interrupt() -> None:
        while not ended.wait(0.05):
            if has_begun(group):
                os.kill(os.getpid(), signal.SIGINT)
                return

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        assert main([*ENDLESS, "--engine=compiled", f"--log-dir={tmp_path}"]) == 130
    finally:
        ended.set()
        thread.join()
        signal.signal(signal.SIGINT, previous)
    assert_interrupted(group, *capsys.readouterr())


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "number", "code"), [("compiled", signal.SIGINT, 130), ("gym", signal.SIGTERM, 143)])
def test_a_signal_ends_a_process_of_seeds(engine: str, number: signal.Signals, code: int, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "rlboard", *ENDLESS, f"--engine={engine}", "--log-dir", tmp_path],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    group = tmp_path / "REINFORCE/group"
    while process.poll() is None and not has_begun(group):
        signal.sigtimedwait([], 0.1)
    process.send_signal(number)
    output, complaint = process.communicate(timeout=60)
    assert process.returncode == code, complaint
    assert_interrupted(group, output, complaint)


@pytest.mark.slow
@pytest.mark.browser
def test_the_bands_are_drawn(log_dir: Path) -> None:
    with tensorboard(log_dir) as address, chromium() as page:
        page.goto(f"{address}/#custom_scalars")
        page.get_by_text("reward, interquartile mean").wait_for()
        page.wait_for_selector("tf-custom-scalar-margin-chart-card path.area[d*=L]", state="attached")


@pytest.mark.parametrize("seeds", [1, 2])
def test_records_that_are_lost_are_not_passed_over(
    seeds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    close = Writer.close

    def close_and_lose(writer: Writer) -> None:
        close(writer)
        writer.events.dropped = 3

    monkeypatch.setattr(Writer, "close", close_and_lose)
    arguments = ["--engine=compiled", "--episodes=20", "--log=minimal", f"--seeds={seeds}", f"--log-dir={tmp_path}"]
    assert main(["reinforce", *arguments]) == 5
    assert "3 records could not be written to" in capsys.readouterr().err
    if seeds > 1:
        (group,) = (tmp_path / "REINFORCE").glob("*seeds*")
        assert facts(group)["status"] == "failed"


def test_as_many_seeds_at_a_time_as_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, workers: int) -> None:
            asked.append(workers)
            super().__init__(workers)

    monkeypatch.setattr(seeds, "ThreadPoolExecutor", Pool)
    arguments = ["reinforce", "--engine=compiled", "--episodes=20", "--seeds=2", "--log=minimal"]
    for options in (["--jobs=1"], []):
        assert main([*arguments, *options, "--log-dir", str(tmp_path)]) == 0
    assert asked == [1, seeds._cores()]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--jobs=2"], "--jobs 2 is for several seeds: add --seeds N"),
        (["--seeds=2", "--profile"], "--seeds and --profile do not go together"),
    ],
)
def test_options_that_do_not_go_together(
    options: list[str], complaint: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reinforce", *options]) == 2
    assert complaint in capsys.readouterr().err
    assert list(root.iterdir()) == []
