"""The writer: torch's whole interface in one event file, read back by TensorBoard, and nothing that ends training."""

from __future__ import annotations

import inspect
import io
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.util import tensor_util
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from rlboard.eventfile import LogWarning, write
from rlboard.writer import Writer, open_writer
from tests.test_eventfile_write import is_whole, points, whole_events

POLICY = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    with open_writer(tmp_path / "run") as writer:
        yield writer


def accumulated(writer: Writer) -> EventAccumulator:
    """Returns what TensorBoard's own reader finds in the run, after closing it."""
    writer.close()
    assert is_whole(writer.events.path)
    accumulator = EventAccumulator(writer.log_dir, size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def image_of(accumulator: EventAccumulator, tag: str) -> Image.Image:
    return Image.open(io.BytesIO(accumulator.Images(tag)[0].encoded_image_string))


def add_everything(writer: Writer, success: bool = True) -> None:
    """Calls every `add_*` of torch's SummaryWriter that needs no other package, and ours."""
    generator = np.random.default_rng(0)
    writer.start_session({"lr": 1e-3, "batch": 32, "amp": True, "name": "손실"})
    writer.add_scalar("scalar", 0.5, 1)
    writer.add_scalar("scalar/new", 0.1, 1, new_style=True, double_precision=True)
    writer.log(2, {"log/a": 1.0, "log/b": 2.0})
    writer.add_scalar_series("series", range(1_000), np.arange(1_000) / 8)
    writer.add_scalars("main", {"left": 1.0, "right/most": 2.0}, 3)
    writer.add_tensor("tensor", torch.arange(6).reshape(2, 3), 4)
    writer.add_histogram("histogram", generator.normal(size=1_000), 5)
    writer.add_histogram("histogram/auto", generator.normal(size=1_000), 5, bins="auto")
    writer.add_histogram_raw("histogram/raw", 0.0, 1.0, 2, 1.0, 1.0, [0.5, 1.0], [1, 1], 5)
    writer.add_image("image", torch.rand(3, 8, 8), 6)
    writer.add_images("images", torch.rand(5, 3, 8, 8), 6)
    writer.add_image_with_boxes("boxes", torch.rand(3, 16, 16), torch.tensor([[2.0, 2.0, 9.0, 9.0]]), 6)
    figure = Figure()
    figure.subplots().plot([1, 2])
    writer.add_figure("figure", figure, 6, close=False)
    writer.add_video("video", torch.rand(1, 3, 3, 8, 8), 7)
    writer.add_audio("audio", torch.sin(torch.arange(800) / 5)[None], 8, sample_rate=8_000)
    writer.add_text("text", "**bold** 한국어", 9)
    writer.add_graph(POLICY, torch.zeros(1, 4))
    writer.add_embedding(torch.rand(5, 3), metadata=list("abcde"), tag="embedding", global_step=10)
    writer.add_pr_curve("pr", np.array([0, 1, 1, 0]), np.array([0.1, 0.9, 0.6, 0.4]), 11)
    writer.add_pr_curve_raw("pr/raw", [2], [1], [1], [0], [0.7], [1.0], 11, num_thresholds=1)
    writer.add_custom_scalars({"category": {"chart": ["Multiline", ["^scalar$"]]}})
    writer.add_mesh("mesh", torch.rand(1, 4, 3), global_step=12)
    writer.end_session(success)


def test_everything_goes_into_one_file_in_order(writer: Writer) -> None:
    add_everything(writer)
    accumulator = accumulated(writer)
    assert writer.dropped == 0
    directory = Path(writer.log_dir)
    assert list(directory.rglob("*tfevents*")) == [writer.events.path]
    assert [event.step for event in whole_events(writer.events.path) if event.step > 1][-1] == 12
    tags = accumulator.Tags()
    assert tags["images"] == ["image", "images", "boxes", "figure", "video"]
    assert tags["histograms"] == ["histogram", "histogram/auto", "histogram/raw"]
    assert tags["audio"] == ["audio"]
    assert tags["graph"]
    scalars = ["scalar", "log/a", "log/b", "series", "main/left", "main/right/most"]
    assert tags["scalars"] == scalars
    assert {"scalar/new", "tensor", "text/text_summary", "pr", "pr/raw", "mesh_VERTEX"} <= set(tags["tensors"])


def test_scalars_have_their_steps_values_and_times(writer: Writer) -> None:
    before = time.time()
    writer.add_scalar("loss", 0.1, 7)
    writer.add_scalar("loss", torch.tensor(0.2, requires_grad=True), torch.tensor(8), walltime=5.0)
    writer.add_scalar("loss", np.float64(0.3))
    writer.log(9, {"loss": torch.tensor([0.5], dtype=torch.bfloat16)})
    writer.add_scalar_series("series", torch.arange(500), torch.arange(500).bfloat16(), torch.full((500,), 6.0))
    writer.close()
    loss, series = ([point for point in points(writer.events.path) if point[0] == tag] for tag in ("loss", "series"))
    assert [point[1:3] for point in loss] == [
        (step, float(np.float32(value))) for step, value in [(7, 0.1), (8, 0.2), (0, 0.3), (9, 0.5)]
    ]
    assert loss[1][3] == 5.0
    assert before <= loss[0][3] <= loss[2][3] <= time.time()
    assert [point[1:] for point in series] == [(step, float(torch.tensor(step).bfloat16()), 6.0) for step in range(500)]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_on_a_gpu(writer: Writer) -> None:
    values = torch.rand(1_000, device="cuda", dtype=torch.bfloat16)
    writer.add_scalar("loss", values.mean(), 1)
    writer.log(2, {"loss": values[0]})
    writer.add_scalar_series("series", torch.arange(1_000, device="cuda"), values)
    writer.add_histogram("histogram", values, 1)
    writer.add_image("image", torch.rand(3, 8, 8, device="cuda"), 1)
    accumulator = accumulated(writer)
    assert writer.dropped == 0
    assert accumulator.Scalars("loss")[0].value == float(values.mean())
    assert [event.value for event in accumulator.Scalars("series")] == values.float().tolist()
    assert accumulator.Histograms("histogram")[0].histogram_value.num == 1_000


def test_pixels_are_kept(writer: Writer) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    writer.add_image("bytes", pixels, dataformats="HWC")
    writer.add_image("floats", torch.from_numpy(pixels / 255.0).permute(2, 0, 1).bfloat16())
    writer.add_image("integers", pixels.astype(np.int64), dataformats="HWC")
    writer.add_image("out of range", np.array([[-1.0, 2.0, np.nan, np.inf]]), dataformats="HW")
    writer.add_image("grey", pixels[..., 0], dataformats="HW")
    writer.add_images("grid", pixels[None].repeat(3, 0), dataformats="NHWC")
    accumulator = accumulated(writer)
    np.testing.assert_array_equal(np.asarray(image_of(accumulator, "bytes")), pixels)
    assert np.abs(np.asarray(image_of(accumulator, "floats"), int) - pixels).max() <= 2
    np.testing.assert_array_equal(np.asarray(image_of(accumulator, "integers")), pixels)
    assert np.asarray(image_of(accumulator, "out of range").convert("L")).tolist() == [[0, 255, 0, 255]]
    np.testing.assert_array_equal(np.asarray(image_of(accumulator, "grey").convert("L")), pixels[..., 0])
    np.testing.assert_array_equal(np.asarray(image_of(accumulator, "grid")), np.concatenate([pixels] * 3, axis=1))


def test_videos_lie_beside_each_other_and_play(writer: Writer) -> None:
    videos = np.zeros((3, 4, 3, 6, 8), np.uint8)
    videos[1, 2] = 255
    writer.add_video("video", videos, fps=10)
    image = image_of(accumulated(writer), "video")
    assert image.size == (16, 12)
    frames, seconds = [], 0.0
    for index in range(image.n_frames):  # type: ignore[attr-defined]
        image.seek(index)
        frames.append(np.asarray(image.convert("L")))
        seconds += image.info["duration"] / 1_000
    assert seconds == pytest.approx(0.4)  # equal frames may be one
    bright = [frame for frame in frames if frame.max() > 200]
    assert len(bright) == 1
    assert bright[0][:6, 8:].min() > 200
    assert bright[0][:, :8].max() < 50


def test_a_histogram_is_that_of_its_finite_values(writer: Writer) -> None:
    writer.add_histogram("weights", torch.tensor([1.0, math.nan, 2.0, math.inf, -math.inf]), 1)
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    writer.add_histogram("many bins", values, 1)
    writer.add_histogram("few bins", values, 1, max_bins=100)
    accumulator = accumulated(writer)
    histogram = accumulator.Histograms("weights")[0].histogram_value
    assert (histogram.num, histogram.min, histogram.max, histogram.sum) == (2, 1.0, 2.0, 3.0)
    many, few = (
        sum(count > 0 for count in accumulator.Histograms(tag)[0].histogram_value.bucket)
        for tag in ("many bins", "few bins")
    )
    assert few <= 100 < many


def test_a_graph_or_the_reason_why_there_is_none(writer: Writer) -> None:
    class Refusing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            raise RuntimeError(f"no forward for {len(inputs)}")

    writer.add_graph(POLICY, torch.zeros(1, 4))
    with pytest.warns(LogWarning, match="Refusing.*no forward for"):
        writer.add_graph(Refusing(), torch.zeros(1, 2))
    writer.add_graph(Refusing(), torch.zeros(1, 2))
    accumulator = accumulated(writer)
    assert any("0" in node.name for node in GraphDef.FromString(accumulator._graph).node)
    text = tensor_util.make_ndarray(accumulator.Tensors("Refusing/tree/text_summary")[0].tensor_proto).item().decode()
    assert "no forward for" in text
    assert "inner" in text
    assert writer.dropped == 0


def sessions(writer: Writer) -> list[HParamsPluginData]:
    """Returns what the HParams tab is told, in order."""
    return [
        HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for event in whole_events(writer.events.path)
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "hparams"
    ]


def test_hyperparameters_keep_their_types(writer: Writer) -> None:
    values: dict[str, Any] = {
        "bool": True,
        "numpy bool": np.bool_(False),
        "int": 3,
        "numpy": np.float32(0.5),
        "tensor": torch.tensor(7),
        "text": "adam",
        "none": None,
        "path": Path("data"),
        "list": [1, 2],
        "array": np.arange(2),
        "nan": math.nan,
        "infinite": math.inf,
        "huge": 10**400,
    }
    writer.add_hparams(values, {"hparam/accuracy": 0.75, "hparam/loss": np.float32(0.5)}, global_step=4)
    writer.close()
    start, end = sessions(writer)
    read = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.session_start_info.hparams.items()}
    expected = {
        "bool": True,
        "numpy bool": False,
        "int": 3.0,
        "numpy": 0.5,
        "tensor": 7.0,
        "text": "adam",
        "none": "None",
        "path": "data",
        "list": "[1, 2]",
        "array": "[0 1]",
        "nan": "nan",
        "infinite": "inf",
        "huge": str(10**400),
    }
    assert read == expected
    assert {name: type(value) for name, value in read.items()} == {
        name: type(value) for name, value in expected.items()
    }
    assert end.session_end_info.status == 1  # STATUS_SUCCESS
    assert [point[:3] for point in points(writer.events.path) if point[0].startswith("hparam/")] == [
        ("hparam/accuracy", 4, 0.75),
        ("hparam/loss", 4, 0.5),
    ]
    assert [path.name for path in Path(writer.log_dir).iterdir()] == [writer.events.path.name]


