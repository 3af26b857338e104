"""`rlboard vision train`: a smoke run read back, what its numbers are made of, and that it learns."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.pr_curve import metadata as pr_curve_metadata
from torch import nn

from rlboard.cli import main
from rlboard.instruments.tabs import model_summary, stage_outputs
from tests.browser import get, tensorboard
from tests.conftest import shared_data
from vision._data import Batches, Split
from vision._evaluation import curves, predict, scores, shifted_views
from vision._models import build_model
from vision._pictures import confusion_matrix, image_grid, worst_mistakes
from vision.train import Config, train

pytestmark = [pytest.mark.usefixtures("few_shapes"), pytest.mark.xdist_group("vision-train")]  # one run for all

RUN = "vision/train/smoke"
SMOKE = ["vision", "train", "--smoke", "--images=320", "--epochs=2", "--threads=1"]
CLASSES = 10
STAGES = {"features.stem", "features.layer1", "features.layer2", "features.layer3", "features.pool", "features.flatten"}


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vision") / "logs"
    assert main([*SMOKE, "--run-name=smoke", "--log-dir", str(root)]) == 0
    return root


@pytest.fixture(scope="module")
def events(log_dir: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(log_dir / RUN), {"scalars": 0, "tensors": 0, "images": 0, "histograms": 0})
    accumulator.Reload()
    return accumulator


@pytest.fixture(scope="module")
def url(log_dir: Path) -> Iterator[str]:
    with tensorboard(log_dir) as address:
        yield address


def facts(log_dir: Path, run: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads((log_dir / run / "run.json").read_text())
    return answer


def test_every_scalar_of_the_lesson_is_there(events: EventAccumulator) -> None:
    tags = set(events.Tags()["scalars"])
    by_class = {tag for tag in tags if tag.startswith("Accuracy/class_")}
    assert len(by_class) == CLASSES
    assert tags - by_class == {
        *("Loss/train_step", "Loss/train", "Loss/val", "Accuracy/train", "Accuracy/val", "Best/val_accuracy"),
        *(
            "Accuracy/val_tta",
            "Learning_Rate",
            "Memory/forward_GB",
            "Memory/total_GB",
            "hparam/best_accuracy",
            "hparam/final_loss",
        ),
        *("time/images", "time/images_per_second"),
    }


def test_epochs_are_points_and_steps_are_those_asked_for(events: EventAccumulator) -> None:
    steps = [event.step for event in events.Scalars("Loss/train_step")]
    assert steps == [1, *range(10, steps[-1] + 1, 10)]
    first, last = (event.step for event in events.Scalars("Accuracy/val"))
    assert last == 2 * first
    assert events.Scalars("time/images")[1].value == 10 * 32
    rates = [event.value for event in events.Scalars("Learning_Rate")]
    assert rates[0] < rates[1] > rates[-1] > 0, "it rises and falls"


def test_best_and_final_metrics_are_those_of_the_curve(events: EventAccumulator) -> None:
    accuracies = [event.value for event in events.Scalars("Accuracy/val")]
    (best,) = (event.value for event in events.Scalars("hparam/best_accuracy"))
    assert best == max(accuracies) == events.Scalars("Best/val_accuracy")[-1].value
    (loss,) = (event.value for event in events.Scalars("hparam/final_loss"))
    assert loss == events.Scalars("Loss/val")[-1].value
    by_class = [events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"] if tag.startswith("Accuracy/class_")]
    assert np.mean(by_class) == pytest.approx(accuracies[-1], abs=2)  # classes are about equally frequent


def test_pictures_can_be_looked_at(events: EventAccumulator) -> None:
    sizes = {
        tag: Image.open(io.BytesIO(events.Images(tag)[0].encoded_image_string)).size for tag in events.Tags()["images"]
    }
    assert sizes.keys() == {"Input/samples", "Test/confusion_matrix", "Test/worst_mistakes"}
    assert sizes["Input/samples"] == (8 * 33 + 1, 8 * 33 + 1), "64 images in a grid"


def test_weights_gradients_and_activations_are_histograms(events: EventAccumulator) -> None:
    tags = events.Tags()["histograms"]
    names = {tag.removeprefix("Activations/") for tag in tags if tag.startswith("Activations/")}
    assert names == {
        f"features.{name}" for name in ("whiten", "activation", "group1", "group2", "group3", "pool", "flatten")
    } | {"head"}
    model = build_model("laptopnet", classes=CLASSES, width=8)
    for kind in ("Weights", "Gradients"):
        expected = {
            f"{kind}/{name}" for name, each in model.named_parameters() if kind == "Weights" or each.requires_grad
        }
        assert {tag for tag in tags if tag.startswith(f"{kind}/")} == expected


def test_the_dashboard_shows_the_other_tabs(url: str) -> None:
    pr = get(url, "plugin/pr_curves/tags")[RUN]
    assert len(pr) == CLASSES
    assert all(tag.startswith("PR/") for tag in pr)
    assert get(url, "plugin/graphs/info")[RUN]["run_graph"]
    graph = get(url, "plugin/graphs/graph", run=RUN).decode()
    assert all(part in graph for part in ("LaptopNet", "group3", "head"))
    (summary,) = get(url, "plugin/text/text", run=RUN, tag="Model/summary/text_summary")
    assert "Total params" in summary["text"]
    (notice,) = get(url, "plugin/text/text", run=RUN, tag="notice/text_summary")
    assert "shapes" in notice["text"]
    layout = {category["title"]: category["chart"] for category in get(url, "plugin/custom_scalars/layout")["category"]}
    assert {"Training Metrics", "Learning Rate", "Per-Class Accuracy"} <= layout.keys()
    for category in ("Training Metrics", "Per-Class Accuracy"):
        for chart in layout[category]:
            for pattern in chart["multiline"]["tag"]:
                drawn = get(url, "plugin/custom_scalars/scalars", run=RUN, tag=pattern)
                assert drawn["tag_to_events"], pattern
    experiment = get(url, "plugin/hparams/experiment", {"experimentName": ""})
    assert {"hparam/best_accuracy", "hparam/final_loss"} <= {info["name"]["tag"] for info in experiment["metricInfos"]}


def test_equal_seeds_are_equal_weights_whatever_is_logged(log_dir: Path) -> None:
    for name, options in {
        "equal": ["--log=minimal", "--log-every=3", "--picture-every=1"],
        "other": ["--log=minimal", "--seed=2"],
    }.items():
        assert main([*SMOKE, f"--run-name={name}", *options, "--log-dir", str(log_dir)]) == 0
    hashes = {name: facts(log_dir, f"vision/train/{name}")["weights_sha256"] for name in ("equal", "other")}
    smoke = facts(log_dir, RUN)["weights_sha256"]
    assert hashes["equal"] == smoke
    assert hashes["other"] != smoke


SMALL: dict[str, Any] = {"data": "shapes", "images": 256, "width": 8, "epochs": 2, "batch_size": 64, "log_every": 4}


@pytest.mark.parametrize("options", [
    {"model": "speednet", "optimizer": "sgd", "schedule": "cosine", "learning_rate": 0.5, "ema": 0.9},
    {"model": "simplecnn", "optimizer": "adamw", "schedule": "onecycle", "learning_rate": 1e-3, "cutout": 8}
    | {"images": 512, "batch_size": 128},
    pytest.param({"model": "resnet18", "precision": "bfloat16", "flip": False}, marks=pytest.mark.slow),
    {"model": "vit", "width": 64, "optimizer": "adamw", "learning_rate": 1e-3, "tta": False},
], ids=lambda options: options["model"])  # fmt: skip
def test_every_network_optimizer_and_schedule_trains(options: dict[str, Any]) -> None:
    config = Config(**SMALL | options, threads=1)
    losses = [event.scalars["Loss/train_step"] for event in train(config) if "Loss/train_step" in event.scalars]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-2:]) < losses[0]


def test_a_loss_that_explodes_is_one_line_and_exit_code_4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["vision", "train", "--smoke", "--optimizer=sgd", "--lr=1e30", "--log-dir", str(tmp_path)]
    assert main(command) == 4
    error = capsys.readouterr().err.strip()
    assert "--learning-rate" in error
    assert len(error.splitlines()) == 1


def test_scores_are_in_percent_and_by_class() -> None:
    probabilities = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9], [0.5, 0.5]])
    labels = torch.tensor([0, 1, 1, 0])
    found = scores(probabilities, labels, ("cat", "dog"))
    assert found["Accuracy/val"] == 75
    assert (found["Accuracy/class_cat"], found["Accuracy/class_dog"]) == (100, 50)
    assert found["Loss/val"] == pytest.approx(-np.log([0.8, 0.4, 0.9, 0.5]).mean())
    truth, shares = curves(probabilities, labels, ("cat", "dog"))["PR/dog"]
    assert truth.tolist() == [False, True, True, False]
    assert shares.tolist() == pytest.approx([0.2, 0.4, 0.9, 0.5])


def test_prediction_adds_up_the_mirror_image_and_covers_every_image() -> None:
    images = torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8)
    split = Split(images, torch.zeros(7, dtype=torch.long))
    mean, std = torch.zeros(3), torch.ones(3)
    batches = Batches(split, mean=mean, std=std, batch_size=3, augment=False)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4), nn.Dropout(0.5))
    inputs = images / 255
    model.eval()
    with torch.no_grad():
        plain, both = model(inputs), (model(inputs) + model(inputs.flip(3))) / 2
    model.train()
    torch.testing.assert_close(predict(model, batches), plain.softmax(1))
    torch.testing.assert_close(predict(model, batches, lambda images: [images, images.flip(3)]), both.softmax(1))
    assert model.training


def test_views_are_moved_by_a_pixel_and_mirrored() -> None:
    images = torch.arange(2.0 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    views = shifted_views(images, flip=True)
    assert len(views) == 6
    assert torch.equal(views[1][..., 1:, 1:], images[..., :-1, :-1])
    assert torch.equal(views[2][..., :-1, :-1], images[..., 1:, 1:])
    assert torch.equal(views[1][..., 0, 1:], images[..., 1, :-1]), "the border is a mirror"
    assert all(torch.equal(mirrored, view.flip(3)) for view, mirrored in zip(views[:3], views[3:], strict=True))
    assert len(shifted_views(images, flip=False)) == 3


def test_activations_are_those_of_the_stages_and_leave_no_trace() -> None:
    model = build_model("resnet9", classes=CLASSES, width=8).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    outputs = stage_outputs(model, torch.randn(4, 3, 32, 32))
    assert outputs.keys() == STAGES | {"head"}
    assert outputs["features.layer2"].shape == (4, 32, 8, 8)
    assert (outputs["features.stem"] >= 0).all(), "after the ReLU"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in model.modules())


def test_the_summary_counts_parameters_and_survives_a_model_that_cannot_run() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    assert "Total params: 10" in model_summary(model, torch.zeros(1, 4))
    assert "no summary" in model_summary(model, torch.zeros(1, 3))


def test_pictures_show_what_they_are_given() -> None:
    grid = image_grid(torch.full((3, 1, 4, 4), 200, dtype=torch.uint8), columns=2)
    assert grid.shape == (2 * 5 + 1, 2 * 5 + 1, 3)
    assert grid[1, 1].tolist() == [200, 200, 200]
    matrix = confusion_matrix(torch.tensor([[9, 1], [0, 10]]), ("cat", "dog"))
    assert matrix.dtype == np.uint8
    assert len(np.unique(matrix)) > 20
    right = torch.eye(4)
    blank = worst_mistakes(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4), right, "abcd")
    wrong = worst_mistakes(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4).flip(0), right, "abcd")
    assert (blank == 255).all(), "no mistakes, no images"
    assert (wrong < 50).any()


def test_pr_curves_are_read_back(events: EventAccumulator) -> None:
    tags = [tag for tag in events.Tags()["tensors"] if tag.startswith("PR/")]
    assert len(tags) == CLASSES
    metadata = events.SummaryMetadata(tags[0])
    assert metadata.plugin_data.plugin_name == pr_curve_metadata.PLUGIN_NAME


@pytest.mark.slow
@pytest.mark.usefixtures("all_shapes")
def test_the_defaults_learn_the_shapes(tmp_path: Path) -> None:
    assert main(["vision", "train", "--data=shapes", "--epochs=2", "--run-name=a", "--log-dir", str(tmp_path)]) == 0
    assert facts(tmp_path, "vision/train/a")["best"]["Accuracy/val"]["value"] > 97


@pytest.mark.slow
def test_one_epoch_of_the_defaults_on_cifar10(tmp_path: Path) -> None:
    archive = shared_data("cifar10-jpeg.tar.xz")
    arguments = ["--data", str(archive), "--data-dir", str(tmp_path), "--epochs=1", "--run-name=a"]
    assert main(["vision", "train", *arguments, "--log-dir", str(tmp_path)]) == 0
    assert facts(tmp_path, "vision/train/a")["best"]["Accuracy/val"]["value"] > 70


@pytest.mark.slow
def test_mnist_is_the_same_command(tmp_path: Path) -> None:
    archive = shared_data("mnist-raw.tar.xz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    arguments = ["--data=mnist", "--data-dir", str(tmp_path), "--epochs=1", "--run-name=a"]
    assert main(["vision", "train", *arguments, "--log-dir", str(tmp_path)]) == 0
    assert facts(tmp_path, "vision/train/a")["best"]["Accuracy/val"]["value"] > 98


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("preset", ["laptop", "lesson", "speedrun", "accurate"])
def test_every_preset_on_a_gpu(preset: str, tmp_path: Path) -> None:
    arguments = ["--smoke", f"--preset={preset}", "--device=cuda", "--run-name=a", "--epochs=2"]
    assert main(["vision", "train", *arguments, "--log-dir", str(tmp_path)]) == 0
    accumulator = EventAccumulator(str(tmp_path / RUN.replace("smoke", "a")))
    accumulator.Reload()
    assert accumulator.Scalars("Memory/total_GB")[-1].value > 0
    assert np.isfinite([event.value for event in accumulator.Scalars("Loss/train_step")]).all()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_equal_seeds_are_equal_weights_on_a_gpu_if_asked_for(tmp_path: Path) -> None:
    for name in ("a", "b"):
        arguments = ["--smoke", "--device=cuda", "--deterministic", "--progressive=0", f"--run-name={name}"]
        assert main(["vision", "train", *arguments, "--log-dir", str(tmp_path)]) == 0
    hashes = [facts(tmp_path, f"vision/train/{name}")["weights_sha256"] for name in ("a", "b")]
    assert hashes[0] == hashes[1]
