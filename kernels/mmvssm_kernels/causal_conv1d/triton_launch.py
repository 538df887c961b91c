"""Shapes and block sizes for launching the kernels of the convolution."""

from torch import Tensor

from ..grids import cdiv
from .layout import is_channel_first, tokens_before

# Tokens of a step, and bounds for the steps of a program.
_TOKENS_PER_STEP = 4
_MIN_STEPS, _MAX_STEPS = 4, 64
# Channels of a program of one warp: four to a lane, or two where that leaves fewer lanes idle.
_BLOCKS = (128, 64)


def token_major(tensor: Tensor) -> Tensor:
    """(B, D, L) with adjacent channels, copied only if it is not so yet; batch and token strides may be anything."""
    return tensor if tensor.stride(1) == 1 else tensor.transpose(1, 2).contiguous().transpose(1, 2)


class Launch:
    """Everything that forward and backward launches have in common."""

    def __init__(self, x, weight, bias, activation, reverse, padding, target_programs):
        batch, channels, length = x.shape
        width = weight.shape[1]
        self.channel_last_result = not is_channel_first(x)
        x = token_major(x)
        self.tensors = (x, weight.contiguous(), None if bias is None else bias.contiguous())
        block = min(_BLOCKS, key=lambda size: cdiv(channels, size) * size)
        blocks = cdiv(channels, block)
        steps = cdiv(batch * length * blocks, target_programs * _TOKENS_PER_STEP)
        steps = min(max(steps, _MIN_STEPS), _MAX_STEPS)
        segments = cdiv(length, steps * _TOKENS_PER_STEP)
        self.pieces = batch * segments
        self.grid = (blocks * self.pieces,)
        ahead = width - 1 - tokens_before(width, reverse, padding)
        first_tap, tap_step = (width - 1, -1) if reverse else (0, 1)
        self.sizes = (length, channels, blocks, segments, steps, ahead, first_tap, tap_step)
        self.strides = (x.stride(0), x.stride(2))
        self.constants = dict(WIDTH=width, SILU=activation == "silu", BLOCK_C=block, num_warps=1)
