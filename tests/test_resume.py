"""A run that is taken up again goes on as if it had never ended: same weights, same curves, each step once."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlboard.checkpoint import BEST, CHECKPOINT, FORMAT, load, save
from rlboard.cli import main
from rlboard.eventfile import ScalarColumns, read_scalars
from rlboard.events import Event
from rlboard.instruments.weights import weights_sha256
from rlboard.registry import TRACKS, Loop
from rlboard.resume import checkpoints_of, tail
from rlboard.run import begin
from rlboard.seeding import random_states, restore_random_states, seed_everything
from tests.faults.trials import facts

pytestmark = pytest.mark.usefixtures("few_shapes", "one_thread")

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "agents/reinforce": [{"engine": "gym"}, {"engine": "compiled"}, {"env_id": "Acrobot-v1", "episodes": 21}],
    "agents/dqn": [
        {"total_timesteps": 300, "train_every": 45, "gradient_steps": 2, "log_every": 40, "eval_every": 130},
        {"total_timesteps": 300, "num_envs": 3, "double": True, "dueling": True, "n_steps": 3, "gradient_steps": 8}
        | {"buffer_size": 100, "train_every": 45, "log_every": 40},
    ],
    "agents/ppo": [
        {"total_timesteps": 600, "num_envs": 3, "batch_size": 48, "n_steps": 16, "log_every": 50, "eval_every": 200}
        | {"normalize_observations": True, "normalize_rewards": True},
        {"env_id": "Pendulum-v1", "total_timesteps": 1024, "normalize_rewards": True, "log_every": 1},
    ],
    "agents/sac": [
        {"total_timesteps": 80, "hidden_size": 16, "learning_starts": 30, "log_every": 10, "eval_every": 40}
        | {"eval_episodes": 1},
        {"total_timesteps": 240, "hidden_size": 16, "num_envs": 3, "buffer_size": 90, "learning_starts": 60}
        | {"train_every": 50, "gradient_steps": 4, "log_every": 20},
    ],
    "agents/a2c": [
        {"total_timesteps": 1200, "log_every": 300, "eval_every": 500},
        {"env_id": "Pendulum-v1", "total_timesteps": 1000, "num_envs": 3, "optimizer": "adam", "anneal": True}
        | {"normalize_observations": True, "normalize_rewards": True, "log_every": 100},
    ],
    "agents/reinforce_baseline": [{}, {"env_id": "Acrobot-v1", "episodes": 21}],
    "vision/train": [
        {"images": 128, "epochs": 2},
        {"images": 96, "epochs": 2, "ema": 0.9, "optimizer": "adamw", "tta": False},
    ],
    "vision/embed": [
        {"images": 96, "epochs": 2, "batch_size": 32},
        {"images": 96, "epochs": 2, "batch_size": 32, "method": "supervised", "test_every": 2},
    ],
    "vision/gan": [
        {"images": 64, "steps": 7, "batch_size": 8, "width": 2, "judge_images": 64, "quality_images": 8}
        | {"conditional": True, "augment": "color,translation,cutout"},
    ],
    "vision/words": [{"steps": 20, "test_every": 6}],
}
UNEQUAL = ("time/", "Memory/")  # what a process, and not its training, comes to
LOOPS = {f"{track.package}/{loop.name}": loop for track in TRACKS for loop in track.loops()}


def test_all_training_loops_are_resumed_here() -> None:
    assert VARIANTS.keys() == LOOPS.keys() - {"agents/evaluate", "vision/explain", "vision/profile"}


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def said(events: Iterator[Event]) -> tuple[list[tuple[int, dict[str, float]]], str, int]:
    """Every event's step and scalars, the hash of the last model, and how many events there were."""
    points, model, count = [], None, 0
    for count, event in enumerate(events, start=1):  # noqa: B007 - how many there were is asked for
        model = event.model or model
        points.append((event.step, {tag: value for tag, value in event.scalars.items() if not tag.startswith(UNEQUAL)}))
    assert model is not None
    return [point for point in points if point[1]], weights_sha256(model), count


