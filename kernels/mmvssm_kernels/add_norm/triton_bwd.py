"""Addition to the residual stream and normalisation, Triton backward pass.

Statistics are computed again from the residual stream, whose rows have to be read anyway. A program walks every P-th
tile of rows and keeps its sums for weight and bias in registers; the P partial sums are added up afterwards.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..grids import cdiv, program_count
from .triton_fwd import RUN_TIME_SIZES, channels_of, load_scale, load_tile, load_vector, locate, normalise
from .triton_launch import block_sizes, rows_of

# Programs that are at work at the same time on a large GPU; also the number of partial sums.
_MAX_PROGRAMS = 2048


@triton.jit(do_not_specialize=[*RUN_TIME_SIZES, "n_tiles"])
def add_norm_bwd_kernel(
    p_dy,
    p_dr,
    p_r,
    p_weight,
    p_scale,
    p_dx,
    p_dresidual,
    p_dweight,
    p_dbias,
    n_rows,
    rows_per_sample,
    n_tiles,
    channels,
    stride_r,
    stride_dy,
    stride_dr,
    eps,
    CENTRE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of x and residual (M, D), and partial sums (P, D) for weight and bias."""
    i_program = tl.program_id(0)
    n_programs = tl.num_programs(0)
    weight = load_vector(p_weight, channels_of(BLOCK_D)[None, :], channels)
    dweight = tl.zeros((ROWS, BLOCK_D), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for i in range(tl.cdiv(n_tiles - i_program, n_programs)):
        o_row, o_channel, m_tile = locate(i_program + i * n_programs, n_rows, channels, ROWS, BLOCK_D)
        o_tile = o_row * channels + o_channel
        r = load_tile(p_r, o_row, o_channel, stride_r, m_tile)
        dy = load_tile(p_dy, o_row, o_channel, stride_dy, m_tile)
        gradient = tl.zeros((ROWS, BLOCK_D), tl.float32)
        if p_dr is not None:
            gradient = load_tile(p_dr, o_row, o_channel, stride_dr, m_tile)
        unit, factor = normalise(r, m_tile, channels, eps, CENTRE)
        dweight += dy * unit
        dbias += dy
        dunit = dy * weight
        inner = dunit - unit * (tl.sum(dunit * unit, axis=1)[:, None] / channels)
        if CENTRE:
            inner -= tl.sum(dunit, axis=1)[:, None] / channels
        gradient += factor * inner
        if p_dresidual is not None:
            tl.store(p_dresidual + o_tile, gradient.to(p_dresidual.dtype.element_ty), mask=m_tile)
        if p_scale is not None:
            gradient *= load_scale(p_scale, o_row, n_rows, rows_per_sample)
        tl.store(p_dx + o_tile, gradient.to(p_dx.dtype.element_ty), mask=m_tile)
    o_channel = channels_of(BLOCK_D)
    o_partial = i_program * channels + o_channel
    m_channel = o_channel < channels
    tl.store(p_dweight + o_partial, tl.sum(dweight, axis=0), mask=m_channel)
    if p_dbias is not None:
        tl.store(p_dbias + o_partial, tl.sum(dbias, axis=0), mask=m_channel)


def add_norm_backward(
    dy, dr, r, weight, bias, eps, norm, scale, x_dtype, in_dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual, weight and bias; arguments as those of the torch backend."""
    channels, batch = r.shape[-1], r.shape[0]
    dx = r.new_empty(r.shape, dtype=x_dtype)
    dresidual = None if in_dtype is None else r.new_empty(r.shape, dtype=in_dtype)
    dy = r.new_zeros(r.shape) if dy is None else dy
    rows, dy, dr = rows_of(r), rows_of(dy), None if dr is None else rows_of(dr)
    n_rows = dy.shape[0]
    blocks = block_sizes(channels)
    n_tiles = cdiv(n_rows, blocks["ROWS"])
    n_programs = program_count(n_tiles, _MAX_PROGRAMS)
    dweight = r.new_empty(n_programs, channels, dtype=torch.float32)
    dbias = None if bias is None else torch.empty_like(dweight)
    vectors = (None if t is None else t.contiguous() for t in (weight, scale))
    sizes = (n_rows, n_rows // batch, n_tiles, channels)
    strides = (rows.stride(0), dy.stride(0), 0 if dr is None else dr.stride(0))
    gradients = (dx, dresidual, dweight, dbias)
    add_norm_bwd_kernel[(n_programs,)](
        dy, dr, rows, *vectors, *gradients, *sizes, *strides, eps, CENTRE=norm == "layer", **blocks
    )
    return (
        dx,
        r.new_empty(0) if dresidual is None else dresidual,
        dweight.sum(0).to(weight.dtype),
        r.new_empty(0) if dbias is None else dbias.sum(0).to(bias.dtype),
    )
