"""Numbers that are none, environments that misbehave, ten million steps: a run ends in order, or goes on."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

from rlboard.checkpoint import load
from rlboard.cli import main
from rlboard.resume import checkpoints_of
from rlboard.run import Run
from tests.faults.conftest import Tally
from tests.faults.trials import curves, facts, sabotage

pytestmark = pytest.mark.usefixtures("few_shapes", "one_thread")

GYM = ["reinforce", "--engine=gym", "--episodes=100", "--eval-every=40", "--eval-episodes=1"]
VISION = ["vision", "train", "--data=shapes", "--images=96", "--width=8", "--batch-size=32", "--epochs=3", "--no-tta"]
VISION += ["--log-every=1", "--threads=1"]
SAVING = ["--log=minimal", "--save-every=0", "--run-name=run"]


class Odd(gymnasium.Env[Any, Any]):
    """Ten steps an episode, until `trouble` happens in the step `at`."""

    observation_space = gymnasium.spaces.Box(-1, 1, (4,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    steps = 0
    at = 450
    trouble: Callable[[], tuple[Any, float, bool, bool, dict[str, Any]]]

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, **_: Any) -> tuple[Any, dict[str, Any]]:
        self.left = 10
        return np.zeros(4, np.float32), {}

    def step(self, _: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        Odd.steps += 1
        self.left -= 1
        if Odd.steps == self.at:
            return Odd.trouble()
        return np.full(4, 0.1, np.float32), 1.0, self.left == 0, False, {}


@pytest.fixture
def odd() -> Iterator[list[str]]:
    """The command that trains in it."""
    gymnasium.register("Odd-v0", entry_point=lambda **options: Odd(**options))
    Odd.steps = 0
    yield [*GYM, "--env-id=Odd-v0", "--eval-every=1000"]
    del gymnasium.registry["Odd-v0"]


def assert_sound(directory: Path, below: float = math.inf, status: str = "failed") -> None:
    """Whatever happened: there are checkpoints, finite and from before it, and the curves are whole."""
    assert facts(directory)["status"] == status
    found = [load(path) for path in checkpoints_of(directory)]
    assert found
    for state in found:
        assert state["step"] < below
        assert all(tensor.isfinite().all() for tensor in state["model"].values())
    assert math.isfinite(facts(directory)["best"].get("reward", {"value": 0})["value"])
    curves(directory)


@pytest.mark.parametrize(
    "value", [math.nan, *(pytest.param(value, marks=pytest.mark.slow) for value in (math.inf, -math.inf))]
)
def test_a_reward_that_is_no_number(value: float, odd: list[str], tmp_path: Path, tally: Tally) -> None:
    Odd.trouble = staticmethod(lambda: (np.zeros(4, np.float32), value, True, False, {}))
    Odd.at = 600  # the last step of the 60th episode
    assert main([*odd, *SAVING, "--log-dir", str(tmp_path)]) == 4
    assert_sound(tmp_path / "REINFORCE/run", 60)
    tally("7 NaN or infinite reward")


def spoiled(function: Callable[..., Tensor], call: int, spoil: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """`function`, whose `call`-th result is spoiled, and every later one is as it is."""
    calls = 0

    def wrapper(*arguments: Any, **options: Any) -> Tensor:
        nonlocal calls
        calls += 1
        result = function(*arguments, **options)
        return spoil(result) if calls == call else result

    return wrapper


def nan_loss(loss: Tensor) -> Tensor:
    return loss * math.nan


def infinite_loss(loss: Tensor) -> Tensor:
    return loss * math.inf


def nan_gradient(loss: Tensor) -> Tensor:
    """The loss is what it is, its gradient is not."""
    loss.register_hook(lambda gradient: gradient * math.nan)  # type: ignore[no-untyped-call]
    return loss


SPOILED = [("gym", 50, 60), ("gym", 60, 60), ("gym", 100, 100), ("vision", 2, 2), ("vision", 4, 4), ("vision", 9, 9)]


@pytest.mark.parametrize(
    ("spoil", "loop", "call", "good"),
    [
        (nan_loss, "gym", 50, 60),
        (nan_gradient, "gym", 100, 100),
        (nan_gradient, "vision", 9, 9),
        *(
            pytest.param(spoil, *case, marks=pytest.mark.slow)
            for spoil in (nan_loss, infinite_loss, nan_gradient)
            for case in SPOILED
        ),
    ],
)
def test_a_loss_or_a_gradient_that_is_no_number(
    spoil: Callable[[Tensor], Tensor],
    loop: str,
    call: int,
    good: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tally: Tally,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the middle of the steps between two events, in the last of them, and in the last of the training."""
    name = "nll_loss" if loop == "gym" else "cross_entropy"
    function = getattr(torch.nn.functional, name)
    monkeypatch.setattr(torch.nn.functional, name, spoiled(function, call, spoil))
    assert main([*(GYM if loop == "gym" else VISION), *SAVING, "--log-dir", str(tmp_path)]) == 4
    complaint = capsys.readouterr().err
    assert "try a smaller --learning-rate" in complaint
    assert complaint.count("\n") == 1
    assert_sound(tmp_path / ("REINFORCE/run" if loop == "gym" else "vision/train/run"), good)
    tally(f"7 {spoil.__name__.replace('_', ' ')}, {loop}")


