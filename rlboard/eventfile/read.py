"""Event files read back: scalars as columns, events as protocol buffers, damage found, stepped over and mended.

Every record is believed by its two checksums alone. Damage never raises: it is skipped and reported, and reading goes
on at the next valid header. The last record of a file may be cut short, as it is while somebody still writes it; that
is no damage, and `follow` returns to it. Files are read in windows, so that memory is bounded by the largest record
and by what is returned.

Steps are not judged: what a resumed run wrote twice is returned twice, in the order of the file.
"""

import io
import itertools
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlboard.eventfile import scan
from rlboard.eventfile.wire import FOOTER_BYTES, HEADER_BYTES

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

WINDOW_BYTES = 1 << 20  # what is looked at fits the processor's cache; a longer record gets a window of its own
ROWS = 1 << 15  # scalars taken at once, unless one event has more
COMPILE_BYTES = 1 << 21  # numba takes most of a second to start: plain Python has read that much by then

BAD_HEADER = "header checksum"
BAD_PAYLOAD = "payload checksum"
CUT_SHORT = "cut short"
NO_EVENT = "not an event"


@dataclass(frozen=True)
class Damage:
    """Bytes of a file that were skipped: `length` from `offset` on."""

    path: Path
    offset: int
    length: int
    reason: str


@dataclass(frozen=True)
class Report:
    """What `verify` and `repair` found in a file."""

    path: Path
    size: int  # bytes
    records: int  # with two right checksums
    valid_bytes: int  # that these take
    damage: tuple[Damage, ...]
    torn_tail: int | None  # where a last record starts that the file ends in; left there by a crash, or being written

    @property
    def ok(self) -> bool:
        """Whether every byte belongs to a valid record."""
        return self.valid_bytes == self.size


class Series(NamedTuple):
    """One tag's scalars, in the order of the file."""

    step: NDArray[np.int64]
    wall_time: NDArray[np.float64]  # seconds since 1970
    value: NDArray[Any]  # float32 or float64


@dataclass(frozen=True, eq=False)
class ScalarColumns(Mapping[str, Series]):
    """Scalars in the order of their files; row i is `step[i]`, `wall_time[i]`, `value[i]` of tag `tags[code[i]]`.

    A mapping from tag to `Series`: `columns["reward"].value`, `"reward" in columns`, `dict(columns)`.

    `value` is float32, which is what `add_scalar` writes, unless one of the rows needs more (a double or an integer in
    a tensor); then the whole column is float64. So every value is exact but for integers beyond 2**53, which are
    rounded to the nearest double. Tags that are not UTF-8 are decoded with `surrogateescape`.
    """

    tags: tuple[str, ...]  # in the order in which the files mention them
    code: NDArray[np.int32]
    step: NDArray[np.int64]
    wall_time: NDArray[np.float64]
    value: NDArray[Any]
    damage: tuple[Damage, ...]

    __eq__ = object.__eq__  # Mapping's would ask arrays whether they are true
    __hash__ = object.__hash__

    def __getitem__(self, tag: str) -> Series:
        """Raises KeyError for a tag of which there is no scalar."""
        rows = self._rows[tag]
        return Series(self.step[rows], self.wall_time[rows], self.value[rows])

    def __iter__(self) -> Iterator[str]:
        return iter(self.tags)

    def __len__(self) -> int:
        """The number of tags."""
        return len(self.tags)

    def __contains__(self, tag: object) -> bool:
        return tag in self.tags

    @cached_property
    def _rows(self) -> dict[str, Any]:
        """The rows of each tag."""
        if len(self.tags) == 1:
            return {self.tags[0]: slice(None)}
        narrow = self.code.astype(np.uint16) if len(self.tags) < 2**16 else self.code  # NumPy sorts these by radix
        counts = np.bincount(self.code, minlength=len(self.tags))
        rows = np.split(np.argsort(narrow, kind="stable"), np.cumsum(counts)[:-1])
        return dict(zip(self.tags, rows, strict=False))


