"""What agents learn with, against torch's own: gradients against autograd, Adam against its optimizer."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from agents._gradients import Adam, Backpropagation, clipped_step, descend, flatten
from agents._networks import convolutions, perceptron

pytestmark = pytest.mark.usefixtures("one_thread")


def networks() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """Each with inputs; the last two are left to autograd."""
    frames, features = convolutions((1, 40, 36))
    return {
        "relu": (perceptron((5, 16, 8, 3), nn.ReLU), torch.randn(7, 5)),
        "tanh": (perceptron((5, 16, 3), nn.Tanh), torch.randn(7, 5)),
        "mixed": (
            nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)),
            torch.randn(7, 5),
        ),
        "frames": (
            nn.Sequential(frames, nn.Linear(features, 3)),
            torch.randint(256, (7, 1, 40, 36), dtype=torch.uint8),
        ),
    }


@pytest.mark.parametrize("name", networks())
def test_the_gradient_is_that_of_autograd(name: str) -> None:
    """Whatever an earlier step has left in it."""
    torch.manual_seed(0)
    network, inputs = networks()[name]
    reference = deepcopy(network)
    gradient = flatten(network).grad
    assert gradient is not None
    gradient.fill_(5)
    backpropagation, slopes = Backpropagation(network), torch.randn(7, 3)
    assert backpropagation.written_out == (name in {"relu", "tanh"})

    outputs = reference(inputs)
    outputs.backward(slopes)
    torch.testing.assert_close(backpropagation.forward(inputs), outputs.detach())
    kept = slopes.clone()
    backpropagation.backward(slopes)
    assert torch.equal(slopes, kept)
    for ours, theirs in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_adam_is_torchs_and_goes_on_where_it_was() -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(6)) for _ in range(2))
    reference = torch.optim.Adam([theirs], 0.1, eps=1e-5)
    optimizer = Adam([ours], 0.1, epsilon=1e-5)
    for step in range(6):
        if step == 3:
            before, optimizer = optimizer, Adam([ours], 0.05, epsilon=1e-5)
            optimizer.load_state_dict(before.state_dict())
            reference.param_groups[0]["lr"] = 0.05
        theirs.grad = torch.randn(6)
        optimizer.gradients[0].copy_(theirs.grad)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("largest", "factor"), [(100.0, 1.0), (1.0, 0.1)])
def test_a_gradient_that_is_too_long_is_scaled_down(largest: float, factor: float) -> None:
    vector = nn.Parameter(torch.zeros(2))
    optimizer = Adam([vector], 0.1)
    norm = descend((torch.tensor([6.0, -8.0]) * vector).sum(), optimizer, largest)
    assert norm == pytest.approx(10)
    assert optimizer.gradients[0].tolist() == pytest.approx([6 * factor, -8 * factor])
    assert vector.tolist() == pytest.approx([-0.1, 0.1]), "Adam's first step has the size of the learning rate"
    optimizer.zero()
    assert clipped_step(optimizer, largest) == 0
    assert torch.isfinite(vector).all()
