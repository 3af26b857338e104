"""What a training loop says about itself at one point of the x axis.

A loop yields events and knows nothing of what becomes of them; the instruments of `rlboard.instruments` take from
an event what concerns their TensorBoard tab and pass it on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

Image = Callable[[], "NDArray[np.uint8]"]
"""Draws a picture, (height, width, 3) uint8, when it is called."""

Video = Callable[[], tuple[float, Iterator[Image]]]
"""Starts a video when it is called: its frames per second, and its frames, each to be drawn before the next is taken.

A frame that is not drawn costs nothing, so that a long video can be shown in few pictures.
"""

Curve = tuple["NDArray[np.bool_]", "NDArray[np.float32]"]
"""Which examples belong to a class, and the probabilities that the model gives them to, each (examples,)."""


@dataclass(frozen=True)
class Event:
    """One point of a training run.

    The first event comes before anything is learned, at step 0, and presents `model` and `inputs`. Whatever makes a
    loop refuse its configuration is raised before it, so that a refused run leaves nothing on the disk.

    Attributes:
        step: position on the x axis: episodes, environment steps or batches, as the loop counts.
        total: the step at which training ends.
        scalars: tag to value. The work done so far, `time/steps` or `time/images`, becomes a rate as well.
        headline: the tag by which the run is judged, larger is better: the progress bar shows it.
        message: the line a pipe gets; empty for one made of step and headline.
        model: the live network; its gradients are those of the last update.
        inputs: one batch of inputs of the model, for the graph and, from two inputs up, for the activations.
        images: tag to a function that draws it. A picture costs time, and the loop may not depend on its being drawn.
        videos: tag to a function that starts a video; drawn only when asked for, under the same rule.
        curves: tag to what a precision-recall curve is made of.
        best: the tag under which the largest headline so far is logged; empty for `best/<headline>`.
        notice: a line that everybody should read, such as on which data is trained.
        threads: of a first event: the loop leaves the interpreter free for most of its time, and shares nothing with
            others after it, so that several can train in threads of one process.
        state: takes everything that decides what comes after this event, in tensors, numbers, strings and containers of
            them, the network's own state as `model`; called before the loop goes on. `train(config, state)` then begins
            with an event at the same step that presents the model again, and goes on as if it had never ended.
    """

    step: int
    total: int
    scalars: Mapping[str, float] = field(default_factory=dict)
    headline: str = ""
    message: str = ""
    model: nn.Module | None = None
    inputs: Tensor | None = None
    images: Mapping[str, Image] = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)
    best: str = ""
    notice: str = ""
    videos: Mapping[str, Video] = field(default_factory=dict)
    threads: bool = False
    state: Callable[[], dict[str, Any]] | None = None


Events = Iterator[Event]
