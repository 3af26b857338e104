"""The inner loops of reading: records out of bytes, scalars out of records, numbers for their tags.

Every rule stands here once, in the part of Python that numba compiles. `loops()` hands out the compiled loops, or the
same functions as they stand where there is no numba, or no place for its cache: slower, with equal results. Only the
five leaves have a compiled twin, because plain Python is quickest with slices of bytes, the native checksum and a dict.

`data` is a bytearray to the plain functions and its address to the compiled ones; positions are offsets into it, and a
position of -1 means malformed. No length is believed before it was compared with what is left.
"""

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlboard.eventfile.wire import FOOTER_BYTES, HEADER_BYTES, masked_crc32c

FRAME_BYTES = HEADER_BYTES + FOOTER_BYTES
LONGEST_PAYLOAD = 2**31 - 1  # no protocol buffer is longer, so no such length is believed

# Why `frame_records` stopped.
INCOMPLETE, BAD_HEADER, BAD_PAYLOAD, FULL = range(4)

# The rows of the table that `parse_scalars` fills, a column for each scalar.
TAG_START, TAG_STOP, STEP, WALL_TIME, BITS, KIND, PLUGIN = range(7)
ROW_FIELDS = 7

# How the 64 bits in BITS are to be read. SIMPLE is a float32 that stood in `simple_value`, not in a tensor.
NO_SCALAR, SIMPLE, FLOAT32, FLOAT64, FLOAT16, BFLOAT16, INT64, UINT64 = range(8)
MALFORMED = -1

# What a tag is, by the plugin that its first metadata names.
UNKNOWN, SCALARS, OTHER, UNWANTED = range(4)
SCALARS_PLUGIN = int.from_bytes(b"scalars", "little")

# Wire types, and keys (field number * 8 + wire type) of tensorboard/compat/proto/{event,summary,tensor}.proto.
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
EVENT_WALL_TIME, EVENT_STEP, EVENT_SUMMARY = 1 * 8 + FIXED64, 2 * 8 + VARINT, 5 * 8 + BYTES
SUMMARY_VALUE = 1 * 8 + BYTES
VALUE_TAG, VALUE_SIMPLE, VALUE_TENSOR, VALUE_METADATA = 1 * 8 + BYTES, 2 * 8 + FIXED32, 8 * 8 + BYTES, 9 * 8 + BYTES
METADATA_PLUGIN_DATA, PLUGIN_DATA_NAME = 1 * 8 + BYTES, 1 * 8 + BYTES
TENSOR_DTYPE, TENSOR_SHAPE, TENSOR_CONTENT = 1 * 8 + VARINT, 2 * 8 + BYTES, 4 * 8 + BYTES
SHAPE_DIM, DIM_SIZE = 2 * 8 + BYTES, 1 * 8 + VARINT

# Of DataType, by its number: the list in TensorProto that holds its elements (0: none is a scalar), the wire type they
# have there, how to read them, their size in bytes, whether they have a sign.
INT_VAL, BOOL_VAL, HALF_VAL, UINT32_VAL = 7, 11, 13, 16
DTYPES = np.zeros((24, 5), np.int64)
DTYPES[1] = 5, FIXED32, FLOAT32, 4, 0
DTYPES[2] = 6, FIXED64, FLOAT64, 8, 0
DTYPES[3] = INT_VAL, VARINT, INT64, 4, 1
DTYPES[4] = INT_VAL, VARINT, INT64, 1, 0
DTYPES[5] = INT_VAL, VARINT, INT64, 2, 1
DTYPES[6] = INT_VAL, VARINT, INT64, 1, 1
DTYPES[9] = 10, VARINT, INT64, 8, 1
DTYPES[10] = BOOL_VAL, VARINT, INT64, 1, 0
DTYPES[14] = HALF_VAL, VARINT, BFLOAT16, 2, 0
DTYPES[17] = INT_VAL, VARINT, INT64, 2, 0
DTYPES[19] = HALF_VAL, VARINT, FLOAT16, 2, 0
DTYPES[22] = UINT32_VAL, VARINT, INT64, 4, 0
DTYPES[23] = 17, VARINT, UINT64, 8, 0


# The leaves: the compiled twins are in `_twins`.


def byte_at(data: bytearray, at: int) -> int:
    """The byte at `at`."""
    return data[at]


