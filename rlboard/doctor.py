"""`rlboard doctor`: what this machine and installation lack, and a line how to mend each finding.

Every check returns a Finding and is independent of the others. What may crash, hang or hold on to memory when it is
broken (torch, numba, TensorBoard) is tried in a Python of its own, so that a broken installation is a finding too.
"""

from __future__ import annotations

import functools
import http.client
import importlib.machinery
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import rlboard
from rlboard.config import printable
from rlboard.errors import OutOfMemoryError, StorageError, UsageError
from rlboard.registry import ROOT, TRACKS

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from rich.console import Console

Facts = dict[str, Any]

SMALLEST_FREE_SPACE = 1 << 30  # bytes: a data set, a few checkpoints and embeddings
SMALLEST_MEMORY = 1 << 30  # bytes: what torch and a small run take
SLOW_DISK = 10e6  # bytes per second: below it, pictures and checkpoints are waited for
FEW_FILES = 1024  # TensorBoard keeps a file open for each run
TRIAL_BYTES = 32 << 20  # written to measure the disk, and not much longer than TRIAL_SECONDS
TRIAL_SECONDS = 0.5
CHILD_SECONDS = 120.0  # numba compiles in here, and a cold disk reads a gigabyte of torch
ANSWER_SECONDS = 2.0  # that a program on the port has

CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
TENSORBOARDS = ("tensorboard", "tb-nightly", "tensorflow-tensorboard")  # all install the package `tensorboard`
PIP = "python -m pip" if importlib.util.find_spec("pip") else "uv pip"
MEND_TORCH = (
    f"{PIP} uninstall torch torchvision, then install both with the one line that pytorch.org gives for this machine"
)


@dataclass(frozen=True)
class Finding:
    """What a check found. `mend` is empty where nothing is wrong; `exit_code` is 0 where rlboard works all the same."""

    found: str
    mend: str = ""
    exit_code: int = 0

    @property
    def state(self) -> str:
        """`ok`, `note` or `problem`."""
        return "problem" if self.exit_code else "note" if self.mend else "ok"


def diagnose(logdir: Path, port: int) -> Iterator[tuple[str, Finding]]:
    """The name and the finding of every check, in the order in which they are best mended. Raises nothing."""
    torch = functools.cache(lambda: in_child(torch_facts))
    checks: dict[str, Callable[[], Finding]] = {
        "Python": python,
        "packages": packages,
        "torch": lambda: one_build(torch()),
        "devices": lambda: devices(torch()),
        "TensorBoard": lambda: tensorboard(in_child(tensorboard_facts)),
        "numba": lambda: numba(in_child(numba_facts)),
        "other packages": namesakes,
        "memory": memory,
        "log directory": lambda: log_directory(logdir),
        "disk space": lambda: disk_space(logdir),
        "open files": open_files,
        "port": lambda: port_is_free(port),
    }
    for name, check in checks.items():
        try:
            yield name, check()
        except Exception as error:  # noqa: BLE001 - the last thing that may break on a broken machine
            reason = printable(f"{type(error).__name__}: {error}", 300)
            yield name, Finding(f"could not be checked: {reason}", "mend the other findings first, then look again")


def exit_code(findings: dict[str, Finding]) -> int:
    """That of the first problem: 2 for the installation, 5 for the log directory and its disk, 6 for memory, else 0."""
    return next((finding.exit_code for finding in findings.values() if finding.exit_code), 0)


def as_json(findings: dict[str, Finding]) -> str:
    """A list of objects with `check`, `state`, `found` and `mend`."""
    rows = [
        {"check": name, "state": finding.state, "found": finding.found, "mend": finding.mend}
        for name, finding in findings.items()
    ]
    return json.dumps(rows, indent=2)


