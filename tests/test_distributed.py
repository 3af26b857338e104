"""Several processes under torchrun: each has its part, together they are one, and what goes wrong ends all of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed as torch_distributed
from torch import nn

from rlboard import distributed
from rlboard.checkpoint import CHECKPOINT, load
from rlboard.cli import main
from rlboard.devices import resolve_device
from rlboard.distributed import World, world
from rlboard.errors import NumericalError, UsageError
from rlboard.eventfile import read_scalars
from rlboard.events import Event
from rlboard.registry import ROOT, TRACKS
from rlboard.resume import of_job
from rlboard.run import Stop
from tests.faults.trials import curves, facts
from vision._batchnorm import SynchronizedBatchNorm2d, synchronized
from vision._data import Batches, Split

TORCHRUN = {
    "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29400", "TORCHELASTIC_RUN_ID": "a-job", "TORCHELASTIC_RESTART_COUNT": "0",
}  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test is told of processes by whoever has started it."""
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says in the environment what torchrun says to the first of two processes, or something else."""

    def tell(**changed: str | None) -> None:
        for name, value in (TORCHRUN | changed).items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    return tell


@pytest.fixture
def group_of_one() -> Iterator[None]:
    """A process that speaks to itself: all sums are over it alone."""
    torch_distributed.init_process_group("gloo", store=torch_distributed.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield
    torch_distributed.destroy_process_group()


def test_without_torchrun_nothing_is_done() -> None:
    assert world() == World(rank=0, size=1)
    model, numbers = nn.BatchNorm2d(2), torch.ones(3)
    assert distributed.parallel(model) is synchronized(model) is model
    assert type(model) is nn.BatchNorm2d
    assert distributed.sum_over(numbers)[0] is numbers
    assert distributed.gather(numbers, 3) is numbers
    assert distributed.share(lambda: numbers) is numbers
    assert distributed.facts() == {}
    with distributed.connected():
        distributed.average_gradients(model.parameters())
        assert not torch_distributed.is_initialized()


def test_torchrun_says_who_is_who(told: Callable[..., None]) -> None:
    told(RANK="1", LOCAL_RANK="1", TORCHELASTIC_RESTART_COUNT="3")
    here = world()
    assert (here.rank, here.size, here.local_rank, here.local_size, here.restarts) == (1, 2, 1, 2, 3)
    assert not here.leads
    other = here.job
    told(TORCHELASTIC_RUN_ID="another-job")
    assert world().job not in ("", "another-job", other)
    assert distributed.facts() == {"processes": 2, "job": world().job}


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"WORLD_SIZE": None}, "RANK is set in the environment, WORLD_SIZE is not"),
        ({"RANK": None, "LOCAL_RANK": None}, "WORLD_SIZE is set in the environment, RANK is not"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not"),
        ({"RANK": "first"}, "RANK=first in the environment is not a number"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE=-2"),
        ({"LOCAL_RANK": "2"}, "cannot be"),
        ({"WORLD_SIZE": "0"}, "cannot be"),
        ({"LOCAL_WORLD_SIZE": "4"}, "cannot be"),
    ],
)
def test_half_of_an_environment_is_refused(
    changed: dict[str, str | None], complaint: str, told: Callable[..., None]
) -> None:
    told(**changed)
    with pytest.raises(UsageError, match=complaint):
        world()


def test_an_environment_that_is_refused_is_refused_in_one_line(
    told: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told(RANK="first")
    assert main(["vision", "train", "--smoke", "--log-dir", str(tmp_path)]) == 2
    complaints = capsys.readouterr().err
    assert complaints == "rlboard: RANK=first in the environment is not a number: start with torchrun\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        (["reinforce"], "rlboard reinforce trains in one process: start it without torchrun; --seeds N"),
        (["vision", "train", "--seeds=2"], "--seeds and 2 processes of torchrun do not go together"),
        (["vision", "train", "--epochs=0"], "--epochs 0 is out of range"),
        (["vision", "train", "--epoch=1"], "No such option: --epoch"),
    ],
)
def test_the_first_process_alone_complains(
    command: list[str],
    complaint: str,
    told: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(distributed, "GRACE_SECONDS", 0)
    told()
    assert main(command) == 2
    assert complaint in capsys.readouterr().err
    told(RANK="1", LOCAL_RANK="1")
    assert main(command) == 2
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("device", "complaint"),
    [("cuda:0", "cannot share it"), ("mps", "cannot share it"), ("cuda", "1 CUDA devices for 2 processes")],
)
def test_a_device_for_each_process(
    device: str, complaint: str, told: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    told()
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match=complaint):
        resolve_device(device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    told(RANK="1", LOCAL_RANK="1")
    assert resolve_device("cuda") == torch.device("cuda:1")


@pytest.mark.parametrize(("count", "size"), [(7, 3), (2, 3), (12, 4), (0, 2)])
def test_parts_are_disjoint_complete_and_equal_within_one(count: int, size: int) -> None:
    parts = [list(range(count))[World(rank, size).part(count)] for rank in range(size)]
    assert list(chain(*parts)) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def batches(here: World | None, size: int = 12) -> Batches:
    images = torch.randint(256, (40, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    half = torch.full((1,), 0.5)
    return Batches(
        Split(images, torch.arange(40)), half, half, size, augment=True, cutout=5, generator=generator, world=here
    )


def test_three_processes_see_what_one_sees() -> None:
    alone = batches(None)
    together = [batches(World(rank, 3)) for rank in range(3)]
    for _ in range(2):
        seen = 0
        for (inputs, labels), *parts in zip(alone, *together, strict=True):
            assert [len(part) for part, _ in parts] == [4, 4, 4]
            assert torch.equal(torch.cat([part for part, _ in parts]), inputs)
            assert torch.equal(torch.cat([part for _, part in parts]), labels)
            seen += 1
        assert seen == 3


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(UsageError, match=r"1 images in a step cannot .* by 2 processes: give --batch-size 2"):
        batches(World(0, 2), size=1)
    with pytest.raises(UsageError, match="give fewer processes"):
        batches(World(0, 80), size=40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("group_of_one")
def test_batch_norm_over_all_processes_is_torchs(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = (3 * torch.randn(6, 5, 4, 4) + 7).to(dtype).to(memory_format=torch.channels_last)
    factors = torch.randn(6, 5, 4, 4)
    found = []
    for kind in (nn.BatchNorm2d, SynchronizedBatchNorm2d):
        layer = kind(5, momentum=0.4)
        nn.init.uniform_(layer.weight)
        nn.init.uniform_(layer.bias)
        torch.manual_seed(1)
        leaf = inputs.detach().clone().requires_grad_()
        for _ in range(2):
            layer(leaf).float().mul(factors).sum().backward()
        layer.eval()
        found.append([leaf.grad, *(each.grad for each in layer.parameters()), *layer.buffers(), layer(leaf)])
        torch.manual_seed(0)
        torch.randn(6, 5, 4, 4), torch.randn(6, 5, 4, 4)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("group_of_one")
def test_all_stop_at_the_event_after_the_one_at_which_any_was_asked() -> None:
    asked, stop = Stop(), Stop()
    seen = []
    for event in distributed.in_step((Event(step, 9) for step in range(9)), asked, stop):
        seen.append(event.step)
        if event.step == 3:
            asked.number = signal.SIGTERM
        if stop.number:
            break
    assert seen == [0, 1, 2, 3, 4, 5]
    assert stop.exit_code == 143


def test_the_run_of_a_job_is_found_again(tmp_path: Path) -> None:
    (loop,) = (loop for track in TRACKS for loop in track.loops() if loop.name == "gan")
    config = {"seed": 1, "learning_rate": 0.1}
    for name, job, seed in (("a", "x", 1), ("b", "y", 1), ("c", "x", 2)):
        directory = tmp_path / "vision/gan" / name
        directory.mkdir(parents=True)
        told = {"loop": "vision/gan", "config": config | {"seed": seed}, "job": job, "status": "failed"}
        (directory / "run.json").write_text(json.dumps(told))
    found = of_job(loop, config, tmp_path, "x")
    assert found is not None
    assert found.directory.name == "a"
    assert of_job(loop, config, tmp_path, "z") is of_job(loop, config, tmp_path / "none", "x") is None


# Real processes from here on.

SMALL = [
    *("vision", "train", "--data=shapes", "--images=640", "--batch-size=32", "--width=8", "--epochs=2", "--threads=1"),
    *("--optimizer=sgd", "--lr=0.01", "--log-every=5", "--log=minimal"),
]
GAN = [
    *("vision", "gan", "--data=shapes", "--images=96", "--batch-size=12", "--steps=10", "--width=4", "--threads=1"),
    *("--judge-images=64", "--quality-images=32", "--log-every=2", "--conditional", "--log=minimal", "--gamma=0.05"),
]
PLAIN_GAN = """
import sys
import torch
from rlboard.cli import main
torch.optim.Adam = lambda parameters, rate, betas: torch.optim.SGD(parameters, 0.05)
raise SystemExit(main(sys.argv[1:]))
"""  # Adam divides by the size of a gradient, and makes of the rounding of a small one a step of full size


def start(*command: str, processes: int = 2, restarts: int = 0, program: str = "") -> subprocess.Popen[str]:
    what = ["--", program, *command] if program else ["-m", "--", "rlboard", *command]
    options = [f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *options, *what],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


def ended(process: subprocess.Popen[str], code: int = 0) -> tuple[str, list[str]]:
    """What a torchrun printed, and which lines of it are complaints of ours."""
    try:
        output, errors = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == code, errors
    return output, [line for line in errors.splitlines() if line.startswith("rlboard: ")]


def assert_close_runs(found: Path, expected: Path, tolerance: float = 1e-5) -> None:
    """The same curves and weights, and one event file."""
    (_,) = found.glob("*tfevents*")
    assert_close_results(found, expected, tolerance)


def assert_close_results(found: Path, expected: Path, tolerance: float = 1e-5) -> None:
    curves(found)  # TensorBoard's own reader finds each step once
    ours, theirs = read_scalars(found), read_scalars(expected)
    assert set(ours) == set(theirs)
    for tag in theirs:
        assert ours[tag].step.tolist() == theirs[tag].step.tolist(), tag
        if not tag.startswith(("time/", "Memory/")):
            np.testing.assert_allclose(ours[tag].value, theirs[tag].value, rtol=1e-4, atol=1e-4, err_msg=tag)
    weights, others = (load(each / CHECKPOINT)["model"] for each in (found, expected))
    assert weights.keys() == others.keys()
    for name, tensor in others.items():
        torch.testing.assert_close(weights[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["simplecnn", "laptopnet"])
@pytest.mark.usefixtures("one_thread")
def test_two_processes_learn_what_one_learns(model: str, tmp_path: Path) -> None:
    command = [*SMALL, f"--model={model}", "--cutout=4", "--ema=0.9", "--log-dir", str(tmp_path)]
    output, complaints = ended(start(*command, "--run-name=two"))
    assert not complaints
    assert output.count("train: completed") == 1
    assert main([*command, "--run-name=one"]) == 0
    assert_close_runs(tmp_path / "vision/train/two", tmp_path / "vision/train/one")
    assert facts(tmp_path / "vision/train/two")["processes"] == 2
    assert {path.name for path in (tmp_path / "vision/train").iterdir()} == {"one", "two"}


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_three_processes_train_the_same_gan(tmp_path: Path) -> None:
    program = tmp_path / "plain_gan.py"
    program.write_text(PLAIN_GAN)
    command = [*GAN, "--log-dir", str(tmp_path / "logs")]
    _, complaints = ended(start(*command, "--run-name=three", processes=3, program=str(program)))
    assert not complaints
    subprocess.run([sys.executable, program, *command, "--run-name=one"], check=True, capture_output=True, cwd=ROOT)
    assert_close_runs(tmp_path / "logs/vision/gan/three", tmp_path / "logs/vision/gan/one")


def process_of(rank: int, mark: str) -> int:
    """The number of the process that has this rank in the run whose command holds `mark`."""
    for directory in Path("/proc").iterdir():
        try:
            words, names = (directory / "cmdline").read_bytes(), (directory / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if directory.name.isdecimal() and mark.encode() in words and f"RANK={rank}".encode() in names:
            return int(directory.name)
    raise AssertionError(f"there is no process of rank {rank}")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes by Linux's /proc")
@pytest.mark.parametrize(
    ("rank", "moment", "seconds"), [(0, CHECKPOINT, 0.2), (1, CHECKPOINT, 0.2), (1, "run.json", 99)]
)
@pytest.mark.usefixtures("one_thread")
def test_a_process_that_is_killed_changes_nothing(rank: int, moment: str, seconds: float, tmp_path: Path) -> None:
    command = [*SMALL, "--model=simplecnn", "--epochs=6", "--log-dir", str(tmp_path)]
    process = start(*command, "--run-name=two", f"--save-every={seconds}", restarts=1)
    directory = tmp_path / "vision/train/two"
    while not (directory / moment).exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process_of(rank, str(tmp_path)), signal.SIGKILL)
    output, _ = ended(process)
    assert ("going on at step" in output) == (moment == CHECKPOINT)
    assert main([*command, "--run-name=one"]) == 0
    assert_close_results(directory, tmp_path / "vision/train/one")
    assert {path.name for path in (tmp_path / "vision/train").iterdir()} == {"one", "two"}


@pytest.mark.slow
def test_a_signal_stops_all_at_the_same_step(tmp_path: Path) -> None:
    process = start(
        *SMALL, "--model=simplecnn", "--epochs=400", "--save-every=0.2", "--log-dir", str(tmp_path), "--run-name=two"
    )
    directory = tmp_path / "vision/train/two"
    while not (directory / CHECKPOINT).exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, complaints = ended(process, code=1)
    assert not complaints
    assert "train: interrupted" in output
    assert facts(directory)["status"] == "interrupted"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--batch-size=1"], "1 images in a step cannot be shared equally by 2 processes"),
        (["--images=1", "--batch-size=2"], "1 images in a step cannot be shared"),
        (["--lr=1e30"], "the loss is "),
    ],
)
def test_what_goes_wrong_is_said_once_and_ends_all(options: list[str], complaint: str, tmp_path: Path) -> None:
    _, complaints = ended(start(*SMALL, "--model=simplecnn", *options, "--log-dir", str(tmp_path)), code=1)
    (line,) = complaints
    assert complaint in line


SABOTAGE = """
import os, sys
from rlboard.cli import main
from rlboard.errors import NumericalError
from vision import train as module
build = module.build_model
def sabotaged(*words, **named):
    if os.environ["RANK"] == "1":
        raise NumericalError("something that only the second process has seen")
    return build(*words, **named)
module.build_model = sabotaged
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_first_process_says_what_another_has_seen(tmp_path: Path) -> None:
    program = tmp_path / "sabotage.py"
    program.write_text(SABOTAGE)
    process = start(*SMALL, "--model=simplecnn", "--log-dir", str(tmp_path / "logs"), program=str(program))
    _, errors = process.communicate(timeout=100)
    assert errors.count("\nrlboard: ") + errors.startswith("rlboard: ") == 1
    assert "something that only the second process has seen" in errors
    assert f"failed (exitcode: {NumericalError.exit_code}) local_rank: 0" in errors
