"""Videos for the Images tab and as files, made without a display and without ffmpeg."""

from __future__ import annotations

import contextlib
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Picture

from rlboard.eventfile import animation_summary
from rlboard.events import Events, Video
from rlboard.instruments.drawing import drawn

if TYPE_CHECKING:
    from rlboard.run import Run

MOST_FRAMES = 150
LARGEST_WIDTH = 400
"""In frames and pixels: a GIF of some hundred kilobytes, whatever an episode's length."""


def videos(events: Events, run: Run) -> Events:
    """Images, where `--capture-video` asks for it: what moves."""
    broken: set[str] = set()
    for event in events:
        offered = event.videos if run.options.capture_video else {}
        filmed = {tag: partial(_film, tag, video, run, event.step) for tag, video in offered.items()}
        for _ in drawn(filmed, broken):
            pass
        yield event


def _film(tag: str, video: Video, run: Run, step: int) -> None:
    """Writes a video into the event file, and beside it as files."""
    frames, frames_per_second = sampled(video)
    summary = animation_summary(tag, frames, frames_per_second)
    run.writer.events.summary(summary, step)
    name = re.sub(r"[^\w.=+-]+", "-", tag)
    path = run.directory / "videos" / f"{name}-{step}.gif"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(summary.value[0].image.encoded_image_string)
    _write_mp4(path.with_suffix(".mp4"), frames, frames_per_second)


def sampled(video: Video) -> tuple[NDArray[np.uint8], float]:
    """A video in few and small frames, (frames, height, width, 3), and their number per second: as fast as it was.

    Of a video too long every second frame is left out, or three of four, and so on: its length shows only at its end.
    """
    frames_per_second, frames = video()
    kept: list[NDArray[np.uint8]] = []
    stride = 1
    for number, draw in enumerate(frames):
        if number % stride == 0 and len(kept) == MOST_FRAMES:
            kept, stride = kept[::2], 2 * stride
        if number % stride == 0:
            kept.append(_shrunk(draw()))
    return np.stack(kept), frames_per_second / stride


def _shrunk(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width, _ = frame.shape
    if width <= LARGEST_WIDTH:
        return frame
    size = (LARGEST_WIDTH, max(1, round(height * LARGEST_WIDTH / width)))
    return np.asarray(Picture.fromarray(frame).resize(size, Picture.Resampling.BOX))


def _write_mp4(path: Path, frames: NDArray[np.uint8], frames_per_second: float) -> None:
    """The frames as an H.264 video, where moviepy is installed."""
    with contextlib.suppress(ImportError):
        from moviepy import ImageSequenceClip

        even = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]  # what the format asks for
        ImageSequenceClip(list(even), fps=frames_per_second).write_videofile(str(path), logger=None)
