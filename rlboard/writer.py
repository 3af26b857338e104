"""The writer factory: torch's SummaryWriter on one event file that stays open, and that never ends a training run."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard._utils import convert_to_HWC

from rlboard.eventfile import EventFile, LogWarning, animation_summary, histogram, image_summary, wav_summary
from rlboard.graph import graph_def, module_tree
from rlboard.projector import write_embedding

ImageFormat = Literal["png", "jpeg", "webp"]


def open_writer(directory: Path, *, image_format: ImageFormat = "png", resumed: bool = False, **options: Any) -> Writer:
    """Returns a Writer on a new event file in `directory`, its images PNG, JPEG or WebP.

    `resumed` says that an earlier file has the run's hyperparameters; `options` are those of EventFile.

    Raises OSError if the file cannot be made.
    """
    writer = Writer(EventFile(directory, **options), image_format)
    writer.session_is_open = resumed
    return writer


class SilentWriter:
    """A Writer that writes nothing: for what a resumed run presents again."""

    dropped = 0

    def __getattr__(self, name: str) -> Any:
        return self if name == "events" else lambda *_, **__: None


class Writer(SummaryWriter):
    """torch's SummaryWriter with everything in one event file, `log`, `add_scalar_series` and typed hyperparameters.

    No `add_*` raises: what cannot be logged is dropped and counted in `dropped`, with one LogWarning for each tag.
    After `close` nothing is logged any more. `events` is the EventFile: `events.tell()` for checkpoints.
    """

    file_writer: Any  # torch declares it None

    def __init__(self, events: EventFile, image_format: ImageFormat = "png") -> None:
        self.events = events
        self.image_format: ImageFormat = image_format
        self._invalid = 0
        self._warned: set[str] = set()
        self.session_is_open = False
        super().__init__(str(events.path.parent))

    @property
    def dropped(self) -> int:
        """How many records or calls were not logged, because of the disk or because of their values."""
        return self._invalid + self.events.dropped

    def add_scalar(
        self,
        tag: str,
        scalar_value: Any,
        global_step: Any = None,
        walltime: Any = None,
        new_style: bool = False,
        double_precision: bool = False,  # noqa: ARG002 - TensorBoard's data server shows no doubles
    ) -> None:
        # The one method that is called in every step: it has the guard of `_guarded` without its cost.
        try:
            if new_style:
                super().add_scalar(tag, scalar_value, global_step, walltime, new_style=True)
            else:
                self.events.scalar(tag, scalar_value, 0 if global_step is None else global_step, walltime)
        except Exception as error:  # noqa: BLE001
            self._drop("add_scalar", tag, error)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds the scalars of one step, by tag: cheaper than one `add_scalar` each."""
        try:
            self.events.scalars(values, step)
        except Exception:  # noqa: BLE001
            for tag, value in values.items():
                self.add_scalar(tag, value, step)

    def add_scalar_series(self, tag: str, steps: Any, values: Any, wall_times: Any = None) -> None:
        """Adds many points of one tag from arrays of equal length; `wall_times` are seconds, now by default."""
        self.events.scalar_series(
            tag, _array(steps), _array(values), None if wall_times is None else _array(wall_times)
        )

    def add_scalars(
        self, main_tag: str, tag_scalar_dict: Mapping[str, Any], global_step: Any = None, walltime: Any = None
    ) -> None:
        for tag, value in tag_scalar_dict.items():
            self.add_scalar(f"{main_tag}/{tag}", value, global_step, walltime)

    def add_histogram(
        self,
        tag: str,
        values: Any,
        global_step: Any = None,
        bins: Any = "tensorflow",
        walltime: Any = None,
        max_bins: int | None = None,
    ) -> None:
        if isinstance(bins, str) and bins == "tensorflow":
            histo = histogram(_array(values)) if max_bins is None else histogram(_array(values), max_bins)
            self.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, histo=histo)]), global_step, walltime)
        else:
            super().add_histogram(tag, values, global_step, bins, walltime, max_bins)

    def add_image(
        self, tag: str, img_tensor: Any, global_step: Any = None, walltime: Any = None, dataformats: str = "CHW"
    ) -> None:
        image = convert_to_HWC(_pixels(img_tensor), dataformats)  # type: ignore[no-untyped-call]
        self.file_writer.add_summary(image_summary(tag, image, self.image_format), global_step, walltime)

    def add_images(
        self, tag: str, img_tensor: Any, global_step: Any = None, walltime: Any = None, dataformats: str = "NCHW"
    ) -> None:
        self.add_image(tag, img_tensor, global_step, walltime, dataformats)

    def add_video(
        self, tag: str, vid_tensor: Any, global_step: Any = None, fps: float = 4, walltime: Any = None
    ) -> None:
        self.file_writer.add_summary(animation_summary(tag, _tiled(_pixels(vid_tensor)), fps), global_step, walltime)

    def add_wav(self, tag: str, path: str | Path, global_step: Any = None, walltime: Any = None) -> None:
        """Adds a WAV file of PCM samples, as it is, to the Audio tab."""
        self.file_writer.add_summary(wav_summary(tag, Path(path).read_bytes()), global_step, walltime)

    def add_embedding(
        self,
        mat: Any,
        metadata: Any = None,
        label_img: Any = None,
        global_step: Any = None,
        tag: str = "default",
        metadata_header: Any = None,
    ) -> None:
        directory, step = Path(self.log_dir), 0 if global_step is None else int(global_step)
        write_embedding(directory, mat, metadata, metadata_header, label_img, tag, step)

    def add_graph(self, model: Any, input_to_model: Any = None, *_: Any, **__: Any) -> None:
        """Adds the operators of `model(*input_to_model)`, or its modules as text if they cannot be found."""
        name = type(model).__name__
        try:
            definition = graph_def(model, input_to_model)
        except Exception as error:  # noqa: BLE001
            reason = f"no graph: {type(error).__name__}: {error}"
            self.add_text(f"{name}/tree", f"{reason}\n\n{module_tree(model)}")
            self._warn(name, f"{reason}; its modules are in the Text tab")
        else:
            self.file_writer.add_event(Event(graph_def=definition.SerializeToString(deterministic=True)))

    def add_hparams(
        self,
        hparam_dict: Mapping[str, Any],
        metric_dict: Mapping[str, Any],
        hparam_domain_discrete: Any = None,  # noqa: ARG002
        run_name: str | None = None,  # noqa: ARG002
        global_step: Any = None,
    ) -> None:
        """Adds hyperparameters and metrics to this run: there is no run of its own for them, and no domains."""
        self.start_session(hparam_dict)
        self.log(0 if global_step is None else global_step, metric_dict)

    def start_session(self, hparams: Mapping[str, Any]) -> None:
        """Adds the run's hyperparameters for the HParams tab; its metrics are the last values of the run's scalars."""
        if self.session_is_open:
            raise ValueError("the run has its hyperparameters: TensorBoard shows the first ones only")
        start = plugin_data_pb2.SessionStartInfo(start_time_secs=self.events.clock())
        for name, value in hparams.items():
            plain = _hyperparameter(value)
            kind = {bool: "bool_value", float: "number_value", str: "string_value"}[type(plain)]
            setattr(start.hparams[str(name)], kind, plain)
        self._add_session(hparams_metadata.SESSION_START_INFO_TAG, session_start_info=start)
        self.session_is_open = True

    def end_session(self, success: bool) -> None:
        """Adds how the run ended for the HParams tab; `close` does so if nobody has."""
        status = api_pb2.STATUS_SUCCESS if success else api_pb2.STATUS_FAILURE
        end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=self.events.clock())
        self._add_session(hparams_metadata.SESSION_END_INFO_TAG, session_end_info=end)
        self.session_is_open = False

    def flush(self) -> None:
        self.events.flush()

    def close(self) -> None:
        """Ends an open session, as a failure if an exception is on its way, and closes the file."""
        if self.session_is_open:
            self.end_session(success=sys.exception() is None)
        self.events.close()

    def _get_file_writer(self) -> _FileWriter:
        self.file_writer = writer = _FileWriter(self.events)
        return writer

    def _add_session(self, tag: str, **info: Any) -> None:
        data = hparams_metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(**info))
        value = Summary.Value(tag=tag, metadata=data, tensor=hparams_metadata.NULL_TENSOR)
        self.events.summary(Summary(value=[value]))

    def _drop(self, method: str, tag: Any, error: Exception) -> None:
        self._invalid += 1
        self._warn(tag if isinstance(tag, str) else method, f"not logged: {type(error).__name__}: {error}")

    def _warn(self, tag: str, reason: str) -> None:
        if tag not in self._warned:
            self._warned.add(tag)
            warnings.warn(f"{tag}: {reason}", LogWarning, stacklevel=4)


