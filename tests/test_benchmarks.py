"""The harness's arithmetic on known numbers, and every benchmark once at its smallest."""

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from agents import ppo
from agents.reinforce import PRESETS, Config, train
from benchmarks import _airbench, _peers, _returns, reader, reinforce, resume, runs, vision, writer
from benchmarks import agents as agents_benchmark
from benchmarks._solved import Goal, run_script, until_solved
from benchmarks.harness import (
    Benchmark,
    Command,
    Contender,
    ContenderError,
    Function,
    Measurement,
    Stopwatch,
    as_json,
    duration,
    machine,
    main,
    markdown,
    number,
    run,
)
from rlboard.checkpoint import read_run
from rlboard.registry import find_loop
from vision import train as vision_train
from vision._data import load_dataset
from vision._models import build_model

# The harness forks from a server that imports much: one worker has one.
pytestmark = pytest.mark.xdist_group("benchmarks")


@dataclasses.dataclass
class Scripted:
    """Takes what it is told to: CPU seconds for 10 units of work, or the reason why it cannot."""

    name: str
    script: list[float | str]

    def measure(self, directory: Path) -> Measurement:
        assert not list(directory.iterdir())
        (directory / "litter").touch()
        answer = self.script.pop(0)
        if isinstance(answer, str):
            raise ContenderError(answer)
        return Measurement(10, answer, 2 * answer, extra={"MB": answer / 10})


def scripted(*contenders: Contender) -> Benchmark:
    return Benchmark("sorting", "number", contenders, "10 numbers")


def test_contenders_take_turns_and_a_failed_one_is_not_asked_again() -> None:
    benchmark = scripted(Scripted("a", [1.0, 1.0, 1.0]), Scripted("b", [2.0, "broken"]), Scripted("c", [1.0, 1.0, 1.0]))
    result = run(benchmark, 3)
    assert result.order == ["a", "b", "c", "a", "b", "c", "a", "c"]
    assert result.errors == {"b": "broken"}
    assert {name: len(runs) for name, runs in result.measurements.items()} == {"a": 3, "c": 3}


def test_ratio_of_medians_and_median_of_ratios_differ_where_they_should() -> None:
    result = run(scripted(Scripted("ours", [1.0, 2.0, 4.0]), Scripted("theirs", [3.0, 10.0, 8.0])), 3)
    assert result.ratio_of_medians("theirs") == pytest.approx(8 / 2)
    assert result.median_ratio("theirs") == pytest.approx(3.0)  # of 3, 5 and 2
    assert result.ratio_of_medians("ours") == result.median_ratio("ours") == 1


def test_cost_is_per_unit_of_work_so_that_unequal_work_compares() -> None:
    assert Measurement(4, 2.0, 9.0).cost == 0.5


def test_markdown_table() -> None:
    benchmark = scripted(
        Scripted("ours", [1.0, 2.0, 4.0]), Scripted("theirs", [3.0, 10.0, 8.0]), Scripted("third", ["a | b"])
    )
    assert markdown(run(benchmark, 3)).splitlines() == [
        "**sorting**: 10 numbers; 3 runs each, in turn",
        "",
        "|  | CPU per number | min – max | numbers per CPU s | wall | MB | × ours | × in pairs |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| ours | 200 ms | 100 ms – 400 ms | 5.00 | 400 ms | 0.200 | 1.00 | 1.00 |",
        "| theirs | 800 ms | 300 ms – 1.00 s | 1.25 | 1.60 s | 0.800 | 4.00 | 3.00 |",
        r"| third | a \| b |  |  |  |  |  |  |",
    ]


def test_markdown_without_a_reference_compares_nothing() -> None:
    table = markdown(run(scripted(Scripted("ours", ["broken"]), Scripted("theirs", [1.0])), 1))
    assert "×" not in table
    assert "| ours | broken |  |  |  |  |" in table
    assert "| theirs | 100 ms |" in table


@dataclasses.dataclass
class Tired:
    """Gives up in the runs in which it is told to; each takes a second."""

    name: str
    script: list[bool]

    def measure(self, directory: Path) -> Measurement:  # noqa: ARG002
        return Measurement(1, 1.0, 2.0, given_up="asleep" if self.script.pop(0) else "")


