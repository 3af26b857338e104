"""What several tests need: a command line that runs here, and one that runs in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlboard.cli import main

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
