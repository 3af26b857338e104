"""Runs as tables for other software: every scalar of every run in one, the runs themselves in the other.

`scalars` has a row a point (run, tag, step, wall_time, value), sorted by run and tag, and then as in the file. `runs`
has a row a run: how it went, its configuration, and of each metric the last value and, where noted, the best.

Rows are made and written a batch at a time, so that memory is bounded by the scalars of the largest run.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from polars.io.plugins import register_io_source

from rlboard.config import printable
from rlboard.errors import StorageError, UsageError
from rlboard.eventfile import ScalarColumns
from rlboard.files import replacing
from rlboard.runs.find import LoggedRun
from rlboard.runs.read import Reader, find_some, foreign_config, matches, unknown_tags

STANDARD_OUTPUT = "-"
BATCH_ROWS = 1 << 18
SCALARS = pl.Schema(
    {"run": pl.String, "tag": pl.String, "step": pl.Int64, "wall_time": pl.Float64, "value": pl.Float64}
)

Row = dict[str, Any]
"""A run's row: column to value."""


def export_runs(
    root: Path, names: Sequence[str], output: str, extension: str, tags: Sequence[str], overwrite: bool
) -> int:
    """Writes the tables of the runs below `root` that `names` mean, and says where; returns the exit code.

    Args:
        root: the log root.
        names: see `find.select`; none for all.
        output: the directory of `scalars.<extension>` and `runs.<extension>`; `-` sends scalars to standard output.
        extension: one of `WRITERS`.
        tags: only tags that are, or fit, one of these; none for all.
        overwrite: whether files that are there are replaced.

    Raises:
        UsageError: `root` or `output` cannot be used, or no tag matches; nothing is written.
        DataError: there are no runs.
        StorageError: the files cannot be written; what was there before is intact.
    """
    if output == STANDARD_OUTPUT and extension == "parquet":
        raise UsageError("--output - is for text: give a directory, or --format csv or json")
    directory = Path(output)
    paths = [directory / f"{name}.{extension}" for name in ("scalars", "runs")]
    taken = [path for path in paths if os.path.lexists(path)]
    if taken and not overwrite and output != STANDARD_OUTPUT:
        raise UsageError(f"{printable(taken[0], 200)} is there: give --overwrite to replace it, or another --output")
    reader = Reader()
    runs = reader.choose(find_some(root), names)
    if not runs:
        return reader.exit_code
    rows: list[Row] = []
    write = WRITERS[extension]
    if output == STANDARD_OUTPUT:
        with open(sys.stdout.fileno(), "wb", closefd=False) as pipe:  # sys.stdout.buffer may write in part under -u
            write(pipe, batches(runs, tags, reader))
        return reader.exit_code
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with replacing(paths[0], contested=True) as scalars, replacing(paths[1], contested=True) as table:
            points = write(scalars, batches(runs, tags, reader, rows))
            write(table, iter([table_of(rows)]))
    except FileExistsError:
        raise UsageError(f"--output {printable(output, 200)} is a file: give a directory") from None
    except (OSError, pl.exceptions.ComputeError) as error:
        reason = getattr(error, "strerror", None) or printable(error, 200)
        raise StorageError(f"--output {printable(output, 200)} cannot be written: {reason}") from None
    some = " and ".join(printable(path, 200) for path in paths)
    sys.stdout.write(f"{len(rows):,} runs and {points:,} points written to {some}\n")
    return reader.exit_code


def batches(
    runs: Sequence[LoggedRun], tags: Sequence[str], reader: Reader, rows: list[Row] | None = None
) -> Iterator[pl.DataFrame]:
    """The scalars of `runs`, all of them or those that `tags` match, in frames of the columns `SCALARS`.

    A row for each run is appended to `rows`, which is whole when the last frame has been taken.

    Raises:
        UsageError: no tag of any run matches.
    """
    waiting: list[pl.DataFrame] = []
    count = 0
    met: set[str] = set()
    for run, files in reader.each(runs):
        met.update(tag for columns in files for tag in columns)
        last: dict[str, float] = {}
        for frame in _by_tag(run, files, tags, last):
            waiting.append(frame)
            count += len(frame)
            if count >= BATCH_ROWS:
                yield pl.concat(waiting)
                waiting, count = [], 0
        if rows is not None:
            rows.append(_row(run, last))
    complaints = unknown_tags(tags, sorted(met))
    if complaints and len(complaints) == len(tags):
        raise complaints[0]
    for complaint in complaints:
        reader.complain(complaint)
    yield pl.concat([SCALARS.to_frame(), *waiting])


