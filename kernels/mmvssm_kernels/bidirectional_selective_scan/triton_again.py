"""Vim's inner block, Triton backward pass: what its scans read, for all tokens at once.

Inputs and step sizes of both directions are made again from the projections that the forward pass kept, and the
gradient of the scans' results from the gate, whose own gradient is finished here. What the slope of the SiLU is for the
way back through the convolutions is known here too.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..grids import cdiv
from ..selective_scan.triton_tile import detach_layout
from ..triton_scan import sigmoid, softplus
from .op import TILE
from .triton_launch import NARROW_CHANNELS
from .triton_tile import block_channels, convolve, load_rows, load_step_weight, load_vector, of_blocks, split_dot

# Channels and warps of a program, which owns a tile of tokens.
_CHANNELS = 64
_WARPS = 4


@triton.jit
def _direction(
    p_inputs,
    p_slope,
    p_x,
    p_taps,
    p_projected,
    p_dt_weight,
    p_dt_bias,
    o_token,
    o_scan,
    m_tile,
    n_padded,
    length,
    o_channel,
    m_channel,
    channels: tl.constexpr,
    rank,
    stride_token,
    W: tl.constexpr,
    ROW: tl.constexpr,
    C: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store inputs, slopes of their SiLU and step sizes of one direction; pointers are at the sequence."""
    o_rank = tl.arange(0, BLOCK_R)
    weight = load_step_weight(p_dt_weight, o_channel, m_channel, rank, BLOCK_R, p_x.dtype.element_ty)
    low_rank = tl.load(p_projected + o_scan[:, None] * ROW + o_rank[None, :], mask=(o_rank < rank)[None, :], other=0.0)
    raw = split_dot(low_rank, weight, tl.zeros((o_token.shape[0], o_channel.shape[0]), tl.float32), PRECISION)
    raw = tl.reshape(detach_layout(raw[None, :, :]), raw.shape)  # else what follows gets the layout of the product
    raw += load_vector(p_dt_bias, o_channel, m_channel)[None, :]
    conv = convolve(p_x, p_taps, o_token, length, o_channel, m_channel, channels, stride_token, REVERSE, W)
    gate = sigmoid(conv)
    u = tl.where((o_token < length)[:, None], conv * gate, 0.0)
    slope = gate * (1.0 + conv * (1.0 - gate))
    dtype = p_inputs.dtype.element_ty
    tl.store(p_slope + of_blocks(o_scan, o_channel, n_padded, C, 1), slope.to(dtype), mask=m_tile)
    p_tile = p_inputs + of_blocks(o_scan, o_channel, n_padded, C, 2)
    tl.store(p_tile, softplus(raw, dtype != tl.float32).to(dtype), mask=m_tile)
    tl.store(p_tile + C, u.to(dtype), mask=m_tile)


