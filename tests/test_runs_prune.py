"""`rlboard runs prune`: only what is meant goes, all of it comes back, and nothing is lost whatever happens."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

from rlboard.cli import main
from rlboard.runs import trash as trashing
from rlboard.runs.trash import Folder, Trash
from tests.conftest import ROOT
from tests.logged import age, make_run, snapshot

ODD_NAMES = [
    "실험 1",
    "🏆",
    ",:=%#?&'\"[]",
    "a\nb",
    "-x",
    "--yes",
    "~",
    "$(touch x)",
    "\t\x1b[3m",
    "\udcff",
    "[b]x[/b]",
]


def prune(*arguments: str) -> int:
    return main(["runs", "prune", *arguments])


def names(root: Path) -> set[str]:
    """The runs below `root`, by their event files."""
    return {str(path.parent.relative_to(root)) for path in root.rglob("*tfevents*")}


def trashed(root: Path) -> set[str]:
    return {name for folder in Trash(root).path.glob("[0-9]*/runs") for name in names(folder)}


def shown(output: str) -> dict[str, list[str]]:
    """The rows of the table that a pipe gets."""
    rows = [line.split("\t") for line in output.splitlines() if line.count("\t") == 4]
    return {row[0]: row[1:] for row in rows[1:]}


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    with FileLock(directory / ".lock", timeout=0):
        yield


def test_a_dry_run_shows_what_its_command_then_does(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(root, "REINFORCE/old", days=40, status="failed")
    make_run(root, "REINFORCE/new", days=1, status="failed")
    make_run(root, "REINFORCE/good", days=40)
    before = snapshot(root.parent)
    assert prune("--older-than=30d", "--failed") == 0
    assert snapshot(root.parent) == before
    output = capsys.readouterr().out
    size = sum(path.stat().st_size for path in (root / "REINFORCE/old").iterdir())
    assert shown(output) == {"REINFORCE/old": ["failed", "40 d", f"{size} B", "failed, older than 30d"]}
    assert f"1 run, {size} B, would go to " in output
    assert "2 runs stay; 1 not failed, interrupted or killed; 1 newer than 30d" in output
    (command,) = re.findall("do it with: (.*)", output)
    assert command == "rlboard runs prune --older-than=30d --failed --logdir logs --yes"
    assert main(shlex.split(command)[1:]) == 0
    assert names(root) == {"REINFORCE/new", "REINFORCE/good"}
    assert trashed(root) == {"REINFORCE/old"}
    output = capsys.readouterr().out
    (command,) = re.findall("put back with: (.*)", output)
    assert main(shlex.split(command)[1:]) == 0
    assert snapshot(root) == {name[5:]: entry for name, entry in before.items() if name.startswith("logs/")}
    assert not list(Trash(root).path.glob("[0-9]*"))


CONDITIONS = {
    ("--older-than=30d",): {"a/old", "a/old-failed", "a/old-foreign", "a/old-killed"},
    ("--older-than=1w",): {"a/old", "a/old-failed", "a/old-foreign", "a/old-killed", "a/8d"},
    ("--older-than=191h",): {"a/old", "a/old-failed", "a/old-foreign", "a/old-killed", "a/8d"},
    ("--older-than=0d", "a/new*"): {"a/new", "a/new-interrupted"},
    ("--failed",): {"a/old-failed", "a/new-interrupted", "a/old-killed"},
    ("--failed", "--older-than=30d"): {"a/old-failed", "a/old-killed"},
    ("--keep-best=1",): {"a/8d", "a/new", "a/new-interrupted", "a/old-failed", "a/old-killed"},
    ("--keep-best=2",): {"a/new", "a/new-interrupted", "a/old-failed", "a/old-killed"},
    ("--keep-best=2", "--older-than=30d"): {"a/old-failed", "a/old-killed", "a/old-foreign"},
    ("a/new",): {"a/new"},
    ("a/new", "a/8d"): {"a/new", "a/8d"},
    ("a/new", "a/old", "--older-than=30d"): {"a/old"},
    ("a/new-*",): {"a/new-interrupted"},
    ("logs/a/new/",): {"a/new"},
}  # fmt: skip


@pytest.mark.parametrize("arguments", CONDITIONS, ids=" ".join)
def test_only_runs_that_meet_all_conditions_go(arguments: tuple[str, ...], root: Path) -> None:
    expected = CONDITIONS[arguments]
    make_run(root, "a/old", days=40, best=9)
    make_run(root, "a/old-failed", days=40, status="failed", best=1)
    make_run(root, "a/old-killed", days=40, status="running")
    make_run(root, "a/old-foreign", days=40, foreign=True)
    make_run(root, "a/8d", days=8, best=8)
    make_run(root, "a/new", best=2)
    make_run(root, "a/new-interrupted", status="interrupted", best=2)
    everything = names(root)
    assert prune("--yes", *arguments) == 0
    assert (trashed(root), names(root)) == (expected, everything - expected)


def test_the_best_of_each_loop_and_task_are_kept(root: Path) -> None:
    cart, acrobot = {"env_id": "CartPole-v1"}, {"env_id": "Acrobot-v1"}
    for score in (10, 20, 30):
        make_run(root, f"R/cart{score}", days=9, best=score, config=cart)
        make_run(root, f"R/acro{score}", days=9, best=-score, config=acrobot)
        make_run(root, f"V/train{score}", days=9, best=score, loop="vision/train", headline="Accuracy/val")
    make_run(root, "R/group", days=9, best=5, config=cart, headline="reward/iqm")
    make_run(root, "R/group/seed1", days=9, best=500, config=cart)
    make_run(root, "R/a-nan", days=9, best=float("nan"), config=cart)
    with locked(make_run(root, "R/live", status="running", best=999, config=cart)):
        assert prune("--keep-best=2", "--yes") == 0
    kept = {"cart20", "cart30", "acro10", "acro20", "group", "group/seed1", "live"}
    assert names(root) == {f"R/{name}" for name in kept} | {"V/train20", "V/train30"}


def test_a_group_of_seeds_goes_as_one(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def group(days: float) -> None:
        make_run(root, "R/group", days=40, status="failed")
        make_run(root, "R/group/seed1", days=40)
        make_run(root, "R/group/seed2", days=days, status="failed")

    group(days=1)
    assert prune("--older-than=30d", "--yes") == 0
    assert len(names(root)) == 3
    group(days=40)
    with locked(root / "R/group/seed1"):
        assert prune("--older-than=30d", "--yes") == 0
        assert prune("R/group", "--yes") == 2
    assert "R/group stays: live" in capsys.readouterr().err
    for name in ("R/group/seed1", "seed1", "*/seed?", str(root / "R/group/seed1")):
        assert prune(name, "--yes") == 2
        assert "is a seed of R/group, whose seeds stay together: give R/group" in capsys.readouterr().err
    assert len(names(root)) == 3
    assert prune("grou", "--failed", "--yes") == 0
    assert "R/group (and 2 inside)" in shown(capsys.readouterr().out)
    assert (names(root), trashed(root)) == (set(), {"R/group", "R/group/seed1", "R/group/seed2"})


def test_a_run_inside_which_another_stays_stays(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(root, "outer", days=40, status="failed")
    make_run(root, "outer/sub/inner", days=40)
    make_run(root, "outer/sub/other", days=40, status="failed")
    assert prune("--failed", "--yes") == 0
    assert "1 with a run inside that stays" in capsys.readouterr().out
    assert names(root) == {"outer", "outer/sub/inner"}
    with locked(root / "outer/sub/inner"):
        assert prune("outer", "--yes") == 2
    assert "outer stays: live: outer/sub/inner may still be written to" in capsys.readouterr().err
    assert prune("outer", "--yes") == 0
    assert prune("--undo") == 0
    assert names(root) == {"outer", "outer/sub/inner"}
    capsys.readouterr()
    assert prune("--older-than=30d", "--yes") == 0
    output = capsys.readouterr().out
    assert list(shown(output)) == ["outer (and 1 inside)"]
    assert "1 run, " in output
    assert names(root) == set()


def test_age_is_that_of_the_newest_file_however_deep(root: Path) -> None:
    """`find runs/ -mtime +30 -exec rm -rf` would delete both."""
    directory = make_run(root, ".", days=40)
    make_run(root, "run", days=40)
    (directory / "run/videos/deep").mkdir(parents=True)
    (directory / "run/videos/deep/new.gif").write_bytes(b"GIF89a")
    for path in (root / "run", root):
        os.utime(path, (0, 0))
    assert prune("--older-than=30d", "--yes") == 0
    assert names(root) == {".", "run"}
    age(root / "run/videos/deep", 31)
    assert prune("--older-than=30d", "--yes") == 0
    assert (names(root), trashed(root)) == ({"."}, {"run"})


@pytest.mark.parametrize("name", [".", "..", "./", "logs", "../..", "/", "{root}", "{root}/.."])
def test_the_log_root_is_never_pruned(name: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(root, ".", days=40)
    make_run(root, "a.b..logs", days=40)
    before = snapshot(root)
    assert prune(name.format(root=root), "--yes") == 2
    assert "the log root" in capsys.readouterr().err
    assert snapshot(root) == before


def test_only_directories_with_event_files_are_pruned(root: Path) -> None:
    make_run(root, "run", days=40)
    for name in ("empty", "notes"):
        (root / name).mkdir()
    (root / "notes/run.json").write_text('{"loop": "a", "config": {}, "status": "failed"}')
    age(root / "notes", 40)
    assert prune("--failed", "--yes") == 0
    assert prune("notes", "--yes") == 2
    assert prune("empty", "--yes") == 2
    assert prune("--older-than=1d", "--yes") == 0
    assert {path.name for path in root.iterdir()} == {"empty", "notes"}


def test_a_live_run_is_never_pruned(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(root, "foreign", foreign=True, days=59 / 1440)
    make_run(root, "quiet", foreign=True, days=61 / 1440)
    with locked(make_run(root, "live", status="running", days=400)):
        assert prune("--older-than=0d", "--yes") == 0
        assert names(root) == {"live", "foreign"}
        assert "2 live" in capsys.readouterr().out
        assert prune("live", "foreign", "--yes") == 2
        assert prune("*", "--yes") == 0
    assert names(root) == {"live", "foreign"}
    assert prune("live", "--yes") == 0


def test_a_run_that_begins_meanwhile_stays(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("locked", "written", "free", "group", "group/seed1"):
        make_run(root, name, days=40)
    begin = Trash.begin
    with contextlib.ExitStack() as stack:

        def begin_late(trash: Trash, *arguments: Any) -> Folder:
            stack.enter_context(locked(root / "locked"))
            stack.enter_context(locked(root / "group/seed1"))
            (root / "written/checkpoint.pt").write_bytes(b"new")
            return begin(trash, *arguments)

        monkeypatch.setattr(Trash, "begin", begin_late)
        assert prune("--older-than=30d", "--yes") == 5
    assert (names(root), trashed(root)) == ({"locked", "written", "group", "group/seed1"}, {"free"})
    complaint = capsys.readouterr().err
    assert "locked stays: a process has begun to write to it" in complaint
    assert "written stays: it was written to meanwhile" in complaint


def test_links_are_not_followed(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = tmp_path / "elsewhere"
    make_run(elsewhere, "precious", days=400, status="failed")
    make_run(root, "mine", days=400, status="failed")
    (root / "link").symlink_to(elsewhere / "precious")
    (root / "parent").symlink_to(elsewhere)
    (root / "mine/data").symlink_to(elsewhere)
    (root / "mine/gone").symlink_to("nowhere")
    before = snapshot(elsewhere)
    for name in (
        "link",
        "parent/precious",
        "../elsewhere/precious",
        "mine/../../elsewhere/precious",
        "mine/data/precious",
    ):
        assert prune(name, "--yes") == 2, name
    assert "is not there" in capsys.readouterr().err
    assert prune("--failed", "--yes") == 0
    assert trashed(root) == {"mine"}
    assert names(root) == set()
    assert prune("--undo") == 0
    assert (root / "mine/data").readlink() == elsewhere
    assert (root / "mine/gone").is_symlink()
    assert snapshot(elsewhere) == before


def test_what_becomes_a_link_before_it_moves_stays(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(root, "a/run", days=40)
    begin = Trash.begin

    def swap(trash: Trash, *arguments: Any) -> Folder:
        (root / "a").rename(tmp_path / "elsewhere")
        (root / "a").symlink_to(tmp_path / "elsewhere")
        return begin(trash, *arguments)

    monkeypatch.setattr(Trash, "begin", swap)
    assert prune("a/run", "--yes") == 5
    assert names(tmp_path / "elsewhere") == {"run"}


def test_the_log_root_may_be_a_link(root: Path, tmp_path: Path) -> None:
    make_run(root, "a/run", days=40)
    (tmp_path / "far").mkdir()
    link = tmp_path / "far/link"
    link.symlink_to(root)
    assert prune("far/link/a/run", "--logdir", str(link), "--yes") == 0
    assert names(root) == set()
    assert names(tmp_path / ".logs-trash") != set()
    assert prune("--undo", "--logdir", str(link)) == 0
    assert names(root) == {"a/run"}
    assert link.is_symlink()


def test_tensorboard_shows_no_pruned_run(root: Path) -> None:
    make_run(root, "old", days=40)
    make_run(root, "new")
    assert prune("--older-than=30d", "--yes") == 0
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(root))
    multiplexer.Reload()
    assert list(multiplexer.Runs()) == ["new"]
    assert [point.step for point in multiplexer.Scalars("new", "reward")] == [0, 1, 2]


def test_undo_takes_the_newest_prune_first_and_overwrites_nothing(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a/1", "a/2", "a/3"):
        make_run(root, name, days=40)
    assert prune("a/1", "--yes") == 0
    assert prune("a/2", "a/3", "--yes") == 0
    old = snapshot(Trash(root).path)
    make_run(root, "a/2", days=1)
    new = snapshot(root)
    assert prune("--undo") == 5
    output, complaint = capsys.readouterr()
    assert "1 run put back into logs" in output
    assert f"a/2 stays in the trash: {root / 'a/2'} is taken" in complaint
    assert names(root) == {"a/2", "a/3"}
    assert {name: entry for name, entry in snapshot(root).items() if "a/2" in name} == {
        name: entry for name, entry in new.items() if "a/2" in name
    }
    assert prune("--undo") == 5
    assert {name for name in old if "a/2" in name} == {name for name in snapshot(Trash(root).path) if "a/2" in name}
    shutil.rmtree(root / "a/2")
    assert prune("--undo") == 0
    assert prune("--undo") == 0
    assert names(root) == {"a/1", "a/2", "a/3"}
    assert prune("--undo") == 2
    assert "there is no prune to undo" in capsys.readouterr().err


def test_undo_follows_no_link(root: Path, tmp_path: Path) -> None:
    make_run(root, "a/run", days=40)
    assert prune("a/run", "--yes") == 0
    (root / "a").rmdir()
    (tmp_path / "elsewhere").mkdir()
    (root / "a").symlink_to(tmp_path / "elsewhere")
    assert prune("--undo") == 5
    assert not list((tmp_path / "elsewhere").iterdir())
    (root / "a").unlink()
    assert prune("--undo") == 0
    assert names(root) == {"a/run"}


def test_two_prunes_do_not_meet(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(root, "run", days=40)
    trash = Trash(root)
    with trash.used():
        for arguments in (["run", "--yes"], ["--undo"], ["--empty-trash", "--yes"]):
            assert prune(*arguments) == 5
            assert "in use by another rlboard" in capsys.readouterr().err
    assert names(root) == {"run"}


KILLED = """
import os, signal, sys
from rlboard.cli import main
from rlboard.runs.trash import Trash
take, count = Trash.take, 0
def kill(trash, folder, name):
    global count
    count += 1
    if count == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    take(trash, folder, name)