def _by_tag(
    run: LoggedRun, files: Sequence[ScalarColumns], tags: Sequence[str], last: dict[str, float]
) -> Iterator[pl.DataFrame]:
    """A run's scalars by tag and then as in its files; notes in `last` the last value of each tag."""
    found = sorted({tag for columns in files for tag in columns if not tags or matches(tag, tags)})
    if not found:
        return
    numbers = {tag: number for number, tag in enumerate(found)}
    narrow = np.int16 if len(found) < 2**15 else np.int32  # NumPy sorts these by radix
    code = _joined([np.array([numbers.get(tag, -1) for tag in part.tags], narrow)[part.code] for part in files if part])
    step, wall_time, value = (
        _joined([getattr(part, name) for part in files if part]) for name in ("step", "wall_time", "value")
    )
    order = np.argsort(code, kind="stable")
    starts = np.searchsorted(code, np.arange(len(found) + 1), sorter=order)
    last |= zip(found, value[order[starts[1:] - 1]].tolist(), strict=True)
    name = pl.Series([encodable(run.name)])
    names = pl.Series([encodable(tag) for tag in found])
    for start in range(int(starts[0]), len(order), BATCH_ROWS):
        some = order[start : start + BATCH_ROWS]
        yield pl.DataFrame(
            {
                "run": name.new_from_index(0, len(some)),
                "tag": names[code[some]],  # the method `gather` plans a query for each
                "step": step[some],
                "wall_time": wall_time[some],
                "value": value[some].astype(np.float64),
            }
        )


def _joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _row(run: LoggedRun, last: Mapping[str, float]) -> Row:
    facts, best = run.facts, run.facts.get("best")
    row: Row = {"run": run.name, "loop": run.loop or None, "status": run.status}
    row |= {name: facts.get(name) for name in ("seed", "started", "ended")}
    row |= {f"config/{name}": value for name, value in (run.config if facts else foreign_config(run)).items()}
    row |= {f"last/{tag}": value for tag, value in last.items()}
    for tag, noted in best.items() if isinstance(best, dict) else ():
        if isinstance(noted, dict):
            row |= {f"best/{tag}": noted.get("value"), f"best_step/{tag}": noted.get("step")}
    return row


def table_of(rows: Sequence[Row]) -> pl.DataFrame:
    """Rows as a frame of all their columns: what is known of a run first, then config, last, best and best_step."""
    kinds = {"config": 1, "last": 2, "best": 3, "best_step": 4}
    names = dict.fromkeys(name for row in rows for name in row)
    order = sorted(names, key=lambda name: (kinds.get(name.partition("/")[0], 0), name if "/" in name else ""))
    return pl.DataFrame([_column(encodable(name), [row.get(name) for row in rows]) for name in order])


def _column(name: str, values: list[Any]) -> pl.Series:
    """`values` as the narrowest type that holds them all; what has none, such as a list, as JSON."""
    kinds = {type(value) for value in values} - {type(None)}
    large = any(type(value) is int and not -(2**63) <= value < 2**63 for value in values)
    if kinds == {bool}:
        return pl.Series(name, values, pl.Boolean)
    if kinds == {int} and not large:
        return pl.Series(name, values, pl.Int64)
    if kinds and kinds <= {int, float} and not large:
        return pl.Series(name, [None if value is None else float(value) for value in values], pl.Float64)
    texts = [None if value is None else value if isinstance(value, str) else json.dumps(value) for value in values]
    return pl.Series(name, [None if text is None else encodable(text) for text in texts], pl.String)


def encodable(text: str) -> str:
    r"""`text` as UTF-8 can say it: a byte of a name that is not UTF-8 becomes `\udcff`, in letters."""
    return text.encode("utf-8", "backslashreplace").decode()


def _write_csv(file: IO[bytes], frames: Iterable[pl.DataFrame]) -> int:
    """A header and a line a row, as RFC 4180 quotes them; NaN and inf as such, and of what is not there nothing."""
    rows = 0
    for number, frame in enumerate(frames):
        text = io.BytesIO()  # polars writes to a file past Python, and its errors have no number
        frame.write_csv(text, include_header=number == 0)
        file.write(text.getbuffer())
        rows += len(frame)
    return rows


def _write_json(file: IO[bytes], frames: Iterable[pl.DataFrame]) -> int:
    """An array, a row a line; JSON has no NaN and no infinity, they become null."""
    rows = 0
    file.write(b"[")
    for frame in frames:
        if len(frame):
            text = io.BytesIO()
            frame.write_ndjson(text)
            file.write(b",\n" if rows else b"\n")
            file.write(text.getvalue().removesuffix(b"\n").replace(b"\n", b",\n"))  # none stands within a string
            rows += len(frame)
    file.write(b"\n]\n")
    return rows


def _write_parquet(file: IO[bytes], frames: Iterator[pl.DataFrame]) -> int:
    first = next(frames)
    rows = 0

    def source(*_: Any) -> Iterator[pl.DataFrame]:
        nonlocal rows
        for frame in chain([first], frames):
            rows += len(frame)
            yield frame

    register_io_source(source, schema=first.schema).sink_parquet(file)
    return rows


WRITERS: dict[str, Callable[[IO[bytes], Iterator[pl.DataFrame]], int]] = {
    "csv": _write_csv,
    "parquet": _write_parquet,
    "json": _write_json,
}
"""By the extension of the file; each writes the frames, of which there is at least one, and returns their rows."""
