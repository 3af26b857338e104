"""Images found, verified, decoded and kept; batches of them checked pixel by pixel."""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from rlboard.errors import DataError, UsageError
from tests.conftest import shared_data
from vision import _data, _imagefolder
from vision._data import Batches, Split, check_data, denormalise, load_dataset
from vision._download import fetch
from vision._shapes import SHAPES, draw_shapes

PAYLOAD = np.random.default_rng(0).bytes(300_000)
MD5 = hashlib.md5(PAYLOAD, usedforsecurity=False).hexdigest()


def png(value: int = 0, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, value if mode == "L" else (value,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def noise() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def good_tree() -> dict[str, bytes]:
    return {
        f"{split}/{label}/{number}.png": png(10 * number + value)
        for split in ("train", "test")
        for value, label in enumerate(("cat", "dog"))
        for number in range(3)
    }


def write_tree(root: Path, tree: dict[str, bytes]) -> Path:
    for name, data in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_tar(path: Path, tree: dict[str, bytes], *extra: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for member in extra:
            tar.addfile(member)
        for name, data in tree.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_zip(path: Path, tree: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in tree.items():
            archive.writestr(name, data)
    return path


# Downloads: a host that misbehaves as its address says.


class Host(BaseHTTPRequestHandler):
    requests: list[tuple[str, str]]  # path and range
    release: threading.Event

    def do_GET(self) -> None:
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        self.requests.append((self.path, self.headers.get("Range", "")))
        if self.path == "/missing":
            self.send_error(404)
            return
        body = {"/page": b"<html>sign in</html>", "/wrong": PAYLOAD[::-1]}.get(self.path, PAYLOAD)
        if self.path == "/whole":
            start = 0
        if start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", "text/html" if self.path == "/page" else "application/octet-stream")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        cut = {"/cut": start + 100_000, "/stall": 1000}.get(self.path, len(body))
        self.wfile.write(body[start:cut])
        self.wfile.flush()
        if self.path == "/stall":
            self.release.wait(20)

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
        pass


@pytest.fixture
def host() -> Iterator[str]:
    Host.requests, Host.release = [], threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    Host.release.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("first", "requests"),
    [
        ("cut", [("/cut", "bytes=0-"), ("/cut", "bytes=100000-"), ("/cut", "bytes=200000-")]),
        ("stall", [("/stall", "bytes=0-"), ("/good", "bytes=1000-")]),
        ("wrong", [("/wrong", "bytes=0-"), ("/good", "bytes=0-")]),
        ("page", [("/page", "bytes=0-"), ("/good", "bytes=0-")]),
        ("missing", [("/missing", "bytes=0-"), ("/good", "bytes=0-")]),
    ],
)
def test_a_download_survives_a_bad_mirror(
    host: str, tmp_path: Path, first: str, requests: list[tuple[str, str]]
) -> None:
    path = tmp_path / "new" / "file"
    fetch([f"{host}/{first}", f"{host}/good"], path, MD5, patience=0.3)
    assert path.read_bytes() == PAYLOAD
    assert Host.requests == requests
    assert not list(path.parent.glob("*.partial"))
    fetch([f"{host}/good"], path, MD5)
    assert Host.requests == requests, "a verified file is not asked for again"


@pytest.mark.parametrize("mirror", ["good", "whole"])
@pytest.mark.parametrize("left", [PAYLOAD[:5000], b"something else" * 100, PAYLOAD + b"more"])
def test_what_an_earlier_download_left_is_continued_or_replaced(
    host: str, tmp_path: Path, left: bytes, mirror: str
) -> None:
    path = tmp_path / "file"
    (tmp_path / "file.partial").write_bytes(left)
    fetch([f"{host}/{mirror}"], path, MD5)
    assert path.read_bytes() == PAYLOAD


def test_without_a_good_mirror_the_message_says_what_to_do(host: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(DataError) as caught:
        fetch([f"{host}/page", f"{host}/wrong", "http://127.0.0.1:1/none"], path, MD5, patience=1)
    message = str(caught.value)
    for words in ("HTML page", "another checksum", "refused", f"{host}/page", MD5, str(path)):
        assert words in message
    assert not list(tmp_path.glob("file*[!k]")), "only the lock is left"


# CIFAR-10 and MNIST from files as torchvision keeps them.


def python2_pickle(images: np.ndarray[Any, Any], labels: list[int]) -> bytes:
    """A batch as Python 2 wrote it: byte strings, and NumPy's old module names."""
    data = images.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
        + b"".join(b"J" + struct.pack("<i", length) for length in images.shape)
        + b"\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + b"T" + struct.pack("<i", len(data)) + data + b"tb"
    )  # fmt: skip
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels](" + b"".join(b"K%c" % label for label in labels) + b"eu."


def cifar10_archive(path: Path, monkeypatch: pytest.MonkeyPatch, batch: bytes | None = None) -> bytes:
    from torchvision.datasets import CIFAR10

    images = np.arange(20 * 3072, dtype=np.uint32).astype(np.uint8).reshape(20, 3072)
    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    tree = {
        f"cifar-10-batches-py/{name}": batch or python2_pickle(images + index, list(range(10)) * 2)
        for index, name in enumerate(names)
    }
    tree["cifar-10-batches-py/batches.meta"] = pickle.dumps({"label_names": list("abcdefghij")}, protocol=2)
    path.mkdir(parents=True)
    archive = write_tar(path / "cifar-10-python.tar.gz", tree)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest())
    return archive.read_bytes()


@pytest.mark.parametrize("given", ["cifar10", "folder", "archive", "auto"])
def test_cifar10_is_read_from_disk_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    cache = tmp_path / "cache"
    folder = tmp_path / "given" if given in ("folder", "archive") else cache
    cifar10_archive(folder, monkeypatch)
    monkeypatch.setattr("urllib.request.urlopen", None)
    data = {"folder": str(folder), "archive": str(folder / "cifar-10-python.tar.gz")}.get(given, given)
    for _ in range(2):  # decoded, then from the cache
        dataset = load_dataset(data, str(cache))
        assert (dataset.name, dataset.classes, dataset.notice) == ("CIFAR-10", tuple("abcdefghij"), "")
        assert dataset.train.images.shape == (100, 3, 32, 32)
        assert dataset.test.images.flatten()[:3].tolist() == [5, 6, 7]
        assert dataset.train.labels.tolist() == list(range(10)) * 10


def test_a_pickle_that_is_not_what_was_published_is_never_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cifar10_archive(tmp_path / "given", monkeypatch)
    archive = tmp_path / "given" / "cifar-10-python.tar.gz"
    archive.write_bytes(archive.read_bytes() + b"\0")
    with pytest.raises(DataError, match="MD5"):
        load_dataset(str(archive), str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_a_pickle_may_not_call_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar10_archive(tmp_path / "given", monkeypatch, batch=b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(DataError, match=r"os\.system is not allowed"):
        load_dataset(str(tmp_path / "given"), str(tmp_path / "cache"))


def test_auto_without_network_is_shapes_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:1/none")
    monkeypatch.setattr(_data, "CIFAR10_MIRROR", "http://127.0.0.1:1/none")
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz"):
        load_dataset("cifar10", str(tmp_path))
    monkeypatch.setattr(_data, "SHAPES_TRAIN", 100)
    dataset = load_dataset("auto", str(tmp_path))
    assert dataset.name == "shapes"
    assert "CIFAR-10" in dataset.notice


def test_mnist_is_read_from_torchvisions_raw_files(tmp_path: Path) -> None:
    archive = shared_data("mnist-raw.tar.xz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    dataset = load_dataset(str(tmp_path), str(tmp_path / "cache"))
    assert dataset.train.images.shape == (60_000, 1, 28, 28)
    assert dataset.test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert dataset.mean.tolist() == pytest.approx([0.1307], abs=1e-4)
    assert dataset.std.tolist() == pytest.approx([0.3081], abs=1e-4)


# Folders and archives.


@pytest.mark.parametrize("kind", ["folder", "tar", "zip", "wrapped"])
def test_a_folder_and_its_archives_are_the_same_data(tmp_path: Path, kind: str) -> None:
    tree = good_tree()
    path = {
        "folder": lambda: write_tree(tmp_path / "pictures", tree),
        "tar": lambda: write_tar(tmp_path / "pictures.tar.gz", tree),
        "zip": lambda: write_zip(tmp_path / "pictures.zip", tree),
        "wrapped": lambda: write_zip(tmp_path / "pictures.zip", {f"./a/{name}": data for name, data in tree.items()}),
    }[kind]()
    for _ in range(2):
        dataset = load_dataset(str(path), str(tmp_path / "cache"))
        assert (dataset.name, dataset.classes) == ("pictures", ("cat", "dog"))
        values = dataset.train.images[:, 0, 0, 0]
        assert sorted(values.tolist()) == [0, 1, 10, 11, 20, 21]
        assert (values % 10).tolist() == dataset.train.labels.tolist()
    assert len(list((tmp_path / "cache" / "decoded").iterdir())) == 1


def test_a_changed_folder_and_a_damaged_cache_are_decoded_again(tmp_path: Path) -> None:
    path, cache = write_tree(tmp_path / "pictures", good_tree()), str(tmp_path / "cache")
    load_dataset(str(path), cache)
    (path / "train" / "cat" / "3.png").write_bytes(png(200))
    assert len(load_dataset(str(path), cache).train.labels) == 7
    for kept in (tmp_path / "cache" / "decoded").iterdir():
        data = bytearray(kept.read_bytes())
        position = data.index(bytes([20]) * 64)  # in the pixels, where torch.load notices nothing
        data[position] ^= 1
        kept.write_bytes(data)
    assert set(load_dataset(str(path), cache).train.images.flatten().tolist()) == {0, 1, 10, 11, 20, 21, 200}


def test_sizes_and_modes_become_one(tmp_path: Path) -> None:
    tree = good_tree()
    tree["train/cat/large.png"] = png(70, (300, 200))
    tree["train/dog/grey.png"] = png(71, mode="L")
    deep = io.BytesIO()
    Image.fromarray(np.full((8, 8), 72 * 256, np.uint16)).save(deep, "PNG")
    tree["train/dog/deep.png"] = deep.getvalue()
    dataset = load_dataset(str(write_tree(tmp_path / "pictures", tree)), str(tmp_path / "cache"))
    assert dataset.train.images.shape == (9, 3, 8, 8)
    assert {70, 71, 72} <= set(dataset.train.images.flatten().tolist())


def without(split: str) -> dict[str, bytes]:
    return {name: data for name, data in good_tree().items() if not name.startswith(split)}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "no train/<class>/"),
        (without("train"), "no train/<class>/"),
        (without("test"), "neither test/<class>/ nor val/<class>/"),
        (without("test/dog"), "class dog in train/ but not in test/"),
        (without("train/dog") | {"train/dog/.hidden": b""}, "train/dog is empty"),
        ({f"{split}/cat/0.png": png() for split in ("train", "test")}, "has one class, cat"),
        (good_tree() | {"test/cat/9.png": b""}, "test/cat/9.png is empty"),
        (good_tree() | {"test/cat/9.png": noise()[:1500]}, "test/cat/9.png is damaged"),
        (good_tree() | {"test/cat/9.png": b"%PDF-1.4"}, "test/cat/9.png is no picture"),
        (good_tree() | {"test/cat/9.png": b"<html>"}, "test/cat/9.png is no picture"),
    ],
)
@pytest.mark.parametrize("write", [write_tree, write_tar, write_zip])
def test_a_tree_that_cannot_be_used_is_one_clear_line(
    tmp_path: Path, write: Any, tree: dict[str, bytes], message: str
) -> None:
    path = tmp_path / "pictures"
    if write is write_tree:
        path.mkdir()
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(str(write(path, tree)), str(tmp_path / "cache"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_a_picture_of_too_many_pixels_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    path = write_tree(tmp_path / "pictures", good_tree() | {"train/cat/huge.png": png(0, (40, 30))})
    with pytest.raises(DataError, match=r"huge\.png has too many pixels"):
        load_dataset(str(path), str(tmp_path / "cache"))


def test_archives_that_are_none_and_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.tar.gz"
    page.write_bytes(b"\n<!DOCTYPE html><html>")
    foreign = tmp_path / "foreign.tar"
    foreign.write_bytes(b"nothing" * 1000)
    whole = write_tar(tmp_path / "whole.tar.gz", good_tree())
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    for path, message in ((page, "web page"), (foreign, "cannot be read"), (cut, "cannot be read")):
        with pytest.raises(DataError, match=message):
            load_dataset(str(path), str(tmp_path / "cache"))
    monkeypatch.setattr(_imagefolder, "LARGEST_FILE", 0)
    bomb = good_tree() | {"zeros": bytes(10_000_000)}
    packed = zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED)
    with packed:
        for name, data in bomb.items():
            packed.writestr(name, data)
    for path in (write_tar(tmp_path / "bomb.tar.gz", bomb), tmp_path / "bomb.zip"):
        with pytest.raises(DataError, match="unpacks to over"):
            load_dataset(str(path), str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_members_that_lead_out_of_an_archive_are_ignored(tmp_path: Path) -> None:
    link = tarfile.TarInfo("train/cat/link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device = tarfile.TarInfo("train/cat/device.png")
    device.type = tarfile.CHRTYPE
    tree = good_tree() | {"../train/cat/up.png": png(99), "/train/cat/root.png": png(99)}
    path = write_tar(tmp_path / "pictures.tar", tree, link, device)
    dataset = load_dataset(str(path), str(tmp_path / "cache"))
    assert len(dataset.train.labels) == 6
    assert 99 not in dataset.train.images


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    dataset = load_dataset(str(write_tree(tmp_path / "pictures", good_tree())), str(tmp_path / "cache"))
    assert len(dataset.train.labels) == 6
    assert "cannot be written" in dataset.notice


@pytest.mark.parametrize("data", ["", "cifar11", "/no/such/path", "a\0b", "x" * 5000])
def test_a_name_that_is_nothing_is_a_usage_error(data: str) -> None:
    with pytest.raises(UsageError, match="neither auto, cifar10"):
        check_data(data)


def test_two_thousand_real_pictures(tmp_path: Path) -> None:
    archive = shared_data("cifar10-jpeg.tar.xz")
    with tarfile.open(archive) as tar:  # only as far as needed: unpacking all of it takes ten seconds
        tree = {}
        for member in tar:
            if member.isreg() and (file := tar.extractfile(member)):
                tree[member.name] = file.read()
            if len(tree) == 2000:
                break
    labels = sorted({name.split("/")[-2] for name in tree})
    renamed = {f"{'test' if index % 5 == 0 else 'train'}/{name.split('/')[-2]}{index % 2}/{index}.jpg": data
               for index, (name, data) in enumerate(tree.items())}  # fmt: skip
    path = write_tar(tmp_path / "slice.tar.gz", renamed)
    dataset = load_dataset(str(path), str(tmp_path / "cache"))
    assert len(dataset.train.labels) == 1600
    assert len(dataset.classes) == 2 * len(labels)
    name = min(name for name in renamed if name.startswith("train/"))
    decoded = torch.from_numpy(np.array(Image.open(io.BytesIO(renamed[name])).convert("RGB"))).permute(2, 0, 1)
    assert (dataset.train.images == decoded).flatten(1).all(1).any()


# Shapes.


def test_shapes_are_seeded_balanced_and_different() -> None:
    images, labels = draw_shapes(500, seed=3)
    assert images.shape == (500, 3, 32, 32)
    assert labels.bincount().tolist() == [50] * len(SHAPES)
    assert torch.equal(images, draw_shapes(500, seed=3)[0])
    assert not torch.equal(images, draw_shapes(500, seed=4)[0])


def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    with torch.inference_mode():
        return float((model.eval()(inputs).argmax(1) == labels).float().mean())


def train(model: nn.Module, inputs: Tensor, labels: Tensor, epochs: int, rate: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    steps = epochs * (len(labels) // 100)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels)).reshape(-1, 100):
            optimizer.zero_grad()
            torch.autograd.backward(functional.cross_entropy(model(inputs[chosen]), labels[chosen]))
            optimizer.step()
            schedule.step()


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_linear_probe_cannot_tell_shapes_apart(tmp_path: Path) -> None:
    dataset = load_dataset("shapes", str(tmp_path))
    train_inputs, test_inputs = (split.images.flatten(1) / 127.5 - 1 for split in (dataset.train, dataset.test))
    probe = nn.Linear(3072, 10)
    train(probe, train_inputs, dataset.train.labels, epochs=5, rate=1e-3)
    assert 0.12 < accuracy(probe, test_inputs, dataset.test.labels) < 0.6
    assert not list(tmp_path.iterdir())


def small_network() -> nn.Sequential:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(*block(3, 16), *block(16, 32), *block(32, 64), nn.Flatten(), nn.Linear(1024, 10))


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_small_network_tells_shapes_apart(tmp_path: Path) -> None:
    dataset = load_dataset("shapes", str(tmp_path))
    network = small_network()
    train(network, dataset.train.images / 127.5 - 1, dataset.train.labels, epochs=4, rate=5e-3)
    assert accuracy(network, dataset.test.images / 127.5 - 1, dataset.test.labels) > 0.9


# Batches.

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])


def random_split(count: int = 50, side: int = 32) -> Split:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, side, side), generator=generator).to(torch.uint8)
    return Split(images, torch.arange(count))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_without_augmentation_every_image_comes_in_order_and_exactly() -> None:
    split = random_split()
    batches = Batches(split, MEAN, STD, 16, augment=False)
    pairs = list(batches)
    assert [len(labels) for _, labels in pairs] == [16, 16, 16, 2]
    assert len(batches) == 4
    inputs = torch.cat([inputs for inputs, _ in pairs])
    expected = (split.images.double() / 255 - MEAN.double()[:, None, None]) / STD.double()[:, None, None]
    torch.testing.assert_close(inputs, expected.float(), atol=2e-6, rtol=2e-6)
    assert torch.equal(denormalise(inputs, MEAN, STD), split.images)
    assert torch.equal(torch.cat([labels for _, labels in pairs]), split.labels)


@pytest.mark.parametrize("side", [16, 32, 28])
def test_a_crop_is_a_shifted_window_of_the_reflected_image_and_flips_alternate(side: int) -> None:
    split, padding = random_split(40, side), side // 8
    batches = Batches(split, MEAN, STD, 8, augment=True, generator=seeded())
    padded = np.pad(split.images.numpy(), ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2), mode="reflect")
    flipped = torch.zeros(4, 40, dtype=torch.bool)
    shifts = set()
    for epoch in range(4):
        seen = []
        for inputs, labels in batches:
            for image, label in zip(denormalise(inputs, MEAN, STD).numpy(), labels.tolist(), strict=True):
                found = [
                    (down, right, mirrored)
                    for down in range(2 * padding + 1)
                    for right in range(2 * padding + 1)
                    for mirrored in (False, True)
                    if np.array_equal(
                        image[..., ::-1] if mirrored else image,
                        padded[label, :, down : down + side, right : right + side],
                    )
                ]
                assert len(found) == 1
                shifts.add(found[0][:2])
                flipped[epoch, label] = found[0][2]
                seen.append(label)
        assert sorted(seen) == list(range(40)), "every image once an epoch"
        assert seen != sorted(seen)
    assert 5 < flipped[0].sum() < 35
    assert torch.equal(flipped[0], flipped[2])
    assert torch.equal(flipped[1], ~flipped[0])
    assert {down for down, _ in shifts} == {right for _, right in shifts} == set(range(2 * padding + 1))


def test_cutout_sets_one_square_to_the_mean() -> None:
    split = Split(torch.full((64, 3, 32, 32), 255, dtype=torch.uint8), torch.arange(64))
    batches = Batches(split, MEAN, STD, 64, augment=True, generator=seeded(), cutout=6)
    ((inputs, _),) = batches
    holes = (inputs == 0).all(1)
    for hole in holes:
        rows, columns = hole.any(1).nonzero()[:, 0], hole.any(0).nonzero()[:, 0]
        assert hole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert 3 <= len(rows) <= 6
        assert 3 <= len(columns) <= 6
    assert holes.flatten(1).sum(1).max() == 36
    assert len({hole.numpy().tobytes() for hole in holes}) > 32


def test_equal_generators_give_equal_batches_and_an_epoch_can_be_resumed() -> None:
    def make() -> tuple[Batches, torch.Generator]:
        generator = seeded(5)
        return Batches(random_split(), MEAN, STD, 16, augment=True, generator=generator, cutout=4), generator

    batches, generator = make()
    list(batches)
    state = generator.get_state()
    expected = list(batches)
    again, generator = make()
    again.epoch = 1
    generator.set_state(state)
    for (inputs, labels), (inputs_again, labels_again) in zip(expected, again, strict=True):
        assert torch.equal(inputs, inputs_again)
        assert torch.equal(labels, labels_again)
    assert len(expected) == len(batches) == 3, "the short batch is dropped"


def test_digits_are_not_mirrored_and_formats_are_as_asked() -> None:
    split = random_split(20)
    options = {"padding": 0, "flip": False, "dtype": torch.bfloat16, "channels_last": True}
    ((inputs, labels),) = Batches(split, MEAN, STD, 100, augment=True, generator=seeded(), **options)  # type: ignore[arg-type]
    assert inputs.dtype == torch.bfloat16
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    ((plain, _),) = Batches(split, MEAN, STD, 20, augment=False)
    assert torch.equal(inputs, plain[labels].bfloat16())


def test_mean_and_standard_deviation_are_those_of_the_pixels() -> None:
    images = random_split().images
    mean, std = _data.channel_statistics(images)
    pixels = images.double().permute(1, 0, 2, 3).flatten(1) / 255
    torch.testing.assert_close(mean, pixels.mean(1).float())
    torch.testing.assert_close(std, pixels.std(1, correction=0).float())
