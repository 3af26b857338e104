"""One run with every kind of record, and everybody who reads it: all of them find the same, and every tab draws it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tbparse import SummaryReader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlboard.eventfile import read_scalars
from rlboard.writer import open_writer
from tests.browser import TABS, chromium, get, open_tab, tensorboard
from tests.test_writer import add_everything

pytestmark = pytest.mark.xdist_group("readers")  # one TensorBoard for all

SCALARS = {
    "scalar": [(1, 0.5)],
    "scalar/new": [(1, float(np.float32(0.1)))],
    "log/a": [(2, 1.0)],
    "log/b": [(2, 2.0)],
    "series": [(step, step / 8) for step in range(1_000)],
    "main/left": [(3, 1.0)],
    "main/right/most": [(3, 2.0)],
}
LAST_TAG = ("mesh", "mesh")


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("logs")
    torch.manual_seed(0)
    for name, success in (("all", True), ("failed", False)):
        with open_writer(root / name) as writer:
            add_everything(writer, success)
    return root


@pytest.fixture(scope="module")
def url(log_dir: Path) -> Iterator[str]:
    """A TensorBoard with its default loader, the data server written in Rust."""
    with tensorboard(log_dir, "--load_fast=true", "--samples_per_plugin=scalars=2000") as address:
        wait_for(lambda: all(LAST_TAG[1] in run for run in tags(address, LAST_TAG[0], runs=2).values()))
        yield address


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "TensorBoard does not load the run"
        time.sleep(0.1)


def tags(url: str, plugin: str, runs: int) -> dict[str, Any]:
    answer: dict[str, Any] = get(url, f"plugin/{plugin}/tags")
    return answer if len(answer) == runs else {"": {}}


def shown(url: str) -> dict[tuple[str, ...], Any]:
    """Everything that the plugins of a TensorBoard send to its page of the run `all`."""
    answers: dict[tuple[str, ...], Any] = {
        (plugin, path): get(url, f"plugin/{plugin}/{path}")
        for plugin, path in (("custom_scalars", "layout"), ("graphs", "info"), ("projector", "runs"))
    }
    answers["projector", "runs"].sort()
    answers["graphs", "graph"] = get(url, "plugin/graphs/graph", run="all")
    answers["hparams", "experiment"] = get(url, "plugin/hparams/experiment", {"experimentName": ""})
    plain = {"scalars": "scalars", "histograms": "histograms", "distributions": "distributions", "text": "text"}
    for plugin, path in plain.items():
        for tag in get(url, f"plugin/{plugin}/tags")["all"]:
            answers[plugin, tag] = get(url, f"plugin/{plugin}/{path}", run="all", tag=tag)
    for tag in get(url, "plugin/pr_curves/tags")["all"]:
        answers["pr_curves", tag] = get(url, "plugin/pr_curves/pr_curves", run="all", tag=tag)
    for plugin, path, blob in (("images", "images", "individualImage"), ("audio", "audio", "individualAudio")):
        for tag, info in get(url, f"plugin/{plugin}/tags")["all"].items():
            for sample in range(info["samples"]):
                entries = get(url, f"plugin/{plugin}/{path}", run="all", tag=tag, sample=sample)
                for number, entry in enumerate(entries):
                    entry.pop("contentType", None)  # the data server tells no type of sounds
                    content = get(url, f"plugin/{plugin}/{blob}?{entry.pop('query')}")
                    entry["content"] = hashlib.sha256(content).hexdigest()
                    answers[plugin, tag, f"{sample}/{number}"] = entry
    for tag in get(url, "plugin/mesh/tags")["all"]:
        answers["mesh", tag] = get(url, "plugin/mesh/meshes", run="all", tag=tag, sample=0)
        answers["mesh", tag, "vertices"] = get(
            url, "plugin/mesh/data", run="all", tag=tag, sample=0, step=12, content_type="VERTEX"
        )
    return answers


@pytest.mark.slow
def test_both_loaders_of_tensorboard_show_the_same(url: str, log_dir: Path) -> None:
    with tensorboard(log_dir, "--samples_per_plugin=scalars=2000") as python:
        expected, found = shown(python), shown(url)
    assert found.keys() == expected.keys()
    assert {plugin for plugin, *_ in found} == {
        *("scalars", "histograms", "distributions", "text", "pr_curves", "images", "audio", "mesh"),
        *("custom_scalars", "graphs", "projector", "hparams"),
    }
    for key, answer in found.items():
        assert comparable(key, answer) == comparable(key, expected[key]), key


def comparable(key: tuple[str, ...], answer: Any) -> Any:
    """An answer without what each loader does its own way: a histogram's empty bins, outer edges and precision."""
    if key[0] == "distributions":  # interpolated between the edges
        return [(step, np.round(points, 1).tolist()) for _, step, points in answer]
    if key[0] != "histograms":
        return answer
    filled = [(step, [(right, count) for _, right, count in bins if count]) for _, step, bins in answer]
    return [(step, np.round(bins[:-1], 4).tolist(), bins[-1][1]) for step, bins in filled]


