"""The inner loops of reading: records out of bytes, scalars out of records, numbers for their tags.

Each rule stands here once, in the part of Python that numba compiles. `loops()` hands out the compiled loops, or the
same functions as they stand where numba is missing or may keep its compiled code nowhere: a hundred times slower,
with equal results. Only five leaves below `_leaves` have a compiled twin of their own, because int.from_bytes, the
native checksum and a dict are what plain Python is quick with.

`data` is `bytes` for the plain functions and a read-only uint8 array for the compiled ones; every position is an
index into it, every position of -1 says "malformed". No length is believed before it was compared with what is left.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from numpy.typing import NDArray

# A record: length (8 bytes), checksum of the length (4), payload, checksum of the payload (4).
HEADER_BYTES = 12
FRAME_BYTES = 16
LONGEST_PAYLOAD = 2**31 - 1  # no protocol buffer is longer, so no such length is believed

# Why `frame_records` stopped.
INCOMPLETE, BAD_HEADER, BAD_PAYLOAD = range(3)

# The rows of the table that `parse_scalars` fills, one column a scalar.
TAG_START, TAG_STOP, STEP, WALL_TIME, BITS, KIND, PLUGIN = range(7)
ROW_FIELDS = 7
SHORTEST_VALUE = 7  # bytes of the shortest Summary.Value that becomes a row: bounds the number of rows

# How the 64 bits in row BITS are to be read. SIMPLE and FLOAT32 differ only in where they come from.
NO_SCALAR, SIMPLE, FLOAT32, FLOAT64, FLOAT16, BFLOAT16, INT64, UINT64 = range(8)

# What a tag is, by the plugin that its first metadata names.
UNKNOWN, SCALARS, OTHER, UNWANTED = range(4)
SCALARS_PLUGIN = b"scalars"

INT64_MIN = -(2**63)

# Wire types, and keys (field number * 8 + wire type) of tensorboard/compat/proto/{event,summary,tensor}.proto.
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
EVENT_WALL_TIME, EVENT_STEP, EVENT_SUMMARY = 1 * 8 + FIXED64, 2 * 8 + VARINT, 5 * 8 + BYTES
EVENT_OTHER_WHAT = tuple(field * 8 + BYTES for field in (3, 4, 6, 7, 8, 9))  # the rest of the oneof `what`
SUMMARY_VALUE = 1 * 8 + BYTES
VALUE_TAG, VALUE_SIMPLE, VALUE_TENSOR, VALUE_METADATA = 1 * 8 + BYTES, 2 * 8 + FIXED32, 8 * 8 + BYTES, 9 * 8 + BYTES
VALUE_OTHERS = tuple(field * 8 + BYTES for field in (3, 4, 5, 6))  # the rest of the oneof `value`
METADATA_PLUGIN_DATA = PLUGIN_DATA_NAME = 1 * 8 + BYTES
TENSOR_DTYPE, TENSOR_SHAPE, TENSOR_CONTENT = 1 * 8 + VARINT, 2 * 8 + BYTES, 4 * 8 + BYTES
SHAPE_DIM, SHAPE_UNKNOWN_RANK, DIM_SIZE = 2 * 8 + BYTES, 3 * 8 + VARINT, 1 * 8 + VARINT

# Of TensorProto, by field number: the wire type of the elements of a list that can hold a scalar, or -1.
LIST_WIRE = np.full(18, -1, np.int64)
LIST_WIRE[[5, 6]] = FIXED32, FIXED64  # float_val, double_val
LIST_WIRE[[7, 10, 11, 13, 16, 17]] = VARINT  # int_val, int64_val, bool_val, half_val, uint32_val, uint64_val
DTYPE_FIELD, SHAPE_FIELD, CONTENT_FIELD = 1, 2, 4

# Of DataType, by its number: the list its elements stand in (0: no scalar), how to read them, their size in bytes.
DTYPES = np.zeros((24, 3), np.int64)
DTYPES[1] = 5, FLOAT32, 4
DTYPES[2] = 6, FLOAT64, 8
DTYPES[3] = 7, INT64, 4  # int32
DTYPES[4] = 7, UINT64, 1  # uint8
DTYPES[5] = 7, INT64, 2  # int16
DTYPES[6] = 7, INT64, 1  # int8
DTYPES[9] = 10, INT64, 8
DTYPES[10] = 11, UINT64, 1  # bool
DTYPES[14] = 13, BFLOAT16, 2
DTYPES[17] = 7, UINT64, 2  # uint16
DTYPES[19] = 13, FLOAT16, 2
DTYPES[22] = 16, UINT64, 4  # uint32
DTYPES[23] = 17, UINT64, 8


# The leaves: plain ones here, their compiled twins in `_leaves`.


def int64_at(data: bytes, at: int) -> int:
    """The eight bytes at `at`, little-endian, as a signed number."""
    return int.from_bytes(data[at : at + 8], "little", signed=True)


def uint32_at(data: bytes, at: int) -> int:
    """The four bytes at `at`, little-endian."""
    return int.from_bytes(data[at : at + 4], "little")


def masked_crc(data: bytes, start: int, stop: int) -> int:
    """CRC-32C of data[start:stop], rotated and offset as a TFRecord keeps it."""
    crc: int = google_crc32c.value(data[start:stop])
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def find_tag(data: bytes, start: int, stop: int, tags: dict[bytes, int]) -> int:
    """The number of the tag data[start:stop], or -1. The compiled twin may miss a known tag, never mistake one."""
    return tags.get(data[start:stop], -1)


def as_int(number: "int | np.int64") -> int:
    """A Python int of an array's element: arithmetic on NumPy's own would be slow, and would overflow."""
    return int(number)


# Records.


def valid_header(data: bytes, at: int) -> bool:
    """Whether the twelve bytes at `at` are a record's length and its checksum."""
    return 0 <= int64_at(data, at) <= LONGEST_PAYLOAD and uint32_at(data, at + 8) == masked_crc(data, at, at + 8)


