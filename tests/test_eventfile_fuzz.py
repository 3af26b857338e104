"""Thousands of damaged and hostile event files: no crash, no hang, bounded memory, and what is whole is read.

The properties of `test_eventfile_read.py` hold for files whose checksums give the damage away. Here half of the damage
has right checksums: lengths that lie, records within records, and events that are broken inside. A file is made of
pieces, each a record of a real run as it was written or something else, so that it is known what must survive. The
files are read in a process of their own: it may not grow, and a case that takes too much of the processor kills it.
"""

from __future__ import annotations

import faulthandler
import itertools
import random
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event

from rlboard.eventfile import read_events, repair, verify, wire
from tests.conftest import ROOT
from tests.test_eventfile_read import both_ways, framed, header, keys, masked_crc, read_both, rows, rows_by_protobuf

CPU_SECONDS = 2.0  # for one case; processor time, since the machine may be busy with other things
MEMORY_BYTES = 64 << 20  # that reading files of some kilobytes may add to the process: lengths lie up to 2**64


class Piece(NamedTuple):
    """A stretch of a file: a record as it was written, or anything else."""

    data: bytes
    whole: bool = False


Damage = Callable[[random.Random, bytes], bytes]


def flip(generator: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        changed[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    return bytes(changed)


def cut(generator: random.Random, data: bytes) -> bytes:
    start, stop = span(generator, data)
    return data[:start] + data[stop:]


def insert(generator: random.Random, data: bytes) -> bytes:
    start, _ = span(generator, data)
    return data[:start] + generator.randbytes(generator.randint(1, 40)) + data[start:]


def double(generator: random.Random, data: bytes) -> bytes:
    start, stop = span(generator, data)
    return data[:stop] + data[start:]


def swap(generator: random.Random, data: bytes) -> bytes:
    first, second, third = sorted(generator.choices(range(len(data) + 1), k=3))
    return data[:first] + data[second:third] + data[first:second] + data[third:]


def zero(generator: random.Random, data: bytes) -> bytes:
    start, stop = span(generator, data)
    return data[:start] + bytes(stop - start) + data[stop:]


def long_varint(generator: random.Random, data: bytes) -> bytes:
    """A number that is large, negative or without end, where a message has lengths of its parts."""
    at = generator.randrange(len(data) + 1)
    back = generator.choice([11, generator.randint(1, 60)])  # 11 is to its own key: a loop without end
    numbers = [wire.varint(2 ** generator.randint(7, 62)), wire.varint(-back), b"\x80" * 12]
    return data[:at] + generator.choice(numbers) + data[at + generator.randint(0, 1) :]


def span(generator: random.Random, data: bytes) -> tuple[int, int]:
    start = generator.randrange(len(data) + 1)
    return start, min(len(data), start + generator.choice([1, 4, 12, 40, 400]))


DAMAGES: list[Damage] = [flip, cut, insert, double, swap, zero]

Mutation = Callable[[random.Random, list[Piece]], None]


def damage(generator: random.Random, pieces: list[Piece]) -> None:
    """One to three neighbours lose or gain some bytes, as a disk or a network does it."""
    first = generator.randrange(len(pieces))
    stop = first + generator.randint(1, 3)
    data = b"".join(piece.data for piece in pieces[first:stop])
    pieces[first:stop] = [Piece(generator.choice(DAMAGES)(generator, data))] if data else []


def tear(generator: random.Random, pieces: list[Piece]) -> None:
    """The file ends somewhere."""
    last = generator.randrange(len(pieces))
    data = pieces[last].data
    pieces[last:] = [Piece(data[: generator.randrange(len(data) + 1)])]


def rearrange(generator: random.Random, pieces: list[Piece]) -> None:
    """A record somewhere else, there twice, or gone."""
    piece = generator.choice(pieces)
    if generator.random() < 0.6:
        pieces.remove(piece)
    if generator.random() < 0.6:
        pieces.insert(generator.randrange(len(pieces) + 1), piece)


def forge(generator: random.Random, pieces: list[Piece]) -> None:
    """An event that is broken inside, in a record with right checksums."""
    at = generator.randrange(len(pieces))
    payload = pieces[at].data[12:-4]
    for _ in range(generator.randint(1, 3)):
        payload = generator.choice([*DAMAGES, long_varint])(generator, payload) if payload else b"\x2a"
    pieces[at] = Piece(framed([payload]))


def lie(generator: random.Random, pieces: list[Piece]) -> None:
    """A length that is wrong, with the right checksum, in the place of the true one or before it."""
    at = generator.randrange(len(pieces))
    data = pieces[at].data
    behind = sum(len(piece.data) for piece in pieces[at + 1 :])
    true = len(data) - 16
    length = generator.choice(
        [
            *(0, 1, true - 1, true + 1, true + behind, true + behind + 1, 2 * true + 16, true + 1000),
            *(2**31 - 1, 2**31, 2**32 + true, 2**63 - 1, 2**63, 2**64 - 1),
        ]
    )
    rest = data[12:] if generator.random() < 0.7 else data
    pieces[at] = Piece(header(max(0, length)) + rest)


def swallow(generator: random.Random, pieces: list[Piece]) -> None:
    """Some records as the payload of one, which may be cut off."""
    first = generator.randrange(len(pieces))
    stop = first + generator.randint(1, 4)
    outer = framed([b"".join(piece.data for piece in pieces[first:stop])])
    pieces[first:stop] = [Piece(outer[: generator.choice([len(outer), len(outer) - 4, 12])])]


def flood(generator: random.Random, pieces: list[Piece]) -> None:
    """Many headers, each of which claims much of what follows; or bytes of one kind."""
    at = generator.randrange(len(pieces) + 1)
    count = generator.randint(2, 200)
    flooded = generator.choice([header(generator.randrange(3000)) * count, framed([b""] * count), bytes(16 * count)])
    pieces.insert(at, Piece(flooded))


MUTATIONS: list[Mutation] = [damage, damage, damage, tear, rearrange, forge, forge, lie, lie, swallow, flood]


def mutated(records: Sequence[bytes], case: int) -> list[Piece]:
    """The pieces of a file to which one to five things happened; the same for the same case."""
    generator = random.Random(case)
    pieces = [Piece(record, whole=True) for record in records]
    for _ in range(generator.randint(1, 5)):
        if pieces:
            generator.choice(MUTATIONS)(generator, pieces)
    return pieces


# What must hold.


def header_at(data: bytes, at: int) -> bool:
    """Whether a valid header stands at `at`, or the file ends before it could."""
    header = data[at : at + 12]
    return len(header) < 12 or (header[6:8] == b"\0\0" and header[8:] == masked_crc(header[:8]))


def claims(data: bytes, starts: Container[int]) -> list[tuple[int, int]]:
    """Where valid headers stand but at `starts`, and where the records would end that they promise."""
    found = []
    at = -1
    while (at := data.find(b"\0\0", at + 1, len(data) - 4)) >= 0:  # the last two bytes of a length that is believed
        start = at - 6
        if start >= 0 and start not in starts and header_at(data, start):
            found.append((start, start + struct.unpack_from("<Q", data, start)[0] + 16))
    return found


def survivors(pieces: Sequence[Piece], *, finished: bool) -> list[bytes]:
    """The records that may not be lost: left as they were, and not within what a valid header elsewhere promises.

    Such a promise is believed if another header follows it, or the file ends; in a file that somebody may still write
    also if it goes beyond its end. Where there are very many, all are believed, so that no file takes quadratic time.
    """
    data = b"".join(piece.data for piece in pieces)
    starts = itertools.accumulate((len(piece.data) for piece in pieces), initial=0)
    whole = {start: piece.data for start, piece in zip(starts, pieces, strict=False) if piece.whole}
    promised = claims(data, whole)
    if sum(stop - start for start, stop in promised if stop <= len(data)) < 4 * len(data):
        promised = [
            (start, stop) for start, stop in promised if (header_at(data, stop) if stop <= len(data) else not finished)
        ]
    return [
        record
        for start, record in whole.items()
        if not any(first < start + len(record) and start < last for first, last in promised)
    ]


def records_of(data: bytes) -> list[bytes]:
    """The records of a file in which each is valid."""
    records = []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        record, data = data[: length + 16], data[length + 16 :]
        assert record == framed([record[12:-4]])
        records.append(record)
    return records


def assert_in_order(parts: Sequence[object], whole: Sequence[object]) -> None:
    """All `parts` are elements of `whole`, in this order."""
    remaining = iter(whole)
    for number, part in enumerate(parts):
        assert part in remaining, f"{part!r}, the {number}th of {len(parts)}, is missing or out of order"


def parsed(records: Sequence[bytes]) -> list[Event]:
    events = []
    for record in records:
        try:
            events.append(Event.FromString(record[12:-4]))
        except DecodeError:
            continue
    return events


def check(pieces: Sequence[Piece], directory: Path) -> None:
    """Reads, verifies and repairs the file of these pieces."""
    source, target = directory / "tfevents", directory / "repaired.tfevents"
    data = b"".join(piece.data for piece in pieces)
    source.write_bytes(data)

    columns, events = read_both(source), list(read_events(source))
    must = parsed(survivors(pieces, finished=False))
    simple = [event for event in must if any(value.HasField("simple_value") for value in event.summary.value)]
    assert_in_order(keys(rows_by_protobuf(simple)), keys(rows(columns)))
    assert_in_order(must, events)

    target.unlink(missing_ok=True)
    report, report_of_plain = both_ways(lambda: verify(source))
    assert report == report_of_plain
    lost = sum(damage.length for damage in report.damage)
    torn = 0 if report.torn_tail is None else report.size - report.torn_tail
    assert report.valid_bytes + lost + torn == report.size == len(data)
    must_be_kept = survivors(pieces, finished=True)
    if not report.records:
        assert not must_be_kept
        if data:
            with pytest.raises(ValueError, match="no valid record"):
                repair(source, target)
        return

    assert repair(source, target) == report
    assert source.read_bytes() == data
    kept = records_of(target.read_bytes())
    assert len(kept) == report.records
    at = 0
    for record in kept:
        at = data.index(record, at) + len(record)
    assert_in_order(must_be_kept, kept)
    assert verify(target).ok
    assert repair(target, target, overwrite=True).ok
    assert b"".join(kept) == target.read_bytes()

    repaired = read_both(target)
    assert keys(rows(repaired))[: len(rows(columns))] == keys(rows(columns))
    events = parsed(kept)
    assert [str(event) for event in read_events(target)] == [str(event) for event in events]  # a NaN equals nothing
    if len(events) == len(kept):
        assert keys(rows(repaired)) == keys(rows_by_protobuf(events))


def fuzz(base: str, directory: str, first: int, stop: int) -> None:
    """Checks these cases, and prints the number of each before: the last one printed is the one that failed."""
    import resource

    records = records_of(Path(base).read_bytes())
    check([Piece(record, whole=True) for record in records], Path(directory))  # all is imported and compiled by now
    in_use = 4096 * int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY_BYTES, resource.RLIM_INFINITY))
    faulthandler.register(signal.SIGPROF, chain=True)  # says where it hangs, in machine code too, and ends the process
    with mock.patch("os.fsync"):
        for case in range(first, stop):
            print(case, flush=True)  # noqa: T201
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            check(mutated(records, case), Path(directory))
    signal.setitimer(signal.ITIMER_PROF, 0)


