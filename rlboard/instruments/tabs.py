"""One instrument for each TensorBoard tab."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from rlboard.config import Value
from rlboard.events import Events
from rlboard.layout import LAYOUTS
from rlboard.registry import Loop

if TYPE_CHECKING:
    from rlboard.run import Run

HISTOGRAMS_PER_RUN = 50
"""How often weights and gradients are drawn, at most: enough for a smooth picture, a bounded cost for any length."""


def scalars(events: Events, run: Run) -> Events:
    """Scalars and Time Series: every scalar, and `best/<headline>` when it improves."""
    for event in events:
        values = dict(event.scalars)
        if event.headline in values:
            best = run.best.get(event.headline)
            if best is None or values[event.headline] > best["value"]:
                run.best[event.headline] = {"value": values[event.headline], "step": event.step}
                values[f"best/{event.headline}"] = values[event.headline]
        if values:
            run.writer.log(event.step, values)
        yield event


def hyperparameters(events: Events, run: Run) -> Events:
    """HParams: the configuration and how the run ended, in the run's own file; the metrics are its last scalars."""
    run.writer.start_session(run.hyperparameters)
    yield from events
    run.writer.end_session(success=run.status == "completed")


def custom_scalars(events: Events, run: Run) -> Events:
    """Custom Scalars: the dashboard of the loop's track."""
    layout = LAYOUTS.get(run.loop.track.package)
    if layout:
        run.writer.add_custom_scalars(layout)
    yield from events


def text(events: Events, run: Run) -> Events:
    """Text: what ran, with which configuration."""
    run.writer.add_text("config", configuration_table(run.loop, run.hyperparameters), 0)
    run.writer.add_text("loop", run.loop.doc, 0)
    yield from events


def configuration_table(loop: Loop, values: Mapping[str, Value]) -> str:
    """The configuration as a Markdown table: option, value, default, what it does."""
    rows = [
        f"| `{option.flag}` | {values[option.name]} | {option.default} | {option.help} |" for option in loop.options
    ]
    return "\n".join(["| option | value | default | what it does |", "|---|---|---|---|", *rows])


def graph(events: Events, run: Run) -> Events:
    """Graphs: the first model that comes with inputs."""
    drawn = False
    for event in events:
        if not drawn and event.model is not None and event.inputs is not None:
            run.writer.add_graph(event.model, event.inputs)
            drawn = True
        yield event


def histograms(events: Events, run: Run) -> Events:
    """Histograms and Distributions: weights and the gradients of the last update, at a bounded cadence."""
    due = 0
    for event in events:
        if event.model is not None and event.step >= due:
            for name, parameter in event.model.named_parameters():
                run.writer.add_histogram(f"Weights/{name}", parameter, event.step)
                if parameter.grad is not None:
                    run.writer.add_histogram(f"Gradients/{name}", parameter.grad, event.step)
            due = event.step + max(1, event.total // HISTOGRAMS_PER_RUN)
        yield event


def images(events: Events, run: Run) -> Events:
    """Images: what the loop can draw. A machine that cannot render loses the picture, not the run."""
    broken: set[str] = set()
    for event in events:
        for tag, draw in event.images.items():
            if tag in broken:
                continue
            try:
                picture = draw()
            except Exception as error:  # noqa: BLE001 - any renderer of any environment
                broken.add(tag)
                warnings.warn(f"{tag} cannot be drawn on {platform.node()}: {error}", RuntimeWarning, stacklevel=2)
            else:
                run.writer.add_image(tag, np.asarray(picture), event.step, dataformats="HWC")
        yield event
