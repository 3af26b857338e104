"""What `rlboard runs compare` says and draws, held against numbers worked out from what was logged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rlboard.cli import main
from rlboard.eventfile import Series
from rlboard.runs import figure
from rlboard.runs.read import Column
from rlboard.statistics import interval
from tests.logged import ODD_NAMES, flip_a_byte, write_run

BEST = {"reward": {"value": 0, "step": 0}}

Compare = Callable[..., Any]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty log root, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    Path("logs").mkdir()
    return Path("logs")


@pytest.fixture
def compare(capsys: pytest.CaptureFixture[str]) -> Compare:
    """What `compare … --json` prints."""

    def run(*arguments: str) -> Any:
        assert main(["runs", "compare", "--json", *arguments]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def group(root: Path, name: str, seeds: int, offset: float = 0, **config: Any) -> None:
    """A group whose seed k has the rewards k, 10 k and 5 k, each plus `offset`, at the steps 1, 2 and 3."""
    write_run(root, name, {"reward/mean": [(1, 0.0)]}, {"seed": 1} | config, seeds=list(range(1, seeds + 1)))
    for seed in range(1, seeds + 1):
        rewards = [(step, factor * seed + offset) for step, factor in ((1, 1.0), (2, 10.0), (3, 5.0))]
        write_run(root, f"{name}/seed{seed}", {"reward": rewards}, {"seed": seed} | config, best=BEST)


def test_two_runs(root: Path, compare: Compare) -> None:
    rewards, losses = [(1, 1.0), (2, 3.0), (5, 2.0)], [(1, 0.5), (2, 0.125), (3, 0.25)]
    same = {"env": "x", "layers": [1, 2]}
    write_run(root, "a", {"reward": rewards, "loss": losses}, same | {"lr": 0.1, "seed": 1}, best=BEST, git_commit="1")
    write_run(root, "b", {"reward": [(1, 9.0)]}, same | {"lr": 0.2, "seed": 1}, best=BEST, git_commit="2")
    found = compare("a", "b", "--tag", "*")
    assert found["columns"] == [{"name": "a", "runs": ["a"]}, {"name": "b", "runs": ["b"]}]
    assert found["options"] == {"lr": [[0.1], [0.2]]}
    assert found["circumstances"] == {"git_commit": [["1"], ["2"]]}

    def one(value: float, step: int) -> dict[str, float]:
        return {"mean": value, "lower": value, "upper": value, "step": step, "runs": 1}

    assert found["metrics"] == {
        "loss": [{"last": one(0.25, 3), "best": one(0.125, 2)}, None],
        "reward": [{"last": one(2, 5), "best": one(3, 2)}, {"last": one(9, 1), "best": one(9, 1)}],
    }
    assert list(compare("a", "b")["metrics"]) == ["reward"]


def test_a_group_is_a_column_with_the_mean_and_the_interval_of_its_seeds(root: Path, compare: Compare) -> None:
    group(root, "G/low", 5, lr=0.1)
    group(root, "G/high", 4, offset=100, lr=0.2)
    found = compare("low", "high", "G/low/seed2")
    assert [column["name"] for column in found["columns"]] == ["low (5 seeds)", "high (4 seeds)"]
    assert found["columns"][0]["runs"] == [f"G/low/seed{seed}" for seed in range(1, 6)]
    assert found["options"] == {"seed": [[1, 2, 3, 4, 5], [1, 2, 3, 4]], "lr": [[0.1], [0.2]]}
    low, high = found["metrics"]["reward"]
    lower, upper = interval(np.array([5.0, 10, 15, 20, 25]))
    assert low["last"] == {"mean": 15, "lower": lower, "upper": upper, "step": 3, "runs": 5}
    assert lower < 15 < upper
    assert (high["best"]["mean"], high["best"]["step"], high["best"]["runs"]) == (125, 2, 4)


def test_runs_that_differ_only_in_their_seed_are_one_column(root: Path, compare: Compare) -> None:
    for name, config, commit in (
        ("x-seed1", {"seed": 1, "lr": 1}, "c"),
        ("y", {"seed": 1, "lr": 2}, "c"),
        ("x-seed2", {"seed": 2, "lr": 1}, "c"),
        ("again", {"seed": 2, "lr": 1}, "c"),
        ("later", {"seed": 3, "lr": 1}, "another commit"),
    ):
        write_run(root, name, {"reward": [(1, float(config["seed"]))]}, config, git_commit=commit)
    for name in ("foreign", "foreign too"):
        write_run(root, name, {"reward": [(1, 0.0)]})
    found = compare("x-seed1", "y", "x-seed2", "again", "later", "logs/foreign", "foreign too")
    assert [(column["name"], column["runs"]) for column in found["columns"]] == [
        ("x (2 seeds)", ["x-seed1", "x-seed2"]),
        ("y", ["y"]),
        ("again", ["again"]),
        ("later", ["later"]),
        ("foreign", ["foreign"]),
        ("foreign too", ["foreign too"]),
    ]
    assert found["metrics"]["reward"][0]["last"]["mean"] == 1.5


def test_a_group_without_its_seeds_is_a_run(root: Path, compare: Compare) -> None:
    write_run(root, "lonely", {"reward/iqm": [(1, 7.0)]}, {"seed": 1}, seeds=[1, 2], best={"reward/iqm": {}})
    write_run(root, "deep/er/name", {"reward": [(1, 7.0)]}, {"seed": 1})
    write_run(root, "other/name", {"reward": [(1, 7.0)]}, {"seed": 2, "lr": 1})
    found = compare("lonely", "deep/er/name", "other/name")
    assert [column["name"] for column in found["columns"]] == ["lonely", "deep/er/name", "other/name"]
    shown = found["metrics"]["reward/iqm"]
    assert (shown[0]["last"]["mean"], shown[1:]) == (7, [None, None])


def test_what_is_not_finite(root: Path, compare: Compare) -> None:
    write_run(root, "a", {"reward": [(1, 2.0), (2, math.inf), (3, math.nan)], "void": [(1, math.nan)]})
    write_run(root, "b", {"reward": [(1, -math.inf)], "void": [(4, 1.0)]})
    metrics = compare("a", "b", "--tag", "*")["metrics"]
    assert [each["best"]["mean"] for each in metrics["reward"]] == [2, None]
    assert [each["last"]["mean"] for each in metrics["reward"]] == [None, None]
    assert [each["best"]["mean"] for each in metrics["void"]] == [None, 1]
    assert main(["runs", "compare", "a", "b", "--tag", "*", "--figure", "x.png"]) == 0


def test_tables(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    group(root, "many", 12, lr=0.1)
    write_run(root, "one", {"reward": [(1000, 0.12345)]}, {"seed": 20, "lr": 0.2}, best=BEST, status="failed")
    assert main(["runs", "compare", "many", "one"]) == 0
    printed = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    assert ["seed", "1 to 12", "20"] in cells
    assert ["lr", "0.1", "0.2"] in cells
    assert ["status", "completed", "failed"] in cells
    lower, upper = interval(np.linspace(5, 60, 12))
    assert ["reward", f"last 32.5 ({lower:.4g} to {upper:.4g})", "last 0.1235"] in cells
    assert any(row[2] == "best 0.1235 at 1,000" for row in cells)
    assert "95 % bootstrap interval" in printed


def test_odd_names_are_shown_as_they_are(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    for index, name in enumerate(ODD_NAMES):
        write_run(root, name, {"[red]tag[/red] $": [(1, 1.0)]}, {"seed": 1, "[b]option[/b]": index})
    assert main(["runs", "compare", "*", "--figure", "odd.png"]) == 0
    printed = capsys.readouterr().out
    for text in ("한글 이름", "🎈", "[bold]quoted", ":smile:", "two\\nlines", "[red]tag[/red] $", "[b]option[/b]"):
        assert text in printed
    for suffix in ("svg", "pdf"):
        assert main(["runs", "compare", "*", "--figure", f"odd.{suffix}"]) == 0
        assert Path(f"odd.{suffix}").stat().st_size > 1000


def test_many_runs_are_shown_in_part_and_said_to_be(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figure, "MOST_CHARTS", 3)
    for index in range(30):
        write_run(root, f"run{index:02}", {f"tag{tag}": [(1, 1.0)] for tag in range(5)}, {"seed": 1, "lr": index})
    assert main(["runs", "compare", "run*", "--tag", "*", "--figure", "many.png"]) == 0
    printed = capsys.readouterr().out
    assert "run23" in printed
    assert "run24" not in printed
    assert "6 more columns are left out" in printed
    assert "figure: many.png, without 8 more columns and 2 more tags" in printed
    assert max(map(len, printed.splitlines())) <= 100
    assert main(["runs", "compare", "run*", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["columns"]) == 30


def test_names_and_tags_that_mean_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(root, "first", {"reward": [(1, 1.0)]})
    write_run(root, "second", {"reward": [(1, 1.0)]})
    assert main(["runs", "compare", "first", "secnod", "--tag", "reward", "--tag", "rewrad"]) == 2
    answer = capsys.readouterr()
    assert answer.err.splitlines() == [
        "rlboard: RUN secnod is not there: did you mean second?",
        "rlboard: --tag rewrad matches no tag: did you mean reward?",
    ]
    assert "last 1" in answer.out
    assert main(["runs", "compare", "first", "--tag", "loss", "--figure", "x.png"]) == 2
    assert main(["runs", "compare", "zzz"]) == 2
    assert main(["runs", "compare"]) == 2
    assert not Path("x.png").exists()


def test_damage_is_said_and_the_rest_compared(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(root, "a", {"reward": [(step, float(step)) for step in range(20)]})
    flip_a_byte(path, path.stat().st_size // 2)
    write_run(root, "b", {"reward": [(1, 1.0)]})
    (root / "c").mkdir()
    (root / "c/events.out.tfevents.1").touch()
    assert main(["runs", "compare", "a", "b", "c"]) == 3
    answer = capsys.readouterr()
    assert f"{path} is damaged" in answer.err
    assert "last 19" in answer.out
    assert main(["runs", "compare", "c"]) == 3
    assert "these runs have no scalars" in capsys.readouterr().err


def test_figures_that_cannot_be_written(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(root, "a", {"reward": [(1, 1.0)]})
    assert main(["runs", "compare", "a", "--figure", "a.jpeg"]) == 2
    assert "does not end in .png, .svg, .pdf" in capsys.readouterr().err
    assert main(["runs", "compare", "a", "--figure", "missing/a.png"]) == 5
    assert "--figure missing/a.png cannot be written: No such file or directory" in capsys.readouterr().err
    Path("a.png").write_text("old")
    assert main(["runs", "compare", "a", "--figure", "a.png"]) == 0
    with Image.open("a.png") as image:
        assert image.size == (1080, 504)
    assert sorted(path.name for path in Path().iterdir()) == ["a.png", "logs"]


def series(steps: Any, values: Any) -> Series:
    step = np.asarray(steps, np.int64)
    return Series(step, np.zeros(len(step)), np.asarray(values, np.float32))


def test_a_band_of_equal_grids_is_the_interval_at_each_step() -> None:
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((5, 40)).astype(np.float32).astype(np.float64)
    found = figure.band([series(range(0, 400, 10), row) for row in scores])
    assert found is not None
    steps, middle, lower, upper = found
    expected = interval(scores, resamples=figure.BAND_RESAMPLES)
    assert steps.tolist() == list(range(0, 400, 10))
    np.testing.assert_allclose(middle, scores.mean(0))
    np.testing.assert_array_equal((lower, upper), expected)


def test_a_band_of_unequal_grids_is_interpolated_where_all_seeds_have_values() -> None:
    found = figure.band(
        [series([0, 10, 10, 20], [0, 99, 1, 2]), series([15, 5, 30, 40], [15, 5, np.nan, 0]), series([0, 20], [0, 20])]
    )
    assert found is not None
    steps, middle, *_ = found
    assert steps.tolist() == [5, 10, 15, 20]
    at_20 = 15 * (1 - 5 / 25)
    np.testing.assert_allclose(
        middle, [(0.5 + 5 + 5) / 3, (1 + 10 + 10) / 3, (1.5 + 15 + 15) / 3, (2 + at_20 + 20) / 3]
    )
    assert figure.band([series([1, 2], [0, 0]), series([3, 4], [0, 0])]) is None
    assert figure.band([series([1], [np.nan]), series([1], [0])]) is None


def test_long_curves_are_drawn_by_their_extremes() -> None:
    rng = np.random.default_rng(0)
    for count in (999, 2000, 2001, 3500, 123_457):
        values = rng.standard_normal(count)
        values[count // 3], values[-1] = 50, -50
        line = figure.thinned(series(range(count), values))
        assert len(line.step) <= 2 * figure.MOST_POINTS
        assert (line.value.max(), line.value.min()) == (50, -50)
        assert line.step[-1] == count - 1
        assert (np.diff(line.step) > 0).all()
        np.testing.assert_array_equal(line.value, values.astype(np.float32)[line.step])


def test_a_chart_has_a_line_for_each_seed_their_mean_and_a_band() -> None:
    curves = tuple({"reward": series([1, 2, 3], [seed, 2 * seed, 3 * seed])} for seed in range(4))
    columns = [Column("group", (), curves), Column("one $x_{", (), ({"reward": series([1, 3], [7, 8])},))]
    drawn = figure._figure([columns[0], columns[1]], ["reward", "loss"])
    reward = drawn.axes[0]
    assert reward.get_title() == "reward"
    lines = [line.get_xydata().tolist() for line in reward.get_lines()]  # type: ignore[union-attr]
    assert lines[:4] == [[[1, seed], [2, 2 * seed], [3, 3 * seed]] for seed in range(4)]
    assert lines[4] == [[1, 1.5], [2, 3], [3, 4.5]]
    assert lines[5] == [[1, 7], [3, 8]]
    assert len(reward.collections) == 1
    (legend,) = drawn.legends
    assert [text.get_text().strip("\u200b") for text in legend.get_texts()] == ["group", "one $x_{"]