def show(findings: dict[str, Finding], console: Console) -> None:
    """Prints a row a check, how to mend it below what was found, and the sum at the end."""
    from rich.table import Table
    from rich.text import Text

    marks = {"ok": ("✓", "green"), "note": ("!", "yellow"), "problem": ("✗", "bold red")}
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, finding in findings.items():
        mark, style = marks[finding.state]
        word = finding.state if console.options.ascii_only else f"{mark} {finding.state}"
        mend = f"\nmend: {finding.mend}" if finding.mend else ""
        table.add_row(Text(word, style), Text(name), Text.assemble(finding.found, (mend, style)))
    console.print(table)
    states = [finding.state for finding in findings.values()]
    counts = [(states.count(state), state) for state in ("problem", "note") if state in states]
    console.print(", ".join(f"{count} {state}{'s' * (count > 1)}" for count, state in counts) or "nothing to mend")


# The installation.


class Distribution(NamedTuple):
    """A package as pip installed it."""

    name: str
    version: str
    directory: str


def python() -> Finding:
    """Whether this Python is one that rlboard takes."""
    from packaging.specifiers import SpecifierSet

    wanted = _project()[0]
    found = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    if SpecifierSet(wanted).contains(platform.python_version(), prereleases=True):
        return Finding(found)
    return Finding(found, f"install Python {wanted} and make a virtual environment with it", UsageError.exit_code)


def packages() -> Finding:
    """Whether all that rlboard needs, and all that this needs in turn, is there, new enough, and there once."""
    direct = _needs(_project()[1], {""})
    waiting, seen = [("rlboard", need) for need in direct], set[tuple[str, frozenset[str]]]()
    unmet: dict[str, tuple[str, str]] = {}
    twice: dict[str, str] = {}
    while waiting:
        asker, wanted = waiting.pop(0)
        name, extras = wanted.name, frozenset(wanted.extras or {""})
        installed = installed_as(name)
        version = installed[0].version if installed else ""
        if not version or not wanted.specifier.contains(version, prereleases=True):
            need = f"{name}{wanted.specifier}"
            unmet.setdefault(need, (name, f"{asker} needs {need}, but {version or 'none'} is installed"))
        elif (name, extras) not in seen:
            seen.add((name, extras))
            if lie_over_each_other(installed):
                twice[name] = " and ".join(f"{each.name} {each.version}" for each in installed)
            waiting += [(name, need) for need in _needs(metadata.requires(name), extras)]
    if not unmet and not twice:
        versions = ", ".join(f"{each.name} {installed_as(each.name)[0].version}" for each in direct)
        return Finding(f"rlboard {rlboard.__version__} with {versions}")
    found = [*(text for _, text in unmet.values()), *(f"installed over each other: {both}" for both in twice.values())]
    mend = [f"{PIP} uninstall {name}, until none is left, then {PIP} install {name}" for name in twice]
    if plain := [f'"{need}"' for need, (name, _) in unmet.items() if name not in ("torch", "torchvision")]:
        mend.append(f"{PIP} install {' '.join(plain)}")
    if len(plain) < len(unmet):
        mend.append(MEND_TORCH)
    return Finding("; ".join(found), "; ".join(mend), UsageError.exit_code)


def _needs(lines: Iterable[str] | None, extras: Collection[str]) -> list[Requirement]:
    """What the lines of a package's metadata ask for on this system, if it is to have these extras."""
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in lines or ()]
    return [
        each for each in wanted if not each.marker or any(each.marker.evaluate({"extra": extra}) for extra in extras)
    ]


def one_build(facts: Facts) -> Finding:
    """Whether torch and torchvision can be imported and are of one build: of those of several they load no operator."""
    if "devices" not in facts:
        return Finding(f"torch cannot be used: {facts['error']}", MEND_TORCH, UsageError.exit_code)
    torch, cuda = facts["torch"]
    if "torchvision" not in facts:
        there = "".join(f" {each.version}" for each in installed_as("torchvision")[:1])
        found = f"torch {torch} works, but torchvision{there} does not: {facts['error']}"
        return Finding(found, MEND_TORCH, UsageError.exit_code)
    torchvision, its_cuda = facts["torchvision"]
    builds = {version.partition("+")[2] for version in (torch, torchvision)} - {""}
    found = f"torch {torch} and torchvision {torchvision}"
    if cuda != its_cuda or len(builds) > 1:
        return Finding(f"{found} are of different builds", MEND_TORCH, UsageError.exit_code)
    return Finding(f"{found}, both for {f'CUDA {cuda}' if cuda else 'no CUDA'}; torchvision's operators work")


