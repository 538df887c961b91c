"""Shapes, strides and block sizes for launching the kernels of Vim's inner block."""

import torch
import triton
from torch import Tensor

from .op import TILE
from .parameters import split_parameters

# Not specialised, so that one kernel serves all lengths; ``zero`` for the reason in triton_tile.py.
RUN_TIME_SIZES = ["scale", "length", "n_all", "n_tiles", "n_segments", "n_slots", "zero"]
# Programs of one warp that keep a large GPU busy; sequences are not cut into more segments than that takes.
_TARGET_PROGRAMS = 2048
_MAX_SEGMENTS = 64
# A segment shorter than this costs more in summaries than it gains.
_MIN_TILES_PER_SEGMENT = 4


def segment_tiles(tiles: int, programs: int) -> int:
    """Tiles per segment: all of them when ``programs`` fill the GPU, fewer when the sequence must be cut for that."""
    wanted = min(_MAX_SEGMENTS, max(1, _TARGET_PROGRAMS // programs))
    return max(triton.cdiv(tiles, wanted), min(_MIN_TILES_PER_SEGMENT, tiles))


def register_limit(count: int) -> dict:
    """Compiler option for at most ``count`` registers in a thread, on GPUs whose compiler knows it."""
    return {} if torch.version.hip else {"maxnreg": count}


def adjacent_channels(rows: Tensor) -> Tensor:
    """(B, L, C) whose channels are adjacent in memory, copied only if they are not; other strides do not matter."""
    return rows if rows.stride(2) == 1 else rows.contiguous()


class Launch:
    """Everything that forward and backward launches have in common."""

    def __init__(self, xz: Tensor, parameters: list[Tensor], block_channels: int = 32):
        self.xz = xz = adjacent_channels(xz)
        self.batch, self.length, columns = xz.shape
        self.channels = columns // 2
        self.z = xz[..., self.channels :]
        self.parameters = [tuple(t.contiguous() for t in direction) for direction in split_parameters(parameters)]
        self.directions = len(self.parameters)
        forward = split_parameters(parameters)[0]
        self.rank, self.state, self.width = forward.rank, forward.state, forward.conv_weight.shape[1]
        self.rows = self.rank + 2 * self.state
        self.block_rows = max(16, triton.next_power_of_2(self.rows))
        # Rows of partial sums: A_log, dt_proj_weight, dt_proj_bias, D, conv_weight, conv_bias, x_proj_weight.
        self.partial_rows = self.state + self.rank + 2 + self.width + 1 + self.rows
        self.tiles = triton.cdiv(self.length, TILE)
        self.padded = self.tiles * TILE
        blocks = triton.cdiv(self.channels, block_channels)
        self.tiles_per_segment = segment_tiles(self.tiles, self.batch * blocks)
        self.segments = triton.cdiv(self.tiles, self.tiles_per_segment)
        self.grid = (blocks, self.segments, self.batch)
        self.sizes = (self.length, self.channels, self.rank, self.tiles, self.tiles_per_segment, self.segments)
        # Of projections from row to row and of z; and the zero that hides the alignment of channels.
        self.strides = (self.padded, *self.z.stride()[:2], 0)
        # dt_proj_weight, dt_proj_bias and D of both directions; a missing one's are never read.
        members = [[p[i] for i in (3, 4, 6)] for p in self.parameters]
        self.step_parameters = (*members[0], *members[-1])
        # Float32 products from three of tf32 where the GPU has them: the low-rank values are float32 for all inputs.
        exact = "ieee" if torch.version.hip else "tf32x3"
        wide = xz.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
        self.precision = exact if wide else "tf32"
        self.constants = dict(
            N=self.state,
            T=TILE,
            BLOCK_C=block_channels,
            BLOCK_R=max(16, triton.next_power_of_2(self.rank)),
            PRECISION=self.precision,
            num_warps=1,
            **register_limit(168),
        )

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uninitialised tensor beside the input."""
        return self.xz.new_empty(shape, dtype=dtype)

    def summaries(self) -> tuple[Tensor, Tensor]:
        """What every segment hands on: a state (K, B, S, N, E) and its sum of step sizes (K, B, S, E)."""
        sequences = (self.directions, self.batch, self.segments if self.segments > 1 else 0)
        return self.empty(*sequences, self.state, self.channels), self.empty(*sequences, self.channels)

    def scratch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Current states of the segments, projections and rates for a call that keeps nothing."""
        sequences = (self.directions, self.batch)
        return (
            self.empty(*sequences, self.segments, self.state, self.channels),
            self.empty(*sequences, self.rows, self.padded),
            self.empty(self.directions, self.state, self.channels),
        )
