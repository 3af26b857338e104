"""`rlboard vision embed`: the loss, the views, the neighbours, and points, labels and pictures read back."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from numpy.typing import NDArray
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.projector.projector_config_pb2 import EmbeddingInfo, ProjectorConfig
from torch import Tensor
from torch.nn import functional

from rlboard.checkpoint import CHECKPOINT, load, load_weights
from rlboard.cli import main
from rlboard.errors import UsageError
from rlboard.projector import SPRITE_LIMIT
from vision import _features
from vision._contrastive import Views, nt_xent, projection_head
from vision._data import Batches, Split, load_dataset
from vision._features import check_limit, extract, neighbour_votes, principal_components, tsne
from vision._models import build_model
from vision._saved import load_classifier
from vision.embed import Config, train

pytestmark = [
    pytest.mark.usefixtures("few_shapes", "one_thread"),
    pytest.mark.xdist_group("vision-runs"),  # where there is a classifier already; and scikit-learn starts slowly
]

IMAGES, SHOWN = 320, 100  # of a smoke run, and of these in the Projector


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log root with features that were trained in vision/embed/a."""
    root = tmp_path_factory.mktemp("embed") / "logs"
    assert main(["vision", "embed", "--smoke", "--threads=1", "--run-name=a", "--log-dir", str(root)]) == 0
    return root


def embedding(directory: Path) -> EmbeddingInfo:
    config = text_format.Parse((directory / "projector_config.pbtxt").read_text("utf-8"), ProjectorConfig())
    (only,) = config.embeddings
    return only


def metadata(directory: Path) -> list[list[str]]:
    text = (directory / embedding(directory).metadata_path).read_text("utf-8")
    return [line.split("\t") for line in text.splitlines()]


