"""What histograms, images and animations show once TensorBoard has read them."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn
from numpy.typing import NDArray
from PIL import Image
from tensorboard import data_compat
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from tensorboard.plugins.distribution.compressor import compress_histogram_proto
from tensorboard.util import tensor_util

from rlboard.eventfile import EventFile, animation_summary, histogram, histogram_summary, image_summary
from rlboard.eventfile.summary import LARGE, NARROW, _compiled
from tests.browser import chromium, tensorboard

RANDOM = np.random.default_rng(0)
NORMAL = RANDOM.standard_normal(50_000)

DISTRIBUTIONS: dict[str, NDArray[Any]] = {
    "normal": NORMAL.astype(np.float32),
    "normal, double": NORMAL,
    "normal, half": NORMAL.astype(np.float16),
    "normal, large enough for numba": RANDOM.standard_normal(2 * LARGE).astype(np.float32),
    "double, large enough for numba": RANDOM.standard_normal(LARGE),
    "narrow": (5 + 1e-3 * NORMAL).astype(np.float32),
    "narrow, negative": -5 + 1e-3 * NORMAL,
    "narrow, large enough for numba": 5 + 1e-3 * RANDOM.standard_normal(LARGE),
    "narrow and far from zero": 1e6 + 300 * NORMAL,
    "uniform from 0 to 1": RANDOM.random(50_000),
    "uniform from 1 to 2": 1 + RANDOM.random(50_000),
    "half of it zero": np.maximum(NORMAL, 0),
    "nothing positive": np.minimum(NORMAL, 0),
    "long tails": RANDOM.standard_cauchy(50_000),
    "lognormal": RANDOM.lognormal(0, 3, 50_000),
    "tiny": 1e-30 * NORMAL,
    "pixels": RANDOM.integers(0, 256, 50_000).astype(np.uint8),
    "integers": RANDOM.poisson(1000, 50_000),
}


def buckets(proto: HistogramProto) -> NDArray[np.float32]:
    """Returns what TensorBoard draws: (left, right, count) of each bucket."""
    summary = Summary.Value(tag="tag", histo=proto)
    return tensor_util.make_ndarray(data_compat.migrate_value(summary).tensor)  # type: ignore[no-any-return]


def drawn(proto: HistogramProto, low: float, high: float) -> NDArray[Any]:
    """Returns the shares of the 30 bars of the Histograms tab, computed as its script does."""
    bars = np.linspace(low, high, 31)
    shares: NDArray[Any] = np.zeros(30)
    for left, right, count in buckets(proto).astype(float):
        if right > left:
            overlap = np.minimum(right, bars[1:]) - np.maximum(left, bars[:-1])
            shares += count * overlap.clip(0) / (right - left)
        else:
            shares[min(np.searchsorted(bars, left, "right") - 1, 29)] += count
    return np.asarray(shares / shares.sum())


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_histogram_has_the_shape_of_its_values(name: str) -> None:
    values = DISTRIBUTIONS[name].astype(np.float64)
    proto = histogram(DISTRIBUTIONS[name])
    low, high = float(values.min()), float(values.max())
    assert (proto.min, proto.max, proto.num) == (low, high, values.size)
    assert proto.sum == pytest.approx(values.sum(), rel=1e-9, abs=1e-9 * np.abs(values).sum())
    assert proto.sum_squares == pytest.approx(np.square(values).sum(), rel=1e-9)
    assert sum(proto.bucket) == values.size
    exact, _ = np.histogram(values, np.linspace(low, high, 31))
    # No more than 2 % of the values are drawn in another bar.
    assert np.abs(drawn(proto, low, high).cumsum() - exact.cumsum() / values.size).max() < 0.02
    # The Distributions tab: percentiles within the width of a bucket, however long the tails are.
    points, percentiles = zip(*compress_histogram_proto(proto), strict=True)
    expected = np.percentile(values, np.array(points) / 100)
    narrow = low * high > 0 and 1 / 16 < low / high < 16
    width = (high - low) / NARROW if narrow else 0.13 * np.abs(expected)
    assert (np.abs(percentiles - expected) <= width + 1e-9 * (high - low)).all()
    assert np.count_nonzero(proto.bucket) <= 512


@pytest.mark.parametrize("name", [name for name in DISTRIBUTIONS if "numba" in name])
def test_numba_and_numpy_count_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = DISTRIBUTIONS[name]
    compiled = histogram(values)
    monkeypatch.setattr("rlboard.eventfile.summary.LARGE", values.size + 1)
    interpreted = histogram(values)
    assert compiled.bucket == interpreted.bucket
    assert compiled.bucket_limit == interpreted.bucket_limit
    assert (compiled.min, compiled.max) == (interpreted.min, interpreted.max)
    assert compiled.sum == pytest.approx(interpreted.sum, abs=1e-9 * interpreted.sum_squares)
    assert compiled.sum_squares == pytest.approx(interpreted.sum_squares, rel=1e-12)


def test_without_numba_numpy_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = DISTRIBUTIONS["normal, large enough for numba"]
    expected = histogram(values)
    monkeypatch.setitem(sys.modules, "numba", None)
    _compiled.cache_clear()
    try:
        assert histogram(values).bucket == expected.bucket
    finally:
        _compiled.cache_clear()


FLOATS = st.sampled_from([np.float16, np.float32, np.float64]).flatmap(
    lambda dtype: stn.arrays(dtype, st.integers(1, 50), elements=stn.from_dtype(np.dtype(dtype)))
)


@given(values=FLOATS, max_bins=st.integers(0, 100))
@example(values=np.array([0.0, -0.0]), max_bins=10)
@example(values=np.array([5e-324, 0]), max_bins=10)
@example(values=np.array([1.7e308, -1.7e308, 0]), max_bins=10)
@example(values=np.array([3.4028235e38, -3.4028235e38, 1e-45], np.float32), max_bins=10)
@example(values=NORMAL[:1000], max_bins=64)
@example(values=NORMAL[:1000].astype(np.float32), max_bins=100)
@example(values=5 + 1e-3 * NORMAL[:1000], max_bins=10)
@example(values=2.0 ** np.arange(NARROW + 1), max_bins=NARROW)
def test_every_value_is_in_its_bucket(values: NDArray[Any], max_bins: int) -> None:
    finite = values[np.isfinite(values)].astype(np.float64)
    if not finite.size:
        with pytest.raises(ValueError, match="finite"):
            histogram(values, max_bins)
        return
    proto = histogram(values, max_bins)
    assert proto.num == finite.size
    assert (proto.min, proto.max) == (finite.min(), finite.max())
    limits = np.array(proto.bucket_limit)
    assert len(limits) == len(proto.bucket)
    assert np.isfinite(limits).all()
    assert (np.diff(limits) > 0).all() or (proto.min == proto.max and len(limits) == 2)
    assert limits[0] <= proto.min
    assert proto.max <= limits[-1]
    assert np.count_nonzero(proto.bucket) <= max(max_bins, NARROW)
    # A value at a limit, or as near as rounding tells, may be counted on either side.
    slack = 1e-12 * proto.max - 1e-12 * proto.min
    counts = list(zip(proto.bucket_limit, np.cumsum(proto.bucket), strict=True))
    assert all(np.count_nonzero(finite < limit - slack) <= count for limit, count in counts)
    assert all(np.count_nonzero(finite <= limit + slack) >= count for limit, count in counts)


def test_values_that_are_not_finite_are_left_out() -> None:
    values = np.array([1.0, np.nan, np.inf, 2.0, -np.inf])
    assert histogram(values) == histogram(np.array([1.0, 2.0]))
    assert values.size - histogram(values).num == 3
    large = np.resize(values, LARGE)
    assert histogram(large).num == np.isfinite(large).sum()


@pytest.mark.parametrize("values", [[], [np.nan], [np.inf, -np.inf]])
def test_no_finite_value_is_an_error(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        histogram(values)


@pytest.mark.parametrize("values", [np.array([1j]), np.array(["a"]), np.array([None])])
def test_only_real_numbers_are_counted(values: NDArray[Any]) -> None:
    with pytest.raises(TypeError, match="real numbers"):
        histogram(values)


@pytest.mark.parametrize("value", [0.0, 3.5, -2.0])
def test_a_constant_is_one_bucket(value: float) -> None:
    (bucket,) = buckets(histogram(np.full((10, 2), value)))
    assert bucket.tolist() == [value, value, 20]


def test_truth_values_are_zeros_and_ones() -> None:
    shares = drawn(histogram(np.array([True, True, False, True])), 0, 1)
    assert shares[0] == pytest.approx(0.25)
    assert shares[-1] == pytest.approx(0.75)


def test_the_layout_in_memory_makes_no_difference() -> None:
    values = NORMAL[:3000].reshape(10, 20, 15)
    expected = histogram(values)
    for view in (np.asfortranarray(values), values.transpose(2, 0, 1), np.repeat(values, 2, axis=1)[:, ::2]):
        assert histogram(view).bucket == expected.bucket
    before = values.copy()
    histogram(np.asfortranarray(values))
    assert (values == before).all()


def test_numba_is_not_imported_for_small_arrays() -> None:
    script = (
        "import sys, numpy\nfrom rlboard.eventfile import histogram, image_summary\n"
        "histogram(numpy.arange(1000.0))\nimage_summary('a', numpy.zeros((2, 2), numpy.uint8))\n"
        "sys.exit(bool({'numba', 'torch', 'PIL'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


def picture(height: int, width: int, channels: int) -> NDArray[np.uint8]:
    y, x, channel = np.mgrid[0:height, 0:width, 0:channels]
    waves = 127 + 80 * np.sin((x + 10 * channel) / 9) * np.cos(y / 7)
    return np.asarray(waves + RANDOM.integers(0, 9, x.shape), np.uint8)


def opened(summary: Summary) -> Image.Image:
    (value,) = summary.value
    image: Image.Image = Image.open(io.BytesIO(value.image.encoded_image_string))
    assert (value.tag, value.image.width, value.image.height) == ("tag", *image.size)
    return image


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (40, 30), (255, 257)])
def test_png_keeps_every_pixel(height: int, width: int, channels: int) -> None:
    image = picture(height, width, channels)
    summary = image_summary("tag", image)
    assert summary.value[0].image.colorspace == channels
    read = opened(summary)
    assert read.mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    assert (np.asarray(read).reshape(image.shape) == image).all()


def test_png_takes_grey_pictures_without_channels_and_any_strides() -> None:
    image = picture(40, 30, 3)
    for view in (image[..., 0], image[::-1, ::2, 1], image.transpose(1, 0, 2)):
        assert (np.asarray(opened(image_summary("tag", view))) == view).all()


@pytest.mark.parametrize("image", [picture(100, 200, 3), np.full((100, 200, 3), 255, np.uint8)])
def test_png_is_not_much_larger_than_that_of_an_encoder_that_tries_harder(image: NDArray[np.uint8]) -> None:
    reference = io.BytesIO()
    Image.fromarray(image).save(reference, "png")
    assert len(image_summary("tag", image).value[0].image.encoded_image_string) < 1.2 * reference.tell() + 1000


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("file_format", ["jpeg", "webp"])
def test_lossy_formats_look_alike(file_format: Any, channels: int) -> None:
    image = picture(64, 48, channels)
    image[..., 3:] = 255
    read = opened(image_summary("tag", image, file_format))
    assert read.format == file_format.upper()
    mode = "L" if channels == 1 else "RGB"
    difference = np.asarray(read.convert(mode), int).reshape(64, 48, -1) - image[..., :3]
    assert np.abs(difference).mean() < 8


@pytest.mark.parametrize("shape", [(4,), (4, 4, 2), (0, 4, 3), (2, 4, 4, 3)])
def test_what_is_no_picture_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        image_summary("tag", np.zeros(shape, np.uint8))


def test_other_pixels_and_formats_are_refused() -> None:
    with pytest.raises(TypeError, match="uint8"):
        image_summary("tag", np.zeros((2, 2, 3)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bmp"):
        image_summary("tag", np.zeros((2, 2, 3), np.uint8), "bmp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mp4"):
        animation_summary("tag", np.zeros((2, 2, 2, 3), np.uint8), 10, "mp4")  # type: ignore[arg-type]


def moving_bar(frames: int, channels: int = 3) -> NDArray[np.uint8]:
    clip = np.zeros((frames, 24, 32, channels), np.uint8)
    for time, frame in enumerate(clip):
        frame[:, 2 * time : 2 * time + 4] = 255
    clip[..., 3:] = 255
    return clip


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("file_format", ["gif", "webp", "apng"])
def test_every_frame_of_an_animation_is_there(file_format: Any, channels: int) -> None:
    clip = moving_bar(8, channels)
    read = opened(animation_summary("tag", clip, 20, file_format))
    assert getattr(read, "n_frames", 1) == 8
    assert read.info.get("loop") == 0
    for time in range(8):
        read.seek(time)
        read.load()  # WebP knows the duration of a frame only then
        assert read.info["duration"] == 50
        frame = np.asarray(read.convert("L"), int)
        assert np.abs(frame - clip[time, ..., 0]).mean() < 2


@pytest.mark.parametrize(("fps", "milliseconds"), [(1, 1000), (7, 140), (200, 20)])
def test_the_speed_of_a_gif(fps: float, milliseconds: int) -> None:
    assert opened(animation_summary("tag", moving_bar(2), fps)).info["duration"] == milliseconds


def test_one_frame_is_an_animation_too() -> None:
    assert opened(animation_summary("tag", moving_bar(1), 10)).size == (32, 24)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_an_impossible_speed_is_refused(fps: float) -> None:
    with pytest.raises(ValueError, match="fps"):
        animation_summary("tag", moving_bar(2), fps)


@pytest.mark.slow
@pytest.mark.browser
def test_pictures_and_histograms_are_drawn(tmp_path: Path) -> None:
    image, clip = picture(40, 60, 3), moving_bar(8)
    still: tuple[Any, ...] = ("png", "jpeg", "webp")
    moving: tuple[Any, ...] = ("gif", "webp", "apng")
    with EventFile(tmp_path / "run") as events:
        for step in range(3):
            events.summary(histogram_summary("weights", NORMAL * (1 + step)), step)
        for name in still:
            events.summary(image_summary(f"pictures/{name}", image, name), 0)
        for name in moving:
            events.summary(animation_summary(f"pictures/animated {name}", clip, 10, name), 0)
    with chromium() as page, tensorboard(tmp_path) as url:
        page.goto(f"{url}/#images")
        pictures = page.locator("tf-image-loader img")
        pictures.nth(5).wait_for()
        sizes = "images => Promise.all(images.map(async i => [(await i.decode(), i.naturalWidth), i.naturalHeight]))"
        assert sorted(pictures.evaluate_all(sizes)) == [[32, 24]] * 3 + [[60, 40]] * 3
        page.goto(f"{url}/#histograms")
        outlines = page.locator("vz-histogram-timeseries path.outline")
        outlines.nth(2).wait_for()
        assert len(set(outlines.evaluate_all("paths => paths.map(path => path.getAttribute('d'))"))) == 3
