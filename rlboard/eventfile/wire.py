"""The bytes of an event file: varints, checksums, records, and whole series of scalar records at once.

https://protobuf.dev/programming-guides/encoding and https://www.tensorflow.org/tutorials/load_data/tfrecord
"""

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


def float32(value: Any) -> bytes:
    """Returns the four bytes of a number: anything float() takes, or an array or tensor of one element on any device.

    What is beyond the range of float32 becomes infinite. Raises TypeError for what is not a number.
    """
    if value.__class__ is not float and hasattr(value, "item"):
        value = value.item()  # float() warns of arrays, and of tensors that require a gradient
    try:
        return _pack_float(value)
    except (OverflowError, struct.error):
        if isinstance(value, (int, float)):
            return _pack_float(math.inf if value > 0 else -math.inf)
        raise TypeError(f"a {type(value).__name__} is not a number") from None


def event(wall_time: float, step: Any, fields: bytes) -> bytes:
    """Returns the record of an Event. `step` is an integer of 64 bits; what else int() takes is cut to one."""
    if step.__class__ is not int:
        step = int(step)
    data = _pack_wall_time(WALL_TIME, wall_time, STEP) + varint(step) + fields
    checksum = google_crc32c.value(data)  # as in `frame`, but two calls are a tenth of what a scalar costs
    masked = (checksum >> 15 | checksum << 17) + 0xA282EAD8 & 0xFFFFFFFF
    return _headers[len(data)] + data + _pack_uint32(masked)


def scalar_records(
    tag: str, steps: NDArray[np.int64], values: NDArray[np.float32], wall_times: NDArray[np.float64]
) -> Iterator[bytes]:
    """Yields the records of one series, a chunk at a time, without a Python loop over the points.

    All records are equally long, because every step is padded to the longest one's varint (protobuf allows
    it); so they are rows of one array. CRC32C is linear over XOR: a record's checksum is that of the record
    with zeros in all variable bytes, XOR what each variable byte adds, found in a table.
    """
    unsigned = steps.view(np.uint64)
    step_bytes = max(len(varint(int(steps.min()))), len(varint(int(steps.max()))))
    blank = WALL_TIME + bytes(8) + STEP + bytes(step_bytes) + scalar_summary(tag) + bytes(4)
    record = np.dtype(
        {
            "names": ["wall_time", "step", "value", "checksum"],
            "formats": ["<f8", ("u1", step_bytes), "<f4", "<u4"],
            "offsets": [
                HEADER_BYTES + 1,
                HEADER_BYTES + 10,
                HEADER_BYTES + len(blank) - 4,
                HEADER_BYTES + len(blank),
            ],
            "itemsize": HEADER_BYTES + len(blank) + FOOTER_BYTES,
        }
    )
    chunk_points = min(len(steps), max(1, _CHUNK_BYTES // record.itemsize))
    rows = np.frombuffer(bytearray(frame(blank) * chunk_points), record)
    columns = rows.view(np.uint8).reshape(len(rows), record.itemsize)
    variable = [*range(1, 9), *range(10, 10 + step_bytes), *range(len(blank) - 4, len(blank))]
    tables = [(HEADER_BYTES + position, _checksum_table(blank, position)) for position in variable]
    blank_checksum = np.uint32(google_crc32c.value(blank))

    for start in range(0, len(steps), chunk_points):
        chunk = slice(start, start + chunk_points)
        part = rows[: len(steps[chunk])]
        part["wall_time"] = wall_times[chunk]
        part["value"] = values[chunk]
        for index in range(step_bytes):
            septet = (unsigned[chunk] >> 7 * index).astype(np.uint8)
            part["step"][:, index] = septet | 0x80 if index < step_bytes - 1 else septet
        checksum = np.full(len(part), blank_checksum)
        for column, table in tables:
            checksum ^= table.take(columns[: len(part), column], mode="clip")  # clip: no check for errors
        part["checksum"] = (checksum >> 15 | checksum << 17) + np.uint32(0xA282EAD8)
        yield part.tobytes()


def _checksum_table(blank: bytes, position: int) -> NDArray[np.uint32]:
    """Returns what each of the 256 bytes at `position`, where `blank` has a zero, adds to the CRC32C of `blank`."""
    table = np.zeros(256, np.uint32)
    for bit in range(8):
        changed = blank[:position] + bytes((1 << bit,)) + blank[position + 1 :]
        difference = np.uint32(google_crc32c.value(changed) ^ google_crc32c.value(blank))
        table[1 << bit : 2 << bit] = table[: 1 << bit] ^ difference
    return table
