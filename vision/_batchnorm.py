"""Batch norm over the whole batch, of which every process has a part: what one process would make of all of it.

With the mean and the variance of each process's part alone, what is learned would depend on the number of processes.
torch's SyncBatchNorm is for GPUs only; this one is for CPUs, by torch's own kernels and one message each way:

    forward     m = mean_r m_r,   v = mean_r (v_r + m_r^2) - m^2,   y = w x' + b,   x' = (x - m) / sqrt(v + eps)
    backward    dx = w / sqrt(v + eps) (dy - mean(dy) - x' mean(dy x')),   means over the batch of all processes r

The parts are equally large.
"""

from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from rlboard.distributed import world


def synchronized(model: nn.Module) -> nn.Module:
    """`model`, whose batch norms from now on see all processes in training; itself where there is one. Same names."""
    if world().size == 1:
        return model
    if next(model.parameters()).device.type == "cuda":
        return cast("nn.Module", nn.SyncBatchNorm.convert_sync_batchnorm(model))  # type: ignore[no-untyped-call]
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SynchronizedBatchNorm2d
    return model


class SynchronizedBatchNorm2d(nn.BatchNorm2d):
    """A batch norm with momentum, weights and running statistics; in evaluation it asks no other process."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.BatchNorm2d's name for it
        if not self.training:
            return super().forward(input)
        outputs, mean, variance = _Normalize.apply(input, self.weight, self.bias, self.eps)
        with torch.no_grad():
            count = world().size * input.numel() // input.shape[1]
            momentum = cast("float", self.momentum)
            cast("Tensor", self.running_mean).lerp_(mean, momentum)
            cast("Tensor", self.running_var).lerp_(variance * (count / max(1, count - 1)), momentum)
            cast("Tensor", self.num_batches_tracked).add_(1)
        return cast("Tensor", outputs)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        # Batch norm's own kernel, 12 times as fast as var_mean on channels_last.
        mean, variance = (each.double() for each in torch.batch_norm_update_stats(inputs.float(), None, None, 0.0))
        moments = torch.stack((mean, variance + mean.square()))
        distributed.all_reduce(moments)
        mean, square = moments / world().size
        variance = (square - mean.square()).clamp(min=0)
        ctx.save_for_backward(inputs, weight, mean.float(), (variance + eps).rsqrt().float())
        mean, variance = mean.float(), variance.float()
        ctx.mark_non_differentiable(mean, variance)
        return functional.batch_norm(inputs, mean, variance, weight, bias, False, 0.0, eps), mean, variance

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        inputs, weight, mean, scale = ctx.saved_tensors
        _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, inputs, weight, None, None, mean, scale, True, 0.0, [False, True, True]
        )
        sums = torch.stack((of_weight, of_bias))
        distributed.all_reduce(sums)
        of_normalized, of_gradient = sums / (world().size * inputs.numel() // inputs.shape[1])
        # Of the elements: a gradient + b inputs + c, with a, b and c of each channel.
        a = (weight * scale)[:, None, None]
        b = -(a * (scale * of_normalized)[:, None, None])
        c = -(a * of_gradient[:, None, None]) - b * mean[:, None, None]
        return torch.addcmul(c, inputs, b).addcmul_(gradient, a).to(inputs.dtype), of_weight, of_bias, None
