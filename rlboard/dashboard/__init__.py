"""`rlboard dashboard`: real TensorBoard on a log directory, reloading by itself, safe on a shared machine."""

from __future__ import annotations

import contextlib
import secrets
import signal
import tempfile
import time
import warnings
import webbrowser
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

from rlboard.config import printable
from rlboard.errors import DataError, StorageError, UsageError

if TYPE_CHECKING:
    from types import FrameType

    from rlboard.dashboard.selection import Selection

TUNNEL = "ssh -L {port}:localhost:{port} USER@{host}"
LATER = "runs that start later appear by themselves"
MOST_RUNS_DRAWN = 500
"""TensorBoard's page selects the runs by itself up to this many."""


def serve(
    logdir: Path,
    *,
    port: int,
    reload: int,
    smoothing: float,
    dark: bool | None,
    last: int | None,
    text: str,
    host: str,
    expose: bool,
    allowed: Collection[str],
    browser: bool,
) -> int:
    """Serves TensorBoard on `logdir` until a signal ends it; the options are those of the command.

    Raises:
        UsageError: options that cannot be used, or not together; `logdir` is a file.
        DataError: a run's projector configuration names a file outside `logdir`.
        StorageError: `logdir` cannot be read, or no links to the chosen runs can be made.
    """
    from rlboard.dashboard import guard, server
    from rlboard.dashboard.assets import preset_page
    from rlboard.dashboard.selection import Selection

    _check_exposure(host, port, expose, browser)
    _look(logdir, text, last)
    token = secrets.token_urlsafe(32) if expose else ""
    hosts = guard.allowed_hosts(host, allowed, exposed=expose)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_signals())
        shown, selection = logdir.absolute(), None
        if text or last:
            try:
                shown = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rlboard-dashboard-")))
                selection = Selection(logdir, shown, text, last)
                selection.refresh()
            except OSError as error:
                raise StorageError(f"--last and --filter need a directory of links: {error}") from None
        listening = server.launch(
            str(shown),
            host,
            port,
            reload=max(1, reload // 2),  # so that a point is on the page within two of its periods
            page=preset_page(server.stock_assets(), reload=reload, smoothing=smoothing, dark=dark),
            guarded=lambda app: guard.Guard(app, logdir=shown, root=logdir, hosts=hosts, token=token),
        )
        if port and listening != port:
            _say(f"port {port} is busy, took {listening}")
        address = _address(host, listening)
        if expose:
            tunnel = TUNNEL.format(port=listening, host=guard.machine_names()[0])
            _say("exposed: whoever has this address and reaches this machine reads the logs, and nothing is encrypted")
            _say(f"usually meant instead: rlboard dashboard without --host, and on your own machine {tunnel}")
            address += f"?token={token}"
        typer.echo(f"dashboard: {address} (Ctrl-C ends it)")
        if browser and not webbrowser.open(address):
            _say("--open found no browser: open the address yourself")
        _follow(selection, reload)


def _check_exposure(host: str, port: int, expose: bool, browser: bool) -> None:
    from rlboard.dashboard.guard import is_loopback, machine_names

    if not host:
        raise UsageError("--host is empty: give an address, or leave it out")
    if expose and is_loopback(host):
        raise UsageError(f"--expose goes with a --host that others reach, not {printable(host)}: try --host 0.0.0.0")
    if not expose and not is_loopback(host):
        tunnel = TUNNEL.format(port=port or 6006, host=machine_names()[0])
        raise UsageError(
            f"--host {printable(host)} shows the logs to everyone on the network: leave it out, and on your own "
            f"machine run {tunnel}; or add --expose"
        )
    if expose and browser:
        raise UsageError("--open would show the token to this machine's other users: open the printed address yourself")


def _look(logdir: Path, text: str, last: int | None) -> None:
    """Says what is worth knowing before; raises what `serve` does about `logdir`."""
    from rlboard.dashboard.guard import outside
    from rlboard.dashboard.selection import choose
    from rlboard.runs.find import check_root, find_runs

    where = printable(logdir, 200)
    try:
        existing = next(path for path in (logdir, *logdir.absolute().parents) if path.exists())
    except OSError as error:
        raise StorageError(f"--logdir {where} cannot be read: {error.strerror}") from None
    check_root(existing)
    if existing != logdir:
        _say(f"{where} is not there yet: {LATER}")
        return
    runs = [run for run in find_runs(logdir) if not run.problem]
    for directory in {logdir, *(run.directory for run in runs)}:
        if found := outside(directory, logdir):
            raise DataError(found)
    if not runs:
        _say(f"{where} has no runs yet: {LATER}")
    elif not choose(runs, text, last):
        _say(f"no run is named like --filter {printable(text)} yet: {LATER}")
    elif len(runs) > MOST_RUNS_DRAWN and not (text or last):
        _say(f"{len(runs):,} runs: of more than {MOST_RUNS_DRAWN} none is drawn until you select it; try --last 20")


def _address(host: str, port: int) -> str:
    from rlboard.dashboard.guard import is_every_address, machine_names

    name = machine_names()[0] if is_every_address(host) else host
    return f"http://[{name}]:{port}/" if ":" in name else f"http://{name}:{port}/"


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Lets SIGTERM and a closed terminal end the process as Ctrl-C does, so that nothing is left behind."""

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    taken = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]  # not those nohup ignores
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _follow(selection: Selection | None, reload: int) -> NoReturn:
    """Waits for a signal, and meanwhile keeps the selection up to date."""
    took = 0.0
    while True:
        time.sleep(max(reload, 20 * took))  # a twentieth of a core at most
        if selection:
            started = time.perf_counter()
            try:
                selection.refresh()
            except OSError as error:
                warnings.warn(f"the choice of runs is no longer kept up to date: {error}", stacklevel=1)
            took = time.perf_counter() - started


def _say(text: str) -> None:
    typer.echo(f"rlboard: {text}", err=True)
