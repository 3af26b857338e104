"""REINFORCE in machine code: the algorithm of `reinforce.py`, environment, policy, gradient and Adam, in one kernel.

Plain functions on arrays, which numba compiles into one kernel for each environment and hidden size; the sizes are
constants to it, so that loops over a layer become vector instructions. The dynamics are Gymnasium's, in float64; the
policy is in float32, as torch has it. What differs from the other engine are the random numbers alone.

The environments alone, stepped together for the agents whose policies stay in torch, are a kernel of their own; it
stands here because numba compiles a kernel anew when its file has changed, not when what it calls has.

The parameters of the policy lie in one vector, inputs before outputs: hidden weights (observation size, hidden size),
hidden biases, logit weights (actions, hidden size), logit biases.
"""

import math
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple, TypeVar

import gymnasium
import numba
import numpy as np
import torch
from numba.extending import overload
from numpy import float32, float64, uint64, uintp
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.profiler import record_function

from rlboard.config import printable
from rlboard.errors import UsageError

CARTPOLE, ACROBOT, MOUNTAIN_CAR, PENDULUM, CONTINUOUS_MOUNTAIN_CAR = range(5)
ENVIRONMENTS = {
    "gymnasium.envs.classic_control.cartpole:CartPoleEnv": (CARTPOLE, 4, 2),
    "gymnasium.envs.classic_control.acrobot:AcrobotEnv": (ACROBOT, 6, 3),
    "gymnasium.envs.classic_control.mountain_car:MountainCarEnv": (MOUNTAIN_CAR, 2, 3),
}
"""Gymnasium's entry point to the environment's number, its observation size and its number of actions."""
KNOWN = "CartPole-v1, Acrobot-v1 and MountainCar-v0"
NUMBERS = {entry_point: number for entry_point, (number, _, _) in ENVIRONMENTS.items()} | {
    "gymnasium.envs.classic_control.pendulum:PendulumEnv": PENDULUM,
    "gymnasium.envs.classic_control.continuous_mountain_car:Continuous_MountainCarEnv": CONTINUOUS_MOUNTAIN_CAR,
}
"""The same for all that `step_all` knows; those whose action is one float have no policy here."""
STEPPED = "CartPole-v1, Acrobot-v1, MountainCar-v0, Pendulum-v1 and MountainCarContinuous-v0"

# Sums may be reordered into vectors; NaN stays NaN, so that a loss that explodes is seen.
FAST = {"reassoc", "contract", "nsz", "arcp"}

Function = TypeVar("Function", bound=Callable[..., Any])
State = tuple[float, float, float, float]
Logits = tuple[Any, Any, Any]
Floats = NDArray[np.float32]


class Learner(NamedTuple):
    """All that the kernel reads and writes; it decides the future of a run.

    Attributes:
        random: state of the random numbers, (1,).
        parameters, gradients, first_moments, second_moments: (parameters,).
        updates: updates so far, (1,).
        observations: of the episode at hand, (longest episode + 1, observation size).
        actions: (longest episode + 1,).
        logit_gradients: the probabilities of the actions, then the gradient of the loss with respect to their logits,
            (longest episode + 1, actions).
        rewards, returns: (longest episode,).
    """

    random: NDArray[np.uint64]
    parameters: Floats
    gradients: Floats
    first_moments: Floats
    second_moments: Floats
    updates: NDArray[np.int64]
    observations: Floats
    actions: NDArray[np.int64]
    logit_gradients: Floats
    rewards: NDArray[np.float64]
    returns: Floats


class Worlds(NamedTuple):
    """All that `step_all` keeps between steps; the first four decide the future.

    Attributes:
        states: of the environments' own variables, (count, 4); those with two leave the others at zero.
        randoms: state of the random numbers, (count, 1).
        steps, scores: of the episodes at hand, (count,).
        actions: of the step at hand, (count,) int64 or float32.
        ended_scores, ended_lengths: of the episodes that the last step has ended, (count,), as many as it says.
    """

    states: NDArray[np.float64]
    randoms: NDArray[np.uint64]
    steps: NDArray[np.int64]
    scores: NDArray[np.float64]
    actions: NDArray[Any]
    ended_scores: NDArray[np.float64]
    ended_lengths: NDArray[np.int64]