def find_header(data: bytes, at: int, size: int) -> int:
    """The first position from `at` on where a valid header stands, or -1."""
    while at <= size - HEADER_BYTES:
        # Lengths are below 2**32: of foreign bytes nearly all are told apart here.
        if data[at + 7] == 0 and data[at + 6] == 0 and valid_header(data, at):
            return at
        at += 1
    return -1


def frame_records(
    data: bytes, at: int, size: int, spans: NDArray[np.int64], count: int
) -> tuple[int, int, int]:
    """Walks over whole valid records from `at` on, appending the start and stop of each payload to `spans`.

    Returns the new count, the position of the first byte that belongs to none, and why: INCOMPLETE (data ends there
    or in the midst of a record), BAD_HEADER or BAD_PAYLOAD.
    """
    known_length = -1  # records of one tag have one length: its checksum is computed once
    known_crc = -1
    while at <= size - HEADER_BYTES:
        length = int64_at(data, at)
        crc = uint32_at(data, at + 8)
        if length != known_length or crc != known_crc:
            if not valid_header(data, at):
                return count, at, BAD_HEADER
            known_length = length
            known_crc = crc
        start = at + HEADER_BYTES
        if length > size - start - 4:
            break
        stop = start + length
        if uint32_at(data, stop) != masked_crc(data, start, stop):
            return count, at, BAD_PAYLOAD
        spans[0, count] = start
        spans[1, count] = stop
        count += 1
        at = stop + 4
    return count, at, INCOMPLETE


# Protocol buffers.


def varint(data: bytes, at: int, stop: int) -> tuple[int, int]:
    """The number at `at`, as int64, and the position behind it."""
    value = 0
    for shift in range(0, 63, 7):
        if at >= stop:
            return 0, -1
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    if at < stop and data[at] < 128:  # of a tenth byte only one bit still fits: the sign
        return value + (data[at] & 1) * INT64_MIN, at + 1
    return 0, -1


def next_field(data: bytes, at: int, stop: int) -> tuple[int, int, int, int]:
    """The field at `at`: its key, its value if that is a varint, and where its content starts and stops.

    Groups are malformed: protocol buffers gave them up, and no event ever held one.
    """
    key, at = varint(data, at, stop)
    start = at
    value = 0
    wire = key & 7
    if at < 0 or key < 8:
        return 0, 0, 0, -1
    if wire == VARINT:
        value, at = varint(data, at, stop)
    elif wire == BYTES:
        length, at = varint(data, at, stop)
        start = at
        if at >= 0:
            at = at + length if 0 <= length <= stop - at else -1
    elif wire == FIXED32:
        at = at + 4 if stop - at >= 4 else -1
    elif wire == FIXED64:
        at = at + 8 if stop - at >= 8 else -1
    else:
        at = -1
    return key, value, start, at


