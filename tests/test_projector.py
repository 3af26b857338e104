"""What the Projector tab gets to see of an embedding."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from numpy.typing import NDArray
from PIL import Image
from tensorboard.plugins.projector.projector_config_pb2 import EmbeddingInfo, ProjectorConfig

from rlboard.eventfile import EventFile
from rlboard.projector import SPRITE_LIMIT, write_embedding
from tests.browser import chromium, tensorboard

RANDOM = np.random.default_rng(0)
POINTS = RANDOM.standard_normal((7, 5)).astype(np.float32)


def embeddings(directory: Path) -> dict[str, EmbeddingInfo]:
    config = text_format.Parse((directory / "projector_config.pbtxt").read_text("utf-8"), ProjectorConfig())
    found = {embedding.tensor_name: embedding for embedding in config.embeddings}
    assert len(found) == len(config.embeddings)
    return found


def only(directory: Path) -> EmbeddingInfo:
    (embedding,) = embeddings(directory).values()
    return embedding


def labels(directory: Path) -> list[list[str]]:
    """Returns the rows of the metadata as the Projector's script reads them: blank lines are skipped."""
    text = (directory / only(directory).metadata_path).read_text("utf-8")
    return [line.split("\t") for line in text.split("\n") if line.strip()]


def sprite(directory: Path) -> NDArray[np.uint8]:
    return np.asarray(Image.open(directory / only(directory).sprite.image_path))


@pytest.mark.parametrize(
    "matrix",
    [
        POINTS,
        POINTS.astype(np.float64),
        POINTS.astype(">f4"),
        np.asfortranarray(POINTS),
        torch.from_numpy(POINTS),
        torch.from_numpy(POINTS).requires_grad_(),
        POINTS.tolist(),
    ],
)
def test_the_matrix_is_stored_as_float32(tmp_path: Path, matrix: Any) -> None:
    write_embedding(tmp_path, matrix)
    embedding = only(tmp_path)
    assert embedding.tensor_name == "default:00000"
    assert list(embedding.tensor_shape) == [7, 5]
    stored = np.fromfile(tmp_path / embedding.tensor_path, "<f4").reshape(7, 5)
    assert (stored == POINTS).all()
    assert not list(tmp_path.rglob("*.tmp"))


def test_half_precision_tensors_are_widened(tmp_path: Path) -> None:
    matrix = torch.from_numpy(POINTS).bfloat16()
    write_embedding(tmp_path, matrix)
    stored = np.fromfile(tmp_path / only(tmp_path).tensor_path, "<f4")
    assert (stored == matrix.float().numpy().ravel()).all()


@pytest.mark.parametrize("shape", [(3,), (0, 2), (2, 0), (2, 2, 2)])
def test_what_is_no_matrix_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="matrix"):
        write_embedding(tmp_path, np.zeros(shape))
    assert not list(tmp_path.iterdir())


def test_labels_stay_with_their_points(tmp_path: Path) -> None:
    write_embedding(tmp_path, POINTS, ["a\tb", "c\nd\r\ne", "", " ", "개", 5, None])
    assert labels(tmp_path) == [["a b"], ["c d  e"], ["(empty)"], ["(empty) "], ["개"], ["5"], ["None"]]


def test_several_columns_have_a_header(tmp_path: Path) -> None:
    rows = [["cat", 1], ["", ""], ["dog", "\t"]]
    write_embedding(tmp_path, POINTS[:3], rows, ["na\tme", "number"])
    assert labels(tmp_path) == [["na me", "number"], ["cat", "1"], ["(empty)", ""], ["dog", " "]]
    write_embedding(tmp_path, POINTS[:3], rows)
    assert labels(tmp_path)[0] == ["column 1", "column 2"]


def test_one_column_has_no_header_for_the_projector_would_take_it_for_a_point(tmp_path: Path) -> None:
    write_embedding(tmp_path, POINTS[:2], ["cat", "dog"], ["name"])
    assert labels(tmp_path) == [["cat"], ["dog"]]


def test_labels_may_be_a_tensor(tmp_path: Path) -> None:
    write_embedding(tmp_path, POINTS[:2], torch.tensor([3, 4]))
    assert labels(tmp_path) == [["3"], ["4"]]


