"""TensorBoard event files: written fast and safely, read fast, verified and repaired. Nothing else of rlboard is used.

An event file is a sequence of TFRecords. A record is

    length      8 bytes, little-endian
    checksum    4 bytes, of the length
    data        `length` bytes: one tensorboard.Event, a protocol buffer
    checksum    4 bytes, of the data

where the checksum is CRC32C, rotated right by 15 bits, plus 0xA282EAD8. The first event holds the version,
`brain.Event:2`. Every other one has a wall time in seconds, a step, and mostly a Summary: values, each with its tag.
A scalar is such a value: the protocol buffer's `simple_value`, a float32. A reader takes up to the last whole record,
so that a file can be read while it grows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlboard.eventfile.read import (
    Damage,
    Report,
    ScalarColumns,
    Series,
    event_files,
    follow,
    is_boundary,
    read_events,
    read_scalars,
    repair,
    truncate,
    verify,
)
from rlboard.eventfile.write import EventFile, LogWarning

if TYPE_CHECKING:
    from rlboard.eventfile.summary import (
        animation_summary,
        histogram,
        histogram_summary,
        image_summary,
        wav_summary,
    )

__all__ = [
    "Damage",
    "EventFile",
    "LogWarning",
    "Report",
    "ScalarColumns",
    "Series",
    "animation_summary",
    "event_files",
    "follow",
    "histogram",
    "histogram_summary",
    "image_summary",
    "is_boundary",
    "read_events",
    "read_scalars",
    "repair",
    "truncate",
    "verify",
    "wav_summary",
]


def __getattr__(name: str) -> object:
    """Imports `summary` and with it TensorBoard's protocol buffers when they are wanted: scalars do without."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rlboard.eventfile import summary

    return getattr(summary, name)
