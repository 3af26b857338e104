"""Sweeps: what is typed, what is tried, who runs it, and what is found."""

from __future__ import annotations

import io
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from rlboard.cli import main
from rlboard.config import Option
from rlboard.errors import NumericalError, StorageError, UsageError
from rlboard.registry import TRACKS, find_loop
from rlboard.run import Stop, signals
from rlboard.runs.find import find_runs
from rlboard.sweep import ledger as ledgers
from rlboard.sweep import plan, sweep
from rlboard.sweep.crew import supervise
from rlboard.sweep.ledger import SLOT, Ledger
from rlboard.sweep.plan import Sweep
from rlboard.sweep.space import combinations, find_option, parse_settings, parse_space
from rlboard.sweep.storage import hidden
from tests.sweeping import facts, zoo

OPTIONS = (
    Option("learning_rate", float, 0.1, "", above=0, alias="--lr"),
    Option("batch_size", int, 64, "", min=1),
    Option("optimizer", str, "sgd", "", choices=("sgd", "adamw")),
    Option("flip", bool, True, ""),
    Option("dropout", float, 0.0, "", min=0, max=0.5),
    Option("data", str, "auto", ""),
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no such test cuts the power
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("zoo.hill", None)
    sys.modules.pop("zoo", None)


def planned(root: Path, space: str, *fixed: str, **changes: Any) -> tuple[Sweep, list[str]]:
    chosen: dict[str, Any] = {
        "method": "grid",
        "trials": None,
        "pruner": "none",
        "jobs": 1,
        "metric": "",
        "seed": 0,
        "study": "peak",
        "storage": "",
        "log_dir": str(root / "logs"),
        "tracks": [zoo(root)],
    }
    return plan("hill", [space], fixed, **chosen | changes)


def searched(root: Path, space: str, *fixed: str, **changes: Any) -> tuple[Sweep, Ledger, str]:
    """A sweep that has run in this process, without its report."""
    asked, _ = planned(root, space, *fixed, **changes)
    ledger, stop, screen = asked.open(), Stop(), io.StringIO()
    with signals(stop):
        supervise(asked, ledger, stop, Console(file=screen, width=200))
    return asked, ledger, screen.getvalue()


def test_a_space_is_what_is_typed() -> None:
    (rate, batch, optimizer, flip, dropout) = parse_space(
        ["lr=1e-4..1e-1:log batch-size=64,128,256 optimizer=adamw,sgd", "flip=yes,no dropout=0...5"],
        OPTIONS,
        grid=False,
    )
    assert (rate.name, rate.low, rate.high, rate.log, rate.choices) == ("learning_rate", 1e-4, 0.1, True, ())
    assert (batch.name, batch.choices) == ("batch_size", (64, 128, 256))
    assert (optimizer.choices, flip.choices) == (("adamw", "sgd"), (True, False))
    assert (dropout.low, dropout.high, dropout.log) == (0.0, 0.5, False)


def test_a_grid_has_all_combinations() -> None:
    space = parse_space(["lr=1e-4..1e-1:log:4 batch_size=1..4:3 optimizer=adamw,sgd"], OPTIONS, grid=True)
    rates, sizes, _ = (dimension.grid() for dimension in space)
    assert rates == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
    assert sizes == [1, 2, 4]
    assert all(type(size) is int for size in sizes)
    found = combinations(space)
    assert len(found) == len({tuple(each.values()) for each in found}) == 24
    assert found[0] == {"learning_rate": 1e-4, "batch_size": 1, "optimizer": "adamw"}
    with pytest.raises(UsageError, match="has 20,000 combinations, over 10,000: use --method random"):
        combinations(parse_space(["lr=1..2:10000 flip=true,false"], OPTIONS, grid=True))


@pytest.mark.parametrize(("text", "complaint"), [
    ("", "--space is empty"),
    ("learning_rat=1,2", "learning_rat is no option of the loop: did you mean learning_rate?"),
    ("zzz=1,2", "zzz is no option of the loop: there is learning_rate, batch_size"),
    ("lr=0.1..0.01", "is an empty range: give the smaller end first"),
    ("lr=0.1..0.1", "is an empty range"),
    ("lr=1..2:lag", "is not a number"),
    ("lr=0..1", "--learning-rate 0.0 is out of range: give above 0"),
    ("dropout=0..0.5:log", "has no logarithm at 0"),
    ("dropout=0..0.9", "--dropout 0.9 is out of range: give 0 to 0.5"),
    ("batch_size=1.5..3", "--batch-size 1.5 is not a whole number"),
    ("batch_size=64,128,64", "has a value twice"),
    ("batch_size=64", "is one value: give several, a,b,c, or a range a..b, or fix it by --set"),
    ("optimizer=sgd", "is one value: give several, a,b,c, or fix it"),
    ("optimizer=sgd,lion", "--optimizer lion is not sgd or adamw"),
    ("optimizer=adamw..sgd", "--optimizer adamw..sgd is not sgd or adamw"),
    ("lr=1,2 learning_rate=3,4", "has learning_rate twice"),
    ("lr", "is not NAME=VALUE"),
    ("lr=", "is not NAME=VALUE"),
    ("lr='1,2", "cannot be read: No closing quotation"),
    ("lr=1..2:5", "has a number of points: that is for --method grid"),
])  # fmt: skip
def test_a_space_that_cannot_be_used_is_one_line(text: str, complaint: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_space([text], OPTIONS, grid=False)
    assert complaint in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("points", ["", ":1", ":0", ":99999"])
def test_a_range_in_a_grid_needs_its_points(points: str) -> None:
    with pytest.raises(UsageError, match="is a range in a grid: say how many points, 2 or more"):
        parse_space([f"lr=1..2{points}"], OPTIONS, grid=True)


WORDS = st.sampled_from(
    [*"=.,:- '\"\\", "..", "log", "lr", "batch_size", "dropout", "0", "5", "1e-3", "nan", "inf", "é"]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(WORDS, max_size=8).map("".join), st.booleans())
def test_whatever_is_typed_is_refused_or_in_range(text: str, grid: bool) -> None:
    try:
        space = parse_space([f"lr={text}"], OPTIONS, grid=grid)
    except UsageError:
        return
    for dimension in space:
        for value in dimension.grid() if grid or dimension.choices else (dimension.low, dimension.high):
            dimension.option.validate(value)
    assert parse_space([" ".join(map(str, space))], OPTIONS, grid=grid) == space


def test_settings_are_values_of_their_options() -> None:
    fixed = parse_settings(["lr=0.5 flip=no", "data='a folder'"], OPTIONS)
    assert fixed == {"learning_rate": 0.5, "flip": False, "data": "a folder"}
    with pytest.raises(UsageError, match="--set has flip twice"):
        parse_settings(["flip=no", "flip=yes"], OPTIONS)
    with pytest.raises(UsageError, match=r"--dropout 7\.0 is out of range"):
        parse_settings(["dropout=7"], OPTIONS)


def test_every_option_of_every_loop_is_found_by_each_of_its_names() -> None:
    for name in ("vision/train", "agents/reinforce"):
        options = find_loop(name, TRACKS).options
        for option in options:
            assert find_option("--space", option.name, options) is option
            if option.alias:
                assert find_option("--space", option.alias, options) is option


@pytest.fixture(scope="module")
def peak(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The study of a grid of two by three, one trial of each pair fails, and what was printed."""
    root = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr("sys.stdout", screen := io.StringIO())
        code = sweep(
            "hill",
            ["place=0.25,1 kind=a,b,nan"],
            ["steps=8"],
            method="grid",
            study="peak",
            log_dir=str(root / "logs"),
            tracks=[zoo(root)],
        )
    assert code == 0
    return root / "logs/HILL/peak", screen.getvalue()


def test_every_trial_is_a_run_with_its_result_as_scalars(peak: tuple[Path, str]) -> None:
    directory, _ = peak
    names = [run.name for run in find_runs(directory)]
    assert names == ["study", *(f"trial{number:03d}" for number in range(6))]
    combination = []
    for number in range(6):
        about = facts(directory / f"trial{number:03d}")
        config = about["config"]
        combination.append((config["x"], config["kind"]))
        fails = config["kind"] == "nan"
        assert (about["status"], about["sweep"]["trial"]) == ("failed" if fails else "completed", number)
        events = EventAccumulator(str(directory / f"trial{number:03d}"))
        events.Reload()
        height = 1 - (config["x"] - 0.3) ** 2
        steps = 2 if fails else 9
        best, final = (events.Scalars(tag) for tag in ("hparam/best", "hparam/final"))
        assert len(best) == len(final) == steps
        assert best[-1].value == pytest.approx(height - (0.625 if fails else 0), abs=1e-6)
        assert final[-1].value == pytest.approx(height - (0.625 if fails else 0.25), abs=1e-6)
        content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
        hparams = HParamsPluginData.FromString(content).session_start_info.hparams
        assert (hparams["x"].number_value, hparams["kind"].string_value) == combination[-1]
    assert combination == [(x, kind) for x in (0.25, 1.0) for kind in ("a", "b", "nan")]


def test_the_best_is_printed_and_the_study_is_a_run(peak: tuple[Path, str]) -> None:
    directory, screen = peak
    assert "score 0.9975 in trial 0" in screen
    assert "trial 2 failed: the score is nan; x=0.25 kind=nan (3 of 6)" in screen
    assert re.search(r"x +│ 0.25 +│ +9\d\.\d%", screen)
    assert "run it alone with: rlboard hill --steps=8 --x=0.25 --kind=a" in screen
    events = EventAccumulator(str(directory / "study"))
    events.Reload()
    assert [round(point.value, 4) for point in events.Scalars("sweep/value")] == [0.9975, 0.9975, 0.51, 0.51]
    assert set(events.Tags()["images"]) == {"sweep/history", "sweep/importances", "sweep/slices"}
    (table,) = events.Tensors("sweep/trials/text_summary")
    rows = table.tensor_proto.string_val[0].decode().splitlines()
    assert rows[2] == "| trial000 | 0.25 | a | 0.9975 | 0.7475 | complete |"
    assert rows[7] == "| trial005 | 1.0 | nan |  |  | failed: the score is nan |"
    assert facts(directory / "study")["study"]["best_trial"] == 0
    assert metadata.SESSION_START_INFO_TAG not in events.Tags()["tensors"]  # no row of its own in the HParams tab


def test_a_study_goes_on_and_is_extended(tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "random", "seed": 3}
    _, first, _ = searched(tmp_path, "x=-1..1", trials=2, **options)
    directory = tmp_path / "logs/HILL/peak"
    before = {path: path.stat().st_mtime_ns for path in directory.glob("trial*/*")}
    asked, ledger, screen = searched(tmp_path, "x=-1..1", trials=4, **options)
    assert "going on with the study: 2 of 4 trials are done" in screen
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(directory.glob("trial*"))) == len(ledger.study.trials) == 4
    tried = [facts(path)["config"]["x"] for path in sorted(directory.glob("trial*"))]
    assert len(set(tried)) == 4
    again = searched(tmp_path / "logs", "x=-1..1", trials=4, **options)[1]  # elsewhere, anew
    assert [trial.params["x"] for trial in again.study.trials] == tried
    assert first.study.study_name == asked.name


@pytest.mark.parametrize(("changes", "complaint"), [
    ({"space": "x=0,2"}, "--study peak is there with --space x=0.0,1.0, not x=0.0,2.0: give another --study"),
    ({"metric": "loss"}, "with --metric headline, not loss"),
    ({"fixed": ["steps=9"]}, "with --set nothing, not steps=9"),
    ({"method": "random", "trials": 2}, "with --method grid, not random"),
])  # fmt: skip
def test_another_study_of_the_same_name_is_refused(changes: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    asked, _ = planned(tmp_path, "x=0,1")
    asked.open()
    other, _ = planned(tmp_path, changes.pop("space", "x=0,1"), *changes.pop("fixed", ()), **changes)
    with pytest.raises(UsageError, match=re.escape(complaint)):
        other.open()


def test_the_same_command_has_the_same_study(tmp_path: Path) -> None:
    names = [
        planned(tmp_path, "x=0..1", *fixed, method="tpe", trials=trials, study="", seed=seed)[0].name
        for trials, seed, *fixed in ((5, 0), (9, 0), (5, 0, "flag=a"), (5, 1), (5, 0, "steps=3"))
    ]
    assert names[0] == names[1] == names[2]
    assert len(set(names)) == 3


def test_a_stopped_sweep_goes_on(tmp_path: Path) -> None:
    stopping = ("x=0,1 kind=stop,b", f"flag={tmp_path / 'flag'}")
    _, ledger, _ = searched(tmp_path, *stopping)
    assert [trial.state for trial in ledger.study.trials] == [TrialState.FAIL, *[TrialState.WAITING] * 3]
    trial = tmp_path / "logs/HILL/peak/trial000"
    assert facts(trial)["status"] == "interrupted"
    _, ledger, _ = searched(tmp_path, *stopping)
    assert facts(trial)["status"] == "completed"
    assert len(list(trial.parent.glob("trial*"))) == 4
    complete = [each.user_attrs[SLOT] for each in ledger.study.trials if each.state == TrialState.COMPLETE]
    assert sorted(complete) == [0, 1, 2, 3]


def test_what_falls_behind_is_pruned_in_order(tmp_path: Path) -> None:
    asked, ledger, screen = searched(tmp_path, "x=0.3,0.31,0.32,0.33,0.34,5,6", "steps=10", pruner="median")
    states = [trial.state for trial in ledger.study.trials]
    assert states == [TrialState.COMPLETE] * 5 + [TrialState.PRUNED] * 2
    assert "trial 5: pruned, score " in screen
    about = facts(Path(asked.directory, "trial005"))
    assert (about["status"], about["sweep"]["pruned_at"]) == ("pruned", 1)
    events = EventAccumulator(str(Path(asked.directory, "trial005")))
    events.Reload()
    assert [point.step for point in events.Scalars("hparam/best")] == [0, 1]
    end = events.SummaryMetadata(metadata.SESSION_END_INFO_TAG).plugin_data.content
    assert HParamsPluginData.FromString(end).session_end_info.status == 1  # success, in HParams


def test_a_metric_that_is_not_logged_ends_the_sweep(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--metric accuracy is not logged by hill: give one of loss, score"):
        searched(tmp_path, "x=0,1", metric="accuracy")
    assert len(list(tmp_path.glob("logs/HILL/peak/trial*"))) == 1
    with pytest.raises(UsageError, match="the loop has no headline"):
        searched(tmp_path, "x=0,1", "quiet=true", study="quiet")


def test_a_sweep_without_a_result_says_why(tmp_path: Path) -> None:
    given_to = {"study": "none", "log_dir": str(tmp_path / "logs"), "tracks": [zoo(tmp_path)], "method": "grid"}
    with pytest.raises(NumericalError, match="none of 2 trials has a result; the first: the score is nan"):
        sweep("hill", ["x=0,1"], ["kind=nan"], **given_to)  # type: ignore[arg-type]


def test_no_trial_is_lost_and_none_is_taken_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, _ = planned(tmp_path, "x=0,1,2,3")
    ledger, other = asked.open(), asked.open()
    for slot in range(4):
        ledger.queue(slot, asked.grid(slot))
        other.queue(slot, asked.grid(slot))  # at the same moment, on another machine
    taken = [(ledger, other)[turn % 2].claim(turn) for turn in range(5)]
    assert taken.pop() is None
    claimed = [trial for trial in taken if trial]
    assert Counter(trial.user_attrs[SLOT] for trial in claimed) == Counter(range(4))
    values = [asked.space[0].suggest(trial) for trial in claimed]
    assert len(other.slots().spare) == 4
    other.bury(other.slots())
    ledger.give_up(claimed[1]._trial_id)  # its process is dead
    slot = claimed[1].user_attrs[SLOT]
    slots = other.slots()
    assert [each for each in range(4) if slots.is_vacant(each)] == [slot]
    assert slots.trials[slot].params == {"x": values[1]}
    assert not other.tell(claimed[1], TrialState.COMPLETE, {"best": 1.0}, 1.0)  # it was not dead: it comes too late
    other.queue(slot, slots.trials[slot].params)
    again = ledger.claim()
    assert again is not None
    assert asked.space[0].suggest(again) == values[1]
    assert ledger.tell(again, TrialState.COMPLETE, {"best": 2.0}, 2.0)
    monkeypatch.setattr(ledgers, "GRACE_SECONDS", -1.0)
    other.bury(other.slots())  # of the three that run, none gives a sign of life
    assert sum(other.slots().is_vacant(each) for each in range(4)) == 3


def test_a_trial_that_kills_its_process_is_not_run_for_ever(tmp_path: Path) -> None:
    asked, _ = planned(tmp_path, "x=0,1")
    ledger = asked.open()
    for _ in range(ledgers.MOST_KILLS):
        assert ledger.slots().is_vacant(0)
        ledger.queue(0, asked.grid(0))
        trial = ledger.claim()
        assert trial is not None
        ledger.give_up(trial._trial_id)
    slots = ledger.slots()
    assert not slots.is_vacant(0)
    assert dict(slots.finished())[0].state == TrialState.FAIL


@pytest.mark.parametrize("address", [
    "postgresql://u:se%20cr:et@host:5432/db", "postgresql://host/db?user=u&password=secret",
    "postgresql+psycopg://u:p@ss@host/db", "postgresql://u@host/db", "sqlite:///a/b@c.db", "study.log",
])  # fmt: skip
def test_a_password_is_never_shown(address: str) -> None:
    shown = hidden(address)
    assert not any(secret in shown for secret in ("se%20cr:et", "secret", "p@ss"))
    assert shown == address or "***" in shown


def test_a_storage_that_does_not_answer_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = "postgresql://tester:secret@127.0.0.1:9/db"
    code = main(["sweep", "reinforce", "--space=lr=1,2", f"--storage={address}", f"--log-dir={tmp_path}"])
    complaint = capsys.readouterr().err
    assert code == StorageError.exit_code
    assert "--storage postgresql://tester:***@127.0.0.1:9/db does not answer: " in complaint
    assert "secret" not in complaint
    assert complaint.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("arguments", "complaint"), [
    (["sweep", "reinforc", "--space=lr=1,2"], "LOOP reinforc is no loop: did you mean reinforce or"),
    (["sweep", "reinforce", "--space=lr=1,2", "--set=learning_rate=1"], "is in --space and in --set"),
    (["sweep", "reinforce", "--space=lr=1,2", "--method=grid", "--trials=3"], "--trials is not for --method grid"),
    (["sweep", "reinforce", "--space=lr=1,2", "--method=best"], "Invalid value for '--method'"),
    (["sweep", "reinforce", "--space=lr=1,2", "--study=../up"], "--study ../up is not a plain name"),
    (["sweep", "reinforce", "--space=lr=1,2", "--storage=redis://h"], "is no storage that is known"),
    (["sweep", "evaluate", "--space=episodes=1,2"], "evaluate needs RUN: give it as --set run=…"),
    (["sweep", "reinforce"], "Missing option '--space'"),
    (["vision", "sweep", "--space=lr=1,2", "--set=preset=fast"], "preset=fast is no preset of train"),
    (["vision", "sweep", "--space=optimiser=sgd,muon"], "did you mean optimizer?"),
])  # fmt: skip
def test_mistakes_are_one_line(
    arguments: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, f"--log-dir={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_optuna_it_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["sweep", "reinforce", "--space=lr=1,2", f"--log-dir={tmp_path}"]) == 2
    assert "needs Optuna: pip install 'rlboard[sweep]'" in capsys.readouterr().err