def test_only_the_first_hyperparameters_of_a_run_count(writer: Writer) -> None:
    writer.add_hparams({"lr": 0.1}, {"score": 1.0})
    with pytest.warns(LogWarning, match="has its hyperparameters"):
        writer.add_hparams({"lr": 0.2}, {"score": 2.0}, global_step=1)
    writer.close()
    assert sessions(writer)[0].session_start_info.hparams["lr"].number_value == 0.1
    assert [point[:3] for point in points(writer.events.path) if point[0] == "score"] == [
        ("score", 0, 1.0),
        ("score", 1, 2.0),
    ]


def test_a_session_ends_as_the_run_does(tmp_path: Path) -> None:
    def statuses(end: Callable[[Writer], None], name: str) -> list[int]:
        writer = open_writer(tmp_path / name)
        writer.start_session({"lr": 0.1})
        end(writer)
        return [session.session_end_info.status for session in sessions(writer)[1:]]

    def fail(writer: Writer) -> None:
        with pytest.raises(ZeroDivisionError), writer:
            writer.log(0, {"loss": 1 / 0})

    def say_so(writer: Writer) -> None:
        writer.end_session(success=False)
        writer.close()

    success, failure = 1, 2
    assert statuses(Writer.close, "closed") == [success]
    assert statuses(fail, "raised") == [failure]
    assert statuses(say_so, "said") == [failure]


