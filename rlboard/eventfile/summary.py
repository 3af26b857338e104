"""Cheap encodings of arrays as TensorBoard summaries: histograms, images, animations and sounds.

They hold what TensorBoard's own summaries hold, so that every tab and reader takes them; saved is the work of getting
there.
"""

from __future__ import annotations

import io
import math
import struct
import wave
import zlib
from functools import cache
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary

Floats = NDArray[np.floating[Any]]
"""One-dimensional, contiguous, float32 or float64."""

LARGE = 1 << 17
"""From this many values on Numba counts, three times faster than NumPy; importing it takes 0.6 s."""

MANTISSA = 4
"""Bits of the mantissa that tell bins apart: each is 3 to 6 % wide."""

NARROW = 64
"""Values that span fewer bins than this, four powers of two, are counted in as many bins of equal width instead."""


def histogram(values: ArrayLike, max_bins: int = 512) -> HistogramProto:
    """Returns the distribution of `values` in buckets of which at most `max_bins`, or `NARROW`, hold any.

    Sign, exponent and the first bits of the mantissa of a float, read as an integer, are its bin on a scale that is
    logarithmic from zero in both directions: there is no bucket to search for. While too many bins are occupied,
    neighbours are joined. Values too close together for this scale are counted in bins of equal width between them.

    NaN and infinities are left out; there are `np.size(values) - histogram(values).num` of them.

    Raises:
        TypeError: the values are not real numbers.
        ValueError: none of them is finite.
    """
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"a histogram is made of real numbers, not of {array.dtype}")
    exact_in_single = array.dtype.itemsize <= 2 or array.dtype == np.float32
    dtype = np.float32 if exact_in_single else np.float64
    flat, low, high = _finite(array.ravel(order="K").astype(dtype, copy=False))
    if _bin(high) - _bin(low) < NARROW:
        limits, buckets = _equal_bins(flat, float(low), float(high))
    else:
        limits, buckets = _logarithmic_bins(flat, max(max_bins, NARROW))
    total, squares = _sums(flat)
    return HistogramProto(
        min=float(low),
        max=float(high),
        num=flat.size,
        sum=total,
        sum_squares=squares,
        bucket_limit=limits.tolist(),
        bucket=buckets.tolist(),
    )


def histogram_summary(tag: str, values: ArrayLike) -> Summary:
    """Returns `histogram(values)` as a summary."""
    return Summary(value=[Summary.Value(tag=tag, histo=histogram(values))])


def _finite(flat: Floats) -> tuple[Floats, np.floating[Any], np.floating[Any]]:
    """Returns the finite values, the least and the greatest of them."""
    if flat.size:
        low, high = flat.min(), flat.max()
        if np.isfinite(low) and np.isfinite(high):
            return flat, low, high
        flat = flat[np.isfinite(flat)]
    if not flat.size:
        raise ValueError("a histogram needs at least one finite value")
    return flat, flat.min(), flat.max()


def _shift(dtype: np.dtype[Any]) -> int:
    """Returns how many bits of a float do not tell its bin."""
    return int(np.finfo(dtype).nmant) - MANTISSA


def _bin(value: np.floating[Any]) -> int:
    """Returns the bin of a value: 0 and up for positive ones, -1 and down for negative ones."""
    magnitude = int(np.abs(value).view(f"u{value.itemsize}")) >> _shift(value.dtype)
    return -1 - magnitude if np.signbit(value) else magnitude


