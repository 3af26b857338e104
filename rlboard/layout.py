"""The Custom Scalars dashboards of the loops, as data.

TensorBoard reads the tags of a chart as regular expressions that match from the start, so that a bare `Loss/train`
draws `Loss/train_step` as well: `exactly` and `below` anchor and escape them. A margin chart takes its three tags
literally.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlboard.registry import Loop

Chart = tuple[str, list[str]]
"""What `SummaryWriter.add_custom_scalars` takes: ("Multiline", patterns) or ("Margin", [value, lower, upper])."""
Layout = Mapping[str, Mapping[str, Chart]]
"""Category to title to chart."""


def exactly(*tags: str) -> Chart:
    """One chart with one line for each of `tags`."""
    return "Multiline", [f"^{re.escape(tag)}$" for tag in tags]


def below(prefix: str) -> Chart:
    """One chart with a line for every tag that begins with `prefix`."""
    return "Multiline", [f"^{re.escape(prefix)}"]


def margin(value: str, lower: str, upper: str) -> Chart:
    """A line with a band around it."""
    return "Margin", [value, lower, upper]


def seed_bands(tag: str) -> Layout:
    """The dashboard of a group of seeds: what `tag` is on average, with its 95 % interval."""
    return {
        "Seeds": {
            f"{tag}, mean": margin(f"{tag}/mean", f"{tag}/lower", f"{tag}/upper"),
            f"{tag}, interquartile mean": margin(f"{tag}/iqm", f"{tag}/iqm_lower", f"{tag}/iqm_upper"),
        }
    }


def agent(training: Mapping[str, Chart] | None = None, more: Layout | None = None) -> Layout:
    """The dashboard of an agent: what all have, its own charts of `training`, and `more` categories."""
    return {
        "Reward": {
            "mean reward": exactly("reward", "rollout/ep_rew_mean", "eval/mean_reward"),
            "best and worst of the last 100": margin("rollout/ep_rew_mean", "rollout/ep_rew_min", "rollout/ep_rew_max"),
            "episode length": exactly("rollout/ep_len_mean"),
        },
        "Training": {
            "loss": exactly("train/loss"),
            "entropy": exactly("train/entropy"),
            "gradient norm": exactly("train/grad_norm"),
            **(training or {}),
        },
        **(more or {}),
        "Time": {"steps per second": exactly("time/fps")},
    }


ACTOR_CRITIC = {
    "losses of policy and value": exactly("train/policy_loss", "train/value_loss"),
    "explained variance": exactly("train/explained_variance"),
    "deviation of the actions": exactly("train/std"),
    "learning rate": exactly("train/learning_rate"),
}
VALUES = {"mean Q value": exactly("train/q_mean"), "learning rate": exactly("train/learning_rate")}
REPLAY = {
    "Replay": {
        "transitions": exactly("replay/transitions"),
        "mean reward": exactly("replay/reward_mean"),
        "terminated, in percent": exactly("replay/terminated_percent"),
    }
}

LAYOUTS: Mapping[str, Layout] = {
    "agents": agent(),
    "agents/reinforce_baseline": agent(
        {
            "value loss": exactly("train/value_loss"),
            "explained variance": exactly("train/explained_variance"),
        }
    ),
    "agents/a2c": agent(ACTOR_CRITIC),
    "agents/ppo": agent(
        ACTOR_CRITIC
        | {
            "how far the policy has moved": exactly("train/approx_kl"),
            "clipped, and the range": exactly("train/clip_fraction", "train/clip_range"),
        }
    ),
    "agents/dqn": agent(
        VALUES | {"absolute TD error": exactly("train/td_error"), "epsilon": exactly("exploration/epsilon")}, REPLAY
    ),
    "agents/sac": agent(
        VALUES
        | {
            "losses of actor and critics": exactly("train/actor_loss", "train/critic_loss"),
            "temperature": exactly("train/temperature"),
        },
        REPLAY,
    ),
    "vision/train": {
        "Training Metrics": {
            "Loss": exactly("Loss/train", "Loss/val"),
            "Loss of single steps": exactly("Loss/train_step"),
            "Accuracy": exactly("Accuracy/train", "Accuracy/val"),
        },
        "Learning Rate": {"LR": exactly("Learning_Rate")},
        "Per-Class Accuracy": {"Accuracy by class": below("Accuracy/class_")},
        "Time": {"images per second": exactly("time/images_per_second")},
    },
    "vision/gan": {
        "GAN": {
            "Loss of both networks": exactly("Loss/generator", "Loss/discriminator"),
            "Gradient penalties": exactly("Penalty/r1", "Penalty/r2"),
        },
        "Quality": {
            "Distance to real images": exactly("Quality/feature_distance", "Quality/real_distance"),
            "Diversity, 1 as real images": exactly("Quality/diversity"),
        },
        "Time": {"images per second": exactly("time/images_per_second")},
    },
    "vision/embed": {
        "Features": {
            "Accuracy": exactly("Accuracy/knn", "Accuracy/val"),
            "Loss": exactly("Loss/train_step", "Loss/train"),
        },
        "Time": {"images per second": exactly("time/images_per_second")},
    },
    "vision/words": {
        "Words": {"Neighbours of the same kind": exactly("Accuracy/neighbours"), "Loss": exactly("Loss/train_step")},
    },
}
"""The dashboard of a loop, or of a track's loops that have none of their own, by its name."""


def layout_of(loop: Loop) -> Layout | None:
    """The dashboard of a loop, if it has one."""
    package = loop.track.package
    return LAYOUTS.get(f"{package}/{loop.name}") or LAYOUTS.get(package)