BAD: list[tuple[str, tuple[Any, ...]]] = [
    ("add_scalar", (None,)),
    ("add_scalar", ("text",)),
    ("add_scalar", (1j,)),
    ("add_scalar", (np.zeros(3),)),
    ("add_scalar", (torch.zeros(0),)),
    ("add_scalar", (torch.zeros(2, 2),)),
    ("add_scalar", (torch.tensor(1j),)),
    ("add_scalar", (1.0, "step")),
    ("add_scalar", (1.0, 2**64)),
    ("add_scalar_series", ([1, 2], [1.0])),
    ("add_scalar_series", ([1.5], [1.0])),
    ("add_tensor", ("text",)),
    ("add_histogram", (np.array([]),)),
    ("add_histogram", ([math.nan, math.inf],)),
    ("add_histogram", (None,)),
    ("add_histogram", (torch.zeros(3, dtype=torch.complex64),)),
    ("add_image", (np.zeros((2, 2)),)),
    ("add_image", (np.zeros((3, 0, 0)),)),
    ("add_image", (np.zeros((5, 4, 4)),)),
    ("add_image", ("image.png",)),
    ("add_images", (torch.zeros(3, 8, 8),)),
    ("add_figure", (None,)),
    ("add_video", (torch.zeros(3, 8, 8),)),
    ("add_audio", ("sound",)),
    ("add_wav", (__file__,)),
    ("add_wav", ("missing.wav",)),
    ("add_text", (None,)),
    ("add_pr_curve", ([1], "x")),
    ("add_mesh", ("vertices",)),
]


