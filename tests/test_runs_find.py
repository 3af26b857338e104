"""Which directories are runs, what state they are in, and which of them a name means."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from rlboard.errors import StorageError, UsageError
from rlboard.eventfile import EventFile
from rlboard.runs.find import LoggedRun, find_runs, matching, select

ODD_NAMES = ["한국어 실험", "spaces here", "😀", ",:=%#?&'\"[]", "line\nbreak", "-leading", "*star*", "\x1b[31mred"]


def make_run(directory: Path, status: str = "", **facts: object) -> Path:
    """A run with one point; with a `run.json` where it has a status."""
    directory.mkdir(parents=True, exist_ok=True)
    file = EventFile(directory)
    file.scalars({"reward": 2.0}, 1)
    file.close()
    if status:
        said = {"loop": "agents/reinforce", "config": {"seed": 1}, "status": status, **facts}
        (directory / "run.json").write_text(json.dumps(said), encoding="utf-8")
    return directory


def named(*names: str) -> list[LoggedRun]:
    return [LoggedRun(name, Path("logs", name)) for name in names]


def test_every_directory_with_event_files_or_a_run_json_is_a_run(tmp_path: Path) -> None:
    for name in ("a/one", "a/group", "a/group/seed1", "b"):
        make_run(tmp_path / name)
    (tmp_path / "no-events").mkdir()
    (tmp_path / "no-events/run.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/text.md").write_text("no run")
    runs = find_runs(tmp_path)
    assert [run.name for run in runs] == ["a/group", "a/group/seed1", "a/one", "b", "no-events"]
    one = runs[2]
    assert one.directory == tmp_path / "a/one"
    assert [path.parent for path in one.event_files] == [one.directory]
    assert one.size == sum(path.stat().st_size for path in one.event_files)
    assert one.modified == one.event_files[0].stat().st_mtime


def test_the_root_itself_may_be_a_run(tmp_path: Path) -> None:
    make_run(tmp_path)
    (run,) = find_runs(tmp_path)
    assert run.name == "."
    assert select([run], ["."]) == ([run], [])


def test_odd_names_are_found_and_meant(tmp_path: Path) -> None:
    for name in ODD_NAMES:
        make_run(tmp_path / name)
    runs = find_runs(tmp_path)
    assert {run.name for run in runs} == set(ODD_NAMES)
    for run in runs:
        assert select(runs, [run.name]) == ([run], [])
        assert select(runs, [str(tmp_path / run.name)]) == ([run], [])


def test_links_are_not_followed(tmp_path: Path) -> None:
    outside = make_run(tmp_path / "outside/run")
    root = tmp_path / "logs"
    root.mkdir()
    (root / "linked-run").symlink_to(outside, target_is_directory=True)
    (root / "linked-parent").symlink_to(outside.parent, target_is_directory=True)
    (root / "circle").symlink_to(root, target_is_directory=True)
    inside = root / "inside"
    inside.mkdir()
    (inside / "events.out.tfevents.1").symlink_to(next(outside.iterdir()))
    assert find_runs(root) == []


@pytest.mark.parametrize(
    ("name", "words"), [("missing", "is not there"), ("file", "is a file"), ("file/below", "is a file")]
)
def test_a_root_that_is_no_directory(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match=words):
        find_runs(tmp_path / name)


@pytest.mark.parametrize("root", ["a\0b", "x" * 5000])
def test_a_root_that_cannot_be(root: str) -> None:
    with pytest.raises((UsageError, StorageError)) as refusal:
        find_runs(Path(root))
    assert str(refusal.value).isprintable()


def test_a_directory_that_cannot_be_read_is_said_and_the_others_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "good")
    make_run(tmp_path / "locked")
    scandir = os.scandir

    def refusing(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr("os.scandir", refusing)
    good, locked = find_runs(tmp_path)
    assert (good.name, good.damage) == ("good", "")
    assert locked.damage.endswith("locked cannot be read: Permission denied")
    assert locked.status == "unreadable"


def test_the_state_of_a_run(tmp_path: Path) -> None:
    for status in ("completed", "interrupted", "failed", "running"):
        make_run(tmp_path / status, status)
    make_run(tmp_path / "foreign")
    make_run(tmp_path / "damaged", "completed")
    (tmp_path / "damaged/run.json").write_text('{"loop": ')
    make_run(tmp_path / "alive", "running")
    with FileLock(tmp_path / "alive/.lock"):
        states = {run.name: run.status for run in find_runs(tmp_path)}
    assert states == {
        "alive": "running",
        "completed": "completed",
        "damaged": "unreadable",
        "failed": "failed",
        "foreign": "foreign",
        "interrupted": "interrupted",
        "running": "killed",
    }
    (alive, *_) = find_runs(tmp_path)
    assert alive.status == "killed", "its process has let the lock go"
    assert (tmp_path / "foreign/.lock").exists() is False, "looking leaves nothing behind"


RUNS = named("REINFORCE/20260101-000000-seed1", "REINFORCE/20260102-000000-seed1", "vision/train/best", "vision/best")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("vision/train/best", ["vision/train/best"]),
        ("vision/train/best/", ["vision/train/best"]),
        ("logs/vision/train/best", ["vision/train/best"]),
        (os.path.abspath("logs/vision/best"), ["vision/best"]),  # noqa: PTH100
        ("train/best", ["vision/train/best"]),
        ("20260101-000000-seed1", ["REINFORCE/20260101-000000-seed1"]),
        ("20260102", ["REINFORCE/20260102-000000-seed1"]),
        ("2026*", ["REINFORCE/20260101-000000-seed1", "REINFORCE/20260102-000000-seed1"]),
        ("vision/*", ["vision/train/best", "vision/best"]),
        ("*", [run.name for run in RUNS]),
    ],
)
def test_what_a_name_means(name: str, meant: list[str]) -> None:
    chosen, complaints = select(RUNS, [name])
    assert [run.name for run in chosen] == meant
    assert complaints == []


def test_a_name_of_no_run_or_of_several_is_complained_of_and_the_rest_chosen() -> None:
    chosen, complaints = select(RUNS, ["bset", "vision/best", "seed1", "", "train/best", "vision/best"])
    assert [run.name for run in chosen] == ["vision/best", "vision/train/best"]
    nothing, several, empty = complaints
    assert nothing == "RUN bset is not there: did you mean vision/best?"
    assert several.startswith("RUN seed1 means 2 runs, REINFORCE/20260101-000000-seed1, REINFORCE/20260102")
    assert empty.startswith("RUN '' is not there")
    assert select([], ["a"])[1] == ["RUN a is not there: there are no runs"]
    assert select(RUNS, []) == (RUNS, [])


@given(st.lists(st.text(max_size=5), max_size=4), st.lists(st.text(max_size=5), max_size=3))
def test_any_names_are_meant_or_complained_of_in_one_printable_line(names: list[str], asked: list[str]) -> None:
    runs = named(*names)
    chosen, complaints = select(runs, asked)
    assert all(run in runs for run in chosen)
    assert bool(complaints) or bool(chosen) or not names or not asked
    assert all(complaint.isprintable() for complaint in complaints)


def test_a_filter_is_a_part_of_the_name_or_a_pattern() -> None:
    assert [run.name for run in matching(RUNS, "best")] == ["vision/train/best", "vision/best"]
    assert [run.name for run in matching(RUNS, "*02-*")] == ["REINFORCE/20260102-000000-seed1"]
    assert matching(RUNS, "") == RUNS