@pytest.mark.parametrize(("metadata", "header"), [(["a"], None), (["a"] * 8, None), ([["a", "b"]] * 7, ["one"])])
def test_metadata_must_fit(tmp_path: Path, metadata: list[Any], header: list[str] | None) -> None:
    with pytest.raises(ValueError, match="metadata"):
        write_embedding(tmp_path, POINTS, metadata, header)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 7])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (12, 6), (5, 9)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_tile_i_of_the_sprite_is_image_i(tmp_path: Path, channels: int, height: int, width: int, count: int) -> None:
    levels = np.linspace(0, 1, count * channels).reshape(count, channels, 1, 1)
    images = np.broadcast_to(levels, (count, channels, height, width)).astype(np.float32)
    write_embedding(tmp_path, POINTS[:count], label_img=torch.from_numpy(images.copy()))
    assert list(only(tmp_path).sprite.single_image_dim) == [width, height]
    pixels = sprite(tmp_path).reshape(sprite(tmp_path).shape[0], sprite(tmp_path).shape[1], channels)
    rows, columns = pixels.shape[0] // height, pixels.shape[1] // width
    assert rows == columns, "the Projector places tiles right only on a square grid"
    assert rows**2 >= count
    for i in range(count):
        top, left = i // columns * height, i % columns * width
        tile = pixels[top + 1 : top + height - 1, left + 1 : left + width - 1].astype(float)
        assert tile.mean((0, 1)) == pytest.approx(255 * levels[i].ravel(), abs=20 if channels == 3 else 0.51)


def test_sprites_without_loss_keep_every_pixel(tmp_path: Path) -> None:
    images = RANDOM.integers(0, 256, (4, 1, 5, 6), dtype=np.uint8)
    write_embedding(tmp_path, POINTS[:4], label_img=images)
    pixels = sprite(tmp_path)
    assert (pixels[:5, 6:12] == images[1, 0]).all()
    assert (pixels[5:, :6] == images[2, 0]).all()


def test_floats_outside_of_0_to_1_are_clipped(tmp_path: Path) -> None:
    images = np.array([-1, 2, np.nan, 0.5]).reshape(4, 1, 1, 1) * np.ones((1, 1, 2, 2))
    write_embedding(tmp_path, POINTS[:4], label_img=images)
    pixels = sprite(tmp_path)
    assert (pixels[0, 0], pixels[0, 2], pixels[2, 2]) == (0, 255, 128)


@pytest.mark.parametrize("shape", [(7, 8, 8), (6, 3, 8, 8), (7, 2, 8, 8), (7, 3, 0, 8)])
def test_images_must_fit(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="images of shape"):
        write_embedding(tmp_path, POINTS, label_img=np.zeros(shape, np.uint8))


def test_images_are_bytes_or_floats(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="int64"):
        write_embedding(tmp_path, POINTS, label_img=np.zeros((7, 3, 8, 8), np.int64))


def test_too_many_images_for_a_sprite_are_refused_with_the_number_that_fits(tmp_path: Path) -> None:
    size = SPRITE_LIMIT // 2
    images = np.broadcast_to(np.uint8(0), (5, 1, size, 1))
    with pytest.raises(ValueError, match="at most 4"):
        write_embedding(tmp_path, POINTS[:5], label_img=images)
    assert not list(tmp_path.iterdir())


def test_embeddings_of_other_tags_steps_and_writers_are_kept(tmp_path: Path) -> None:
    write_embedding(tmp_path, POINTS, tag="words", step=1)
    write_embedding(tmp_path, POINTS, tag="words", step=2)
    write_embedding(tmp_path, POINTS[:3], tag="images", step=2)
    write_embedding(tmp_path, POINTS[:2], tag="words", step=1)
    found = embeddings(tmp_path)
    assert {name: embedding.tensor_shape[0] for name, embedding in found.items()} == {
        "words:00002": 7,
        "images:00002": 3,
        "words:00001": 2,
    }
    assert len({embedding.tensor_path for embedding in found.values()}) == 3