def uint32_at(data: bytearray, at: int) -> int:
    """The four bytes at `at`, little-endian."""
    return int.from_bytes(data[at : at + 4], "little")


def int64_at(data: bytearray, at: int) -> int:
    """The eight bytes at `at`, little-endian, as a signed number."""
    return int.from_bytes(data[at : at + 8], "little", signed=True)


def masked_crc(data: bytearray, start: int, stop: int) -> int:
    """The checksum of data[start:stop]."""
    return masked_crc32c(bytes(data[start:stop]))


def find_tag(data: bytearray, start: int, stop: int, tags: dict[bytes, int]) -> int:
    """The number of the tag data[start:stop], or -1. The twin may miss a known tag, but never takes one for another."""
    return tags.get(bytes(data[start:stop]), -1)


# Records.


def valid_header(data: bytearray, at: int) -> bool:
    """Whether the twelve bytes at `at` are a length and its checksum."""
    return 0 <= int64_at(data, at) <= LONGEST_PAYLOAD and uint32_at(data, at + 8) == masked_crc(data, at, at + 8)


def find_header(data: bytearray, at: int, size: int) -> int:
    """The first position from `at` on where a valid header stands, or -1."""
    while at <= size - HEADER_BYTES:
        # The highest two bytes of a length are 0: that alone rules out nearly every position.
        if byte_at(data, at + 7) == 0 and byte_at(data, at + 6) == 0 and valid_header(data, at):
            return at
        at += 1
    return -1


def frame_records(data: bytearray, at: int, size: int, spans: NDArray[np.int64], count: int) -> tuple[int, int, int]:
    """Walks over whole valid records from `at` on, and adds the start and stop of each payload to `spans`.

    Returns the new count, the position of the first byte that belongs to none, and why: INCOMPLETE (data ends there
    or in the midst of a record), BAD_HEADER, BAD_PAYLOAD, or FULL, which `spans` is.
    """
    known_length = -1  # most records are as long as the one before: the checksum of their length is known
    known_crc = -1
    while at <= size - HEADER_BYTES:
        if count == spans.shape[1]:
            return count, at, FULL
        length = int64_at(data, at)
        crc = uint32_at(data, at + 8)
        if length != known_length or crc != known_crc:
            if not valid_header(data, at):
                return count, at, BAD_HEADER
            known_length = length
            known_crc = crc
        start = at + HEADER_BYTES
        if length > size - start - FOOTER_BYTES:
            break
        stop = start + length
        if uint32_at(data, stop) != masked_crc(data, start, stop):
            return count, at, BAD_PAYLOAD
        spans[0, count] = start
        spans[1, count] = stop
        count += 1
        at = stop + FOOTER_BYTES
    return count, at, INCOMPLETE


# Protocol buffers.


def varint(data: bytearray, at: int, stop: int) -> tuple[int, int]:
    """The number at `at` as an int64, and the position behind it."""
    value = 0
    shift = 0
    while at < stop and shift < 63:
        byte = byte_at(data, at)
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    if at < stop and byte_at(data, at) < 128:  # of a tenth byte only one bit still fits: the sign
        return value - 2**63 if byte_at(data, at) & 1 else value, at + 1
    return 0, -1


def next_field(data: bytearray, at: int, stop: int) -> tuple[int, int, int, int]:
    """The field at `at`, which is before `stop`: its key, its value if a varint, where its content starts and stops.

    Groups count as malformed: no event ever held one.
    """
    key = byte_at(data, at)
    at += 1
    if key >= 128:
        key, at = varint(data, at - 1, stop)
    wire = key & 7
    start = at
    value = 0
    if at < 0 or key < 8:
        at = -1
    elif wire == VARINT:
        value, at = varint(data, at, stop)
    elif wire == BYTES:
        length, at = varint(data, at, stop)
        start = at
        at = at + length if at >= 0 and 0 <= length <= stop - at else -1
    elif wire == FIXED32:
        at = at + 4 if stop - at >= 4 else -1
    elif wire == FIXED64:
        at = at + 8 if stop - at >= 8 else -1
    else:
        at = -1
    return key, value, start, at


