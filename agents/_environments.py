"""Gymnasium environments, made, checked, evaluated and drawn: what every agent needs and none is about."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete
from numpy.typing import NDArray

from rlboard.config import printable
from rlboard.errors import UsageError

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # pygame greets on standard output
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # frames are drawn in memory: no display is asked for

Environment = gymnasium.Env[Any, Any]
Act = Callable[[NDArray[np.float32]], int]
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
    environment = make_environment(env_id)
    returns = [sum(reward for _, reward in _episode(environment, act, seed + n)) for n in range(episodes)]
    environment.close()
    return float(np.mean(returns))


def contact_sheet(env_id: str, act: Act, seed: int) -> NDArray[np.uint8]:
    """One episode in six pictures, evenly spaced in two rows, the last one its end: (height, width, 3).

    The length of an episode is known only at its end: pictures are taken every `stride` steps, and whenever there
    are too many, every other one is dropped and the stride doubled.
    """
    environment = make_environment(env_id, render_mode="rgb_array")
    pictures: list[NDArray[np.uint8]] = []
    stride, step = 1, -1
    for step, _ in _episode(environment, act, seed):
        if step % stride == 0:
            pictures.append(_render(environment))
            if len(pictures) == 12:
                pictures, stride = pictures[::2], 2 * stride
    if step % stride:
        pictures.append(_render(environment))
    environment.close()
    first, second, third, fourth, fifth, last = np.linspace(0, len(pictures) - 1, 6).round().astype(int)
    rows = ((first, second, third), (fourth, fifth, last))
    return np.concatenate([np.concatenate([pictures[index] for index in row], axis=1) for row in rows])


def _episode(environment: Environment, act: Act, seed: int) -> Iterator[tuple[int, float]]:
    """Plays one episode and yields each step's number and reward."""
    observation, _ = environment.reset(seed=seed)
    step, ended = 0, False
    while not ended:
        observation, reward, terminated, truncated, _ = environment.step(act(np.asarray(observation, np.float32)))
        yield step, float(reward)
        step, ended = step + 1, terminated or truncated


def _render(environment: Environment) -> NDArray[np.uint8]:
    return np.asarray(environment.render(), np.uint8)