def devices(facts: Facts) -> Finding:
    """What can be trained on: cores of the processor, and the GPUs that torch sees and that really compute."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = [f"CPU, {cores} of {os.cpu_count()} cores usable"]
    if "devices" not in facts:
        return Finding(found[0] + "; GPUs unknown, as torch does not work", "mend torch first")
    for device, what, error in facts["devices"]:
        found.append(f"{device} {what}" + (f", which fails: {error}" if error else ""))
    if any(error for _, _, error in facts["devices"]):
        mend = f"use --device cpu, or {MEND_TORCH}, and its driver"
        return Finding("; ".join(found), mend, UsageError.exit_code)
    if not facts["devices"] and Path("/dev/nvidia0").exists():
        found.append(f"an NVIDIA GPU that torch does not see{''.join(f': {each}' for each in facts['warnings'])}")
        cuda = facts["torch"][1]
        mend = f"update the NVIDIA driver to one for CUDA {cuda}" if cuda else f"to use it, {MEND_TORCH}"
        return Finding("; ".join(found), mend)
    return Finding("; ".join(found))


def tensorboard(facts: Facts) -> Finding:
    """Whether there is one TensorBoard, which can be imported, and its data server, which loads many runs fast."""
    installed = installed_as(*TENSORBOARDS)
    names = {each.name for each in installed}
    if len(names) > 1 or lie_over_each_other(installed):
        found = " and ".join(f"{each.name} {each.version}" for each in installed) + " are installed over each other"
        mend = f"{PIP} uninstall {' '.join(sorted(names))}, until none is left, then {PIP} install tensorboard"
        return Finding(found, mend, UsageError.exit_code)
    if "tensorboard" not in facts:
        mend = f"{PIP} install --force-reinstall tensorboard"
        return Finding(f"tensorboard cannot be imported: {facts['error']}", mend, UsageError.exit_code)
    found = f"tensorboard {facts['tensorboard']}"
    if server := facts.get("server"):
        return Finding(f"{found} with data server {server}")
    return Finding(
        f"{found} loads many runs slowly, without its data server: {facts.get('error', 'none for this system')}",
        f"{PIP} install --force-reinstall tensorboard-data-server, or look at few runs at a time",
    )


def numba(facts: Facts) -> Finding:
    """Whether numba compiles here and finds a place for its cache; without it rlboard works, but slowly."""
    if "cache" in facts:
        return Finding(f"numba {facts['numba']} compiles; its cache is {facts['cache']}")
    reason = facts["error"]
    mend = f"{PIP} install --upgrade numba"
    if "NUMBA_DISABLE_JIT" in reason:
        mend = "unset NUMBA_DISABLE_JIT"
    elif "cannot cache" in reason or "Errno" in reason:
        mend = "set NUMBA_CACHE_DIR to a directory that you may write"
    return Finding(f"numba cannot be used, so that rlboard works, but slowly: {reason}", mend)


def namesakes() -> Finding:
    """Whether other packages are installed that are called as ours are."""
    others = []
    for track in TRACKS:
        for entry in sys.path:
            spec = importlib.machinery.PathFinder.find_spec(track.package, [entry])
            if spec and spec.origin and not Path(spec.origin).resolve().is_relative_to(track.folder.resolve()):
                others.append(f"{track.package} in {printable(Path(spec.origin).parent, 200)}")
    if others:
        return Finding("; ".join(dict.fromkeys(others)), "nothing: rlboard puts its own first, they do no harm")
    return Finding(f"none is called {' or '.join(track.package for track in TRACKS)}, as rlboard's own are")


def installed_as(*names: str) -> list[Distribution]:
    """What is installed under these names, in the order of `sys.path`: the first is the one that is used."""
    found = (distribution for name in names for distribution in metadata.distributions(name=name))
    each = (
        Distribution(str(one.metadata["Name"]), one.version or "", str(Path(str(one.locate_file(""))).resolve()))
        for one in found
    )
    return list(dict.fromkeys(each))


def lie_over_each_other(installed: list[Distribution]) -> bool:
    """Whether two of them are in one directory; in different ones the first hides the others, which is legitimate."""
    return len({each.directory for each in installed}) < len(installed)


def _project() -> tuple[str, list[str]]:
    """The Python and the packages that rlboard asks for: of its sources where it runs from them, else as installed."""
    try:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        if project["name"] == "rlboard":
            return project["requires-python"], project["dependencies"]
    except (OSError, KeyError):
        pass
    own = metadata.distribution("rlboard")
    return own.metadata["Requires-Python"], own.requires or []


# In a Python of their own.


def in_child(facts: Callable[[], Iterator[Facts]]) -> Facts:
    """What `facts` yields in another Python that finds the same packages, and `error` if that failed, in one line."""
    program = (
        "import json; from rlboard import doctor\n"
        f"for facts in doctor.{facts.__name__}(): print(json.dumps(facts), flush=True)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        answer = subprocess.run(
            [sys.executable, "-P", "-c", program],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=CHILD_SECONDS,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {CHILD_SECONDS:g} s"}
    except OSError as error:
        return {"error": f"Python cannot be started: {error}"}
    collected: Facts = {}
    for line in answer.stdout.splitlines():
        if line.startswith('{"'):  # all else is what packages print when they are imported
            collected |= json.loads(line)
    if answer.returncode:
        lines = re.findall(r"^\w[\w.]*(?:Error|Exception)\b.*", answer.stderr, re.MULTILINE)
        ended = f"exit code {answer.returncode}"
        if answer.returncode < 0:
            ended = f"Python was killed by {signal.Signals(-answer.returncode).name}"
        collected["error"] = printable([ended, *lines][-1], 300)
    return collected


def torch_facts() -> Iterator[Facts]:
    """The versions of torch and torchvision with the CUDA, or None, that they were built for; and the GPUs."""
    import torch

    yield {"torch": [torch.__version__, torch.version.cuda]}
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        names += ["mps"] if torch.backends.mps.is_available() else []
        for name in names:
            what = error = ""
            try:
                if name != "mps":
                    free, total = torch.cuda.mem_get_info(name)
                    what = f"{torch.cuda.get_device_name(name)}, {gigabytes(free)} of {gigabytes(total)} free"
                (torch.ones(1, device=name) + 1).item()
            except Exception as failure:  # noqa: BLE001 - one broken GPU of eight is a finding
                error = printable(failure, 200)
            found.append([name, what, error])
    yield {"devices": found, "warnings": [printable(warning.message, 200) for warning in caught]}

    import torchvision
    from torchvision.ops import nms

    nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    cuda = getattr(torchvision.version, "cuda", None)  # 13020 is 13.2
    yield {"torchvision": [torchvision.__version__, cuda and f"{cuda // 1000}.{cuda // 10 % 100}"]}


def tensorboard_facts() -> Iterator[Facts]:
    """TensorBoard's version, and that of its data server where it has one that runs."""
    import tensorboard.compat.proto.event_pb2
    import tensorboard.program
    import tensorboard.version

    yield {"tensorboard": tensorboard.version.VERSION}
    import tensorboard_data_server

    if binary := tensorboard_data_server.server_binary():
        subprocess.run([binary, "--version"], check=True, capture_output=True)
        yield {"server": tensorboard_data_server.__version__}


