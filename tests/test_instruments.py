"""What a loop hands over with its events arrives in the tab it is for, and a run can be heard."""

from __future__ import annotations

import io
import struct
import wave
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.mesh import metadata as mesh_metadata

from rlboard.eventfile import wav_summary
from rlboard.events import Embedding, Event, Events, Mesh, Sound
from rlboard.instruments import sound, tabs
from rlboard.run import Run
from rlboard.writer import open_writer

INSTRUMENTS = (tabs.more_histograms, tabs.more_text, tabs.embeddings, tabs.meshes, tabs.sounds, sound.sonification)


def logged(directory: Path, events: Events, run: Any = None) -> EventAccumulator:
    """What TensorBoard reads of `events` after they have gone through the instruments."""
    with open_writer(directory) as writer:
        run = run or SimpleNamespace(melody=[])
        run.writer = writer
        for instrument in INSTRUMENTS:
            events = instrument(events, cast("Run", run))
        for _ in events:
            pass
        assert writer.dropped == 0
    accumulator = EventAccumulator(str(directory), {"tensors": 0, "audio": 0, "histograms": 0})
    accumulator.Reload()
    return accumulator


def test_everything_an_event_carries_arrives(tmp_path: Path) -> None:
    vertices = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]], np.float32)
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    tone = np.sin(np.arange(400) / 5)
    event = Event(
        3,
        9,
        histograms={"scores": lambda: torch.tensor([-1.0, 2.0, 2.0])},
        texts={"table": lambda: "| a |\n|---|\n| 1 |"},
        embeddings={"words": lambda: Embedding(torch.eye(2), [["king", 1], ["queen", 2]], ["word", "count"])},
        meshes={
            "surface": lambda: Mesh(vertices, colors, np.array([[0, 1, 2]], np.int32)),
            "cloud": lambda: Mesh(vertices, colors),
        },
        sounds={"tone": lambda: Sound(tone, 8_000)},
    )
    found = logged(tmp_path, iter([event]))
    (histogram,) = found.Histograms("scores")
    assert (histogram.step, histogram.histogram_value.num, histogram.histogram_value.max) == (3, 3, 2.0)
    (text,) = found.Tensors("table/text_summary")
    assert text.tensor_proto.string_val[0].startswith(b"| a |")
    assert (tmp_path / "projector_config.pbtxt").read_text().count('tensor_name: "words:00003"') == 1
    (metadata,) = tmp_path.glob("00003/*/metadata.tsv")
    assert metadata.read_text() == "word\tcount\nking\t1\nqueen\t2\n"
    parts = {tag for tag in found.Tags()["tensors"] if tag.startswith(("surface", "cloud"))}
    assert parts == {"surface_VERTEX", "surface_FACE", "surface_COLOR", "cloud_VERTEX", "cloud_COLOR"}
    faces = found.Tensors("surface_FACE")[0].tensor_proto
    assert [size.size for size in faces.tensor_shape.dim] == [1, 1, 3]
    assert found.SummaryMetadata("surface_FACE").plugin_data.plugin_name == mesh_metadata.PLUGIN_NAME
    (audio,) = found.Audio("tone")
    with wave.open(io.BytesIO(audio.encoded_audio_string)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 8_000)
        samples = np.frombuffer(file.readframes(400), "<i2")
    np.testing.assert_allclose(samples / 32767, tone, atol=1e-4)


def test_what_cannot_be_drawn_is_warned_of_once_and_costs_nothing_else(tmp_path: Path) -> None:
    def fail() -> Any:
        raise RuntimeError("no display")

    events = (Event(step, 2, texts={"bad": fail, "good": lambda: "fine"}) for step in (1, 2))
    with pytest.warns(RuntimeWarning, match="bad cannot be drawn on .*: no display") as caught:
        found = logged(tmp_path, events)
    assert len(caught) == 1
    assert [event.step for event in found.Tensors("good/text_summary")] == [1, 2]


def pitches(samples: np.ndarray[Any, Any], notes: int) -> list[float]:
    """The strongest frequency of each of so many notes, in Hertz."""
    parts = samples.reshape(notes, -1)
    size = 1 << 15
    spectra = np.abs(np.fft.rfft(parts, size))
    return [float(place) for place in spectra.argmax(axis=1) * sound.RATE / size]


def test_a_melody_rises_and_falls_with_the_curve() -> None:
    curve = [(0, 0.0), (10, 50.0), (20, 100.0), (30, 50.0), (40, float("nan"))]
    melody = sound.played(curve)
    low, middle, high, again, missing = pitches(melody.samples, 5)
    assert low == pytest.approx(220, rel=0.01)
    assert high == pytest.approx(880, rel=0.01)
    assert low < middle == again == missing < high
    assert np.abs(melody.samples).max() < 1
    assert melody.rate == sound.RATE


@pytest.mark.parametrize("values", [[1.0, 1.0], [float("nan"), float("inf")]])
def test_a_curve_that_says_nothing_is_one_note_repeated(values: list[float]) -> None:
    melody = sound.played(list(enumerate(values)))
    assert pitches(melody.samples, 2) == pytest.approx([220, 220], rel=0.01)


def test_a_run_is_heard_once_at_its_end_however_long_it_was(tmp_path: Path) -> None:
    run = SimpleNamespace(melody=[])

    def rising() -> Iterator[Event]:
        for step in range(10_000):
            yield Event(step, 10_000, {"reward": step / 7}, "reward")

    found = logged(tmp_path, rising(), run)
    assert len(run.melody) <= sound.MOST_POINTS
    (audio,) = found.Audio("Audio/reward")
    with wave.open(io.BytesIO(audio.encoded_audio_string)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    heard = pitches(samples, sound.MOST_NOTES)
    assert heard == sorted(heard)
    assert heard[-1] == pytest.approx(4 * heard[0], rel=0.01)


def test_one_result_is_no_melody(tmp_path: Path) -> None:
    found = logged(tmp_path, iter([Event(1, 2, {"reward": 1.0}, "reward"), Event(2, 2, {"loss": 1.0})]))
    assert found.Tags()["audio"] == []


def wav(*, channels: int = 1, width: int = 2, frames: int = 100) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(16_000)
        file.writeframes(bytes(channels * width * frames))
    return buffer.getvalue()


@pytest.mark.parametrize(("channels", "width"), [(1, 1), (2, 2), (6, 3), (2, 4)])
def test_a_wav_file_is_logged_as_it_is(channels: int, width: int, tmp_path: Path) -> None:
    path = tmp_path / "own.wav"
    path.write_bytes(wav(channels=channels, width=width))
    with open_writer(tmp_path / "run") as writer:
        writer.add_wav("Audio/own", path, 4)
        assert writer.dropped == 0
    found = EventAccumulator(str(tmp_path / "run"))
    found.Reload()
    (audio,) = found.Audio("Audio/own")
    assert audio.encoded_audio_string == path.read_bytes()
    assert (audio.step, audio.sample_rate, audio.length_frames) == (4, 16_000, 100)


FLOATS = struct.pack(
    "<4sI4s4sIHHIIHH4sI4s", b"RIFF", 40, b"WAVE", b"fmt ", 16, 3, 1, 8, 32, 4, 32, b"data", 4, b"\0" * 4
)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "it ends early"),
        (b"RIFFxxxx", "not a WAV file"),
        (b"ID3" + bytes(99), "not a WAV file"),
        (FLOATS, "unknown format: 3"),
        (wav()[:-9], "ends early"),
        (wav(frames=0), "without sound"),
    ],
)
def test_a_wav_file_that_cannot_be_read_is_refused(content: bytes, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        wav_summary("tag", content)