def parse_scalars(
    data: bytearray,
    spans: NDArray[np.int64],
    begin: int,
    count: int,
    rows: NDArray[np.int64],
    malformed: NDArray[np.int64],
) -> tuple[int, int, int]:
    """A column of `rows` for every Summary.Value that holds a scalar or says which plugin its tag belongs to.

    Takes the records from `begin` to `count`, until the next one does not fit into `rows`. Returns which one is next,
    how many columns there are, and how many records are no Event: `malformed` lists those, and nothing is taken from
    them.
    """
    rejected = 0
    filled = 0
    for record in range(begin, count):
        at = int(spans[0, record])
        stop = int(spans[1, record])
        first = filled
        step = 0
        wall_time = 0
        while 0 <= at < stop:
            key, value, start, at = next_field(data, at, stop)
            if at < 0:
                break
            if key == EVENT_SUMMARY:
                inner = start
                while inner < at:
                    key, value, start, inner = next_field(data, inner, at)
                    if inner < 0:
                        at = -1
                        break
                    if key != SUMMARY_VALUE:
                        continue
                    kind, bits, tag_start, tag_stop, plugin = parse_value(data, start, inner)
                    if kind == MALFORMED:
                        at = -1
                        break
                    if kind != NO_SCALAR or plugin != UNKNOWN:
                        if filled == rows.shape[1]:
                            return record, first, rejected
                        rows[KIND, filled] = kind
                        rows[BITS, filled] = bits
                        rows[TAG_START, filled] = tag_start
                        rows[TAG_STOP, filled] = tag_stop
                        rows[PLUGIN, filled] = plugin
                        filled += 1
            elif key == EVENT_STEP:
                step = value
            elif key == EVENT_WALL_TIME:
                wall_time = int64_at(data, start)
            elif key & 7 == BYTES and 3 <= key >> 3 <= 9:
                filled = first  # another member of the oneof `what`: the last one counts
        if at < 0:
            filled = first
            malformed[rejected] = record
            rejected += 1
        for column in range(first, filled):  # these two may stand behind the summary
            rows[STEP, column] = step
            rows[WALL_TIME, column] = wall_time
    return count, filled, rejected


def parse_value(data: bytearray, at: int, stop: int) -> tuple[int, int, int, int, int]:
    """Kind and bits of a Summary.Value, where its tag starts and stops, and the plugin that its metadata names."""
    kind = NO_SCALAR
    bits = 0
    tag_start = at
    tag_stop = at
    plugin = UNKNOWN
    tensors = 0
    while at < stop:
        key, _, start, at = next_field(data, at, stop)
        if at < 0:
            return MALFORMED, 0, 0, 0, UNKNOWN
        if key == VALUE_TAG:
            tag_start = start
            tag_stop = at
        elif key == VALUE_SIMPLE:
            kind = SIMPLE
            bits = uint32_at(data, start)
        elif key == VALUE_METADATA:
            plugin = metadata_plugin(data, start, at, plugin)
            if plugin < 0:
                return MALFORMED, 0, 0, 0, UNKNOWN
        elif key == VALUE_TENSOR:
            kind, bits = tensor_scalar(data, start, at)
            if kind == MALFORMED:
                return MALFORMED, 0, 0, 0, UNKNOWN
            tensors += 1
        elif key & 7 == BYTES and 3 <= key >> 3 <= 6:
            kind = NO_SCALAR  # another member of the oneof `value`: the last one counts
    if kind == SIMPLE:
        plugin = SCALARS  # whatever its metadata says, as in tensorboard/data_compat.py
    elif tensors > 1:
        kind = NO_SCALAR  # they add up to one tensor of several elements
    return kind, bits, tag_start, tag_stop, plugin


def metadata_plugin(data: bytearray, at: int, stop: int, plugin: int) -> int:
    """What a SummaryMetadata says that its tag is, `plugin` if nothing; MALFORMED if it is."""
    while at < stop:
        key, _, start, at = next_field(data, at, stop)
        if at < 0:
            return MALFORMED
        if key == METADATA_PLUGIN_DATA:
            inner = start
            while inner < at:
                key, _, start, inner = next_field(data, inner, at)
                if inner < 0:
                    return MALFORMED
                if key == PLUGIN_DATA_NAME:
                    name = 0
                    for index in range(min(inner - start, 7)):
                        name |= byte_at(data, start + index) << (8 * index)
                    plugin = UNKNOWN if inner == start else OTHER
                    if name == SCALARS_PLUGIN and inner - start == 7:
                        plugin = SCALARS
    return plugin


