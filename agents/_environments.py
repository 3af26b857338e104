"""Gymnasium environments, made, checked, evaluated and drawn: what every agent needs and none is about."""

from __future__ import annotations

import difflib
import os
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete, Space
from numpy.typing import NDArray

from rlboard.config import printable
from rlboard.errors import DataError, RlboardError, UsageError
from rlboard.events import Image, Video
from rlboard.registry import TRACKS

if TYPE_CHECKING:
    from agents._vector import Environments

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # pygame greets on standard output
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # frames are drawn in memory: no display is asked for

_drawing = threading.Lock()  # pygame is not made for seeds that draw side by side

Environment = gymnasium.Env[Any, Any]
Observations = NDArray[Any]
"""(observation size,) float32 each, or (frames, height, width) uint8."""

Act = Callable[[Observations], int | np.integer[Any] | NDArray[np.float32]]
"""A policy as evaluation sees it: one of its `Observations` to an action as the environment takes it."""

DISCRETE, CONTINUOUS = "discrete actions, like CartPole-v1", "continuous actions, like Pendulum-v1"
FRAMES = "observations of stacked frames, like ALE/Pong-v5"
CHECKS = {
    "check_discrete": (DISCRETE,),
    "check_frames": (DISCRETE, FRAMES),
    "check_continuous": (CONTINUOUS,),
    "check_any": (DISCRETE, CONTINUOUS),
}
"""What an agent names as the check of its `env_id`, and what it can take: flat observations, and these."""


BYTES, FLOATS = np.dtype("u1"), np.dtype("<f4")

EXTRAS = ("atari", "box2d", "mujoco")
"""Environments that come with packages of their own: extras of rlboard, named where they are missing."""


def check_discrete(env_id: str) -> None:
    """Raises UsageError where `env_id` is no environment, or not for an agent whose actions are discrete."""
    make_environment(env_id, kinds=CHECKS["check_discrete"]).close()


def check_frames(env_id: str) -> None:
    """Raises UsageError where `env_id` is no environment, or not for an agent that can see, of discrete actions."""
    make_environment(env_id, kinds=CHECKS["check_frames"]).close()


def check_continuous(env_id: str) -> None:
    """Raises UsageError where `env_id` is no environment, or not for an agent whose actions are continuous."""
    make_environment(env_id, kinds=CHECKS["check_continuous"]).close()


def check_any(env_id: str) -> None:
    """Raises UsageError, with the nearest known names, where no agent of this folder can use `env_id`."""
    make_environment(env_id).close()


def fitting(*kinds: str) -> str:
    """The commands of the agents that can take all of this: `rlboard ppo or rlboard sac`."""
    track = next(track for track in TRACKS if track.package == __package__)
    commands = [
        f"rlboard {loop.command}"
        for loop in track.loops()
        for option in loop.options
        if option.name == "env_id" and {*kinds} <= {*CHECKS[option.check.partition(":")[2]]}
    ]
    return " or ".join(commands)


def make_environment(
    env_id: str, render_mode: str | None = None, kinds: Sequence[str] = (DISCRETE, CONTINUOUS, FRAMES)
) -> Environment:
    """The environment `env_id`, with discrete or bounded continuous actions and observations that are flat or frames.

    Observations are of shape (observation size,), or (frames, height, width) uint8 with 36 pixels or more each way;
    continuous actions are of shape (action size,).

    Raises:
        UsageError: it is unknown, a package it needs is missing, its spaces are others, or not of these `kinds`.
    """
    try:
        if env_id.startswith("ALE/"):
            environment = _make_atari(env_id, render_mode)
        else:
            environment = gymnasium.make(env_id, render_mode=render_mode, disable_env_checker=True)
    except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
        raise UsageError(f"--env-id {printable(env_id)} needs a package: {_installation(env_id, error)}") from None
    except (gymnasium.error.Error, ValueError) as error:
        reason = printable(str(error).partition(". ")[0], 120)
        raise UsageError(f"--env-id {printable(env_id)}: {reason}; {_suggestion(env_id)}") from None
    actions, observations = environment.action_space, environment.observation_space
    if isinstance(actions, Discrete) and actions.start == 0:
        kind = DISCRETE
    elif isinstance(actions, Box) and len(actions.shape) == 1 and actions.is_bounded():
        kind = CONTINUOUS
    else:
        choice = f"choose one with {DISCRETE}, or bounded {CONTINUOUS}"
        raise UsageError(f"--env-id {env_id} has actions {printable(actions)}, which no agent here can take: {choice}")
    shape = observations.shape or () if isinstance(observations, Box) else ()
    frames = len(shape) == 3 and min(shape[1:]) >= 36 and observations.dtype == np.uint8
    needed = (kind, FRAMES) if frames else (kind,)
    if kind not in kinds:
        other = f"an environment with {' or '.join(each for each in kinds if each != FRAMES)}"
        raise UsageError(f"--env-id {env_id} has actions {printable(actions)}: {_advice(needed, other)}")
    if len(shape) != 1 and not (frames and FRAMES in kinds):
        other = f"one with a flat Box, like {'CartPole-v1' if kind == DISCRETE else 'Pendulum-v1'}"
        advice = _advice(needed, other) if frames else f"choose {other}"
        raise UsageError(f"--env-id {env_id} has observations {printable(observations)}: {advice}")
    return environment


def seen(observations: Any, space: Space[Any]) -> Observations:
    """Observations of `space` as agents see them."""
    return np.asarray(observations, seen_as(space))


def seen_as(space: Space[Any]) -> np.dtype[Any]:
    """What observations of `space` consist of for agents: frames of bytes, as they are, and all else of float32."""
    return BYTES if len(space.shape or ()) == 3 else FLOATS