class _FileWriter:
    """What torch's SummaryWriter wants of its file writer."""

    def __init__(self, events: EventFile) -> None:
        self.events = events

    def get_logdir(self) -> str:
        return str(self.events.path.parent)

    def add_event(self, event: Event, step: Any = None, walltime: Any = None) -> None:
        event.wall_time = self.events.clock() if walltime is None else walltime
        if step is not None:
            event.step = int(step)
        self.events.event(event)

    def add_summary(self, summary: Summary, global_step: Any = None, walltime: Any = None) -> None:
        self.events.summary(summary, 0 if global_step is None else global_step, walltime)

    def add_onnx_graph(self, graph: Any, walltime: Any = None) -> None:
        self.add_event(Event(graph_def=graph.SerializeToString()), walltime=walltime)


def _guarded(method: Callable[..., None]) -> Callable[..., None]:
    """`method` with what it raises turned into a warning and a count."""

    @functools.wraps(method)
    def call(self: Writer, *arguments: Any, **options: Any) -> None:
        try:
            method(self, *arguments, **options)
        except Exception as error:  # noqa: BLE001
            self._drop(method.__name__, options.get("tag", arguments[0] if arguments else None), error)

    return call


for _name in [*(name for name in dir(Writer) if name.startswith("add_")), "log", "start_session", "end_session"]:
    if _name != "add_scalar":
        setattr(Writer, _name, _guarded(getattr(Writer, _name)))


