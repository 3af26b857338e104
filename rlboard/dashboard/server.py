"""TensorBoard itself, run in this process: its own program, application and data server, at a port that is free."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import threading
import warnings
from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rlboard.config import printable
from rlboard.errors import UsageError

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

    from rlboard.dashboard.assets import ZipProvider

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it imports what other packages have deprecated
    from tensorboard import assets, default, program

PORTS_TRIED = 100
SAMPLES = {"scalars": 20_000, "images": 10_000}
"""The most points and pictures of one tag that the page gets; by itself TensorBoard picks 1,000 and 10 at random."""


def stock_assets() -> ZipProvider:
    """TensorBoard's own web page."""
    provider: ZipProvider = assets.get_default_assets_zip_provider()
    return provider


def launch(
    logdir: str, host: str, port: int, *, reload: int, page: ZipProvider, guarded: Callable[[Any], WSGIApplication]
) -> int:
    """Starts TensorBoard on `logdir` in a thread of its own; returns the port it listens at.

    Args:
        logdir: an absolute path; it may be empty, or come to be later.
        host: the address to listen at.
        port: the first one to try; 0 for any.
        reload: seconds from the end of one look at the event files to the next.
        page: the web page.
        guarded: what to put in front of TensorBoard's application.

    Raises:
        UsageError: it cannot listen at `host`, or at none of the ports.
    """
    ports: list[int] = []

    def server(app: Any, flags: Namespace) -> Any:
        for candidate in range(port, min(port + PORTS_TRIED, 1 << 16)):
            # werkzeug ends the process where it cannot listen
            with contextlib.suppress(program.TensorBoardServerException, SystemExit):
                listening = program.WerkzeugServer(guarded(app), Namespace(**{**vars(flags), "port": candidate}))
                ports.append(listening.server_port)
                return listening
        raise UsageError(f"--port {port} cannot be had, nor any of the {PORTS_TRIED} from there on: give another")

    _check_host(host)
    _speak_briefly()
    tensorboard = program.TensorBoard(default.get_plugins(), page, server)
    tensorboard.configure(logdir=logdir, host=host, reload_interval=reload, samples_per_plugin=SAMPLES)
    with contextlib.redirect_stderr(io.StringIO()):  # the data server is experimental, it says there
        tensorboard.launch()
    return ports[0]


def _check_host(host: str) -> None:
    try:
        family, kind, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)
    except (OSError, UnicodeError):
        where = f"--host {printable(host)}"
        raise UsageError(f"{where} is no address of this machine: leave it out, or give 0.0.0.0 for all") from None


def _speak_briefly() -> None:
    """Makes one line of each error that TensorBoard or a thread of it would tell with a traceback."""
    # Of a file that it cannot read, the data server says so at every look.
    os.environ.setdefault("RUST_LOG", "off")

    class OneLine(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            error = f": {printable(record.exc_info[1])}" if record.exc_info else ""
            return f"rlboard: TensorBoard: {printable(record.getMessage(), 200)}{error}"

    handler = logging.StreamHandler()
    handler.setFormatter(OneLine())
    logging.basicConfig(handlers=[handler], level=logging.ERROR, force=True)
    threading.excepthook = lambda failed: logging.error("%s: %s", failed.exc_type.__name__, failed.exc_value)