LASTING = ("random", "parameters", "first_moments", "second_moments", "updates")
"""What of a learner decides the next episode; the rest is written before it is read."""


def inlined(function: Function) -> Function:
    """Makes `function` a part of the kernels; sizes that are constants to a kernel are constants in here too."""
    overload(function, jit_options={"forceinline": True}, prefer_literal=True, strict=False)(lambda *_: function)
    return function


@inlined
def uniform(random: NDArray[np.uint64]) -> float:
    """A number in [0, 1) of 53 random bits: SplitMix64 (Steele, Lea and Flood, 2014)."""
    random[0] += uint64(0x9E3779B97F4A7C15)
    bits = random[0]
    bits = (bits ^ (bits >> uint64(30))) * uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> uint64(27))) * uint64(0x94D049BB133111EB)
    return float64((bits ^ (bits >> uint64(31))) >> uint64(11)) * 2.0**-53


@inlined
def start(environment: int, random: NDArray[np.uint64]) -> State:
    """The state after a reset; environments of two variables leave the others at zero."""
    if environment in (MOUNTAIN_CAR, CONTINUOUS_MOUNTAIN_CAR):
        return 0.2 * uniform(random) - 0.6, 0.0, 0.0, 0.0
    if environment == PENDULUM:
        angle, velocity = 2.0 * uniform(random) - 1.0, 2.0 * uniform(random) - 1.0
        return math.pi * angle, velocity, 0.0, 0.0
    first, second = 0.2 * uniform(random) - 0.1, 0.2 * uniform(random) - 0.1
    third, fourth = 0.2 * uniform(random) - 0.1, 0.2 * uniform(random) - 0.1
    scale = 0.5 if environment == CARTPOLE else 1.0
    return scale * first, scale * second, scale * third, scale * fourth


@inlined
def observe(environment: int, state: State, observation: Floats) -> None:
    """Writes what the policy sees of `state` to `observation`."""
    first, second, third, fourth = state
    if environment == CARTPOLE:
        observation[0], observation[1], observation[2], observation[3] = first, second, third, fourth
    elif environment == ACROBOT:
        observation[0], observation[1] = math.cos(first), math.sin(first)
        observation[2], observation[3] = math.cos(second), math.sin(second)
        observation[4], observation[5] = third, fourth
    elif environment == PENDULUM:
        observation[0], observation[1], observation[2] = math.cos(first), math.sin(first), second
    else:
        observation[0], observation[1] = first, second


@inlined
def advance(environment: int, state: State, action: Any) -> tuple[State, float, bool]:
    """The next state, the reward, and whether the episode is terminated, by a number of an action or a float32."""
    if environment == CARTPOLE:
        return advance_cartpole(state, action)
    if environment == ACROBOT:
        return advance_acrobot(state, action)
    if environment == MOUNTAIN_CAR:
        return advance_mountain_car(state, action)
    if environment == PENDULUM:
        return advance_pendulum(state, action)
    return advance_continuous_mountain_car(state, action)


@inlined
def advance_cartpole(state: State, action: int) -> tuple[State, float, bool]:
    """Barto, Sutton and Anderson (1983), by Euler steps of 0.02 s."""
    x, x_dot, theta, theta_dot = state
    force = 10.0 if action == 1 else -10.0
    cos, sin = math.cos(theta), math.sin(theta)
    push = (force + 0.05 * theta_dot * theta_dot * sin) / 1.1
    theta_acceleration = (9.8 * sin - cos * push) / (0.5 * (4.0 / 3.0 - 0.1 * cos * cos / 1.1))
    x_acceleration = push - 0.05 * theta_acceleration * cos / 1.1
    x, x_dot = x + 0.02 * x_dot, x_dot + 0.02 * x_acceleration
    theta, theta_dot = theta + 0.02 * theta_dot, theta_dot + 0.02 * theta_acceleration
    limit = 12 * 2 * math.pi / 360
    return (x, x_dot, theta, theta_dot), 1.0, x < -2.4 or x > 2.4 or theta < -limit or theta > limit