Trash.take = kill
main(["runs", "prune", "--older-than=30d", "--yes"])
"""


def test_a_prune_that_is_killed_can_be_undone(root: Path) -> None:
    for number in range(5):
        make_run(root, f"a/{number}", days=40)
    before = snapshot(root)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", KILLED], check=False, capture_output=True, env=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (names(root), trashed(root)) == ({"a/2", "a/3", "a/4"}, {"a/0", "a/1"})
    assert prune("--undo") == 0
    assert snapshot(root) == before


@pytest.fixture
def two_file_systems(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A log root and a trash `other` between which nothing can be renamed or linked."""
    other = root.parent / "other"
    rename, link = Path.rename, os.link

    def crosses(source: Any, target: Any) -> bool:
        return Path(source).is_relative_to(other) != Path(target).is_relative_to(other)

    def rename_within(source: Path, target: Path) -> Path:
        if crosses(source, target):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(source, target)

    def link_within(source: Any, target: Any, **options: Any) -> None:
        if crosses(source, target):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        link(source, target, **options)

    monkeypatch.setattr(Path, "rename", rename_within)
    monkeypatch.setattr(os, "link", link_within)
    directory = make_run(root, "a/run", days=40)
    (directory / "videos").mkdir()
    (directory / "videos/film.gif").write_bytes(b"GIF89a")
    (directory / "link").symlink_to("videos")
    (directory / "gone").symlink_to("nowhere")
    for each in (directory / "videos", directory):
        age(each, 40)
    make_run(root, "b", days=40)
    return other


