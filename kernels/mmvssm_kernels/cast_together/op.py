"""The operator ``mmvssm::cast_together``: schema, fake, FLOPs."""

import torch
from torch import Tensor

from .. import dispatch
from ..flops import flop_formula
from ..grids import cdiv
from ..registration import custom_op

# Elements of a program of the kernel.
BLOCK = 2048


def padded(size: int) -> int:
    """Elements that a tensor of ``size`` takes in the result: whole blocks."""
    return cdiv(size, BLOCK) * BLOCK


def _flat_empty(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    return tensors[0].new_empty(sum(padded(t.numel()) for t in tensors), dtype=dtype)


@custom_op("cast_together")
def cast_together_op(tensors: list[Tensor], dtype: torch.dtype, backend: str) -> Tensor:
    """Elements of all tensors in ``dtype``, each followed by zeros up to whole blocks."""
    flat = _flat_empty(tensors, dtype)

    def triton_call():
        from .triton_fwd import cast_together_forward

        cast_together_forward(tensors, flat)

    def torch_call():
        start = 0
        for tensor in tensors:
            end = start + padded(tensor.numel())
            flat[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)
            flat[start + tensor.numel() : end].zero_()
            start = end

    dispatch.run("cast_together", backend, tensors[0], triton_call, torch_call, _obstacle(tensors, dtype), None)
    return flat


def _obstacle(tensors: list[Tensor], dtype: torch.dtype) -> str | None:
    return dispatch.FLOAT32_ONLY if torch.float64 in (tensors[0].dtype, dtype) else None


@cast_together_op.register_fake
def _(tensors, dtype, backend):
    return _flat_empty(tensors, dtype)


@flop_formula("cast_together")
def _flops(*shapes, out_shape=None, **kwargs) -> int:
    """None, as torch's FLOP counter counts for copies."""
    return 0