def numba_facts() -> Iterator[Facts]:
    """Numba's version, and the place of its cache once it has compiled a part of what reads event files."""
    import numba

    from rlboard.eventfile import scan

    yield {"numba": numba.__version__}
    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
        raise RuntimeError("it is switched off by NUMBA_DISABLE_JIT")
    compiled = numba.njit("int64(int64)", cache=True)(scan.int32_of)
    if compiled(2**32 - 1) != -1:
        raise ArithmeticError("it computes wrong numbers")
    yield {"cache": compiled.stats.cache_path}


# The machine.


def memory() -> Finding:
    """Whether there is memory for a run: what Linux can hand out, at most what the container may have."""
    known = [int(text) for file in CONTAINER_LIMITS if (text := _text(file).strip()).isdigit()]
    if match := re.search(r"^MemAvailable:\s+(\d+) kB$", _text("/proc/meminfo"), re.MULTILINE):
        known.append(1024 * int(match[1]))
    if not known:
        return Finding("how much is free is not told by this system")
    found = f"{gigabytes(min(known))} available"
    if min(known) >= SMALLEST_MEMORY:
        return Finding(found)
    mend = f"end other programs: a run takes about {gigabytes(SMALLEST_MEMORY)}"
    return Finding(found, mend, OutOfMemoryError.exit_code)