@inlined
def advance_acrobot(state: State, action: int) -> tuple[State, float, bool]:
    """Sutton (1996), by one Runge-Kutta step of 0.2 s."""
    torque = action - 1.0
    k1 = acrobot_derivative(state, torque)
    k2 = acrobot_derivative(along(state, k1, 0.1), torque)
    k3 = acrobot_derivative(along(state, k2, 0.1), torque)
    k4 = acrobot_derivative(along(state, k3, 0.2), torque)
    first, second, third, fourth = along(along(along(along(state, k1, 0.2 / 6), k2, 0.4 / 6), k3, 0.4 / 6), k4, 0.2 / 6)
    first, second = wrapped(first), wrapped(second)
    third = min(max(third, -4 * math.pi), 4 * math.pi)
    fourth = min(max(fourth, -9 * math.pi), 9 * math.pi)
    terminated = -math.cos(first) - math.cos(second + first) > 1.0
    return (first, second, third, fourth), 0.0 if terminated else -1.0, terminated


@inlined
def acrobot_derivative(state: State, torque: float) -> State:
    """Equations of motion of two links of mass, length and moment of inertia 1, centres of mass in their middle."""
    first, second, first_dot, second_dot = state
    cos, sin = math.cos(second), math.sin(second)
    d1 = 0.25 + (1.0 + 0.25 + cos) + 2.0
    d2 = 0.25 + 0.5 * cos + 1.0
    phi2 = 0.5 * 9.8 * math.sin(first + second)
    phi1 = -0.5 * second_dot * second_dot * sin - second_dot * first_dot * sin + 1.5 * 9.8 * math.sin(first) + phi2
    second_acceleration = (torque + d2 / d1 * phi1 - 0.5 * first_dot * first_dot * sin - phi2) / (
        0.25 + 1.0 - d2 * d2 / d1
    )
    return first_dot, second_dot, -(d2 * second_acceleration + phi1) / d1, second_acceleration


@inlined
def along(state: State, slope: State, time_step: float) -> State:
    return (
        state[0] + time_step * slope[0],
        state[1] + time_step * slope[1],
        state[2] + time_step * slope[2],
        state[3] + time_step * slope[3],
    )


@inlined
def wrapped(angle: float) -> float:
    """The same angle in [-pi, pi]."""
    while angle > math.pi:
        angle -= 2 * math.pi
    while angle < -math.pi:
        angle += 2 * math.pi
    return angle


@inlined
def advance_mountain_car(state: State, action: int) -> tuple[State, float, bool]:
    """Moore (1990)."""
    position, velocity = driven(state, (action - 1) * 0.001)
    return (position, velocity, 0.0, 0.0), -1.0, position >= 0.5 and velocity >= 0.0


@inlined
def advance_continuous_mountain_car(state: State, action: float32) -> tuple[State, float, bool]:
    """The same with any force; Gymnasium rounds the state of this one, and of no other, to single precision."""
    force = min(max(float64(action), -1.0), 1.0)
    position, velocity = driven(state, 0.0015 * force)
    terminated = position >= 0.45 and velocity >= 0.0
    reward = (100.0 if terminated else 0.0) - 0.1 * float64(action) * float64(action)
    return (position, velocity, 0.0, 0.0), reward, terminated