def _hyperparameter(value: Any) -> bool | float | str:
    with contextlib.suppress(AttributeError, ValueError, RuntimeError):
        value = value.item()  # of NumPy and torch, if there is just one
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        with contextlib.suppress(OverflowError):
            if math.isfinite(number := float(value)):  # TensorBoard cannot send others to the page
                return number
    return str(value)


def _array(values: Any) -> NDArray[Any]:
    if not isinstance(values, torch.Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    if values.is_floating_point() and values.dtype not in (torch.float16, torch.float32, torch.float64):
        values = values.float()  # NumPy has no bfloat16 and no 8-bit floats
    array: NDArray[Any] = values.numpy()
    return array


def _pixels(values: Any) -> NDArray[np.uint8]:
    """Colours as bytes: floats are from 0 to 1, integers from 0 to 255; NaN is black."""
    array = _array(values)
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind not in "iu":
        array = np.fmax(array.astype(np.float32) * 255, 0)
    return array.clip(0, 255).astype(np.uint8)


def _tiled(videos: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Videos (N, T, C, H, W) beside and below each other: (T, rows * H, columns * W, C)."""
    count, time, channels, height, width = videos.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = np.zeros((rows * columns, *videos.shape[1:]), np.uint8)
    grid[:count] = videos
    grid = grid.reshape(rows, columns, time, channels, height, width).transpose(2, 0, 4, 1, 5, 3)
    return grid.reshape(time, rows * height, columns * width, channels)
