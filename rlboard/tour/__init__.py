"""`rlboard tour`: short, real runs of both tracks that fill every TensorBoard tab, with notes on how to read them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from rlboard.config import Value, options_of, printable
from rlboard.errors import DataError
from rlboard.registry import find_loop
from rlboard.run import RunOptions, execute
from rlboard.tour.notes import NOTES

if TYPE_CHECKING:
    from rlboard.events import Events
    from rlboard.run import Run


EVERYWHERE = ("Time Series", "Scalars", "Custom Scalars", "Text", "HParams")
LEARNS = ("Graphs", "Distributions", "Histograms")


@dataclass(frozen=True)
class Station:
    """One run of the tour.

    Attributes:
        loop: what runs, as `run.json` names it.
        fills: the tabs that it is shown for.
        options: those of the loop that differ from `preset`'s.
        plumbing: those of the run that differ from the defaults.
        about: the station whose run this one looks at, and the option that is told so.
    """

    loop: str
    fills: tuple[str, ...]
    options: Mapping[str, Value] = field(default_factory=dict)
    plumbing: Mapping[str, Value] = field(default_factory=dict)
    about: tuple[int, str] | None = None


STATIONS = (
    Station(
        "agents/reinforce",
        (*EVERYWHERE, *LEARNS, "Images", "Audio"),
        {"episodes": 1_500},
        {"preset": "solve", "capture_video": True},
    ),
    Station(
        "vision/train",
        (*EVERYWHERE, *LEARNS, "Images", "PR Curves", "Profile"),
        {"data": "shapes", "images": 2_000, "epochs": 2, "picture_every": 1, "log_every": 2},
        {"profile": True},
    ),
    Station(
        "vision/train",
        ("Graphs", "HParams"),
        {"data": "shapes", "model": "vit", "width": 64, "images": 1_000, "epochs": 2, "batch_size": 32,
         "optimizer": "adamw", "learning_rate": 1e-3, "progressive": 0.0, "tta": False, "log_every": 5},
        {"run_name": "tour-vit"},
    ),
    Station(
        "vision/gan",
        ("Images", *LEARNS),
        {"data": "shapes", "width": 8, "steps": 500, "learning_rate": 2e-3, "quality_images": 500, "judge_every": 50},
        about=(1, "judge"),
    ),
    Station("vision/embed", ("Projector", "Images"), {"limit": 1_000, "bank": 2_000}, about=(1, "run")),
    Station("vision/words", ("Projector",), {"steps": 1_000}),
    Station(
        "vision/explain",
        ("Images", "Mesh", "Histograms"),
        {"surface": 13, "surface_images": 128},
        about=(1, "run"),
    ),
)  # fmt: skip


def take(log_dir: str, wav: Path | None = None, stations: Sequence[Station] = STATIONS) -> int:
    """Runs all stations, one after the other, and says what is where; returns the exit code.

    Args:
        log_dir: the log root. The runs are named `tour…`.
        wav: a sound for the Audio tab of the first run.
        stations: which runs.

    Raises:
        RlboardError: a run cannot begin or go on; or DataError, `wav` cannot be read.
    """
    from rlboard.instruments import INSTRUMENTS

    if wav:
        check_wav(wav)
    console = Console(soft_wrap=True, highlight=False)
    runs: list[Run] = []
    for number, station in enumerate(stations, start=1):
        loop = find_loop(station.loop)
        chosen = dict(station.options)
        if station.about:
            which, name = station.about
            chosen[name] = str(runs[which].directory)
        plumbing = {"log_dir": log_dir, "run_name": "tour", **station.plumbing}
        command = ["rlboard", *filter(None, (loop.track.group, loop.command))]
        command += [spec.spelled(chosen[spec.name]) for spec in loop.options if spec.name in chosen]
        command += [
            option.spelled(plumbing[option.name]) for option in options_of(RunOptions) if option.name in plumbing
        ]
        console.rule(f"tour {number} of {len(stations)}")
        console.print(shlex.join(command), style="bold", markup=False)
        values = loop.defaults(str(plumbing.get("preset", ""))) | chosen
        around = (_guide(station, runs, wav if number == 1 else None), *INSTRUMENTS["full"])
        if code := execute(loop, values, RunOptions(**plumbing), command, around):  # type: ignore[arg-type]
            return code
    console.rule()
    console.print(_what_is_where(stations, [str(run.directory.relative_to(log_dir)) for run in runs]))
    return 0


def check_wav(path: Path) -> None:
    """Raises DataError where `path` is no WAV file that can be logged."""
    from rlboard.eventfile import wav_summary

    try:
        wav_summary("Audio", path.read_bytes())
    except OSError as error:
        raise DataError(f"--wav {printable(path, 200)} cannot be read: {error.strerror}: give another file") from None
    except ValueError as error:
        raise DataError(f"--wav {printable(path, 200)} is {error}: save it as 16-bit PCM") from None


def _guide(station: Station, runs: list[Run], wav: Path | None) -> Any:
    """An instrument that writes the notes on the tabs that a run fills, and notes which run it is."""

    def guide(events: Events, run: Run) -> Events:
        runs.append(run)
        for tab in station.fills:
            run.writer.add_text(f"Tour/{tab}", NOTES[tab].markdown, 0)
        if wav:
            run.writer.add_wav(f"Audio/{wav.stem}", wav, 0)
        yield from events

    return guide


def _what_is_where(stations: Sequence[Station], names: Sequence[str]) -> Table:
    table = Table("tab", "in the runs", "what to look for", title="The tour", show_lines=True)
    for tab, note in NOTES.items():
        filled = [name for station, name in zip(stations, names, strict=True) if tab in station.fills]
        if filled:
            table.add_row(tab, "\n".join(filled), note.look.replace("`", ""))
    return table