@inlined
def driven(state: State, acceleration: float) -> tuple[float, float]:
    """The position and the velocity of a car in the valley."""
    position, velocity, _, _ = state
    velocity += acceleration - math.cos(3 * position) * 0.0025
    velocity = min(max(velocity, -0.07), 0.07)
    position = min(max(position + velocity, -1.2), 0.6)
    if position == -1.2 and velocity < 0:
        velocity = 0.0
    return position, velocity


@inlined
def advance_pendulum(state: State, action: float32) -> tuple[State, float, bool]:
    """A rod of mass and length 1, swung up; it never terminates. Torques are in single precision, as Gymnasium's."""
    angle, velocity, _, _ = state
    torque = min(max(action, float32(-2)), float32(2))
    upright = (angle + math.pi) % (2 * math.pi) - math.pi
    cost = upright * upright + 0.1 * velocity * velocity + float64(float32(0.001) * (torque * torque))
    velocity += (15.0 * math.sin(angle) + float64(float32(3) * torque)) * 0.05
    velocity = min(max(velocity, -8.0), 8.0)
    return (angle + 0.05 * velocity, velocity, 0.0, 0.0), -cost, False


@inlined
def logits_of(parameters: Floats, observation: Floats, size: int, hidden: int, actions: int) -> Logits:
    """The logits of the actions; a third one that is not there is zero."""
    # Written out for 2, 4 or 6 inputs and 2 or 3 actions: a loop over so few would hide the loop over the units.
    # Unsigned, because numba takes a signed index for one that may count from the end, and then nothing is a vector.
    row1, row2, row3, row4, row5 = rows(hidden)
    bias, out = uintp(size * hidden), uintp((size + 1) * hidden)
    biases = out + uintp(actions * hidden)
    o0, o1 = observation[0], observation[1]
    if size > 2:
        o2, o3 = observation[2], observation[3]
    if size > 4:
        o4, o5 = observation[4], observation[5]
    first = second = third = float32(0)
    for number in range(hidden):
        unit = uintp(number)
        value = parameters[bias + unit] + parameters[unit] * o0 + parameters[row1 + unit] * o1
        if size > 2:
            value += parameters[row2 + unit] * o2 + parameters[row3 + unit] * o3
        if size > 4:
            value += parameters[row4 + unit] * o4 + parameters[row5 + unit] * o5
        value = max(value, float32(0))
        first += value * parameters[out + unit]
        second += value * parameters[out + row1 + unit]
        if actions > 2:
            third += value * parameters[out + row2 + unit]
    first, second = first + parameters[biases], second + parameters[biases + uintp(1)]
    if actions > 2:
        third += parameters[biases + uintp(2)]
    return first, second, third


@inlined
def rows(hidden: int) -> tuple[Any, Any, Any, Any, Any]:
    """Where the second to sixth row of a matrix of `hidden` columns begins."""
    return uintp(hidden), uintp(2 * hidden), uintp(3 * hidden), uintp(4 * hidden), uintp(5 * hidden)


@inlined
def play(
    environment: int, size: int, hidden: int, actions: int, learner: Learner, longest: int, greedy: bool
) -> tuple[int, float]:
    """Plays an episode until it is terminated or truncated; returns its steps and the sum of its rewards."""
    state = start(environment, learner.random)
    step, score, terminated = 0, 0.0, False
    while not terminated and step < longest:
        observe(environment, state, learner.observations[step])
        first, second, third = logits_of(learner.parameters, learner.observations[step], size, hidden, actions)
        if actions == 2:
            p1: Any = float32(1) / (float32(1) + math.exp(first - second))
            p0: Any = float32(1) - p1
            p2: Any = float32(0)
        else:
            largest = max(first, second, third)
            p0, p1, p2 = math.exp(first - largest), math.exp(second - largest), math.exp(third - largest)
            total = p0 + p1 + p2
            p0, p1, p2 = p0 / total, p1 / total, p2 / total
            learner.logit_gradients[step, 2] = p2
        learner.logit_gradients[step, 0], learner.logit_gradients[step, 1] = p0, p1
        if greedy:
            action = 2 if p2 > p0 and p2 > p1 else 1 if p1 > p0 else 0
        else:
            draw = uniform(learner.random)
            action = 1 if draw < p1 else 0 if draw < p1 + p0 or actions == 2 else 2
        learner.actions[step] = action
        state, reward, terminated = advance(environment, state, action)
        learner.rewards[step] = reward
        score += reward
        step += 1
    return step, score