def raises() -> tuple[Any, float, bool, bool, dict[str, Any]]:
    raise RuntimeError("the simulator is gone")


def wrong_shape() -> tuple[Any, float, bool, bool, dict[str, Any]]:
    return np.zeros(7, np.float32), 1.0, False, False, {}


def wrong_tuple() -> Any:
    return np.zeros(4, np.float32), 1.0, False


@pytest.mark.parametrize(
    ("trouble", "complaint"),
    [
        (raises, "RuntimeError: the simulator is gone"),
        pytest.param(wrong_shape, "ValueError: shapes ", marks=pytest.mark.slow),
        pytest.param(wrong_tuple, "ValueError: not enough values", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("agent", ["reinforce", pytest.param("a2c", marks=pytest.mark.slow)])
def test_an_environment_that_misbehaves_ends_the_run_and_costs_no_checkpoint(
    trouble: Callable[[], Any],
    complaint: str,
    agent: str,
    odd: list[str],
    tmp_path: Path,
    tally: Tally,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Odd.trouble, Odd.at = staticmethod(trouble), 450
    if agent == "reinforce":
        assert main([*odd, *SAVING, "--log-dir", str(tmp_path)]) == 3
        directory = tmp_path / "REINFORCE/run"
        assert_sound(directory, 60)
        assert main(["reinforce", "--log-dir", str(tmp_path), "--resume=run", "--log=minimal"]) == 0
        assert [step for step, _ in curves(directory)["reward"]] == [20, 40, 60, 80, 100]
    else:
        small = [agent, "--env-id=Odd-v0", "--num-envs=2", "--total-timesteps=600", "--log-every=50"]
        assert main([*small, *SAVING, "--log-dir", str(tmp_path)]) == 3
        assert_sound(tmp_path / agent.upper() / "run", 450)
    error = capsys.readouterr().err
    assert "--env-id Odd-v0" in error
    assert complaint in error or (agent == "a2c" and "ValueError" in error)
    assert len(error.strip().splitlines()) == 1
    tally(f"7 environment: {trouble.__name__.replace('_', ' ')}")


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="POSIX signals")
@pytest.mark.parametrize("times", [1, 2])
def test_an_episode_that_never_ends_is_left(
    times: int, odd: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    """By the first signal after a few seconds, by the second at once; either way it can be gone on with."""
    monkeypatch.setattr("rlboard.run.PATIENCE_SECONDS", 0.2 if times == 1 else 100.0)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    asked = 0

    def endless() -> tuple[Any, float, bool, bool, dict[str, Any]]:
        environment = Odd()
        monkeypatch.setattr(Odd, "step", never_done)
        return never_done(environment, 0)

    def never_done(_: Odd, __: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        nonlocal asked
        asked += 1
        if asked in (100, 200)[:times]:
            signal.raise_signal(signal.SIGINT)
        if asked > 200:
            time.sleep(0.01)
        assert asked < 1000
        return np.zeros(4, np.float32), 1.0, False, False, {}

    try:
        Odd.trouble, Odd.at = staticmethod(endless), 450
        assert main([*odd, *SAVING, "--log-dir", str(tmp_path)]) == 130
    finally:
        signal.signal(signal.SIGINT, previous)
    directory = tmp_path / "REINFORCE/run"
    assert_sound(directory, 60, "interrupted" if times == 1 else "failed")
    assert [step for step, _ in curves(directory)["reward"]] == [20, 40]
    monkeypatch.undo()
    Odd.trouble, Odd.at = staticmethod(lambda: (np.zeros(4, np.float32), 1.0, True, False, {})), 450
    assert main(["reinforce", "--log-dir", str(tmp_path), "--resume=run", "--log=minimal"]) == 0
    assert [step for step, _ in curves(directory)["reward"]] == [20, 40, 60, 80, 100]
    tally("7 environment: never ends")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells how much memory is resident")
@pytest.mark.parametrize(
    ("engine", "episodes", "steps"),
    [
        ("compiled", 2_000, 200_000),
        pytest.param("compiled", 40_000, 10_000_000, marks=pytest.mark.slow),
        pytest.param("gym", 3_000, 200_000, marks=pytest.mark.slow),
    ],
)
def test_memory_is_flat_after_warm_up(
    engine: str, episodes: int, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    """Resident memory at every event of the last nine tenths, compared with that at the end of the first."""
    seen: list[int] = []

    def watch(run: Run) -> None:
        del run
        seen.append(resident_bytes())

    for step in range(episodes // 10, episodes + 1, episodes // 50):
        sabotage(monkeypatch, step, watch)
    command = ["reinforce", f"--engine={engine}", f"--episodes={episodes}", "--save-every=1", "--gamma=1", "--lr=1e-3"]
    assert main([*command, "--log=minimal", "--run-name=run", "--log-dir", str(tmp_path)]) == 0
    taken = curves(tmp_path / "REINFORCE/run")["time/steps"][-1][1]
    assert taken >= steps
    assert len(seen) > 40
    assert max(seen) - seen[0] < 16 << 20
    tally(f"9 steps with flat memory, {engine}", int(taken))
