"""Draws the seeds of `rlboard reinforce --preset solve --seeds 20`, and says when they had solved CartPole.

python docs/solve.py logs/REINFORCE/NAME docs/solve.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlboard.eventfile import read_scalars

SOLVED = 475
"""Gymnasium's own threshold for CartPole-v1: the mean score of the last 100 episodes."""


def main(group: Path, target: Path) -> None:
    """Writes the figure to `target` and prints the sentence for the README."""
    curves = [read_scalars(run.parent)["rollout/ep_rew_mean"] for run in sorted(group.glob("seed*/run.json"))]
    solved = [int(curve.step[curve.value >= SOLVED][0]) for curve in curves if (curve.value >= SOLVED).any()]
    bands = read_scalars(group)
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        axes.plot(curve.step, curve.value, color="tab:blue", alpha=0.15, linewidth=0.8)
    iqm, lower, upper = (bands[f"reward/{name}"] for name in ("iqm", "iqm_lower", "iqm_upper"))
    axes.fill_between(iqm.step, lower.value, upper.value, color="tab:orange", alpha=0.35, linewidth=0)
    axes.plot(iqm.step, iqm.value, color="tab:orange", label="interquartile mean of `reward`, 95 % interval")
    axes.plot([], [], color="tab:blue", alpha=0.4, label="each seed, mean of its last 100 episodes")
    axes.axhline(SOLVED, color="black", linestyle=":", linewidth=0.8, label="solved: 475")
    axes.plot(solved, np.full(len(solved), SOLVED), "|", color="tab:green", label="first solved")
    axes.set(xlabel="episode", ylabel="score", xlim=(0, iqm.step[-1]), ylim=(0, 510))
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(target, dpi=110)
    last = [float(curve.value[-1]) for curve in curves]
    print(  # noqa: T201 - it is what the script is for
        f"solved by {len(solved)} of {len(curves)} seeds, after {np.median(solved):,.0f} episodes (median; "
        f"{min(solved):,} to {max(solved):,}); mean score of the last 100 episodes: {min(last):.1f} or more"
    )
    for name, statistic in {"mean": "", "iqm": "iqm_"}.items():
        middle, low, high = (
            bands[f"reward/{tag}"].value[-1] for tag in (name, f"{statistic}lower", f"{statistic}upper")
        )
        print(f"reward/{name} at the end: {middle:.1f} (95 % interval {low:.1f} to {high:.1f})")  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
