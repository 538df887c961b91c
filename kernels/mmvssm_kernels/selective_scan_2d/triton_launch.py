"""Shapes, strides and block sizes for launching the kernels of the four-direction scan."""

import torch
import triton
from torch import Tensor

from ..selective_scan.triton_launch import segment_tiles


def pixel_uniform(x: Tensor) -> Tensor:
    """``x`` (B, D, H, W), copied to channel-last memory unless one stride leads from each pixel to the next."""
    height, width = x.shape[2:]
    uniform = width == 1 or height == 1 or x.stride(2) == width * x.stride(3)
    return x if uniform else x.contiguous(memory_format=torch.channels_last)


def pixel_stride(x: Tensor) -> int:
    """Elements from one pixel to the next of a map that :func:`pixel_uniform` returned."""
    return x.stride(3) if x.shape[3] > 1 else x.stride(2)


# Products of 16-bit operands that keep their float32 result exist from torch 2.8 on.
_WIDE_PRODUCTS = "dtype" in torch.ops.aten.mm.overloads()


def project(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows @ weight.T`` from operands in the dtype of ``rows``, kept in float32.

    Rounding the projections to 16 bits would cost more accuracy than everything after them.
    """
    weight = weight.to(rows.dtype)
    if rows.dtype != torch.float32 and rows.device.type == "cuda" and _WIDE_PRODUCTS:
        return torch.mm(rows, weight.T, out_dtype=torch.float32)
    return rows.float() @ weight.float().T


class Launch:
    """Everything that forward and backward launches have in common."""

    def __init__(
        self, x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, block_channels=32, tile=16, states_per_warp=4
    ):
        x = pixel_uniform(x)
        self.batch, self.channels, self.height, self.width = x.shape
        self.rank, self.state = dt_proj_weight.shape[2], A_log.shape[1]
        length = self.height * self.width
        self.flat = x.permute(0, 2, 3, 1).reshape(self.batch, length, self.channels)
        # One matrix product makes the projections of all directions at every pixel: (B, L, 4 (R + 2N)).
        self.projected = project(self.flat.flatten(0, 1), x_proj_weight.flatten(0, 1)).unflatten(
            0, (self.batch, length)
        )
        weights = (t.contiguous() for t in (dt_proj_weight, dt_proj_bias, A_log, D))
        self.tensors = (x, self.projected, *weights)
        tiles = triton.cdiv(length, tile)
        programs = self.batch * triton.cdiv(self.channels, block_channels)
        self.tiles_per_segment = segment_tiles(tiles, programs)
        self.segments = triton.cdiv(tiles, self.tiles_per_segment)
        self.states = x.new_empty(self.batch, 4, self.segments, self.state, self.channels, dtype=torch.float32)
        self.steps = x.new_empty(self.batch, 4, self.segments, self.channels, dtype=torch.float32)
        self.grid = (triton.cdiv(self.channels, block_channels), self.segments, self.batch)
        self.sizes = (
            self.height,
            self.width,
            self.channels,
            self.rank,
            self.tiles_per_segment,
            self.segments,
            x.stride(0),
            pixel_stride(x),
            x.stride(1),
        )
        block_state = triton.next_power_of_2(self.state)
        self.constants = dict(
            N=self.state,
            NARROW=min(self.height, self.width) < tile,
            T=tile,
            BLOCK_C=block_channels,
            BLOCK_N=block_state,
            BLOCK_R=max(16, triton.next_power_of_2(self.rank)),
            PRECISION="ieee" if x.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32 else "tf32",
            num_warps=max(1, min(8, block_state // states_per_warp)),
        )
