"""What the README says is what happens."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rlboard.cli import main
from rlboard.registry import TRACKS
from tests.conftest import ROOT
from tests.test_cli import TEN_LINES

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"```sh\n(.+?)\n```", README)
INSTALL_AND_TRAIN, INSTALL_AND_TEST = COMMANDS[:2]


def test_the_two_command_lines() -> None:
    assert INSTALL_AND_TRAIN == "python -m pip install -e . && rlboard reinforce --episodes 10000"
    assert INSTALL_AND_TEST == 'python -m pip install -e ".[test]" && pytest'


def test_the_command_of_the_first_line_runs_and_leaves_its_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(INSTALL_AND_TRAIN.partition("&&")[2].replace("10000", "40"))
    assert program == "rlboard"
    assert main(arguments) == 0
    (run,) = (tmp_path / "logs/REINFORCE").iterdir()
    assert list(run.glob("events.out.tfevents.*"))


@pytest.mark.slow
def test_both_lines_in_a_fresh_clone_and_a_fresh_virtual_environment(tmp_path: Path) -> None:
    clone, environment = tmp_path / "clone", tmp_path / "environment"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    variables["PATH"] = f"{environment / 'bin'}{os.pathsep}{variables['PATH']}"
    smaller = INSTALL_AND_TRAIN.replace("10000", "40")
    subprocess.run(["bash", "-c", smaller], cwd=clone, env=variables, check=True)
    assert list(clone.glob("logs/REINFORCE/*/events.out.tfevents.*"))
    smaller = f"{INSTALL_AND_TEST} -n 2 tests/test_config.py tests/test_registry.py tests/test_run.py"
    subprocess.run(["bash", "-c", smaller], cwd=clone, env=variables, check=True)


def test_every_loop_is_in_the_table() -> None:
    for track in TRACKS:
        for loop in track.loops():
            command = " ".join(filter(None, ("rlboard", track.group, loop.command)))
            assert f"| `{command}` |" in README, command


def test_every_file_is_in_the_tree() -> None:
    tree = README.partition("## The tree")[2].partition("```")[2].partition("```")[0]
    for folder in ("rlboard", "agents", "vision"):
        for path in (ROOT / folder).iterdir():
            if path.name not in {"__init__.py", "__main__.py", "__pycache__", "py.typed"}:
                assert path.name in tree, path
    for name in re.findall(r"^ *([\w.]+(?:\.py|/))", tree, flags=re.MULTILINE):
        assert list(ROOT.glob(name)) or list(ROOT.glob(f"*/{name}")), name


def test_the_example_agent_is_the_tested_one() -> None:
    (example,) = re.findall(r"```python\n(.+?)```", README, flags=re.DOTALL)
    assert re.sub(r"\n+", "\n", example) == TEN_LINES


def test_links_and_pictures_are_there() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).is_file(), target