def test_what_others_have_configured_is_kept(tmp_path: Path) -> None:
    (tmp_path / "projector_config.pbtxt").write_text(
        'model_checkpoint_path: "somewhere"\nembeddings { tensor_name: "theirs" tensor_path: "theirs.tsv" }\n'
    )
    write_embedding(tmp_path, POINTS)
    assert list(embeddings(tmp_path)) == ["theirs", "default:00000"]
    assert "somewhere" in (tmp_path / "projector_config.pbtxt").read_text()


def test_threads_do_not_overwrite_each_other(tmp_path: Path) -> None:
    threads = [
        threading.Thread(target=write_embedding, args=(tmp_path, POINTS), kwargs={"tag": f"tag {number}"})
        for number in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(embeddings(tmp_path)) == 16


TAGS = [
    "../../escape",
    "/etc/passwd",
    "a/b",
    "a_b",
    "A_B",
    "..",
    "",
    "임베딩",
    "😀",
    'quote" and \\',
    "new\nline",
    "x" * 300,
]


def test_no_tag_leaves_the_directory_or_meets_another(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for tag in TAGS:
        write_embedding(run, POINTS, tag=tag)
    assert list(embeddings(run)) == [f"{tag}:00000" for tag in TAGS]
    assert list(tmp_path.iterdir()) == [run]
    paths = [run / embedding.tensor_path for embedding in embeddings(run).values()]
    assert all(path.resolve().is_relative_to(run) for path in paths)
    assert len({str(path).lower() for path in paths}) == len(TAGS)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log root with one run of many embeddings."""
    root = tmp_path_factory.mktemp("projector")
    with EventFile(root / "run") as events:
        events.scalar("a", 1.0, 0)
    for tag in TAGS:
        write_embedding(root / "run", POINTS, tag=tag)
    for value in (0.0, 2.0, 0.5):
        write_embedding(root / "run", np.full((7, 5), value), tag=f"all {value}")
    images = RANDOM.random((7, 3, 16, 8))
    write_embedding(root / "run", POINTS, list("abcdefg"), label_img=images, tag="first in the list", step=3)
    return root


@pytest.fixture(scope="module")
def url(run: Path) -> Iterator[str]:
    with tensorboard(run) as address:
        yield address


def get(url: str, path: str, **query: Any) -> bytes:
    with urlopen(f"{url}/data/plugin/projector/{path}?{urlencode(query)}", timeout=30) as answer:
        content: bytes = answer.read()
    return content


def test_tensorboard_serves_what_was_written(url: str) -> None:
    for tag in TAGS:
        served = get(url, "tensor", run="run", name=f"{tag}:00000")
        assert (np.frombuffer(served, "<f4") == POINTS.ravel()).all()
    name = "first in the list:00003"
    assert get(url, "metadata", run="run", name=name).decode().split() == list("abcdefg")
    assert get(url, "sprite_image", run="run", name=name).startswith(b"\xff\xd8")
    infos = {info["tensorName"]: info for info in json.loads(get(url, "info", run="run"))["embeddings"]}
    assert infos[name]["tensorShape"] == [7, 5]


@pytest.mark.parametrize("value", [0.0, 2.0, 0.5])
def test_tensorboard_serves_numbers_whose_bytes_are_text(url: str, value: float) -> None:
    served = np.frombuffer(get(url, "tensor", run="run", name=f"all {value}:00000"), "<f4")
    assert served.tolist() == [value] * 35


@pytest.mark.slow
@pytest.mark.browser
def test_the_projector_shows_points_and_sprite(tmp_path: Path) -> None:
    with EventFile(tmp_path / "run") as events:
        events.scalar("a", 1.0, 0)
    magenta = np.broadcast_to(np.array([255, 0, 255], np.uint8).reshape(1, 3, 1, 1), (7, 3, 16, 8))
    write_embedding(tmp_path / "run", POINTS, list("abcdefg"), label_img=magenta)
    with chromium() as page, tensorboard(tmp_path) as url:
        page.goto(f"{url}/#projector")
        projector = page.frame_locator("iframe").frame_locator("iframe").locator("vz-projector")
        projector.get_by_text("Points: 7").wait_for()
        for _ in range(100):
            screen = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB"), int)
            drawn = np.count_nonzero(np.abs(screen - [255, 0, 255]).max(-1) < 40)
            if drawn:
                break
            page.wait_for_timeout(200)
        assert drawn > 7 * 4, "each point is drawn as its image"
