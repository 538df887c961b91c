"""What both pyramids are made of: layers that change the stride of a map by a power of two."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..layers import LayerNorm2d

STRIDES = (4, 8, 16, 32)
"""Strides of the four levels."""

NORMS: dict[str, type[nn.Module]] = {"SyncBN": nn.SyncBatchNorm, "BN": nn.BatchNorm2d, "LN": LayerNorm2d}


class CellMaxPool(nn.Module):
    """Maximum over k x k cells, grid floor(size / k); an axis shorter than k becomes one cell.

    Args:
        kernel_size: Side k, also the stride.
    """

    def __init__(self, kernel_size: int):
        super().__init__()
        self.kernel_size = kernel_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, C, H, W) to (B, C, max(H // k, 1), max(W // k, 1))."""
        k = self.kernel_size
        return F.max_pool2d(x, (min(k, x.shape[-2]), min(k, x.shape[-1])), stride=k)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}"


def rescale_layers(in_dims: int, widths: Sequence[int], stride: int, out_stride: int, norm: str) -> list[nn.Module]:
    """Layers that bring a map of width ``in_dims`` from ``stride`` to ``out_stride``.

    Args:
        in_dims: Width of the map.
        widths: Widths after the first and the second doubling of the grid.
        stride: Stride of the map.
        out_stride: Wanted stride; ``stride / out_stride`` is one of 4, 2, 1, 1/2, 1/4, 1/8.
        norm: Norm between two doublings, a key of ``NORMS``.

    Returns:
        Deconvolution, norm, GELU, deconvolution for a factor of 4; a deconvolution for 2; nothing for 1; a maximum
        over cells below.
    """
    if out_stride >= stride:
        return [CellMaxPool(out_stride // stride)] if out_stride > stride else []
    layers: list[nn.Module] = [nn.ConvTranspose2d(in_dims, widths[0], kernel_size=2, stride=2)]
    if stride // out_stride == 4:
        layers += [NORMS[norm](widths[0]), nn.GELU(), nn.ConvTranspose2d(widths[0], widths[1], 2, stride=2)]
    return layers


def check_settings(stride: Any, norm: Any) -> None:
    """Raise ValueError for a stride or norm that does not exist."""
    if stride not in STRIDES[:3]:
        raise ValueError(f"stride={stride!r} must be that of the backbone's maps, one of {STRIDES[:3]}")
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is unknown; choose one of {', '.join(map(repr, NORMS))}")


def check_widths(in_channels: Any, counts: Sequence[int]) -> list[int]:
    """``in_channels`` as a list of as many positive integers as one of ``counts`` says."""
    widths = [in_channels] if isinstance(in_channels, int) else in_channels
    allowed = " or ".join(map(str, counts))
    words = "width of one map" if allowed == "1" else f"widths of {allowed} maps"
    if not isinstance(widths, Sequence) or len(widths) not in counts:
        raise ValueError(f"in_channels={in_channels!r} must be the {words}")
    if not all(isinstance(width, int) and not isinstance(width, bool) and width > 0 for width in widths):
        raise ValueError(f"in_channels={in_channels!r} must hold positive integers")
    return list(widths)


def check_maps(maps: Any, in_channels: Sequence[int], name: str) -> None:
    """Raise ValueError unless ``maps`` are (B, C, H, W) of the widths ``in_channels``."""
    given = [tuple(x.shape) for x in maps]
    if [shape[1] if len(shape) == 4 else None for shape in given] != list(in_channels):
        raise ValueError(f"{name} was built for maps (B, C, H, W) with C = {list(in_channels)}, got shapes {given}")
