"""What happens to event files when processes die, disks fail and directories vanish."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlboard.eventfile import EventFile, LogWarning, write
from tests.test_eventfile_write import is_whole, points

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals and forks")

PROLOGUE = """
import os, signal, sys, threading, time
from rlboard.eventfile import EventFile
file = EventFile(sys.argv[1])
def log(steps, tag="loss"):
    for step in steps:
        file.scalar(tag, step, step)
"""


def start(directory: Path, code: str, *options: str) -> subprocess.Popen[str]:
    """Runs `code` in a process of its own, after PROLOGUE."""
    program = PROLOGUE + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, *options, "-c", program, str(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(directory: Path, code: str, *options: str) -> tuple[int, str]:
    """Returns how `code` has ended, and its standard error."""
    process = start(directory, code, *options)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


def steps(directory: Path, tag: str = "loss") -> list[int]:
    """Returns the steps of `tag` in the only event file of a directory."""
    (path,) = directory.iterdir()
    return [step for name, step, _, _ in points(path) if name == tag]


INTERRUPTIBLE = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # a job in the background ignores it


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("", 0),
        ("raise RuntimeError('training failed')", 1),
        ("sys.exit(3)", 3),
        (f"{INTERRUPTIBLE}; os.kill(os.getpid(), signal.SIGINT); time.sleep(5)", -signal.SIGINT),
        pytest.param("os.kill(os.getpid(), signal.SIGTERM); time.sleep(5)", -signal.SIGTERM, marks=posix),
        ("del file", 0),
        ("import ctypes; ctypes.pythonapi.Py_IncRef(ctypes.py_object(file))", 0),  # never deleted
        ("import atexit; atexit.register(log, range(1000, 1001)); sys.exit()", 0),
    ],
)
def test_a_process_that_ends_without_close_loses_nothing(tmp_path: Path, end: str, code: int) -> None:
    returncode, stderr = finish(tmp_path, f"log(range(1000))\n{end}")
    assert returncode == code, stderr
    assert steps(tmp_path)[:1000] == list(range(1000))
    assert "atexit" not in end or steps(tmp_path)[1000:] == [1000]


def test_a_process_that_is_gone_at_once_loses_less_than_a_second(tmp_path: Path) -> None:
    code = """
        threading.Timer(1.3, os._exit, [7]).start()
        while True:
            log([time.time_ns()])
            time.sleep(0.001)
    """
    started = time.time()
    returncode, _ = finish(tmp_path, code)
    logged = steps(tmp_path)
    assert returncode == 7
    assert logged[-1] - logged[0] > 0.3e9
    assert logged[0] / 1e9 > started


@posix
def test_a_burst_survives_a_kill_a_second_later(tmp_path: Path) -> None:
    process = start(tmp_path, "log(range(10)); print('logged', flush=True); time.sleep(60)")
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(1.0)
    process.kill()
    process.communicate()
    assert steps(tmp_path) == list(range(10))


def check_kill(directory: Path, seconds: float) -> None:
    """Kills a process `seconds` after it began to log without a pause, and checks what is left of its logs."""
    code = """
        import itertools, numpy as np
        print("logging", flush=True)
        for step in itertools.count():
            log([step])
            file.scalars({"a": 1.0, "b": 2.0}, step)
            if step % 1000 == 0:
                file.scalar_series("series", np.arange(500), np.zeros(500))
            time.sleep(0.0003)
    """
    process = start(directory, code)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(seconds)
    process.kill()
    killed = time.time()
    process.communicate()
    (path,) = directory.iterdir()
    logged = [(step, wall_time) for tag, step, _, wall_time in points(path) if tag == "loss"]
    assert [step for step, _ in logged] == list(range(len(logged)))
    assert seconds < 1 or killed - logged[-1][1] < 1.0


@posix
@pytest.mark.parametrize("times", [3, pytest.param(200, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_loses_less_than_a_second(tmp_path: Path, times: int) -> None:
    moments = [random.Random(times).uniform(0, 2.5) for _ in range(times)]
    directories = [tmp_path / str(index) for index in range(times)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in pool.map(check_kill, directories, moments):
            pass


@posix
def test_a_program_that_handles_sigterm_keeps_its_handler(tmp_path: Path) -> None:
    code = """
        def handler(number, frame):
            log(range(10, 20))
            print("handled", previous.__name__, file=sys.stderr)
            previous(number, frame)
        previous = signal.signal(signal.SIGTERM, handler)
        EventFile(sys.argv[1] + "/other").close()  # does not take SIGTERM back
        log(range(10))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    """
    returncode, stderr = finish(tmp_path / "run", code)
    shutil.rmtree(tmp_path / "run" / "other")
    assert returncode == -signal.SIGTERM, stderr
    assert "handled _on_sigterm" in stderr
    assert steps(tmp_path / "run") == list(range(20))


@posix
def test_a_handler_may_log_and_flush_in_the_middle_of_anything(tmp_path: Path) -> None:
    """Hundreds of signals interrupt adding and writing; one in ten ends what it interrupts with an exception."""
    code = """
        import itertools
        count = itertools.count()
        class Interruption(Exception):
            pass
        def handler(number, frame):
            global armed, inside
            if inside:
                return
            inside = True
            step = next(count)
            file.scalar("handler", step, step)
            if step % 3 == 0:
                file.flush()
            inside = False
            if step % 10 == 0 and armed:
                armed = False
                raise Interruption
        signal.signal(signal.SIGALRM, handler)
        armed = inside = False
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        for step in range(8_000):
            try:
                armed = True
                file.scalar("loss", step, step)
                file.flush()
                armed = False
            except Interruption:
                armed = inside = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(next(count), file=sys.stderr)
    """
    returncode, stderr = finish(tmp_path, code)
    assert returncode == 0, stderr
    (path,) = tmp_path.iterdir()
    assert is_whole(path)
    handled = int(stderr)
    assert handled > 100
    assert steps(tmp_path, "handler") == list(range(handled))
    logged = steps(tmp_path)
    assert logged == sorted(set(logged))  # an interrupted call may not have added its record, but never two
    assert len(logged) > 8_000 - handled // 10 - 2


@posix
def test_a_handler_may_close_in_the_middle_of_anything(tmp_path: Path) -> None:
    code = """
        for round in range(50):
            file = EventFile(sys.argv[1] + f"/{round:02}")
            signal.signal(signal.SIGALRM, lambda number, frame: file.close())
            signal.setitimer(signal.ITIMER_REAL, 0.001 + round * 1e-5)
            added = 0
            while not file.dropped:
                log([added])
                added += 1
                file.flush()
            print(added - file.dropped, file=sys.stderr)
    """
    returncode, stderr = finish(tmp_path, code, "-W", "ignore")
    assert returncode == 0, stderr
    paths = sorted(tmp_path.glob("*/events*"))
    assert [len(points(path)) for path in paths] == [int(line) for line in stderr.split()]
    assert all(map(is_whole, paths))


@posix
def test_a_fork_leaves_the_file_to_the_parent(tmp_path: Path) -> None:
    code = """
        log(range(100))
        child = os.fork()
        if child == 0:
            import warnings
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                log(range(500, 600))
                file.flush(sync=True)
                file.close()
            print(len(caught), caught[0].category.__name__, file.dropped, file=sys.stderr)
            with EventFile(sys.argv[1] + "/child") as own:
                own.scalar("child", 1.0, 1)
                time.sleep(0.7)
                sys.exit(os.stat(own.path).st_size < 60)  # the child has its own tick
        log(range(100, 200))
        sys.exit(os.waitpid(child, 0)[1])
    """
    returncode, stderr = finish(tmp_path, code, "-W", "ignore::DeprecationWarning")
    assert returncode == 0, stderr
    assert stderr == "1 LogWarning 100\n"
    assert steps(tmp_path / "child", "child") == [1]
    shutil.rmtree(tmp_path / "child")
    assert steps(tmp_path) == list(range(200))


@posix
def test_a_fork_while_another_thread_writes_does_not_hang(tmp_path: Path) -> None:
    code = """
        stop = threading.Event()
        def write():
            while not stop.is_set():
                log([0])
                file.flush()
        threads = [threading.Thread(target=write) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(30):
            child = os.fork()
            if child == 0:
                log([1])
                file.flush()
                os._exit(0)
            os.waitpid(child, 0)
        stop.set()
        for thread in threads:
            thread.join()
    """
    returncode, stderr = finish(tmp_path, code, "-W", "ignore")
    assert returncode == 0, stderr
    assert set(steps(tmp_path)) == {0}


@pytest.fixture
def no_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves all writing to the test, which would otherwise sometimes find that the tick has warned before."""
    monkeypatch.setattr(write, "_flush_all", lambda: None)


class Disk:
    """Stands in for os.pwrite and os.ftruncate: fails as told, after writing a part."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plan: Iterator[float | None] = iter(())
        self.truncates = True
        self.pwrite, self.ftruncate = write._pwrite, os.ftruncate
        monkeypatch.setattr(write, "_pwrite", self.write)
        monkeypatch.setattr(os, "ftruncate", self.truncate)

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        part = next(self.plan, None)
        if part is None:
            return self.pwrite(descriptor, data, offset)
        if part == 1.0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.pwrite(descriptor, data[: max(1, int(part * len(data)))], offset)
        self.plan = iter([1.0, *self.plan])  # the rest fails, as it does on a disk that has just become full
        return written

    def truncate(self, descriptor: int, length: int) -> None:
        if not self.truncates:
            raise OSError(errno.EIO, "Input/output error")
        self.ftruncate(descriptor, length)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 30), st.sampled_from([None, None, 0.0, 0.3, 0.99, 1.0]), st.booleans()), max_size=12
    )
)
def test_a_failing_disk_leaves_whole_records_and_a_true_count(
    tmp_path_factory: pytest.TempPathFactory, rounds: list[tuple[int, float | None, bool]]
) -> None:
    """Each round writes some records to a disk that may fail after a part of them, and may not cut off that part."""
    expected: list[int] = []
    step = lost = 0
    torn = False
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.ExitStack() as stack:
        monkeypatch.setattr(write, "_flush_all", lambda: None)
        disk = Disk(monkeypatch)
        file = EventFile(tmp_path_factory.mktemp("run"), clock=lambda: 0.0)
        if any(part is not None for _, part, _ in rounds):
            stack.enter_context(pytest.warns(LogWarning, match="No space left on device"))
        for size, part, disk.truncates in rounds:
            disk.plan = iter([] if part is None else [part])
            batch = range(step, step + size)
            for number in batch:
                file.scalar("loss", number, number)
            file.flush()
            step += size
            if torn and not disk.truncates:
                lost += size
            elif part is None:
                expected += batch
                torn = False
            else:
                lost += size
                torn = not disk.truncates
        disk.truncates = True
        file.close()
    assert [number for _, number, _, _ in points(file.path)] == expected
    assert file.dropped == lost
    assert is_whole(file.path)


@pytest.mark.usefixtures("no_tick")
def test_a_failing_disk_is_one_warning_and_later_writes_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    with EventFile(tmp_path) as file:
        disk.plan = iter([0.5, 1.0, 1.0])
        file.scalar("loss", 1.0, 1)
        with pytest.warns(LogWarning, match="No space left on device"):
            file.flush()
        for step in (2, 3, 4):
            file.scalar("loss", 1.0, step)
            file.flush()  # a second warning would be an error
        assert file.dropped == 3
    assert steps(tmp_path) == [4]


@pytest.mark.usefixtures("no_tick")
def test_a_disk_that_does_not_sync_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, f"Input/output error of {descriptor}")

    with EventFile(tmp_path) as file:
        file.scalar("loss", 1.0, 1)
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.warns(LogWarning, match="Input/output error"):
            file.flush(sync=True)
    assert steps(tmp_path) == [1]


def test_a_full_disk_at_the_start_is_an_error_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Disk(monkeypatch).plan = iter([0.5])
    with pytest.raises(OSError, match="No space left on device"):
        EventFile(tmp_path)
    assert list(tmp_path.iterdir()) == []


@posix
def test_a_limit_on_the_size_of_files_is_survived_and_may_be_lifted(tmp_path: Path) -> None:
    """The kernel writes a part and refuses the rest, without a stand-in."""
    code = """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_001, -1))
        log(range(10_000))
        file.flush()
        assert os.stat(file.path).st_size <= 100_001
        lost = file.dropped
        assert lost > 5_000, lost
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        log(range(10_000, 10_100))
        file.flush()
        assert file.dropped == lost
        print(lost, file=sys.stderr)
    """
    returncode, stderr = finish(tmp_path, code)
    assert returncode == 0, stderr
    assert stderr.count("LogWarning") == 1
    assert "File too large" in stderr
    logged = steps(tmp_path)
    assert logged[-100:] == list(range(10_000, 10_100))
    assert len(logged) + int(stderr.split()[-1]) == 10_100


@pytest.mark.usefixtures("no_tick")
@posix
def test_a_full_tmpfs_is_survived(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        with EventFile(tmp_path, clock=lambda: 0.0) as file:
            with pytest.warns(LogWarning, match="No space left on device"):
                file.scalar_series("loss", range(3_000), range(3_000))
            lost = file.dropped
            assert len(points(file.path)) + lost == 3_000
            assert lost > 1_000
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.usefixtures("no_tick")
def test_a_removed_directory_is_one_warning(tmp_path: Path) -> None:
    with EventFile(tmp_path / "run") as file:
        shutil.rmtree(tmp_path / "run")
        file.scalar("loss", 1.0, 1)
        with pytest.warns(LogWarning, match="deleted"):
            file.flush()
        file.scalar("loss", 2.0, 2)
        file.flush()
        assert file.dropped == 2
    assert not (tmp_path / "run").exists()


def test_warnings_that_are_errors_do_not_stop_the_tick(tmp_path: Path) -> None:
    code = """
        os.unlink(file.path)
        log([1])
        time.sleep(0.7)
        assert file.dropped == 1
        with EventFile(sys.argv[1] + "/other") as other:
            other.scalar("loss", 1.0, 1)
            time.sleep(0.7)
            assert os.stat(other.path).st_size > 60
    """
    returncode, stderr = finish(tmp_path, code, "-W", "error")
    assert returncode == 0, stderr
    assert stderr == ""
