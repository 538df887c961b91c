"""Depthwise convolution over a sequence, Triton forward pass.

A program owns a block of adjacent channels and a piece of the sequence. It slides the window over the piece in
registers, four tokens per step with their loads in front: every row is read once, and several reads are in flight.

Windows have four slots whatever the width: the newest token is in the last slot, and the taps are aligned to it; slots
before the first tap are left out at compile time. ``ahead`` is the distance from the output token to the newest token
of its window; together with the order in which the taps are read it covers both directions and both paddings.
"""

import triton
import triton.language as tl
from torch import Tensor

from .layout import empty_in_order
from .triton_launch import Launch

RUN_TIME_SIZES = ["length", "n_segments", "n_steps", "ahead", "first_tap", "tap_step"]


@triton.jit
def locate(n_blocks, n_segments, channels, BLOCK_C: tl.constexpr):
    """Batch element, segment, channels (C) and their mask of a program; neighbours in the grid share tokens."""
    i_program = tl.program_id(0)
    i_piece = i_program // n_blocks
    o_channel = (i_program % n_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    return (i_piece // n_segments).to(tl.int64), i_piece % n_segments, o_channel, o_channel < channels


@triton.jit
def load_row(p_row, i_token, length, m_channel):
    """Row (C) of a token in float32, zero outside the sequence."""
    m_row = m_channel & (i_token >= 0) & (i_token < length)
    return tl.load(p_row, mask=m_row, other=0.0).to(tl.float32)


@triton.jit
def load_tap(p_weight, o_channel, m_channel, first_tap, tap_step, SLOT: tl.constexpr, WIDTH: tl.constexpr):
    """Tap (C) of a slot in float32, zero where the window has none."""
    if SLOT + WIDTH < 4:
        return tl.zeros(o_channel.shape, tl.float32)
    else:
        i_tap = first_tap + (SLOT + WIDTH - 4) * tap_step
        return tl.load(p_weight + o_channel * WIDTH + i_tap, mask=m_channel, other=0.0).to(tl.float32)


@triton.jit
def load_bias(p_bias, o_channel, m_channel):
    """Optional bias (C) in float32, zero if there is none."""
    if p_bias is None:
        return tl.zeros(o_channel.shape, tl.float32)
    else:
        return tl.load(p_bias + o_channel, mask=m_channel, other=0.0).to(tl.float32)


@triton.jit
def weighted_sum(bias, w0, w1, w2, w3, x0, x1, x2, x3, WIDTH: tl.constexpr):
    """Bias plus taps times window; everything is (C)."""
    y = bias + w3 * x3
    if WIDTH > 1:
        y += w2 * x2
    if WIDTH > 2:
        y += w1 * x1
    if WIDTH > 3:
        y += w0 * x0
    return y


@triton.jit
def store_row(p_row, i_token, length, m_channel, y, SILU: tl.constexpr):
    """Activate and store a row (C), if its token exists."""
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(p_row, y.to(p_row.dtype.element_ty), mask=m_channel & (i_token < length))


@triton.jit(do_not_specialize=RUN_TIME_SIZES)
def causal_conv1d_fwd_kernel(
    p_x,
    p_weight,
    p_bias,
    p_y,
    length,
    channels,
    n_blocks,
    n_segments,
    n_steps,
    ahead,
    first_tap,
    tap_step,
    stride_x_batch,
    stride_x_token,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Output (B, L, D) from x, whose channels are adjacent."""
    i_batch, i_segment, o_channel, m_channel = locate(n_blocks, n_segments, channels, BLOCK_C)
    p_x += i_batch * stride_x_batch + o_channel
    p_y += i_batch * length * channels + o_channel
    w0 = load_tap(p_weight, o_channel, m_channel, first_tap, tap_step, 0, WIDTH)
    w1 = load_tap(p_weight, o_channel, m_channel, first_tap, tap_step, 1, WIDTH)
    w2 = load_tap(p_weight, o_channel, m_channel, first_tap, tap_step, 2, WIDTH)
    w3 = load_tap(p_weight, o_channel, m_channel, first_tap, tap_step, 3, WIDTH)
    bias = load_bias(p_bias, o_channel, m_channel)
    t = i_segment * n_steps * 4
    p_row = p_x + (t + ahead).to(tl.int64) * stride_x_token
    p_out = p_y + t.to(tl.int64) * channels
    x0 = load_row(p_row - 3 * stride_x_token, t + ahead - 3, length, m_channel)
    x1 = load_row(p_row - 2 * stride_x_token, t + ahead - 2, length, m_channel)
    x2 = load_row(p_row - stride_x_token, t + ahead - 1, length, m_channel)
    for _ in range(tl.minimum(n_steps, tl.cdiv(length - t, 4))):
        x3 = load_row(p_row, t + ahead, length, m_channel)
        x4 = load_row(p_row + stride_x_token, t + ahead + 1, length, m_channel)
        x5 = load_row(p_row + 2 * stride_x_token, t + ahead + 2, length, m_channel)
        x6 = load_row(p_row + 3 * stride_x_token, t + ahead + 3, length, m_channel)
        y = weighted_sum(bias, w0, w1, w2, w3, x0, x1, x2, x3, WIDTH)
        store_row(p_out, t, length, m_channel, y, SILU)
        y = weighted_sum(bias, w0, w1, w2, w3, x1, x2, x3, x4, WIDTH)
        store_row(p_out + channels, t + 1, length, m_channel, y, SILU)
        y = weighted_sum(bias, w0, w1, w2, w3, x2, x3, x4, x5, WIDTH)
        store_row(p_out + 2 * channels, t + 2, length, m_channel, y, SILU)
        y = weighted_sum(bias, w0, w1, w2, w3, x3, x4, x5, x6, WIDTH)
        store_row(p_out + 3 * channels, t + 3, length, m_channel, y, SILU)
        x0, x1, x2 = x4, x5, x6
        p_row += 4 * stride_x_token
        p_out += 4 * channels
        t += 4


def causal_conv1d_forward(x, weight, bias, activation, reverse, padding, out_dtype) -> Tensor:
    """Output (B, D, L) in the memory order of ``x``; arguments as the public function's."""
    launch = Launch(x, weight, bias, activation, reverse, padding, target_programs=4096)
    batch, channels, length = x.shape
    y = x.new_empty(batch, length, channels, dtype=out_dtype)
    causal_conv1d_fwd_kernel[launch.grid](*launch.tensors, y, *launch.sizes, *launch.strides, **launch.constants)
    y = y.transpose(1, 2)
    return y if launch.channel_last_result else empty_in_order(x, out_dtype).copy_(y)
