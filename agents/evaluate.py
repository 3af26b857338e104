"""Evaluates a finished run: plays episodes with what it has learned, and says how good that is and how surely.

    rlboard evaluate logs/REINFORCE/20261122-231707-seed1 --episodes 100 --greedy

The result is the mean return of the episodes with its 95 % bootstrap interval (B. Efron, "Bootstrap methods: another
look at the jackknife", Annals of Statistics 7, 1979): the middle 95 % of the means of as many returns drawn from those
seen, with replacement. It speaks of this one policy in new episodes; how much the training's own seed matters only
several runs can tell.

Any agent can be evaluated whose `Config` has an `env_id` and whose module has

    actor(config, weights, greedy, seed) -> a function from an observation, (observation size,), to an action

Nothing is trained here: `train` is only the name under which a loop is run.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from agents._environments import film, play_episodes
from rlboard.checkpoint import SavedRun, read_run
from rlboard.config import option, printable
from rlboard.errors import UsageError
from rlboard.events import Event
from rlboard.registry import TRACKS
from rlboard.statistics import interval


@dataclass(frozen=True)
class Config:
    run: str = option("", "directory of the run to evaluate, such as logs/REINFORCE/NAME", argument=True)
    episodes: int = option(100, "episodes to play", min=1, smoke=3)
    greedy: bool = option(False, "always take the most likely action; else the policy's sample")
    seed: int = option(0, "seed of the episodes and of the sampled actions", min=0)


def can_be_evaluated() -> list[str]:
    """The commands of the agents whose modules have an `actor`."""
    loops = (loop for track in TRACKS if track.package == __package__ for loop in track.loops())
    return [f"rlboard {loop.command}" for loop in loops if hasattr(loop.load(), "actor")]


def about(run: SavedRun) -> str:
    """Which policy is evaluated, in a line."""
    what = f"{run.directory}, {run.loop.name} on {run.config['env_id']} at step {run.step:,}"
    return printable(f"policy: {what}{'' if run.status == 'completed' else f', a run that was {run.status}'}", 300)


def train(config: Config) -> Iterator[Event]:
    """Evaluates, and yields an event at step 0 and one after every episode; the x axis counts episodes.

    The episodes of a seed are always the same ones, apart from those of any training.

    Raises:
        UsageError: there is no such run, or it is not an agent's that can be evaluated (before the first event).
        DataError: the run cannot be read (before the first event).
    """
    run = read_run(config.run)
    module = run.loop.load()
    if not hasattr(module, "actor"):
        raise UsageError(
            f"RUN {printable(run.directory, 200)} is of {run.loop.track.package}/{run.loop.name}, which has no policy: "
            f"give a run of {' or '.join(can_be_evaluated())}"
        )
    make_actor = partial(module.actor, module.Config(**run.config), run.weights, config.greedy, config.seed)
    env_id = str(run.config["env_id"])
    seeds: list[int] = np.random.SeedSequence(config.seed).generate_state(config.episodes).tolist()
    actor = make_actor()
    yield Event(0, config.episodes, notice=about(run))

    returns: list[float] = []
    steps = 0
    for episode, (score, length) in enumerate(play_episodes(env_id, actor, seeds), start=1):
        returns.append(score)
        steps += length
        scalars: dict[str, float] = {"episode/return": score, "episode/length": length}
        last = episode == config.episodes
        headline = message = ""
        if last or episode % 10 == 0:
            message = f"# of episode :{episode}, mean return : {np.mean(returns):.1f}"
            scalars["time/steps"] = steps
        if last:
            headline = "eval/mean_reward"
            lower, upper = interval(np.array(returns))
            scalars |= {
                "eval/mean_reward": float(np.mean(returns)),
                "eval/std_reward": float(np.std(returns)),
                "eval/lower": float(lower),
                "eval/upper": float(upper),
                "eval/min": min(returns),
                "eval/max": max(returns),
            }
        videos = {"eval/video": lambda: film(env_id, make_actor(), seeds[0])} if episode == 1 else {}
        yield Event(episode, config.episodes, scalars, headline, message, videos=videos)
