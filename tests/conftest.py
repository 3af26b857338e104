"""What several tests need: finished runs, a command line and an empty log root, and data sets."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from rlboard.cli import build_app, main

ROOT = Path(__file__).resolve().parent.parent

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores: more threads than these spin, and wait
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def smoke_log_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log root with one finished `rlboard reinforce` smoke run named `smoke` in it."""
    root = tmp_path_factory.mktemp("smoke") / "logs"
    assert main(["reinforce", "--smoke", "--seed", "7", "--run-name", "smoke", "--log-dir", str(root)]) == 0
    return root


@contextlib.contextmanager
def shapes_drawn(train: int, test: int) -> Iterator[None]:
    """Has the data set `shapes` have so many images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vision._data.SHAPES_TRAIN", train)
        patch.setattr("vision._data.SHAPES_TEST", test)
        yield


FEW_SHAPES = (640, 640)  # as many as a smoke run uses; to draw all takes longer than to train on these


@pytest.fixture(scope="module")
def few_shapes() -> Iterator[tuple[int, int]]:
    """Has few images of `shapes` be drawn; yields how many there are else."""
    from vision import _data

    all_of_them = _data.SHAPES_TRAIN, _data.SHAPES_TEST
    with shapes_drawn(*FEW_SHAPES):
        yield all_of_them


@pytest.fixture
def all_shapes(few_shapes: tuple[int, int]) -> Iterator[None]:
    """Has all of them be drawn, for slow tests in a module of few."""
    with shapes_drawn(*few_shapes):
        yield


@pytest.fixture(scope="session")
def vision_log_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log root with one finished `rlboard vision train` run named `small` in it, which has learned little."""
    root = tmp_path_factory.mktemp("vision") / "logs"
    arguments = ["--smoke", "--images=96", "--threads=1", "--run-name=small", "--log-dir", str(root)]
    with shapes_drawn(*FEW_SHAPES):
        assert main(["vision", "train", *arguments]) == 0
    return root


@cache
def command_line() -> Any:
    """rlboard's, made once in a process: that takes longer than many of its commands."""
    return get_command(build_app())


@pytest.fixture(scope="session", autouse=True)
def waits_that_prove_nothing() -> Iterator[None]:
    """Leaves them out: each `main` would make its command line, and a busy disk takes its time to sync."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlboard.cli.build_app", command_line)
        patch.setattr(os, "fsync", lambda _: None)  # no test cuts the power
        yield


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty log root `logs` in the working directory, for commands on runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A torch with one thread, as the suite's workers share the cores, and a known state of its generator."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def shared_data(name: str) -> Path:
    """A file of the real data sets that some tests want: in RLBOARD_TEST_DATA, else beside the project; or a skip."""
    path = Path(os.environ.get("RLBOARD_TEST_DATA") or ROOT.parent / "shared" / "data") / name
    if not path.exists():
        pytest.skip(f"{name} is neither in RLBOARD_TEST_DATA nor in ../shared/data")
    return path