def read_scalars(path: str | os.PathLike[str], tags: Iterable[str] | None = None) -> ScalarColumns:
    """All scalars of an event file, or of a directory's event files in the order of their names, as TensorBoard does.

    Reads `simple_value` and the tensors of tags whose first value names the plugin "scalars". With `tags` only these
    are kept. Raises FileNotFoundError where there is no event file.
    """
    reader = ScalarReader(path, tags)
    columns = reader.read()
    if not reader._files:
        raise FileNotFoundError(f"no event file in {path}")
    return columns


def follow(
    path: str | os.PathLike[str],
    tags: Iterable[str] | None = None,
    poll_seconds: float = 1.0,
    stop: threading.Event | None = None,
) -> Iterator[ScalarColumns]:
    """What is there of an event file or a directory, then what comes, as often as something came.

    Looks every `poll_seconds`, for new files of a directory too. Ends after a last look when `stop` is set, or never.
    """
    reader = ScalarReader(path, tags)
    stop = stop or threading.Event()
    stopped = False
    while not stopped:
        stopped = stop.is_set()
        columns = reader.read()
        if columns or columns.damage:
            yield columns
        if not stopped:
            stop.wait(poll_seconds)


class ScalarReader:
    """Reads an event file or a directory bit by bit: every `read` returns what came since the one before.

    A file that was truncated is read on from its new end; rows already returned are not taken back.
    """

    def __init__(self, path: str | os.PathLike[str], tags: Iterable[str] | None = None) -> None:
        self.path = Path(path)
        self._files: dict[Path, _Records] = {}
        self._wanted = {tags} if isinstance(tags, str) else None if tags is None else set(tags)
        self._table = scan.TagTable()
        self._names: list[str] = []
        self._rows = np.empty((scan.ROW_FIELDS, ROWS), np.int64)

    def read(self) -> ScalarColumns:
        """The scalars that are new. Raises FileNotFoundError if there is no such file or directory."""
        parts = [_Part.empty()]
        damage: list[Damage] = []
        for path in event_files(self.path):
            records = self._files.setdefault(path, _Records(path))
            try:
                for window in records.windows():
                    parts.extend(self._scalars(window, records))
            except FileNotFoundError:
                continue  # removed since the directory was listed
            damage += records.take_damage()
        return self._columns(parts, damage)

    def _scalars(self, window: "_Window", records: "_Records") -> "Iterator[_Part]":
        view = window.loops.data(window.data)
        malformed = np.empty(window.count, np.int64)
        begin = 0
        while begin < window.count:
            next_one, filled, rejected = window.loops.parse_scalars(
                view, window.payloads, begin, window.count, self._rows, malformed
            )
            if next_one == begin:
                self._rows = np.empty((scan.ROW_FIELDS, 2 * self._rows.shape[1]), np.int64)
            if rejected:
                for start, stop in window.base + window.records[:, malformed[:rejected]].T:
                    records.add_damage(int(start), int(stop), NO_EVENT)
            if filled:
                yield self._label(window, view, filled)
            begin = next_one

    def _label(self, window: "_Window", view: Any, filled: int) -> "_Part":
        """The first `filled` scalars of `_rows` that are asked for."""
        rows, table = self._rows, self._table
        codes = np.empty(filled, np.int32)
        row = 0
        while True:
            row = window.loops.label_rows(view, rows, row, filled, window.loops.tags(table), table.plugins, codes)
            if row == filled:
                break
            tag = bytes(window.data[rows[scan.TAG_START, row] : rows[scan.TAG_STOP, row]])
            if tag not in table.numbers:
                self._add_tag(tag)
            row = scan.label_rows(window.data, rows, row, row + 1, table.numbers, table.plugins, codes)

        dropped = codes < 0
        kept = np.flatnonzero(~dropped) if dropped.any() else slice(filled)
        return _Part(
            codes[kept],
            rows[scan.STEP, kept].copy(),
            rows[scan.WALL_TIME, kept].copy().view(np.float64),
            _values(rows[scan.KIND, kept], rows[scan.BITS, kept]),
        )

    def _add_tag(self, tag: bytes) -> None:
        name = tag.decode("utf-8", "surrogateescape")
        self._names.append(name)
        self._table.add(tag, scan.UNKNOWN if self._wanted is None or name in self._wanted else scan.UNWANTED)

    def _columns(self, parts: "list[_Part]", damage: list[Damage]) -> ScalarColumns:
        with np.errstate(invalid="ignore"):  # NumPy warns of signalling NaNs
            code, step, wall_time, value = (np.concatenate(column) for column in zip(*parts, strict=True))
        used = np.flatnonzero(np.bincount(code))
        if len(used) < len(self._names):
            renumbered = np.zeros(len(self._names), np.int32)
            renumbered[used] = np.arange(len(used))
            code = renumbered[code]
        tags = tuple(self._names[number] for number in used)
        return ScalarColumns(tags, code, step, wall_time, value, tuple(damage))


