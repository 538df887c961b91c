"""Shapes and block sizes for launching the kernels of add + norm."""

import triton
from torch import Tensor

# Channels of a row, or of several short rows, that a warp holds in registers.
_PER_WARP = 512


def rows_of(tensor: Tensor) -> Tensor:
    """(..., D) as evenly spaced rows (M, D) with adjacent channels, copied only if it is not so yet."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def block_sizes(channels: int) -> dict[str, int]:
    """Rows and channels of a tile, and warps: one warp as long as a row fits, so that sums need no shared memory."""
    block = triton.next_power_of_2(channels)
    return dict(ROWS=max(1, _PER_WARP // block), BLOCK_D=block, num_warps=max(1, block // _PER_WARP))
