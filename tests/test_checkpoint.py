"""Saved state survives crashes, is verified before it is read, and a run is read back or refused in one line."""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from agents.reinforce import Policy
from rlboard import checkpoint
from rlboard.checkpoint import FORMAT, load, load_weights, read_run, save
from rlboard.cli import main
from rlboard.errors import DataError, RlboardError, UsageError
from rlboard.instruments.weights import weights_sha256


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    state = {
        "tensors": {"half": torch.arange(3, dtype=torch.bfloat16), "empty": torch.zeros(0, 2)},
        "numbers": [1, 2.5, 2**100, True, None, float("inf")],
        "text": "실험",
        "torch": torch.get_rng_state(),
        "numpy": np.random.default_rng(1).bit_generator.state,
        "python": random.Random(1).getstate(),
    }
    path = tmp_path / "checkpoint.pt"
    save(path, state)
    loaded = load(path)
    assert loaded.keys() == state.keys()
    for name in ("numbers", "text", "numpy", "python"):
        assert loaded[name] == state[name]
    torch.testing.assert_close(loaded["tensors"], state["tensors"], rtol=0, atol=0)
    assert torch.equal(loaded["torch"], torch.get_rng_state())
    digest, name = (tmp_path / "checkpoint.pt.sha256").read_text().split()
    assert (digest, name) == (hashlib.sha256(path.read_bytes()).hexdigest(), "checkpoint.pt")
    assert {file.name for file in tmp_path.iterdir()} == {"checkpoint.pt", "checkpoint.pt.sha256"}


class CrashError(BaseException):
    """The end of the process: nothing after it runs."""