@pytest.mark.xdist_group("compiled")
@pytest.mark.parametrize(
    ("name", "variant"),
    [
        pytest.param(name, variant, marks=[pytest.mark.slow] if variant.get("env_id") else [])
        for name, variants in VARIANTS.items()
        for variant in variants
    ],
)
def test_a_loop_goes_on_behind_any_event(name: str, variant: dict[str, Any]) -> None:
    loop: Loop = LOOPS[name]
    module = loop.load()
    config = module.Config(**loop.defaults(smoke=True) | variant)
    if variant.get("engine") == "compiled":
        said(module.train(config))  # the first on a machine has an event more: how long it took to compile
    unbroken, digest, count = said(module.train(config))
    for taken in {2, count // 2, count - 1}:
        events = module.train(config)
        event = list(islice(events, taken))[-1]
        state = through_a_file({"loop": event.state(), "random": random_states()})
        events.close()
        seed_everything(99)  # whatever else has drawn numbers since
        resumed = module.train(config, state["loop"])
        first = next(resumed)
        restore_random_states(state["random"])
        assert (first.step, first.total) == (event.step, event.total)
        assert first.model is not None
        assert not first.scalars
        rest, resumed_digest, _ = said(resumed)
        assert rest == unbroken[len(unbroken) - len(rest) :]
        assert resumed_digest == digest


COMMAND = ["reinforce", "--engine=gym", "--eval-every=20", "--eval-episodes=1", "--log=minimal", "--save-every=0"]


def reinforce(root: Path, *options: str, code: int = 0) -> None:
    assert main([*COMMAND, "--log-dir", str(root), *options]) == code


def curves(directory: Path) -> ScalarColumns:
    columns = read_scalars(directory)
    for tag in columns:
        assert (np.diff(columns[tag].step) > 0).all(), tag
    return columns


def assert_equal_runs(one: Path, other: Path) -> None:
    expected, found = curves(one), curves(other)
    assert set(found) == set(expected)
    for tag in expected:
        if not tag.startswith(UNEQUAL):
            assert found[tag].step.tolist() == expected[tag].step.tolist(), tag
            assert found[tag].value.tolist() == expected[tag].value.tolist(), tag
    for name in ("weights_sha256", "best"):
        assert facts(one)[name] == facts(other)[name]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log root with a run `whole` of 80 episodes, and one `half` of 40."""
    root = tmp_path_factory.mktemp("unbroken")
    reinforce(root, "--run-name=whole", "--episodes=80")
    reinforce(root, "--run-name=half", "--episodes=40", "--keep=3")
    return root / "REINFORCE"


@pytest.fixture
def half(unbroken: Path, tmp_path: Path) -> Path:
    """A copy of the run of 40 episodes in a log root of its own."""
    return shutil.copytree(unbroken / "half", tmp_path / "REINFORCE/half")


def test_the_run_is_as_if_it_had_never_ended(
    unbroken: Path, half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = facts(half)["started"]
    reinforce(tmp_path, "--resume", "--episodes=80")
    assert "going on at step 40" in capsys.readouterr().out
    assert_equal_runs(unbroken / "whole", half)
    assert len(list(half.glob("*tfevents*"))) == 2
    told = facts(half)
    assert (told["started"], told["status"], told["config"]["episodes"]) == (started, "completed", 80)
    (resumed,) = told["resumed"]
    assert (resumed["step"], resumed["changed"]) == (40, {"episodes": {"before": 40, "now": 80}})
    accumulator = EventAccumulator(str(half))
    accumulator.Reload()
    assert [event.step for event in accumulator.Scalars("reward")] == [20, 40, 60, 80]
    assert len(accumulator.Tags()["tensors"]) == len(set(accumulator.Tags()["tensors"]))
    assert len(accumulator.Tensors("Hyperparameters/text_summary")) == 1, "how it began is not told again"


def test_what_was_logged_after_the_checkpoint_is_taken_back(unbroken: Path, half: Path, tmp_path: Path) -> None:
    """As after a SIGKILL: the event file is ahead of the checkpoint, and its last record is torn."""
    for path in (half / CHECKPOINT, half / f"{CHECKPOINT}.sha256"):
        path.unlink()
    (event_file,) = half.glob("*tfevents*")
    with event_file.open("ab") as file:
        file.write(b"torn")
    assert load(checkpoints_of(half)[0])["step"] == 20
    reinforce(tmp_path, "--resume=half", "--episodes=80")
    assert_equal_runs(unbroken / "whole", half)
    assert facts(half)["resumed"][0]["step"] == 20


def test_a_run_without_a_checkpoint_begins_anew_in_its_place(unbroken: Path, half: Path, tmp_path: Path) -> None:
    for path in half.glob("*.pt*"):
        path.unlink()
    reinforce(tmp_path, "--resume=half", "--episodes=80")
    assert_equal_runs(unbroken / "whole", half)
    assert len(list(half.glob("*tfevents*"))) == 1


@pytest.mark.parametrize("damage", ["flipped", "truncated", "no hash", "another position", "another format"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    damage: str, unbroken: Path, half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = half / CHECKPOINT
    content = newest.read_bytes()
    state = load(newest)
    match damage:
        case "flipped":
            newest.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
        case "truncated":
            newest.write_bytes(content[:-1])
        case "no hash":
            (half / f"{CHECKPOINT}.sha256").unlink()
        case "another position":
            offset = state["position"]["offset"] - 1
            (event_file,) = half.glob("*tfevents*")
            save(
                newest, state | {"position": {**state["position"], "offset": offset, "tail": tail(event_file, offset)}}
            )
        case "another format":
            save(newest, state | {"format": FORMAT + 1})
    reinforce(tmp_path, "--resume=half", "--episodes=80")
    assert "an earlier checkpoint is taken" in capsys.readouterr().err
    assert_equal_runs(unbroken / "whole", half)


def test_with_every_checkpoint_damaged_nothing_is_touched(
    half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in half.glob("checkpoint*.pt"):
        path.write_bytes(b"")
    before = {path.name: path.read_bytes() for path in half.iterdir() if path.is_file()}
    reinforce(tmp_path, "--resume=half", "--episodes=80", code=3)
    assert capsys.readouterr().err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in half.iterdir() if path.is_file()} == before


def test_a_fork_is_a_run_of_its_own(unbroken: Path, half: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in half.iterdir() if path.is_file()}
    reinforce(tmp_path, "--resume=half", "--fork", "--run-name=child", "--episodes=80", "--gamma=0.5")
    assert {path.name: path.read_bytes() for path in half.iterdir() if path.is_file()} == before
    child = tmp_path / "REINFORCE/child"
    told = facts(child)
    assert told["parent"] == {"run": "half", "step": 40}
    assert (told["config"]["gamma"], told["config"]["episodes"]) == (0.5, 80)
    assert curves(child)["reward"].step.tolist() == [60, 80]
    assert told["weights_sha256"] != facts(unbroken / "whole")["weights_sha256"]


def test_the_best_and_the_last_checkpoints_are_kept(unbroken: Path) -> None:
    half = unbroken / "half"
    assert [load(path)["step"] for path in checkpoints_of(half)] == [40, 20, 0]
    assert load(half / BEST)["step"] == facts(half)["best"]["reward"]["step"]
    whole = unbroken / "whole"
    assert [load(path)["step"] for path in checkpoints_of(whole)] == [80, 60], "two, where nothing else is asked for"
    for path in whole.glob("*.pt"):
        assert (whole / f"{path.name}.sha256").read_text().endswith(f"  {path.name}\n")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--resume=hlaf"], 2, "did you mean REINFORCE/half"),
        (["--resume=half"], 2, "complete, at step 40"),
        (["--resume=half", "--lr=1", "--gamma=1"], 2, "learning_rate 0.0002, not 1.0, gamma 0.98, not 1.0: leave them"),
        (["--resume", "--episodes=80", "--seeds=3"], 2, "--seeds do not go together"),
        (["--resume", "--preset=solve"], 2, "--preset do not go together"),
        (["--resume", "--run-name=new"], 2, "--run-name is for a new run"),
        (["--resume=half", "--episodes=80", "--keep=0"], 2, "--keep 0 is out of range"),
    ],
)
def test_what_cannot_be_resumed_is_said_in_one_line(
    options: list[str], code: int, words: str, half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in half.iterdir() if path.is_file()}
    reinforce(tmp_path, *options, code=code)
    complaint = capsys.readouterr().err
    assert words in complaint
    assert complaint.count("\n") == 1
    assert {path.name: path.read_bytes() for path in half.iterdir() if path.is_file()} == before


def test_other_loops_runs_running_ones_and_none(half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vision", "train", "--log-dir", str(tmp_path), "--resume=half"]) == 2
    assert "is of agents/reinforce, not of vision/train" in capsys.readouterr().err
    assert main(["vision", "train", "--log-dir", str(tmp_path), "--resume"]) == 2
    assert "there is no run of train" in capsys.readouterr().err
    assert main(["evaluate", str(half), "--log-dir", str(tmp_path), "--resume=half"]) == 2
    with FileLock(half / ".lock"):
        reinforce(tmp_path, "--resume", "--episodes=80", code=2)
    assert "is still running" in capsys.readouterr().err


def test_the_checkpoint_of_another_run_is_found_out(half: Path, tmp_path: Path) -> None:
    reinforce(tmp_path, "--run-name=other", "--episodes=40")
    other = tmp_path / "REINFORCE/other"
    for path in half.glob("checkpoint*.pt*"):
        path.unlink()
    for path in other.glob("checkpoint.pt*"):
        shutil.copy(path, half)
    reinforce(tmp_path, "--resume=half", "--episodes=80", code=3)


@pytest.mark.xdist_group("compiled")
@pytest.mark.parametrize("engine", ["compiled", pytest.param("gym", marks=pytest.mark.slow)])
def test_a_group_of_seeds_goes_on(engine: str, tmp_path: Path) -> None:
    """One seed done, one stopped half way, one never begun; gym trains them in processes, compiled in threads."""
    command = [*COMMAND, f"--engine={engine}", "--log-dir", str(tmp_path)]
    whole, half = tmp_path / "REINFORCE/whole", tmp_path / "REINFORCE/half"
    assert main([*command, "--seeds=3", "--episodes=80", "--run-name=whole"]) == 0
    assert main([*command, "--seeds=3", "--episodes=40", "--run-name=half"]) == 0
    shutil.rmtree(half / "seed3")
    assert main([*command, "--resume=REINFORCE/half/seed1", "--episodes=80"]) == 0
    done = {path.name for path in (half / "seed1").iterdir()}
    assert main([*command, "--resume", "--episodes=80"]) == 0, "the group is the last run, not one of its seeds"
    for seed in ("seed1", "seed2", "seed3"):
        assert_equal_runs(whole / seed, half / seed)
    assert {path.name for path in (half / "seed1").iterdir()} == done
    expected, found = curves(whole), curves(half)
    assert set(found) == set(expected)
    for tag in expected:
        assert found[tag].value.tolist() == expected[tag].value.tolist(), tag
    assert facts(half)["results"] == facts(whole)["results"]
    assert main([*command, "--resume=REINFORCE/half", "--fork"]) == 2


def test_a_loop_that_takes_no_state_says_so() -> None:
    from types import SimpleNamespace
    from typing import cast

    from rlboard.errors import UsageError
    from rlboard.resume import Resumption

    module = SimpleNamespace(train=lambda config: iter([Event(0, config)]))
    loop = cast("Loop", SimpleNamespace(load=lambda: module, command="count"))
    with pytest.raises(UsageError, match="count cannot be resumed"):
        begin(loop, 1, Resumption(Path(), {}, {}, {}, None, None, fork=False))