def parse_scalars(
    data: bytes, spans: NDArray[np.int64], count: int, rows: NDArray[np.int64], malformed: NDArray[np.int64]
) -> tuple[int, int]:
    """A row for every Summary.Value of `count` events that holds a scalar or says which plugin its tag belongs to.

    Returns the number of rows and the number of records that are no Event: `malformed` names those, and no row
    comes from them.
    """
    tensor = np.zeros((2, 18), np.int64)
    rejected = 0
    row = 0
    for record in range(count):
        at = as_int(spans[0, record])
        stop = as_int(spans[1, record])
        first = row
        step = 0
        wall_time = 0
        while 0 <= at < stop:
            key, value, start, at = next_field(data, at, stop)
            if at < 0:
                break
            if key == EVENT_WALL_TIME:
                wall_time = int64_at(data, start)
            elif key == EVENT_STEP:
                step = value
            elif key == EVENT_SUMMARY:
                row = parse_summary(data, start, at, rows, row, tensor)
                if row < 0:
                    at = -1
            elif key in EVENT_OTHER_WHAT:
                row = first  # the last member of a oneof is the one that counts
        if at < 0:
            row = first
            malformed[rejected] = record
            rejected += 1
        for filled in range(first, row):  # these fields may stand behind the summary
            rows[STEP, filled] = step
            rows[WALL_TIME, filled] = wall_time
    return row, rejected


def parse_summary(
    data: bytes, at: int, stop: int, rows: NDArray[np.int64], row: int, tensor: NDArray[np.int64]
) -> int:
    """Appends the rows of a Summary, without step and time; returns the row behind them, or -1."""
    while at < stop:
        key, _, start, at = next_field(data, at, stop)
        if at < 0:
            return -1
        if key == SUMMARY_VALUE:
            row = parse_value(data, start, at, rows, row, tensor)
            if row < 0:
                return -1
    return row


def parse_value(
    data: bytes, at: int, stop: int, rows: NDArray[np.int64], row: int, tensor: NDArray[np.int64]
) -> int:
    """Appends the row of a Summary.Value, if it is one; returns the row behind it, or -1."""
    tag_start = at
    tag_stop = at
    kind = NO_SCALAR
    bits = 0
    plugin = UNKNOWN
    while at < stop:
        key, _, start, at = next_field(data, at, stop)
        if at < 0:
            return -1
        if key == VALUE_TAG:
            tag_start = start
            tag_stop = at
        elif key == VALUE_SIMPLE:
            kind = SIMPLE
            bits = uint32_at(data, start)
        elif key == VALUE_TENSOR:
            if kind != FLOAT32:  # stands for any tensor until `tensor_scalar` looks at it
                tensor[:] = 0
            kind = FLOAT32
            if not parse_tensor(data, start, at, tensor):
                return -1
        elif key == VALUE_METADATA:
            plugin = parse_metadata(data, start, at, plugin)
            if plugin < 0:
                return -1
        elif key in VALUE_OTHERS:
            kind = NO_SCALAR
    if kind == SIMPLE:
        plugin = SCALARS  # whatever its metadata says, as in tensorboard/data_compat.py
    elif kind == FLOAT32:
        kind, bits = tensor_scalar(data, tensor)
    if kind == NO_SCALAR and plugin == UNKNOWN:
        return row
    rows[TAG_START, row] = tag_start
    rows[TAG_STOP, row] = tag_stop
    rows[BITS, row] = bits
    rows[KIND, row] = kind
    rows[PLUGIN, row] = plugin
    return row + 1


def parse_metadata(data: bytes, at: int, stop: int, plugin: int) -> int:
    """What a SummaryMetadata says about its tag, `plugin` if nothing; -1 if malformed."""
    while at < stop:
        key, _, start, at = next_field(data, at, stop)
        if at < 0:
            return -1
        if key == METADATA_PLUGIN_DATA:
            inner = start
            while inner < at:
                key, _, start, inner = next_field(data, inner, at)
                if inner < 0:
                    return -1
                if key == PLUGIN_DATA_NAME:
                    plugin = plugin_of(data, start, inner)
    return plugin


