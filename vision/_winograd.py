"""3x3 convolutions of small maps with up to three times fewer multiplications, for training on a CPU.

Two outputs next to each other share two of their three inputs, and so part of their products. Winograd's algorithm
F(m, 3) makes m outputs from n = m + 2 products in place of 3m; in two dimensions, at m = 4, that is 36 in place of
144. Of every tile d of n x n inputs and every filter g, transformed by matrices B, G and A that are known beforehand,

    U = G g G^T,    V = B^T d B,    M_ij = V_ij U_ij  (over all channels: n^2 products of matrices),    Y = A^T M A

A map is a few tiles here, so that for one of 8 x 8, B and A of all its tiles, padding included, are one matrix each.
What is learned is the same to rounding: 1e-4 of a standard deviation. torch's own convolutions already run as fast as
the processor multiplies, and have to take fewer products to be any faster.

Source: A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks", 2015, arXiv:1509.09308; the matrices are
A. L. Toom's and S. A. Cook's, for interpolation at 0, 1, -1, 2, -2 and infinity.
"""

from __future__ import annotations

from functools import lru_cache
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

TILE = {3: 3, 4: 4, 6: 3, 8: 4}
"""The side of a map to the m that it is a multiple of. In larger maps more time goes into moving tiles than is won."""

CHANNELS = 32
"""With fewer, too."""

POINTS = (0.0, 1.0, -1.0, 2.0, -2.0)


def with_winograd(model: nn.Module) -> nn.Module:
    """`model`, whose 3x3 convolutions from now on train by Winograd's algorithm where it pays. Same names and weights.

    That is on a CPU, in float32, and as torch runs it; elsewhere, and in evaluation, they are convolutions as before.
    """
    for module in model.modules():
        if type(module) is nn.Conv2d and module.weight.device.type == "cpu" and _fits(module):
            module.__class__ = WinogradConv2d
    return model


def _fits(layer: nn.Conv2d) -> bool:
    plain = layer.groups == 1 and layer.padding_mode == "zeros" and layer.dilation == layer.stride == (1, 1)
    return plain and layer.kernel_size == (3, 3) and layer.padding == (1, 1) and layer.in_channels >= CHANNELS


class WinogradConv2d(nn.Conv2d):
    """A 3x3 convolution, padded by 1, of maps (N, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Conv2d's name for it
        pays = self.training and all(side in TILE for side in input.shape[2:])
        if not pays or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return super().forward(input)
        outputs = winograd(input, self.weight)
        return outputs if self.bias is None else outputs + self.bias[:, None, None]


def winograd(inputs: Tensor, filters: Tensor) -> Tensor:
    """`conv2d(inputs, filters, padding=1)` of (N, C, H, W) and (K, C, 3, 3) as (N, K, H, W) in channels_last.

    The sides of the maps are among `TILE`.
    """
    (count, channels, height, width), features = inputs.shape, len(filters)
    b, g, a = transforms(height, width)
    places = inputs.permute(2, 3, 0, 1).reshape(height * width, count * channels)
    v = (b @ places).view(len(g), -1, channels)  # of each of the n^2: tiles and images, channels
    u = (g @ filters.permute(2, 3, 1, 0).reshape(9, channels * features)).view(len(g), channels, features)
    y = a @ torch.bmm(v, u).view(-1, count * features)
    return y.view(height, width, count, features).permute(2, 3, 0, 1).contiguous(memory_format=torch.channels_last)


@lru_cache
def transforms(height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """B^T of all tiles, (n^2 tiles, H W), for a map without its padding; G, (n^2, 9); A^T of them, (H W, n^2 tiles)."""
    (b_rows, g_rows, a_rows), (b_columns, g_columns, a_columns) = _of_line(height), _of_line(width)
    b = np.einsum("itx,jsy->ijtsxy", b_rows, b_columns).reshape(-1, height * width)
    g = np.einsum("ix,jy->ijxy", g_rows, g_columns).reshape(-1, 9)
    a = np.einsum("xit,yjs->xyijts", a_rows, a_columns).reshape(height * width, -1)
    return cast("tuple[Tensor, Tensor, Tensor]", tuple(torch.from_numpy(each).float() for each in (b, g, a)))


def _of_line(side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same of one dimension: (n, tiles, side), (n, 3), (side, n, tiles).

    The product of two polynomials is that of their values at n points, interpolated; a correlation is its transpose.
    """
    m = TILE[side]
    n, tiles = m + 2, side // m

    def values(coefficients: int) -> np.ndarray:
        """Of a polynomial with so many coefficients at the n points, the last of which is infinity."""
        finite = np.vander(POINTS[: n - 1], coefficients, increasing=True)
        return np.vstack((finite, np.eye(coefficients)[-1:]))

    of_tile = np.linalg.inv(values(n)).T
    padded = np.zeros((n, tiles, side + 2))
    a = np.zeros((side, n, tiles))
    for tile in range(tiles):
        padded[:, tile, tile * m : tile * m + n] = of_tile
        a[tile * m : (tile + 1) * m, :, tile] = values(m).T
    return padded[:, :, 1:-1], values(3), a