def test_tensorboard_shows_what_was_written(url: str) -> None:
    for tag, points in SCALARS.items():
        answer = get(url, "plugin/scalars/scalars", run="all", tag=tag)
        assert [(step, value) for _, step, value in answer] == points, tag
    layout = get(url, "plugin/custom_scalars/layout")
    assert layout["category"][0]["chart"][0]["multiline"]["tag"] == ["^scalar$"]
    (text,) = get(url, "plugin/text/text", run="all", tag="text/text_summary")
    assert "<strong>bold</strong> 한국어" in text["text"]
    for plugin in ("scalars", "histograms", "images", "audio", "text", "pr_curves", "mesh"):
        assert sorted(get(url, f"plugin/{plugin}/tags")) == ["all", "failed"], "one run each, no sub-directories"


def test_tensorboard_shows_typed_hyperparameters_and_how_runs_ended(url: str) -> None:
    experiment = get(url, "plugin/hparams/experiment", {"experimentName": ""})
    types = {info["name"]: info["type"] for info in experiment["hparamInfos"]}
    assert types == {
        "lr": "DATA_TYPE_FLOAT64",
        "batch": "DATA_TYPE_FLOAT64",
        "amp": "DATA_TYPE_BOOL",
        "name": "DATA_TYPE_STRING",
    }
    every = ["STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING", "STATUS_UNKNOWN"]
    body = {"experimentName": "", "allowedStatuses": every, "colParams": [], "startIndex": 0, "sliceSize": 9}
    answer = get(url, "plugin/hparams/session_groups", body)
    sessions = {session["name"]: session for group in answer["sessionGroups"] for session in group["sessions"]}
    assert {name: session["status"] for name, session in sessions.items()} == {
        "all": "STATUS_SUCCESS",
        "failed": "STATUS_FAILURE",
    }
    metrics = {value["name"]["tag"]: value["value"] for value in sessions["all"]["metricValues"]}
    assert metrics["log/a"] == 1.0
    hyperparameters = answer["sessionGroups"][0]["hparams"]
    assert hyperparameters == {"lr": 0.001, "batch": 32.0, "amp": True, "name": "손실"}


@pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")  # of tbparse
def test_the_accumulator_tbparse_and_our_reader_agree(log_dir: Path) -> None:
    run = log_dir / "all"
    accumulator = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0, "tensors": 0, "histograms": 0})
    accumulator.Reload()

    def frame(kind: str) -> Any:  # one by one: tbparse decodes images with TensorFlow, and fails on integer tensors
        return getattr(SummaryReader(str(run), event_types={kind}, extra_columns={"wall_time"}), kind)

    simple = {tag: points for tag, points in SCALARS.items() if tag != "scalar/new"}  # a tensor to these two readers
    assert set(accumulator.Tags()["scalars"]) == set(simple)
    columns = read_scalars(run)
    parsed = frame("scalars")
    for tag, points in SCALARS.items():
        ours = columns[tag]
        assert list(zip(ours.step.tolist(), ours.value.tolist(), strict=True)) == points, tag
        if tag in simple:
            events = accumulator.Scalars(tag)
            assert [(event.step, event.value) for event in events] == points, tag
            assert [event.wall_time for event in events] == ours.wall_time.tolist(), tag
            rows = parsed[parsed["tag"] == tag]
            assert list(zip(rows["step"], rows["value"], strict=True)) == points, tag
            assert rows["wall_time"].tolist() == ours.wall_time.tolist(), tag

    (histogram,) = (event.histogram_value for event in accumulator.Histograms("histogram"))
    assert histogram.num == sum(histogram.bucket) == 1_000
    parsed = frame("histograms")
    rows = parsed[parsed["tag"] == "histogram"]
    assert rows["counts"].iloc[0].sum() == 1_000
    assert set(accumulator.Tags()["images"]) == {"image", "images", "boxes", "figure", "video"}
    assert accumulator.Images("image")[0].encoded_image_string.startswith(b"\x89PNG")
    assert accumulator.Tags()["audio"] == ["audio"]
    assert accumulator.Audio("audio")[0].encoded_audio_string[:4] == b"RIFF"
    assert frame("text")["value"].tolist() == ["**bold** 한국어"]
    assert dict(zip(frame("hparams")["tag"], frame("hparams")["value"], strict=True)) == {
        "lr": 0.001, "batch": 32.0, "amp": True, "name": "손실",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.browser
def test_every_tab_draws_the_run(url: str) -> None:
    with chromium() as page:
        for name in TABS.keys() - {"Profile"}:  # is no kind of record
            open_tab(page, url, name)