def moved_to(other: Path) -> set[str]:
    return {name for folder in other.glob("[0-9]*/runs") for name in names(folder)}


@pytest.mark.usefixtures("two_file_systems")
def test_between_file_systems_runs_are_copied(root: Path) -> None:
    before = snapshot(root)
    assert prune("--older-than=30d", "--trash=other", "--yes") == 0
    assert (names(root), moved_to(root.parent / "other")) == (set(), {"a/run", "b"})
    assert not list((root.parent / "other").glob("*/copying"))
    assert prune("--undo", "--trash=other") == 0
    assert snapshot(root) == before


def fail_at(number: int, function: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """`function`, which fails when it is called so many times."""
    calls = iter(range(1, 1_000))

    def failing(*arguments: Any, **options: Any) -> Any:
        if next(calls) == number:
            raise error
        return function(*arguments, **options)

    return failing


@pytest.mark.parametrize("call", [1, 3])
def test_a_copy_that_fails_leaves_the_run_whole(
    call: int, two_file_systems: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(root)
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(trashing, "copy_durably", fail_at(call, trashing.copy_durably, full))
        assert prune("--older-than=30d", "--trash=other", "--yes") == 5
    assert "a/run stays: " in (complaint := capsys.readouterr().err)
    assert "No space left" in complaint
    assert (names(root), moved_to(two_file_systems)) == ({"a/run"}, {"b"})
    assert prune("--undo", "--trash=other") == 0
    assert snapshot(root) == before
    assert not list(two_file_systems.glob("[0-9]*"))


def test_a_copy_that_differs_is_not_trusted(
    two_file_systems: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = trashing.copy_durably

    def flip(source: Path, target: Path) -> None:
        copy(source, target)
        if "tfevents" in source.name:
            content = bytearray(target.read_bytes())
            content[20] ^= 1
            target.write_bytes(content)

    monkeypatch.setattr(trashing, "copy_durably", flip)
    assert prune("a/run", "--trash=other", "--yes") == 5
    assert "a/run stays: it was written to while it was copied" in capsys.readouterr().err
    assert "a/run" in names(root)
    assert not moved_to(two_file_systems)


@pytest.mark.parametrize("removed", [0, 1, 3])
def test_a_crash_while_the_original_is_removed_can_be_undone(
    removed: int, two_file_systems: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(root)

    def die(path: Path, **_: Any) -> None:
        if path == root / "a/run":
            for each in sorted(path.iterdir())[:removed]:
                each.unlink()
            raise KeyboardInterrupt
        rmtree(path, ignore_errors=True)

    rmtree = shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", die)
        assert prune("a/run", "--trash=other", "--yes") == 130
    assert moved_to(two_file_systems) == {"a/run"}
    assert (root / "a/run").exists()
    assert prune("--undo", "--trash=other") == 0
    assert snapshot(root) == before
    assert not list(two_file_systems.glob("[0-9]*"))


@pytest.mark.usefixtures("two_file_systems")
def test_a_crash_while_the_copy_in_the_trash_is_removed_can_be_undone(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(root)
    assert prune("a/run", "--trash=other", "--yes") == 0

    def die(path: Path, **_: Any) -> None:
        if path.name == "run":
            next(iter(path.glob("*tfevents*"))).unlink()
            raise KeyboardInterrupt
        rmtree(path, ignore_errors=True)

    rmtree = shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", die)
        assert prune("--undo", "--trash=other") == 130
    assert prune("--undo", "--trash=other") == 0
    assert snapshot(root) == before


def test_a_beginning_run_is_not_taken_for_what_a_crash_left(root: Path) -> None:
    make_run(root, "run", days=40)
    assert prune("run", "--yes") == 0
    (root / "run").mkdir()
    with locked(root / "run"):
        assert prune("--undo") == 5
        assert [path.name for path in (root / "run").iterdir()] == [".lock"]


def test_the_trash_is_emptied_when_told_to(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prune("--empty-trash", "--yes") == 0
    assert "there is nothing in the trash" in capsys.readouterr().out
    assert not (root.parent / ".logs-trash").exists()
    for name in ("a/1", "a/2"):
        make_run(root, name, days=40)
        assert prune(name, "--yes") == 0
    before = snapshot(root.parent)
    capsys.readouterr()
    assert prune("--empty-trash") == 0
    assert snapshot(root.parent) == before
    output = capsys.readouterr().out
    assert output.count("\tprune\t1 run\t") == 2
    (command,) = re.findall("do it with: (.*)", output)
    assert main(shlex.split(command)[1:]) == 0
    assert [path.name for path in (root.parent / ".logs-trash").iterdir()] == [".lock"]
    assert prune("--undo") == 2


def test_what_is_half_deleted_is_not_put_back(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(root, "run", days=40)
    assert prune("run", "--yes") == 0
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail_at(1, shutil.rmtree, KeyboardInterrupt()))
        assert prune("--empty-trash", "--yes") == 130
    assert trashed(root) == {"run"}
    assert prune("--undo") == 2
    assert prune("--empty-trash", "--yes") == 0
    assert trashed(root) == set()


def test_log_roots_share_a_trash_without_taking_from_each_other(root: Path, tmp_path: Path) -> None:
    make_run(root, "run", days=40)
    make_run(tmp_path / "second", "run", days=40)
    assert prune("run", "--trash=shared", "--yes") == 0
    assert prune("run", "--trash=shared", "--logdir=second", "--yes") == 0
    assert prune("--empty-trash", "--trash=shared", "--logdir=second", "--yes") == 0
    assert prune("--undo", "--trash=shared", "--logdir=second") == 2
    assert prune("--undo", "--trash=shared") == 0
    assert (names(root), names(tmp_path / "second")) == ({"run"}, set())


def test_a_project_may_be_moved_with_its_trash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "one/logs", "run", days=40)
    monkeypatch.chdir(tmp_path)
    assert prune("run", "--logdir=one/logs", "--yes") == 0
    (tmp_path / "one").rename(tmp_path / "two")
    assert prune("--undo", "--logdir=two/logs") == 0
    assert names(tmp_path / "two/logs") == {"run"}
    assert str(tmp_path) not in "".join(path.read_text() for path in tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize("content", [
    "", "[]", "{}", '{"command": "prune", "root": "../logs", "names": ["../../../../escaped"]}',
    '{"command": "prune", "root": "../logs", "names": ["/etc"]}', '{"command": "prune", "root": "../logs", "names": 3}',
    "[" * 100_000,
])  # fmt: skip
def test_a_damaged_manifest_is_said_and_passed_over(
    content: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("first", "second"):
        make_run(root, name, days=40)
        assert prune(name, "--yes") == 0
    *_, newest = sorted(Trash(root).path.glob("[0-9]*/manifest.json"), key=lambda path: path.stat().st_mtime_ns)
    newest.write_text(content)
    before = snapshot(newest.parent)
    assert prune("--undo") == 3
    assert f"{newest} is damaged" in capsys.readouterr().err
    assert prune("--empty-trash", "--yes") == 3
    assert names(root) == {"first"}
    assert snapshot(newest.parent) == before


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names(name: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(root, f"{name}/{name}", days=40)
    make_run(root, "other", days=40)
    before = snapshot(root)
    assert prune("--", f"{name}/{name}") == 0
    output = capsys.readouterr().out
    assert all(line.replace("\t", "").isprintable() for line in output.splitlines())
    (command,) = re.findall("do it with: rlboard (.*)", output)
    if bash := shutil.which("bash"):  # what a user pastes is what was meant
        arguments = subprocess.run([bash, "-c", f"printf '%s\\0' {command}"], check=True, capture_output=True).stdout
        assert main([os.fsdecode(argument) for argument in arguments.split(b"\0")[:-1]]) == 0
        assert (names(root), trashed(root)) == ({"other"}, {f"{name}/{name}"})
        assert prune("--undo") == 0
    assert snapshot(root) == before


@pytest.mark.parametrize(("arguments", "code", "complaint"), [
    ([], 2, "nothing says which runs to prune"),
    (["--yes"], 2, "nothing says which runs to prune"),
    (["--older-than=30", "--yes"], 2, "is not an age: give a number with h, d or w"),
    (["--older-than=-1d", "--yes"], 2, "is not an age"),
    (["--older-than=30 years\n", "--yes"], 2, "is not an age"),
    (["--older-than=nan d", "--yes"], 2, "is not an age"),
    (["--keep-best=0", "--yes"], 2, "--keep-best"),
    (["--keep-best=some", "--yes"], 2, "--keep-best"),
    (["rnu", "--yes"], 2, "did you mean a/run?"),
    (["", "--yes"], 2, "is not there"),
    (["a", "--yes"], 2, "means 2 runs"),
    (["x\0y", "--yes"], 2, "is not there"),
    (["--logdir=nowhere", "--failed"], 2, "nowhere is not there"),
    (["--logdir=file", "--failed"], 2, "file is a file"),
    (["--logdir=a\0b", "--failed"], 2, "--logdir"),
    (["--logdir=nowhere", "--undo"], 2, "there is no prune to undo"),
    (["--logdir=/", "--undo"], 2, "give one with --trash DIR"),
    (["--trash=logs/trash", "a/run", "--yes"], 2, "inside the log root"),
    (["--trash=logs", "a/run", "--yes"], 2, "inside the log root"),
    (["--trash=inside", "a/run", "--yes"], 2, "inside the log root"),
    (["--trash=file", "a/run", "--yes"], 5, "the trash"),
    (["--trash=file/below", "a/run", "--yes"], 5, "give another directory with --trash"),
    (["--trash=a\0b", "a/run", "--yes"], 2, "--trash"),
    (["--undo", "--empty-trash"], 2, "give it alone"),
    (["--undo", "--failed"], 2, "give it alone"),
    (["--empty-trash", "--yes", "a/run"], 2, "give it alone"),
])  # fmt: skip
def test_mistakes_are_one_line_and_move_nothing(
    arguments: list[str], code: int, complaint: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(root, "a/run", days=40)
    make_run(root, "a/bag", days=40)
    (root.parent / "file").touch()
    (root.parent / "inside").symlink_to("logs")
    before = snapshot(root.parent)
    assert prune(*arguments) == code
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert error.strip().isprintable()
    assert snapshot(root.parent) == before


def test_what_cannot_be_judged_stays_and_the_rest_goes(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("damaged", "good", "secret"):
        make_run(root, name, days=40, status="failed")
    (root / "damaged/run.json").write_text("{")
    age(root / "damaged", 40)
    assert prune("--failed", "good", "damaged", "nonsense", "--yes") == 3
    complaint = capsys.readouterr().err
    assert "damaged stays: damaged: " in complaint
    assert "RUN nonsense is not there" in complaint
    assert names(root) == {"damaged", "secret"}
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("secret"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        assert prune("--older-than=30d", "--yes") == 5
    assert "secret cannot be read: Permission denied" in capsys.readouterr().err
    assert names(root) == {"secret"}


@pytest.mark.usefixtures("root")
def test_an_empty_log_root_is_no_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert prune("--failed", "--yes") == 0
    assert "no runs in logs" in capsys.readouterr().out
    assert prune("run", "--yes") == 2
    assert "there are no runs" in capsys.readouterr().err


def test_a_run_that_cannot_be_moved_does_not_keep_the_others(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b", "c"):
        make_run(root, name, days=40)
    denied = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(Trash, "take", fail_at(2, Trash.take, denied))
    assert prune("--older-than=30d", "--yes") == 5
    assert "b stays: Permission denied" in capsys.readouterr().err
    assert (names(root), trashed(root)) == ({"b"}, {"a", "c"})
    manifest = next(iter(Trash(root).path.glob("*/manifest.json")))
    assert json.loads(manifest.read_text())["names"] == ["a", "b", "c"]
    assert prune("--undo") == 0
    assert names(root) == {"a", "b", "c"}


def test_a_terminal_gets_a_table(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(root, "a/[red]run", days=40, status="failed")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    assert prune("--failed") == 0
    text = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert re.search(r"a/\[red\]run\s+failed\s+40 d\s+\d+ B\s+failed", text)
