"""Tensors as rows, for kernels that work on the last axis."""

from torch import Tensor


def rows_of(tensor: Tensor, axes: int = 1) -> Tensor:
    """(..., D) as evenly spaced rows (M, D) with adjacent channels, copied only if it is not so yet.

    Args:
        tensor: At least ``axes`` axes.
        axes: Number of last axes that make up a row.
    """
    rows = tensor.reshape(-1, tensor.shape[-axes:].numel())
    return rows if rows.stride(1) == 1 else rows.contiguous()
