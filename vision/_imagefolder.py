"""Pictures sorted into class folders, as torchvision's ImageFolder expects them, or an archive of such a tree.

    train/<class>/<picture>        what is learned from
    test/<class>/<picture>         or val/: what is judged by

Nothing of an archive is unpacked to the disk: its members are read in memory, and their names only say which split
and class a picture belongs to. Links, devices and names that lead out of the archive are ignored.
"""

from __future__ import annotations

import hashlib
import itertools
import lzma
import os
import tarfile
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.progress import MofNCompleteColumn

from rlboard.config import printable
from rlboard.errors import DataError
from vision._download import progress_bar

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
LARGEST_FILE = 1 << 26  # bytes of one picture
LARGEST_RATIO = 100  # bytes that an archive may unpack to, for each of its own
LARGEST_SIDE = 64  # pixels: larger pictures are made smaller, so that a data set fits a device as one tensor
SPLITS = ("train", "test", "val")

Pictures = NDArray[np.uint8]


@dataclass(frozen=True)
class ImageFolder:
    """Decoded pictures, (N, 3, side, side) RGB, and their labels, (N,).

    They are shuffled, always alike, so that the first of them are of every class.
    """

    classes: tuple[str, ...]
    train_images: Pictures
    train_labels: NDArray[np.int64]
    test_images: Pictures
    test_labels: NDArray[np.int64]


def checksum(path: Path) -> str:
    """SHA-256 of an archive's bytes; for a folder, of the names, sizes and times of its files.

    Raises:
        DataError: it cannot be read.
    """
    try:
        if path.is_file():
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        for name in _names_below(path):
            status = (path / name).stat()
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()
    except OSError as error:
        raise DataError(f"{printable(path, 200)} cannot be read: {error.strerror}") from error


def read_image_folder(path: Path) -> ImageFolder:
    """The pictures of a folder, a .zip or a .tar.*, as RGB squares of one size.

    The side is the one that most training pictures have, at most `LARGEST_SIDE`; the others are scaled to it, and
    what is not square loses its longer ends.

    Raises:
        DataError: it is no such tree, or a picture in it cannot be used; the message says which.
    """
    where = printable(path, 200)
    try:
        with _opened(path) as (names, read):
            tree = _tree(names)
            judged = _check_tree(tree, where)
            files = {split: _shuffled(tree[split]) for split in ("train", judged)}
            wanted = set(itertools.chain.from_iterable(files.values()))
            squares = _decode([name for name in names if name in wanted], read, where)
    except _UNREADABLE as error:
        raise DataError(f"{where} cannot be read ({printable(error) or type(error).__name__}): get it again") from error
    side = Counter(len(squares[name]) for name in files["train"]).most_common(1)[0][0]
    classes = tuple(sorted(tree["train"]))
    number = {name: classes.index(label) for split in files for label in classes for name in tree[split][label]}
    images = {split: _stack([squares[name] for name in names], side) for split, names in files.items()}
    labels = {split: np.array([number[name] for name in names]) for split, names in files.items()}
    return ImageFolder(classes, images["train"], labels["train"], images[judged], labels[judged])


_UNREADABLE = (OSError, EOFError, RuntimeError, tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error)

Tree = dict[str, dict[str, list[str]]]  # split, class, names of its pictures
Read = Callable[[str], bytes]


