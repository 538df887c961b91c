"""Copies of several tensors in another dtype, by one launch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dispatch
from ..checks import check_tensor
from .op import cast_together_op, padded

__all__ = ["cast_together"]


def cast_together(tensors: Sequence[Tensor], dtype: torch.dtype, backend: str = "auto") -> list[Tensor]:
    """``[t.to(dtype) for t in tensors]`` by one launch: for the weights of a block, which are many and small.

    Not differentiable.

    Args:
        tensors: At least one, of any shapes, on one device and of one floating dtype.
        dtype: A floating dtype.
        backend: ``auto``, ``triton``, ``torch`` or ``reference``, which is the same as ``torch`` here.

    Returns:
        Contiguous copies, views of one tensor.

    Raises:
        TypeError: If one of them is no tensor.
        ValueError: If there are none, dtypes or devices differ, or dtype or backend is wrong.

    Example:
        >>> weight, bias = cast_together([torch.randn(8, 4), torch.randn(8)], torch.float16)
    """
    if not tensors:
        raise ValueError("tensors must hold at least one tensor, but it is empty")
    first = tensors[0]
    for i, tensor in enumerate(tensors):
        axes = "D" * tensor.dim() if isinstance(tensor, torch.Tensor) else "?"
        check_tensor(f"tensors[{i}]", tensor, tuple(axes), getattr(first, "device", None))
        if tensor.dtype != first.dtype:
            raise ValueError(f"tensors[{i}] must have the dtype {first.dtype} of tensors[0], but it has {tensor.dtype}")
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating dtype, but it is {dtype!r}")
    backend = dispatch.requested_backend(backend)
    with torch.no_grad():
        flat = cast_together_op(list(tensors), dtype, "torch" if backend == "reference" else backend)
    copies, start = [], 0
    for tensor in tensors:
        copies.append(flat[start : start + tensor.numel()].view(tensor.shape))
        start += padded(tensor.numel())
    return copies
