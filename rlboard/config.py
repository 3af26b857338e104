"""One hyperparameter, one line.

    @dataclass(frozen=True)
    class Config:
        episodes: int = option(10_000, "episodes to train", min=1, smoke=40)

From this line follow the command-line option `--episodes`, its help, default and range, the row in the HParams and
Text tabs, and the value of a smoke run. Fields are `int`, `float`, `str` or `bool`, and the arguments of `option`
are literals, so that `rlboard.registry` can read them without importing the file.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
from dataclasses import dataclass, field
from typing import Any, cast

from rlboard.errors import UsageError

Value = int | float | str | bool

LARGEST_INTEGER = 2**63 - 1  # steps and seeds are 64-bit wherever they are written


@dataclass(frozen=True)
class Option:
    """Everything there is to know about one hyperparameter; see `option` for the fields."""

    name: str
    type: type[Value]
    default: Value
    help: str
    min: float | None = None
    max: float | None = None
    above: float | None = None
    choices: tuple[str, ...] = ()
    alias: str = ""
    smoke: Value | None = None
    check: str = ""
    argument: bool = False
    required: bool = True
    resume: bool = False

    @property
    def flag(self) -> str:
        """The option as it is typed: `learning_rate` is `--learning-rate`, the argument `run` is `RUN` in all texts."""
        return self.name.upper() if self.argument else "--" + self.name.replace("_", "-")

    def spelled(self, value: Value) -> str:
        """The option and its value as they are typed."""
        if self.argument:
            return str(value)
        if self.type is bool:
            return self.flag if value else f"--no-{self.flag[2:]}"
        return f"{self.flag}={value}"

    @property
    def range(self) -> str:
        """The accepted values in words, empty where every value is: `1 or more`."""
        if self.choices:
            return " or ".join(filter(None, self.choices))
        bounds = []
        if self.above is not None:
            bounds.append(f"above {self.above:g}")
        if self.min is not None and self.max is not None:
            bounds.append(f"{self.min:g} to {self.max:g}")
        elif self.min is not None:
            bounds.append(f"{self.min:g} or more")
        elif self.max is not None:
            bounds.append(f"{self.max:g} or less")
        return ", ".join(bounds)

    def parse(self, text: str) -> Value:
        """The value that `text` stands for.

        Raises:
            UsageError: it is not a value of this option; the message names the option and the way out.
        """
        if self.type is int:
            value: Value = self._parse_integer(text)
        elif self.type is float:
            value = self._parse_float(text)
        elif self.type is bool:
            words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
            if text.lower() not in words:
                raise self._refusal(text, "is neither true nor false")
            value = words[text.lower()]
        else:
            value = text
        self.validate(value)
        return value

    def validate(self, value: Value) -> None:
        """Raises UsageError where `value` is outside the option's range or fails its check."""
        if isinstance(value, str):
            if self.choices and value not in self.choices:
                raise self._refusal(value, f"is not {self.range or 'known'}")
        elif not isinstance(value, bool) and not self._contains(value):
            raise self._refusal(value, f"is out of range: give {self.range}")
        if self.check:
            module, _, function = self.check.partition(":")
            getattr(importlib.import_module(module), function)(value)

    def _contains(self, number: float) -> bool:
        return (
            math.isfinite(number)
            and (self.min is None or number >= self.min)
            and (self.max is None or number <= self.max)
            and (self.above is None or number > self.above)
            and (self.type is not int or abs(number) <= LARGEST_INTEGER)
        )

    def _parse_integer(self, text: str) -> int:
        if re.fullmatch(r"[+-]?[0-9]{1,30}", text):
            return int(text)
        try:
            meant = float(text)
        except ValueError:
            meant = math.nan
        hint = f"write {meant:.0f}" if abs(meant) < 1e15 and meant.is_integer() else self._example()
        raise self._refusal(text, f"is not a whole number: {hint}")

    def _parse_float(self, text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            raise self._refusal(text, f"is not a number: {self._example()}") from None
        if not math.isfinite(number):
            raise self._refusal(text, f"is not a finite number: {self._example()}")
        return number

    def _example(self) -> str:
        return f"give {self.range or 'one'}, such as {self.flag} {self.default}"

    def _refusal(self, value: Value, reason: str) -> UsageError:
        return UsageError(f"{self.flag} {printable(value)} {reason}")


def printable(value: object, limit: int = 60) -> str:
    """`value` as one short line of printable text, for error messages about hostile input."""
    text = str(value)
    text = "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return text or "''"


def option(
    default: Value,
    help: str,  # noqa: A002 - the word users know from argparse and Typer
    *,
    min: float | None = None,  # noqa: A002
    max: float | None = None,  # noqa: A002
    above: float | None = None,
    choices: tuple[str, ...] = (),
    alias: str = "",
    smoke: Value | None = None,
    check: str = "",
    argument: bool = False,
    required: bool = True,
    resume: bool = False,
) -> Any:
    """A dataclass field that is also a command-line option.

    Args:
        default: the value without the option.
        help: one line that teaches what it does.
        min, max: the inclusive range; `above` is an exclusive lower bound.
        choices: the accepted words.
        alias: a second flag, such as `--lr`.
        smoke: the value under `--smoke`.
        check: `module:function` that is called with the value and raises `UsageError`; imported when needed, so
            that a check may cost an import that `--help` does not pay.
        argument: it is typed without a flag, in the order of the fields.
        required: an argument that may not be left out on the command line.
        resume: it may be changed when a run is resumed, because what was logged until then would be the same.
    """
    arguments = {key: value for key, value in locals().items() if key != "default"}
    return field(default=default, metadata={"option": arguments})


def options_of(config: type) -> tuple[Option, ...]:
    """The options of a `Config` dataclass, in the order of its fields."""
    types = {"int": int, "float": float, "str": str, "bool": bool}
    return tuple(
        Option(
            name=spec.name,
            type=types[spec.type if isinstance(spec.type, str) else spec.type.__name__],
            default=cast("Value", spec.default),
            **spec.metadata["option"],
        )
        for spec in dataclasses.fields(config)
        if "option" in spec.metadata
    )