def _make_atari(env_id: str, render_mode: str | None) -> Environment:
    """A game as deep Q-learning sees it: four frames of 84 x 84 grey pixels, (4, 84, 84) (Mnih et al., 2015)."""
    import ale_py
    from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # it greets
    gymnasium.register_envs(ale_py)
    game = gymnasium.make(env_id, render_mode=render_mode, disable_env_checker=True, frameskip=1)
    return FrameStackObservation(AtariPreprocessing(game), 4)


def _installation(env_id: str, error: Exception) -> str:
    """How to get what `env_id` lacks, by the extra of rlboard that has it or in Gymnasium's words."""
    extra = "atari" if env_id.startswith("ALE/") else str(error).rpartition("gymnasium[")[2].partition("]")[0]
    if extra in EXTRAS:
        return f'python -m pip install -e ".[{extra}]"'
    return printable(error, 200)


def _advice(kinds: Sequence[str], other: str) -> str:
    """What to do with an environment that has all these `kinds`: the agents that take it, or an `other` one."""
    takers = fitting(*kinds)
    return f"take {takers}, or {other}" if takers else f"choose {other}"


def _suggestion(env_id: str) -> str:
    known = [name for name in gymnasium.registry if "/" not in name and not name.startswith("GymV")]
    near = difflib.get_close_matches(env_id, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else "try CartPole-v1"


@contextmanager
def blamed(env_id: str) -> Iterator[None]:
    """Turns what an environment raises, or what its answers lead to, into a DataError that says where."""
    try:
        yield
    except RlboardError:
        raise
    except Exception as error:  # it is anybody's code
        last = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {printable(error, 200)}"
        raise DataError(
            f"--env-id {env_id}: its step failed: {what} ({Path(last.filename).name}:{last.lineno})"
        ) from error


def sizes(spaces: Environment | Environments) -> tuple[int, int]:
    """The size of flat observations and the number of actions, or the action size, of environments made here."""
    actions, observations = spaces.action_space, spaces.observation_space
    assert isinstance(observations, Box)
    if isinstance(actions, Discrete):
        return observations.shape[0], int(actions.n)
    assert isinstance(actions, Box)
    return observations.shape[0], actions.shape[0]


def evaluate(env_id: str, act: Act, episodes: int, seed: int) -> float:
    """The mean return of `episodes` episodes in a new environment, seeded apart from training."""
    return float(np.mean([score for score, _ in play_episodes(env_id, act, range(seed, seed + episodes))]))


def play_episodes(env_id: str, act: Act, seeds: Iterable[int]) -> Iterator[tuple[float, int]]:
    """The return and the length of one episode for each of `seeds`, all in one new environment."""
    environment = make_environment(env_id)
    with blamed(env_id):
        for seed in seeds:
            rewards = list(_episode(environment, act, seed))
            yield sum(rewards), len(rewards)
    environment.close()


class Evaluation(NamedTuple):
    """What an evaluation adds to an event."""

    scalars: dict[str, float]
    images: dict[str, Image]
    videos: dict[str, Video]


NOT_EVALUATED = Evaluation({}, {}, {})


def evaluation(env_id: str, act: Act, episodes: int, seed: int) -> Evaluation:
    """The mean return of `episodes` episodes, always the same ones, and the first of them in pictures and as a video.

    `act` is called when a picture is drawn, before the loop goes on.
    """
    return Evaluation(
        {"eval/mean_reward": evaluate(env_id, act, episodes, seed)},
        {"eval/episode": partial(contact_sheet, env_id, act, seed)},
        {"eval/video": partial(film, env_id, act, seed)},
    )


def passed(every: int, before: int, after: int) -> int:
    """How many multiples of `every` lie between two steps, the later one included."""
    return after // every - before // every


def contact_sheet(env_id: str, act: Act, seed: int) -> NDArray[np.uint8]:
    """One episode in six pictures, evenly spaced in two rows, the last one its end: (height, width, 3).

    It is played twice, because its length shows only at its end, and a picture costs as much as a hundred steps.
    """
    environment = make_environment(env_id, render_mode="rgb_array")
    last = sum(1 for _ in _episode(environment, act, seed)) - 1
    wanted = np.linspace(0, last, 6).round()
    drawn = {step: draw() for step, draw in enumerate(_frames(environment, act, seed)) if step in wanted}
    environment.close()
    first, second, third, fourth, fifth, sixth = (drawn.get(step, drawn[0]) for step in wanted)
    return np.concatenate([np.concatenate(row, axis=1) for row in ((first, second, third), (fourth, fifth, sixth))])


def film(env_id: str, act: Act, seed: int) -> tuple[float, Iterator[Image]]:
    """One episode as a video: its frames per second, and a frame for every step, (height, width, 3) each."""
    environment = make_environment(env_id, render_mode="rgb_array")
    frames_per_second = float(environment.metadata.get("render_fps") or 30)

    def frames() -> Iterator[Image]:
        try:
            yield from _frames(environment, act, seed)
        finally:
            environment.close()

    return frames_per_second, frames()


def _frames(environment: Environment, act: Act, seed: int) -> Iterator[Image]:
    """Plays one episode and yields, for each step, what draws it until the next is taken."""
    return (partial(_render, environment) for _ in _episode(environment, act, seed))


def _episode(environment: Environment, act: Act, seed: int) -> Iterator[float]:
    """Plays one episode and yields each step's reward."""
    observation, _ = environment.reset(seed=seed)
    ended = False
    while not ended:
        observation, reward, terminated, truncated, _ = environment.step(
            act(seen(observation, environment.observation_space))
        )
        yield float(reward)
        ended = terminated or truncated


def _render(environment: Environment) -> NDArray[np.uint8]:
    with _drawing:
        return np.asarray(environment.render(), np.uint8)
