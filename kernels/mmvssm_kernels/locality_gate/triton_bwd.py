"""The gate between long and short context, Triton backward pass.

Everything is computed again from the inputs. A program walks every P-th tile of rows and keeps its sums for the weight
in registers; the P partial sums are added up afterwards.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..grids import cdiv, program_count
from ..row_sums import sum_rows
from ..rows import rows_of
from .triton_fwd import RUN_TIME_SIZES, block_sizes, load_gate, load_tile, load_weight, locate, unit_rows

# Programs that are at work at the same time on a large GPU; also the number of partial sums.
_MAX_PROGRAMS = 1024


@triton.jit(do_not_specialize=[*RUN_TIME_SIZES, "n_tiles"])
def locality_gate_bwd_kernel(
    p_dy,
    p_long,
    p_x,
    p_logits,
    p_weight,
    p_bias,
    p_dlong,
    p_dx,
    p_dlogits,
    p_dweight,
    n_rows,
    n_tiles,
    heads,
    values,
    stride_dy,
    stride_long,
    stride_x,
    stride_logits,
    eps,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Gradients of the three contexts (M heads, V), and partial sums (P, V) for the weight."""
    i_program = tl.program_id(0)
    n_programs = tl.num_programs(0)
    weight = load_weight(p_weight, values, BLOCK_V)
    dweight = tl.zeros((ROWS, BLOCK_V), tl.float32)
    for i in range(tl.cdiv(n_tiles - i_program, n_programs)):
        o_row, i_token, o_channel, m_tile = locate(i_program + i * n_programs, n_rows, heads, values, ROWS, BLOCK_V)
        unit, factor = unit_rows(load_tile(p_x, i_token, o_channel, stride_x, m_tile), values, eps)
        short = unit * weight
        apart = load_tile(p_long, i_token, o_channel, stride_long, m_tile) - short
        s = load_gate(p_logits, p_bias, i_token, o_channel, stride_logits, m_tile)
        gradient = load_tile(p_dy, i_token, o_channel, stride_dy, m_tile)
        if SILU:
            y = short + s * apart
            sigmoid = tl.sigmoid(y)
            gradient *= sigmoid * (1 + y * (1 - sigmoid))
        o_tile = o_row * values + tl.arange(0, BLOCK_V)[None, :]
        tl.store(p_dlong + o_tile, (gradient * s).to(p_dlong.dtype.element_ty), mask=m_tile)
        dshort = gradient * (1 - s)
        dlogits = dshort * s * apart
        tl.store(p_dlogits + o_tile, dlogits.to(p_dlogits.dtype.element_ty), mask=m_tile)
        dweight += dshort * unit
        dunit = dshort * weight
        dx = factor * (dunit - unit * (tl.sum(dunit * unit, axis=1)[:, None] / values))
        tl.store(p_dx + o_tile, dx.to(p_dx.dtype.element_ty), mask=m_tile)
    o_value = tl.arange(0, BLOCK_V)
    tl.store(p_dweight + i_program * values + o_value, tl.sum(dweight, axis=0), mask=o_value < values)


def locality_gate_backward(dy, long, x, logits, weight, bias, eps, silu) -> tuple[Tensor, ...]:
    """Gradients of ``long``, ``x``, ``logits``, ``weight`` and ``bias``; arguments as those of the torch backend."""
    gradients = [t.new_empty(t.shape) for t in (long, x, logits)]
    heads, values = long.shape[-2:]
    n_rows = long.numel() // values
    tokens = [rows_of(t, axes=2) for t in (dy, long, x, logits)]
    blocks = block_sizes(values)
    n_tiles = cdiv(n_rows, blocks["ROWS"])
    n_programs = program_count(n_tiles, _MAX_PROGRAMS)
    dweight = weight.new_empty(n_programs, values, dtype=torch.float32)
    sizes = (n_rows, n_tiles, heads, values, *(t.stride(0) for t in tokens))
    vectors = (None if t is None else t.contiguous() for t in (weight, bias))
    arguments = (*tokens, *vectors, *gradients, dweight, *sizes, eps)
    locality_gate_bwd_kernel[(n_programs,)](*arguments, SILU=silu, **blocks)
    dbias = long.new_empty(0)
    if bias is not None:
        dbias = sum_rows(gradients[2].view(-1, heads * values), bias.dtype)
    return *gradients, sum_rows(dweight, weight.dtype), dbias