def test_work_that_is_given_up_costs_more_than_any_that_is_not() -> None:
    benchmark = scripted(
        Tired("ours", [False, False, True]), Tired("some", [True, False, False]), Tired("most", [True, True, False])
    )
    assert markdown(run(benchmark, 3)).splitlines()[2:] == [
        "|  | CPU per number | min – max | wall | × ours | × in pairs |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| ours (asleep: 1 of 3 runs) | 1.00 s | 1.00 s – ∞ s | 2.00 s | 1.00 | 1.00 |",
        "| some (asleep: 1 of 3 runs) | 1.00 s | 1.00 s – ∞ s | 2.00 s | 1.00 | ∞ |",
        "| most (asleep: 2 of 3 runs) | ∞ s | 1.00 s – ∞ s | 2.00 s | ∞ | ∞ |",
    ]
    given_up = scripted(Tired("ours", [True]), Tired("theirs", [False]))
    assert "×" not in markdown(run(given_up, 1))
    assert main(lambda _: [scripted(Tired("ours", [True]))], ["--repeats", "1"]) == 1


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.07204, "0.0720"),
        (1.7, "1.70"),
        (99.96, "100"),
        (135.4, "135"),
        (12_346, "12,300"),
        (-2.5, "-2.50"),
        (math.inf, "∞"),
    ],
)
def test_numbers_have_three_significant_digits(value: float, shown: str) -> None:
    assert number(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(2.5, "2.50 s"), (0.0238, "23.8 ms"), (1.7e-6, "1.70 µs"), (7.2e-8, "72.0 ns")]
)
def test_durations_name_their_unit(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def work_in_steps(steps: int) -> Measurement:
    """Leaves a file, so that a second run in the same directory fails."""
    Path("mark").touch(exist_ok=False)
    watch = Stopwatch()
    total = sum(range(200_000))
    watch.lap()
    total += sum(range(200_000))
    sys.stdout.write("what a contender prints is not part of the report")
    return watch.stop(work=steps, total_sum=total)


def needs_what_is_not_there() -> Measurement:
    __import__("rlboard_no_such_package")
    raise AssertionError


def fails() -> Measurement:
    raise ValueError("first line\nsecond line")


def explains() -> Measurement:
    raise ContenderError("not given: --path")


def dies() -> Measurement:
    import os

    os._exit(9)


@pytest.mark.slow
def test_functions_run_in_fresh_processes_and_directories(capfd: pytest.CaptureFixture[str]) -> None:
    benchmark = scripted(
        Function("works", partial(work_in_steps, 5)),
        Function("missing", needs_what_is_not_there),
        Function("fails", fails),
        Function("explains", explains),
        Function("dies", dies),
        Function("cold", partial(work_in_steps, 5), warm_up=fails),
    )
    result = run(benchmark, 2)
    assert result.errors == {
        "missing": "not installed: pip install -e '.[bench]' (rlboard_no_such_package)",
        "fails": "failed: ValueError: first line",
        "explains": "not given: --path",
        "dies": "failed: its process ended with exit code 9",
        "cold": "failed: ValueError: first line",
    }
    first, second = result.measurements["works"]
    assert first.work == second.work == 5
    assert first.extra == {"total sum": 2 * sum(range(200_000))}
    assert first.training_seconds is not None
    assert 0 < first.training_seconds < first.cpu_seconds
    assert first.wall_seconds > 0
    assert not Path("mark").exists()
    assert capfd.readouterr() == ("", "")


def test_commands_are_measured_whole() -> None:
    program = "import pathlib, sys; sum(range(3_000_000)); pathlib.Path('work').write_text('4'); print('3 steps')"

    def work(directory: Path, printed: str) -> float:
        return float((directory / "work").read_text()) + float(printed.split()[0])

    benchmark = scripted(
        Command("works", [sys.executable, "-c", program], work),
        Command("exits", [sys.executable, "-c", "import sys; sys.exit('no luck')"], work),
        Command("missing", [sys.executable, "-c", "import rlboard_no_such_package"], work),
        Command("absent", ["rlboard-no-such-command"], work),
    )
    result = run(benchmark, 1)
    (measurement,) = result.measurements["works"]
    assert measurement.work == 7
    assert measurement.cpu_seconds > 0
    assert measurement.training_seconds is None
    assert result.errors["exits"] == "failed: exit code 1 (no luck)"
    assert result.errors["missing"].startswith("not installed: pip install -e '.[bench]' (ModuleNotFoundError")
    assert result.errors["absent"].startswith("failed: ")


def test_main_prints_what_was_asked_for_and_writes_every_measurement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[bool] = []

    def benchmarks(quick: bool) -> list[Benchmark]:
        asked.append(quick)
        return [
            dataclasses.replace(scripted(Scripted("ours", [1.0, 3.0])), name="first"),
            dataclasses.replace(scripted(Scripted("ours", ["broken"])), name="second"),
        ]

    file = tmp_path / "figures.json"
    assert main(benchmarks, ["--quick", "--only", "first", "--repeats", "2", "--json", str(file)]) == 0
    assert asked == [True]
    printed = capsys.readouterr().out
    assert printed.startswith(machine())
    assert "**first**: 10 numbers; 2 runs each" in printed
    assert "second" not in printed
    (benchmark,) = json.loads(file.read_text())["benchmarks"]
    assert benchmark["order"] == ["ours", "ours"]
    assert [each["cpu_seconds"] for each in benchmark["measurements"]["ours"]] == [1.0, 3.0]

    assert main(benchmarks, ["--only", "second", "--repeats", "1"]) == 1
    assert asked == [True, False]


@pytest.mark.parametrize("arguments", [["--only", "none"], ["--repeats", "-1"], ["--repeats", "0"]])
def test_main_refuses_what_it_cannot_do(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(lambda _: [scripted(Scripted("ours", [1.0]))], arguments)
    assert exit_.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_machine_line_and_json_name_the_versions() -> None:
    import torch

    assert f"torch {torch.__version__.partition('+')[0]}" in machine()
    assert as_json([])["machine"] == machine()


class Fixed(gymnasium.Env[Any, Any]):
    """Terminates at the 8th step, and is truncated at the 5th by `gymnasium.make`; every reward is 1."""

    observation_space = gymnasium.spaces.Box(0, 1, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(
        self,
        *,
        seed: int | None = None,
        options: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.random(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:  # noqa: ARG002
        self.steps += 1
        return np.zeros(1, np.float32), 1.0, self.steps == 8, False, {}


@pytest.fixture
def fixed() -> Iterator[str]:
    gymnasium.register("Fixed-v0", entry_point=lambda **_: Fixed(), max_episode_steps=5, reward_threshold=2.0)
    yield "Fixed-v0"
    del gymnasium.registry["Fixed-v0"]


IGNORES_TRUNCATION = """
import sys
import gym

environment = gym.make(sys.argv[1])
for _ in range(4):
    environment.reset()
    terminated = False
    while not terminated:
        terminated = environment.step(0)[2]
"""


@pytest.mark.usefixtures("one_thread")
def test_a_script_is_ended_when_it_has_solved_its_environment(fixed: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(IGNORES_TRUNCATION)
    solved = until_solved(partial(run_script, script, fixed), Goal(mean_return=5, episodes=3), seed=1)
    assert (solved.extra["episodes"], solved.extra["steps"]) == (3, 8 + 8 + 5)
    assert solved.given_up == ""
    assert solved.extra["steps per CPU s"] == pytest.approx(21 / solved.cpu_seconds)

    unsolved = until_solved(partial(run_script, script, fixed), Goal(mean_return=5.1, episodes=3), seed=1)
    assert (unsolved.extra["episodes"], unsolved.extra["steps"]) == (4, 4 * 8)
    assert unsolved.given_up == "not solved when its training ended"


@pytest.mark.usefixtures("one_thread")
def test_what_every_training_gets_from_the_instrument(fixed: str) -> None:
    first: list[float] = []

    def endless() -> None:
        environments = gymnasium.vector.SyncVectorEnv([lambda: gymnasium.make(fixed)] * 2)
        threshold = environments.envs[0].spec
        assert threshold is not None
        assert threshold.reward_threshold == math.inf
        first.extend(environments.reset()[0].ravel())
        while True:
            environments.step(np.zeros(2, np.int64))

    goal = Goal(mean_return=5, episodes=4)
    assert until_solved(endless, goal, seed=1).extra["steps"] == 4 * 5
    until_solved(endless, goal, seed=1)
    until_solved(endless, goal, seed=3)
    assert first[:2] == first[2:4]
    assert len(set(first)) == 4
    out_of_time = until_solved(endless, dataclasses.replace(goal, mean_return=6, cpu_seconds=0), seed=1)
    assert (out_of_time.extra["steps"], out_of_time.given_up) == (128, "not solved in 0 CPU s")
    assert gymnasium.make(fixed).spec.reward_threshold == 2  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="reset no environment"):
        until_solved(list, goal, seed=1)


@pytest.mark.usefixtures("one_thread")
def test_ours_is_solved_at_the_first_point_of_its_curve_that_is_high_enough() -> None:
    config = Config(engine="gym", episodes=40, seed=3, eval_episodes=1, **PRESETS["solve"])  # type: ignore[arg-type]
    steps = {event.step: event.scalars.get("time/steps") for event in train(config)}
    solved = reinforce.our_solution(Goal(mean_return=10, episodes=30), "gym", seed=3)
    assert solved.extra["episodes"] == 40
    assert solved.extra["steps"] == steps[40]
    assert reinforce.our_solution(Goal(mean_return=501, cpu_seconds=0), "gym", seed=3).given_up


def seed_as_work(seed: int) -> Measurement:
    return Measurement(seed, 1.0, 1.0)


@pytest.mark.slow
def test_each_run_has_a_seed_of_its_own() -> None:
    result = run(scripted(reinforce.EachSeed("seeded", seed_as_work)), 3)
    assert [each.work for each in result.measurements["seeded"]] == [1, 2, 3]


def test_a_peer_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        reinforce.command_line(["--quick", "--cleanrl", "no/such/ppo.py"])
    assert exit_.value.code == 2
    assert "--cleanrl no/such/ppo.py: no such file" in capsys.readouterr().err


@pytest.fixture
def noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder of 40 training and 20 test images of 10 classes, and a working directory, of its own."""
    from PIL import Image

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 2)):
        for label in range(10):
            folder = tmp_path / "noise" / split / str(label)
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    threads = torch.get_num_threads()
    yield str(tmp_path / "noise")
    torch.set_num_threads(threads)


def small_training(data: str, **options: Any) -> dict[str, Any]:
    small = {"width": 8, "batch_size": 16, "epochs": 2, "log_every": 3, "compile": False, "threads": 1}
    return vision_train.PRESETS["speedrun"] | {"data": data, "device": "cpu"} | small | options


def test_airbenchs_clock_counts_of_our_training_what_it_counts_of_its_own(
    noise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def costs(price: Callable[..., float], function: Callable[..., Any]) -> Callable[..., Any]:
        def priced(*args: Any, **kwargs: Any) -> Any:
            nonlocal now
            now += price(*args)
            return function(*args, **kwargs)

        return priced

    tests: list[int] = []

    def price_of_a_test(*arguments: object) -> float:
        tests.append(len(arguments))
        return 10_000 * len(arguments)

    prices: dict[str, Callable[..., float]] = {
        "Batches": lambda *_: 1,
        "whiten": lambda *_: 10,
        "schedule": lambda *_: 100,  # once in a step
        "predict": price_of_a_test,
        "load_dataset": lambda *_: 1e6,
        "build_model": lambda *_: 1e6,
        "make_optimizer": lambda *_: 1e6,
        "scores": lambda *_: 1e6,
        "pictures": lambda *_: 1e6,
    }
    for name, price in prices.items():
        monkeypatch.setattr(vision_train, name, costs(price, getattr(vision_train, name)))
    monkeypatch.setattr(_airbench, "time", SimpleNamespace(perf_counter=lambda: now))
    kept = vision_train.predict  # type: ignore[attr-defined]

    training = _airbench.our_training(small_training(noise))
    assert tests == [2, 2, 3]  # after each epoch, and the last one with augmentation
    assert training.seconds == 30_000 + 4 * 100 + 10 + 4  # training, test, whitening and sample images are prepared
    assert training.whole.work == 2 * 2 * 16
    assert 0 < training.plain <= 100
    assert vision_train.predict is kept  # type: ignore[attr-defined]

    tests.clear()
    assert _airbench.our_training(small_training(noise, tta=False)).seconds == 4 * 100 + 10 + 4
    assert tests == [2, 2]


STAND_IN = """
import os
import sys

import torch

with open(sys.argv[0]) as file:
    code = file.read()
torch.backends.cudnn.benchmark = True


class CifarNet(torch.nn.Module):
    def cuda(self):
        return self

    def compile(self, mode):
        self.mode = mode


def print_training_details(variables, is_final_entry):
    raise AssertionError


def main(run, model):
    assert code
    assert model.mode == "max-autotune"
    assert torch.backends.cudnn.benchmark
    data = torch.load(os.path.join("cifar10", "train.pt"))
    assert data["images"].shape == (40, 32, 32, 3)
    assert data["images"].dtype == torch.uint8
    assert len(data["classes"]) == 10
    with open("runs", "a") as file:
        file.write(f"{run} ")
    time_seconds = 5.0 if run == "warmup" else float(run)
    val_acc = 0.5
    print_training_details(locals(), is_final_entry=False)
    time_seconds = 2 * time_seconds
    print_training_details(locals(), is_final_entry=True)
    return 0.25 * time_seconds
"""


@pytest.mark.slow
def test_airbench_runs_in_turn_with_ours_on_our_images(noise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path("scripts") / _airbench.SCRIPT
    script.parent.mkdir()
    script.write_text(STAND_IN)
    ours: list[int] = []

    def quick_training(options: dict[str, Any]) -> _airbench.Training:
        assert not torch.backends.cudnn.benchmark
        ours.append(options["seed"])
        return _airbench.Training(90.0 + options["seed"], 50.0, 3.0 * options["seed"], Measurement(1, 1.0, 1.0))

    monkeypatch.setattr(_airbench, "our_training", quick_training)
    measured = _airbench.in_turn(_airbench.check_script(script.parent), small_training(noise), 3)
    assert ours == [0, 1, 2, 3]
    assert Path("runs").read_text().split() == ["warmup", "1", "2", "3"]
    assert measured.extra == {
        "mean %": 92,
        "median s": 6,
        "airbench94's %": 100,
        "airbench94's s": 4,
        "times its s": 1.5,
        "in pairs": 1.5,
    }
    data = load_dataset(noise)
    for split, name in ((data.train, "train"), (data.test, "test")):
        kept = torch.load(f"cifar10/{name}.pt")
        assert torch.equal(kept["images"].permute(0, 3, 1, 2), split.images)
        assert torch.equal(kept["labels"], split.labels)

    monkeypatch.setattr(_airbench, "load_dataset", lambda _: dataclasses.replace(data, classes=("a", "b")))
    with pytest.raises(ContenderError, match="takes 10 classes of images of 3 x 32 x 32"):
        _airbench.in_turn(script, small_training(noise), 1)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (STAND_IN.replace("CifarNet", "Net"), "there is no CifarNet in it"),
        (STAND_IN.replace("time_seconds", "seconds"), "there is no time_seconds in it"),
        ("def main(", "'(' was never closed"),
        (None, "No such file or directory"),
    ],
)
def test_what_is_not_airbenchs_script_is_refused_before_anything_runs(
    text: str | None, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    if text is not None:
        script.write_text(text)
    assert vision.command_line(["--quick", "--airbench", str(script)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
    assert line.endswith(f"give a copy of {_airbench.SOURCE}")


def test_operations_and_activations_of_a_small_network() -> None:
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1, bias=False), torch.nn.Flatten(), torch.nn.Linear(4 * 8 * 8, 10)
    )
    flops, elements = vision.demand(network, torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    convolution, linear = 2 * (8 * 8) * 4 * (3 * 3 * 3), 2 * (4 * 8 * 8) * 10
    assert flops == 2 * convolution + 3 * linear  # nobody asks for the gradient of the images
    assert elements == 5 * (4 * 8 * 8 + 10) + 2 * (3 * 8 * 8)


def test_the_bound_is_the_slower_of_the_two() -> None:
    assert vision.images_per_second(10, 4, flops_per_second=100, bytes_per_second=100) == pytest.approx(10)
    assert vision.images_per_second(10, 4, flops_per_second=100, bytes_per_second=8) == pytest.approx(2)


@pytest.mark.slow
def test_resnet18_beside_its_bound(noise: str) -> None:
    measured = vision.bounded(small_training(noise, model="resnet18", tta=False), 64, 2**16)
    shown = measured.extra
    assert measured.work == 2 * 2 * 16
    flops, elements = vision.demand(build_model("resnet18", classes=10, width=8), torch.zeros(1, 3, 32, 32))
    assert shown["GFLOP per image"] == flops / 1e9
    assert shown["MB per image"] == 4 * elements / 1e6
    by_operations = 1000 * shown["TFLOP/s"] / shown["GFLOP per image"]
    assert shown["bound"] == pytest.approx(min(by_operations, 1000 * shown["GB/s"] / shown["MB per image"]))
    assert shown["% of it"] == pytest.approx(100 * shown["images per s"] / shown["bound"])


def test_a_gpu_has_benchmarks_of_its_own() -> None:
    chosen = vision.benchmarks(False, "shapes", "cuda", airbench=Path(_airbench.SCRIPT))
    assert [each.name for each in chosen] == ["logging", "resnet18", *vision.CUDA_PRESETS, "airbench94"]
    assert "10 seeds" in chosen[-1].note


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_smoke_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert vision.command_line(["--quick", "--device", "cuda"]) == 0
    assert "failed" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_file_can_be_run_as_it_is(tmp_path: Path) -> None:
    program = [sys.executable, vision.__file__, "--quick", "--only", "nothing"]
    answer = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert "--only nothing: there is loading, " in answer.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert vision.command_line(["--device", "cuda"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_peers_are_given_our_hyperparameters_under_their_names() -> None:
    values = find_loop("agents/ppo").defaults() | {"num_envs": 4, "n_steps": 16, "batch_size": 32, "anneal": True}
    arguments, differences = _peers.StableBaselines3().given("ppo", values)
    schedules = [arguments.pop(name)(0.25) for name in ("learning_rate", "clip_range")]
    assert schedules == [0.25 * float(values["learning_rate"]), 0.25 * float(values["clip_range"])]
    assert arguments == {
        "n_steps": 16,
        "batch_size": 32,
        "n_epochs": values["n_epochs"],
        "gamma": values["gamma"],
        "gae_lambda": values["gae_lambda"],
        "ent_coef": values["entropy_coefficient"],
        "vf_coef": values["value_coefficient"],
        "max_grad_norm": values["max_grad_norm"],
        "policy_kwargs": {"net_arch": [values["hidden_size"]] * 2},
        "seed": values["seed"],
    }
    assert differences == []

    arguments, differences = _peers.CleanRL(None).given("ppo", values)
    assert (arguments["num_steps"], arguments["num_minibatches"]) == (16, 2)
    assert arguments["vf_coef"] == 2 * float(values["value_coefficient"])
    assert differences == ["clip range not annealed"]


@pytest.mark.parametrize(
    ("agent", "changes", "differences"),
    [
        ("dqn", {}, ["layers of 120 and 84"]),
        ("dqn", {"train_every": 8, "gradient_steps": 4}, ["layers of 120 and 84", "an update every 2 steps"]),
        ("dqn", {"n_steps": 3, "double": True}, ["layers of 120 and 84", "without double", "without n_steps 3"]),
        ("ppo", {"anneal": False, "hidden_size": 32}, ["layers of 64 and 64"]),
        ("ppo", {"anneal": False, "normalize_rewards": True}, ["without normalize_rewards"]),
    ],
)
def test_what_a_peer_cannot_be_given_is_said(agent: str, changes: dict[str, Any], differences: list[str]) -> None:
    plain = agents_benchmark.PLAIN | {"train_every": 1, "gradient_steps": 1} if agent == "dqn" else {}
    values = find_loop(f"agents/{agent}").defaults() | plain | changes
    assert _peers.CleanRL(None).given(agent, values).differences == differences
    assert _peers.label(_peers.CleanRL(None), agent, values) == f"CleanRL ({'; '.join(differences)})"


def test_what_a_peer_cannot_do_at_all_is_refused() -> None:
    values = find_loop("agents/dqn").defaults()
    with pytest.raises(ContenderError, match="cannot update so often"):
        _peers.CleanRL(None).given("dqn", values | {"train_every": 2, "gradient_steps": 4})
    with pytest.raises(ContenderError, match="always normalises"):
        _peers.CleanRL(None).given("ppo", find_loop("agents/ppo").defaults("pendulum"))
    for peer in (_peers.CleanRL(None), _peers.StableBaselines3()):
        with pytest.raises(ContenderError, match="has no reinforce"):
            peer.given("reinforce", find_loop("agents/reinforce").defaults())
    with pytest.raises(ContenderError, match="--cleanrl CHECKOUT"):
        _peers.CleanRL(None).lines("ppo")


def test_speed_is_compared_at_equal_hyperparameters() -> None:
    for agent, steps, changes in agents_benchmark.SPEED.values():
        values = find_loop(f"agents/{agent}").defaults() | changes | {"total_timesteps": steps}
        assert _peers.StableBaselines3().given(agent, values).differences == []
        assert steps % (int(values["num_envs"]) * int(values.get("n_steps", 1))) == 0  # whole rollouts on all sides


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of CleanRL whose PPO learns nothing, but says what it was given and what it has seen."""
    script = tmp_path / "cleanrl" / "ppo.py"
    script.parent.mkdir()
    script.write_text(LIKE_CLEANRL)
    (tmp_path / "cleanrl_utils.py").touch()
    return tmp_path


LIKE_CLEANRL = """
import sys
from types import SimpleNamespace

import cleanrl_utils
import gymnasium as gym
import numpy as np

flags = dict(flag.lstrip("-").partition("=")[::2] for flag in sys.argv[1:])
assert {"no-cuda", "anneal_lr", "no-clip_vloss"} < flags.keys()
make = lambda: gym.wrappers.RecordEpisodeStatistics(gym.make(flags["env_id"]))
envs = gym.vector.SyncVectorEnv([make] * int(flags["num_envs"]))
envs.reset(seed=int(flags["seed"]))
ends = []
for step in range(int(flags["total_timesteps"]) // envs.num_envs):
    observations, _, terminated, truncated, infos = envs.step(np.zeros(envs.num_envs, np.int64))
    if truncated.any():
        assert (observations > 0).all()
        assert all(not final.any() for final in infos["final_observation"])
        ends += [info["episode"]["r"] for info in infos["final_info"]]
assert ends == [5, 5] * (step // 5), ends
agent = SimpleNamespace(actor=lambda inputs: inputs)
"""


@pytest.mark.usefixtures("one_thread")
def test_cleanrl_runs_as_it_is_and_is_judged_as_we_are(fixed: str, checkout: Path) -> None:
    changes: dict[str, Any] = {"env_id": fixed, "total_timesteps": 52, "num_envs": 2, "n_steps": 2, "batch_size": 4}
    values = find_loop("agents/ppo").defaults() | changes
    cell = _returns.Cell("ppo", fixed, "")
    path = list(sys.path)
    measured = _returns.peers_training(_peers.CleanRL(checkout), cell, values)
    assert measured.extra == {"return": 5, "in training": 5, "steps": 52}
    assert sys.path == path
    assert _peers.CleanRL(checkout).lines("ppo") == len(LIKE_CLEANRL.splitlines())
    assert gymnasium.vector.SyncVectorEnv is not _peers.VectorEnvironments


def test_every_environment_that_an_agent_has_a_preset_for_is_a_cell() -> None:
    cells = _returns.all_cells()
    assert cells["ppo:CartPole-v1"] == _returns.Cell("ppo", "CartPole-v1", "")
    for name, cell in cells.items():
        assert (cell.name, cell.values(3, quick=True)["env_id"]) == (name, cell.env_id)
        assert cell.values(3, quick=True)["seed"] == 3
    assert {cell.agent for cell in cells.values()} >= {"reinforce", "a2c", "ppo", "dqn"}


@pytest.mark.usefixtures("one_thread")
def test_ours_is_judged_by_its_final_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_returns, "EPISODES", 3)
    task = _returns.Task(_returns.all_cells()["ppo:CartPole-v1"], None, 7, tmp_path, quick=True)
    values = task.cell.values(7, quick=True)
    measured = _returns.our_training(task.cell, values, task.directory, task.run)
    saved = read_run(str(task.run))
    act = ppo.actor(ppo.Config(**saved.config), saved.weights, True, 0)  # type: ignore[arg-type]
    scores = []
    environment = gymnasium.make("CartPole-v1")
    for seed in range(_returns.UNSEEN, _returns.UNSEEN + 3):
        observation, _ = environment.reset(seed=seed)
        scores.append(0.0)
        ended = False
        while not ended:
            observation, reward, terminated, truncated, _ = environment.step(act(observation))
            scores[-1] += float(reward)
            ended = terminated or truncated
    assert measured.extra["return"] == pytest.approx(sum(scores) / 3)
    assert measured.extra["steps"] == values["total_timesteps"] == saved.step
    steps, returns = _returns.curve_of(task.run)
    assert returns[-1] == measured.extra["in training"]
    assert steps[-1] == saved.step
    assert (np.diff(steps) > 0).all()


@pytest.fixture
def task(tmp_path: Path) -> _returns.Task:
    return _returns.Task(_returns.Cell("ppo", "CartPole-v1", ""), None, 1, tmp_path, quick=False)


def test_a_training_that_ended_is_kept_until_its_hyperparameters_change(
    task: _returns.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def measure(function: Function, directory: Path) -> Measurement:  # noqa: ARG001
        done.append(function.name)
        return Measurement(1, 2.0, 3.0, extra={"return": float(len(done)), "in training": math.nan, "steps": 9.0})

    monkeypatch.setattr(Function, "measure", measure)
    assert [task.done().extra["return"] for _ in range(2)] == [1, 1]
    assert task.done(again=True).extra["return"] == 2
    assert dataclasses.replace(task, seed=2).done().extra["return"] == 3
    assert dataclasses.replace(task, quick=True).done().extra["return"] == 4
    kept = dataclasses.replace(task, quick=True).done()
    assert (kept.cpu_seconds, kept.wall_seconds) == (2, 3)
    assert math.isnan(kept.extra["in training"])
    assert done == ["rlboard"] * 4


def test_the_table_of_returns(task: _returns.Task, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def done(task: _returns.Task, again: bool) -> Measurement:  # noqa: ARG001
        if task.seed == 5:
            raise ContenderError("broken | pipe")
        score = 1000.0 if task.seed == 4 else task.seed  # an outlier: its quarter is left out
        return Measurement(1, task.seed, 2.0, extra={"return": score, "in training": 7.0, "steps": 1000.0})

    monkeypatch.setattr(_returns.Task, "done", done)
    tasks = [dataclasses.replace(task, seed=seed) for seed in range(1, 6)]
    outcomes = _returns.trained(tasks, 2, again=False)
    assert "[5 of 5]" in capsys.readouterr().err
    other = _returns.Outcome(failures=["there is none"])
    rows = _returns.table([(task.cell, "rlboard", 123, outcomes[task.cell, "rlboard"]), (task.cell, "X", None, other)])
    ours, theirs = rows.splitlines()[2:]
    assert ours.startswith(r"| CartPole-v1 | ppo | rlboard: broken \| pipe (1 seeds) | 4 | 1,000 | 2.5 (")
    assert ours.endswith(" | 7.0 (7.0 to 7.0) | 2.50 s | 2.00 s | 123 |")
    assert theirs == "| CartPole-v1 | ppo | X: there is none |  |  |  |  |  |  |  |"
    assert {line.count(" |") for line in rows.splitlines()} == {10}


def test_the_figure_of_learning_curves(task: _returns.Task, tmp_path: Path) -> None:
    from PIL import Image

    def curve(last: float) -> _returns.Curve:
        return np.array([0.0, 10.0, last]), np.array([0.0, 100.0, 500.0])

    two = {task.cell: [curve(20), curve(25)], dataclasses.replace(task.cell, env_id="Pendulum-v1"): [curve(20)]}
    _returns.draw(two, tmp_path / "two.png")
    with Image.open(tmp_path / "two.png") as image:
        assert image.width == 2 * round(3.2 * 110)
        colors = {color for _, color in image.convert("RGB").getcolors(maxcolors=2**24) or []}
    assert {(255, 127, 14), (0, 0, 0)} < colors  # the interquartile mean, and CartPole's threshold


@pytest.mark.slow
def test_returns_of_us_and_of_a_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("stable_baselines3")
    figure = tmp_path / "figure.png"
    command = ["--quick", "--only=return", "--peers", "--cell=ppo:CartPole-v1", "--seeds=2", "--jobs=2"]
    command += [f"--into={tmp_path}", f"--figure={figure}"]
    assert agents_benchmark.command_line(command) == 0
    ours, theirs = capsys.readouterr().out.splitlines()[2:]
    assert ours.startswith("| CartPole-v1 | ppo | rlboard | 2 | 2,048 | ")
    assert theirs.startswith("| CartPole-v1 | ppo | SB3 | 2 | 2,048 | ")
    assert figure.exists()
    assert agents_benchmark.command_line(command) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [ours, theirs]


def test_an_unknown_cell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        agents_benchmark.command_line(["--only=return", "--cell=ppo:Pong"])
    assert exit_.value.code == 2
    assert "ppo:CartPole-v1" in capsys.readouterr().err


def test_names_are_unique() -> None:
    for module in (agents_benchmark, reader, reinforce, resume, runs, vision, writer):
        benchmarks = module.benchmarks(True)
        for names in (
            [benchmark.name for benchmark in benchmarks],
            *([contender.name for contender in benchmark.contenders] for benchmark in benchmarks),
        ):
            assert len(set(names)) == len(names)


LIGHT = {"list", "scalars"}  # the others train, or start many processes
EVERY_BENCHMARK = [
    pytest.param(
        module.benchmarks,
        benchmark.name,
        marks=[] if benchmark.name in LIGHT else [pytest.mark.slow],
        id=benchmark.name,
    )
    for module in (agents_benchmark, reader, reinforce, resume, runs, vision, writer)
    for benchmark in module.benchmarks(True)
]


@pytest.mark.parametrize(("benchmarks", "name"), EVERY_BENCHMARK)
def test_smoke(benchmarks: Callable[[bool], list[Benchmark]], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(benchmarks, ["--quick", "--only", name]) == 0
    table = capsys.readouterr().out
    assert f"**{name}**" in table
    failed = [line.split("|")[1].strip() for line in table.splitlines() if "failed" in line]
    assert failed == (["torch"] if name == "graph-vit" else [])  # torch.jit cannot trace attention's fast path