@inlined
def discount(learner: Learner, steps: int, gamma: float) -> None:
    """G_t = r_t + gamma G_{t+1} for every step t of the episode."""
    following = 0.0
    for step in range(steps - 1, -1, -1):
        following = learner.rewards[step] + gamma * following
        learner.returns[step] = following


@inlined
def look_back(size: int, hidden: int, actions: int, learner: Learner, steps: int) -> tuple[float, float]:
    """The loss -sum_t G_t log pi(a_t | s_t) of the episode and the mean entropy of the policy in it."""
    loss = entropy = 0.0
    for step in range(steps):
        first, second, third = logits_of(learner.parameters, learner.observations[step], size, hidden, actions)
        if actions == 2:
            third = -np.inf
        largest = max(first, second, third)
        e0, e1, e2 = math.exp(first - largest), math.exp(second - largest), math.exp(third - largest)
        total = e0 + e1 + e2
        normaliser = largest + math.log(total)
        weighted = e0 * first + e1 * second + (e2 * third if actions > 2 else 0.0)
        taken = first if learner.actions[step] == 0 else second if learner.actions[step] == 1 else third
        loss -= learner.returns[step] * (taken - normaliser)
        entropy += normaliser - weighted / total
    return loss, entropy / steps


@inlined
def differentiate(size: int, hidden: int, actions: int, learner: Learner, steps: int) -> None:
    """The gradient of the loss -sum_t G_t log pi(a_t | s_t) with respect to the parameters.

    That with respect to the logits of a step is G_t (pi - 1[a_t]). It sums to zero over the actions, so the first
    action's share follows from the others'. Two steps are taken at once, which halves the traffic with memory.
    """
    parameters, gradients = learner.parameters, learner.gradients
    observations, by_logit = learner.observations, learner.logit_gradients
    row1, row2, row3, row4, row5 = rows(hidden)
    bias, out = uintp(size * hidden), uintp((size + 1) * hidden)
    biases = (size + 1 + actions) * hidden
    gradients[:] = float32(0)
    for step in range(steps):
        by_logit[step, learner.actions[step]] -= float32(1)
        for action in range(actions):
            by_logit[step, action] *= learner.returns[step]
            gradients[biases + action] += by_logit[step, action]
    by_logit[steps] = float32(0)
    for step in range(0, steps, 2):
        o0, o1 = observations[step, 0], observations[step, 1]
        q0, q1 = observations[step + 1, 0], observations[step + 1, 1]
        if size > 2:
            o2, o3 = observations[step, 2], observations[step, 3]
            q2, q3 = observations[step + 1, 2], observations[step + 1, 3]
        if size > 4:
            o4, o5 = observations[step, 4], observations[step, 5]
            q4, q5 = observations[step + 1, 4], observations[step + 1, 5]
        d1, e1 = by_logit[step, 1], by_logit[step + 1, 1]
        if actions > 2:
            d2, e2 = by_logit[step, 2], by_logit[step + 1, 2]
        for number in range(hidden):
            unit = uintp(number)
            value = parameters[bias + unit] + parameters[unit] * o0 + parameters[row1 + unit] * o1
            other = parameters[bias + unit] + parameters[unit] * q0 + parameters[row1 + unit] * q1
            if size > 2:
                value += parameters[row2 + unit] * o2 + parameters[row3 + unit] * o3
                other += parameters[row2 + unit] * q2 + parameters[row3 + unit] * q3
            if size > 4:
                value += parameters[row4 + unit] * o4 + parameters[row5 + unit] * o5
                other += parameters[row4 + unit] * q4 + parameters[row5 + unit] * q5
            weight = parameters[out + row1 + unit] - parameters[out + unit]
            delta, epsilon = d1 * weight, e1 * weight
            gradients[out + row1 + unit] += d1 * max(value, float32(0)) + e1 * max(other, float32(0))
            if actions > 2:
                weight = parameters[out + row2 + unit] - parameters[out + unit]
                delta += d2 * weight
                epsilon += e2 * weight
                gradients[out + row2 + unit] += d2 * max(value, float32(0)) + e2 * max(other, float32(0))
            delta = delta if value > float32(0) else float32(0)
            epsilon = epsilon if other > float32(0) else float32(0)
            gradients[bias + unit] += delta + epsilon
            gradients[unit] += delta * o0 + epsilon * q0
            gradients[row1 + unit] += delta * o1 + epsilon * q1
            if size > 2:
                gradients[row2 + unit] += delta * o2 + epsilon * q2
                gradients[row3 + unit] += delta * o3 + epsilon * q3
            if size > 4:
                gradients[row4 + unit] += delta * o4 + epsilon * q4
                gradients[row5 + unit] += delta * o5 + epsilon * q5
    for number in range(hidden):
        unit = uintp(number)
        gradients[out + unit] = -gradients[out + row1 + unit]
        if actions > 2:
            gradients[out + unit] -= gradients[out + row2 + unit]


