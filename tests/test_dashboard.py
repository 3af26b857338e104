"""A finished run as TensorBoard serves it: every tab that a run can fill, asked for over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlboard.config import Value
from rlboard.registry import TRACKS
from tests.browser import get, tensorboard

pytestmark = pytest.mark.xdist_group("dashboard")  # one TensorBoard for all

RUN = "REINFORCE/smoke"
PARAMETERS = [f"{layer}.{kind}" for layer in ("hidden", "logits") for kind in ("weight", "bias")]
SCALARS = {
    "reward",
    "best/reward",
    "rollout/ep_rew_mean",
    "rollout/ep_rew_min",
    "rollout/ep_rew_max",
    "rollout/ep_len_mean",
    "train/loss",
    "train/entropy",
    "train/grad_norm",
    "eval/mean_reward",
    "time/fps",
    "time/steps",
}


@pytest.fixture(scope="module")
def url(smoke_log_dir: Path) -> Iterator[str]:
    with tensorboard(smoke_log_dir) as address:
        yield address


def test_the_plugins_of_the_filled_tabs_are_active(url: str) -> None:
    plugins = get(url, "plugins_listing")
    filled = ("scalars", "custom_scalars", "images", "text", "graphs", "distributions", "histograms", "hparams")
    assert {name: plugins[name]["enabled"] for name in filled} == dict.fromkeys(filled, True)


def test_scalars(url: str) -> None:
    assert set(get(url, "plugin/scalars/tags")[RUN]) == SCALARS
    points = get(url, "plugin/scalars/scalars", run=RUN, tag="reward")
    assert [step for _, step, _ in points] == [20, 40, 60]
    assert all(5 < value < 500 for _, _, value in points)


def test_custom_scalars_draw_the_tags_that_are_there(url: str) -> None:
    layout = get(url, "plugin/custom_scalars/layout")
    charts = {chart["title"]: chart for category in layout["category"] for chart in category["chart"]}
    patterns = charts["mean reward"]["multiline"]["tag"]
    assert patterns[0] == "^reward$"
    drawn = get(url, "plugin/custom_scalars/scalars", run=RUN, tag=patterns[0])
    assert drawn["regex_valid"]
    assert list(drawn["tag_to_events"]) == ["reward"]
    (band,) = charts["best and worst of the last 100"]["margin"]["series"]
    assert {band["value"], band["lower"], band["upper"]} <= SCALARS


def test_the_hyperparameters_are_in_the_row_of_the_run_with_their_metrics(url: str) -> None:
    experiment = get(url, "plugin/hparams/experiment", {"experimentName": ""})
    (loop,) = (loop for loop in TRACKS[0].loops() if loop.name == "reinforce")
    assert {info["name"] for info in experiment["hparamInfos"]} == {option.name for option in loop.options}
    metrics = {info["name"]["tag"] for info in experiment["metricInfos"]}
    assert metrics >= {"reward", "best/reward", "eval/mean_reward"}
    request = {
        "experimentName": "",
        "allowedStatuses": ["STATUS_SUCCESS"],
        "colParams": [{"metric": {"group": "", "tag": tag}} for tag in sorted(metrics)],
        "startIndex": 0,
        "sliceSize": 10,
    }
    (group,) = get(url, "plugin/hparams/session_groups", request)["sessionGroups"]
    (session,) = group["sessions"]
    assert session["name"] == RUN
    assert session["status"] == "STATUS_SUCCESS"
    expected: dict[str, Value] = loop.defaults(smoke=True) | {"seed": 7}
    assert group["hparams"] == expected
    values = {value["name"]["tag"]: value["value"] for value in session["metricValues"]}
    points = get(url, "plugin/scalars/scalars", run=RUN, tag="reward")
    assert values["reward"] == pytest.approx(points[-1][2])
    assert values["best/reward"] == pytest.approx(max(point[2] for point in points))


def test_the_policy_is_drawn(url: str) -> None:
    assert get(url, "plugin/graphs/info")[RUN]["run_graph"]
    graph = get(url, "plugin/graphs/graph", run=RUN).decode()
    for part in ("Policy/", "hidden", "logits", "softmax", "input"):
        assert part in graph


def test_text_tells_the_configuration(url: str) -> None:
    assert set(get(url, "plugin/text/tags")[RUN]) == {
        f"{tag}/text_summary" for tag in ("Hyperparameters", "loop", "notice", "Model/summary")
    }
    (config,) = get(url, "plugin/text/text", run=RUN, tag="Hyperparameters/text_summary")
    assert "<td>0.0002</td>" in config["text"]
    assert "--learning-rate" in config["text"]


def test_an_evaluation_episode_is_a_picture(url: str) -> None:
    assert list(get(url, "plugin/images/tags")[RUN]) == ["eval/episode"]
    (image,) = get(url, "plugin/images/images", run=RUN, tag="eval/episode", sample=0)
    assert image["step"] == 60
    with urlopen(f"{url}/data/plugin/images/individualImage?{image['query']}", timeout=30) as answer:
        assert answer.read().startswith(b"\x89PNG")


def test_weights_and_gradients_are_histograms(url: str) -> None:
    expected = {f"{kind}/{name}" for kind in ("Weights", "Gradients") for name in PARAMETERS}
    assert set(get(url, "plugin/histograms/tags")[RUN]) == expected
    weights = get(url, "plugin/histograms/histograms", run=RUN, tag="Weights/hidden.weight")
    assert [step for _, step, _ in weights] == [0, 20, 40, 60]
    assert sum(count for _, _, count in weights[0][2]) == pytest.approx(4 * 128)


def test_the_accumulator_reads_the_same(smoke_log_dir: Path) -> None:
    (directory,) = (smoke_log_dir / "REINFORCE").iterdir()
    accumulator = EventAccumulator(str(directory))
    accumulator.Reload()
    tags = accumulator.Tags()
    assert set(tags["scalars"]) == SCALARS
    assert tags["graph"]
    assert tags["images"] == ["eval/episode"]
    assert {path.name for path in directory.iterdir()} == {
        ".lock",
        "best.pt",
        "best.pt.sha256",
        "checkpoint.pt",
        "checkpoint.pt.sha256",
        "run.json",
        next(directory.glob("events.out.tfevents.*")).name,
    }


def test_a_long_run_has_a_bounded_number_of_histograms() -> None:
    from types import SimpleNamespace
    from typing import cast
    from unittest.mock import Mock

    from torch import nn

    from rlboard.events import Event
    from rlboard.instruments.tabs import HISTOGRAMS_PER_RUN, histograms
    from rlboard.run import Run

    writer = Mock()
    model = nn.Linear(1, 1, bias=False)
    events = (Event(step, 10_000, model=model) for step in range(0, 10_001, 20))
    for _ in histograms(events, cast("Run", SimpleNamespace(writer=writer, drawn={}))):
        pass
    assert 0.9 * HISTOGRAMS_PER_RUN <= writer.add_histogram.call_count <= HISTOGRAMS_PER_RUN + 1