def tensor_scalar(data: bytearray, at: int, stop: int) -> tuple[int, int]:
    """Kind and bits of the only element of a TensorProto.

    NO_SCALAR if it has none or several, or one that its type cannot hold.
    """
    first = at
    dtype = 0
    content_start = 0
    content_size = 0
    one_element = True
    while at < stop:
        key, value, start, at = next_field(data, at, stop)
        if at < 0:
            return MALFORMED, 0
        if key == TENSOR_DTYPE:
            dtype = int32_of(value)
        elif key == TENSOR_CONTENT:
            content_start = start
            content_size = at - start
        elif key == TENSOR_SHAPE:
            dimensions = long_dimensions(data, start, at)
            if dimensions < 0:
                return MALFORMED, 0
            one_element = one_element and dimensions == 0
    if not one_element or not 0 < dtype < len(DTYPES):
        return NO_SCALAR, 0
    field = int(DTYPES[dtype, 0])
    wire = int(DTYPES[dtype, 1])
    kind = int(DTYPES[dtype, 2])
    size = int(DTYPES[dtype, 3])
    lowest = -(1 << (8 * size - 1)) if DTYPES[dtype, 4] and size < 8 else 0
    bits = 0
    if content_size == 0:
        count, bits = list_element(data, first, stop, field, wire)
        if count == MALFORMED:
            return MALFORMED, 0
        if count != 1 or (size < 8 and not 0 <= bits - lowest < 1 << (8 * size)):
            return NO_SCALAR, 0
        return kind, bits
    if content_size != size:
        return NO_SCALAR, 0
    if size == 8:
        return kind, int64_at(data, content_start)
    for index in range(size):
        bits |= byte_at(data, content_start + index) << (8 * index)
    if field == BOOL_VAL:
        return kind, 1 if bits != 0 else 0
    return kind, bits + 2 * lowest if bits >= -lowest else bits


def list_element(data: bytearray, at: int, stop: int, field: int, wire: int) -> tuple[int, int]:
    """How many elements list `field` of a TensorProto has, packed or not, and the bits of the last."""
    count = 0
    bits = 0
    while at < stop:
        key, _, start, at = next_field(data, at, stop)
        if at < 0:
            return MALFORMED, 0
        if key >> 3 != field or (key & 7 != wire and key & 7 != BYTES):
            continue
        if wire == VARINT:
            while start < at:
                bits, start = varint(data, start, at)
                if start < 0:
                    return MALFORMED, 0
                count += 1
        else:
            size = 4 if wire == FIXED32 else 8
            if (at - start) % size:
                return MALFORMED, 0
            if at > start:
                count += (at - start) // size
                bits = uint32_at(data, at - 4) if size == 4 else int64_at(data, at - 8)
    if field in (INT_VAL, HALF_VAL):
        bits = int32_of(bits)
    elif field == UINT32_VAL:
        bits &= 0xFFFFFFFF
    elif field == BOOL_VAL:
        bits = 1 if bits != 0 else 0
    return count, bits


def long_dimensions(data: bytearray, at: int, stop: int) -> int:
    """How many dimensions of a TensorShapeProto are not 1; MALFORMED if it is."""
    count = 0
    while at < stop:
        key, _, start, at = next_field(data, at, stop)
        if at < 0:
            return MALFORMED
        if key == SHAPE_DIM:
            size = 0
            inner = start
            while inner < at:
                key, value, _, inner = next_field(data, inner, at)
                if inner < 0:
                    return MALFORMED
                if key == DIM_SIZE:
                    size = value
            if size != 1:
                count += 1
    return count


def int32_of(value: int) -> int:
    """The low 32 bits with their sign: what a varint means in an int32 or an enum."""
    return ((value + 0x80000000) & 0xFFFFFFFF) - 0x80000000


# Tags.


def label_rows(
    data: bytearray,
    rows: NDArray[np.int64],
    row: int,
    stop: int,
    tags: dict[bytes, int],
    plugins: NDArray[np.int64],
    codes: NDArray[np.int32],
) -> int:
    """Writes into `codes` the number of its tag for each column of `rows` that is a scalar and asked for, else -1.

    `plugins` keeps what each tag is: its first metadata says so. Returns the first column whose tag is not found,
    or `stop`.
    """
    while row < stop:
        tag = find_tag(data, int(rows[TAG_START, row]), int(rows[TAG_STOP, row]), tags)
        if tag < 0:
            return row
        if plugins[tag] == UNKNOWN:
            plugins[tag] = rows[PLUGIN, row]
        if rows[KIND, row] == SIMPLE:
            wanted = plugins[tag] != UNWANTED
        else:
            wanted = plugins[tag] == SCALARS and rows[KIND, row] != NO_SCALAR
        codes[row] = tag if wanted else -1
        row += 1
    return row