# The tests.


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run with all that a writer writes."""
    import torch

    from rlboard.writer import open_writer

    directory = tmp_path_factory.mktemp("base")
    with open_writer(directory, clock=lambda: 1.7e9) as writer:
        for step in range(5):
            writer.add_scalar("reward", step / 7, step)
            writer.log(step, {"Loss/train": 1 / (step + 1), "보상": -step})
            writer.add_scalar("tensor", step / 3, step, new_style=True)
        writer.add_scalar_series("series", np.arange(3) * 10**6, np.arange(3.0))
        writer.add_histogram("weights", np.arange(20.0), 1)
        writer.add_image("image", np.zeros((3, 4, 4), np.uint8), 1)
        writer.add_text("note", "**bold**", 1)
        writer.add_hparams({"lr": 0.1, "on": True}, {"best": 1.0})
        writer.add_graph(torch.nn.Linear(2, 1), torch.zeros(1, 2))
    (path,) = directory.iterdir()
    return path


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells how much memory a process has")
@pytest.mark.parametrize(
    "cases",
    [(0, 30), *(pytest.param((first, first + 1000), marks=pytest.mark.slow) for first in range(0, 10_000, 1000))],
    ids=str,
)
def test_mutated_files(base: Path, tmp_path: Path, cases: tuple[int, int]) -> None:
    program = f"from tests.test_eventfile_fuzz import fuzz; fuzz({str(base)!r}, {str(tmp_path)!r}, *{cases})"
    answer = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    numbers = answer.stdout.split()
    assert answer.returncode == 0, f"case {numbers[-1:]}: {answer.stderr}"
    assert [int(number) for number in numbers] == list(range(*cases))
