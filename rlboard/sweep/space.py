"""What is tried and what is fixed, as it is typed: `lr=1e-4..1e-1:log batch_size=64,128 optimizer=adamw,sgd`.

Names are those of the loop's `Config` fields or their alias, and every value is one that its option accepts.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlboard.config import Option, Value, printable
from rlboard.errors import UsageError

if TYPE_CHECKING:
    from optuna.trial import Trial

MOST_POINTS = 10_000
"""Of a grid."""
RANGE = re.compile(r"(?P<low>.+?)\.\.(?P<high>.+?)(?P<log>:log)?(?::(?P<points>[0-9]{1,9}))?")


@dataclass(frozen=True)
class Dimension:
    """An option that is searched, over `choices` or else from `low` to `high`, both included."""

    option: Option
    choices: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    points: int = 0
    """Of a range in a grid."""

    @property
    def name(self) -> str:
        return self.option.name

    def __str__(self) -> str:
        """The dimension as it is typed, always in the same way."""
        if self.choices:
            return f"{self.name}={','.join(map(str, self.choices))}"
        ends = f"{self.name}={self.low}..{self.high}{':log' if self.log else ''}"
        return f"{ends}:{self.points}" if self.points else ends

    def suggest(self, trial: Trial) -> Value:
        """The value that a trial is to have, of the option's type."""
        if self.choices:
            return trial.suggest_categorical(self.name, self.choices)  # type: ignore[return-value]
        if self.option.type is int:
            return trial.suggest_int(self.name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, log=self.log)

    def grid(self) -> list[Value]:
        """Its values in a grid: those of a range lie evenly, or, under `:log`, at equal ratios."""
        if self.choices:
            return list(self.choices)
        shares = [index / (self.points - 1) for index in range(self.points)]
        if self.log:
            values = [self.low ** (1 - share) * self.high**share for share in shares]
        else:
            values = [(1 - share) * self.low + share * self.high for share in shares]
        values[0], values[-1] = self.low, self.high
        return list(dict.fromkeys(round(value) if self.option.type is int else value for value in values))


def combinations(space: Sequence[Dimension]) -> list[dict[str, Value]]:
    """All combinations of a grid, the first dimension moving slowest. Raises UsageError where they are too many."""
    grids = [dimension.grid() for dimension in space]
    if (count := math.prod(map(len, grids))) > MOST_POINTS:
        raise UsageError(f"--space has {count:,} combinations, over {MOST_POINTS:,}: use --method random or tpe")
    names = [dimension.name for dimension in space]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*grids)]


def parse_space(texts: Iterable[str], options: Sequence[Option], *, grid: bool) -> tuple[Dimension, ...]:
    """The dimensions that `--space` names, in its order.

    Raises:
        UsageError: one is no option or twice there, a value is none of its option, or a range is empty or reversed.
    """
    space: dict[str, Dimension] = {}
    for name, text in _assignments("--space", texts):
        option = find_option("--space", name, options)
        if option.name in space:
            raise UsageError(f"--space has {option.name} twice: give all its values at once")
        space[option.name] = _dimension(option, text, grid=grid)
    if not space:
        raise UsageError('--space is empty: give options to search, such as --space "lr=1e-4..1e-1:log"')
    return tuple(space.values())


def parse_settings(texts: Iterable[str], options: Sequence[Option]) -> dict[str, Value]:
    """The value of each option that `--set` fixes. Raises UsageError as `parse_space` does."""
    values: dict[str, Value] = {}
    for name, text in _assignments("--set", texts):
        option = find_option("--set", name, options)
        if option.name in values:
            raise UsageError(f"--set has {option.name} twice: give it once")
        values[option.name] = option.parse(text)
    return values


def find_option(flag: str, name: str, options: Sequence[Option]) -> Option:
    """The option that is called `name`, in any way it can be typed; UsageError with the nearest where there is none."""
    names = {option.name: option for option in options}
    names |= {option.alias.lstrip("-").replace("-", "_"): option for option in options if option.alias}
    wanted = name.lstrip("-").replace("-", "_")
    if wanted not in names:
        near = difflib.get_close_matches(wanted, names, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there is {', '.join(names)}"
        raise UsageError(f"{flag} {printable(name)} is no option of the loop: {hint}")
    return names[wanted]


def _assignments(flag: str, texts: Iterable[str]) -> Iterator[tuple[str, str]]:
    for text in texts:
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise UsageError(f"{flag} {printable(text)} cannot be read: {error}") from None
        for word in words:
            name, equals, value = word.partition("=")
            if not (name and equals and value):
                raise UsageError(f"{flag} {printable(word)} is not NAME=VALUE: write, for example, batch_size=64")
            yield name, value


def _dimension(option: Option, text: str, *, grid: bool) -> Dimension:
    where = f"--space {option.name}={printable(text)}"
    found = RANGE.fullmatch(text) if option.type in (int, float) and "," not in text else None
    if not found:
        choices = tuple(option.parse(part) for part in text.split(","))
        if len(set(choices)) < len(choices):
            raise UsageError(f"{where} has a value twice: give each once")
        if len(choices) < 2:
            ends = ", or a range a..b" if option.type in (int, float) else ""
            raise UsageError(f"{where} is one value: give several, a,b,c{ends}, or fix it by --set")
        return Dimension(option, choices)
    low, high = float(option.parse(found["low"])), float(option.parse(found["high"]))
    points = int(found["points"] or 0)
    if low >= high:
        raise UsageError(f"{where} is an empty range: give the smaller end first")
    if found["log"] and low <= 0:
        raise UsageError(f"{where} has no logarithm at {low:g}: begin above 0, or leave :log out")
    if grid and not 2 <= points <= MOST_POINTS:
        raise UsageError(f"{where} is a range in a grid: say how many points, 2 or more, such as {printable(text)}:5")
    if points and not grid:
        raise UsageError(f"{where} has a number of points: that is for --method grid")
    if option.type is int:
        low, high = int(low), int(high)
    return Dimension(option, (), low, high, bool(found["log"]), points)
