"""Depthwise convolution over a sequence, Triton backward pass.

The walk is that of the forward pass, with a second window: at token t the sum before the activation is computed again,
g[t] is made from it, and dx[t - left], which waited for g[t] alone, is complete and written. A step in front of the
piece fills the window of g; its share of the weight's gradient is left to the piece before, if there is one. Every
piece leaves its sums for weight and bias, (W + 1, D) numbers, which are then added up.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..row_sums import sum_rows
from .layout import empty_in_order
from .triton_fwd import RUN_TIME_SIZES, load_bias, load_row, load_tap, locate, weighted_sum
from .triton_launch import Launch, token_major


@triton.jit
def output_gradient(dy, y, SILU: tl.constexpr):
    """Gradient (C) of the sum ``y`` before the activation."""
    if SILU:
        gate = tl.sigmoid(y)
        return dy * gate * (1.0 + y * (1.0 - gate))
    else:
        return dy


@triton.jit
def input_gradient(w0, w1, w2, w3, g0, g1, g2, g3, WIDTH: tl.constexpr):
    """Gradient (C) of an input from the window of g, whose newest is ``g3`` and meets the first tap."""
    if WIDTH == 1:
        return w3 * g3
    elif WIDTH == 2:
        return w2 * g3 + w3 * g2
    elif WIDTH == 3:
        return w1 * g3 + w2 * g2 + w3 * g1
    else:
        return w0 * g3 + w1 * g2 + w2 * g1 + w3 * g0


@triton.jit
def store_gradient(p_row, i_token, i_first, length, m_channel, dx):
    """Store the gradient (C) of an input, if it is one of this piece."""
    m_row = m_channel & (i_token >= i_first) & (i_token < length)
    tl.store(p_row, dx.to(p_row.dtype.element_ty), mask=m_row)


@triton.jit(do_not_specialize=RUN_TIME_SIZES)
def causal_conv1d_bwd_kernel(
    p_x,
    p_weight,
    p_bias,
    p_dy,
    p_dx,
    p_sums,
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
    stride_dy_batch,
    stride_dy_token,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradient of x (B, L, D), and sums (B S, W + 1, D) for every tap and the bias."""
    i_batch, i_segment, o_channel, m_channel = locate(n_blocks, n_segments, channels, BLOCK_C)
    p_x += i_batch * stride_x_batch + o_channel
    p_dy += i_batch * stride_dy_batch + o_channel
    p_dx += i_batch * length * channels + o_channel
    w0 = load_tap(p_weight, o_channel, m_channel, first_tap, tap_step, 0, WIDTH)
    w1 = load_tap(p_weight, o_channel, m_channel, first_tap, tap_step, 1, WIDTH)
    w2 = load_tap(p_weight, o_channel, m_channel, first_tap, tap_step, 2, WIDTH)
    w3 = load_tap(p_weight, o_channel, m_channel, first_tap, tap_step, 3, WIDTH)
    bias = load_bias(p_bias, o_channel, m_channel)
    zero = tl.zeros(o_channel.shape, tl.float32)
    dw0, dw1, dw2, dw3, dbias = zero, zero, zero, zero, zero
    g0, g1, g2 = zero, zero, zero
    left = WIDTH - 1 - ahead
    i_first = i_segment * n_steps * 4
    t = i_first + left - 4
    p_row = p_x + (t + ahead).to(tl.int64) * stride_x_token
    p_up = p_dy + t.to(tl.int64) * stride_dy_token
    p_out = p_dx + (t - left).to(tl.int64) * channels
    x0 = load_row(p_row - 3 * stride_x_token, t + ahead - 3, length, m_channel)
    x1 = load_row(p_row - 2 * stride_x_token, t + ahead - 2, length, m_channel)
    x2 = load_row(p_row - stride_x_token, t + ahead - 1, length, m_channel)
    share = tl.where(i_segment == 0, 1.0, 0.0)
    for _ in range(tl.minimum(n_steps, tl.cdiv(length - i_first, 4)) + 1):
        x3 = load_row(p_row, t + ahead, length, m_channel)
        x4 = load_row(p_row + stride_x_token, t + ahead + 1, length, m_channel)
        x5 = load_row(p_row + 2 * stride_x_token, t + ahead + 2, length, m_channel)
        x6 = load_row(p_row + 3 * stride_x_token, t + ahead + 3, length, m_channel)
        g3 = load_row(p_up, t, length, m_channel)
        g4 = load_row(p_up + stride_dy_token, t + 1, length, m_channel)
        g5 = load_row(p_up + 2 * stride_dy_token, t + 2, length, m_channel)
        g6 = load_row(p_up + 3 * stride_dy_token, t + 3, length, m_channel)
        g3 = output_gradient(g3, weighted_sum(bias, w0, w1, w2, w3, x0, x1, x2, x3, WIDTH), SILU)
        g4 = output_gradient(g4, weighted_sum(bias, w0, w1, w2, w3, x1, x2, x3, x4, WIDTH), SILU)
        g5 = output_gradient(g5, weighted_sum(bias, w0, w1, w2, w3, x2, x3, x4, x5, WIDTH), SILU)
        g6 = output_gradient(g6, weighted_sum(bias, w0, w1, w2, w3, x3, x4, x5, x6, WIDTH), SILU)
        dx = input_gradient(w0, w1, w2, w3, g0, g1, g2, g3, WIDTH)
        store_gradient(p_out, t - left, i_first, length, m_channel, dx)
        dx = input_gradient(w0, w1, w2, w3, g1, g2, g3, g4, WIDTH)
        store_gradient(p_out + channels, t - left + 1, i_first, length, m_channel, dx)
        dx = input_gradient(w0, w1, w2, w3, g2, g3, g4, g5, WIDTH)
        store_gradient(p_out + 2 * channels, t - left + 2, i_first, length, m_channel, dx)
        dx = input_gradient(w0, w1, w2, w3, g3, g4, g5, g6, WIDTH)
        store_gradient(p_out + 3 * channels, t - left + 3, i_first, length, m_channel, dx)
        dw3 += share * (g3 * x3 + g4 * x4 + g5 * x5 + g6 * x6)
        if WIDTH > 1:
            dw2 += share * (g3 * x2 + g4 * x3 + g5 * x4 + g6 * x5)
        if WIDTH > 2:
            dw1 += share * (g3 * x1 + g4 * x2 + g5 * x3 + g6 * x4)
        if WIDTH > 3:
            dw0 += share * (g3 * x0 + g4 * x1 + g5 * x2 + g6 * x3)
        dbias += share * (g3 + g4 + g5 + g6)
        share = 1.0
        g0, g1, g2 = g4, g5, g6
        x0, x1, x2 = x4, x5, x6
        p_row += 4 * stride_x_token
        p_up += 4 * stride_dy_token
        p_out += 4 * channels
        t += 4
    p_sums += (i_batch * n_segments + i_segment) * (WIDTH + 1) * channels + o_channel
    if WIDTH > 3:
        tl.store(p_sums + (first_tap + (WIDTH - 4) * tap_step) * channels, dw0, mask=m_channel)
    if WIDTH > 2:
        tl.store(p_sums + (first_tap + (WIDTH - 3) * tap_step) * channels, dw1, mask=m_channel)
    if WIDTH > 1:
        tl.store(p_sums + (first_tap + (WIDTH - 2) * tap_step) * channels, dw2, mask=m_channel)
    tl.store(p_sums + (first_tap + (WIDTH - 1) * tap_step) * channels, dw3, mask=m_channel)
    tl.store(p_sums + WIDTH * channels, dbias, mask=m_channel)


def causal_conv1d_backward(dy, x, weight, bias, activation, reverse, padding) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, in its memory order, of weight and of bias; empty for a bias of None."""
    launch = Launch(x, weight, bias, activation, reverse, padding, target_programs=1536)
    batch, channels, length = x.shape
    width = weight.shape[1]
    dy = token_major(dy)
    dx = x.new_empty(batch, length, channels)
    sums = x.new_empty(launch.pieces, width + 1, channels, dtype=torch.float32)
    causal_conv1d_bwd_kernel[launch.grid](
        *launch.tensors, dy, dx, sums, *launch.sizes, *launch.strides, dy.stride(0), dy.stride(2), **launch.constants
    )
    sums = sum_rows(sums.view(len(sums), -1), torch.float32).view(width + 1, channels)
    dx = dx.transpose(1, 2)
    return (
        dx if launch.channel_last_result else empty_in_order(x).copy_(dx),
        torch.empty_like(weight, memory_format=torch.contiguous_format).copy_(sums[:width].T),
        x.new_empty(0) if bias is None else sums[width].to(bias.dtype, copy=True),
    )