class TagTable:
    """The tags met so far, numbered as they came: a dict, and the same as a hash table for the compiled `find_tag`."""

    PROBES = 32  # tags that crowd one place of the hash table are left to the dict

    def __init__(self) -> None:
        self.numbers: dict[bytes, int] = {}
        self.plugins = np.zeros(64, np.int64)  # by number: what the tag is
        self._slots = np.full(256, -1, np.int64)
        self._characters = np.zeros(1024, np.uint8)  # all tags, one behind the other
        self._bounds = np.zeros(65, np.int64)  # tag k stands between bounds k and k + 1

    @property
    def addresses(self) -> tuple[int, int, int, int]:
        """The hash table as the compiled `find_tag` reads it, valid until a tag is added."""
        return _address(self._slots), len(self._slots), _address(self._characters), _address(self._bounds)

    def add(self, tag: bytes, plugin: int) -> None:
        """Gives `tag`, which is new, the next number."""
        number = len(self.numbers)
        self.numbers[tag] = number
        if number == len(self.plugins):
            self.plugins = _extended(self.plugins, 2 * number)
            self._bounds = _extended(self._bounds, 2 * number + 1)
        self.plugins[number] = plugin
        start = int(self._bounds[number])
        stop = start + len(tag)
        if stop > len(self._characters):
            self._characters = _extended(self._characters, 2 * stop)
        self._characters[start:stop] = np.frombuffer(tag, np.uint8)
        self._bounds[number + 1] = stop
        if 4 * number < len(self._slots):
            self._insert(tag, number)
        else:
            self._slots = np.full(4 * len(self._slots), -1, np.int64)
            for known, its_number in self.numbers.items():
                self._insert(known, its_number)

    def _insert(self, tag: bytes, number: int) -> None:
        home = masked_crc32c(tag)
        for probe in range(self.PROBES):
            slot = (home + probe) % len(self._slots)
            if self._slots[slot] < 0:
                self._slots[slot] = number
                return


def _extended(array: NDArray[Any], size: int) -> NDArray[Any]:
    longer = np.zeros(size, array.dtype)
    longer[: len(array)] = array
    return longer


