"""What `rlboard runs export` writes, read back by others and held against TensorBoard's own reader."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from torch.utils.tensorboard import SummaryWriter

from rlboard.cli import main
from rlboard.errors import DataError
from rlboard.eventfile import read_scalars
from rlboard.runs import export, read
from rlboard.runs.find import find_runs, select
from tests.conftest import ROOT
from tests.logged import ODD_NAMES, accumulated, flip_a_byte, write_run

FORMATS = ("csv", "parquet", "json")
COLUMNS = ["run", "tag", "step", "wall_time", "value"]

rng = np.random.default_rng(0)


def curve(count: int) -> list[tuple[int, float]]:
    return list(enumerate(rng.standard_normal(count).astype(np.float32).tolist()))


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs of ours, and the directory of both as working directory."""
    monkeypatch.chdir(tmp_path)
    root = Path("logs")
    best = {"reward": {"value": 3.5, "step": 2}}
    times = {"started": "2026-01-01T00:00:00.000+00:00", "ended": None}
    write_run(root, "A/first", {"reward": curve(50), "loss": curve(20)}, {"seed": 1, "lr": 0.5}, best=best, **times)
    write_run(root, "A/second", {"reward": curve(30)}, {"seed": 2, "lr": 1, "env": "x"}, status="failed")
    return root


def run(*arguments: str) -> int:
    return main(["runs", "export", *arguments])


def scalars(extension: str, directory: str = ".") -> pl.DataFrame:
    path = Path(directory) / f"scalars.{extension}"
    if extension == "csv":
        return pl.read_csv(path, schema=export.SCALARS)
    return pl.read_parquet(path) if extension == "parquet" else pl.read_json(path, schema=export.SCALARS)


@pytest.mark.parametrize("extension", FORMATS)
def test_values_are_those_of_tensorboards_reader(
    logs: Path, extension: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export, "BATCH_ROWS", 7)  # several batches a run, and several runs a batch
    for name in ODD_NAMES:
        write_run(logs, name, {"b": curve(3), 'odd, "tag"\n 🎈': curve(2)})
    expected = [
        (name, *row) for name in sorted(["A/first", "A/second", *ODD_NAMES]) for row in accumulated(logs / name)
    ]
    assert len(expected) == 100 + 5 * len(ODD_NAMES)
    assert run("--format", extension) == 0
    assert scalars(extension).rows() == expected
    assert f"7 runs and 125 points written to scalars.{extension} and runs.{extension}" in capsys.readouterr().out
    assert sorted(path.name for path in Path().iterdir()) == ["logs", f"runs.{extension}", f"scalars.{extension}"]