def tiles(directory: Path) -> NDArray[np.float32]:
    """The pictures of a sprite, row by row, (N, H, W, C)."""
    sprite = np.asarray(Image.open(directory / embedding(directory).sprite.image_path), np.float32)
    width, height = embedding(directory).sprite.single_image_dim
    grid = sprite.reshape(sprite.shape[0] // height, height, sprite.shape[1] // width, width, -1)
    return grid.swapaxes(1, 2).reshape(-1, *grid.shape[1::2], grid.shape[-1])


def test_nt_xent_is_the_mean_over_all_views_of_its_definition() -> None:
    projections, temperature = torch.randn(10, 4, dtype=torch.float64), 0.3
    losses = []
    for i in range(10):
        terms = {
            k: math.exp(functional.cosine_similarity(projections[i], projections[k], dim=0).item() / temperature)
            for k in range(10)
            if k != i
        }
        losses.append(-math.log(terms[(i + 5) % 10] / sum(terms.values())))
    assert nt_xent(projections, temperature).item() == pytest.approx(np.mean(losses), rel=1e-12)
    assert nt_xent(torch.ones(10, 4), temperature).item() == pytest.approx(math.log(9))
    apart = torch.eye(5).repeat(2, 1)
    assert nt_xent(apart, 0.01).item() < 1e-6, "each view finds its other half"


def ramp(count: int) -> Tensor:
    """Images (count, 1, 16, 16) whose values are the columns' places, from 0 to 1."""
    return ((torch.arange(16) + 0.5) / 16).expand(count, 1, 16, 16)


def test_views_are_windows_of_the_image_and_half_of_them_mirrored() -> None:
    views = Views(torch.Generator().manual_seed(0), flip=True, crop=0.25, color=0)(ramp(400))
    torch.testing.assert_close(views[:, :, :1].expand_as(views), views)  # columns stay columns
    widths = (views[:, 0, 0, -2] - views[:, 0, 0, 1]) * 16 / 13  # without the border, where the image ends
    assert 0.4 < (widths > 0).float().mean() < 0.6
    assert widths.abs().min() >= math.sqrt(0.25 * 3 / 4) - 1e-5
    assert widths.abs().max() <= 1 + 1e-5
    assert widths.abs().std() > 0.1
    unflipped = Views(torch.Generator().manual_seed(0), flip=False, crop=0.25, color=0)(ramp(400))
    assert (unflipped[:, 0, 0, -2] > unflipped[:, 0, 0, 1]).all()


def test_colours_of_views_change_image_by_image_and_some_are_lost() -> None:
    flat = torch.tensor([0.8, 0.4, 0.3])[:, None, None].expand(500, 3, 16, 16)
    recolour = Views(torch.Generator().manual_seed(0), flip=True, crop=1, color=0.5)
    views = recolour(flat)
    assert views.amin() >= 0
    assert views.amax() <= 1
    torch.testing.assert_close(views, views[..., :1, :1].expand_as(views))
    colours = views[..., 0, 0]
    assert (colours.std(dim=0) > 0.05).all()
    grey = (colours.amax(dim=1) - colours.amin(dim=1)) < 0.01
    assert 0.15 < grey.float().mean() < 0.25
    unchanged = (colours - flat[..., 0, 0]).abs().amax(dim=1) < 1e-3
    assert 0.1 < unchanged.float().mean() < 0.25


def test_hue_and_saturation_leave_the_lightness_as_it_is() -> None:
    views = Views(torch.Generator(), flip=False, crop=1, color=1)
    lightness = torch.tensor([0.299, 0.587, 0.114])
    pixels = torch.rand(3, 20)
    colours = views._colours(torch.tensor([0.0, 1.0, 1.7]), torch.tensor([0.5, 2.0, 0.0])) @ pixels
    torch.testing.assert_close(lightness @ colours, (lightness @ pixels).expand(3, -1), atol=1e-5, rtol=0)
    torch.testing.assert_close(colours[0, 0], colours[0, 2], atol=1e-3, rtol=0)
    nothing = views._colours(torch.ones(1), torch.zeros(1))[0]
    torch.testing.assert_close(nothing, torch.eye(3), atol=1e-5, rtol=0)


def test_equal_generators_give_equal_views() -> None:
    images = torch.rand(8, 3, 16, 16)
    one, same, other = (
        Views(torch.Generator().manual_seed(seed), flip=True, crop=0.2, color=0.5)(images) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("neighbours", "chunk"), [(1, 500), (5, 3), (99, 4)])
def test_neighbours_vote_as_by_brute_force(neighbours: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_features, "CHUNK", chunk)
    queries, bank, labels = torch.randn(10, 6), torch.randn(30, 6), torch.arange(30) % 4
    expected = torch.zeros(10, 4)
    for row, query in enumerate(queries):
        cosines = [functional.cosine_similarity(query, other, dim=0).item() for other in bank]
        nearest = sorted(range(30), key=lambda index: -cosines[index])[:neighbours]
        for index in nearest:
            expected[row, labels[index]] += math.exp(cosines[index] / 0.07)
    expected /= expected.sum(dim=1, keepdim=True)
    torch.testing.assert_close(neighbour_votes(queries, bank, labels, 4, neighbours), expected, atol=1e-4, rtol=1e-4)


def test_principal_components_are_the_directions_of_most_variance() -> None:
    points = torch.randn(60, 5, dtype=torch.float64) @ torch.diag(torch.tensor([5.0, 3.0, 1.0, 1.0, 0.1]).double())
    left, sizes, _ = torch.linalg.svd(points - points.mean(dim=0), full_matrices=False)
    expected = (left * sizes)[:, :2].float()
    found = principal_components(points)
    torch.testing.assert_close(found * (found * expected).sum(dim=0).sign(), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(principal_components(points), found)


def test_tsne_keeps_clusters_together() -> None:
    clusters = torch.arange(3).repeat_interleave(15)
    layout = tsne(100 * functional.one_hot(clusters, 8).float() + torch.randn(45, 8))
    nearest = torch.cdist(layout, layout).fill_diagonal_(math.inf).argmin(dim=1)
    assert torch.equal(clusters[nearest], clusters)


def test_the_sprite_has_the_limit_of_the_projector(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _features.SPRITE_SIDE == SPRITE_LIMIT
    monkeypatch.setattr(_features, "SPRITE_SIDE", 64)
    test = Split(torch.zeros(6, 3, 32, 20), torch.zeros(6))
    check_limit(0, test)
    check_limit(4, test)
    check_limit(9, Split(test.images[:4], test.labels[:4]))
    with pytest.raises(UsageError, match=r"--limit 5: the Projector can show 4 images of 32x20 pixels"):
        check_limit(5, test)


def test_tile_row_and_point_i_are_those_of_image_i(log_dir: Path) -> None:
    directory = log_dir / "vision/embed/a"
    dataset = load_dataset("shapes")
    images = dataset.test.images[:SHOWN].permute(0, 2, 3, 1).float().numpy()
    found = tiles(directory)[:SHOWN]
    distances = np.array([np.abs(tile - images).mean(axis=(1, 2, 3)) for tile in found])
    assert (distances.argmin(axis=1) == np.arange(SHOWN)).all()
    assert distances.diagonal().max() < 12, "JPEG, of noisy images"
    assert embedding(directory).tensor_name == f"Embeddings/test_set:{IMAGES // 64:05d}"
    assert list(embedding(directory).tensor_shape) == [SHOWN, 32]
    header, *rows = metadata(directory)
    assert header == ["label", "predicted", "correct", "confidence"]
    assert [row[0] for row in rows] == [dataset.classes[label] for label in dataset.test.labels[:SHOWN].tolist()]
    assert all((label == predicted) == (correct == "yes") for label, predicted, correct, _ in rows)
    assert all(0.1 <= float(confidence) <= 1 for *_, confidence in rows), "of ten classes, the likeliest"
    points = np.fromfile(directory / embedding(directory).tensor_path, "<f4").reshape(SHOWN, -1)
    weights = load(directory / CHECKPOINT)["model"]
    model = build_model("laptopnet", classes=10, width=8)
    model.head = projection_head(32)
    load_weights(model, weights)
    batches = Batches(
        Split(*(tensor[:SHOWN] for tensor in dataset.test)), dataset.mean, dataset.std, SHOWN, augment=False
    )
    assert points == pytest.approx(extract(model, batches)[0].numpy(), abs=1e-4)


def test_a_smoke_run_fills_the_tabs(log_dir: Path) -> None:
    run = EventAccumulator(str(log_dir / "vision/embed/a"), {"scalars": 0, "images": 0})
    run.Reload()
    tags = {"Loss/train_step", "Loss/train", "Learning_Rate", "Accuracy/knn", "Best/knn_accuracy"}
    assert tags <= set(run.Tags()["scalars"])
    assert set(run.Tags()["images"]) == {"Input/samples", "Embeddings/pca", "Embeddings/tsne"}
    steps = [event.step for event in run.Scalars("Accuracy/knn")]
    assert steps == [0, IMAGES // 64], "random weights, and the epoch"
    assert [event.step for event in run.Images("Embeddings/pca")] == steps
    for tag in ("Embeddings/tsne", "Embeddings/pca"):
        picture = Image.open(io.BytesIO(run.Images(tag)[-1].encoded_image_string))
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 10, "a colour for each class"
    assert run.Tags()["graph"]


def test_of_a_run_it_is_the_classifiers_own_features_and_beliefs(tmp_path: Path) -> None:
    command = ["vision", "train", "--smoke", "--images=100", "--threads=1", "--log=minimal", "--no-tta"]
    assert main([*command, "--log-dir", str(tmp_path), "--run-name=a"]) == 0
    run = tmp_path / "vision/train/a"
    events = list(train(Config(run=str(run), limit=50, threads=1)))
    assert not any(event.model or event.state for event in events), "nothing is trained, and nothing to be saved"
    accuracy = json.loads((run / "run.json").read_text())["best"]["Accuracy/val"]["value"]
    assert events[-1].scalars["Accuracy/val"] == pytest.approx(accuracy), "of the same images"
    points, rows, _, images = events[-1].embeddings["Embeddings/test_set"]()
    saved = load_classifier(str(run), torch.device("cpu"))
    test = Split(*(tensor[:50] for tensor in saved.dataset.test))
    batches = Batches(test, saved.dataset.mean, saved.dataset.std, 50, augment=False)
    features, logits = extract(saved.model, batches)
    torch.testing.assert_close(points, features, atol=1e-4, rtol=1e-4)
    assert torch.equal(torch.as_tensor(images), test.images)
    confidences, predictions = logits.softmax(dim=1).max(dim=1)
    assert [row[1] for row in rows] == [saved.dataset.classes[index] for index in predictions.tolist()]
    assert [float(row[3]) for row in rows] == pytest.approx(confidences.tolist(), abs=6e-4)


SMALL: dict[str, Any] = {"data": "shapes", "images": 512, "width": 8, "epochs": 2, "batch_size": 64, "threads": 1}


def test_labels_make_a_classifier_whose_features_are_neighbours() -> None:
    events = list(train(Config(**SMALL, method="supervised", test_every=2, log_every=4)))
    tested = [event for event in events if "Accuracy/knn" in event.scalars]
    assert [event.step for event in tested] == [0, 16], "random weights and, of two epochs, the second"
    assert "Accuracy/val" in tested[-1].scalars
    losses = [event.scalars["Loss/train"] for event in events if "Loss/train" in event.scalars]
    assert losses[1] < losses[0]
    embedded = tested[-1].embeddings["Embeddings/test_set"]()
    assert embedded.images is not None
    assert len(embedded.points) == len(embedded.rows) == len(embedded.images) == 512


@pytest.mark.parametrize(
    ("options", "code", "complaint"),
    [
        (["nowhere"], 2, "RUN nowhere is not there"),
        (["--limit=5"], 2, "can show 4 images"),
        (["--lr=nan"], 2, "--learning-rate"),
        (["--method=magic"], 2, "--method magic"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    options: list[str],
    code: int,
    complaint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "--limit=5" in options:
        monkeypatch.setattr(_features, "SPRITE_SIDE", 64)
    command = ["vision", "embed", "--smoke", "--images=128", "--log=minimal", "--log-dir", str(tmp_path / "logs")]
    assert main([*command, *options]) == code
    error = capsys.readouterr().err.strip()
    assert complaint in error
    assert len(error.splitlines()) == 1


def test_a_loss_that_is_no_number_is_exit_code_4(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vision.embed.nt_xent", lambda outputs, _: outputs.sum() * math.nan)
    command = ["vision", "embed", "--smoke", "--images=64", "--log=minimal", "--log-dir", str(tmp_path / "logs")]
    assert main(command) == 4
    assert "at step 1: try a smaller --learning-rate" in capsys.readouterr().err


def test_the_features_of_features_are_refused(log_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vision", "embed", str(log_dir / "vision/embed/a"), "--log-dir", str(log_dir)]) == 2
    assert "give a run of rlboard vision train" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("all_shapes")
def test_features_learned_without_labels_are_better_than_random_ones() -> None:
    """30 % and 62 % were measured."""
    config = Config(data="shapes", images=5000, width=16, epochs=3, threads=1)
    found = [event.scalars["Accuracy/knn"] for event in train(config) if "Accuracy/knn" in event.scalars]
    assert found[-1] > found[0] + 15
