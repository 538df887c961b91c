"""Shapes, strides and block sizes for launching the kernels of Vim's inner block."""

import torch
import triton
from torch import Tensor

from ..grids import cdiv
from .op import TILE, row_size
from .parameters import split_parameters

# Not specialised, so that one kernel serves all lengths.
RUN_TIME_SIZES = ["scale", "length", "n_all", "n_tiles", "n_segments"]
# With fewer channels some things are not rounded, because sums are too short for roundings to cancel: inputs before
# they are projected, and in the backward pass inputs, step sizes and their gradients.
NARROW_CHANNELS = 64
_MAX_SEGMENTS = 512
# A segment shorter than this costs more in summaries than it gains.
_MIN_TILES_PER_SEGMENT = 4


def segment_tiles(tiles: int, programs: int, enough: int) -> int:
    """Tiles per segment: all of them when ``programs`` nearly are ``enough`` for the GPU, else so many that there are.

    Cut sequences are walked twice, so fewer than three segments do not pay.
    """
    wanted = min(_MAX_SEGMENTS, enough // programs if enough >= 3 * programs else 1)
    return max(cdiv(tiles, wanted), min(_MIN_TILES_PER_SEGMENT, tiles))


def register_limit(count: int) -> dict:
    """Compiler option for at most ``count`` registers in a thread, on GPUs whose compiler knows it."""
    return {} if torch.version.hip else {"maxnreg": count}


def adjacent_channels(rows: Tensor) -> Tensor:
    """(B, L, C) whose channels are adjacent in memory, copied only if they are not; other strides do not matter."""
    return rows if rows.stride(2) == 1 else rows.contiguous()


class Launch:
    """Everything that forward and backward launches have in common."""

    def __init__(self, xz: Tensor, parameters: list[Tensor]):
        self.xz = xz = adjacent_channels(xz)
        self.batch, self.length, columns = xz.shape
        self.channels = columns // 2
        self.parameters = [tuple(t.contiguous() for t in direction) for direction in split_parameters(parameters)]
        self.directions = len(self.parameters)
        forward = split_parameters(parameters)[0]
        self.rank, self.state, self.width = forward.rank, forward.state, forward.conv_weight.shape[1]
        self.rows = self.rank + 2 * self.state
        self.row = row_size(forward)
        self.block_rows = max(16, triton.next_power_of_2(self.rows))
        self.tiles = cdiv(self.length, TILE)
        self.padded = self.tiles * TILE
        # Products whose operands are float32 whatever the inputs are, from three of tf32 where the GPU has them.
        self.precision = "ieee" if torch.version.hip else "tf32x3"

    def plan(self, own_channels: int, state_lanes: int, registers: int, enough_programs: int, directions: int = 1):
        """Grid, tiles per segment, segments and constants for kernels whose programs own a tile of states.

        Lanes have ``own_channels`` channels, whose states are shared by ``state_lanes`` of them. B and C are the same
        for all channels, and a multiprocessor's cache hands them out to every lane anew, so lanes should have more than
        one channel, and fewer states.
        """
        states = triton.next_power_of_2(self.state)
        own_states = min(4, states)
        groups = states // own_states
        state_lanes = min(groups, max(state_lanes, min(4, states // 16)))
        channel_lanes = 32 // state_lanes
        blocks = cdiv(self.channels, own_channels * channel_lanes)
        n_tiles = segment_tiles(self.tiles, self.batch * blocks * directions, enough_programs)
        segments = cdiv(self.tiles, n_tiles)
        constants = dict(
            N=self.state,
            T=TILE,
            NR=own_states,
            NG=groups // state_lanes,
            CR=own_channels,
            NL=state_lanes,
            CL=channel_lanes,
            num_warps=1,
            num_stages=1,
            **register_limit(registers),
        )
        return (blocks, segments * directions, self.batch), n_tiles, segments, constants

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uninitialised tensor beside the input."""
        return self.xz.new_empty(shape, dtype=dtype)

    def summaries(self, segments: int) -> tuple[Tensor, Tensor]:
        """What every segment hands on: a state (K, B, S, E, N) and its sum of step sizes (K, B, S, E)."""
        sequences = (self.directions, self.batch, segments if segments > 1 else 0, self.channels)
        return self.empty(*sequences, self.state), self.empty(*sequences)