def test_text_is_read_by_the_standard_library(logs: Path) -> None:
    write_run(logs, ODD_NAMES[3], {"a,\n": [(1, 0.1)]})
    row = [ODD_NAMES[3], "a,\n", 1, 1.7e9 + 1 / 7, float(np.float32(0.1))]
    assert run("--format", "csv") == run("--format", "json") == 0
    with Path("scalars.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert (rows[0], rows[-1]) == (COLUMNS, [str(cell) for cell in row])
    table = json.loads(Path("scalars.json").read_text())
    assert table[-1] == dict(zip(COLUMNS, row, strict=True))
    assert len(table) == len(rows) - 1 == len(Path("scalars.json").read_text().splitlines()) - 2


def test_points_keep_the_order_in_which_they_were_logged(logs: Path) -> None:
    write_run(logs, "resumed", {"b": [(1, 1.0), (2, 2.0), (3, 3.0)], "a": [(5, 0.0)]})
    write_run(logs, "resumed", {"b": [(2, 20.0), (3, 30.0)], "c": [(1, 0.0)]})
    assert run("resumed") == 0
    assert scalars("csv").select("tag", "step", "value").rows() == [
        ("a", 5, 0.0),
        *[("b", step, value) for step, value in ((1, 1.0), (2, 2.0), (3, 3.0), (2, 20.0), (3, 30.0))],
        ("c", 1, 0.0),
    ]
    assert pl.read_csv("runs.csv").row(0, named=True)["last/b"] == 30


@pytest.mark.parametrize("extension", FORMATS)
def test_what_is_not_finite(logs: Path, extension: str) -> None:
    write_run(logs, "bad", {"loss": [(1, math.nan), (2, math.inf), (3, -math.inf), (4, 1e-45)]})
    assert run("bad", "--format", extension) == 0
    values = scalars(extension)["value"].to_list()
    tiny = float(np.float32(1e-45))
    if extension == "json":
        assert values == [None, None, None, tiny]
    else:
        assert math.isnan(values[0])
        assert values[1:] == [math.inf, -math.inf, tiny]


@pytest.mark.parametrize("extension", FORMATS)
def test_the_table_of_runs(logs: Path, extension: str) -> None:
    assert run("--format", extension) == 0
    path = Path(f"runs.{extension}")
    readers: dict[str, Any] = {"csv": pl.read_csv, "parquet": pl.read_parquet, "json": pl.read_json}
    table = readers[extension](path)
    last = {run: accumulated(logs / run) for run in ("A/first", "A/second")}
    assert table.to_dicts() == [
        {
            "run": "A/first",
            "loop": "agents/reinforce",
            "status": "completed",
            "seed": 1,
            "started": "2026-01-01T00:00:00.000+00:00",
            "ended": None,
            "config/env": None,
            "config/lr": 0.5,
            "config/seed": 1,
            "last/loss": last["A/first"][19][3],
            "last/reward": last["A/first"][-1][3],
            "best/reward": 3.5,
            "best_step/reward": 2,
        },
        {
            "run": "A/second",
            "loop": "agents/reinforce",
            "status": "failed",
            "seed": 2,
            "started": None,
            "ended": None,
            "config/env": "x",
            "config/lr": 1.0,
            "config/seed": 2,
            "last/loss": None,
            "last/reward": last["A/second"][-1][3],
            "best/reward": None,
            "best_step/reward": None,
        },
    ]


def test_a_real_run(smoke_log_dir: Path, tmp_path: Path) -> None:
    assert run("smoke", "--logdir", str(smoke_log_dir), "--output", str(tmp_path), "--format", "parquet") == 0
    (row,) = pl.read_parquet(tmp_path / "runs.parquet").to_dicts()
    facts = json.loads((smoke_log_dir / "REINFORCE/smoke/run.json").read_text())
    assert {name: row[f"config/{name}"] for name in facts["config"]} == facts["config"]
    assert row["best/reward"] == facts["best"]["reward"]["value"]
    assert (row["status"], row["seed"], row["ended"]) == ("completed", 7, facts["ended"])
    written = [tuple(line[1:]) for line in pl.read_parquet(tmp_path / "scalars.parquet").rows()]
    assert written == accumulated(smoke_log_dir / "REINFORCE/smoke")


def test_hyperparameters_of_other_software(logs: Path) -> None:
    with SummaryWriter(str(logs / "torch")) as writer:
        writer.add_hparams({"lr": 0.1, "model": "mlp", "bias": True}, {"score": 2.0}, run_name="hp")
    assert run("torch/hp", "A/second", "--format", "parquet") == 0
    foreign, ours = pl.read_parquet("runs.parquet").to_dicts()
    assert (foreign["run"], foreign["status"], foreign["loop"]) == ("torch/hp", "foreign", None)
    assert (foreign["config/lr"], foreign["config/model"], foreign["config/bias"]) == (0.1, "mlp", True)
    assert foreign["last/score"] == 2
    assert (ours["config/lr"], ours["config/model"], ours["config/bias"]) == (1, None, None)


def test_options_of_several_types_and_of_none(logs: Path) -> None:
    values: list[Any] = [1, "one", None, [1, 2], True, 2**70, {"a": "é"}]
    for index, value in enumerate(values):
        write_run(logs, f"typed/{index}", {"a": [(1, 1.0)]}, {"mixed": value, "big": 2**2000 + index, "void": None})
    assert run("typed/*", "--format", "parquet") == 0
    table = pl.read_parquet("runs.parquet")
    assert table["config/mixed"].to_list() == ["1", "one", None, "[1, 2]", "true", str(2**70), '{"a": "\\u00e9"}']
    assert table["config/big"].to_list() == [str(2**2000 + index) for index in range(7)]
    assert table["config/void"].to_list() == [None] * len(values)


def test_names_and_tags_that_are_no_text(logs: Path) -> None:
    name = b"not-utf8-\xff".decode("utf-8", "surrogateescape")
    try:
        write_run(logs, name, {"a": [(1, 1.0)]})
    except OSError:
        pytest.skip("the file system takes no such name")
    assert run("not-utf8*") == 0
    assert scalars("csv")["run"].to_list() == [r"not-utf8-\udcff"]


def test_tags_are_chosen_by_name_and_by_pattern(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(logs, "B", {"a[0]": [(1, 1.0)], "a0": [(1, 1.0)], "train/x": [(1, 1.0)], "train/y": [(1, 1.0)]})
    assert run("B", "--tag", "a[0]", "--tag", "train/*") == 0
    assert scalars("csv")["tag"].to_list() == ["a0", "a[0]", "train/x", "train/y"]
    assert run("B", "--tag", "train/x", "--tag", "trian/y", "--overwrite") == 2
    assert capsys.readouterr().err == ("rlboard: --tag trian/y matches no tag: did you mean train/y, train/x?\n")
    assert scalars("csv")["tag"].to_list() == ["train/x"]
    before = Path("scalars.csv").read_bytes()
    assert run("B", "--tag", "zzz", "--overwrite") == 2
    assert capsys.readouterr().err == "rlboard: --tag zzz matches no tag: there is a0, a[0], train/x, train/y\n"
    assert Path("scalars.csv").read_bytes() == before


def test_names_that_mean_no_run_or_several(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (complaint,) = select(find_runs(logs), ["A/"])[1]
    assert run("first", "secnod", "A/") == 2
    assert capsys.readouterr().err.splitlines() == [
        "rlboard: RUN secnod is not there: did you mean A/second?",
        f"rlboard: {complaint}",
    ]
    assert scalars("csv")["run"].unique().to_list() == ["A/first"]
    assert run("none", "--output", "elsewhere") == 2
    assert not Path("elsewhere").exists()


def test_of_a_damaged_file_the_rest_is_exported(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(logs, "damaged", {"a": [(step, float(step)) for step in range(100)]})
    flip_a_byte(path, path.stat().st_size // 2)
    with path.open("ab") as file:
        file.write(b"a record that is still being written")
    assert run() == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"rlboard: {path} is damaged, ")
    steps = scalars("csv").filter(run="damaged")["step"].to_list()
    assert len(steps) == 99
    assert steps == sorted(set(range(100)) & set(steps))
    assert len(scalars("csv").filter(run="A/first")) == 70


def test_of_a_file_that_cannot_be_read_the_rest_is_exported(
    logs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = write_run(logs, "two files", {"a": [(1, 1.0)]})
    write_run(logs, "two files", {"a": [(2, 2.0)]})
    honest = read_scalars

    def refused(path: Path) -> Any:
        if path == locked:
            raise PermissionError(13, "Permission denied")
        return honest(path)

    monkeypatch.setattr(read, "read_scalars", refused)
    assert run("two files", "A/first") == 3
    assert capsys.readouterr().err == f"rlboard: {locked} cannot be read: Permission denied\n"
    assert scalars("csv").filter(run="two files")["step"].to_list() == [2]
    assert len(scalars("csv")) == 71


def test_a_damaged_run_json_is_said_and_the_scalars_are_there(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (logs / "A/first/run.json").write_text("{")
    assert run() == 3
    assert "run.json is damaged" in capsys.readouterr().err
    assert len(scalars("csv")) == 100
    assert pl.read_csv("runs.csv")["status"].to_list() == ["unreadable", "failed"]


@pytest.mark.usefixtures("logs")
def test_what_is_there_is_replaced_only_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs.csv").write_text("mine")
    assert run() == 2
    assert "runs.csv is there: give --overwrite to replace it, or another --output" in capsys.readouterr().err
    assert Path("runs.csv").read_text() == "mine"
    assert not Path("scalars.csv").exists()
    assert run("--output", "new/directory") == 0
    assert run("--overwrite") == 0
    assert len(pl.read_csv("runs.csv")) == 2


@pytest.mark.usefixtures("logs")
@pytest.mark.parametrize("extension", FORMATS)
@pytest.mark.parametrize(
    ("error", "code"), [(OSError(28, "No space left on device"), 5), (KeyboardInterrupt(), 130), (DataError("x"), 3)]
)
def test_what_fails_half_way_leaves_what_was_there(
    error: BaseException, code: int, extension: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("--format", extension) == 0
    before = {path: path.read_bytes() for path in Path().glob("*.*")}

    def failing(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(export, "BATCH_ROWS", 20)
    monkeypatch.setattr(export, "_row", failing)
    assert run("--format", extension, "--overwrite") == code
    assert {path: path.read_bytes() for path in Path().iterdir() if path != Path("logs")} == before
    assert len(before) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("extension", FORMATS)
def test_a_full_disk_is_one_line(
    logs: Path, extension: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = export.batches(find_runs(logs), [], read.Reader())
    write = export.WRITERS[extension]
    monkeypatch.setitem(export.WRITERS, extension, lambda *_: write_to_full(write, frames))
    assert run("--format", extension) == 5
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rlboard: --output . cannot be written: ")
    assert "No space left on device" in line
    assert list(Path().iterdir()) == [logs]


def write_to_full(write: Any, frames: Any) -> int:
    with Path("/dev/full").open("wb", buffering=0) as file:
        return int(write(file, frames))


@pytest.mark.usefixtures("logs")
@pytest.mark.parametrize("extension", ["csv", "json"])
def test_standard_output(extension: str, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert run("--format", extension, "--output", "directory") == 0
    capfdbinary.readouterr()
    assert run("--format", extension, "--output", "-") == 0
    assert capfdbinary.readouterr().out == Path(f"directory/scalars.{extension}").read_bytes()
    assert sorted(path.name for path in Path().iterdir()) == ["directory", "logs"]


@pytest.mark.usefixtures("logs")
def test_parquet_is_not_for_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--format", "parquet", "--output", "-") == 2
    assert "--output - is for text" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_traceback(logs: Path) -> None:
    write_run(logs, "long", {"a": curve(20_000)})
    command = [sys.executable, "-m", "rlboard", "runs", "export", "--logdir", str(logs.absolute()), "--output", "-"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"run,tag,step,wall_time,value\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode in (1, 141)


def test_log_roots_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("empty", "foreign"):
        (tmp_path / name).mkdir()
    (tmp_path / "foreign/notes.txt").write_text("no run")
    (tmp_path / "file").touch()
    for name, code, words in (
        ("empty", 3, "holds no runs"),
        ("foreign", 3, "holds no runs"),
        ("missing", 2, "is not there"),
        ("file", 2, "is a file"),
    ):
        assert run("--logdir", str(tmp_path / name), "--output", str(tmp_path / "out")) == code
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_no_event_file_and_what_has_no_scalars(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (("text", b"not an event file at all " * 9), ("empty", b"")):
        (logs / name).mkdir()
        (logs / name / "events.out.tfevents.1").write_bytes(content)
    assert run("text", "empty") == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{logs / 'text/events.out.tfevents.1'} is damaged" in line
    assert scalars("csv").columns == COLUMNS
    assert len(scalars("csv")) == 0
    assert pl.read_csv("runs.csv")["run"].to_list() == ["text", "empty"]


@pytest.mark.usefixtures("logs")
def test_an_output_that_is_a_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("taken").touch()
    assert run("--output", "taken") == 2
    assert capsys.readouterr().err == "rlboard: --output taken is a file: give a directory\n"
    assert run("--output", "taken/below") == 5
