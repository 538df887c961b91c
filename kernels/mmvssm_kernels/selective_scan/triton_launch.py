"""Shapes, block sizes and strides for launching the kernels of the one-direction scan."""

import torch
import triton
from torch import Tensor

from ..grids import cdiv
from . import op

# Not specialised, so that one kernel serves all sizes. Of the strides only those of channels, tokens and states are,
# because the compiler has to know which of them is one.
RUN_TIME_SIZES = ["length", "channels", "n_groups", "n_tiles", "n_segments", "n_blocks", "zero"]
RUN_TIME_SIZES += [f"stride_{name}_batch" for name in ("u", "delta", "z", "B", "C", "dout")]
RUN_TIME_SIZES += ["stride_B_group", "stride_C_group"]
# Rows of so many warps are not cut into segments: one warp for each scheduler of a large GPU. Others are cut until all
# its places for warps are taken, once.
_ENOUGH_WARPS = 528
_TARGET_WARPS = 1584
_MAX_SEGMENTS = 128
# A segment shorter than this costs more in summaries than it gains.
_MIN_TOKENS_PER_SEGMENT = 64


def forward_form(state: int) -> tuple[int, int, int, int | None]:
    """Channels and warps of a program, tokens of a tile and limit of registers for (padded) ``state`` states."""
    return 32, max(1, state // 16), 4 if state > 4 else 8, None


def backward_form(state: int) -> tuple[int, int, int, int | None]:
    """The same for the backward pass, which holds decays and states of a tile: 8 states of a channel in a lane.

    With several warps the registers limit how many programs run side by side.
    """
    return 32, max(1, min(8, state // 8)), 4 if state > 4 else 8, 168 if state > 8 else None


def segment_tokens(length: int, warps: int) -> int:
    """Tokens per segment: all of them when ``warps`` keep the GPU busy, else fewer."""
    wanted = 1 if warps >= _ENOUGH_WARPS else min(_MAX_SEGMENTS, _TARGET_WARPS // warps)
    tokens = max(cdiv(length, wanted), min(_MIN_TOKENS_PER_SEGMENT, length))
    return cdiv(tokens, op.KEEP) * op.KEEP


class Launch:
    """Everything that forward and backward launches have in common."""

    def __init__(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, form):
        self.batch, self.channels, length = u.shape
        self.groups, self.state = B.shape[1:3]
        padded = triton.next_power_of_2(self.state)
        block_channels, warps, tile, registers = form(padded)
        self.A = A.contiguous()
        vectors = [None if t is None else t.contiguous() for t in (D, delta_bias)]
        self.tensors = (u, delta, z, self.A, B, C, *vectors)
        self.blocks = cdiv(self.channels // self.groups, block_channels)
        programs = self.batch * self.groups * self.blocks
        tiles_per_segment = segment_tokens(length, programs * warps) // tile
        self.segments = cdiv(cdiv(length, tile), tiles_per_segment)
        self.grid = (self.groups * self.blocks, self.segments, self.batch)
        strides = [s for t in (u, delta, z, B, C) for s in ((0, 0, 0) if t is None else t.stride())]
        self.sizes = (length, self.channels, self.groups, tiles_per_segment, self.segments, 0, *strides)
        self.constants = dict(
            N=self.state,
            SOFTPLUS=delta_softplus,
            REVERSE=reverse,
            SEGMENTED=self.segments > 1,
            T=tile,
            BLOCK_C=block_channels,
            BLOCK_N=padded,
            num_warps=warps,
        )
        if registers is not None and not torch.version.hip:  # the option is that of NVIDIA's compiler
            self.constants["maxnreg"] = registers
        self._like = u

    def empty(self, *shape: int) -> Tensor:
        """Uninitialised float32 tensor beside the inputs."""
        return self._like.new_empty(shape, dtype=torch.float32)

    def sum_constants(self) -> dict:
        """How the backward kernel adds over channels; see :func:`.triton_tile.sum_over_channels`."""
        rows = self.constants["T"] * self.constants["BLOCK_N"]
        # Float32 products from three of tf32 where the GPU has them.
        exact = "ieee" if torch.version.hip else "tf32x3"
        wide = self._like.dtype == torch.float32
        return dict(MATRIX_UNIT=rows >= 16 and self.constants["BLOCK_C"] >= 16, PRECISION=exact if wide else "tf32")

    def summaries(self) -> tuple[Tensor, Tensor]:
        """What every segment hands on: a state (B, S, N, D) and its sum of step sizes (B, S, D); empty if not cut."""
        segments = self.segments if self.segments > 1 else 0
        return self.empty(self.batch, segments, self.state, self.channels), self.empty(
            self.batch, segments, self.channels
        )