@pytest.mark.parametrize(("method", "arguments"), BAD)
def test_what_cannot_be_logged_is_one_warning_with_its_tag(
    writer: Writer, method: str, arguments: tuple[Any, ...]
) -> None:
    with pytest.warns(LogWarning, match=r"^the/tag: not logged: \w+: .+"):
        getattr(writer, method)("the/tag", *arguments)
    getattr(writer, method)("the/tag", *arguments)
    writer.add_scalar("after", 1.0, 1)
    assert writer.dropped == 2
    writer.close()
    assert [point[0] for point in points(writer.events.path)] == ["after"]


@pytest.mark.parametrize("method", [name for name in dir(Writer) if name.startswith("add_")])
def test_no_method_of_torch_raises(writer: Writer, method: str) -> None:
    function = getattr(writer, method)
    required = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    with pytest.warns(LogWarning):
        function(*[object() for _ in required])


def test_only_what_is_bad_in_a_step_is_dropped(writer: Writer) -> None:
    with pytest.warns(LogWarning, match="b: not logged"):
        writer.log(1, {"a": 1.0, "b": None, "c": 3.0})
    with pytest.warns(LogWarning, match="y: not logged"):
        writer.add_scalars("main", {"x": 1.0, "y": "two"}, 1)
    writer.close()
    assert [point[:3] for point in points(writer.events.path)] == [("a", 1, 1.0), ("c", 1, 3.0), ("main/x", 1, 1.0)]
    assert writer.dropped == 2


def test_a_removed_run_directory_does_not_end_training(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "_flush_all", lambda: None)  # or the tick may be the one that warns
    shutil.rmtree(writer.log_dir)
    writer.add_scalar("loss", 1.0, 1)
    with pytest.warns(LogWarning, match="deleted"):
        writer.flush()
    writer.add_image("image", torch.rand(3, 100, 300), 1)
    writer.add_histogram("histogram", torch.rand(9), 1)
    writer.close()
    assert writer.dropped == 3


def test_nothing_that_is_used_is_deprecated(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with open_writer(tmp_path) as writer:
            add_everything(writer)


def test_it_is_a_summary_writer(writer: Writer) -> None:
    assert isinstance(writer, SummaryWriter)
    writer.file_writer.add_summary(next(iter(whole_events(writer.events.path))).summary, 3)
    writer.close()
    writer.close()


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_the_format_of_images_is_an_option(image_format: Any, tmp_path: Path) -> None:
    writer = open_writer(tmp_path, image_format=image_format)
    writer.add_image("image", torch.full((3, 8, 8), 0.5), 1)
    image = image_of(accumulated(writer), "image")
    assert image.format == image_format.upper()
    assert np.asarray(image.convert("RGB")).mean() == pytest.approx(127, abs=2)