@pytest.mark.parametrize(("first", "second"), list(itertools.product(range(4), repeat=2)))
def test_a_crash_between_any_two_steps_leaves_one_of_the_states(
    first: int, second: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a second crash on what the first has left. Three files are put in place; the fourth crash never comes."""
    replace = checkpoint._replace
    path = tmp_path / "checkpoint.pt"
    save(path, {"step": 0})
    saved = 0
    for step, survived in ((1, first), (2, second)):
        left = iter(range(survived))

        def crashing(where: Path, content: bytes, left: Any = left) -> None:
            if next(left, None) is None:
                raise CrashError
            replace(where, content)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_replace", crashing)
            try:
                save(path, {"step": step})
            except CrashError:
                assert survived < 3
        saved = step if survived >= 2 else saved
        assert load(path) == {"step": saved}
    save(path, {"step": 3})
    assert load(path) == {"step": 3}
    assert len((tmp_path / "checkpoint.pt.sha256").read_text().splitlines()) == 1


def test_a_disk_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    save(path, {"step": 1})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            save(path, {"step": 2})
    assert load(path) == {"step": 1}
    assert len(list(tmp_path.iterdir())) == 2


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, ("exploded",)


def pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("../outside", "x")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"text", b"\x80\x02.", pickled(Bomb()), pickled([1, 2]), archive()], ids=range(6)
)
def test_a_foreign_file_is_refused_even_with_its_hash(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    (tmp_path / "checkpoint.pt.sha256").write_text(hashlib.sha256(content).hexdigest())
    with pytest.raises(DataError, match="no checkpoint of rlboard") as refusal:
        load(path)
    assert str(refusal.value).isprintable()
    assert {file.name for file in tmp_path.iterdir()} == {"checkpoint.pt", "checkpoint.pt.sha256"}


def test_one_flipped_byte_is_found_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save(path, {"model": Policy(4, 8, 2).state_dict()})
    content = path.read_bytes()
    for position in np.random.default_rng(0).choice(len(content), 20, replace=False):
        broken = bytearray(content)
        broken[position] ^= 1
        path.write_bytes(broken)
        with pytest.raises(DataError, match="damaged"):
            load(path)
    path.write_bytes(content)
    load(path)


@pytest.mark.parametrize(
    ("network", "complaint"),
    [
        (Policy(4, 9, 2), r"hidden.weight is \(9, 4\) in it, \(8, 4\)"),
        (nn.Linear(4, 2), r"hidden.weight is missing in it"),
        (nn.Sequential(), "is missing in it"),
    ],
)
def test_weights_of_another_network_are_refused(network: nn.Module, complaint: str) -> None:
    policy = Policy(4, 8, 2)
    before = weights_sha256(policy)
    with pytest.raises(DataError, match=complaint):
        load_weights(policy, network.state_dict())
    assert weights_sha256(policy) == before


def test_a_run_is_read_back(smoke_log_dir: Path) -> None:
    directory = smoke_log_dir / "REINFORCE/smoke"
    facts = json.loads((directory / "run.json").read_text())
    for name in (directory, directory / "run.json", directory / "checkpoint.pt"):
        run = read_run(str(name))
        assert (run.directory, run.loop.name, run.status, run.step) == (directory, "reinforce", "completed", 60)
        assert run.config == facts["config"]
        policy = Policy(4, 128, 2)
        load_weights(policy, run.weights)
        assert weights_sha256(policy) == facts["weights_sha256"]


def test_a_failed_run_says_what_it_lacks(tmp_path: Path) -> None:
    assert main(["reinforce", "--episodes=200", "--lr=1e30", "--log-dir", str(tmp_path), "--run-name=nan"]) == 4
    with pytest.raises(DataError, match=r"without a checkpoint\.pt"):
        read_run(str(tmp_path / "REINFORCE/nan"))


def test_a_disk_that_fails_costs_the_checkpoint_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "_replace", full)
    with pytest.warns(RuntimeWarning, match=r"no checkpoint\.pt in .*: No space left on device"):
        assert main(["reinforce", "--smoke", "--log-dir", str(tmp_path), "--run-name=full", "--log=minimal"]) == 0
    assert json.loads((tmp_path / "REINFORCE/full/run.json").read_text())["status"] == "completed"


Spoil = Callable[[Path], object]


def facts_with(**changed: Any) -> Spoil:
    def spoil(directory: Path) -> None:
        path = directory / "run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return spoil


def config_with(**changed: Any) -> Spoil:
    """`None` removes an option."""

    def spoil(directory: Path) -> None:
        config = json.loads((directory / "run.json").read_text())["config"] | changed
        facts_with(config={name: value for name, value in config.items() if value is not None})(directory)

    return spoil


def state_with(**changed: Any) -> Spoil:
    return lambda directory: save(directory / "checkpoint.pt", load(directory / "checkpoint.pt") | changed)


def written(name: str, content: bytes) -> Spoil:
    return lambda directory: (directory / name).write_bytes(content)


def truncated(directory: Path) -> None:
    path = directory / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-100])


def made_a_folder(directory: Path) -> None:
    (directory / "run.json").unlink()
    (directory / "run.json").mkdir()


SPOILED: dict[str, tuple[Spoil, str]] = {
    "no run.json": (lambda directory: (directory / "run.json").unlink(), "it has no run.json"),
    "a folder": (made_a_folder, "cannot be read"),
    "broken": (written("run.json", b'{"loop": "agents'), "run.json is damaged"),
    "not text": (written("run.json", b"\xff\xfe\x00"), "run.json is damaged"),
    "nested": (written("run.json", b"[" * 100_000), "run.json is damaged"),
    "a list": (written("run.json", b"[]"), "it has no loop"),
    "no config": (facts_with(config=None), "it has no config"),
    "another loop": (facts_with(loop="agents/../x"), "there are agents/a2c, agents/dqn, agents/evaluate"),
    "a helper": (facts_with(loop="agents/_environments"), "a loop that is not here"),
    "another version": (config_with(gama=1, gamma=None), "unknown gama, missing gamma"),
    "out of range": (config_with(gamma=7.0), "--gamma 7.0 is out of range"),
    "too large": (config_with(gamma=10**400), "is damaged"),
    "not a number": (config_with(gamma=float("nan")), "--gamma nan is out of range"),
    "wrong type": (config_with(episodes="many"), "episodes is many, not of type int"),
    "no checkpoint": (lambda directory: (directory / "checkpoint.pt").unlink(), "without a checkpoint.pt"),
    "no hash": (lambda directory: (directory / "checkpoint.pt.sha256").unlink(), "sha256 is not there"),
    "truncated": (truncated, "damaged"),
    "newer": (state_with(format=1), f"is of format 1: this version reads format {FORMAT}"),
    "no model": (state_with(model=None), "it has no model"),
    "no tensors": (state_with(model={"a": 1}), "not made of tensors"),
    "another run": (state_with(config={}), "differs from run.json"),
    "edited": (config_with(hidden_size=8), "checkpoint.pt is another run's: hidden_size differs"),
}


@pytest.mark.parametrize("spoiled", SPOILED)
def test_a_run_that_is_broken_is_refused_in_one_line(spoiled: str, smoke_log_dir: Path, tmp_path: Path) -> None:
    spoil, complaint = SPOILED[spoiled]
    directory = shutil.copytree(smoke_log_dir / "REINFORCE/smoke", tmp_path / "run")
    spoil(directory)
    with pytest.raises(DataError) as refusal:
        read_run(str(directory))
    assert complaint in str(refusal.value)
    assert str(refusal.value).isprintable()


def test_a_checkpoint_of_another_run_is_found_out(smoke_log_dir: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(smoke_log_dir / "REINFORCE/smoke", tmp_path / "run")
    assert (
        main(["reinforce", "--smoke", "--seed=7", "--hidden-size=8", "--log-dir", str(tmp_path), "--run-name=b"]) == 0
    )
    for name in ("checkpoint.pt", "checkpoint.pt.sha256"):
        shutil.copy(tmp_path / "REINFORCE/b" / name, directory / name)
    with pytest.raises(DataError, match="hidden_size differs"):
        read_run(str(directory))


@pytest.mark.parametrize("name", ["", "x" * 5000, "a\0b", "<script>", "logs/../nowhere", "\x1b[31m", "~"])
def test_a_run_that_is_not_there_is_refused_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is not there: give the directory of a run") as refusal:
        read_run(name)
    assert str(refusal.value).isprintable()


def test_the_nearest_runs_are_suggested(smoke_log_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(smoke_log_dir.parent)

    def complaint(name: str) -> str:
        with pytest.raises(RlboardError) as refusal:
            read_run(name)
        return str(refusal.value)

    assert complaint("logs/REINFORCE/smok").endswith("did you mean logs/REINFORCE/smoke?")
    assert complaint("smoke").endswith("did you mean logs/REINFORCE/smoke?")
    assert complaint("something-else").endswith("such as logs/REINFORCE/smoke")
    assert complaint("logs/REINFORCE").endswith("such as logs/REINFORCE/smoke")
    assert "is a file: give the directory" in complaint("logs/REINFORCE/smoke/.lock")