@triton.jit(do_not_specialize=["scale", "length", "n_padded"])
def bidirectional_selective_scan_bwd_kernel_again(
    p_xz,
    p_dout,
    p_projected,
    p_taps,
    p_y,
    p_inputs,
    p_slope,
    p_w,
    p_dxz,
    p_dt_weight,
    p_dt_bias,
    p_dt_weight_b,
    p_dt_bias_b,
    scale,
    length,
    channels: tl.constexpr,
    rank,
    n_padded,
    stride_x_batch,
    stride_x_token,
    stride_dout_batch,
    stride_dout_token,
    W: tl.constexpr,
    ROW: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What :func:`scan_inputs` returns, and the gate's half of dxz."""
    o_channel, m_channel = block_channels(tl.program_id(0), channels, BLOCK_C)
    i_batch = tl.program_id(2).to(tl.int64)
    i_other = tl.num_programs(2) + i_batch
    o_token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_token = o_token < length
    p_x = p_xz + i_batch * stride_x_batch
    z = load_rows(p_x + channels, o_token, m_token, o_channel, m_channel, stride_x_token)
    p_dout += i_batch * stride_dout_batch
    dout = scale * load_rows(p_dout, o_token, m_token, o_channel, m_channel, stride_dout_token)
    y = load_rows(p_y + i_batch * n_padded * channels, o_token, m_token, o_channel, m_channel, channels)
    gate = sigmoid(z)
    # Blocks of the scans may have more channels than there are.
    n_values: tl.constexpr = (channels + C - 1) // C * C
    o_tile = of_blocks(o_token, o_channel, n_padded, C, 1)
    m_tile = ((o_channel < n_values) | (n_values % BLOCK_C == 0))[None, :]
    tl.store(p_w + i_batch * n_padded * n_values + o_tile, dout * z * gate, mask=m_tile)
    dz = dout * y * gate * (1.0 + z * (1.0 - gate))
    p_dz = p_dxz + i_batch * length * 2 * channels + channels
    p_dz += o_token[:, None] * (2 * channels) + o_channel[None, :]
    tl.store(p_dz, dz.to(p_dxz.dtype.element_ty), mask=m_token[:, None] & m_channel[None, :])
    _direction(
        p_inputs + i_batch * n_padded * (2 * n_values),
        p_slope + i_batch * n_padded * n_values,
        p_x,
        p_taps,
        p_projected + i_batch * n_padded * ROW,
        p_dt_weight,
        p_dt_bias,
        o_token,
        o_token,
        m_tile,
        n_padded,
        length,
        o_channel,
        m_channel,
        channels,
        rank,
        stride_x_token,
        W,
        ROW,
        C,
        False,
        BLOCK_R,
        PRECISION,
    )
    if K == 2:
        _direction(
            p_inputs + i_other * n_padded * (2 * n_values),
            p_slope + i_other * n_padded * n_values,
            p_x,
            p_taps + (W + 1) * channels,
            p_projected + i_other * n_padded * ROW,
            p_dt_weight_b,
            p_dt_bias_b,
            o_token,
            n_padded - 1 - o_token,
            m_tile,
            n_padded,
            length,
            o_channel,
            m_channel,
            channels,
            rank,
            stride_x_token,
            W,
            ROW,
            C,
            True,
            BLOCK_R,
            PRECISION,
        )


def scan_inputs(
    launch, block: int, dout: Tensor, scale: float, projected: Tensor, taps: Tensor, y: Tensor, dxz: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Step sizes and inputs (K, B, channel blocks, padded L, 2, block), and slopes of the SiLU behind the inputs.

    The slopes (K, B, channel blocks, padded L, block) lie in scan order too; the float32 gradient of the sum of both
    directions (B, channel blocks, padded L, block) in the order of tokens. Fills the gate's half of ``dxz``.
    """
    sizes = (launch.batch, cdiv(launch.channels, block), launch.padded, block)
    dtype = launch.xz.dtype if launch.channels >= NARROW_CHANNELS else projected.dtype
    inputs = launch.empty(launch.directions, *sizes[:3], 2, block, dtype=dtype)
    slope = launch.empty(launch.directions, *sizes, dtype=dtype)
    w = launch.empty(*sizes)
    members = [p[3:5] for p in launch.parameters]
    grid = (cdiv(sizes[1] * block, _CHANNELS), launch.tiles, launch.batch)
    bidirectional_selective_scan_bwd_kernel_again[grid](
        launch.xz,
        dout,
        projected,
        taps,
        y,
        inputs,
        slope,
        w,
        dxz,
        *members[0],
        *members[-1],
        scale,
        launch.length,
        launch.channels,
        launch.rank,
        launch.padded,
        *launch.xz.stride()[:2],
        *dout.stride()[:2],
        W=launch.width,
        ROW=launch.row,
        K=launch.directions,
        C=block,
        BLOCK_T=TILE,
        BLOCK_C=_CHANNELS,
        BLOCK_R=max(16, triton.next_power_of_2(launch.rank)),
        PRECISION=launch.precision,
        num_warps=_WARPS,
        num_stages=1,
    )
    return inputs, slope, w
