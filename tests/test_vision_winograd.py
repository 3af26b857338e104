"""Winograd's convolutions: torch's own, of values and gradients, and only where they are asked for."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from vision._models import build_model
from vision._winograd import TILE, WinogradConv2d, winograd, with_winograd


def error(ours: Tensor | None, theirs: Tensor | None) -> float:
    """The length of the difference over that of what it should be."""
    assert ours is not None
    assert theirs is not None
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize(("height", "width"), [*product(TILE, TILE)])
def test_equals_a_convolution_and_its_gradients(height: int, width: int) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(5, 32, height, width).to(memory_format=torch.channels_last)
    filters = torch.randn(40, 32, 3, 3) / (9 * 32) ** 0.5  # outputs are of size 1
    towards = torch.randn(5, 40, height, width)
    found = []
    for convolve in (winograd, lambda x, w: conv2d(x, w, padding=1)):
        x, w = inputs.clone().requires_grad_(), filters.clone().requires_grad_()
        outputs = convolve(x, w)
        outputs.backward(towards)  # type: ignore[no-untyped-call]
        found.append((outputs.detach(), x.grad, w.grad))
    for ours, torchs in zip(*found, strict=True):
        assert error(ours, torchs) < 2e-5
    assert found[0][0].is_contiguous(memory_format=torch.channels_last)


def test_a_network_trains_as_before() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(16, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (16,))
    plain = build_model("laptopnet", classes=10)
    quick = build_model("laptopnet", classes=10)
    quick.load_state_dict(plain.state_dict())
    assert with_winograd(quick) is quick
    assert list(quick.state_dict()) == list(plain.state_dict())
    for model in (plain, quick):
        nn.functional.cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
    for (name, expected), parameter in zip(plain.named_parameters(), quick.parameters(), strict=True):
        if expected.grad is not None:
            assert error(parameter.grad, expected.grad) < 1e-2, name  # they all but cancel
    plain.load_state_dict(quick.state_dict())
    assert torch.equal(plain.eval()(inputs), quick.eval()(inputs))  # convolutions as before


def test_only_what_fits_is_changed() -> None:
    changed = {
        "plain": nn.Conv2d(32, 32, 3, padding=1),
        "without bias": nn.Conv2d(32, 8, 3, padding=1, bias=False),
    }
    kept = {
        "few channels": nn.Conv2d(3, 32, 3, padding=1),
        "stride": nn.Conv2d(32, 32, 3, stride=2, padding=1),
        "groups": nn.Conv2d(32, 32, 3, padding=1, groups=2),
        "dilation": nn.Conv2d(32, 32, 3, padding=1, dilation=2),
        "reflection": nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect"),
        "no padding": nn.Conv2d(32, 32, 3),
        "other filters": nn.Conv2d(32, 32, 5, padding=1),
        "elsewhere": nn.Conv2d(32, 32, 3, padding=1, device="meta"),
    }
    with_winograd(nn.ModuleDict(changed | kept))
    assert {type(layer) for layer in changed.values()} == {WinogradConv2d}
    assert {type(layer) for layer in kept.values()} == {nn.Conv2d}


def test_biases_and_large_maps() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(32, 4, 3, padding=1)
    small, large = torch.randn(2, 32, 4, 4), torch.randn(2, 32, 5, 16)
    expected = layer(small).detach(), layer(large).detach()
    with_winograd(layer)
    assert error(layer(small).detach(), expected[0]) < 2e-5
    assert torch.equal(layer(large).detach(), expected[1])


def test_autocast_is_left_alone() -> None:
    layer = with_winograd(nn.Conv2d(32, 4, 3, padding=1))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 32, 4, 4)).dtype == torch.bfloat16
