"""Embeddings for TensorBoard's Projector tab: points as raw float32, their labels, and all their images in one sprite.

torch's `add_embedding` spells every number out as text, and its second writer in a run forgets what the first has
configured. Here an embedding is one file of bytes, and configurations are merged.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import math
import re
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import text_format
from numpy.typing import NDArray
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

from rlboard.eventfile.summary import encode_jpeg, encode_png
from rlboard.files import replacing

SPRITE_LIMIT = 8192
"""Pixels: the widest and highest sprite that the Projector loads."""

_merging = threading.Lock()


def write_embedding(
    directory: Path,
    matrix: Any,
    metadata: Iterable[Any] | None = None,
    metadata_header: Sequence[str] | None = None,
    label_img: Any = None,
    tag: str = "default",
    step: int = 0,
) -> None:
    """Writes an embedding into the run in `directory`; the same tag and step once more replace it.

    The Projector lists only runs that have an event file, and shows the first 100,000 points.

    Args:
        directory: the run's own directory.
        matrix: (points, dimensions); a tensor or an array, stored as float32.
        metadata: for each point a label, or a sequence of as many labels as there are columns.
        metadata_header: the names of the columns; without it several columns are numbered. One column has no name.
        label_img: (points, channels, height, width) of 1, 3 or 4 channels; uint8, or floats from 0 to 1.
        tag: the name of the embedding.
        step: the training step it belongs to.

    Raises:
        ValueError: shapes that do not fit together, or more images than a sprite can hold.
    """
    points = np.ascontiguousarray(_array(matrix), dtype="<f4")
    if points.ndim != 2 or points.size == 0:
        raise ValueError(f"an embedding is a matrix of (points, dimensions), not of shape {points.shape}")
    labels = None if metadata is None else _tsv(metadata, metadata_header, len(points))
    images = None if label_img is None else _images(_array(label_img), len(points))

    folder = f"{step:05d}/{_file_name(tag)}"
    config = ProjectorConfig()
    embedding = config.embeddings.add(tensor_name=f"{tag}:{step:05d}", tensor_shape=points.shape)
    (directory / folder).mkdir(parents=True, exist_ok=True)
    if _reads_as_text(points):
        embedding.tensor_path = f"{folder}/tensors.tsv"
        table = io.StringIO()
        np.savetxt(table, points, fmt="%.9g", delimiter="\t")
        _replace(directory / embedding.tensor_path, table.getvalue().encode())
    else:
        embedding.tensor_path = f"{folder}/tensors.bytes"
        _replace(directory / embedding.tensor_path, points.data)
    if labels is not None:
        embedding.metadata_path = f"{folder}/metadata.tsv"
        _replace(directory / embedding.metadata_path, labels)
    if images is not None:
        # Thumbnails in colour are photographs mostly: as PNG they would be larger than the points.
        suffix, encode = ("jpg", encode_jpeg) if images.shape[1] == 3 else ("png", encode_png)
        embedding.sprite.image_path = f"{folder}/sprite.{suffix}"
        embedding.sprite.single_image_dim.extend((images.shape[3], images.shape[2]))
        _replace(directory / embedding.sprite.image_path, encode(_sprite(images)))
    # Last, so that no reader ever finds a name without its files.
    _merge(directory / "projector_config.pbtxt", config)


def _array(values: Any) -> NDArray[Any]:
    """Returns an array of a tensor on any device, or of what NumPy takes."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()  # NumPy has no bfloat16
    return np.asarray(values)


def _reads_as_text(points: NDArray[np.float32]) -> bool:
    """Says whether the bytes begin as valid UTF-8, as those of 0.0 and 2.0 do.

    The Projector reads any file as text first, and takes it for raw floats only if the decoder objects.
    """
    beginning = points.data.cast("B")[: 1 << 20]
    try:
        codecs.getincrementaldecoder("utf-8")().decode(beginning, len(beginning) == points.nbytes)
    except UnicodeDecodeError:
        return False
    return True


def _tsv(metadata: Iterable[Any], header: Sequence[str] | None, points: int) -> bytes:
    """Returns the metadata file: a row a point, and a header if and only if there are several columns."""
    if hasattr(metadata, "tolist"):
        metadata = metadata.tolist()
    rows = [row if isinstance(row, (list, tuple)) else [row] for row in metadata]
    columns = len(rows[0]) if rows else 0
    if len(rows) != points or any(len(row) != columns for row in rows):
        raise ValueError(f"{points} points need {points} rows of metadata, all with as many columns")
    if header is not None and len(header) != columns:
        raise ValueError(f"metadata of {columns} columns has a header of {len(header)}")
    if columns > 1:
        rows.insert(0, list(header or [f"column {number}" for number in range(1, columns + 1)]))
    lines = []
    for row in rows:
        line = "\t".join(re.sub(r"[\t\r\n]", " ", str(cell)) for cell in row)
        # The Projector skips blank lines, and every label after one would slip to the point before.
        lines.append(line if line.strip() else "(empty)" + line)
    return ("\n".join(lines) + "\n").encode(errors="replace")


def _images(images: NDArray[Any], points: int) -> NDArray[np.uint8]:
    """Returns the images of the points, checked, as uint8."""
    if images.ndim != 4 or len(images) != points or images.shape[1] not in (1, 3, 4) or images.size == 0:
        raise ValueError(
            f"{points} points need images of shape ({points}, 1 or 3 or 4, height, width), not {images.shape}"
        )
    most = (SPRITE_LIMIT // max(images.shape[2:])) ** 2
    if points > most:
        raise ValueError(
            f"{points} images of {images.shape[2]} x {images.shape[3]} pixels do not fit a sprite: at most {most} do"
        )
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind != "f":
        raise ValueError(f"images are uint8, or floats from 0 to 1, not {images.dtype}")
    levels = images.clip(0, 1)
    levels *= 255
    levels += 0.5
    with np.errstate(invalid="ignore"):  # NaN is no colour, and any will do
        return levels.astype(np.uint8)


def _sprite(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns all images in one, (rows x height, columns x width, channels), image 1 to the right of image 0.

    There are as many rows as columns, even empty ones: the Projector divides by the one where it means the other.
    """
    count, channels, height, width = images.shape
    side = math.isqrt(count - 1) + 1
    tiles = np.zeros((side * side, height, width, channels), np.uint8)
    tiles[:count] = images.transpose(0, 2, 3, 1)
    grid = tiles.reshape(side, side, height, width, channels).swapaxes(1, 2)
    return grid.reshape(side * height, side * width, channels)


def _file_name(tag: str) -> str:
    """Returns a name that is safe on every file system, and another one for every tag."""
    return f"{re.sub('[^0-9A-Za-z]+', '_', tag)[:40]}-{hashlib.sha256(tag.encode(errors='replace')).hexdigest()[:8]}"


def _merge(path: Path, addition: ProjectorConfig) -> None:
    """Adds embeddings to the configuration at `path`; those of the same name are replaced."""
    with _merging:
        config = ProjectorConfig()
        if path.exists():
            text_format.Parse(path.read_text(encoding="utf-8"), config)
        names = {embedding.tensor_name for embedding in addition.embeddings}
        kept = [embedding for embedding in config.embeddings if embedding.tensor_name not in names]
        del config.embeddings[:]
        config.embeddings.extend([*kept, *addition.embeddings])
        _replace(path, text_format.MessageToString(config, as_utf8=True).encode())


def _replace(path: Path, content: bytes | memoryview) -> None:
    with replacing(path, durable=False) as file:
        file.write(content)