def _address(array: NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


# Compilation.


class Loops(NamedTuple):
    """The four loops, compiled or plain, and what they take for bytes and for a TagTable.

    Whoever calls a compiled loop keeps the bytearray alive, and as long as it is, until the loop returns.
    """

    frame_records: Callable[..., tuple[int, int, int]]
    find_header: Callable[..., int]
    parse_scalars: Callable[..., tuple[int, int, int]]
    label_rows: Callable[..., int]
    data: Callable[[bytearray], Any]
    tags: Callable[[TagTable], Any]


PLAIN = Loops(frame_records, find_header, parse_scalars, label_rows, lambda data: data, lambda table: table.numbers)


@functools.cache
def compiled() -> Loops:
    """The compiled loops, from numba's cache after the first time on a machine; PLAIN, and a warning, if it fails."""
    try:
        return _compile()
    except Exception as error:  # noqa: BLE001 - no numba, no place for its cache, a cache broken by a power failure
        warnings.warn(f"event files are read without numba, and slowly: {error}", RuntimeWarning, stacklevel=2)
        return PLAIN


def _compile() -> Loops:
    import numba
    from numba.core import types
    from numba.extending import overload, register_jitable

    if numba.config.DISABLE_JIT or sys.byteorder != "little":  # type: ignore[attr-defined]
        return PLAIN
    for leaf, twin in _twins().items():
        overload(leaf, jit_options={"forceinline": True}, strict=False)(lambda *_, twin=twin: twin)
    often = (varint, next_field, parse_value)
    for helper in (*often, valid_header, metadata_plugin, tensor_scalar, list_element, long_dimensions, int32_of):
        register_jitable(forceinline=helper in often)(helper)
    number, line, table = types.int64, types.int64[::1], types.int64[:, ::1]
    tags = types.Tuple((number,) * 4)  # type: ignore[no-untyped-call]
    compile_as = functools.partial(numba.njit, cache=True, nogil=True, error_model="numpy")
    return Loops(
        compile_as((number, number, number, table, number))(frame_records),
        compile_as((number, number, number))(find_header),
        compile_as((number, table, number, number, table, line))(parse_scalars),
        compile_as((number, table, number, number, tags, line, types.int32[::1]))(label_rows),
        lambda data: _address(np.frombuffer(data, np.uint8)),
        lambda table: table.addresses,
    )


def _crc_tables() -> NDArray[np.uint32]:
    """table[k, byte]: what `byte` adds to the CRC-32C of a message in which k bytes follow it."""
    tables = np.zeros((8, 256), np.uint64)
    tables[0] = np.arange(256)
    for _ in range(8):
        tables[0] = tables[0] >> 1 ^ (tables[0] & 1) * np.uint64(0x82F63B78)
    for k in range(1, 8):
        tables[k] = tables[k - 1] >> 8 ^ tables[0][tables[k - 1] & 255]
    return tables.astype(np.uint32)


def _twins() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The leaves as the compiled loops have them."""
    from llvmlite import ir  # type: ignore[import-untyped]
    from numba.core import types
    from numba.extending import intrinsic

    tables = _crc_tables()
    probes = TagTable.PROBES

    def load(width: int) -> Any:
        def typing(_context: Any, _data: Any, _at: Any) -> Any:
            def code(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
                pointer = builder.inttoptr(builder.add(*arguments), ir.IntType(width).as_pointer())
                number = builder.load(pointer)
                number.align = 1
                return number if width == 64 else builder.zext(number, ir.IntType(64))

            return types.int64(types.int64, types.int64), code

        return intrinsic(typing)

    load8, load32, load64 = load(8), load(32), load(64)

    def crc(data: Any, start: Any, stop: Any) -> Any:
        crc = np.uint64(0xFFFFFFFF)
        while stop - start >= 8:
            word = np.uint64(load64(data, start)) ^ crc
            crc = np.uint64(
                tables[7, word & np.uint64(255)]
                ^ tables[6, word >> np.uint64(8) & np.uint64(255)]
                ^ tables[5, word >> np.uint64(16) & np.uint64(255)]
                ^ tables[4, word >> np.uint64(24) & np.uint64(255)]
                ^ tables[3, word >> np.uint64(32) & np.uint64(255)]
                ^ tables[2, word >> np.uint64(40) & np.uint64(255)]
                ^ tables[1, word >> np.uint64(48) & np.uint64(255)]
                ^ tables[0, word >> np.uint64(56)]
            )
            start += 8
        if stop - start >= 4:
            word = np.uint64(load32(data, start)) ^ crc
            crc = np.uint64(
                tables[3, word & np.uint64(255)]
                ^ tables[2, word >> np.uint64(8) & np.uint64(255)]
                ^ tables[1, word >> np.uint64(16) & np.uint64(255)]
                ^ tables[0, word >> np.uint64(24)]
            )
            start += 4
        while start < stop:
            crc = tables[0, (crc ^ np.uint64(load8(data, start))) & np.uint64(255)] ^ crc >> np.uint64(8)
            start += 1
        number = np.int64(crc ^ np.uint64(0xFFFFFFFF))
        return ((number >> 15 | number << 17) + 0xA282EAD8) & 0xFFFFFFFF

    def find(data: Any, start: Any, stop: Any, tags: Any) -> Any:
        slots, size, characters, bounds = tags
        home = masked_crc(data, start, stop)
        for probe in range(probes):
            tag = load64(slots, 8 * ((home + probe) & (size - 1)))
            if tag < 0:
                break
            first = load64(bounds, 8 * tag)
            if load64(bounds, 8 * tag + 8) - first != stop - start:
                continue
            index = start
            while stop - index >= 8 and load64(characters, first + index - start) == load64(data, index):
                index += 8
            while index < stop and load8(characters, first + index - start) == load8(data, index):
                index += 1
            if index == stop:
                return tag
        return -1

    return {
        byte_at: lambda data, at: load8(data, at),
        uint32_at: lambda data, at: load32(data, at),
        int64_at: lambda data, at: load64(data, at),
        masked_crc: crc,
        find_tag: find,
    }
