"""What the commands on runs print alike: complaints, tables, ages, sizes, and command lines to copy."""

from __future__ import annotations

import os
import shlex
from collections.abc import Container, Sequence
from typing import Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlboard.config import printable


class Complaints:
    """What could not be done, said at once on standard error; `exit_code` is the largest of their codes, 0 for none."""

    exit_code = 0

    def add(self, message: str, exit_code: int) -> None:
        typer.echo(f"rlboard: {message}", err=True)
        self.exit_code = max(self.exit_code, exit_code)


def print_rows(rows: Sequence[Sequence[str]], right: Container[str], terminal: Console) -> None:
    """Prints a table whose first row is its header, if there are others; in a pipe, lines of tabs."""
    if len(rows) == 1:
        return
    if not terminal.is_terminal:
        terminal.file.writelines("\t".join(row) + "\n" for row in rows)
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for number, column in enumerate(rows[0]):
        justify: Literal["left", "right"] = "right" if column in right else "left"
        table.add_column(column, justify=justify, no_wrap=number > 0, overflow="fold")
    for row in rows[1:]:
        table.add_row(*map(escape, row))
    terminal.print(table)


def reason_of(error: Exception) -> str:
    """What an error says, as one line."""
    return getattr(error, "strerror", None) or printable(error, 200)


def plural(count: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def age(seconds: float, now: float) -> str:
    """How long before `now` a time was, both in seconds since 1970: `5 s`, `12 min`, `3 h`, `40 d`."""
    past = max(0.0, now - seconds)
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if past >= length:
            return f"{past / length:.0f} {unit}"
    return f"{past:.0f} s"


def byte_size(count: float) -> str:
    """A number of bytes: `812 B`, `4.2 kB`, `1.3 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def command_line(*arguments: str) -> str:
    """A command as a shell takes it, on one line whatever is in it."""
    return " ".join(shlex.quote(each) if each.isprintable() else _escaped(each) for each in arguments)


def _escaped(argument: str) -> str:
    """An argument with its unprintable characters as bash, zsh and POSIX shells of 2024 write them."""
    plain = set(range(0x20, 0x7F)) - set(b"'\\")
    return "$'" + "".join(chr(byte) if byte in plain else f"\\{byte:03o}" for byte in os.fsencode(argument)) + "'"