@contextmanager
def _opened(path: Path) -> Iterator[tuple[list[str], Read]]:
    """The names in a folder or archive, folders with a / at the end, and what reads the file of a name."""
    if path.is_dir():
        yield _names_below(path), lambda name: (path / name).read_bytes()
        return
    budget = LARGEST_FILE + LARGEST_RATIO * path.stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            _spend(budget, (info.file_size for info in archive.infolist()), path)
            yield archive.namelist(), archive.read
        return
    with path.open("rb") as file:
        if file.read(512).lstrip()[:1] == b"<":
            raise DataError(f"{printable(path, 200)} is a web page, not an archive: download the file behind it")
    files: dict[str, bytes] = {}  # still packed as pictures are: unpacking an .xz twice would take longer than decoding
    with tarfile.open(path) as tar:
        for member in _spending(budget, tar, path):
            if member.isreg() or member.isdir():
                files[member.name + "/" * member.isdir()] = _read_member(tar, member)
    yield list(files), files.__getitem__


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The bytes of a member, none of a folder and of a file that is too large for a picture."""
    file = tar.extractfile(member) if member.isreg() and member.size <= LARGEST_FILE else None
    data = file.read() if file else b""
    if file and len(data) != member.size:
        raise EOFError(f"{printable(member.name)} is cut short")
    return data


def _spend(budget: int, sizes: Iterable[int], path: Path) -> None:
    for total in itertools.accumulate(sizes):
        if total > budget:
            raise DataError(f"{printable(path, 200)} unpacks to over {budget >> 20:,} MiB: this is no set of pictures")


def _spending(budget: int, tar: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    """The members of `tar`, as long as together they stay within `budget` bytes."""
    total = 0
    for member in tar:
        total += member.size
        _spend(budget, [total], path)
        yield member


def _names_below(path: Path) -> list[str]:
    """Files and folders (with a / at the end) of the splits below `path`, sorted, relative to it."""
    names = []
    for split in SPLITS:
        for folder, folders, files in os.walk(path / split, followlinks=True):
            prefix = Path(folder).relative_to(path).as_posix()
            names += [f"{prefix}/{name}/" for name in folders] + [f"{prefix}/{name}" for name in files]
    return sorted(names)


def _tree(names: list[str]) -> Tree:
    """Split, class and pictures by the names; what lies before the split and below the class does not matter."""
    tree: Tree = {}
    for name in names:
        *folders, file = name.split("/")
        if name.startswith("/") or ".." in folders or "__MACOSX" in folders:
            continue
        start = next((index for index, folder in enumerate(folders) if folder in SPLITS), None)
        if start is None or len(folders) < start + 2:
            continue
        split, label = folders[start : start + 2]
        if not label.startswith("."):
            pictures = tree.setdefault(split, {}).setdefault(label, [])
            if file and file != "Thumbs.db" and not file.startswith("."):
                pictures.append(name)
    return tree


def _check_tree(tree: Tree, where: str) -> str:
    """The name of the split that is judged by, `test` or `val`.

    Raises:
        DataError: a split is missing, a class is empty, or the splits have different classes.
    """
    if "train" not in tree:
        raise DataError(f"{where} has no train/<class>/ folders: sort its pictures into train/ and test/ by class")
    judged = "test" if "test" in tree else "val"
    if judged not in tree:
        raise DataError(f"{where} has neither test/<class>/ nor val/<class>/ folders: move some pictures there")
    different = set(tree["train"]) ^ set(tree[judged])
    if different:
        name = min(different)
        there, missing = ("train", judged) if name in tree["train"] else (judged, "train")
        raise DataError(f"{where} has the class {printable(name)} in {there}/ but not in {missing}/: make them equal")
    for split in ("train", judged):
        for label, names in sorted(tree[split].items()):
            if not names:
                raise DataError(f"{where}: {split}/{printable(label)} is empty: put pictures there or remove it")
    if len(tree["train"]) < 2:
        raise DataError(f"{where} has one class, {printable(min(tree['train']))}: there is nothing to tell apart")
    return judged


def _shuffled(pictures: dict[str, list[str]]) -> list[str]:
    names = sorted(itertools.chain.from_iterable(pictures.values()))
    return [names[index] for index in np.random.default_rng(0).permutation(len(names))]


def _decode(names: list[str], read: Read, where: str) -> dict[str, Pictures]:
    """Name to picture, (side, side, 3), read in the order of `names`."""
    squares: dict[str, Pictures] = {}
    with (
        warnings.catch_warnings(),
        progress_bar(MofNCompleteColumn()) as bar,
        ThreadPoolExecutor() as pool,
    ):
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        task = bar.add_task("decoding", total=len(names))
        for start in range(0, len(names), 1024):
            block = names[start : start + 1024]
            places = [f"{where}: {printable(name, 100)}" for name in block]
            squares.update(zip(block, pool.map(_square, map(read, block), places), strict=True))
            bar.advance(task, len(block))
    return squares


def _square(data: bytes, place: str) -> Pictures:
    """A picture as an RGB square, (side, side, 3); `place` names it in errors."""
    if not data:
        raise DataError(f"{place} is empty: replace or remove it")
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            side = min(*image.size, LARGEST_SIDE)
            image.draft("RGB", (side, side))
            picture: Image.Image = image
            if image.mode.startswith("I;16"):  # `convert` would clip it to 255 instead of scaling it
                picture = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif image.mode == "P":
                picture = image.convert("RGBA")
            return np.asarray(ImageOps.fit(picture.convert("RGB"), (side, side), Image.Resampling.BICUBIC))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"{place} has too many pixels: make it smaller") from error
    except Exception as error:  # whatever Pillow's decoders raise about damaged data
        reason = "is no picture" if isinstance(error, UnidentifiedImageError) else f"is damaged ({error})"
        raise DataError(f"{place} {printable(reason)}: replace or remove it") from error


def _stack(squares: list[Pictures], side: int) -> Pictures:
    """One array, (N, 3, side, side)."""
    images = np.empty((len(squares), 3, side, side), np.uint8)
    for index, square in enumerate(squares):
        if len(square) != side:
            square = np.asarray(Image.fromarray(square).resize((side, side), Image.Resampling.BICUBIC))
        images[index] = square.transpose(2, 0, 1)
    return images
