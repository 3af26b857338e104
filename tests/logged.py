"""Runs made in no time, in the form that rlboard and other software leave them in."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlboard.eventfile import EventFile

Points = Sequence[tuple[int, float]]

ODD_NAMES = ("한글 이름", "🎈 a,b:c=d%e#f?g&h", 'it\'s "[bold]quoted" :smile: $x$', "two\nlines", "_hidden")


def write_run(
    root: Path, name: str, curves: Mapping[str, Points], config: Mapping[str, Any] | None = None, **facts: Any
) -> Path:
    """A run of other software; with `config`, one of ours. Returns its event file."""
    directory = root / name
    with EventFile(directory) as file:
        for tag, points in curves.items():
            for step, value in points:
                file.scalar(tag, value, step, 1.7e9 + step / 7)
    if config is not None:
        known = {"loop": "agents/reinforce", "config": dict(config), "status": "completed", "seed": config.get("seed")}
        (directory / "run.json").write_text(json.dumps(known | facts), encoding="utf-8")
    return file.path


def accumulated(directory: Path) -> list[tuple[str, int, float, float]]:
    """A run's scalars as TensorBoard's own reader has them, by tag: (tag, step, wall time, value)."""
    events = EventAccumulator(str(directory), {"scalars": 0})
    events.Reload()
    return [
        (tag, event.step, event.wall_time, event.value)
        for tag in sorted(events.Tags()["scalars"])
        for event in events.Scalars(tag)
    ]


def flip_a_byte(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)


def make_run(
    root: Path,
    name: str,
    *,
    days: float = 0,
    status: str = "completed",
    best: float | None = None,
    headline: str = "reward",
    loop: str = "agents/reinforce",
    config: dict[str, Any] | None = None,
    foreign: bool = False,
) -> Path:
    """A run of three points below `root`, its files `days` old; a foreign one has event files alone."""
    directory = root / name
    directory.mkdir(parents=True, exist_ok=True)
    with EventFile(directory) as events:
        for step in range(3):
            events.scalar("reward", step / 2, step)
    if not foreign:
        facts: dict[str, Any] = {"loop": loop, "config": config or {}, "status": status, "best": {}}
        if best is not None:
            facts["best"] = {headline: {"value": best, "step": 2}}
        (directory / "run.json").write_text(json.dumps(facts))
        (directory / ".lock").touch()
    age(directory, days)
    return directory


def age(directory: Path, days: float) -> None:
    """Makes every file directly in `directory` so old."""
    moment = time.time() - days * 86_400
    for path in directory.iterdir():
        if path.is_symlink() or path.is_file():
            os.utime(path, (moment, moment), follow_symlinks=False)


def snapshot(root: Path) -> dict[str, tuple[str, bytes, float]]:
    """Everything below `root`: its kind, its content, and for files when they were written."""
    found = {}
    for path in sorted(root.rglob("*")):
        kind = "link" if path.is_symlink() else "directory" if path.is_dir() else "file"
        content = os.fsencode(path.readlink()) if kind == "link" else path.read_bytes() if kind == "file" else b""
        found[str(path.relative_to(root))] = (kind, content, path.stat().st_mtime if kind == "file" else 0)
    return found
