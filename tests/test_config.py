from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlboard.config import LARGEST_INTEGER, Option, option, options_of, printable
from rlboard.errors import UsageError

EPISODES = Option("episodes", int, 10_000, "episodes to train", min=1)
RATE = Option("learning_rate", float, 2e-4, "step size", above=0)
GAMMA = Option("gamma", float, 0.98, "discount", min=0, max=1)
LOG = Option("log", str, "full", "how much", choices=("minimal", "full"))
FLAG = Option("deterministic", bool, False, "slow and equal")


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        (EPISODES, "1", 1),
        (EPISODES, "+20", 20),
        (EPISODES, str(LARGEST_INTEGER), LARGEST_INTEGER),
        (RATE, "1e-3", 1e-3),
        (GAMMA, "1", 1.0),
        (GAMMA, "0", 0.0),
        (LOG, "minimal", "minimal"),
        (FLAG, "yes", True),
        (FLAG, "False", False),
    ],
)
def test_parse_returns_the_value(option: Option, text: str, value: object) -> None:
    parsed = option.parse(text)
    assert parsed == value
    assert type(parsed) is option.type


@pytest.mark.parametrize(
    ("option", "text", "hint"),
    [
        (EPISODES, "0", "give 1 or more"),
        (EPISODES, "-5", "give 1 or more"),
        (EPISODES, "1e4", "write 10000"),
        (EPISODES, "abc", "such as --episodes 10000"),
        (EPISODES, "", "''"),
        (EPISODES, "9" * 25, "out of range"),
        (EPISODES, "9" * 10_000, "not a whole number"),
        (EPISODES, "٣", "not a whole number"),
        (RATE, "nan", "finite"),
        (RATE, "inf", "finite"),
        (RATE, "0", "give above 0"),
        (RATE, "-1e-3", "give above 0"),
        (GAMMA, "1.5", "give 0 to 1"),
        (LOG, "loud", "minimal or full"),
        (FLAG, "maybe", "neither true nor false"),
    ],
)
def test_parse_refuses_in_one_line_that_names_the_option_and_the_way_out(option: Option, text: str, hint: str) -> None:
    with pytest.raises(UsageError) as refusal:
        option.parse(text)
    message = str(refusal.value)
    assert message.startswith(option.flag)
    assert hint in message
    assert "\n" not in message
    assert len(message) < 200


@given(st.sampled_from([EPISODES, RATE, GAMMA, LOG, FLAG]), st.text() | st.floats().map(str) | st.integers().map(str))
def test_parse_gives_a_value_in_range_or_refuses_in_one_printable_line(option: Option, text: str) -> None:
    try:
        value = option.parse(text)
    except UsageError as error:
        message = str(error)
    else:
        assert type(value) is option.type
        assert isinstance(value, str) or (option.min is None or value >= option.min)
        assert isinstance(value, str) or (option.max is None or value <= option.max)
        assert isinstance(value, str) or (option.above is None or value > option.above)
        message = "fine"
    assert message.isprintable()


@given(st.integers(min_value=1, max_value=LARGEST_INTEGER))
def test_every_integer_in_range_is_parsed(number: int) -> None:
    assert EPISODES.parse(str(number)) == number


@given(st.text())
def test_printable_is_printable_and_short(text: str) -> None:
    assert printable(text).isprintable()
    assert 0 < len(printable(text)) <= 60


def test_options_of_a_dataclass() -> None:
    @dataclass(frozen=True)
    class Config:
        learning_rate: float = option(1e-3, "step size", above=0, alias="--lr", smoke=1e-2)
        name: str = option("x", "a name", choices=("x", "y"))
        hidden: int = 3

        run: str = option("", "a run", argument=True)

    rate, name, run = options_of(Config)
    assert rate == Option("learning_rate", float, 1e-3, "step size", above=0, alias="--lr", smoke=1e-2)
    assert (rate.flag, rate.range) == ("--learning-rate", "above 0")
    assert (name.range, name.type) == ("x or y", str)
    assert (run.flag, run.spelled("logs/a")) == ("RUN", "logs/a")
    assert Config().learning_rate == 1e-3
