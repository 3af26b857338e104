"""The tour fills every tab, as TensorBoard's own page shows, and says of each how to read it."""

from __future__ import annotations

import wave
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlboard import tour
from rlboard.checkpoint import read_run
from rlboard.cli import main
from rlboard.registry import find_loop
from rlboard.tour.notes import NOTES
from tests.browser import TABS, chromium, get, open_tab, tensorboard

SHORT = (
    replace(tour.STATIONS[0], options={"episodes": 40, "eval_every": 40, "eval_episodes": 1, "engine": "gym"}),
    replace(
        tour.STATIONS[1],
        loop="agents/evaluate",
        fills=("Text",),
        options={"episodes": 1},
        plumbing={},
        about=(0, "run"),
    ),
)


def sound(path: Path) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8_000)
        file.writeframes(bytes(800))
    return path


def logged(directory: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(directory), {"tensors": 0})
    accumulator.Reload()
    return accumulator


def test_there_is_a_note_on_every_tab_and_a_station_for_each() -> None:
    assert NOTES.keys() == TABS.keys()
    assert {tab for station in tour.STATIONS for tab in station.fills} == NOTES.keys()


@pytest.mark.parametrize("station", tour.STATIONS, ids=lambda station: station.loop)
def test_stations_have_options_that_their_loops_know(station: tour.Station) -> None:
    options = {option.name: option for option in find_loop(station.loop).options}
    for name, value in station.options.items():
        assert type(value) is options[name].type
        options[name].validate(value)


def test_a_station_leaves_its_run_with_its_notes_and_may_look_at_an_earlier_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tour.take(str(tmp_path), sound(tmp_path / "bell.wav"), SHORT) == 0
    first, second = logged(tmp_path / "REINFORCE/tour"), logged(tmp_path / "EVALUATE/tour")
    for tab in SHORT[0].fills:
        (note,) = first.Tensors(f"Tour/{tab}/text_summary")
        assert note.tensor_proto.string_val[0].decode() == NOTES[tab].markdown
    assert {tag for tag in second.Tags()["tensors"] if tag.startswith("Tour/")} == {"Tour/Text/text_summary"}
    assert set(first.Tags()["audio"]) == {"Audio/reward", "Audio/bell"}
    assert second.Tags()["audio"] == []
    assert str(tmp_path / "REINFORCE/tour") in (tmp_path / "EVALUATE/tour/run.json").read_text()
    told = capsys.readouterr().out
    assert "rlboard reinforce" in told
    assert "--episodes=40" in told
    assert "--preset=solve" in told
    assert "EVALUATE/tour" in told.partition("The tour")[2]


@pytest.mark.slow
def test_two_tours_do_not_meet(tmp_path: Path) -> None:
    for _ in range(2):
        assert tour.take(str(tmp_path), None, SHORT) == 0
    assert "REINFORCE/tour-2" in (tmp_path / "EVALUATE/tour-2/run.json").read_text()


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda path: path.write_bytes(b"ID3"), "is not a WAV file of PCM samples"),
        (lambda path: path.mkdir(), "cannot be read"),
        (lambda _: None, "cannot be read: No such file"),
    ],
)
def test_a_sound_that_cannot_be_read_is_refused_before_anything_runs(
    make: Callable[[Path], object], complaint: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(root.parent / "own.wav")
    assert main(["tour", "--wav", "own.wav"]) == 3
    error = capsys.readouterr().err
    assert error.startswith("rlboard: --wav own.wav ")
    assert complaint in error
    assert list(root.iterdir()) == []


def test_the_dashboard_is_opened_on_the_tour_where_that_is_asked_for(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served: list[dict[str, Any]] = []
    monkeypatch.setattr("rlboard.tour.take", lambda *_: 0)
    monkeypatch.setattr("rlboard.dashboard.serve", lambda logdir, **options: served.append({"at": logdir, **options}))
    main(["tour"])
    assert not served
    assert "rlboard dashboard --logdir=logs --filter=tour --open" in capsys.readouterr().out
    main(["tour", "--open", "--log-dir", str(root)])
    assert [(each["at"], each["text"], each["browser"], each["port"]) for each in served] == [
        (root, "tour", True, 6006)
    ]


@pytest.mark.slow
@pytest.mark.browser
def test_every_tab_of_a_tour_shows_something(tmp_path: Path) -> None:
    assert main(["tour", "--log-dir", str(tmp_path)]) == 0
    for name in ("REINFORCE/tour", "vision/train/tour", "vision/gan/tour"):
        assert read_run(str(tmp_path / name)).status == "completed"
    with tensorboard(tmp_path) as url, chromium() as page:
        for tab in TABS:
            open_tab(page, url, tab)
        graphs = get(url, "plugin/graphs/info")
        assert {"vision/train/tour", "vision/train/tour-vit", "vision/gan/tour", "REINFORCE/tour"} <= graphs.keys()
        videos = get(url, "plugin/images/tags")["REINFORCE/tour"]
        assert any("video" in tag for tag in videos)
