"""`rlboard runs repair`: TensorBoard reads every record that survived, and the damaged original is kept."""

from __future__ import annotations

import errno
import os
import re
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlboard.cli import main
from rlboard.eventfile import EventFile
from rlboard.eventfile.read import Report, read_events, verify
from rlboard.eventfile.read import repair as mend
from rlboard.runs import repair as repairing
from rlboard.runs.trash import Trash
from tests.browser import get, tensorboard
from tests.logged import age, make_run, snapshot
from tests.test_runs_prune import ODD_NAMES

POINTS = 20


def repair(*arguments: str) -> int:
    return main(["runs", "repair", *arguments])


def write(directory: Path, damage: Callable[[bytes, list[int]], bytes]) -> Path:
    """A run two hours old with the scalars 0, 1, 2, … of the tag `x`, damaged by a function of them."""
    with EventFile(directory) as events:
        for step in range(POINTS):
            events.scalar("x", step, step)
    whole = events.path.read_bytes()
    starts = [len(whole) - (POINTS - step) * ((len(whole) - first_record(whole)) // POINTS) for step in range(POINTS)]
    events.path.write_bytes(damage(whole, starts))
    age(directory, 2 / 24)
    return events.path


def first_record(whole: bytes) -> int:
    """Bytes of the record that says the file's version."""
    return 16 + int.from_bytes(whole[:8], "little")


def flip(offset: int) -> Callable[[bytes, list[int]], bytes]:
    """Flips a bit `offset` bytes into the record of step 7."""

    def damage(whole: bytes, starts: list[int]) -> bytes:
        damaged = bytearray(whole)
        damaged[starts[7] + offset] ^= 4
        return bytes(damaged)

    return damage


DAMAGE: dict[str, tuple[Callable[[bytes, list[int]], bytes], set[int], str]] = {
    "a payload": (flip(20), {7}, "payload checksum"),
    "a length": (flip(0), {7}, "header checksum"),
    "a torn end": (lambda whole, _: whole[:-5], {19}, "torn end"),
    "a hole": (lambda whole, starts: whole[: starts[3] + 9] + whole[starts[5] + 2 :], {3, 4, 5}, "header checksum"),
    "zeros": (lambda whole, starts: whole[: starts[9]] + bytes(4096) + whole[starts[9] :], set(), "header checksum"),
    "no start": (lambda whole, starts: whole[7 : starts[12] + 20], set(range(12, 20)), "header checksum, torn end"),
}


def scalars(directory: Path) -> list[tuple[int, float]]:
    """What TensorBoard reads of the tag `x`."""
    accumulator = EventAccumulator(str(directory), {"scalars": 0})
    accumulator.Reload()
    return [(point.step, point.value) for point in accumulator.Scalars("x")]


@pytest.mark.slow
def test_both_loaders_of_tensorboard_read_all_that_survived(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = {name: write(root / name, damage) for name, (damage, _, _) in DAMAGE.items()}
    write(root / "whole", lambda whole, _: whole)
    originals = {name: (path.read_bytes(), path.stat().st_mtime_ns) for name, path in damaged.items()}
    before = snapshot(root.parent)
    assert repair() == 3
    output = capsys.readouterr().out
    rows = {row[0]: row[1:] for row in (line.split("\t") for line in output.splitlines() if "\t" in line)}
    for name, (_, lost, reason) in DAMAGE.items():
        records, _, reasons = rows[f"{name}/{damaged[name].name}"]
        assert (int(records), reasons) == (POINTS + (name != "no start") - len(lost), reason)
    assert "7 event files of 7 runs: 6 damaged" in output
    assert snapshot(root.parent) == before
    (command,) = re.findall("mend with: (.*)", output)
    assert main(shlex.split(command)[1:]) == 0
    assert "6 damaged, 6 mended, the originals are in " in capsys.readouterr().out

    expected = {
        name: [(step, float(step)) for step in range(POINTS) if step not in lost]
        for name, (_, lost, _) in DAMAGE.items()
    } | {"whole": [(step, float(step)) for step in range(POINTS)]}
    for name, points in expected.items():
        assert scalars(root / name) == points, name
    (folder,) = Trash(root).path.glob("[0-9]*")
    for name, (content, modified) in originals.items():
        assert (folder / "runs" / name / damaged[name].name).read_bytes() == content
        assert damaged[name].stat().st_mtime_ns == modified
        assert verify(damaged[name]).ok
        assert [path.name for path in (root / name).iterdir()] == [damaged[name].name]
    assert repair() == 0
    assert "7 event files of 7 runs: no damage" in capsys.readouterr().out
    for fast in ("true", "false"):
        with tensorboard(root, f"--load_fast={fast}") as address:
            wait_for(lambda address=address: len(get(address, "plugin/scalars/tags")) == len(expected))  # type: ignore[misc]
            for name, points in expected.items():
                wait_for(lambda address=address, name=name, points=points: shown(address, name) == points)  # type: ignore[misc]


def shown(address: str, run: str) -> list[tuple[int, float]]:
    answer = get(address, "plugin/scalars/scalars", run=run, tag="x")
    return [(step, value) for _, step, value in answer]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "TensorBoard does not show what was mended"
        time.sleep(0.05)


def test_only_the_runs_that_are_named_are_mended(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torn = DAMAGE["a torn end"][0]
    for name in ("group/seed1", "group/seed2", "other"):
        write(root / name, torn)
    assert repair("group/seed1", "othr", "--yes") == 2
    output, complaint = capsys.readouterr()
    assert "did you mean other?" in complaint
    assert "1 damaged, 1 mended" in output
    assert repair("group/seed1") == 0
    assert repair("*seed*") == 3
    assert repair("--yes") == 0
    assert repair() == 0


def test_a_live_run_is_left_alone(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = make_run(root, "live", status="running", days=40)
    (path,) = directory.glob("*tfevents*")
    path.write_bytes(path.read_bytes()[:-3])
    foreign = make_run(root, "foreign", foreign=True)
    (newest,) = foreign.glob("*tfevents*")
    newest.write_bytes(newest.read_bytes()[:-3])
    before = snapshot(root)
    with FileLock(directory / ".lock", timeout=0):
        assert repair("--yes") == 0
        assert "2 runs left alone" in capsys.readouterr().out
        assert repair("live", "--yes") == 2
        assert "live is live and left alone" in capsys.readouterr().err
    assert snapshot(root) == before
    assert repair("live", "--yes") == 0
    assert verify(path).ok


@pytest.mark.parametrize("event", ["locked", "written", "linked"])
def test_a_run_that_begins_meanwhile_is_left_alone(
    event: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(root / "run", DAMAGE["a torn end"][0])
    lock = FileLock(root / "run/.lock")

    def verify_late(path: Path) -> Report:
        report = verify(path)
        if event == "locked":
            lock.acquire(blocking=False)
        elif event == "written":
            path.write_bytes(path.read_bytes())
        else:
            (root / "run").rename(tmp_path / "elsewhere")
            (root / "run").symlink_to(tmp_path / "elsewhere")
        return report

    monkeypatch.setattr(repairing, "verify", verify_late)
    content = path.read_bytes()
    assert repair("--yes") == 5
    assert "is not mended: " in capsys.readouterr().err
    assert path.read_bytes() == content
    lock.release()


def test_what_holds_no_record_is_said_and_left(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = write(root / "noise", lambda whole, _: bytes(len(whole)))
    empty = write(root / "empty", lambda _, __: b"")
    good = write(root / "good", DAMAGE["a length"][0])
    assert repair("--yes") == 3
    output, complaint = capsys.readouterr()
    assert f"{noise} holds no valid record: it is left as it is".replace(f"{root.parent}/", "") in complaint
    assert "2 damaged, 1 mended" in output
    assert (set(noise.read_bytes()), empty.read_bytes()) == ({0}, b"")
    assert verify(good).ok
    assert repair("noise", "--yes") == 3
    assert repair("noise") == 3
    assert repair("good", "empty") == 0


def test_a_file_that_cannot_be_read_does_not_keep_the_others(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = DAMAGE["a torn end"][0]
    secret, other = write(root / "secret", torn), write(root / "zoo", torn)

    def verify_or_refuse(path: Path) -> Report:
        if path.parent.name == "secret":
            raise PermissionError(errno.EACCES, "Permission denied")
        return verify(path)

    monkeypatch.setattr(repairing, "verify", verify_or_refuse)
    assert repair("--yes") == 3
    assert f"secret/{secret.name} cannot be read: Permission denied" in capsys.readouterr().err
    assert verify(other).ok


def test_a_full_disk_leaves_the_original_in_place(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (write(root / name, DAMAGE["a hole"][0]) for name in ("first", "second"))
    content = first.read_bytes()

    def fail(source: Path, *arguments: Any, **options: Any) -> Report:
        if source.parent.name == "first":
            raise OSError(errno.ENOSPC, "No space left on device")
        return mend(source, *arguments, **options)

    monkeypatch.setattr(repairing, "repair", fail)
    assert repair("--yes") == 5
    assert f"{first.name} is not mended: No space left on device" in capsys.readouterr().err
    assert first.read_bytes() == content
    assert verify(second).ok


def test_where_nothing_can_be_linked_the_original_is_copied(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(root / "run", DAMAGE["a length"][0])
    content, modified = path.read_bytes(), path.stat().st_mtime

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    assert repair("--trash=other", "--yes") == 0
    (kept,) = (root.parent / "other").glob(f"*/runs/run/{path.name}")
    assert kept.read_bytes() == content
    assert kept.stat().st_mtime == pytest.approx(modified)
    assert verify(path).ok


def test_the_trash_of_prune_holds_the_originals(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(root / "run", DAMAGE["a length"][0])
    assert repair("--yes") == 0
    assert main(["runs", "prune", "--undo"]) == 2
    assert main(["runs", "prune", "--empty-trash"]) == 0
    assert "\trepair\t1 file\t" in capsys.readouterr().out
    assert main(["runs", "prune", "--older-than=1h", "--yes"]) == 0
    assert main(["runs", "prune", "--undo"]) == 0
    assert verify(path).ok
    assert main(["runs", "prune", "--empty-trash", "--yes"]) == 0
    assert len(list(read_events(path))) == POINTS


@pytest.mark.parametrize("name", [".", *ODD_NAMES])
def test_odd_names(name: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(root / name, DAMAGE["a torn end"][0])
    assert repair("--yes", "--", name) == 0
    assert all(line.replace("\t", "").isprintable() for line in capsys.readouterr().out.splitlines())
    assert verify(path).ok


@pytest.mark.parametrize(("arguments", "code", "complaint"), [
    (["--logdir=nowhere"], 2, "nowhere is not there"),
    (["--logdir=file"], 2, "file is a file"),
    (["--trash=logs/trash", "--yes"], 2, "inside the log root"),
    (["--trash=file", "--yes"], 5, "the trash"),
    (["x", "--yes"], 2, "RUN x is not there"),
    (["ru", "--yes"], 2, "means 2 runs"),
])  # fmt: skip
def test_mistakes_are_one_line_and_mend_nothing(
    arguments: list[str], code: int, complaint: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("run", "rug"):
        write(root / name, DAMAGE["a torn end"][0])
    (root.parent / "file").touch()
    before = snapshot(root.parent)
    assert repair(*arguments) == code
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert snapshot(root.parent) == before


@pytest.mark.usefixtures("root")
def test_an_empty_log_root_is_no_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert repair() == 0
    assert "there are no runs" in capsys.readouterr().out
