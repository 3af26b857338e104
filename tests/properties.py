"""Properties that hold of anything: tried with a few examples on every run, and with many by `-m slow`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis.strategies import SearchStrategy

Test = Callable[..., None]


def explored(few: int = 25, many: int = 500, **strategies: SearchStrategy[Any]) -> Callable[[Test], Test]:
    """As Hypothesis' `given`, of a test that may have fixtures besides."""

    def decorate(test: Test) -> Test:
        def explore(examples: int, **fixtures: Any) -> None:
            def holds(**drawn: Any) -> None:
                test(**fixtures, **drawn)

            holds.__name__ = test.__name__  # what failed is kept under it, to be tried first the next time
            settings(max_examples=examples, deadline=None)(given(**strategies)(holds))()

        parameters = inspect.signature(test).parameters.values()
        number = inspect.Parameter("examples", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        fixtures = [parameter for parameter in parameters if parameter.name not in strategies]
        explore.__name__, explore.__doc__, explore.__module__ = test.__name__, test.__doc__, test.__module__
        vars(explore)["__signature__"] = inspect.Signature([number, *fixtures])
        numbers = pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.slow)])
        return cast("Test", numbers(explore))

    return decorate
