"""Gymnasium environments, made, checked, evaluated and drawn: what every agent needs and none is about."""

from __future__ import annotations

import difflib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete
from numpy.typing import NDArray

from rlboard.config import printable
from rlboard.errors import UsageError
from rlboard.events import Image

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # pygame greets on standard output
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # frames are drawn in memory: no display is asked for

_drawing = threading.Lock()  # pygame is not made for seeds that draw side by side

Environment = gymnasium.Env[Any, Any]
Act = Callable[[NDArray[np.float32]], int | np.intp]
"""A policy as evaluation sees it: an observation, (observation size,), to the number of an action."""


def check_environment(env_id: str) -> None:
    """Raises UsageError, with the nearest known names, where no agent of this folder can use `env_id`."""
    make_environment(env_id).close()


def make_environment(env_id: str, render_mode: str | None = None) -> Environment:
    """The environment `env_id`, with discrete actions and observations of shape (observation size,).

    Raises:
        UsageError: it is unknown, a package it needs is missing, or its spaces are others.
    """
    try:
        environment = gymnasium.make(env_id, render_mode=render_mode, disable_env_checker=True)
    except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
        raise UsageError(f"--env-id {printable(env_id)} needs a package: {printable(error, 200)}") from None
    except (gymnasium.error.Error, ValueError) as error:
        reason = printable(str(error).partition(". ")[0], 120)
        raise UsageError(f"--env-id {printable(env_id)}: {reason}; {_suggestion(env_id)}") from None
    actions, observations = environment.action_space, environment.observation_space
    if not isinstance(actions, Discrete) or actions.start != 0:
        raise UsageError(f"--env-id {env_id} has actions {actions}: choose one with discrete actions, like CartPole-v1")
    if not isinstance(observations, Box) or len(observations.shape) != 1:
        raise UsageError(
            f"--env-id {env_id} has observations {printable(observations)}: "
            "choose one with a flat Box, like CartPole-v1"
        )
    return environment


def _suggestion(env_id: str) -> str:
    known = [name for name in gymnasium.registry if "/" not in name and not name.startswith("GymV")]
    near = difflib.get_close_matches(env_id, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else "try CartPole-v1"


def sizes(environment: Environment) -> tuple[int, int]:
    """The observation size and the number of actions of an environment made here."""
    actions, observations = environment.action_space, environment.observation_space
    assert isinstance(actions, Discrete)
    assert isinstance(observations, Box)
    return observations.shape[0], int(actions.n)


def evaluate(env_id: str, act: Act, episodes: int, seed: int) -> float:
    """The mean return of `episodes` episodes in a new environment, seeded apart from training."""
    return float(np.mean([score for score, _ in play_episodes(env_id, act, range(seed, seed + episodes))]))


def play_episodes(env_id: str, act: Act, seeds: Iterable[int]) -> Iterator[tuple[float, int]]:
    """The return and the length of one episode for each of `seeds`, all in one new environment."""
    environment = make_environment(env_id)
    for seed in seeds:
        rewards = list(_episode(environment, act, seed))
        yield sum(rewards), len(rewards)
    environment.close()


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
        observation, reward, terminated, truncated, _ = environment.step(act(np.asarray(observation, np.float32)))
        yield float(reward)
        ended = terminated or truncated


def _render(environment: Environment) -> NDArray[np.uint8]:
    with _drawing:
        return np.asarray(environment.render(), np.uint8)
