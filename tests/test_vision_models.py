"""The classifiers against torchvision and their papers' numbers, and the optimizers against torch's own."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rlboard.errors import UsageError
from rlboard.graph import graph_def
from vision._models import MODELS, Classifier, build_model, whiten
from vision._optimizers import OPTIMIZERS, SCHEDULES, averaged, make_optimizer, orthogonalize, schedule

SMALL = {"speednet": 8, "laptopnet": 8, "resnet9": 8, "resnet18": 8, "simplecnn": 8, "vit": 64}


pytestmark = pytest.mark.usefixtures("one_thread")


def small(name: str, **options: Any) -> Classifier:
    model = build_model(name, **{"classes": 10, "width": SMALL[name], **options})
    assert isinstance(model, Classifier)
    return model


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def smooth_images(number: int, channels: int = 3, size: int = 32) -> Tensor:
    """Images whose neighbouring pixels and channels are correlated, as those of photographs are."""
    return functional.interpolate(torch.randn(number, channels, size // 4, size // 4), size, mode="bilinear").cumsum(
        dim=1
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("channels", "size", "classes"), [(1, 28, 10), (3, 32, 7), (3, 64, 100), (3, 33, 2)])
def test_logits_are_the_head_of_the_features_at_any_size(name: str, channels: int, size: int, classes: int) -> None:
    model = small(name, classes=classes, channels=channels, image_size=size).eval()
    inputs = torch.randn(3, channels, size, size)
    logits, features = model(inputs), model.features(inputs)
    assert logits.shape == (3, classes)
    assert features.shape[0] == 3
    assert features.ndim == 2
    assert torch.equal(model.head(features), logits)
    assert logits.isfinite().all()


# Counted by hand from the tables in the docstrings, with w = 64 (laptopnet and simplecnn 32, vit 192) and 10 classes.
COUNTS = {
    "speednet": 3 * 4 * 24 + 24 + 9 * (24 * 64 + 64 * 64 + 64 * 256 + 3 * 256 * 256) + 2 * 2 * (64 + 256 + 256) + 2560,
    "laptopnet": 27 * 32 + 9 * (2 * 32**2 + 32 * 64 + 64**2 + 64 * 128 + 128**2) + 4 * (32 + 64 + 128) + 1280,
    "resnet9": 9 * (3 * 64 + 64 * 128 + 2 * 128**2 + 128 * 256 + 256 * 512 + 2 * 512**2)
    + 2 * (64 + 3 * 128 + 256 + 3 * 512)
    + 5120,
    "resnet18": 11_173_962,  # the count every CIFAR repository gives for it
    "simplecnn": (27 + 1) * 32 + (9 * 32 + 1) * 64 + (9 * 64 + 1) * 128 + (128 * 16 + 1) * 256 + 257 * 10,
    "vit": (48 + 1) * 192 + 6 * (2 * 2 * 192 + 193 * 576 + 193 * 192 + 193 * 384 + 385 * 192) + 2 * 192 + 193 * 10,
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_table_and_grow_with_the_width(name: str) -> None:
    assert count(build_model(name, classes=10)) == COUNTS[name]
    assert count(small(name)) < count(small(name, width=2 * SMALL[name])) < COUNTS[name]


def test_resnet18_is_torchvisions_with_the_stem_of_small_images() -> None:
    torchvision = pytest.importorskip("torchvision")
    reference = torchvision.models.resnet18(num_classes=10)
    reference.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    reference.maxpool = nn.Identity()
    model = build_model("resnet18", classes=10)
    ours, theirs = model.state_dict(), reference.state_dict()
    assert [value.shape for value in ours.values()] == [value.shape for value in theirs.values()]
    model.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))
    inputs = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(model(inputs), reference(inputs))
    torch.testing.assert_close(model.eval()(inputs), reference.eval()(inputs))


@pytest.mark.parametrize("name", MODELS)
def test_every_trainable_parameter_has_a_gradient_and_learns(name: str) -> None:
    model = small(name)
    inputs, labels = smooth_images(32), torch.arange(32) % 10
    whiten(model, inputs)
    optimizer = make_optimizer(model, "adamw", 3e-3)
    losses = []
    for _ in range(12):
        loss = functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert parameter.grad.abs().max() > 0, key
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", MODELS)
def test_equal_seeds_make_equal_weights(name: str) -> None:
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(small(name).state_dict())
    first, second, other = states
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert not all(torch.equal(value, other[key]) for key, value in first.items())


@pytest.mark.parametrize("name", MODELS)
def test_every_model_can_be_drawn(name: str) -> None:
    model = small(name)
    graph = graph_def(model, torch.zeros(1, 3, 32, 32))
    names = [node.name for node in graph.node]
    for stage, module in model.features.named_children():
        if next(module.parameters(), None) is not None:
            assert any(f"{type(module).__name__}[{stage}]" in node for node in names), stage
    (output,) = (node for node in graph.node if node.name.startswith("output/"))
    assert [dimension.size for dimension in output.attr["_output_shapes"].list.shape[0].dim] == [1, 10]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("alexnet", {}, "--model alexnet is not one of speednet, laptopnet"),
        ("vit", {"width": 100}, "--width 100: vit's is a multiple of 64"),
        ("resnet9", {"image_size": 8}, "images of 8 pixels are too small"),
    ],
)
def test_a_model_that_cannot_be_is_refused_in_one_line(name: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_model(name, classes=10, **options)


@pytest.mark.parametrize("name", MODELS)
def test_the_smallest_images_work(name: str) -> None:
    assert small(name, image_size=16)(torch.randn(2, 3, 16, 16)).isfinite().all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("name", "kept"), [("speednet", {1: 4, 3: 12}), ("laptopnet", {1: 9, 3: 16})])
def test_whitened_patches_have_unit_covariance(name: str, kept: dict[int, int], channels: int) -> None:
    model = small(name, channels=channels)
    images = smooth_images(200, channels)
    before = copy.deepcopy(model.state_dict())
    whiten(model, images, epsilon=0.0)
    layer = cast("nn.Conv2d", model.features.whiten)
    outputs = functional.conv2d(images, layer.weight).transpose(0, 1).flatten(1)
    filters = kept[channels]
    assert torch.equal(outputs[filters:], -outputs[:filters])
    covariance = outputs[:filters] @ outputs[:filters].T / outputs.shape[1]
    torch.testing.assert_close(covariance, torch.eye(filters), atol=0.01, rtol=0)
    assert not layer.weight.requires_grad
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert changed == ["features.whiten.weight"]


def test_whitening_leaves_other_models_alone() -> None:
    model = small("resnet9")
    before = copy.deepcopy(model.state_dict())
    whiten(model, smooth_images(4))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_speednets_convolutions_begin_as_the_identity() -> None:
    model = small("speednet")
    convolution = cast("nn.Conv2d", model.get_submodule("features.group1.4"))
    inputs = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(convolution(inputs), inputs)


def quadratic(parameters: list[Tensor]) -> Tensor:
    return sum((((index + 1) * parameter - 1) ** 2).sum() for index, parameter in enumerate(parameters))  # type: ignore[return-value]


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    for _ in range(number):
        optimizer.zero_grad()
        quadratic(list(model.parameters())).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(12, 20)
        self.head = nn.Linear(20, 3)


REFERENCES: dict[str, Callable[[list[Tensor], float], torch.optim.Optimizer]] = {
    "sgd": lambda weights, decay: torch.optim.SGD(weights, 0.01, 0.8, weight_decay=decay, nesterov=True),
    "adamw": lambda weights, decay: torch.optim.AdamW(weights, 0.01, (0.8, 0.999), weight_decay=decay),
}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_sgd_and_adamw_are_torchs_with_decay_on_matrices_only(name: str) -> None:
    model = TwoLayers()
    reference = copy.deepcopy(model)
    steps(model, make_optimizer(model, name, 0.01, weight_decay=0.1, momentum=0.8), 3)
    with_decay = REFERENCES[name]([reference.hidden.weight, reference.head.weight], 0.1)
    without = REFERENCES[name]([reference.hidden.bias, reference.head.bias], 0.0)
    for _ in range(3):
        reference.zero_grad()
        quadratic(list(reference.parameters())).backward()  # type: ignore[no-untyped-call]
        with_decay.step()
        without.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("rows", "columns"), [(20, 12), (12, 20)])
def test_muon_on_a_matrix_is_torchs(rows: int, columns: int) -> None:
    model = TwoLayers()
    model.hidden = nn.Linear(columns, rows)
    reference = copy.deepcopy(model)
    steps(model, make_optimizer(model, "muon", 0.02, weight_decay=0.1, momentum=0.9, other_learning_rate=0.01), 3)
    muon = torch.optim.Muon([reference.hidden.weight], 0.02, 0.1, 0.9, ns_steps=3)
    head = torch.optim.SGD(
        [reference.head.weight, reference.hidden.bias, reference.head.bias], 0.01, 0.9, nesterov=True
    )
    decay = 1 - 0.01 * 0.1
    for _ in range(3):
        reference.zero_grad()
        quadratic(list(reference.parameters())).backward()  # type: ignore[no-untyped-call]
        muon.step()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            reference.head.weight.mul_(decay)
        head.step()
    torch.testing.assert_close(model.hidden.weight, reference.hidden.weight, atol=2e-3, rtol=0)  # torch's is bfloat16
    for ours, theirs in [(model.head.weight, reference.head.weight), (model.hidden.bias, reference.hidden.bias)]:
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(32, 16), (16, 32), (24, 24)])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_the_singular_vectors(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape) * 1e-3
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    between = u.T @ orthogonalize(matrix, steps=5) @ vh.T  # diagonal where the singular vectors are the same
    values = between.diagonal()[s > 0.05 * s[0]]
    assert values.min() > 0.65
    assert values.max() < 1.25
    assert (between - between.diagonal().diag()).abs().max() < 1e-3


def test_muon_moves_filters_by_orthogonal_matrices_and_vectors_along_the_gradient() -> None:
    model = small("speednet")
    optimizer = make_optimizer(model, "muon", 0.5, other_learning_rate=0.25, momentum=0.0)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    functional.cross_entropy(model(smooth_images(16)), torch.arange(16) % 10).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    moved = {key: value.detach() - before[key] for key, value in model.named_parameters()}
    singular = torch.linalg.svdvals(moved["features.group2.4.weight"].flatten(1)) / 0.5
    assert singular.max() < 1.25
    assert singular.median() > 0.65
    bias = cast("nn.BatchNorm2d", model.get_submodule("features.group2.5")).bias
    assert bias.grad is not None
    torch.testing.assert_close(moved["features.group2.5.bias"], -0.25 * bias.grad)
    assert not moved["features.whiten.weight"].any()


def test_filters_before_batch_norm_keep_one_length_and_turn_by_the_learning_rate() -> None:
    model = small("laptopnet")
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    optimizer = make_optimizer(model, "muon", 0.02, normalize_filters=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    learned = [(key, value) for key, value in model.named_parameters() if value.ndim == 4 and value.requires_grad]
    assert len(learned) == 6
    for key, value in learned:
        torch.testing.assert_close(value.norm(), torch.tensor(len(value) ** 0.5))
        cosine = functional.cosine_similarity(value.flatten(), before[key].flatten(), dim=0)
        assert 0.01 < torch.acos(cosine) < 0.03, key
    head = model.get_submodule("head").weight
    assert isinstance(head, Tensor)
    assert not torch.isclose(head.norm(), torch.tensor(len(head) ** 0.5))


def test_filters_without_batch_norm_keep_their_own_length() -> None:
    model = small("simplecnn")
    reference = copy.deepcopy(model)
    steps(model, make_optimizer(model, "muon", 0.02, normalize_filters=True), 1)
    steps(reference, make_optimizer(reference, "muon", 0.02), 1)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("model_name", MODELS)
def test_every_optimizer_moves_all_parameters_of_every_model_once_and_decays_no_vector(
    name: str, model_name: str
) -> None:
    model = small(model_name)
    optimizer = make_optimizer(model, name, 0.1, weight_decay=0.5)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(map(id, held)) == sorted(map(id, trainable))
    for parameter in trainable:
        nn.init.ones_(parameter).grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = 1.0 if parameter.ndim < 2 else parameter.flatten()[0].item()
            assert (parameter == expected).all(), key
            assert parameter.ndim < 2 or parameter.max() < 1, key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_continues_exactly_from_its_state(name: str) -> None:
    model = TwoLayers()
    optimizer = make_optimizer(model, name, 0.01, weight_decay=0.1)
    steps(model, optimizer, 3)
    resumed_model = copy.deepcopy(model)
    resumed = make_optimizer(resumed_model, name, 0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, optimizer, 3)
    steps(resumed_model, resumed, 3)
    for ours, theirs in zip(resumed_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_optimizer_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="lion is none of sgd, adamw, muon"):
        make_optimizer(TwoLayers(), "lion", 0.1)


def test_a_muon_step_with_a_closure_returns_its_loss() -> None:
    model = TwoLayers()
    optimizer = make_optimizer(model, "muon", 0.01)

    def closure() -> float:
        optimizer.zero_grad()
        loss = quadratic(list(model.parameters()))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    expected = quadratic(list(model.parameters())).item()
    assert optimizer.step(closure) == expected
    assert quadratic(list(model.parameters())).item() < expected


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0.0, 0.3])
def test_a_schedule_rises_to_one_and_falls_to_zero(name: str, warmup: float) -> None:
    progress = [index / 1000 for index in range(1001)]
    factors = [schedule(name, point, warmup) for point in progress]
    peak = int(1000 * warmup)
    assert factors[peak] == pytest.approx(1)
    assert factors[-1] == pytest.approx(0, abs=1e-12)
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


def test_schedules_have_the_values_of_their_formulas() -> None:
    assert schedule("linear", 0.05, 0.1) == pytest.approx(0.5)
    assert schedule("linear", 0.55, 0.1) == pytest.approx(0.5)
    assert schedule("cosine", 0.25) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    with pytest.raises(ValueError, match="step is none of cosine, onecycle, linear"):
        schedule("step", 0.5)


def test_onecycle_is_torchs() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0, total_steps=101, pct_start=31 / 101, cycle_momentum=False, final_div_factor=math.inf
    )
    for index in range(101):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(schedule("onecycle", index / 100, 0.3), abs=1e-9), index
        optimizer.step()
        if index < 100:
            reference.step()


def test_the_average_follows_weights_and_running_statistics() -> None:
    model = small("resnet9")
    average = averaged(model, 0.75)
    average.update_parameters(model)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)
    average.update_parameters(model)
    for key, value in average.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, start[key] + 0.25)
    restored = averaged(small("resnet9"), 0.75)
    restored.load_state_dict(average.state_dict())
    assert all(torch.equal(value, average.state_dict()[key]) for key, value in restored.state_dict().items())
    inputs = torch.randn(2, 3, 32, 32)
    assert torch.equal(restored.eval()(inputs), average.eval()(inputs))
