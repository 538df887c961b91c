"""Addition to the residual stream and normalisation, Triton forward pass: a program owns a few whole rows."""

import triton
import triton.language as tl
from torch import Tensor

from ..grids import cdiv
from .triton_launch import block_sizes, rows_of

RUN_TIME_SIZES = ["n_rows", "rows_per_sample"]


@triton.jit
def channels_of(BLOCK_D: tl.constexpr):
    """Channels (D) of a row; a lane is given four at a time.

    Without that limit the compiler gives a lane eight for 16-bit tensors but four for float32, and moves every tile of
    one kind through shared memory to meet the other.
    """
    return tl.max_contiguous(tl.arange(0, BLOCK_D), 4)


@triton.jit
def locate(i_tile, n_rows, channels, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows (R, 1), channels (1, D) and mask (R, D) of a tile."""
    o_row = i_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_channel = channels_of(BLOCK_D)[None, :]
    return o_row, o_channel, (o_row < n_rows) & (o_channel < channels)


@triton.jit
def load_tile(p_rows, o_row, o_channel, stride_row, m_tile):
    """Tile (R, D) in float32, zero where masked."""
    return tl.load(p_rows + o_row * stride_row + o_channel, mask=m_tile, other=0.0).to(tl.float32)


@triton.jit
def load_vector(p_vector, o_channel, channels):
    """Values (1, D) of all rows in float32."""
    return tl.load(p_vector + o_channel, mask=o_channel < channels, other=0.0).to(tl.float32)


@triton.jit
def load_scale(p_scale, o_row, n_rows, rows_per_sample):
    """Factors (R, 1) of the rows' samples in float32."""
    return tl.load(p_scale + o_row // rows_per_sample, mask=o_row < n_rows, other=0.0).to(tl.float32)


@triton.jit
def normalise(r, m_tile, channels, eps, CENTRE: tl.constexpr):
    """Rows (R, D) of mean square (variance) one, zero where masked, and the factor (R, 1) that made them so."""
    if CENTRE:
        r = tl.where(m_tile, r - tl.sum(r, axis=1)[:, None] / channels, 0.0)
    factor = tl.rsqrt(tl.sum(r * r, axis=1)[:, None] / channels + eps)
    return r * factor, factor


@triton.jit(do_not_specialize=RUN_TIME_SIZES)
def add_norm_fwd_kernel(
    p_x,
    p_residual,
    p_weight,
    p_bias,
    p_scale,
    p_y,
    p_r,
    n_rows,
    rows_per_sample,
    channels,
    stride_x,
    stride_residual,
    eps,
    CENTRE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Normalised rows and, if wanted, residual stream (M, D)."""
    o_row, o_channel, m_tile = locate(tl.program_id(0), n_rows, channels, ROWS, BLOCK_D)
    r = load_tile(p_x, o_row, o_channel, stride_x, m_tile)
    if p_scale is not None:
        r *= load_scale(p_scale, o_row, n_rows, rows_per_sample)
    if p_residual is not None:
        r += load_tile(p_residual, o_row, o_channel, stride_residual, m_tile)
    o_out = o_row * channels + o_channel
    if p_r is not None:
        tl.store(p_r + o_out, r.to(p_r.dtype.element_ty), mask=m_tile)
    y = normalise(r, m_tile, channels, eps, CENTRE)[0] * load_vector(p_weight, o_channel, channels)
    if p_bias is not None:
        y += load_vector(p_bias, o_channel, channels)
    tl.store(p_y + o_out, y.to(p_y.dtype.element_ty), mask=m_tile)


def add_norm_forward(x, residual, weight, bias, eps, norm, scale, residual_dtype, out_dtype) -> tuple[Tensor, Tensor]:
    """Normalised rows and residual stream (empty if ``residual_dtype`` is None); arguments as the public ones."""
    y = x.new_empty(x.shape, dtype=out_dtype)
    r = None if residual_dtype is None else x.new_empty(x.shape, dtype=residual_dtype)
    channels, batch = x.shape[-1], x.shape[0]
    rows, residual = rows_of(x), None if residual is None else rows_of(residual)
    vectors = (None if t is None else t.contiguous() for t in (weight, bias, scale))
    sizes = (rows.shape[0], rows.shape[0] // batch, channels)
    strides = (rows.stride(0), 0 if residual is None else residual.stride(0))
    blocks = block_sizes(channels)
    grid = (cdiv(rows.shape[0], blocks["ROWS"]),)
    add_norm_fwd_kernel[grid](rows, residual, *vectors, y, r, *sizes, *strides, eps, CENTRE=norm == "layer", **blocks)
    return y, x.new_empty(0) if r is None else r
