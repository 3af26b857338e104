"""What an agent of ours does, done by Stable-Baselines3 and by CleanRL with the same hyperparameters.

A peer takes the values of our options, trains in the working directory with the logging that its own users have, and
returns its final policy, greedy. What it cannot be given stands in `Given.differences`, for the name of its row. What
it does otherwise in any case does not: CleanRL's DQN takes the squared error and clips no gradients, where that of
Stable-Baselines3 and ours take the Huber loss and clip; its PPO takes a truncated episode for a terminated one.

CleanRL is written for Gymnasium 0.29, in whose vector environments an episode that ends is followed by the next within
the same step. Since 1.0 that takes a step of its own in which nothing happens, and what is known of an episode's end
has other names: `ppo.py` learns from transitions that never were and logs no return at all, `dqn.py` and
`sac_continuous_action.py` fail at the first truncation. `VectorEnvironments` gives them what they expect, and nothing
else is changed. CleanRL has no A2C, and its PPO for continuous actions always normalises, so that it is left out.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from unittest.mock import patch

import gymnasium
import torch

from agents._environments import Act, make_environment
from benchmarks._solved import run_script
from benchmarks.harness import ContenderError
from benchmarks.reinforce import linear
from rlboard.config import Value

Values = dict[str, Value]

NEUTRAL = {"compile", "device", "engine", "env_id", "eval_episodes", "eval_every", "log_every", "num_envs", "seed",
           "total_timesteps"}  # fmt: skip
"""Options that change nothing of what is learned, or that every peer has."""


class Given(NamedTuple):
    """What a peer is given: its own arguments, and what of our options they do not say, in words."""

    arguments: dict[str, Any]
    differences: list[str]


class Peer(Protocol):
    """Somebody else's implementation of our agents."""

    @property
    def name(self) -> str: ...

    def given(self, agent: str, values: Values) -> Given:
        """What it is given to do as our `agent`. Raises ContenderError where it cannot do anything like it."""
        ...

    def train(self, agent: str, values: Values) -> Act:
        """Trains to the end; returns the final policy's most likely or mean action."""
        ...

    def lines(self, agent: str) -> int | None:
        """Of the file that is the algorithm; None where there is no such file."""
        ...


class Asked(dict[str, Any]):
    """The values of our options, which notes those that are asked for."""

    def __init__(self, values: Values) -> None:
        super().__init__(values)
        self.taken = set(NEUTRAL)

    def __getitem__(self, name: str) -> Any:
        self.taken.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """As a dictionary's."""
        self.taken.add(name)
        return super().get(name, default)

    def left(self) -> list[str]:
        """The switches that are on, and all that has a value, of which nobody asked."""
        return [
            f"without {name}" if value is True else f"without {name} {value}"
            for name, value in self.items()
            if name not in self.taken and value is not False
        ]


