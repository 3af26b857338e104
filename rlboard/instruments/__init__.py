"""Instruments: generators that take a loop's events, write what concerns their TensorBoard tab, and pass them on.

What stands before an instrument's `for` happens at the first event, what stands after it at the end of training, an
interrupted one included. An instrument changes neither the events nor the model, so that any set of them leaves
what is learned bit for bit the same.
"""

from collections.abc import Callable, Mapping

from rlboard.events import Events
from rlboard.instruments.checkpoints import checkpoints
from rlboard.instruments.console import console
from rlboard.instruments.profiler import profiler
from rlboard.instruments.sound import sonification
from rlboard.instruments.tabs import (
    activations,
    custom_scalars,
    embeddings,
    graph,
    histograms,
    hyperparameters,
    images,
    meshes,
    more_histograms,
    more_text,
    pr_curves,
    scalars,
    sounds,
    text,
)
from rlboard.instruments.videos import videos
from rlboard.instruments.weights import weights
from rlboard.run import Run

Instrument = Callable[[Events, Run], Events]

_MINIMAL: tuple[Instrument, ...] = (
    videos,
    hyperparameters,
    custom_scalars,
    text,
    scalars,
    weights,
    console,
    checkpoints,
)

INSTRUMENTS: Mapping[str, tuple[Instrument, ...]] = {
    "minimal": (profiler, *_MINIMAL),
    "full": (
        profiler,
        graph,
        histograms,
        more_histograms,
        activations,
        pr_curves,
        images,
        more_text,
        embeddings,
        meshes,
        sounds,
        sonification,
        *_MINIMAL,
    ),
}
"""The instruments of each value of `--log`, from the loop outwards."""
