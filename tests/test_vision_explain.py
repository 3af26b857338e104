"""`rlboard vision explain`: heat maps are another library's, nothing of the model changes, and all is in its tab."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.mesh import metadata as mesh_metadata
from torch import Tensor, nn
from torch.nn import functional

from rlboard.cli import main
from rlboard.errors import UsageError
from vision._cam import convolutions, grad_cam, layer_outputs
from vision._evaluation import prediction_table
from vision._models import MODELS, build_model
from vision._pictures import feature_maps, heat_maps, normalised
from vision._surface import loss_at, random_direction, smooth_surface, surface_mesh
from vision.explain import Config, choose, find_class, find_layer, loss_gradients, train

pytestmark = [pytest.mark.usefixtures("few_shapes"), pytest.mark.xdist_group("vision-runs")]  # two runs for all

SMOKE = "vision/explain/smoke"
STAGES = ("whiten", "activation", "group1", "group2", "group3", "pool", "flatten")


@pytest.fixture(scope="module")
def log_dir(vision_log_dir: Path) -> Path:
    """What explains the small trained run, beside it."""
    trained = str(vision_log_dir / "vision/train/small")
    arguments = ["--smoke", "--show=mistakes", "--run-name=smoke", "--threads=1", "--log-dir", str(vision_log_dir)]
    assert main(["vision", "explain", trained, *arguments]) == 0
    return vision_log_dir


@pytest.fixture(scope="module")
def events(log_dir: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(log_dir / SMOKE), {"tensors": 0, "images": 0, "histograms": 0})
    accumulator.Reload()
    return accumulator


def text(events: EventAccumulator, tag: str) -> str:
    (event,) = events.Tensors(f"{tag}/text_summary")
    answer: str = event.tensor_proto.string_val[0].decode()
    return answer


def trained_a_little(name: str, width: int) -> nn.Module:
    """Random weights, with batch norms that have seen something and gradients from it, in a mixture of modes."""
    torch.manual_seed(0)
    model = build_model(name, classes=10, width=width)
    model(torch.randn(16, 3, 32, 32)).square().sum().backward()
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0
    return model


def everything(model: nn.Module) -> dict[str, Any]:
    """All that explaining a model may not change."""
    return {
        "modes": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._backward_hooks) for module in model.modules()],
        "tensors": {name: value.clone() for name, value in model.state_dict().items()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "trained": [parameter.requires_grad for parameter in model.parameters()],
        "objects": [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = everything(model)
    assert all(before[name] == after[name] for name in ("modes", "hooks", "trained", "objects"))
    for kind in ("tensors", "gradients"):
        for name, value in before[kind].items():
            assert (value is None and after[kind][name] is None) or torch.equal(value, after[kind][name]), name


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("name", "width"), [("laptopnet", 16), ("resnet18", 8), ("vit", 64)])
def test_heat_maps_are_those_of_pytorch_grad_cam(name: str, width: int) -> None:
    reference = pytest.importorskip("pytorch_grad_cam")
    targets_of = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    model = trained_a_little(name, width).eval()
    inputs = torch.randn(4, 3, 32, 32)
    layers = convolutions(model)[-4:]  # that library finds no gradient at a first layer that is frozen, as laptopnet's
    for layer in layers:
        for targets in ([0, 3, 9, 3], model(inputs).argmax(dim=1).tolist()):
            found = grad_cam(model, layer, inputs, torch.tensor(targets))
            other = copy.deepcopy(model)
            cam = reference.GradCAM(model=other, target_layers=[other.get_submodule(layer)])
            height, width_of_map = found.shape[1:]
            cam.get_target_width_height = lambda _, size=(width_of_map, height): size  # as large as the layer's maps
            expected = cam(inputs, [targets_of.ClassifierOutputTarget(target) for target in targets])
            # That library stretches each map to [0, 1], ours divides by the largest value alone.
            torch.testing.assert_close(normalised(found), torch.from_numpy(expected), atol=2e-5, rtol=0)
            assert set(found.amax(dim=(1, 2)).tolist()) <= {0, 1}
            assert found.any()


@pytest.mark.usefixtures("one_thread")
def test_looking_leaves_no_trace_even_if_the_forward_pass_fails() -> None:
    model = trained_a_little("laptopnet", 8)
    before = everything(model)
    assert True in before["modes"]
    assert False in before["modes"]
    inputs, labels = torch.randn(3, 3, 32, 32), torch.tensor([1, 2, 3])
    original = inputs.clone()
    last = convolutions(model)[-1]
    grad_cam(model, last, inputs, labels)
    layer_outputs(model, inputs, convolutions(model))
    loss_gradients(model, inputs, labels)
    directions = [random_direction(model, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    loss_at(model, [(inputs, labels)], (0.3, -0.7), (directions[0], directions[1]))
    assert_untouched(model, before)
    assert torch.equal(inputs, original)

    wrong = torch.randn(3, 1, 32, 32)
    for failing in (
        lambda: grad_cam(model, last, wrong, labels),
        lambda: layer_outputs(model, wrong, [last]),
        lambda: loss_at(model, [(wrong, labels)], (0.3, -0.7), (directions[0], directions[1])),
        lambda: grad_cam(model, last, inputs, labels + 10),
    ):
        with pytest.raises(RuntimeError):
            failing()
        assert_untouched(model, before)
    with pytest.raises(AttributeError):
        layer_outputs(model, inputs, [last, "features.none"])
    assert_untouched(model, before)


@pytest.mark.usefixtures("one_thread")
def test_a_layer_that_says_nothing_about_a_class_is_cold_everywhere() -> None:
    model = trained_a_little("simplecnn", 8)
    assert isinstance(model.head, nn.Linear)
    nn.init.zeros_(model.head.weight)
    heat = grad_cam(model, convolutions(model)[-1], torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    assert heat.shape == (2, 8, 8)
    assert torch.equal(heat, torch.zeros(2, 8, 8))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("frozen", [False, True])
def test_heat_is_what_the_equation_says(frozen: bool) -> None:
    """Of a mean over places, the weights are those of the linear layer: the class activation map of Zhou et al."""
    convolution, linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
    model = nn.Sequential(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear).requires_grad_(not frozen)
    inputs = torch.randn(2, 3, 8, 8)
    maps = torch.einsum("nkhw,nk->nhw", convolution(inputs), linear.weight[[4, 2]]).detach().relu()
    found = grad_cam(model, "0", inputs, torch.tensor([4, 2]))
    torch.testing.assert_close(found, maps / maps.amax(dim=(1, 2), keepdim=True))


@pytest.mark.usefixtures("one_thread")
def test_outputs_are_kept_before_the_next_layer_writes_into_them() -> None:
    model = build_model("laptopnet", classes=10, width=8)  # its first ReLU is in place
    outputs = layer_outputs(model, torch.randn(2, 3, 32, 32), ["features.whiten", "features.activation"])
    assert (outputs["features.whiten"] < 0).any()
    assert torch.equal(outputs["features.whiten"].relu(), outputs["features.activation"])


def test_feature_maps_use_their_whole_range_and_flat_ones_are_black() -> None:
    maps = torch.stack((torch.arange(16.0).reshape(4, 4) - 5, torch.full((4, 4), 7.0), torch.zeros(4, 4)))
    stretched = normalised(maps)
    torch.testing.assert_close(stretched[0], torch.arange(16.0).reshape(4, 4) / 15)
    assert torch.equal(stretched[1:], torch.zeros(2, 4, 4))
    picture = feature_maps(torch.full((1, 8, 8), 200, dtype=torch.uint8), maps.repeat(10, 1, 1), side=4)
    height = 4 * (4 + 2) + 2
    assert picture.shape == (height, height + 1 + height, 3), "16 of 30 channels, beside the image"
    assert (picture[:, :height] == 200).all()
    assert [picture[3, height + 9 + column].tolist() for column in range(4)] == [[68, 1, 84]] * 4, "viridis' lowest"


def test_the_picture_is_hot_where_the_map_is() -> None:
    heats = torch.zeros(3, 4, 4)
    heats[:, 0, 0] = 1
    picture = heat_maps(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), heats, ["a"] * 3, [True, False, True])
    red = (picture[..., 0] > 150) & (picture[..., 1] < 80) & (picture[..., 2] < 80)
    assert red[:110].any()
    assert red[110:].any(), "three images are two rows"
    assert picture.dtype == np.uint8


@pytest.mark.usefixtures("one_thread")
def test_the_surface_is_the_loss_of_weights_that_are_moved_by_as_much_as_each_filter_is_large() -> None:
    model = trained_a_little("laptopnet", 8).eval()
    first, second = (random_direction(model, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    parameters = dict(model.named_parameters())
    assert first.keys() == {name for name, p in parameters.items() if p.ndim > 1 and "whiten" not in name}
    for name, direction in first.items():
        norms = (each.flatten(1).norm(dim=1) for each in (direction, parameters[name]))
        torch.testing.assert_close(*norms)
        assert not torch.equal(direction, second[name])
    batches = [(torch.randn(size, 3, 32, 32), torch.randint(10, (size,))) for size in (5, 3)]
    inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    for steps in ((0.0, 0.0), (0.5, -1.0)):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                if name in first:
                    parameter.add_(steps[0] * first[name] + steps[1] * second[name])
            expected = functional.cross_entropy(moved(inputs), labels).item()
        assert loss_at(model, batches, steps, (first, second)) == pytest.approx(expected, rel=1e-5)


def parabola(points: int) -> Tensor:
    """Losses whose logarithm is one, over the square of steps."""
    places = torch.linspace(-1, 1, points)
    along, across = torch.meshgrid(places, places, indexing="ij")
    return torch.exp(along.square() + 2 * across - 0.5)


@pytest.mark.parametrize("points", [3, 4, 15, 201])
def test_a_smooth_surface_goes_through_its_points(points: int) -> None:
    smooth = smooth_surface(parabola(points))
    np.testing.assert_allclose(smooth, parabola(len(smooth)), rtol=1e-5)
    assert len(smooth) ** 2 <= 65_536


def test_a_surface_survives_losses_that_are_none() -> None:
    losses = parabola(5)
    losses[0, 0], losses[4, 4], losses[2, 2] = torch.nan, torch.inf, 0
    for surface in (losses, torch.full((3, 3), torch.nan), torch.zeros(3, 3)):
        smooth = smooth_surface(surface)
        assert np.isfinite(smooth).all()
        assert (smooth > 0).all()
        assert np.isfinite(surface_mesh(smooth).vertices).all()


def test_a_mesh_is_closed_seen_from_its_top_and_higher_where_the_loss_is() -> None:
    smooth = smooth_surface(parabola(5))
    vertices, colors, faces = surface_mesh(smooth)
    assert faces is not None
    corners = vertices[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    assert (normals[:, 2] > 0).mean() > 0.8, "most of it shows itself to the viewer, which is at z"
    side = len(smooth)
    assert len(faces) == 2 * (side - 1) ** 2
    assert sorted({int(number) for number in faces.flat}) == list(range(side**2))
    logarithms = np.log(smooth).ravel()
    # Heights are a linear function of the logarithm: vertices are an affine image of (a, b, log loss).
    places = np.linspace(-1, 1, side)
    a, b = np.meshgrid(places, places, indexing="ij")
    design = np.stack((a.ravel(), b.ravel(), logarithms, np.ones(side**2)), axis=1)
    fit, *_ = np.linalg.lstsq(design, vertices.astype(float), rcond=None)
    np.testing.assert_allclose(design @ fit, vertices, atol=1e-5)
    assert fit[2, 1] > 0, "and up is up"
    assert colors[logarithms.argmin()].tolist() == [68, 1, 84]
    assert colors[logarithms.argmax()].tolist() == [253, 231, 37]


def test_images_are_chosen_by_how_sure_and_how_wrong_they_are() -> None:
    labels = torch.tensor([0, 0, 1, 1, 0, 1])
    first = torch.tensor([0.9, 0.2, 0.3, 0.8, 0.7, 0.1])
    probabilities = torch.stack((first, 1 - first), dim=1)
    assert choose(probabilities, labels, "first", 3) == [0, 1, 2]
    assert set(choose(probabilities, labels, "mistakes", 2)) == {1, 3}
    assert choose(probabilities, labels, "mistakes", 4)[2:] == [2, 4], "then what came next to a mistake"
    assert choose(probabilities, labels, "sure", 4) == [0, 5, 4, 2], "the classes in turn"
    assert choose(probabilities, labels, "mixed", 4)[:2] == [0, 5]
    assert set(choose(probabilities, labels, "mixed", 4)[2:]) == {1, 3}
    for show in ("first", "mistakes", "sure", "mixed"):
        assert sorted(choose(probabilities, labels, show, 6)) == list(range(6))


def test_layers_and_classes_are_found_by_name_or_refused_with_what_there_is() -> None:
    for name in MODELS:
        model = build_model(name, classes=10, width=64 if name == "vit" else 8)
        assert isinstance(model.get_submodule(find_layer("", model)), nn.Conv2d)
    assert find_layer("", model) == "features.patches.project"
    assert find_class("dog", ("cat", "dog")) == find_class("1", ("cat", "dog")) == 1
    assert find_class("0", ("3", "0")) == 1, "a name goes before a number"
    for wrong in ("2", "-1", "do", "", "٣", "9" * 5000):
        with pytest.raises(UsageError, match="is no class: give one of cat, dog, or a number to 1"):
            find_class(wrong, ("cat", "dog"))


def test_a_table_says_what_was_said() -> None:
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    table = prediction_table(probabilities, torch.tensor([0, 1]), ("a|b", "dog", "cat"))
    assert table.splitlines()[2:] == [
        r"| 0 | a\|b | a\|b | 70.0% | dog 20.0% |",
        "| 1 | dog | **cat** | 60.0% | dog 30.0% |",
    ]
    assert prediction_table(probabilities, torch.tensor([0, 1]), "abc", [1]).count("\n") == 2


def test_a_run_fills_the_tabs(events: EventAccumulator, log_dir: Path) -> None:
    tags = events.Tags()
    features = {tag for tag in tags["images"] if tag.startswith("Features/")}
    assert set(tags["images"]) - features == {"GradCAM", "GradCAM/mistakes", "Loss_surface/contours"}
    model = build_model("laptopnet", classes=10, width=8)
    assert features == {f"Features/{name}" for name in convolutions(model)}
    for tag in tags["images"]:
        picture = Image.open(io.BytesIO(events.Images(tag)[0].encoded_image_string))
        assert np.asarray(picture).reshape(-1, 3).std(axis=0).min() > 20, tag
    parameters = dict(model.named_parameters())
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert set(tags["histograms"]) == {
        *(f"Weights/{name}" for name in parameters),
        *(f"Gradients/{name}" for name in trained),
        *(f"Activations/features.{name}" for name in STAGES),
        "Activations/head",
    }
    (heads,) = events.Histograms("Activations/head")
    assert heads.histogram_value.num == 16 * 10
    table = text(events, "Test/sample_predictions").splitlines()
    assert len(table) == 2 + 4
    assert sum("**" in line for line in table) == 4, "an epoch of three steps leaves mistakes enough"
    note = text(events, "Explain/what_to_look_for")
    assert "features.group3.2.block.0.0" in note
    assert "4 x 4 places" in note
    facts = [json.loads((log_dir / name / "run.json").read_text()) for name in (SMOKE, "vision/train/small")]
    values = [each["best"]["Accuracy/val"]["value"] for each in facts]
    assert values[0] == pytest.approx(values[1]), "the same network is right about the same images"
    assert not list((log_dir / SMOKE).glob("*.pt"))


def test_training_ends_with_the_same_table(log_dir: Path) -> None:
    events = EventAccumulator(str(log_dir / "vision/train/small"))
    events.Reload()
    rows = text(events, "Test/sample_predictions").splitlines()
    assert len(rows) == 2 + 16
    assert rows[2].startswith("| 0 | ")


def test_the_surface_is_in_the_mesh_tab(events: EventAccumulator) -> None:
    parts = {tag: events.Tensors(tag)[0] for tag in events.Tags()["tensors"] if tag.startswith("Loss_surface_")}
    assert parts.keys() == {"Loss_surface_VERTEX", "Loss_surface_COLOR", "Loss_surface_FACE"}
    for tag, event in parts.items():
        assert event.step == 1 + 3
        summary = events.SummaryMetadata(tag)
        assert summary.plugin_data.plugin_name == mesh_metadata.PLUGIN_NAME
        data = mesh_metadata.parse_plugin_metadata(summary.plugin_data.content)
        assert data.name == "Loss_surface"
        assert list(data.shape) == [dimension.size for dimension in event.tensor_proto.tensor_shape.dim]
        assert data.shape[0] == 1
        assert data.shape[2] == 3


def test_a_layer_and_a_class_can_be_asked_for(log_dir: Path, tmp_path: Path) -> None:
    arguments = ["--smoke", "--surface=0", "--layer=features.group2.1.0", "--class=star", "--images=3", "--show=first"]
    trained = str(log_dir / "vision/train/small")
    assert main(["vision", "explain", trained, *arguments, "--log-dir", str(tmp_path), "--run-name=a"]) == 0
    events = EventAccumulator(str(tmp_path / "vision/explain/a"))
    events.Reload()
    assert set(events.Tags()["images"]) == {"GradCAM", "Features/features.group2.1.0"}
    assert "the class star" in text(events, "Explain/what_to_look_for")
    assert [line.split(" | ")[0] for line in text(events, "Test/sample_predictions").splitlines()[2:]] == [
        "| 0",
        "| 1",
        "| 2",
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["logs/vision/train/smal"], 2, "did you mean logs/vision/train/small"),
        (["logs/vision/explain/smoke"], 3, "without a checkpoint.pt"),
        (["--layer=features.group2.1"], 2, "did you mean features.group2.1.0? There are features.whiten, "),
        (["--layer=\n"], 2, "There are features.whiten, "),
        (["--target=10"], 2, "circle, ring"),
        (["--class=stars"], 2, "--target stars is no class"),
        (["--images=64", "--data={few}"], 3, "head.weight is (10, 32)"),
        (["--images=97"], 2, "out of range"),
        (["--surface=2"], 2, "3 or more"),
        (["--data=nowhere"], 2, "--data nowhere"),
        (["--show=best"], 2, "best"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    arguments: list[str],
    code: int,
    words: str,
    log_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(log_dir.parent)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "few" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(folder / "0.png")
    arguments = [argument.format(few=tmp_path / "few") for argument in arguments]
    run = [] if not arguments[0].startswith("-") else ["logs/vision/train/small"]
    target = tmp_path / "logs"
    cache = ["--data-dir", str(tmp_path / "cache")]
    assert main(["vision", "explain", *run, *arguments, *cache, "--log-dir", str(target)]) == code
    output, complaint = capsys.readouterr()
    assert output == ""
    assert complaint.startswith("rlboard: ")
    assert complaint.count("\n") == 1
    assert complaint.strip().isprintable()
    assert words in complaint
    assert not target.exists()


def test_more_images_than_there_are_is_refused(log_dir: Path) -> None:
    with pytest.raises(UsageError, match="--images 97 is more than there are: give 96 or less"):
        next(train(Config(str(log_dir / "vision/train/small"), images=97)))