def _logarithmic_bins(flat: Floats, max_bins: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns limits and counts of bins, 2**k joined to one, by the least k that leaves at most `max_bins` occupied."""
    bins, counts = _occupied_bins(flat)
    # Neighbours stay apart until the highest bit in which they differ is shifted out; those of two signs always do.
    differences = bins[1:] ^ bins[:-1]
    joined = 0
    if differences.size >= max_bins:
        joined = int(np.partition(differences.view(np.uintp), -max_bins)[-max_bins]).bit_length()
    starts = np.concatenate([[0], 1 + np.flatnonzero(differences >> joined)])
    left = bins[starts] >> joined

    # A bucket is known by its upper limit alone: an empty one goes before each that does not follow upon another.
    ends = np.stack([left, left + 1], axis=1).ravel()
    buckets = np.zeros(ends.size)
    buckets[1::2] = np.add.reduceat(counts, starts)
    new = np.concatenate([[True], ends[1:] > ends[:-1]])
    return _lower_limits(ends[new] << joined, flat.dtype), buckets[new]


def _occupied_bins(flat: Floats) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Returns the bins that hold any values, ascending, and how many."""
    bits = flat.view(f"u{flat.itemsize}")
    shift = _shift(flat.dtype)
    sign = 1 << (8 * flat.itemsize - 1 - shift)
    if loops := _loops(flat):
        table = np.zeros(2 * sign, np.intp)
        loops.count(bits, bits.dtype.type(shift), table)
    else:
        table = np.bincount((bits >> shift).astype(np.intp), minlength=2 * sign)
    ascending = np.concatenate([table[: sign - 1 : -1], table[:sign]])
    places = np.flatnonzero(ascending != 0)
    return places - sign, ascending[places]


def _lower_limits(bins: NDArray[np.intp], dtype: np.dtype[Any]) -> NDArray[np.float64]:
    """Returns where bins begin; for those past the last finite one, the largest float64."""
    magnitudes = np.minimum(np.abs(bins), _bin(dtype.type(np.inf))).astype(f"u{dtype.itemsize}")
    limits = (magnitudes << _shift(dtype)).view(dtype).astype(np.float64)
    return np.nan_to_num(np.copysign(limits, bins), copy=False)


def _equal_bins(flat: Floats, low: float, high: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns limits and counts of `NARROW` bins of equal width from `low` to `high`, or of one that holds them all."""
    width = (high - low) / NARROW
    if width < np.finfo(np.float64).tiny:  # nothing, or too little to divide by
        return np.array([low, high]), np.array([0.0, flat.size])
    if loops := _loops(flat):
        table = np.zeros(NARROW, np.intp)
        loops.count_equal(flat, low, 1 / width, table)
    else:
        places = ((flat - np.float64(low)) * (1 / width)).astype(np.intp)
        table = np.bincount(np.minimum(places, NARROW - 1), minlength=NARROW)
    return np.linspace(low, high, NARROW + 1), np.concatenate([[0.0], table])


def _sums(flat: Floats) -> tuple[float, float]:
    """Returns the sum and the sum of squares."""
    if loops := _loops(flat):
        total, squares = loops.sums(flat)
        return float(total), float(squares)
    with np.errstate(over="ignore"):
        return float(flat.sum(dtype=np.float64)), float(np.square(flat, dtype=np.float64).sum())


def _loops(flat: Floats) -> SimpleNamespace | None:
    """Returns the compiled passes over an array that is worth them, if there are any."""
    return _compiled() if flat.size >= LARGE else None


@cache
def _compiled() -> SimpleNamespace | None:
    """Returns the passes over an array as Numba compiles them; after the first time on a machine, from its cache."""
    try:
        from numba import config, njit

        if config.DISABLE_JIT:  # type: ignore[attr-defined]
            return None
        return SimpleNamespace(
            count=njit(cache=True)(_count),
            count_equal=njit(cache=True)(_count_equal),
            sums=njit(cache=True, fastmath=True)(_sum),
        )
    except (ImportError, RuntimeError):  # no Numba, or no place for its cache
        return None


def _count(bits: NDArray[np.unsignedinteger[Any]], shift: Any, table: NDArray[np.intp]) -> None:
    for i in range(bits.size):
        table[bits[i] >> shift] += 1


def _count_equal(flat: Floats, low: float, bins_per_unit: float, table: NDArray[np.intp]) -> None:
    for i in range(flat.size):
        place = int((flat[i] - low) * bins_per_unit)
        table[min(place, table.size - 1)] += 1


def _sum(flat: Floats) -> tuple[float, float]:
    total = squares = 0.0
    for i in range(flat.size):
        value = np.float64(flat[i])
        total += value
        squares += value * value
    return total, squares


def image_summary(tag: str, image: NDArray[np.uint8], format: Literal["png", "jpeg", "webp"] = "png") -> Summary:  # noqa: A002
    """Returns an image for the Images tab.

    PNG keeps every pixel. JPEG and WebP are lossy and several times smaller on photographs; JPEG is the fastest of the
    three, but drops transparency.

    Args:
        tag: the name of the series.
        image: (height, width) or (height, width, channels), uint8, of 1 (grey), 3 (RGB) or 4 (RGBA) channels.
        format: the encoding.

    Raises:
        TypeError: the image is not uint8.
        ValueError: another shape, or an unknown format.
    """
    pixels = _pixels(image, dimensions=3)
    if format == "png":
        encoded = encode_png(pixels)
    elif format == "jpeg":
        encoded = encode_jpeg(pixels)
    elif format == "webp":
        encoded = _encoded([pixels], "webp", {"method": 0})
    else:
        raise ValueError(f"unknown image format {format!r}: png, jpeg or webp")
    return _image_summary(tag, pixels, encoded)


def animation_summary(
    tag: str,
    frames: NDArray[np.uint8],
    fps: float,
    format: Literal["gif", "webp", "apng"] = "gif",  # noqa: A002
) -> Summary:
    """Returns a video without sound that plays in the Images tab, over and over.

    GIF has 256 colours a frame and at most 50 frames a second; APNG keeps every pixel; WebP is lossy.

    Args:
        tag: the name of the series.
        frames: (time, height, width) or (time, height, width, channels), uint8, with the channels of an image.
        fps: frames per second.
        format: the encoding.

    Raises:
        TypeError: the frames are not uint8.
        ValueError: another shape, `fps` not positive and finite, or an unknown format.
    """
    pixels = _pixels(frames, dimensions=4)
    if not (fps > 0 and math.isfinite(fps)):
        raise ValueError(f"fps must be positive, not {fps}")
    milliseconds = max(1, round(1000 / fps))
    if format == "gif":
        options: dict[str, Any] = {"duration": max(20, milliseconds)}  # browsers slow anything shorter down to 100 ms
    elif format == "webp":
        options = {"duration": milliseconds, "method": 0}
    elif format == "apng":
        options = {"duration": milliseconds, "compress_level": 1}
    else:
        raise ValueError(f"unknown animation format {format!r}: gif, webp or apng")
    encoded = _encoded(list(pixels), "png" if format == "apng" else format, {**options, "loop": 0})
    return _image_summary(tag, pixels[0], encoded)


def wav_summary(tag: str, content: bytes) -> Summary:
    """Returns a WAV file for the Audio tab, as it is: PCM samples of 8 to 32 bits, of any rate, in any channels.

    Raises:
        ValueError: `content` is no such file, or ends early.
    """
    try:
        with wave.open(io.BytesIO(content)) as file:
            frames, channels, rate = file.getnframes(), file.getnchannels(), file.getframerate()
            whole = len(file.readframes(frames)) == frames * channels * file.getsampwidth()
    except (wave.Error, EOFError) as error:
        raise ValueError(f"not a WAV file of PCM samples ({str(error) or 'it ends early'})") from None
    if not frames or not whole:
        raise ValueError("a WAV file that ends early" if frames else "a WAV file without sound")
    audio = Summary.Audio(
        sample_rate=rate,
        num_channels=channels,
        length_frames=frames,
        encoded_audio_string=content,
        content_type="audio/wav",
    )
    return Summary(value=[Summary.Value(tag=tag, audio=audio)])


def _pixels(image: NDArray[np.uint8], dimensions: int) -> NDArray[np.uint8]:
    """Returns `image` with its channels as the last axis, checked."""
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8:
        raise TypeError(f"pixels are uint8, not {pixels.dtype}")
    if pixels.ndim == dimensions - 1:
        pixels = pixels[..., None]
    if pixels.ndim != dimensions or pixels.shape[-1] not in (1, 3, 4) or pixels.size == 0:
        raise ValueError(f"no picture has the shape {np.shape(image)}: the last axis is 1, 3 or 4 channels")
    return pixels


def _image_summary(tag: str, pixels: NDArray[np.uint8], encoded: bytes) -> Summary:
    height, width, channels = pixels.shape
    image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=encoded)
    return Summary(value=[Summary.Value(tag=tag, image=image)])


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Returns (height, width, 1, 3 or 4) pixels as a PNG, in a fifth of the time an encoder takes, hardly any larger.

    Encoders choose one of five filters for every row and search for repetitions. Here each row is its difference to the
    one above, and only runs of equal bytes are searched for.
    """
    height, width, channels = pixels.shape
    flat = pixels.reshape(height, width * channels)
    rows = np.empty((height, 1 + width * channels), np.uint8)
    rows[:, 0] = 2  # the filter "up"
    rows[0, 1:] = flat[0]
    np.subtract(flat[1:], flat[:-1], out=rows[1:, 1:])
    compressor = zlib.compressobj(level=1, memLevel=9, strategy=zlib.Z_RLE)
    colour_type = {1: 0, 3: 2, 4: 6}[channels]
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)),
        (b"IDAT", compressor.compress(rows.data) + compressor.flush()),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(name)))
        for name, data in chunks
    )


def encode_jpeg(pixels: NDArray[np.uint8]) -> bytes:
    """Returns (height, width, 1, 3 or 4) pixels as a JPEG without their transparency."""
    # Full resolution of colours: small pictures and plots have edges that would smear.
    return _encoded([pixels[..., :3]], "jpeg", {"quality": 90, "subsampling": 0})


def _encoded(frames: list[NDArray[np.uint8]], file_format: str, options: dict[str, Any]) -> bytes:
    """Returns the file that Pillow makes of one picture or several."""
    from PIL import Image

    pictures = [Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame) for frame in frames]
    buffer = io.BytesIO()
    if len(pictures) > 1:
        options = {**options, "save_all": True, "append_images": pictures[1:]}
    pictures[0].save(buffer, file_format, **options)
    return buffer.getvalue()
