"""`rlboard evaluate RUN` and `--capture-video`: what they say of a policy is what it does, and it plays in the tab."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image as Picture
from PIL import ImageSequence
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents import reinforce
from agents._environments import evaluate, film
from agents.evaluate import Config, train
from rlboard.checkpoint import FORMAT, read_run, save
from rlboard.cli import main
from rlboard.errors import UsageError
from rlboard.events import Event, Image, Video
from rlboard.instruments.videos import sampled, videos
from rlboard.registry import TRACKS
from rlboard.writer import open_writer


@pytest.fixture
def trained(smoke_log_dir: Path) -> str:
    return str(smoke_log_dir / "REINFORCE/smoke")


def accumulated(directory: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(directory))
    accumulator.Reload()
    return accumulator


def scores(config: Config) -> list[float]:
    return [event.scalars["episode/return"] for event in train(config) if event.step]


def test_the_scores_are_those_of_the_greedy_policy_on_the_same_seeds(trained: str) -> None:
    run = read_run(trained)
    act = reinforce.actor(reinforce.Config(**cast("Any", run.config)), run.weights, greedy=True, seed=0)
    seeds = np.random.SeedSequence(5).generate_state(4).tolist()
    assert scores(Config(trained, 4, greedy=True, seed=5)) == [evaluate("CartPole-v1", act, 1, seed) for seed in seeds]


def test_sampled_actions_are_others_than_the_greedy_ones_and_equal_for_equal_seeds(trained: str) -> None:
    sampled_scores = scores(Config(trained, 8))
    assert sampled_scores == scores(Config(trained, 8))
    assert sampled_scores != scores(Config(trained, 8, seed=1))
    assert sampled_scores != scores(Config(trained, 8, greedy=True))


def test_sampled_actions_have_the_probabilities_of_the_policy(trained: str) -> None:
    run = read_run(trained)
    act = reinforce.actor(reinforce.Config(**cast("Any", run.config)), run.weights, greedy=False, seed=3)
    policy = reinforce.Policy(4, 128, 2)
    policy.load_state_dict(run.weights)
    observation = np.array([0.1, -0.5, 0.05, 0.3], np.float32)
    expected = policy(torch.from_numpy(observation)).exp()[1].item()
    assert np.mean([act(observation) for _ in range(10_000)]) == pytest.approx(expected, abs=0.02)


def test_the_command_logs_every_episode_and_what_they_say_together(
    trained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", trained, "--episodes=25", "--log-dir", str(tmp_path), "--run-name=a"]) == 0
    accumulator = accumulated(tmp_path / "EVALUATE/a")
    points = {
        tag: [(point.step, point.value) for point in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]
    }
    returns = [value for _, value in points["episode/return"]]
    assert [step for step, _ in points["episode/return"]] == list(range(1, 26))
    assert points["episode/length"] == points["episode/return"]  # a reward of 1 a step
    results = {tag: points[f"eval/{tag}"] for tag in ("mean_reward", "std_reward", "lower", "upper", "min", "max")}
    assert {step for (point,) in results.values() for step, _ in [point]} == {25}
    values = {tag: point[0][1] for tag, point in results.items()}
    assert values["mean_reward"] == pytest.approx(np.mean(returns))
    assert values["std_reward"] == pytest.approx(np.std(returns))
    assert (values["min"], values["max"]) == (min(returns), max(returns))
    margin = 1.96 * np.std(returns) / 5
    assert values["lower"] == pytest.approx(np.mean(returns) - margin, abs=0.4 * margin)
    assert values["upper"] == pytest.approx(np.mean(returns) + margin, abs=0.4 * margin)
    assert points["time/steps"][-1] == (25, sum(returns))

    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == f"policy: {trained}, reinforce on CartPole-v1 at step 60"
    assert [line for line in lines if line.startswith("#")] == [
        f"# of episode :{count}, mean return : {np.mean(returns[:count]):.1f}" for count in (10, 20, 25)
    ]
    for tag in results:
        assert sum(f"eval/{tag} " in line for line in lines) == 1
    facts = json.loads((tmp_path / "EVALUATE/a/run.json").read_text())
    assert facts["command"][:4] == ["rlboard", "evaluate", trained, "--episodes=25"]
    assert facts["best"] == {"eval/mean_reward": {"value": pytest.approx(np.mean(returns)), "step": 25}}


def test_a_run_without_a_policy_is_refused_and_told_which_have_one(tmp_path: Path) -> None:
    (loop,) = (loop for loop in TRACKS[1].loops() if loop.name == "train")
    config = loop.defaults()
    (tmp_path / "run.json").write_text(json.dumps({"loop": "vision/train", "config": config, "status": "completed"}))
    state = {"format": FORMAT, "config": config, "step": 1, "model": {}, "loop": None, "run": {}, "position": {}}
    save(tmp_path / "checkpoint.pt", state)
    with pytest.raises(UsageError, match="is of vision/train, which has no policy: give a run of rlboard a2c or"):
        next(train(Config(str(tmp_path))))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "Missing argument 'RUN'"),
        (["smok"], 2, "did you mean logs/REINFORCE/smoke"),
        (["logs/REINFORCE"], 3, "no run.json"),
        (["logs/damaged"], 3, "is damaged"),
        (["logs/REINFORCE/smoke", "more"], 2, "more"),
        (["logs/REINFORCE/smoke", "--episodes=0"], 2, "--episodes 0 is out of range"),
        (["a\nb"], 2, "is not there"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    arguments: list[str],
    code: int,
    words: str,
    smoke_log_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(smoke_log_dir, tmp_path / "logs")
    shutil.copytree(smoke_log_dir / "REINFORCE/smoke", tmp_path / "logs/damaged")
    (tmp_path / "logs/damaged/checkpoint.pt").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["evaluate", *arguments]) == code
    output, complaint = capsys.readouterr()
    assert output == ""
    assert complaint.startswith("rlboard: ")
    assert complaint.count("\n") == 1
    assert complaint.strip().isprintable()
    assert words in complaint
    assert sorted(tmp_path.rglob("*")) == before


def test_a_video_of_the_first_episode_plays_in_the_tab_and_lies_in_the_run(trained: str, tmp_path: Path) -> None:
    command = ["evaluate", trained, "--episodes=2", "--capture-video", "--log-dir", str(tmp_path), "--run-name=a"]
    assert main(command) == 0
    directory = tmp_path / "EVALUATE/a"
    gif = directory / "videos/eval-video-1.gif"
    accumulator = accumulated(directory)
    (image,) = accumulator.Images("eval/video")
    assert (image.step, image.width, image.height) == (1, 400, 267)
    assert image.encoded_image_string == gif.read_bytes()
    length = accumulator.Scalars("episode/length")[0].value
    with Picture.open(gif) as picture:
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(picture)]
    assert sum(durations) == length * 20  # CartPole's 50 frames a second
    assert picture.info["loop"] == 0
    assert gif.stat().st_size < 500_000


def test_a_video_changes_nothing_of_what_is_learned(trained: str, tmp_path: Path) -> None:
    command = ["reinforce", "--smoke", "--seed=7", "--capture-video", "--log=minimal", "--run-name=a"]
    assert main([*command, "--log-dir", str(tmp_path)]) == 0
    assert list((tmp_path / "REINFORCE/a/videos").glob("eval-video-60.gif"))
    first, second = (
        json.loads((path / "run.json").read_text())["weights_sha256"]
        for path in (Path(trained), tmp_path / "REINFORCE/a")
    )
    assert first == second


def test_the_film_of_an_episode_has_a_frame_a_step(trained: str) -> None:
    run = read_run(trained)
    act = reinforce.actor(reinforce.Config(**cast("Any", run.config)), run.weights, greedy=True, seed=0)
    frames_per_second, frames = film("CartPole-v1", act, seed=3)
    drawn = [draw() for draw in frames]
    assert frames_per_second == 50
    assert len(drawn) == evaluate("CartPole-v1", act, 1, seed=3)
    assert all(frame.shape == (400, 600, 3) and frame.dtype == np.uint8 for frame in drawn)
    assert not np.array_equal(drawn[0], drawn[-1])


def counting(count: int, shape: tuple[int, ...] = (4, 6, 3), drawn: list[int] | None = None) -> Video:
    """A video at 60 frames per second, whose frames show their number in 24 bits of colour."""

    def frame(number: int) -> NDArray[np.uint8]:
        if drawn is not None:
            drawn.append(number)
        colour = np.array([number >> 16, number >> 8 & 255, number & 255], np.uint8)
        return np.broadcast_to(colour, shape)

    def frames() -> Iterator[Image]:
        return (partial(frame, number) for number in range(count))

    return lambda: (60.0, frames())


@pytest.mark.parametrize(
    ("length", "stride"), [(1, 1), (149, 1), (150, 1), (151, 2), (300, 2), (301, 4), (500, 4), (10_000, 128)]
)
def test_a_long_video_is_shown_in_few_frames_at_its_own_speed(length: int, stride: int) -> None:
    drawn: list[int] = []
    frames, frames_per_second = sampled(counting(length, drawn=drawn))
    shown = (frames[:, 0, 0].astype(int) * [1 << 16, 1 << 8, 1]).sum(axis=1)
    assert shown.tolist() == list(range(0, length, stride))
    assert len(frames) <= 150
    assert frames_per_second == 60 / stride
    assert len(drawn) <= 150 * (1 + np.log2(stride))


@pytest.mark.parametrize(
    ("shape", "shown"),
    [((300, 400, 3), (300, 400, 3)), ((800, 1200, 3), (267, 400, 3)), ((1, 5000, 3), (1, 400, 3))],
)
def test_a_wide_video_becomes_narrow(shape: tuple[int, ...], shown: tuple[int, ...]) -> None:
    assert sampled(counting(2, shape))[0].shape[1:] == shown


def captured(events: list[Event], directory: Path, *, asked: bool = True) -> list[Event]:
    run = SimpleNamespace(
        options=SimpleNamespace(capture_video=asked), writer=open_writer(directory), directory=directory
    )
    passed = list(videos(iter(events), cast("Any", run)))
    run.writer.close()
    return passed


def test_a_gif_has_the_frames_and_the_time_of_the_video(tmp_path: Path) -> None:
    events = [Event(step, 9, videos={"a/b c": counting(12, (40, 60, 3))}) for step in (3, 9)]
    assert captured(events, tmp_path) == events
    assert {path.name for path in (tmp_path / "videos").glob("*.gif")} == {"a-b-c-3.gif", "a-b-c-9.gif"}
    assert [image.step for image in accumulated(tmp_path).Images("a/b c")] == [3, 9]
    with Picture.open(io.BytesIO(accumulated(tmp_path).Images("a/b c")[0].encoded_image_string)) as picture:
        assert (picture.format, picture.size) == ("GIF", (60, 40))
        # A GIF counts in hundredths of a second, and browsers take no less than two.
        assert [frame.info["duration"] for frame in ImageSequence.Iterator(picture)] == [20] * 12


def test_a_video_is_drawn_only_when_it_is_asked_for(tmp_path: Path) -> None:
    def film_that_fails() -> tuple[float, Iterator[Image]]:
        raise AssertionError

    events = [Event(1, 1, videos={"video": film_that_fails})]
    assert captured(events, tmp_path, asked=False) == events
    assert not (tmp_path / "videos").exists()


def test_a_machine_that_cannot_draw_loses_the_video_with_one_warning(tmp_path: Path) -> None:
    def film_that_fails() -> tuple[float, Iterator[Image]]:
        raise RuntimeError("no renderer")

    events = [Event(step, 2, videos={"bad": film_that_fails, "good": counting(3)}) for step in (1, 2)]
    with pytest.warns(RuntimeWarning, match="bad cannot be drawn on .*: no renderer") as caught:
        assert captured(events, tmp_path) == events
    assert len(caught) == 1
    assert accumulated(tmp_path).Tags()["images"] == ["good"]


def test_with_moviepy_there_is_an_mp4_beside_it(tmp_path: Path) -> None:
    moviepy = pytest.importorskip("moviepy")
    captured([Event(1, 1, videos={"video": counting(30, (41, 61, 3))})], tmp_path)
    with moviepy.VideoFileClip(str(tmp_path / "videos/video-1.mp4")) as clip:
        assert (clip.size, clip.fps, clip.duration) == ([60, 40], 60, pytest.approx(0.5, abs=0.04))