class _Part(NamedTuple):
    """The columns of one window; `code` counts all tags of the reader."""

    code: NDArray[np.int32]
    step: NDArray[np.int64]
    wall_time: NDArray[np.float64]
    value: NDArray[Any]

    @classmethod
    def empty(cls) -> "_Part":
        return cls(np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0), np.empty(0, np.float32))


def _values(kinds: NDArray[np.int64], bits: NDArray[np.int64]) -> NDArray[Any]:
    """The numbers that `bits` are, float64 if one of them needs it, else float32."""
    if (kinds == scan.SIMPLE).all():
        return bits.astype(np.uint32).view(np.float32)
    wide = np.isin(kinds, (scan.FLOAT64, scan.INT64, scan.UINT64)).any()
    values = np.empty(len(bits), np.float64 if wide else np.float32)
    with np.errstate(invalid="ignore"):  # NumPy warns of signalling NaNs
        for kind in np.unique(kinds):
            these = bits[kinds == kind]
            match int(kind):
                case scan.FLOAT64:
                    numbers: NDArray[Any] = these.view(np.float64)
                case scan.FLOAT16:
                    numbers = these.astype(np.uint16).view(np.float16)
                case scan.BFLOAT16:
                    numbers = (these << 16).astype(np.uint32).view(np.float32)
                case scan.INT64:
                    numbers = these
                case scan.UINT64:
                    numbers = these.view(np.uint64)
                case _:
                    numbers = these.astype(np.uint32).view(np.float32)
            values[kinds == kind] = numbers
    return values


def read_events(path: str | os.PathLike[str]) -> "Iterator[Event]":
    """The events of a file, or of a directory's files in the order of their names, as protocol buffers.

    Passes over records that are damaged or no Event. Raises FileNotFoundError where there is no event file.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    paths = event_files(Path(path))
    if not paths:
        raise FileNotFoundError(f"no event file in {path}")
    for each in paths:
        for window in _Records(each).windows():
            for start, stop in window.payloads[:, : window.count].T.tolist():
                try:
                    event = Event.FromString(bytes(window.data[start:stop]))
                except DecodeError:
                    continue
                yield event


def verify(path: str | os.PathLike[str]) -> Report:
    """Checks both checksums of every record of a file, which nobody writes any more."""
    return _verify(Path(path), None)


def repair(path: str | os.PathLike[str], destination: str | os.PathLike[str], *, overwrite: bool = False) -> Report:
    """Writes every valid record of a file to `destination`, which appears whole or not at all; reports on the source.

    `destination` may exist, and may be `path` itself, only with `overwrite`; else FileExistsError is raised. Raises
    ValueError, and writes nothing, if no record of the file is valid.
    """
    source, target = Path(path), Path(destination)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; repair with overwrite=True replaces it")
    descriptor, name = tempfile.mkstemp(prefix=".repair-", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            report = _verify(source, file)
            file.flush()
            os.fsync(descriptor)
        if report.size and not report.records:
            raise ValueError(f"{source} holds no valid record")
        shutil.copymode(source, name)
        Path(name).replace(target)
    finally:
        Path(name).unlink(missing_ok=True)
    return report


def _verify(path: Path, copy: IO[bytes] | None) -> Report:
    records = _Records(path, finished=True)
    count = valid_bytes = 0
    for window in records.windows():
        starts, stops = window.records
        count += len(starts)
        valid_bytes += int((stops - starts).sum())
        if copy:
            gaps = np.flatnonzero(starts[1:] != stops[:-1])
            for start, stop in zip(starts[[0, *(gaps + 1)]], stops[[*gaps, -1]], strict=True):
                copy.write(window.data[start:stop])
    return Report(path, records.size, count, valid_bytes, tuple(records.take_damage()), records.torn_tail)


def truncate(path: str | os.PathLike[str], offset: int) -> None:
    """Cuts a file to its first `offset` bytes. Raises ValueError if no record ends there: nothing is cut then."""
    source = Path(path)
    if offset != 0 and not is_boundary(source, offset):
        raise ValueError(f"no record of {source} ends at byte {offset}")
    with source.open("r+b") as file:
        file.truncate(offset)
        os.fsync(file.fileno())


def is_boundary(path: Path, offset: int) -> bool:
    """Whether a record of the file ends at byte `offset`, all before it being read."""
    windows = itertools.takewhile(lambda window: window.base < offset, _Records(path, finished=True).windows())
    return any((window.base + window.records[1] == offset).any() for window in windows)


def event_files(path: Path) -> list[Path]:
    """The file itself, or what TensorBoard takes for a directory's event files. Subdirectories are other runs."""
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"no event file at {path}")
        return [path]
    named = (each for each in path.iterdir() if "tfevents" in each.name and not each.name.endswith(".profile-empty"))
    return sorted(each for each in named if each.is_file())