@dataclass(frozen=True)
class StableBaselines3:
    """Stable-Baselines3 as it is installed, every parameter that is nothing of ours at its default."""

    name = "SB3"

    def given(self, agent: str, values: Values) -> Given:
        """See `Peer`."""
        if agent not in {"a2c", "dqn", "ppo", "sac"}:
            raise ContenderError(f"Stable-Baselines3 has no {agent}")
        asked = Asked(values)
        annealed = linear if asked.get("anneal") else lambda value: value
        arguments: dict[str, Any] = {
            "gamma": asked["gamma"],
            "learning_rate": annealed(asked["learning_rate"]),
            "policy_kwargs": {"net_arch": [asked["hidden_size"]] * 2},
            "seed": asked["seed"],
        }
        if agent in {"a2c", "ppo"}:
            arguments |= {name: asked[name] for name in ("n_steps", "gae_lambda", "max_grad_norm")}
            arguments |= {"ent_coef": asked["entropy_coefficient"], "vf_coef": asked["value_coefficient"]}
            asked.taken |= {"normalize_observations", "normalize_rewards"}  # by `train`
        if agent in {"dqn", "sac"}:
            arguments |= {name: asked[name] for name in ("buffer_size", "learning_starts", "gradient_steps")}
            arguments["train_freq"] = max(1, asked["train_every"] // asked["num_envs"])  # of all environments together
        if agent in {"dqn", "ppo", "sac"}:
            arguments["batch_size"] = asked["batch_size"]
        match agent:
            case "a2c":
                arguments["use_rms_prop"] = asked["optimizer"] == "rmsprop"
                asked.taken |= {"baseline"} if values["baseline"] else set()
            case "ppo":
                arguments |= {"n_epochs": asked["n_epochs"], "clip_range": annealed(asked["clip_range"])}
            case "dqn":
                arguments |= {
                    "target_update_interval": asked["target_every"],
                    "exploration_fraction": min(1, asked["exploration_steps"] / asked["total_timesteps"]),
                    "exploration_final_eps": asked["exploration_final"],
                    "max_grad_norm": asked["max_grad_norm"],
                    "n_steps": asked["n_steps"],
                }
            case "sac":
                arguments["tau"] = asked["tau"]
        return Given(arguments, asked.left())

    def train(self, agent: str, values: Values) -> Act:
        """See `Peer`."""
        import stable_baselines3
        from stable_baselines3.common.env_util import make_vec_env
        from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
        from stable_baselines3.common.vec_env import VecNormalize

        arguments = self.given(agent, values).arguments
        environments: Any = make_vec_env(
            str(values["env_id"]), n_envs=int(values["num_envs"]), seed=int(values["seed"])
        )
        observations, rewards = (bool(values.get(f"normalize_{what}")) for what in ("observations", "rewards"))
        if normalized := observations or rewards:
            environments = VecNormalize(
                environments, norm_obs=observations, norm_reward=rewards, gamma=float(values["gamma"])
            )
        if arguments.get("use_rms_prop"):  # the paper's, which it has, but does not take by itself
            arguments["policy_kwargs"] |= {
                "optimizer_class": RMSpropTFLike,
                "optimizer_kwargs": {"alpha": 0.99, "eps": 1e-5},
            }
        learner = getattr(stable_baselines3, agent.upper())
        model = learner("MlpPolicy", environments, device="cpu", tensorboard_log="logs", **arguments)
        model.learn(int(values["total_timesteps"]))

        def act(observation: Any) -> Any:
            return model.predict(
                environments.normalize_obs(observation) if normalized else observation, deterministic=True
            )[0]

        return act

    def lines(self, agent: str) -> int | None:  # noqa: ARG002
        """See `Peer`: its algorithms are spread over many files."""
        return None


class VectorEnvironments(gymnasium.vector.SyncVectorEnv):
    """Vector environments that behave at an episode's end as those of Gymnasium 0.29."""

    def __init__(self, env_fns: Any) -> None:
        super().__init__(env_fns, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP)

    def step(self, actions: Any) -> Any:
        """As Gymnasium's, with one entry for each environment in `final_observation` and `final_info`."""
        *transition, infos = super().step(actions)
        if "final_info" in infos:
            episodes, ended = infos["final_info"]["episode"], infos["_final_info"]
            infos["final_observation"] = infos["final_obs"]
            infos["final_info"] = [
                {"episode": {name: episodes[name][index] for name in "rl"}} if ended[index] else None
                for index in range(self.num_envs)
            ]
        return *transition, infos


SCRIPTS = {"dqn": "dqn.py", "ppo": "ppo.py", "sac": "sac_continuous_action.py"}
HIDDEN = {"dqn": (120, 84), "ppo": (64, 64), "sac": (256, 256)}


@dataclass(frozen=True)
class CleanRL:
    """The scripts in a checkout of github.com/vwxyzjn/cleanrl, each run as a program."""

    checkout: Path | None
    name = "CleanRL"

    def given(self, agent: str, values: Values) -> Given:
        """See `Peer`."""
        if agent not in SCRIPTS:
            raise ContenderError(f"CleanRL has no {agent}")
        asked = Asked(values)
        arguments: dict[str, Any] = {name: asked[name] for name in ("env_id", "total_timesteps", "seed", "gamma")}
        different = []
        if (asked["hidden_size"],) * 2 != HIDDEN[agent]:
            different.append(f"layers of {' and '.join(map(str, HIDDEN[agent]))}")
        if agent in {"dqn", "sac"}:
            arguments |= {name: asked[name] for name in ("buffer_size", "batch_size", "learning_starts")}
            between = asked["train_every"] / asked["gradient_steps"]
            if asked["num_envs"] != 1 or between != int(between) or (agent == "sac" and between != 1):
                raise ContenderError(f"CleanRL's {SCRIPTS[agent]} cannot update so often")
            if asked["gradient_steps"] != 1:
                different.append(f"an update every {between:g} steps" if between > 1 else "an update in each step")
        match agent:
            case "ppo":
                if not isinstance(make_environment(asked["env_id"]).action_space, gymnasium.spaces.Discrete):
                    raise ContenderError("CleanRL's PPO for continuous actions always normalises")
                same = ("learning_rate", "num_envs", "gae_lambda", "max_grad_norm")
                arguments |= {name: asked[name] for name in same} | {
                    "num_steps": asked["n_steps"],
                    "num_minibatches": asked["num_envs"] * asked["n_steps"] // asked["batch_size"],
                    "update_epochs": asked["n_epochs"],
                    "clip_coef": asked["clip_range"],
                    "ent_coef": asked["entropy_coefficient"],
                    "vf_coef": 2 * asked["value_coefficient"],  # of half the squared error
                    "anneal_lr": asked["anneal"],
                    "clip_vloss": False,
                }
                if asked["anneal"]:
                    different.append("clip range not annealed")
            case "dqn":
                arguments |= {
                    "learning_rate": asked["learning_rate"],
                    "target_network_frequency": asked["target_every"],
                    "train_frequency": int(between),
                    "exploration_fraction": min(1, asked["exploration_steps"] / asked["total_timesteps"]),
                    "end_e": asked["exploration_final"],
                }
                asked.taken.add("max_grad_norm")
                asked.taken |= {"n_steps"} if values["n_steps"] == 1 else set()
            case "sac":
                arguments |= {"policy_lr": asked["learning_rate"], "q_lr": asked["learning_rate"]}
                arguments |= {"tau": asked["tau"], "policy_frequency": 1}
        return Given(arguments, different + asked.left())

    def train(self, agent: str, values: Values) -> Act:
        """See `Peer`."""
        flags = [
            f"--{'no-' if value is False else ''}{name}{'' if isinstance(value, bool) else f'={value}'}"
            for name, value in self.given(agent, values).arguments.items()
        ]  # tyro takes underscores for hyphens
        script = self.script(agent)
        with (
            patch.object(gymnasium.vector, "SyncVectorEnv", VectorEnvironments),
            patch.object(sys, "path", [str(self.checkout), *sys.path]),  # for its replay
        ):
            names = run_script(script, "--no-cuda", *flags)

        @torch.no_grad()
        def act(observation: Any) -> Any:
            inputs = torch.from_numpy(observation)[None]
            match agent:
                case "dqn":
                    return names["q_network"](inputs).argmax().item()
                case "ppo":
                    return names["agent"].actor(inputs).argmax().item()
            return names["actor"].get_action(inputs)[2][0].numpy()

        return act

    def script(self, agent: str) -> Path:
        """The file that is `agent`. Raises ContenderError where it is not there."""
        if self.checkout is None:
            raise ContenderError("not given: --cleanrl CHECKOUT, of github.com/vwxyzjn/cleanrl")
        path = self.checkout / "cleanrl" / SCRIPTS[agent]
        if not path.is_file():
            raise ContenderError(f"--cleanrl: {path} is not there: give a checkout of github.com/vwxyzjn/cleanrl")
        return path

    def lines(self, agent: str) -> int | None:
        """See `Peer`."""
        return len(self.script(agent).read_text(encoding="utf-8").splitlines())


def label(peer: Peer, agent: str, values: Values) -> str:
    """The peer's name, with what it cannot be given."""
    try:
        differences = peer.given(agent, values).differences
    except ContenderError:
        return peer.name
    return f"{peer.name} ({'; '.join(differences)})" if differences else peer.name