@inlined
def adam(learner: Learner, learning_rate: float) -> None:
    """One step of Adam (Kingma and Ba, 2015) with torch's defaults."""
    learner.updates[0] += 1
    step_size = float32(learning_rate / (1 - 0.9 ** learner.updates[0]))
    scale = float32(1 / math.sqrt(1 - 0.999 ** learner.updates[0]))
    for index in range(len(learner.parameters)):
        gradient = learner.gradients[index]
        first = learner.first_moments[index] + float32(0.1) * (gradient - learner.first_moments[index])
        second = float32(0.999) * learner.second_moments[index] + float32(0.001) * gradient * gradient
        learner.first_moments[index], learner.second_moments[index] = first, second
        learner.parameters[index] -= step_size * first / (math.sqrt(second) * scale + float32(1e-8))


@inlined
def run(
    environment: int,
    size: int,
    hidden: int,
    actions: int,
    learner: Learner,
    scores: NDArray[np.float64],
    lengths: NDArray[np.int64],
    learning_rate: float,
    gamma: float,
    greedy: bool,
) -> tuple[float, float]:
    """Plays an episode for each entry of `scores` and `lengths`, and learns from each unless `greedy`.

    Returns the loss and the mean entropy of the last episode.
    """
    loss = entropy = 0.0
    for episode in range(len(scores)):
        steps, score = play(environment, size, hidden, actions, learner, len(learner.rewards), greedy)
        scores[episode], lengths[episode] = score, steps
        if greedy:
            continue
        discount(learner, steps, gamma)
        if episode == len(scores) - 1:
            loss, entropy = look_back(size, hidden, actions, learner, steps)
        differentiate(size, hidden, actions, learner, steps)
        adam(learner, learning_rate)
    return loss, entropy