_plain_bytes = 0
"""What this process has read in plain Python: many small files are as much work as a large one."""


def _loops(bytes_ahead: int) -> scan.Loops:
    """The compiled loops where they are there already or pay."""
    global _plain_bytes
    if scan.compiled.cache_info().currsize or _plain_bytes + bytes_ahead > COMPILE_BYTES:
        return scan.compiled()
    _plain_bytes += bytes_ahead
    return scan.PLAIN


@dataclass(frozen=True)
class _Window:
    """A stretch of a file with the valid records that lie in it whole. The next one reuses its memory."""

    data: bytearray  # may be longer
    base: int  # its offset in the file
    payloads: NDArray[np.int64]  # their starts and stops in `data`, in the first `count` columns
    count: int
    loops: scan.Loops

    @property
    def records(self) -> NDArray[np.int64]:
        """Starts and stops of the whole records: with header and checksum."""
        widened: NDArray[np.int64] = self.payloads[:, : self.count] + np.array([[-HEADER_BYTES], [FOOTER_BYTES]])
        return widened


class _Records:
    """The valid records of one file, from where the last pass over it ended, and the damage between them.

    A broken header hides where the next record starts: the next valid header is searched for. A broken payload is
    stepped over if a valid header follows it; if none does, the record was cut short and others were appended, and
    they are searched for within it. That reads bytes twice, so it ends when it has cost four times the file.

    A record in whose midst the file ends is waited for, unless the file is `finished`: then others may follow it too.
    """

    def __init__(self, path: Path, *, finished: bool = False) -> None:
        self.path = path
        self.size = 0  # of the file when the last pass began
        self.torn_tail: int | None = None  # of a finished file
        self._finished = finished
        self._offset = 0  # everything before was returned or is damage
        self._passed = -1  # the size of the file that has been looked at to its end
        self._damage: list[Damage] = []
        self._lost: tuple[int, str] | None = None  # start and reason of damage whose end is not known yet
        self._searching = False  # for the next valid header
        self._rechecked = 0  # bytes

    def take_damage(self) -> list[Damage]:
        """The damage found since the last call."""
        damage, self._damage = self._damage, []
        return sorted(damage, key=lambda each: each.offset)

    def add_damage(self, start: int, stop: int, reason: str) -> None:
        """Notes damage, which may prolong the last one."""
        if self._damage:
            last = self._damage[-1]
            if last.reason == reason and last.offset + last.length == start:
                start = self._damage.pop().offset
        if start < stop:
            self._damage.append(Damage(self.path, start, stop - start, reason))

    def windows(self) -> Iterator[_Window]:
        """Everything up to the present end of the file."""
        with self.path.open("rb", buffering=0) as file:
            self.size = os.fstat(file.fileno()).st_size
            if self.size == self._passed:
                return
            if self.size < self._offset:  # the file was truncated: what comes now comes behind its new end
                self._offset, self._lost, self._searching = self.size, None, False
            needed = HEADER_BYTES
            data = bytearray(min(WINDOW_BYTES, self.size))
            payloads = np.empty((2, len(data) // scan.FRAME_BYTES + 1), np.int64)
            while needed and self._offset < self.size:
                left = self.size - self._offset
                size = min(max(needed, WINDOW_BYTES), left)
                if size > len(data):
                    data = bytearray(size)
                file.seek(self._offset)
                end = file.readinto(memoryview(data)[:size])
                if end < min(needed, left):
                    return  # the file is being truncated
                base, loops = self._offset, _loops(left)
                count, needed = self._walk(file, data, end, payloads, loops)
                if count:
                    yield _Window(data, base, payloads, count, loops)
        self._passed = self.size
        if self._lost:
            start, reason = self._lost
            if not self._finished:
                self.add_damage(start, self._offset, reason)
                self._lost = (self._offset, reason) if self._searching else None
            elif reason == CUT_SHORT:
                self.torn_tail = start
            else:
                self.add_damage(start, self.size, reason)

    def _walk(
        self, file: io.FileIO, data: bytearray, end: int, payloads: NDArray[np.int64], loops: scan.Loops
    ) -> tuple[int, int]:
        """Finds the payloads in data[:end], which was read from the offset on, and moves that.

        Returns their number, and how many bytes are needed from the new offset on: 0 when all is done.
        """
        base = self._offset
        view = loops.data(data)
        at = count = 0
        while True:
            if self._searching:
                found = loops.find_header(view, at, end)
                if found < 0:
                    at = max(at, end - HEADER_BYTES + 1)  # the last bytes may be the first of a header
                    needed = HEADER_BYTES
                    break
                at, self._searching = found, False
            before = count
            count, at, stopped_by = loops.frame_records(view, at, end, payloads, count)
            if count > before:
                self._found(base + int(payloads[0, before]) - HEADER_BYTES)
            if stopped_by == scan.BAD_HEADER:
                self._lose(base + at, BAD_HEADER)
                at += 1
            elif stopped_by == scan.BAD_PAYLOAD:
                self._lose(base + at, BAD_PAYLOAD)
                length = scan.int64_at(data, at)
                self._rechecked += length
                behind = at + scan.FRAME_BYTES + length
                if self._rechecked > 4 * self.size or self._header_follows(file, base + behind):
                    at = behind
                    continue
                at += HEADER_BYTES
            elif stopped_by == scan.FULL:
                needed = HEADER_BYTES
                break
            else:
                needed = scan.FRAME_BYTES + scan.int64_at(data, at) if end - at >= HEADER_BYTES else HEADER_BYTES
                if base + at + needed <= self.size or base + at == self.size or not self._finished:
                    break
                self._lose(base + at, CUT_SHORT)
                at = min(at + HEADER_BYTES, end)
            self._searching = True
        self._offset = base + at
        return count, needed if self._offset + needed <= self.size else 0

    def _header_follows(self, file: io.FileIO, offset: int) -> bool:
        """Whether a valid header stands at `offset`, or the file ends before it could."""
        file.seek(offset)
        header = bytearray(file.read(HEADER_BYTES))
        return len(header) < HEADER_BYTES or scan.valid_header(header, 0)

    def _lose(self, offset: int, reason: str) -> None:
        """Notes that a record at `offset` is not valid."""
        if reason == CUT_SHORT and self._lost and self._lost[1] != CUT_SHORT:
            self._found(offset)  # there is a header: what was lost before it is one thing, what it loses another
        self._lost = self._lost or (offset, reason)

    def _found(self, offset: int) -> None:
        """Notes that there is a record at `offset`."""
        if self._lost:
            self.add_damage(self._lost[0], offset, self._lost[1])
            self._lost = None
