"""A PostgreSQL server of their own for tests: from the system's packages, in a temporary directory, on a free port."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

USER = "tester"


@contextlib.contextmanager
def postgresql() -> Iterator[str]:
    """Yields `postgresql://USER@127.0.0.1:PORT/postgres`, which asks for no password; skips where there is no server.

    The server refuses to run as root, so that root runs it as the user `postgres` of Debian's packages.
    """
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    control = shutil.which("pg_ctl") or next(map(str, reversed(programs)), None)
    as_another = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    if control is None or (as_another and not shutil.which("runuser")):
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    directory = Path(tempfile.mkdtemp(prefix="rlboard-postgresql-"))
    directory.chmod(0o777)
    data = directory / "data"

    def run(*words: str) -> None:
        subprocess.run([*as_another, *words], cwd=directory, check=True, stdout=subprocess.DEVNULL, timeout=60)

    try:
        run(str(Path(control).with_name("initdb")), "-D", str(data), "-U", USER, "--auth=trust", "--no-sync")
        options = f"-p {port} -k {directory} -c listen_addresses=127.0.0.1 -c fsync=off"
        run(control, "-D", str(data), "-w", "-o", options, "-l", str(directory / "log"), "start")
        try:
            yield f"postgresql://{USER}@127.0.0.1:{port}/postgres"
        finally:
            run(control, "-D", str(data), "-m", "immediate", "stop")
    finally:
        shutil.rmtree(directory, ignore_errors=True)