@inlined
def step_all(environment: int, worlds: Worlds, longest: int, outputs: tuple[Any, ...]) -> int:
    """A step of every environment, and the next episode's reset where one has ended; returns how many have.

    An episode is truncated after `longest` steps. `outputs` are the fields of `_vector.Step`, and are written to.
    """
    observations, rewards, terminated, truncated, finals = outputs
    states, randoms, steps, scores = worlds.states, worlds.randoms, worlds.steps, worlds.scores
    ended = 0
    for number in range(len(steps)):
        state = states[number, 0], states[number, 1], states[number, 2], states[number, 3]
        state, reward, end = advance(environment, state, worlds.actions[number])
        steps[number] += 1
        scores[number] += reward
        cut = not end and steps[number] >= longest
        rewards[number], terminated[number], truncated[number] = reward, end, cut
        observe(environment, state, finals[number])
        for index in range(observations.shape[1]):
            observations[number, index] = finals[number, index]
        if end or cut:
            worlds.ended_scores[ended], worlds.ended_lengths[ended] = scores[number], steps[number]
            ended += 1
            steps[number], scores[number] = 0, 0.0
            state = start(environment, randoms[number])
            observe(environment, state, observations[number])
        states[number, 0], states[number, 1], states[number, 2], states[number, 3] = state
    return ended


@cache  # one for each environment and hidden size in a process
def kernel(environment: int, size: int, hidden: int, actions: int) -> Any:
    """`run` for these sizes; `CompiledEngine.prepare` compiles it, or reads it from numba's cache.

    Raises:
        RuntimeError: there is no place for numba's cache, or numba is switched off.
    """
    check_numba()

    def learn(learner, scores, lengths, learning_rate, gamma, greedy):  # type: ignore[no-untyped-def]
        return run(environment, size, hidden, actions, learner, scores, lengths, learning_rate, gamma, greedy)

    return numba.njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")(learn)


@cache
def stepper(environment: int) -> Any:
    """`step_all` for this environment, which is still to be compiled.

    Raises:
        RuntimeError: as `kernel`.
    """
    check_numba()

    def step(worlds, longest, outputs):  # type: ignore[no-untyped-def]
        return step_all(environment, worlds, longest, outputs)

    return numba.njit(cache=True, error_model="numpy")(step)


def check_numba() -> None:
    """Raises RuntimeError where numba is switched off."""
    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
        raise RuntimeError("NUMBA_DISABLE_JIT is set")


def prepare(kernel: Any, *arguments: Any) -> tuple[Any, str]:
    """Compiles the kernel for such arguments, or reads it from numba's cache.

    Returns:
        What is called with such arguments and no others, and how long it took where it was compiled.
    """
    began, misses = time.perf_counter(), sum(kernel.stats.cache_misses.values())
    function = kernel.compile(tuple(map(numba.typeof, arguments)))
    if sum(kernel.stats.cache_misses.values()) == misses:
        return function, ""
    seconds = time.perf_counter() - began
    return function, f"compiled in {seconds:.1f} s; later runs on this machine read it from numba's cache"


