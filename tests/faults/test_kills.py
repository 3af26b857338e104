"""Killed at any moment and resumed, a run is as if nobody had killed it. Asked to stop, it stops in order."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlboard.cli import main
from rlboard.eventfile import read_scalars
from tests.browser import eventually, get, tensorboard
from tests.conftest import ROOT
from tests.faults.conftest import Tally
from tests.faults.trials import (
    LOOPS,
    SMALL,
    Trial,
    assert_equal_runs,
    curves,
    facts,
    fingerprint,
    killed_before,
    last_logged,
    newest_step,
)

pytestmark = [
    pytest.mark.usefixtures("few_shapes", "one_thread"),
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),  # a process that is killed closes none
]

CALLS = {"gym": 3, "compiled": 2, "vision": 1}
"""How many of these kills are tried on every commit."""


def spread(count: int, all_of: int) -> list[int]:
    """`count` of the numbers below `all_of`, or all of them, evenly spread; one alone is towards the end."""
    count = min(count, all_of)
    return [int((number + 0.8) * all_of / count) for number in range(count)]


def resume(trial: Trial, root: Path, call: float = np.inf) -> list[str]:
    """Goes on with the run `run`, or begins it where it has not got so far; is killed before the change `call`."""
    directory = trial.directory(root, "run")
    options = ["--save-every=0"]
    with killed_before(call) as made:
        if (directory / "run.json").exists():
            code = main(trial.resumed(root, "run", *options))
        else:
            shutil.rmtree(directory, ignore_errors=True)
            code = main(trial.arguments(root, "--run-name=run", *options))
        assert code == 0 or facts(directory)["status"] == "completed"
    return made


@pytest.mark.parametrize(
    ("name", "calls"),
    [*CALLS.items(), *(pytest.param(name, 10**9, marks=pytest.mark.slow) for name in SMALL)],
)
def test_killed_before_any_change_of_the_disk(name: str, calls: int, tmp_path: Path, tally: Tally) -> None:
    """One kill in the run, and in every third trial a second one in what goes on with it."""
    trial, root = SMALL[name], tmp_path / "logs"
    directory = trial.directory(root, "run")
    made = resume(trial, root)
    expected = fingerprint(directory)
    for number, call in enumerate(spread(calls, len(made))):
        shutil.rmtree(root)
        resume(trial, root, call)
        if (directory / "run.json").exists():
            assert last_logged(directory) - (newest_step(directory) or 0) <= trial.interval
        if number % 3 == 2:
            resume(trial, root, random.Random(number).randrange(40))
        resume(trial, root)
        assert_equal_runs(fingerprint(directory), expected)
        tally(f"1 killed before a change of the disk, {name}")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forks")
@pytest.mark.parametrize(
    ("name", "kills"),
    [
        ("gym", 100),
        ("compiled", 100),
        ("vision", 30),
        ("gan", 30),
        ("embed", 30),
        ("words", 30),
        ("ppo", 30),
        ("dqn", 30),
    ],
)
def test_sigkill_at_any_moment(name: str, kills: int, tmp_path: Path, tally: Tally) -> None:
    root, seed = tmp_path / "logs", random.randrange(1_000_000)
    answer = subprocess.run(
        [sys.executable, "-m", "tests.faults.trials", name, root, str(kills), str(seed)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, f"seed {seed}: {answer.stderr}"
    aims: Counter[str] = Counter()
    for line in answer.stdout.splitlines():
        aims.update(json.loads(line)["aims"])
    assert aims.total() == kills
    tally(f"1 SIGKILL and resume, {name}", kills)
    assert aims.keys() == {"anywhere", "save", "log", "start"}
    all_readers_agree(root, LOOPS[name])


def test_a_process_that_is_killed_goes_on(tmp_path: Path, tally: Tally) -> None:
    trial = SMALL["gym"]
    process = started(tmp_path, "--run-name=run", "--save-every=0")
    read_until(process, "# of episode :40")
    process.kill()
    process.communicate()
    directory = trial.directory(tmp_path, "run")
    saved = newest_step(directory)
    assert saved is not None
    assert last_logged(directory) - saved <= trial.interval
    last = saved + 40
    assert main(["reinforce", "--log-dir", str(tmp_path), "--resume=run", f"--episodes={last}", "--log=minimal"]) == 0
    options = ["reinforce", "--engine=gym", "--log=minimal", f"--episodes={last}", "--run-name=unbroken"]
    assert main([*options, "--log-dir", str(tmp_path)]) == 0
    expected = fingerprint(trial.directory(tmp_path, "unbroken"))
    del expected["others"]  # the text of the hyperparameters tells how many episodes were planned at first
    assert_equal_runs(fingerprint(directory), expected)
    tally("1 SIGKILL and resume, gym")


def all_readers_agree(root: Path, trial: Trial) -> None:
    """Each run is shown point for point by both loaders of TensorBoard, the accumulator, and `rlboard runs export`."""
    runs = {f"{trial.folder}/{path.name}": curves(path) for path in (root / trial.folder).iterdir()}
    assert len(runs) > 2
    output = root.parent / "exported"
    output.mkdir()
    assert main(["runs", "export", "--logdir", str(root), "--output", str(output), "--format=json"]) == 0
    exported: dict[tuple[str, str], list[Any]] = {}
    for row in json.loads((output / "scalars.json").read_text()):
        exported.setdefault((row["run"], row["tag"]), []).append((row["step"], row["value"]))
    assert exported == {(run, tag): points for run, tags in runs.items() for tag, points in tags.items()}
    for fast in ("true", "false"):
        with tensorboard(root, f"--load_fast={fast}", "--samples_per_plugin=scalars=100000") as url:

            def shown(url: str = url) -> bool:
                tags: dict[str, Any] = get(url, "plugin/scalars/tags")
                return all(set(tags.get(run, ())) == set(points) for run, points in runs.items())

            eventually(shown)
            for run, tags in runs.items():
                for tag, points in tags.items():

                    def complete(url: str = url, run: str = run, tag: str = tag, points: Any = points) -> bool:
                        answer = get(url, "plugin/scalars/scalars", run=run, tag=tag)
                        return bool([(step, value) for _, step, value in answer] == points)

                    eventually(complete)


def started(root: Path, *options: str, **pipes: Any) -> subprocess.Popen[str]:
    """A long training in a process of its own, whose standard output is a pipe."""
    words = ["reinforce", "--engine=gym", "--episodes=100000", "--log=minimal", "--log-dir", str(root), *options]
    return subprocess.Popen(
        [sys.executable, "-m", "rlboard", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        **pipes,
    )


def cpu_seconds(process: int) -> float:
    """What a running process has taken so far; 0 where nobody tells."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def read_until(process: subprocess.Popen[str], words: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(words):
            return
    raise AssertionError(process.stderr and process.stderr.read())


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_stops_in_order_and_a_second_one_at_once(
    name: str, code: int, times: int, tmp_path: Path, tally: Tally
) -> None:
    number = getattr(signal, name)
    for attempt in range(3):
        process = started(tmp_path, f"--run-name=run{attempt}", "--save-every=0.05")
        read_until(process, f"# of episode :{60 + 20 * attempt}")
        before, spent = cpu_seconds(process.pid), os.times()
        for _ in range(times):
            process.send_signal(number)
            time.sleep(0.02 * (times - 1))
        output, complaint = process.communicate(timeout=30)
        after = os.times()
        all_of_it = after.children_user + after.children_system - spent.children_user - spent.children_system
        assert all_of_it - before < 5, "seconds of the processor, as the machine may be busy with other things"
        assert process.returncode in ((code,) if times == 1 else (code, -number))
        assert "Traceback" not in complaint
        directory = tmp_path / f"REINFORCE/run{attempt}"
        logged = [step for step, _ in curves(directory)["reward"]]
        assert logged == list(range(20, logged[-1] + 1, 20))
        if times == 1:
            printed = [int(line.split(":")[1].split(",")[0]) for line in output.splitlines() if line.startswith("# ")]
            assert logged[-1] == max(printed, default=logged[-1])
            assert facts(directory)["status"] == "interrupted"
            assert newest_step(directory) == logged[-1]
        more = str(logged[-1] + 40)
        assert main(["reinforce", "--log-dir", str(tmp_path), f"--resume=run{attempt}", f"--episodes={more}"]) == 0
        logged = [step for step, _ in curves(directory)["reward"]]
        assert logged == list(range(20, logged[-1] + 1, 20))
        assert facts(directory)["status"] == "completed"
        tally(f"1 {name} {'once' if times == 1 else 'twice'}")


@pytest.mark.slow
def test_a_closed_pipe_ends_without_a_traceback(tmp_path: Path, tally: Tally) -> None:
    """As `rlboard reinforce | head` does it."""
    process = started(tmp_path, "--run-name=run", "--save-every=0")
    read_until(process, "# of episode :40")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=60) in (1, 141)  # Typer's, and ours
    assert process.stderr.read() == ""
    process.stderr.close()
    directory = tmp_path / "REINFORCE/run"
    last = int(read_scalars(directory)["reward"].step[-1])
    assert last - (newest_step(directory) or 0) <= 20
    assert main(["reinforce", "--log-dir", str(tmp_path), "--resume=run", f"--episodes={last + 20}"]) == 0
    assert [step for step, _ in curves(directory)["reward"]] == list(range(20, last + 21, 20))
    tally("1 closed pipe")
