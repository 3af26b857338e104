"""EventFile: a TensorBoard event file that is opened once and survives what happens to training runs."""

import atexit
import contextlib
import errno
import io
import itertools
import math
import os
import re
import signal
import socket
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlboard.eventfile import wire

_BUFFER_BYTES = 1 << 16
_BUFFER_ITEMS = 4 * 1024  # of 1,024 scalars: as many bytes
_TICK_SECONDS = 0.25  # a quarter of what may be lost, so that a late wake-up still keeps the promise
_FEW_POINTS = 64  # fewer are encoded faster one by one than as arrays
_NAME_SECONDS = re.compile(r"events\.out\.tfevents\.(\d{10})\.")
_numbers = itertools.count()
Made = TypeVar("Made")


class LogWarning(RuntimeWarning):
    """Something could not be logged; training goes on."""


class _ByTag(dict[str, Made]):
    """What is made of a tag, once."""

    def __init__(self, make: Callable[[str], Made]) -> None:
        self._make = make

    def __missing__(self, tag: str) -> Made:
        made = self[tag] = self._make(tag)
        return made


class EventFile:
    """Writes TensorBoard events to one new file in `directory`, in the order of the calls.

    Events wait in memory until they are about 64 KiB, the previous write is `flush_seconds` old, or a tick
    comes (see `_tick`): a run killed with SIGKILL loses less than its last second. Scalars wait as numbers and
    are encoded together. `close` and `flush(sync=True)` also force the file to the disk. Files are closed at
    exit, and flushed on SIGTERM unless the program handles it (see `_on_sigterm`). All methods may be called
    from any thread. After a fork the file belongs to the parent: what the child adds is dropped.

    Once the file is open, a failing disk never raises: what cannot be written whole is dropped and counted
    in `dropped`, with one LogWarning, and later writes are tried again. Bad arguments do raise:
    TypeError, ValueError or OverflowError for most, and nothing is added.

    The file's name sorts after those of all event files in `directory`, as TensorBoard reads them by name,
    even if the clock went back. Its contents depend on nothing but the calls and `clock`.

    Attributes:
        path: the file.
        dropped: how many records are lost.
        clock: gives the wall time, in seconds, of what is added without one.

    Raises OSError if the file cannot be made.
    """

    _unusable: str | None = "it could not be opened"

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        filename_suffix: str = "",
        flush_seconds: float = 1.0,
        clock: Callable[[], float] = time.time,
        hostname: str | None = None,
    ) -> None:
        self.dropped = 0
        self.clock = clock
        self._flush_seconds = flush_seconds
        self._series = _ByTag(wire.Series)
        self._values = _ByTag(wire.scalar_value)
        # Adding takes no lock: threads append to the list, which is atomic, and only `flush` takes from it.
        # The lock is reentrant, because a signal handler may log, flush or close in the middle of anything.
        # Records stay in the list until they are written at `_end`, however often that is begun. Each takes four
        # items: a scalar its series, value, step and wall time, any other None, its bytes and two zeros.
        self._records: list[Any] = []
        self._lock = threading.RLock()
        self._end = 0
        self._flushes = 0
        self._torn = False
        self._warned = False

        now = clock()
        first = wire.event(now, 0, wire.delimited(wire.FILE_VERSION, b"brain.Event:2"))
        self._file = _create(Path(directory), int(now), hostname or socket.gethostname(), filename_suffix)
        self.path = Path(self._file.name)
        try:
            self._write(first, 0)
        except OSError:
            self._file.close()
            self.path.unlink(missing_ok=True)
            raise
        self._end = len(first)
        self._flush_at = now + flush_seconds
        self._unusable = None
        _watch(self)

    def scalar(self, tag: str, value: Any, step: Any, wall_time: float | None = None) -> None:
        """Adds one number: anything float() takes, or an array or tensor of one element on any device.

        TensorBoard keeps float32: what is beyond its range becomes infinite. `step` is a 64-bit integer.
        """
        series = self._series[tag]
        if value.__class__ is not float:
            value = wire.number(value)
        if step.__class__ is not int:
            step = int(step)
        if not -(1 << 63) <= step < 1 << 63:
            raise OverflowError(f"step {step} does not fit in 64 bits")
        wall_time = self.clock() if wall_time is None else float(wall_time)
        self._records.extend((series, value, step, wall_time))
        if wall_time >= self._flush_at or len(self._records) >= _BUFFER_ITEMS:
            self.flush()

    def scalars(self, values: Mapping[str, Any], step: Any, wall_time: float | None = None) -> None:
        """Adds the numbers of one step, by tag, as a single event: a quarter of the cost, and less to read."""
        if not values:
            return
        parts = []
        for tag, value in values.items():
            parts.append(self._values[tag])
            parts.append(wire.float32(value))
        if wall_time is None:
            wall_time = self.clock()
        self._records.extend((None, wire.event(wall_time, step, wire.delimited(wire.SUMMARY, b"".join(parts))), 0, 0))
        if wall_time >= self._flush_at or len(self._records) >= _BUFFER_ITEMS:
            self.flush()

    def scalar_series(self, tag: str, steps: ArrayLike, values: ArrayLike, wall_times: ArrayLike | None = None) -> None:
        """Adds many points of one tag: `steps` int (N), `values` float (N), `wall_times` seconds, (N) or one."""
        step_array = np.asarray(steps)
        if step_array.size == 0:
            return
        if step_array.dtype.kind not in "iu" or int(step_array.max()) >= 1 << 63:
            raise TypeError(f"steps are 64-bit integers, not {step_array.dtype}")
        step_array = step_array.astype(np.int64)
        with np.errstate(over="ignore"):
            value_array = np.asarray(values).astype(np.float32, casting="same_kind")
        if step_array.ndim != 1 or value_array.shape != step_array.shape:
            raise ValueError(f"{step_array.shape} steps do not go with {value_array.shape} values")
        times = np.asarray(self.clock() if wall_times is None else wall_times, np.float64)
        time_array = np.broadcast_to(times, step_array.shape)
        if len(step_array) < _FEW_POINTS:
            columns = (step_array.tolist(), value_array.tolist(), time_array.tolist())
            for step, value, wall_time in zip(*columns, strict=True):
                self.scalar(tag, value, step, wall_time)
            return
        for records in self._series[tag].chunks(value_array, step_array, time_array):
            self._append(records)

    def summary(self, summary: Any, step: Any = 0, wall_time: float | None = None) -> None:
        """Adds a tensorboard Summary message."""
        field = wire.delimited(wire.SUMMARY, summary.SerializeToString())
        self._append(wire.event(self.clock() if wall_time is None else wall_time, step, field))

    def event(self, event: Any) -> None:
        """Adds a whole tensorboard Event, as a message or serialized."""
        self._append(wire.frame(event if isinstance(event, bytes) else event.SerializeToString()))

    def flush(self, sync: bool = False) -> None:
        """Writes what is buffered; with `sync`, returns when it is on the disk."""
        with self._lock:
            trouble = None
            while count := len(self._records):
                flushes, end, failure = self._flushes, self._end, self._unusable
                records = _encoded(self._records[:count])
                try:
                    if failure is None:
                        self._write(records, end)
                except OSError as error:
                    failure = error.strerror or repr(error)
                except ValueError as error:  # a signal handler has closed the file
                    failure = str(error)
                if failure is None:
                    end, lost = end + len(records), 0
                else:
                    lost = wire.count_records(records)
                if self._flushes == flushes:  # else a signal handler has done it
                    # Python runs no handler in here, as there is no call.
                    del self._records[:count]
                    self._end = end
                    self._flushes += 1
                    self.dropped += lost
                    trouble = failure or trouble
            if self._unusable is None:
                with contextlib.suppress(OSError):
                    self._mend()
                self._flush_at = self.clock() + self._flush_seconds
                if sync:
                    try:
                        os.fsync(self._file.fileno())
                    except OSError as error:
                        trouble = error.strerror or repr(error)
            if trouble is not None and not self._warned:
                self._warned = True
                message = f"{self.path}: {trouble}; what cannot be written is dropped and counted"
                warnings.warn(message, LogWarning, stacklevel=3)

    @property
    def position(self) -> int:
        """The length of the file with all that was added: a place to truncate to once it is forced to the disk."""
        with self._lock:
            self.flush()
            return self._end

    def tell(self) -> int:
        """Forces the file to the disk and returns its length: a place to truncate to when the run is resumed."""
        with self._lock:
            self.flush(sync=True)
            return self._end

    def close(self) -> None:
        """Forces the file to the disk and closes it. Later events are dropped and counted, with one warning."""
        if self._unusable is not None:
            return
        with self._lock:
            try:
                self.flush(sync=True)
            finally:
                self._abandon("the file is closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _append(self, records: bytes) -> None:
        self._records.extend((None, records, 0, 0))
        if len(records) >= _BUFFER_BYTES or self.clock() >= self._flush_at:
            self.flush()

    def _write(self, records: bytes, offset: int) -> None:
        if os.fstat(self._file.fileno()).st_nlink == 0 and not self.path.exists():  # some file systems count no links
            raise FileNotFoundError(errno.ENOENT, "the file was deleted")
        self._mend()
        self._torn = True
        written = 0
        while written < len(records):
            count = _pwrite(self._file.fileno(), memoryview(records)[written:], offset + written)
            if count == 0:
                raise OSError(errno.EIO, "the disk takes no more")
            written += count
        self._torn = False

    def _mend(self) -> None:
        """Cuts off what a failed write has left, so that the file ends with a whole record."""
        if self._torn:
            os.ftruncate(self._file.fileno(), self._end)
            self._torn = False

    def _abandon(self, reason: str) -> None:
        """Makes every later write fail with `reason`."""
        self._unusable = reason
        self._flush_at = -math.inf
        with contextlib.suppress(OSError):
            self._file.close()
        _open_files.pop(id(self), None)


def _encoded(records: list[Any]) -> bytes:
    """Returns the bytes of `records`, in their order. Scalars of a series are encoded together where that is faster."""
    all_series, values, steps, wall_times = (records[item::4] for item in range(4))
    members = dict.fromkeys(all_series)
    if len(all_series) < _FEW_POINTS or members.keys() == {None}:
        columns = zip(all_series, values, steps, wall_times, strict=True)
        return b"".join(value if series is None else series.record(value, *when) for series, value, *when in columns)
    step_array, time_array = np.array(steps, np.int64), np.array(wall_times, np.float64)
    if len(members) == 1:
        return b"".join(all_series[0].chunks(_float32(values), step_array, time_array))
    encoded = np.array(values, object)
    series_array = np.array(all_series, object)
    for series in filter(None, members):
        points = np.flatnonzero(series_array == series)
        if len(points) < _FEW_POINTS:
            encoded[points] = [series.record(values[point], steps[point], wall_times[point]) for point in points]
        else:
            encoded[points] = series.records(_float32(encoded[points]), step_array[points], time_array[points])
    return b"".join(encoded.tolist())


def _float32(values: ArrayLike) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float64).astype(np.float32)


