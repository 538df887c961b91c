"""Shapes and block sizes for launching the kernels of the one-direction scan."""

import torch
import triton
from torch import Tensor

# Programs that keep a large GPU busy; rows beyond that are not cut into segments.
_TARGET_PROGRAMS = 4096
_MAX_SEGMENTS = 64
# A segment shorter than this costs more in summaries than it gains.
_MIN_TILES_PER_SEGMENT = 4


def segment_tiles(tiles: int, programs: int) -> int:
    """Tiles per segment: all of them when ``programs`` fill the GPU, fewer when the sequence must be cut for that."""
    wanted = min(_MAX_SEGMENTS, max(1, _TARGET_PROGRAMS // programs))
    return max(triton.cdiv(tiles, wanted), min(_MIN_TILES_PER_SEGMENT, tiles))


def token_major(tensor: Tensor) -> Tensor:
    """(B, D, L) with adjacent channels and evenly spaced batch elements and tokens, copied only if it is not so yet."""
    return tensor if tensor.stride(1) == 1 else tensor.transpose(1, 2).contiguous().transpose(1, 2)


class Launch:
    """Everything that forward and backward launches have in common."""

    def __init__(
        self,
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        delta_softplus,
        reverse,
        block_channels=32,
        tile=16,
        states_per_warp=4,
    ):
        self.batch, self.channels, length = u.shape
        self.groups, self.state = B.shape[1:3]
        rows = [None if t is None else token_major(t) for t in (u, delta, z)]
        weights = [t.permute(0, 3, 1, 2).contiguous() for t in (B, C)]  # (B, L, G, N)
        vectors = [None if t is None else t.contiguous() for t in (D, delta_bias)]
        self.tensors = (*rows, A.contiguous(), *weights, *vectors)
        group_channels = self.channels // self.groups
        self.blocks = triton.cdiv(group_channels, block_channels)
        tiles = triton.cdiv(length, tile)
        self.tiles_per_segment = segment_tiles(tiles, self.batch * self.groups * self.blocks)
        self.segments = triton.cdiv(tiles, self.tiles_per_segment)
        self.grid = (self.groups * self.blocks, self.segments, self.batch)
        self.states = u.new_empty(self.batch, self.segments, self.state, self.channels, dtype=torch.float32)
        self.steps = u.new_empty(self.batch, self.segments, self.channels, dtype=torch.float32)
        strides = [0 if t is None else t.stride(axis) for t in rows for axis in (0, 2)]
        self.sizes = (length, self.channels, self.groups, self.tiles_per_segment, self.segments, *strides, 1)
        block_state = triton.next_power_of_2(self.state)
        self.constants = dict(
            N=self.state,
            SOFTPLUS=delta_softplus,
            REVERSE=reverse,
            T=tile,
            BLOCK_C=block_channels,
            BLOCK_N=block_state,
            num_warps=max(1, min(8, block_state // states_per_warp)),
        )
