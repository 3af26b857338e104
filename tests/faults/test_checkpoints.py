"""Checkpoints that are damaged, of others, of other versions or hostile: each is found out, and nothing is run."""

from __future__ import annotations

import ast
import copy
import hashlib
import io
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlboard.checkpoint import CHECKPOINT, FORMAT, load, save, sha256_file
from rlboard.cli import main
from rlboard.errors import DataError, RlboardError
from rlboard.registry import find_loop
from rlboard.resume import prepare
from tests.conftest import ROOT
from tests.faults.conftest import Tally

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("faults-checkpoints")]

COMMAND = ["reinforce", "--engine=gym", "--episodes=40", "--eval-episodes=1", "--log=minimal", "--save-every=0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log root with two equal runs, `run` and `twin`, with one checkpoint each."""
    root = tmp_path_factory.mktemp("trained")
    for name in ("run", "twin"):
        assert main([*COMMAND, "--keep=1", "--log-dir", str(root), f"--run-name={name}"]) == 0
    return root


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run in a log root of its own."""
    return shutil.copytree(trained / "REINFORCE/run", tmp_path / "logs/REINFORCE/run")


def refusal(directory: Path) -> str:
    """What `--resume` says of a run with a checkpoint that it cannot use. Nothing of the run may be touched."""
    before = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    with pytest.raises(DataError) as caught:
        prepare(find_loop("agents/reinforce"), "run", directory.parent.parent, {})
    assert {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()} == before
    complaint = str(caught.value)
    assert complaint.isprintable()
    return complaint


def code_of(directory: Path, capsys: pytest.CaptureFixture[str]) -> int:
    """The exit code of the whole command; it must say one line."""
    capsys.readouterr()
    code = main(["reinforce", "--log-dir", str(directory.parent.parent), "--resume=run", "--episodes=80"])
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1, complaint
    return code


@pytest.mark.parametrize("times", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_flipped_byte_is_found_out(times: int, run: Path, tally: Tally) -> None:
    path, generator = run / CHECKPOINT, random.Random(times)
    content = path.read_bytes()
    for _ in range(times):
        damaged = bytearray(content)
        damaged[generator.randrange(len(content))] ^= generator.randrange(1, 256)
        path.write_bytes(damaged)
        assert "is damaged" in refusal(run)
        tally("3 checkpoint, one byte flipped")
    path.write_bytes(content)
    assert load(path)["step"] == 40


@pytest.mark.parametrize("times", [10, pytest.param(300, marks=pytest.mark.slow)])
def test_a_truncated_checkpoint_is_found_out(times: int, run: Path, tally: Tally) -> None:
    path, generator = run / CHECKPOINT, random.Random(times)
    content = path.read_bytes()
    for _ in range(times):
        path.write_bytes(content[: generator.randrange(len(content))])
        assert "is damaged" in refusal(run)
        tally("3 checkpoint truncated")


def test_the_checkpoint_of_an_equal_run_is_found_out(
    trained: Path, run: Path, tally: Tally, capsys: pytest.CaptureFixture[str]
) -> None:
    """Same options, same seed, same weights: only the event file that it was saved beside is another."""
    for path in (trained / "REINFORCE/twin").glob("checkpoint.pt*"):
        shutil.copy(path, run)
    assert "is another run's" in refusal(run)
    assert code_of(run, capsys) == 3
    tally("3 checkpoint of another run")


def nested(value: Any, depth: int = 2) -> list[tuple[str, ...]]:
    """The paths of the keys in dictionaries of dictionaries."""
    if not isinstance(value, dict) or not depth:
        return []
    return [path for key in value for path in ((key,), *((key, *rest) for rest in nested(value[key], depth - 1)))]


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_other_schemas_are_found_out(every: int, run: Path, tally: Tally, capsys: pytest.CaptureFixture[str]) -> None:
    state = load(run / CHECKPOINT)
    for version in (None, 0, 1, FORMAT - 1, FORMAT + 1, FORMAT + 0.5, str(FORMAT), [FORMAT], 10**100):
        save(run / CHECKPOINT, state | {"format": version})
        assert f"this version reads format {FORMAT}" in refusal(run)
        tally("3 checkpoint of another schema")
    optional = {("loop", "model"), *(("model", name) for name in state["model"])}  # the learner has the weights, too
    for path in nested(state)[::every]:
        if path in optional or path[0] == "config":
            continue
        changed = copy.deepcopy(state)
        inner = changed
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        save(run / CHECKPOINT, changed)
        assert code_of(run, capsys) == 3, path
        tally("3 checkpoint of another schema")


class Bomb:
    """Makes a directory where it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, ("exploded",)


def saved(value: object, *, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def packed(content: bytes) -> bytes:
    """The same archive, compressed: torch would read it, whatever it unpacks to."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return zipped({name: archive.read(name) for name in archive.namelist()}, zipfile.ZIP_DEFLATED)


def hostile() -> dict[str, bytes]:
    zeros = torch.zeros(2_000_000)
    return {
        "a pickle bomb": pickle.dumps(Bomb()),
        "a pickle bomb in an archive": saved(Bomb()),
        "a pickle bomb in a state": saved({"format": FORMAT, "step": 40, "model": {}, "loop": {"learner": Bomb()}}),
        "a pickle bomb in the old format": saved({"loop": Bomb()}, legacy=True),
        "an archive that leads outside": zipped({"../outside": b"x", "archive/data.pkl": pickle.dumps({})}),
        "an archive with an absolute path": zipped({"/tmp/outside": b"x", "archive/data.pkl": pickle.dumps({})}),
        "a zip bomb": packed(saved({"format": FORMAT, "step": 40, "model": {"weights": zeros}})),
        "a zip bomb of nothing": zipped({"archive/data.pkl": bytes(5_000_000)}, zipfile.ZIP_DEFLATED),
        "nothing": b"",
        "text": b"not a checkpoint",
        "a web page": b"<!DOCTYPE html><html>",
    }


def test_hostile_files_are_refused_though_their_hash_fits(
    run: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parent)
    for number, (name, content) in enumerate(hostile().items()):
        (run / CHECKPOINT).write_bytes(content)
        sha256_file(run / CHECKPOINT).write_text(f"{hashlib.sha256(content).hexdigest()}  {CHECKPOINT}\n")
        assert "is no checkpoint of rlboard" in refusal(run), name
        assert number or code_of(run, capsys) == 3
        assert [path.name for path in run.parent.iterdir()] == ["run"], name
        tally("8 hostile checkpoint")


def test_a_position_that_leads_outside_is_refused(run: Path, tally: Tally) -> None:
    state = load(run / CHECKPOINT)
    outside = run.parent / state["position"]["file"]
    shutil.copy(run / state["position"]["file"], outside)
    content = outside.read_bytes()
    for file in (f"../{outside.name}", str(outside), "..", "", "\0", "x" * 5000):
        save(run / CHECKPOINT, state | {"position": {**state["position"], "file": file}})
        refusal(run)
        tally("8 hostile checkpoint")
    for offset in (-1, 2**63, 10**30, 7):
        save(run / CHECKPOINT, state | {"position": {**state["position"], "offset": offset}})
        refusal(run)
        tally("8 hostile checkpoint")
    assert outside.read_bytes() == content


NAMES = [
    "x" * 5000,
    "x" * 5000 + ".pt",
    "a\0b",
    "a\0b.pt",
    "..",
    "../..",
    "/",
    ".",
    "*",
    "?",
    "[",
    "<script>",
    "\x1b[31m",
]
NAMES += ["$(touch x)", "`x`", "-", "run/../../x.pt", "/dev/zero", "/dev/zero.pt", "/proc/self/mem", "로그", "\ud800"]


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_hostile_names_are_refused_in_one_line(
    every: int,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    tally: Tally,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (run.parent.parent / "REINFORCE/second").mkdir()
    shutil.copy(run / "run.json", run.parent / "second")
    monkeypatch.chdir(run)
    before = sorted(path.name for path in run.iterdir())
    for name in NAMES[::every]:
        for option in (f"--resume={name}", f"--run-name={name}"):
            if option in ("--run-name=로그", "--run-name=-"):
                continue
            capsys.readouterr()
            code = main([*COMMAND, "--log-dir", str(run.parent.parent), option])
            complaint = capsys.readouterr().err
            assert code == 2, (option, complaint)
            assert complaint.count("\n") == 1
            assert complaint.rstrip("\n").isprintable()
            tally("8 hostile name")
    assert sorted(path.name for path in run.iterdir()) == before


def test_hostile_files_beside_a_checkpoint_do_no_harm(run: Path, tally: Tally) -> None:
    """Names that are almost those of checkpoints, folders and links in the place of files."""
    for name in ("checkpoint-١٢.pt", f"checkpoint-{'9' * 5000}.pt"[:200], "checkpoint--1.pt", "checkpoint-.pt"):
        (run / name).write_bytes(b"x")
    (run / "checkpoint-7.pt").mkdir()
    (run / "checkpoint-8.pt").symlink_to("/dev/zero")
    (run / "events.out.tfevents.9999999999.folder").mkdir()
    resumption = prepare(find_loop("agents/reinforce"), "run", run.parent.parent, {})
    assert resumption.step == 40
    assert resumption.lock is not None
    resumption.lock.release()
    tally("8 hostile name", 7)


def test_nothing_is_unpickled_that_could_run_code(tally: Tally) -> None:
    """Every torch.load says `weights_only=True`, and nobody else unpickles."""
    looked_at = 0
    for folder in ("rlboard", "agents", "vision", "benchmarks", "docs"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call):
                    continue
                called = ast.unparse(node.func)
                options = {option.arg: ast.unparse(option.value) for option in node.keywords}
                if path.name == "distributed.py":  # what the first process of one training sends the others
                    continue
                assert options.get("weights_only", "True") == "True", path
                assert options.get("allow_pickle", "False") == "False", path
                assert called not in ("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load"), path
                if called == "torch.load":
                    looked_at += 1
                    assert options.get("weights_only") == "True", path
    assert looked_at >= 2
    tally("8 torch.load with weights_only=True", looked_at)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archive_of_images_writes_nowhere_else_and_no_bomb_goes_off(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.test_vision_data import good_tree, png, write_tar
    from vision import _imagefolder

    def write(path: Path, tree: dict[str, bytes]) -> Path:
        if kind == "tar":
            return write_tar(path.with_suffix(".tar.gz"), tree)
        path.with_suffix(".zip").write_bytes(zipped(tree, zipfile.ZIP_DEFLATED))
        return path.with_suffix(".zip")

    (tmp_path / "data").mkdir()
    tree = {name: png(value, (16, 16)) for value, name in enumerate(good_tree())}
    outside = {"../train/cat/up.png": png(99), "/train/cat/root.png": png(99), "../../up.png": png(99)}
    archives = {
        0: write(tmp_path / "data/outside", tree | outside),
        3: write(tmp_path / "data/bomb", tree | {"zeros": bytes(10_000_000)}),
    }
    command = [
        "vision",
        "train",
        "--epochs=1",
        "--batch-size=2",
        "--width=4",
        "--threads=1",
        "--log=minimal",
        "--no-tta",
    ]
    places = ["--data-dir", str(tmp_path / "cache"), "--log-dir", str(tmp_path / "logs")]
    for code, archive in archives.items():
        found = main([*command, *places, "--data", str(archive)])
        assert found == code, capsys.readouterr().err
        tally("8 hostile archive of images")
        monkeypatch.setattr(_imagefolder, "LARGEST_FILE", 0)  # as if ten megabytes were too much
    assert {path.name for path in tmp_path.iterdir()} == {"data", "cache", "logs"}
    assert {path.name for path in (tmp_path / "data").iterdir()} == {path.name for path in archives.values()}


def test_refusals_have_the_exit_codes_of_their_kind() -> None:
    assert {error.__name__: error.exit_code for error in RlboardError.__subclasses__()} == {
        "UsageError": 2,
        "DataError": 3,
        "NumericalError": 4,
        "StorageError": 5,
        "OutOfMemoryError": 6,
    }
