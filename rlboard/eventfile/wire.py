"""The bytes of an event file: varints, checksums, records, and whole series of scalar records at once.

https://protobuf.dev/programming-guides/encoding and https://www.tensorflow.org/tutorials/load_data/tfrecord
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Iterator
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

# Keys of the protobuf fields that scalars need: (field number << 3) | wire type.
WALL_TIME = b"\x09"  # Event.wall_time, 8 bytes
STEP = b"\x10"  # Event.step, varint
FILE_VERSION = b"\x1a"  # Event.file_version, length and bytes
SUMMARY = b"\x2a"  # Event.summary, length and bytes
VALUE = b"\x0a"  # Summary.value, length and bytes
TAG = b"\x0a"  # Summary.Value.tag, length and bytes
SIMPLE_VALUE = b"\x15"  # Summary.Value.simple_value, 4 bytes

_pack_float = struct.Struct("<f").pack
_pack_wall_time = struct.Struct("<cdc").pack
_pack_uint32 = struct.Struct("<I").pack
_pack_uint64 = struct.Struct("<Q").pack

HEADER_BYTES = 12
FOOTER_BYTES = 4
_CHUNK_BYTES = 1 << 18  # fits a core's cache


def varint(number: int) -> bytes:
    """Returns protobuf's variable-length encoding; a negative number takes ten bytes.

    Raises OverflowError if the number does not fit in 64 bits.
    """
    if 0 <= number < 0x80:  # most steps are small: no loop for them
        return bytes((number,))
    if 0 <= number < 0x4000:
        return bytes((number & 0x7F | 0x80, number >> 7))
    if 0 <= number < 0x200000:
        return bytes((number & 0x7F | 0x80, number >> 7 & 0x7F | 0x80, number >> 14))
    if not -(1 << 63) <= number < 1 << 63:
        raise OverflowError(f"{number} does not fit in 64 bits")
    number &= 0xFFFF_FFFF_FFFF_FFFF
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def delimited(key: bytes, content: bytes) -> bytes:
    """Returns a field that carries its length."""
    return key + varint(len(content)) + content


class _Headers(dict[int, bytes]):
    """A record's header by the length of its data. Scalars have few lengths: each is checksummed once."""

    def __missing__(self, length: int) -> bytes:
        packed = _pack_uint64(length)
        header = packed + _pack_uint32(masked_crc32c(packed))
        if length < 4096:
            self[length] = header
        return header


_headers = _Headers()


def masked_crc32c(data: bytes) -> int:
    """Returns TFRecord's checksum: CRC32C rotated by 15 bits plus a constant, so that data may hold checksums."""
    checksum: int = google_crc32c.value(data)
    return (checksum >> 15 | checksum << 17) + 0xA282EAD8 & 0xFFFFFFFF


def frame(data: bytes) -> bytes:
    """Returns one TFRecord: length, checksum of the length, data, checksum of the data."""
    return _headers[len(data)] + data + _pack_uint32(masked_crc32c(data))


def count_records(records: bytes) -> int:
    """Returns how many whole records follow one another in `records`."""
    count = offset = 0
    while offset < len(records):
        offset += HEADER_BYTES + int.from_bytes(records[offset : offset + 8], "little") + FOOTER_BYTES
        count += 1
    return count


def scalar_value(tag: str) -> bytes:
    """Returns a Summary.value field up to the four bytes of its number, which belong to its length."""
    value = delimited(TAG, tag.encode()) + SIMPLE_VALUE
    return VALUE + varint(len(value) + 4) + value


def scalar_summary(tag: str) -> bytes:
    """Returns an Event.summary field with one scalar, up to the four bytes of its number."""
    value = scalar_value(tag)
    return SUMMARY + varint(len(value) + 4) + value


def number(value: Any) -> float:
    """Returns a number: of anything float() takes but text, or of an array or tensor of one element on any device.

    Raises TypeError for what is not a number.
    """
    if hasattr(value, "item"):
        value = value.item()  # float() warns of arrays, and of tensors that require a gradient
    if isinstance(value, (str, bytes, bytearray)):
        raise TypeError(f"a {type(value).__name__} is not a number")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def float32(value: Any) -> bytes:
    """Returns the four bytes of what `number` takes; beyond the range of float32 it is infinite."""
    if value.__class__ is not float:
        value = number(value)
    try:
        return _pack_float(value)
    except OverflowError:
        return _pack_float(math.copysign(math.inf, value))


def event(wall_time: float, step: Any, fields: bytes) -> bytes:
    """Returns the record of an Event. `step` is an integer of 64 bits; what else int() takes is cut to one."""
    if step.__class__ is not int:
        step = int(step)
    data = _pack_wall_time(WALL_TIME, wall_time, STEP) + varint(step) + fields
    checksum = google_crc32c.value(data)  # as in `frame`, but two calls are a tenth of what a scalar costs
    masked = (checksum >> 15 | checksum << 17) + 0xA282EAD8 & 0xFFFFFFFF
    return _headers[len(data)] + data + _pack_uint32(masked)