def plugin_of(data: bytes, start: int, stop: int) -> int:
    """UNKNOWN for the empty name, SCALARS for the scalars plugin's, OTHER for every other."""
    if stop == start:
        return UNKNOWN
    if stop - start != len(SCALARS_PLUGIN):
        return OTHER
    for index in range(len(SCALARS_PLUGIN)):
        if data[start + index] != SCALARS_PLUGIN[index]:
            return OTHER
    return SCALARS


def parse_tensor(data: bytes, at: int, stop: int, tensor: NDArray[np.int64]) -> bool:
    """Adds what a TensorProto holds to `tensor`; False if malformed.

    tensor[0, field] counts a list's elements and tensor[1, field] holds the bits of the last one. Of `dtype` the
    number stands in tensor[1], of `tensor_shape` the count of dimensions that are not 1 in tensor[0], of
    `tensor_content` its length and its start.
    """
    while at < stop:
        key, value, start, at = next_field(data, at, stop)
        if at < 0:
            return False
        field = key >> 3
        wire = key & 7
        if key == TENSOR_DTYPE:
            tensor[1, DTYPE_FIELD] = value
        elif key == TENSOR_SHAPE:
            dimensions = parse_shape(data, start, at)
            if dimensions < 0:
                return False
            tensor[0, SHAPE_FIELD] += dimensions
        elif key == TENSOR_CONTENT:
            tensor[0, CONTENT_FIELD] = at - start
            tensor[1, CONTENT_FIELD] = start
        elif field < 18 and LIST_WIRE[field] >= 0 and wire in (LIST_WIRE[field], BYTES):
            if not parse_list(data, start, at, tensor, field):
                return False
    return True


def parse_list(data: bytes, at: int, stop: int, tensor: NDArray[np.int64], field: int) -> bool:
    """Counts the elements of a list, packed or a single one, and keeps the last; False if malformed."""
    wire = LIST_WIRE[field]
    if wire == VARINT:
        while at < stop:
            value, at = varint(data, at, stop)
            if at < 0:
                return False
            tensor[0, field] += 1
            tensor[1, field] = value
        return True
    size = 4 if wire == FIXED32 else 8
    if (stop - at) % size:
        return False
    if stop > at:
        tensor[0, field] += (stop - at) // size
        tensor[1, field] = uint32_at(data, stop - 4) if size == 4 else int64_at(data, stop - 8)
    return True


def parse_shape(data: bytes, at: int, stop: int) -> int:
    """How many dimensions of a TensorShapeProto are not 1 (so that 0 means one element); -1 if malformed."""
    other = 0
    while at < stop:
        key, value, start, at = next_field(data, at, stop)
        if at < 0:
            return -1
        if key == SHAPE_DIM:
            size = 0
            inner = start
            while inner < at:
                key, value, _, inner = next_field(data, inner, at)
                if inner < 0:
                    return -1
                if key == DIM_SIZE:
                    size = value
            other += size != 1
    return other


def tensor_scalar(data: bytes, tensor: NDArray[np.int64]) -> tuple[int, int]:
    """Kind and bits of a tensor's only element; NO_SCALAR if it has none, several, or one that is no number."""
    dtype = as_int(tensor[1, DTYPE_FIELD])
    if not 0 <= dtype < len(DTYPES) or tensor[0, SHAPE_FIELD] != 0:
        return NO_SCALAR, 0
    field = as_int(DTYPES[dtype, 0])
    kind = as_int(DTYPES[dtype, 1])
    size = as_int(DTYPES[dtype, 2])
    if tensor[0, CONTENT_FIELD] == 0:
        if field == 0 or tensor[0, field] != 1:
            return NO_SCALAR, 0
        return kind, as_int(tensor[1, field])
    if tensor[0, CONTENT_FIELD] != size:
        return NO_SCALAR, 0
    start = as_int(tensor[1, CONTENT_FIELD])
    if size == 8:
        return kind, int64_at(data, start)
    bits = 0
    for index in range(size):
        bits |= data[start + index] << (8 * index)
    if kind == INT64 and bits >= 1 << (8 * size - 1):
        bits -= 1 << (8 * size)
    return kind, bits