def _create(directory: Path, seconds: int, hostname: str, suffix: str) -> io.FileIO:
    """Returns a new file under TensorBoard's naming convention, with later seconds than all that are there."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.iterdir():
        if match := _NAME_SECONDS.match(path.name):
            seconds = max(seconds, int(match[1]) + 1)
    while True:
        name = f"events.out.tfevents.{seconds:010d}.{hostname}.{os.getpid()}.{next(_numbers)}{suffix}"
        with contextlib.suppress(FileExistsError):
            return io.FileIO(directory / name, "xb")


if sys.platform == "win32":

    def _pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, data)

else:
    _pwrite = os.pwrite


# What follows is one for the process: who has open files, and when they are written.

_open_files: weakref.WeakValueDictionary[int, EventFile] = weakref.WeakValueDictionary()
_ticker: threading.Thread | None = None


def _watch(file: EventFile) -> None:
    """Has `file` written every tick, at exit and on SIGTERM."""
    global _ticker
    _open_files[id(file)] = file
    if _ticker is None or not _ticker.is_alive():  # a fork's child has none
        _ticker = threading.Thread(target=_tick, name="eventfile-tick", daemon=True)
        with contextlib.suppress(RuntimeError):  # no more threads: adding still looks at the time
            _ticker.start()
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _on_sigterm)


def _tick() -> None:
    """Writes what is buffered, four times a second.

    Adding looks at the time as well, but a loop that logs in bursts, say once an epoch, would leave the end
    of each burst in memory until the next. It costs the training thread no more than a write of its own.
    """
    while True:
        time.sleep(_TICK_SECONDS)
        _flush_all()


def _flush_all(sync: bool = False) -> None:
    for file in _files():
        with contextlib.suppress(LogWarning):  # under -W error it is an exception; the rest goes on
            file.flush(sync)


def _files() -> list[EventFile]:
    references = _open_files.valuerefs()  # a copy: another thread may open a file
    return [file for reference in references if (file := reference()) is not None]


def _on_sigterm(signal_number: int, frame: FrameType | None) -> None:
    """Saves the logs, then dies of the signal as the process would have without us.

    Only ever installed over the default action, from the main thread. A program that sets its own handler
    afterwards replaces this one, and gets it from `signal.signal` as the previous handler to chain to.
    """
    del frame
    _flush_all(sync=True)
    signal.signal(signal_number, signal.SIG_DFL)
    signal.raise_signal(signal_number)


@atexit.register
def _close_all() -> None:
    for file in _files():
        with contextlib.suppress(LogWarning):
            file.close()


def _after_fork_in_child() -> None:
    """Leaves the files to the parent. Another thread may have held the locks: the child makes new ones."""
    for file in _files():
        file._lock = threading.RLock()
        file._records = []
        file._abandon("this process is a fork of the one that writes it")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
