"""The table of the fault suite: each fault, how often it was caused, and how often all was well."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

Tally = Callable[..., None]


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Tally:
    """Counts one more trial of a fault that was survived as it should be, or `times` of them, for the table."""

    def count(fault: str, times: int = 1) -> None:
        record_property("fault", [fault, times])

    return count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints how often each fault was caused. A trial counts when all of its assertions have held."""
    passed: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for outcome, counts in (("passed", passed), ("failed", failed)):
        for report in terminalreporter.getreports(outcome):
            for name, value in getattr(report, "user_properties", ()):
                if name == "fault":
                    passed[value[0]] += value[1]
                    counts[value[0]] += 0
            if outcome == "failed" and "/faults/" in report.nodeid:
                failed[report.nodeid.partition("::")[2]] += 1
    if passed or failed:
        terminalreporter.section("faults")
        width = max(map(len, passed | failed))
        terminalreporter.write_line(f"{'fault':<{width}}  survived")
        for fault in sorted(passed):
            terminalreporter.write_line(f"{fault:<{width}}  {passed[fault]:>8,}")
        for name in sorted(name for name in failed if failed[name]):
            terminalreporter.write_line(f"{name:<{width}}    FAILED")