class CompiledEngine:
    """REINFORCE on a known environment, in a kernel.

    The parameters of `policy` are moved into the memory of the kernel, so that they follow every update.

    Raises:
        UsageError: the environment is not known, or the policy is not on the CPU.
        RuntimeError: numba has no place for its cache, or is switched off.
    """

    name, threads = "compiled", True

    def __init__(self, env_id: str, policy: nn.Module, learning_rate: float, gamma: float, seed: int) -> None:
        parameters = list(policy.parameters())
        spec = gymnasium.spec(env_id)
        if spec.entry_point not in ENVIRONMENTS or spec.kwargs or spec.additional_wrappers:
            raise UsageError(f"--engine compiled knows {KNOWN}, not {printable(env_id)}: use --engine gym")
        if parameters[0].device.type != "cpu":
            raise UsageError(f"--engine compiled runs on the CPU, not on {parameters[0].device}: use --engine gym")
        environment, self._size, self._actions = ENVIRONMENTS[spec.entry_point]
        self._hidden = parameters[0].shape[0]
        self._kernel = kernel(environment, self._size, self._hidden, self._actions)
        self._learner = blank(self._size, self._hidden, self._actions, int(spec.max_episode_steps or 0), seed)
        self._parameters, self._learning_rate, self._gamma, self._seed = parameters, learning_rate, gamma, seed
        self._gradients = self._views(self._learner.gradients)  # the parameters have none before the first update
        for parameter, values in zip(parameters, self._views(self._learner.parameters), strict=True):
            values.copy_(parameter.detach())
            parameter.data = values

    def prepare(self) -> str:
        """Compiles the kernel, or reads it from numba's cache; says how long it took where it was compiled."""
        return prepare(self._kernel, self._learner, np.empty(0), np.empty(0, np.int64), 0.0, 0.0, False)[1]

    def learn(self, episodes: int) -> tuple[list[float], list[int], float, float]:
        """Plays `episodes` episodes and learns from each; see `GymEngine.learn`."""
        with record_function("learn"):
            scores, lengths, loss, entropy = self._run(self._learner, episodes, greedy=False)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return scores.tolist(), lengths.tolist(), loss, entropy

    def evaluate(self, episodes: int) -> float:
        """The mean return of `episodes` greedy episodes; the same ones each time, seeded apart from training."""
        learner = self._learner._replace(random=random_state(self._seed, 1))
        scores, *_ = self._run(learner, episodes, greedy=True)
        return float(scores.mean())

    def state(self) -> dict[str, Any]:
        """Everything that decides the next episode, copied."""
        return {name: torch.from_numpy(getattr(self._learner, name).copy()) for name in LASTING}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes back to what `state` has returned."""
        for name in LASTING:
            getattr(self._learner, name)[:] = state[name].numpy()

    def _run(
        self, learner: Learner, episodes: int, greedy: bool
    ) -> tuple[NDArray[np.float64], NDArray[np.int64], float, float]:
        scores, lengths = np.empty(episodes), np.empty(episodes, np.int64)
        loss, entropy = self._kernel(learner, scores, lengths, self._learning_rate, self._gamma, greedy)
        return scores, lengths, loss, entropy

    def _views(self, vector: Floats) -> tuple[Tensor, ...]:
        """A vector of the kernel in the shapes of the policy's parameters."""
        size, hidden, actions = self._size, self._hidden, self._actions
        w_hidden, b_hidden, w_logits, b_logits = torch.split(
            torch.from_numpy(vector), [size * hidden, hidden, actions * hidden, actions]
        )
        return w_hidden.view(size, hidden).T, b_hidden, w_logits.view(actions, hidden), b_logits


def blank(size: int, hidden: int, actions: int, longest: int, seed: int = 0) -> Learner:
    """A learner of zeros, whose episodes take at most `longest` steps."""
    parameters, gradients, first_moments, second_moments = vectors(4, (size + 1) * hidden + (hidden + 1) * actions)
    return Learner(
        random=random_state(seed),
        parameters=parameters,
        gradients=gradients,
        first_moments=first_moments,
        second_moments=second_moments,
        updates=np.zeros(1, np.int64),
        observations=np.zeros((longest + 1, size), np.float32),
        actions=np.zeros(longest + 1, np.int64),
        logit_gradients=np.zeros((longest + 1, actions), np.float32),
        rewards=np.zeros(longest),
        returns=np.zeros(longest, np.float32),
    )


def vectors(count: int, length: int) -> list[Floats]:
    """Vectors of zeros that begin on a cache line, at distances at which none is in the way of another.

    Where addresses agree in their last 12 bits, a processor takes a load for one of what it has just stored elsewhere,
    and waits. Rows of the kernel are multiples of 512 bytes; 384 more between vectors made its gradient 1.5 times as
    fast.
    """
    distance = -(-length // 1024) * 1024 + 96
    memory = np.zeros(count * distance + 16, np.float32)
    first = -memory.ctypes.data // 4 % 16
    return [memory[start : start + length] for start in range(first, first + count * distance, distance)]


def random_state(*seed: int) -> NDArray[np.uint64]:
    """The first state of `uniform`'s numbers; unlike seeds give unrelated ones."""
    return np.random.SeedSequence(seed).generate_state(1, np.uint64).astype(np.uint64)
