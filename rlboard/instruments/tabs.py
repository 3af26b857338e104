"""One instrument for each TensorBoard tab."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torchinfo
from torch import Tensor, from_numpy, nn

from rlboard.config import Value
from rlboard.events import Embedding, Event, Events, Mesh, Sound
from rlboard.graph import module_tree, undisturbed
from rlboard.instruments.drawing import drawn
from rlboard.layout import layout_of
from rlboard.registry import Loop

if TYPE_CHECKING:
    from rlboard.run import Run
    from rlboard.writer import Writer

HISTOGRAMS_PER_RUN = 50
"""How often weights and gradients are drawn, at most: enough for a smooth picture, a bounded cost for any length."""


def scalars(events: Events, run: Run) -> Events:
    """Scalars and Time Series: every scalar, and the best headline when it improves."""
    for event in events:
        values = dict(event.scalars)
        if event.headline in values:
            best = run.best.get(event.headline)
            if best is None or values[event.headline] > best["value"]:
                run.best[event.headline] = {"value": values[event.headline], "step": event.step}
                values[event.best or f"best/{event.headline}"] = values[event.headline]
        if values:
            run.writer.log(event.step, values)
        yield event


def hyperparameters(events: Events, run: Run) -> Events:
    """HParams: the configuration and how the run ended, in the run's own file; the metrics are its last scalars."""
    run.writer.start_session(run.hyperparameters)
    yield from events
    run.writer.end_session(success=run.status == "completed")


def custom_scalars(events: Events, run: Run) -> Events:
    """Custom Scalars: the dashboard of the loop."""
    layout = layout_of(run.loop)
    if layout:
        run.writer.add_custom_scalars(layout)
    yield from events


def text(events: Events, run: Run) -> Events:
    """Text: what ran, with which configuration, and what it has to say; the layers of the first model with inputs."""
    run.writer.add_text("Hyperparameters", configuration_table(run.loop, run.hyperparameters), 0)
    run.writer.add_text("loop", run.loop.doc, 0)
    summarized = False
    for event in events:
        if event.notice:
            run.writer.add_text("notice", event.notice, event.step)
        if not summarized and event.model is not None and event.inputs is not None:
            run.writer.add_text("Model/summary", model_summary(event.model, event.inputs[:1]), event.step)
            summarized = True
        yield event


def configuration_table(loop: Loop, values: Mapping[str, Value]) -> str:
    """The configuration as a Markdown table: option, value, default, what it does."""
    rows = [
        f"| `{option.flag}` | {values[option.name]} | {option.default} | {option.help} |" for option in loop.options
    ]
    return "\n".join(["| option | value | default | what it does |", "|---|---|---|---|", *rows])


def model_summary(model: nn.Module, inputs: Tensor) -> str:
    """The layers of `model`, their shapes, parameters and multiplications, as a Markdown code block."""
    with undisturbed(model, (inputs,)):
        try:
            table = str(torchinfo.summary(model, input_data=inputs, device=inputs.device, verbose=0))
        except RuntimeError as error:  # what torchinfo makes of whatever a forward pass raises
            return f"no summary: {error}\n\n{module_tree(model)}"
    return f"```\n{table}\n```"


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
    for event in events:
        if event.model is not None and _draws_histograms(event, run.drawn.get("histograms", -1)):
            run.drawn["histograms"] = event.step
            for name, parameter in event.model.named_parameters():
                run.writer.add_histogram(f"Weights/{name}", parameter, event.step)
                if parameter.grad is not None:
                    run.writer.add_histogram(f"Gradients/{name}", parameter.grad, event.step)
        yield event


def _draws_histograms(event: Event, latest: int) -> bool:
    """Whether another of the run's equal parts has begun since the step `latest`, -1 for none."""
    part = max(1, event.total // HISTOGRAMS_PER_RUN)
    return event.step // part > latest // part


def activations(events: Events, run: Run) -> Events:
    """Histograms: what the stages of the model put out for the first inputs, as often as its weights."""
    inputs = None
    for event in events:
        inputs = event.inputs if inputs is None else inputs
        shown = inputs is not None and len(inputs) > 1 and _draws_histograms(event, run.drawn.get("activations", -1))
        if event.model is not None and inputs is not None and shown:
            run.drawn["activations"] = event.step
            for name, values in stage_outputs(event.model, inputs).items():
                run.writer.add_histogram(f"Activations/{name}", values, event.step)
        yield event


def stage_outputs(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """What the stages of `model` put out for `inputs`: its children, or, where one is a sequence, that one's."""
    stages: dict[str, nn.Module] = {}
    for name, child in model.named_children():
        parts = child.named_children() if isinstance(child, nn.Sequential) else ()
        stages |= {f"{name}.{part}": module for part, module in parts} or {name: child}
    outputs: dict[str, Tensor] = {}

    def keep(name: str, _: nn.Module, __: object, output: object) -> None:
        if isinstance(output, Tensor):
            outputs[name] = output.detach().clone()  # the next layer may write into it

    hooks = [module.register_forward_hook(partial(keep, name)) for name, module in stages.items()]
    try:
        with undisturbed(model, (inputs,)):
            model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def pr_curves(events: Events, run: Run) -> Events:
    """PR Curves: precision over recall of every class that the loop asks about."""
    for event in events:
        for tag, (labels, probabilities) in event.curves.items():
            run.writer.add_pr_curve(tag, labels, probabilities, event.step)
        yield event


def _offered(field: str, write: Callable[[Writer, str, Any, int], None]) -> Callable[[Events, Run], Events]:
    """An instrument that writes what a loop offers in `field` of its events: (writer, tag, what it is, step)."""

    def instrument(events: Events, run: Run) -> Events:
        broken: set[str] = set()
        for event in events:
            for tag, thing in drawn(getattr(event, field), broken):
                write(run.writer, tag, thing, event.step)
            yield event

    return instrument


def _write_image(writer: Writer, tag: str, picture: Any, step: int) -> None:
    writer.add_image(tag, np.asarray(picture), step, dataformats="HWC")


def _write_histogram(writer: Writer, tag: str, values: Any, step: int) -> None:
    writer.add_histogram(tag, values, step)


def _write_text(writer: Writer, tag: str, words: str, step: int) -> None:
    writer.add_text(tag, words, step)


def _write_embedding(writer: Writer, tag: str, embedding: Embedding, step: int) -> None:
    points, rows, columns, pictures = embedding
    writer.add_embedding(points, rows, pictures, step, tag, columns)


def _write_mesh(writer: Writer, tag: str, mesh: Mesh, step: int) -> None:
    vertices, colors, faces = (None if part is None else from_numpy(part)[None] for part in mesh)
    writer.add_mesh(tag, vertices, colors, faces, None, step)


def _write_sound(writer: Writer, tag: str, sound: Sound, step: int) -> None:
    writer.add_audio(tag, from_numpy(sound.samples), step, sound.rate)


images = _offered("images", _write_image)
more_histograms = _offered("histograms", _write_histogram)  # beside those of weights
more_text = _offered("texts", _write_text)  # beside the configuration
embeddings = _offered("embeddings", _write_embedding)
meshes = _offered("meshes", _write_mesh)
sounds = _offered("sounds", _write_sound)
