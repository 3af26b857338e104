"""What several tests need: a command line that runs here, and one that runs in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from rlboard.cli import build_app, main

ROOT = Path(__file__).resolve().parent.parent

RlboardProcess = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def rlboard_process(tmp_path: Path) -> RlboardProcess:
    """Runs `python -m rlboard ...` in `tmp_path`, with warnings as errors where the code is ours."""

    def run(*arguments: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "rlboard", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        )

    return run


@pytest.fixture(scope="session")
def smoke_log_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log root with one finished `rlboard reinforce` smoke run named `smoke` in it."""
    root = tmp_path_factory.mktemp("smoke") / "logs"
    assert main(["reinforce", "--smoke", "--seed", "7", "--run-name", "smoke", "--log-dir", str(root)]) == 0
    return root


@pytest.fixture(scope="session")
def vision_log_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log root with one finished `rlboard vision train` run named `small` in it, which has learned little."""
    root = tmp_path_factory.mktemp("vision") / "logs"
    arguments = ["--smoke", "--images=96", "--threads=1", "--run-name=small", "--log-dir", str(root)]
    assert main(["vision", "train", *arguments]) == 0
    return root


@cache
def command_line() -> Any:
    """rlboard's, made once in a process: that takes longer than many of its commands."""
    return get_command(build_app())


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty log root `logs` in the working directory, for commands on runs."""
    monkeypatch.setattr("rlboard.cli.build_app", command_line)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a busy disk takes its time, and no such test cuts the power
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