def log_directory(logdir: Path) -> Finding:
    """Whether runs can be written to `logdir`, and how fast: some megabytes are, and are gone again."""
    place = nearest(logdir)
    name = printable(logdir, 200)
    where = name if place == logdir else f"{name} (not there yet; measured in {printable(place.absolute(), 200)})"
    if not place.is_dir():
        mend = "give another --logdir, or move that file away"
        return Finding(f"{name}: {printable(place, 200)} is no directory", mend, StorageError.exit_code)
    try:
        speed = write_speed(place)
    except OSError as error:
        mend = f"make {printable(place, 200)} writable for you, or give another --logdir"
        return Finding(f"{where}: cannot be written: {error.strerror or error}", mend, StorageError.exit_code)
    found = f"{where}: writable, {speed / 1e6:,.0f} MB/s"
    return Finding(found, "log to a directory on a local disk" if speed < SLOW_DISK else "")


def write_speed(directory: Path) -> float:
    """Bytes per second that reach the disk of `directory`. Raises OSError if nothing can be written."""
    data = os.urandom(TRIAL_BYTES // 2)  # file systems that compress shall not win
    written, size = 0, 1 << 18
    start = time.perf_counter()
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:  # has no name: nothing of it can stay behind
        while written < TRIAL_BYTES and time.perf_counter() - start < TRIAL_SECONDS:
            written += file.write(memoryview(data)[:size])
            os.fsync(file.fileno())
            size = min(2 * size, len(data))
        return written / (time.perf_counter() - start)


def disk_space(logdir: Path) -> Finding:
    """Whether the disk of `logdir` has space for a run."""
    usage = shutil.disk_usage(nearest(logdir))
    found = f"{gigabytes(usage.free)} of {gigabytes(usage.total)} free"
    if usage.free >= SMALLEST_FREE_SPACE:
        return Finding(found)
    return Finding(found, "free some space, or give a --logdir on another disk", StorageError.exit_code)


def open_files() -> Finding:
    """Whether TensorBoard may open as many files as there may be runs."""
    if sys.platform == "win32":
        return Finding("this system has no limit on them")
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit >= FEW_FILES or limit == resource.RLIM_INFINITY:
        return Finding(f"up to {limit:,} at once" if limit != resource.RLIM_INFINITY else "without limit")
    return Finding(f"only {limit:,} at once: a dashboard opens one for each run", "ulimit -n 4096")


def port_is_free(port: int) -> Finding:
    """Whether a dashboard can be served on `port` of this machine, else who is there."""
    with socket.socket() as server:
        if os.name == "posix":  # as servers do, so that a port that was just left is free
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("127.0.0.1", port))
        except PermissionError:
            return Finding(f"{port} may not be used by you", "take one from 1024 on: --port 6006")
        except OSError:
            return Finding(
                f"{port} is taken by {_who_is_on(port)}",
                "give another --port; rlboard dashboard takes the next free one",
            )
    return Finding(f"{port} is free")


def _who_is_on(port: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS)
    try:
        connection.request("GET", "/data/environment")
        answer = connection.getresponse()
        name = answer.headers.get("Server", "no name")
        try:
            return f"a TensorBoard that shows {printable(json.loads(answer.read(1 << 16))['data_location'], 200)}"
        except (ValueError, KeyError, TypeError):
            return f"a web server ({printable(name)})"
    except (OSError, http.client.HTTPException):
        return "a program that is no web server"
    finally:
        connection.close()


def nearest(path: Path) -> Path:
    """`path`, or the nearest of the directories above it that is there."""
    return next(each for each in (path, *path.absolute().parents) if os.path.lexists(each))


def gigabytes(size: int) -> str:
    """`3.5 GB`, of 2**30 bytes."""
    return f"{size / 2**30:,.1f} GB"


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
