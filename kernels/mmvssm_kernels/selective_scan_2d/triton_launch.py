"""Shapes, strides and block sizes for launching the kernels of the four-direction scan."""

import torch
import triton
from torch import Tensor

from ..grids import cdiv
from . import segments
from .triton_states import selective_scan_2d_carry_kernel, selective_scan_2d_states_kernel

# Channels of a lane: the more, the less work per token is repeated; the fewer, the fewer registers.
_LANE_CHANNELS = 4
# A program walks through a segment of a sequence, tile by tile. Whole sequences need no states at borders, but have to
# be enough programs; then they take several images. Otherwise segments have at most so many tiles: few, so that what
# both directions of rows or columns read stays in the cache.
_ENOUGH_PROGRAMS, _MANY_PROGRAMS, _MAX_WALK = 132 * 8, 132 * 16, 4
# States that are scanned together if there are several.
_UNROLL = 2


def _register_limit(block_rank: int, state: int, backward: bool) -> dict[str, int]:
    """Registers of a thread; only NVIDIA's compiler takes a limit. Spills cost more than warps bring."""
    if torch.version.hip:
        return {}
    return {"maxnreg": 255 if backward else 128 if block_rank == 16 and state == 1 else 168}


def pixel_uniform(x: Tensor) -> Tensor:
    """``x`` (B, D, H, W), copied unless channels are adjacent and one stride leads from pixel to pixel of the batch."""
    batch, channels, height, width = x.shape
    stride = pixel_stride(x)
    strides = ((channels, x.stride(1), 1), (height, x.stride(2), width * stride), (width, x.stride(3), stride))
    strides += ((batch, x.stride(0), height * width * stride),)
    uniform = all(size == 1 or given == wanted for size, given, wanted in strides)
    return x if uniform else x.contiguous(memory_format=torch.channels_last)


def pixel_stride(x: Tensor) -> int:
    """Elements from one pixel to the next of a map that :func:`pixel_uniform` returned."""
    for axis in (3, 2, 0):
        if x.shape[axis] > 1:
            return x.stride(axis)
    return x.shape[1]


def in_pairs(directions: Tensor) -> Tensor:
    """(4, ...) in the order 0, 2, 1, 3, or put back from there."""
    return directions.unflatten(0, (2, 2)).transpose(0, 1).flatten(0, 1)


# For float32; three TF32 products have the layout that the kernels are written for, too.
_EXACT = "ieee" if torch.version.hip else "tf32x3"


def _precision(dtype: torch.dtype) -> str:
    """Precision of products inside the kernels for inputs of a dtype."""
    return _EXACT if dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32 else "tf32"


class Launch:
    """Everything that forward and backward launches have in common."""

    def __init__(self, x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, backward: bool):
        self.x = x = pixel_uniform(x)
        self.batch, self.channels, self.height, self.width = x.shape
        self.rank, self.state = dt_proj_weight.shape[2], A_log.shape[1]
        self.flat = x.permute(0, 2, 3, 1).reshape(-1, self.channels)
        # One matrix product makes the projections of all directions at every pixel: (B, L, 4, R + 2N), padded so that
        # every direction's can be read in vectors.
        width = self.rank + 2 * self.state
        self.padded = padded = cdiv(width, 8) * 8
        block_rank = max(16, triton.next_power_of_2(self.rank))
        self.one_tile = self.state == 1 and width <= block_rank  # B and C fit behind the low-rank step sizes
        self.x_proj = x_proj_weight.to(x.dtype)
        if padded > width:  # by copies of any row: what is made of them is multiplied with zeros
            more = self.x_proj[:, :1].expand(-1, padded - width, -1)
            self.x_proj = torch.cat((self.x_proj, more), 1)
        self.projected = self.flat @ self.x_proj.flatten(0, 1).T
        if self.state > 1:  # a single state's rate is made from its logarithm inside the kernels
            A_log = A_log.float().exp().view(4, self.channels, self.state).transpose(1, 2)
        self.parameters = tuple(t.contiguous() for t in (dt_proj_weight.to(x.dtype), dt_proj_bias, A_log, D))

        self.block = 4 * _LANE_CHANNELS
        self.blocks = cdiv(self.channels, self.block)
        self.tiles = segments.count_tiles(self.height, self.width)
        walk = self.tiles
        if self.batch * self.blocks < _ENOUGH_PROGRAMS:
            walk = min(_MAX_WALK, cdiv(self.batch * self.blocks * self.tiles, _ENOUGH_PROGRAMS))
        self.segments = cdiv(self.tiles, walk)
        self.sizes = (self.height, self.width, self.tiles, walk)
        # Programs of whole sequences take several images, which share the cost of loading weights.
        self.images = max(1, self.batch * self.blocks // _MANY_PROGRAMS) if self.segments == 1 else 1
        self.groups = cdiv(self.batch, self.images) * self.segments
        self.grid = (self.blocks * self.groups,)
        self.walk = (self.batch, *self.sizes, self.images)
        # Programs of one launch may not meet in a pixel: with several segments, rows and columns are two launches.
        self.parts = ((0, 4),) if self.segments == 1 else ((0, 2), (2, 2))
        self.constants = dict(
            D=self.channels,
            R=self.rank,
            N=self.state,
            K=padded,
            T=segments.LANE_TOKENS,
            Q=segments.GROUPS,
            V=_LANE_CHANNELS,
            BLOCK_R=block_rank,
            PRECISE=x.dtype == torch.float32,
            PRECISION=_precision(x.dtype),
            UNROLL=_UNROLL,
            num_warps=1,
            num_stages=1,
            **_register_limit(block_rank, self.state, backward),
        )

    def entering_states(self, rows: Tensor, adjoint: bool) -> Tensor:
        """States (B, 4, segments, N, D) that enter the segments, or adjoint flows; unread if there is one segment.

        ``rows`` is x or, for the adjoint, the gradient of y, as (B, D, H, W) in channel-last memory.
        """
        shape = (self.batch, 4, self.segments, self.state, self.channels)
        entering = rows.new_empty(shape, dtype=torch.float32)
        if self.segments == 1:
            return entering
        states, decays = torch.empty_like(entering), torch.empty_like(entering)
        selective_scan_2d_states_kernel[(4 * self.grid[0],)](
            rows,
            self.projected,
            *self.parameters[:3],
            states,
            decays,
            *self.sizes,
            pixel_stride(rows),
            ADJOINT=adjoint,
            **self.constants,
        )
        parts = min(32, triton.next_power_of_2(cdiv(self.segments, 16)))
        block = 32
        grid = (self.batch * 4 * self.state * cdiv(self.channels, block),)
        sizes = (self.segments, cdiv(self.segments, parts), self.channels, self.state, adjoint)
        selective_scan_2d_carry_kernel[grid](
            states, decays, entering, *sizes, P=parts, S=8, C=block, num_warps=max(1, parts // 8)
        )
        return entering
