"""Training as it sounds: the curve by which a run is judged, played as a melody that rises where it rises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import from_numpy

from rlboard.events import Events, Sound

if TYPE_CHECKING:
    from rlboard.run import Run

RATE = 11_025
NOTE = 0.125
"""Seconds."""
MOST_NOTES = 32
MOST_POINTS = 4_096
LOWEST = 220.0
"""Hertz: A below middle C."""
SCALE = np.array([0, 2, 4, 7, 9, 12, 14, 16, 19, 21, 24])
"""Semitones above the lowest note: two octaves of the pentatonic scale, in which no two notes clash."""


def sonification(events: Events, run: Run) -> Events:
    """Audio: the headline's curve as a melody, at the end of training."""
    headline = ""
    for event in events:
        if event.headline in event.scalars:
            headline = event.headline
            run.melody.append((event.step, float(event.scalars[headline])))
            if len(run.melody) > MOST_POINTS:
                del run.melody[1::2]
        yield event
    if len(run.melody) > 1 and run.melody[0][0] < run.melody[-1][0]:
        sound = played(run.melody)
        run.writer.add_audio(f"Audio/{headline}", from_numpy(sound.samples), run.melody[-1][0], sound.rate)


def played(curve: Sequence[tuple[int, float]]) -> Sound:
    """The melody of a curve of (step, value): its least value is the lowest note, its greatest one two octaves above.

    A note is a value, of a curve with more than `MOST_NOTES` of them one at each of so many equal distances.
    """
    steps, values = np.array(curve, dtype=float).T
    finite = np.isfinite(values)
    values = np.interp(steps, steps[finite], values[finite]) if finite.any() else np.zeros_like(values)
    at = np.linspace(steps[0], steps[-1], min(len(curve), MOST_NOTES))
    heights = np.interp(at, steps, values)
    span = np.ptp(heights) or 1.0
    notes = SCALE[np.rint((heights - heights.min()) / span * (len(SCALE) - 1)).astype(int)]
    return Sound(np.concatenate([_note(LOWEST * 2 ** (semitones / 12)) for semitones in notes]), RATE)


def _note(frequency: float) -> NDArray[np.float64]:
    """A tone and a softer one an octave above, struck and fading, so that nothing clicks between two notes."""
    time = np.arange(int(RATE * NOTE)) / RATE
    tone = np.sin(2 * np.pi * frequency * time) + 0.3 * np.sin(4 * np.pi * frequency * time)
    strike = np.minimum(time / 0.005, 1) * np.exp(-3 * time / NOTE) * np.minimum((NOTE - time) / 0.01, 1)
    return np.asarray(0.6 * tone * strike)