class Series:
    """Encodes the scalars of one tag, singly or many at once without a Python loop; both give the same bytes.

    Records with equally long steps are equally long, so they are rows of one array. CRC32C is linear over XOR: a
    record's checksum is that of the record with zeros in all variable bytes, XOR what each variable byte adds, found
    in a table.
    """

    def __init__(self, tag: str) -> None:
        self._summary = scalar_summary(tag)
        self._layouts: dict[int, _Layout] = {}

    def record(self, value: float, step: int, wall_time: float) -> bytes:
        """Returns the record of one point."""
        return event(wall_time, step, self._summary + float32(value))

    def records(
        self, values: NDArray[np.float32], steps: NDArray[np.int64], wall_times: NDArray[np.float64]
    ) -> NDArray[np.object_]:
        """Returns the record of each point (N), as bytes (N)."""
        records = np.empty(len(steps), object)
        lengths = _step_bytes(steps)
        for length in range(int(lengths.min()), int(lengths.max()) + 1):
            points = np.flatnonzero(lengths == length)
            if len(points):
                rows = self._layout(length).filled(values[points], steps[points], wall_times[points])
                records[points] = rows.view(f"V{rows.itemsize}").tolist()
        return records

    def chunks(
        self, values: NDArray[np.float32], steps: NDArray[np.int64], wall_times: NDArray[np.float64]
    ) -> Iterator[bytes]:
        """Yields the records of all points (N) in pieces of bounded size."""
        points = max(1, _CHUNK_BYTES // self._layout(1).record.itemsize)
        for start in range(0, len(steps), points):
            chunk = (values[start : start + points], steps[start : start + points], wall_times[start : start + points])
            lengths = _step_bytes(chunk[1])
            if lengths.min() == lengths.max():
                yield self._layout(int(lengths[0])).filled(*chunk).tobytes()
            else:
                yield b"".join(self.records(*chunk).tolist())

    def _layout(self, step_bytes: int) -> _Layout:
        if step_bytes not in self._layouts:
            self._layouts[step_bytes] = _Layout(self._summary, step_bytes)
        return self._layouts[step_bytes]


class _Layout:
    """Where the variable bytes are in the records of one tag whose steps take `step_bytes`."""

    def __init__(self, summary: bytes, step_bytes: int) -> None:
        data = WALL_TIME + bytes(8) + STEP + bytes(step_bytes) + summary + bytes(4)
        self._blank = frame(data)
        self._blank_checksum = np.uint32(google_crc32c.value(data))
        self.record = np.dtype(
            {
                "names": ["wall_time", "step", "value", "checksum"],
                "formats": ["<f8", ("u1", step_bytes), "<f4", "<u4"],
                "offsets": [
                    HEADER_BYTES + 1,
                    HEADER_BYTES + 10,
                    HEADER_BYTES + len(data) - 4,
                    HEADER_BYTES + len(data),
                ],
                "itemsize": HEADER_BYTES + len(data) + FOOTER_BYTES,
            }
        )
        variable = [*range(1, 9), *range(10, 10 + step_bytes), *range(len(data) - 4, len(data))]
        self._tables = [(HEADER_BYTES + position, _checksum_table(len(data) - 1 - position)) for position in variable]

    def filled(
        self, values: NDArray[np.float32], steps: NDArray[np.int64], wall_times: NDArray[np.float64]
    ) -> NDArray[np.void]:
        """Returns the records of some points (N) as rows (N)."""
        rows: NDArray[np.void] = np.frombuffer(bytearray(self._blank * len(steps)), self.record)
        rows["wall_time"] = wall_times
        rows["value"] = values
        unsigned = steps.view(np.uint64)
        step = rows["step"]
        for index in range(step.shape[1]):
            step[:, index] = (unsigned >> 7 * index).astype(np.uint8) | 0x80
        step[:, -1] &= 0x7F
        columns = rows.view(np.uint8).reshape(len(rows), self.record.itemsize)
        checksum = np.full(len(rows), self._blank_checksum)
        for column, table in self._tables:
            checksum ^= table.take(columns[:, column], mode="clip")  # clip: no check for errors
        rows["checksum"] = (checksum >> 15 | checksum << 17) + np.uint32(0xA282EAD8)
        return rows


def _step_bytes(steps: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns how long each step's varint is, (N)."""
    ends = np.array([1 << 7 * length for length in range(1, 10)], np.uint64)
    return np.searchsorted(ends, steps.view(np.uint64), side="right") + 1


@functools.lru_cache(maxsize=4096)
def _checksum_table(following: int) -> NDArray[np.uint32]:
    """Returns what each of the 256 values of a byte adds to a CRC32C if `following` bytes come after it."""
    zeros = bytes(following)
    blank = google_crc32c.value(b"\0" + zeros)
    table = np.zeros(256, np.uint32)
    for bit in range(8):
        difference = np.uint32(google_crc32c.value(bytes((1 << bit,)) + zeros) ^ blank)
        table[1 << bit : 2 << bit] = table[: 1 << bit] ^ difference
    return table
