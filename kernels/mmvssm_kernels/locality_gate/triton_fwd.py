"""The gate between long and short context, Triton forward pass: a program owns the heads of a few tokens."""

import triton
import triton.language as tl
from torch import Tensor

from ..grids import cdiv
from ..rows import rows_of

# Channels of a program: four warps with 8 a lane, which are 16 bytes. A head belongs to one warp, its sum is a shuffle.
_PER_PROGRAM = 1024
RUN_TIME_SIZES = ["n_rows"]


@triton.jit
def locate(i_tile, n_rows, heads, values, ROWS: tl.constexpr, BLOCK_V: tl.constexpr):
    """Rows (R, 1), one for each head of a token; their tokens (R, 1); channels in the token and mask, both (R, V)."""
    o_row = i_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_value = tl.arange(0, BLOCK_V)[None, :]
    i_token = o_row // heads
    return o_row, i_token, (o_row - i_token * heads) * values + o_value, (o_row < n_rows) & (o_value < values)


@triton.jit
def load_tile(p_tokens, i_token, o_channel, stride, m_tile):
    """Tile (R, V) in float32, zero where masked."""
    return tl.load(p_tokens + i_token * stride + o_channel, mask=m_tile, other=0.0).to(tl.float32)


@triton.jit
def load_weight(p_weight, values, BLOCK_V: tl.constexpr):
    """Weight (1, V) of all rows in float32."""
    o_value = tl.arange(0, BLOCK_V)[None, :]
    return tl.load(p_weight + o_value, mask=o_value < values, other=0.0).to(tl.float32)


@triton.jit
def load_gate(p_logits, p_bias, i_token, o_channel, stride, m_tile):
    """sigmoid(logits + bias) (R, V)."""
    logits = load_tile(p_logits, i_token, o_channel, stride, m_tile)
    if p_bias is not None:
        logits += tl.load(p_bias + o_channel, mask=m_tile, other=0.0).to(tl.float32)
    return tl.sigmoid(logits)


@triton.jit
def unit_rows(x, values, eps):
    """Rows (R, V) of mean square one, and the factor (R, 1) that made them so."""
    factor = tl.rsqrt(tl.sum(x * x, axis=1)[:, None] / values + eps)
    return x * factor, factor


@triton.jit(do_not_specialize=RUN_TIME_SIZES)
def locality_gate_fwd_kernel(
    p_long,
    p_x,
    p_logits,
    p_weight,
    p_bias,
    p_y,
    n_rows,
    heads,
    values,
    stride_long,
    stride_x,
    stride_logits,
    eps,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Mixed contexts (M heads, V)."""
    o_row, i_token, o_channel, m_tile = locate(tl.program_id(0), n_rows, heads, values, ROWS, BLOCK_V)
    unit, _ = unit_rows(load_tile(p_x, i_token, o_channel, stride_x, m_tile), values, eps)
    short = unit * load_weight(p_weight, values, BLOCK_V)
    long = load_tile(p_long, i_token, o_channel, stride_long, m_tile)
    y = short + load_gate(p_logits, p_bias, i_token, o_channel, stride_logits, m_tile) * (long - short)
    if SILU:
        y *= tl.sigmoid(y)
    o_value = tl.arange(0, BLOCK_V)[None, :]
    tl.store(p_y + o_row * values + o_value, y.to(p_y.dtype.element_ty), mask=m_tile)


def block_sizes(values: int) -> dict[str, int]:
    """Rows and channels of a tile, and warps."""
    block = triton.next_power_of_2(values)
    return dict(ROWS=max(1, _PER_PROGRAM // block), BLOCK_V=block, num_warps=4)


def locality_gate_forward(long, x, logits, weight, bias, eps, silu) -> Tensor:
    """(..., heads, V) in the dtype of ``long``; arguments as the public ones."""
    y = long.new_empty(long.shape)
    heads, values = long.shape[-2:]
    n_rows = long.numel() // values
    tokens = [rows_of(t, axes=2) for t in (long, x, logits)]
    blocks = block_sizes(values)
    sizes = (n_rows, heads, values, *(t.stride(0) for t in tokens))
    grid = (cdiv(n_rows, blocks["ROWS"]),)
    vectors = (None if t is None else t.contiguous() for t in (weight, bias))
    locality_gate_fwd_kernel[grid](*tokens, *vectors, y, *sizes, eps, SILU=silu, **blocks)
    return y
