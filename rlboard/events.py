"""What a training loop says about itself at one point of the x axis.

A loop yields events and knows nothing of what becomes of them; the instruments of `rlboard.instruments` take from
an event what concerns their TensorBoard tab and pass it on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

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


class Embedding(NamedTuple):
    """Points for the Projector.

    points: (points, dimensions). rows: of each point, what stands in each of `columns`. images: (points, channels,
    height, width) uint8, or none.
    """

    points: Tensor | NDArray[Any]
    rows: Sequence[Sequence[Any]]
    columns: Sequence[str]
    images: Tensor | NDArray[np.uint8] | None = None


class Mesh(NamedTuple):
    """Coloured points in space, or the triangles between them.

    vertices: (vertices, 3). colors: (vertices, 3) uint8. faces: (triangles, 3) numbers of vertices, or none.
    """

    vertices: NDArray[Any]
    colors: NDArray[np.uint8]
    faces: NDArray[np.integer[Any]] | None = None


class Sound(NamedTuple):
    """samples: (samples,) from -1 to 1. rate: of them in a second."""

    samples: NDArray[Any]
    rate: int


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
        images: tag to a function that draws it. A picture costs time, and the loop may not depend on its being drawn;
            so it is with all that follows as a function.
        videos: tag to a function that starts a video; drawn only when asked for, under the same rule.
        curves: tag to what a precision-recall curve is made of.
        histograms: tag to a function that returns values; those of `model` are drawn without being asked for.
        texts: tag to a function that writes Markdown.
        embeddings: tag to a function that returns points for the Projector.
        meshes: tag to a function that returns points or triangles in space.
        sounds: tag to a function that plays.
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
    histograms: Mapping[str, Callable[[], Tensor | NDArray[Any]]] = field(default_factory=dict)
    texts: Mapping[str, Callable[[], str]] = field(default_factory=dict)
    embeddings: Mapping[str, Callable[[], Embedding]] = field(default_factory=dict)
    meshes: Mapping[str, Callable[[], Mesh]] = field(default_factory=dict)
    sounds: Mapping[str, Callable[[], Sound]] = field(default_factory=dict)
    threads: bool = False
    state: Callable[[], dict[str, Any]] | None = None


Events = Iterator[Event]
