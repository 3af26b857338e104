"""The curves of runs that are compared: a chart a tag, a colour a column, a band where there are several seeds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import NDArray

from rlboard.config import printable
from rlboard.errors import StorageError
from rlboard.eventfile import Series
from rlboard.files import replacing
from rlboard.runs.read import Column
from rlboard.statistics import Scores, interval, mean

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c564b")
"""Okabe and Ito's, which colour-blind people tell apart, without their yellow, which nobody sees on white."""
STYLES: tuple[Literal["-", "--"], ...] = ("-", "--")
MOST_COLUMNS = len(COLOURS) * len(STYLES)
MOST_CHARTS = 24
MOST_POINTS = 1000
"""Of a line: a longer one is drawn as the lowest and the highest point of each of so many stretches."""
BAND_POINTS = 300
BAND_RESAMPLES = 1000
FONTS = ("Noto Sans CJK KR", "NanumGothic", "Malgun Gothic", "Apple SD Gothic Neo", "Noto Sans CJK JP")
"""Asked, where they are installed, for the letters that matplotlib's own font does not have."""

Steps = NDArray[np.float64]


def draw(columns: Sequence[Column], tags: Sequence[str], path: Path) -> str:
    """Writes the figure, whole or not at all, in the format that its ending names; returns what it had no room for.

    Raises:
        StorageError: it cannot be written; what was there before is intact.
    """
    drawn, charts = columns[:MOST_COLUMNS], tags[:MOST_CHARTS]
    families = ["DejaVu Sans", *(name for name in FONTS if name in font_manager.get_font_names())]
    try:
        with (
            mpl.rc_context({"font.family": families}),
            warnings.catch_warnings(),
            replacing(path, contested=True) as file,
        ):
            warnings.filterwarnings("ignore", "Glyph .* missing")  # then a box is drawn
            _figure(drawn, charts).savefig(file, format=path.suffix[1:].lower(), dpi=120)
    except OSError as error:
        raise StorageError(f"--figure {printable(path, 200)} cannot be written: {error.strerror or error}") from None
    missing = ((len(columns) - len(drawn), "columns"), (len(tags) - len(charts), "tags"))
    return " and ".join(f"{count:,} more {things}" for count, things in missing if count)


def _figure(columns: Sequence[Column], tags: Sequence[str]) -> Figure:
    wide = 1 if len(tags) == 1 else 2 if len(tags) in (2, 4) else 3
    high = math.ceil(len(tags) / wide)
    figure = Figure(figsize=((9, 6, 4.5)[wide - 1] * wide, (4.2, 3.6, 3)[wide - 1] * high), layout="constrained")
    charts = figure.subplots(high, wide, squeeze=False).ravel()
    looks = [(COLOURS[index % len(COLOURS)], STYLES[index // len(COLOURS)]) for index in range(len(columns))]
    for axes, tag in zip(charts, tags, strict=False):
        axes.set_title(printable(tag, 60), parse_math=False, fontsize=10)
        for column, (colour, style) in zip(columns, looks, strict=True):
            _draw_curves(axes, column.of(tag), colour, style)
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    for axes in charts[len(tags) :]:
        axes.set_axis_off()
    several = any(len(column.runs) > 1 for column in columns)
    note = "; thick: mean of the seeds, band: its 95 % bootstrap interval, thin: each seed" if several else ""
    figure.supxlabel(f"step{note}", fontsize=9)
    lines = [Line2D([], [], color=colour, linestyle=style, linewidth=2) for colour, style in looks]
    across = max(1, min(len(columns), int(figure.get_figwidth() * 12) // (8 + max(len(each.name) for each in columns))))
    legend = figure.legend(
        lines, [f"\u200b{column.name}" for column in columns], loc="outside upper left", ncols=across, frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _draw_curves(axes: Axes, curves: Sequence[Series], colour: str, style: Literal["-", "--"]) -> None:
    several = len(curves) > 1
    for curve in curves:
        line = thinned(curve)
        axes.plot(
            line.step,
            line.value,
            color=colour,
            linestyle=style,
            alpha=0.25 if several else 1,
            linewidth=0.7 if several else 1.4,
            marker="o" if len(line.step) == 1 else "",
        )
    found = band(curves) if several else None
    if found:
        steps, middle, lower, upper = found
        axes.fill_between(steps, lower, upper, color=colour, alpha=0.25, linewidth=0)
        axes.plot(steps, middle, color=colour, linestyle=style, linewidth=2, marker="o" if len(steps) == 1 else "")


def thinned(curve: Series) -> Series:
    """A curve of at most twice `MOST_POINTS` points that looks the same."""
    count = len(curve.step)
    size = -(-count // MOST_POINTS)
    if size <= 2:
        return curve
    stretches = np.pad(curve.value, (0, -count % size), mode="edge").reshape(-1, size)
    starts = np.arange(len(stretches)) * size
    kept = np.unique(np.minimum([stretches.argmin(1) + starts, stretches.argmax(1) + starts], count - 1))
    return Series(*(column[kept] for column in curve))


def band(curves: Sequence[Series]) -> tuple[Steps, Scores, Scores, Scores] | None:
    """The mean of several curves and its 95 % bootstrap interval, at the steps that lie within all of them.

    Between its own steps a curve is interpolated linearly; of a step that it has twice the later value counts, and what
    is not finite is left out. Returns steps, mean, lower and upper end, of `BAND_POINTS` points at most, or None where
    the curves have no step in common.
    """
    lines = [_by_step(curve) for curve in curves]
    if not all(len(step) for step, _ in lines):
        return None
    steps = np.unique(np.concatenate([step for step, _ in lines]))
    steps = steps[(steps >= max(step[0] for step, _ in lines)) & (steps <= min(step[-1] for step, _ in lines))]
    if not len(steps):
        return None
    if len(steps) > BAND_POINTS:
        steps = steps[np.linspace(0, len(steps) - 1, BAND_POINTS).astype(np.int64)]
    scores = np.array([np.interp(steps, *line) for line in lines])
    return steps, mean(scores), *interval(scores, resamples=BAND_RESAMPLES)


def _by_step(curve: Series) -> tuple[Steps, NDArray[np.float64]]:
    finite = np.flatnonzero(np.isfinite(curve.value))
    order = finite[np.argsort(curve.step[finite], kind="stable")]
    step = curve.step[order]
    last = np.flatnonzero(np.append(step[1:] != step[:-1], True)) if len(step) else order
    return step[last].astype(np.float64), curve.value[order][last].astype(np.float64)
