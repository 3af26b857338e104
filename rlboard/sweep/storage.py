"""Where a study is kept: a journal file, an SQLite file, or PostgreSQL for machines that share no disk."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rlboard.config import printable
from rlboard.errors import StorageError, UsageError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

INSTALL = "pip install 'rlboard[sweep]'"
CONNECT_SECONDS = 10
LOCKED_SECONDS = 60
"""How long one process waits for another that writes to the same SQLite file."""
ATTEMPTS = 5
JOURNAL = ("journal:///", ".log", ".journal")


def check_installed() -> None:
    """Raises UsageError where Optuna is missing."""
    try:
        import optuna
    except ImportError:
        raise UsageError(f"rlboard sweep needs Optuna: {INSTALL}") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def hidden(address: str) -> str:
    """The address of a storage without its password."""
    address = re.sub(r"(?i)([?&;](?:ssl)?password=)[^&;]*", r"\1***", address)
    scheme, slashes, rest = address.partition("://")
    authority, at, host = rest.rpartition("@")
    user, colon, _ = authority.partition(":")
    return f"{scheme}://{user}{':***' if colon else ''}@{host}" if slashes and at else address


def journal_path(address: str) -> Path | None:
    """The journal file that an address names; None for a database."""
    if address.startswith(JOURNAL[0]):
        return Path(address.removeprefix(JOURNAL[0][:-1]))
    return Path(address) if "://" not in address and address.endswith(JOURNAL[1:]) else None


def sqlite_path(address: str) -> Path | None:
    """The file of an SQLite database; None for anything else."""
    return Path(address.partition(":///")[2]) if address.startswith("sqlite:///") else None


def open_storage(address: str) -> BaseStorage:
    """The storage at `address`: `postgresql://…`, `sqlite:///FILE`, `journal:///FILE` or a path that ends in .log.

    Raises:
        UsageError: it is no such address, or its driver is not installed.
        StorageError: it does not answer within ten seconds, or cannot be written.
    """
    if path := journal_path(address):
        from optuna.storages.journal import JournalFileBackend, JournalStorage

        with answering(address):
            path.parent.mkdir(parents=True, exist_ok=True)
            return JournalStorage(JournalFileBackend(str(path)))
    return _open_database(address)


def _open_database(address: str) -> BaseStorage:
    where = f"--storage {printable(hidden(address), 200)}"
    url = re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", address)
    if not url.startswith(("postgresql+", "sqlite:///")):
        known = "postgresql://USER@HOST/DATABASE, sqlite:///FILE, journal:///FILE or FILE.log"
        raise UsageError(f"{where} is no storage that is known: give {known}")
    try:
        from optuna.storages import RDBStorage
        from sqlalchemy.exc import ArgumentError, IntegrityError, ProgrammingError
    except ImportError:
        raise UsageError(f"{where} needs SQLAlchemy: {INSTALL}") from None
    connect = {"timeout": LOCKED_SECONDS} if url.startswith("sqlite") else {"connect_timeout": CONNECT_SECONDS}
    with answering(address):
        if path := sqlite_path(url):
            path.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(ATTEMPTS):
            try:
                return RDBStorage(url, engine_kwargs={"connect_args": connect, "pool_pre_ping": True})
            except (IntegrityError, ProgrammingError):  # another process makes the tables at the same moment
                if attempt == ATTEMPTS - 1:
                    raise
            except ImportError:
                raise UsageError(f"{where} needs its driver: {INSTALL}") from None
            except (ArgumentError, ValueError):
                raise UsageError(f"{where} is no address: give postgresql://USER@HOST:PORT/DATABASE") from None
    raise AssertionError


@contextlib.contextmanager
def answering(address: str) -> Iterator[None]:
    """Makes a StorageError, which names no password, of what Optuna raises when its storage fails."""
    from optuna.exceptions import StorageInternalError

    try:
        yield
    except StorageInternalError as error:
        raise _failed(address, error.__cause__ or error) from None
    except OSError as error:
        raise _failed(address, error) from None
    except Exception as error:
        if type(error).__module__.startswith(("sqlalchemy", "psycopg")):
            raise _failed(address, getattr(error, "orig", None) or error) from None
        raise


def _failed(address: str, error: BaseException) -> StorageError:
    reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
    where = printable(hidden(address), 200)
    return StorageError(f"--storage {where} does not answer: {printable(reason, 200)}: start it, or give another")
