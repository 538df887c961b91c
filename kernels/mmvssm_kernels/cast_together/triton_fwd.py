"""Copies of several tensors in another dtype, Triton: a program owns a block of elements of one of them."""

import triton
import triton.language as tl
from torch import Tensor

from ..grids import cdiv
from .op import BLOCK

# Tensors of a launch.
TENSORS = 8
_SIZES = [f"{name}_{i}" for i in range(TENSORS) for name in ("size", "end")]


@triton.jit
def _choose(i_block, p_given, size, first, p_next, next_size, end):
    """A tensor, its size and its first block: the next one if the block lies behind the ``end`` of this one."""
    if i_block >= end:
        p_given = p_next
        size = next_size
        first = end
    return p_given, size, first


@triton.jit(do_not_specialize=_SIZES)
def cast_together_kernel(
    p_flat, p_0, p_1, p_2, p_3, p_4, p_5, p_6, p_7,
    size_0, size_1, size_2, size_3, size_4, size_5, size_6, size_7,
    end_0, end_1, end_2, end_3, end_4, end_5, end_6, end_7,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Every tensor in whole blocks of ``flat``; tensor i ends at block end_i of the launch."""
    i_block = tl.program_id(0)
    p_given = p_0
    size = size_0
    first = i_block * 0
    p_given, size, first = _choose(i_block, p_given, size, first, p_1, size_1, end_0)
    p_given, size, first = _choose(i_block, p_given, size, first, p_2, size_2, end_1)
    p_given, size, first = _choose(i_block, p_given, size, first, p_3, size_3, end_2)
    p_given, size, first = _choose(i_block, p_given, size, first, p_4, size_4, end_3)
    p_given, size, first = _choose(i_block, p_given, size, first, p_5, size_5, end_4)
    p_given, size, first = _choose(i_block, p_given, size, first, p_6, size_6, end_5)
    p_given, size, first = _choose(i_block, p_given, size, first, p_7, size_7, end_6)
    o_element = tl.arange(0, BLOCK)
    o_given = (i_block - first) * BLOCK + o_element
    values = tl.load(tl.multiple_of(p_given, 16) + o_given, mask=o_given < size, other=0.0)
    tl.store(p_flat + i_block.to(tl.int64) * BLOCK + o_element, values.to(p_flat.dtype.element_ty))


def cast_together_forward(tensors: list[Tensor], flat: Tensor) -> None:
    """Fill ``flat``; see :func:`.op.cast_together_op`."""
    start = 0
    for i in range(0, len(tensors), TENSORS):
        given = [t.contiguous() for t in tensors[i : i + TENSORS]]
        given += [given[-1]] * (TENSORS - len(given))
        sizes = [t.numel() for t in given]
        ends, blocks = [], 0
        for size in sizes[: len(tensors) - i]:
            blocks += cdiv(size, BLOCK)
            ends.append(blocks)
        ends += [blocks] * (TENSORS - len(ends))
        if blocks:
            cast_together_kernel[(blocks,)](flat[start:], *given, *sizes, *ends, BLOCK, num_warps=4)
        start += blocks * BLOCK
