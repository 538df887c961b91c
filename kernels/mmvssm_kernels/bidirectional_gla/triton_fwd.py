"""Bidirectional gated linear attention, Triton forward pass.

A program owns a block of one head of a batch element. It meets every other block of its chunk, those to its left with
the forward and those to its right with the backward direction's operands, then the states that enter the chunk, and
last its own tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .op import normed_dtype
from .triton_launch import Launch
from .triton_tile import (
    half_of,
    load_log_decays,
    load_rows,
    load_vector,
    not_before,
    operand,
    other_launch,
    state_operand,
    store_weights,
    strong_matrix,
)


@triton.jit
def largest_unit(p_units, n_blocks, DTYPE: tl.constexpr, MOST: tl.constexpr):
    """The largest of a chunk's units."""
    if DTYPE == tl.float16:  # noqa: SIM300 (a constexpr, but no constant)
        o_block = tl.arange(0, MOST)
        return tl.max(tl.load(p_units + o_block, mask=o_block < n_blocks, other=-1000.0))
    else:
        return tl.full((), 0.0, tl.float32)


@triton.jit
def add_states(
    out, right_out, query, weight, p_entering, unit, o_key, o_value,
    BLOCK_V: tl.constexpr, HALF_V: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to both halves of the outputs, in units of 2^unit, what a state (K, V) gives."""
    p_entering += o_key[:, None] * BLOCK_V + o_value[None, :]
    decayed = operand(query.to(tl.float32) * weight[None, :], DTYPE, PRECISION)
    state, state_unit = state_operand(tl.load(p_entering), DTYPE, PRECISION)
    out += tl.exp2(state_unit - unit) * tl.dot(decayed, state, input_precision=PRECISION)
    if HALF_V < BLOCK_V:
        state, state_unit = state_operand(tl.load(p_entering + HALF_V), DTYPE, PRECISION)
        right_out += tl.exp2(state_unit - unit) * tl.dot(decayed, state, input_precision=PRECISION)
    return out, right_out


@triton.jit
def store_half(out, p_out, p_normed, p_weight, m_row, o_value, m_value):
    """Store a half of the outputs, normalised if there is a weight."""
    m_out = m_row[:, None] & m_value[None, :]
    if p_weight is not None:
        if p_normed is not None:
            tl.store(p_normed, out.to(p_normed.dtype.element_ty), mask=m_out)
        out *= load_vector(p_weight, o_value, m_value)[None, :]
    tl.store(p_out, out.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit
def store_outputs(
    matrix, out, right_out, scale, p_v, stride_v, p_out, p_normed, p_rstd, p_weight, o_token, o_row, m_row, o_value,
    eps, V: tl.constexpr, BLOCK_V: tl.constexpr, HALF_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the weights (T, T) of a block's own tokens give and store the outputs, normalised if wanted."""
    v = load_rows(p_v, o_row, m_row, stride_v, o_value, o_value < V)
    out = tl.dot(matrix, v, out, input_precision=PRECISION) * scale
    if HALF_V < BLOCK_V:
        v = load_rows(p_v + HALF_V, o_row, m_row, stride_v, o_value, o_value < V - HALF_V)
        right_out = tl.dot(matrix, v, right_out, input_precision=PRECISION) * scale
    if p_weight is not None:
        squares = tl.sum(out * out, axis=1)
        if HALF_V < BLOCK_V:
            squares += tl.sum(right_out * right_out, axis=1)
        rstd = tl.rsqrt(squares / V + eps)
        out *= rstd[:, None]
        right_out *= rstd[:, None]
        if p_normed is not None:
            tl.store(p_rstd + o_token, rstd, mask=m_row)
    o_out = o_token[:, None] * V + o_value[None, :]
    p_out += o_out
    if p_normed is not None:
        p_normed += o_out
    store_half(out, p_out, p_normed, p_weight, m_row, o_value, o_value < V)
    if HALF_V < BLOCK_V:
        if p_normed is not None:
            p_normed += HALF_V
        if p_weight is not None:
            p_weight += HALF_V
        store_half(right_out, p_out + HALF_V, p_normed, p_weight, m_row, o_value, o_value < V - HALF_V)


@triton.jit(do_not_specialize=["length", "n_blocks", "n_chunks", "rows"])
def bidirectional_gla_fwd_kernel(
    p_q, p_k, p_v, p_gf, p_gb, p_weight, p_decayed, p_exponents, p_units, p_entering, p_weights,
    p_out, p_normed, p_rstd,
    rows, heads, length, n_blocks, n_chunks, gate_factor, scale, eps,
    stride_q_batch, stride_q, stride_q_head, stride_k_batch, stride_k, stride_k_head,
    stride_v_batch, stride_v, stride_v_head, stride_gf_batch, stride_gf, stride_gf_head,
    stride_gb_batch, stride_gb, stride_gb_head,
    K: tl.constexpr, V: tl.constexpr, LOGITS: tl.constexpr, T: tl.constexpr, MOST: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, MILD: tl.constexpr, PRECISION: tl.constexpr, STRONG: tl.constexpr,
):  # fmt: skip
    """Output (B, L, heads, V) and, where wanted, the normalised output and 1 / RMS (B, L, heads)."""
    DTYPE: tl.constexpr = p_decayed.dtype.element_ty
    SIZE: tl.constexpr = BLOCK_K * BLOCK_V
    n_all = tl.cdiv(length, T)
    i_row = (tl.program_id(0) // n_all).to(tl.int64)
    i_block = tl.program_id(0) % n_all
    i_chunk = i_block // n_blocks
    i_first = i_chunk * n_blocks
    i_batch = i_row // heads
    i_head = i_row % heads
    o_row = tl.arange(0, T)
    o_key = tl.arange(0, BLOCK_K)
    # Products of at most T values keep a warp's rows to itself, so that no operand passes through shared memory.
    HALF_V: tl.constexpr = BLOCK_V if BLOCK_V <= T else BLOCK_V // 2
    o_value = tl.arange(0, HALF_V)
    m_row = o_row < length - i_block * T
    m_key = o_key < K
    first = i_block.to(tl.int64) * T
    slot = i_row * n_chunks * n_blocks + i_block
    stride = rows.to(tl.int64) * n_chunks * n_blocks
    p_decayed += slot * (T * BLOCK_K)
    stride_decayed = stride * (T * BLOCK_K)
    p_exponents += slot * BLOCK_K
    stride_exponent = stride * BLOCK_K
    p_v += i_batch * stride_v_batch + i_head * stride_v_head + first * stride_v
    p_units += slot
    o_keys = o_row[:, None] * BLOCK_K + o_key[None, :]
    f_query = tl.load(p_decayed + o_keys)
    b_query = tl.load(p_decayed + 2 * stride_decayed + o_keys)
    f_half = half_of(tl.load(p_exponents + o_key), MILD)
    b_half = half_of(tl.load(p_exponents + 3 * stride_exponent + o_key), MILD)
    if other_launch(f_half, b_half, MILD, STRONG):
        return
    n_here = tl.minimum(n_blocks, n_all - i_first)
    unit = largest_unit(p_units - (i_block - i_first), n_here, DTYPE, MOST)
    here = i_block - i_first
    p_weights += tl.program_id(0).to(tl.int64) * (MOST * BLOCK_K)
    p_first = p_exponents - here * BLOCK_K
    to_left, to_right = store_weights(
        p_weights, p_first, p_first + 3 * stride_exponent, stride_exponent, f_half, b_half, unit, here, n_here, o_key,
        1, MOST,
    )  # fmt: skip
    out = tl.zeros((T, HALF_V), tl.float32)
    right_out = tl.zeros((T, HALF_V), tl.float32)
    if p_entering is not None:
        p_entering += (i_row * n_chunks + i_chunk) * SIZE
        out, right_out = add_states(
            out, right_out, f_query, tl.exp2(to_left), p_entering, unit, o_key, o_value,
            BLOCK_V, HALF_V, DTYPE, PRECISION,
        )  # fmt: skip
        p_entering += rows.to(tl.int64) * n_chunks * SIZE
        out, right_out = add_states(
            out, right_out, b_query, tl.exp2(to_right), p_entering, unit, o_key, o_value,
            BLOCK_V, HALF_V, DTYPE, PRECISION,
        )  # fmt: skip
    tl.debug_barrier()
    for i in range(n_here - 1):
        is_left = i < here
        offset = tl.where(is_left, i, i + 1) - here
        weight = tl.load(p_weights + (here + offset) * BLOCK_K + o_key)
        key = tl.load(
            p_decayed + tl.where(is_left, stride_decayed, 3 * stride_decayed) + offset * (T * BLOCK_K) + o_keys
        )
        m_far = o_row < length - (i_block + offset) * T
        p_far_v = p_v + offset * T * stride_v
        v = load_rows(p_far_v, o_row, m_far, stride_v, o_value, o_value < V)
        query = tl.where(is_left, f_query, b_query).to(tl.float32)
        query = operand(query * weight[None, :], DTYPE, PRECISION)
        matrix = operand(tl.dot(query, tl.trans(key), input_precision=PRECISION), DTYPE, PRECISION)
        out = tl.dot(matrix, v, out, input_precision=PRECISION)
        if HALF_V < BLOCK_V:
            v = load_rows(p_far_v + HALF_V, o_row, m_far, stride_v, o_value, o_value < V - HALF_V)
            right_out = tl.dot(matrix, v, right_out, input_precision=PRECISION)

    # Queries have been scaled by their unit, so everything is.
    p_query_unit = p_units + stride
    o_token = (i_batch * length + first) * heads + i_head + o_row.to(tl.int64) * heads
    query_unit = tl.load(p_query_unit)
    scale *= tl.exp2(query_unit + unit)
    if not STRONG:
        f_key = tl.load(p_decayed + stride_decayed + o_keys)
        b_key = tl.load(p_decayed + 3 * stride_decayed + o_keys)
        matrix = tl.where(
            not_before(o_row, False), tl.dot(f_query, tl.trans(f_key), input_precision=PRECISION), 0.0
        )  # fmt: skip
        matrix += tl.where(not_before(o_row, True), tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION), 0.0)
        matrix *= tl.exp2(tl.load(p_units) - unit)
        store_outputs(
            operand(matrix, DTYPE, PRECISION), out, right_out, scale, p_v, stride_v, p_out, p_normed, p_rstd, p_weight,
            o_token, o_row, m_row, o_value, eps, V, BLOCK_V, HALF_V, PRECISION,
        )  # fmt: skip
    else:
        p_q += i_batch * stride_q_batch + i_head * stride_q_head + first * stride_q
        p_k += i_batch * stride_k_batch + i_head * stride_k_head + first * stride_k
        p_gf += i_batch * stride_gf_batch + i_head * stride_gf_head + first * stride_gf
        p_gb += i_batch * stride_gb_batch + i_head * stride_gb_head + first * stride_gb
        q = load_rows(p_q, o_row, m_row, stride_q, o_key, m_key).to(tl.float32) * tl.exp2(-query_unit)
        k = load_rows(p_k, o_row, m_row, stride_k, o_key, m_key).to(tl.float32) * tl.exp2(-unit)
        gate = load_log_decays(p_gf, o_row, m_row, stride_gf, o_key, m_key, gate_factor, LOGITS)
        matrix = strong_matrix(q, k, gate, T, False)
        gate = load_log_decays(p_gb, o_row, m_row, stride_gb, o_key, m_key, gate_factor, LOGITS)
        matrix += strong_matrix(q, k, gate, T, True)
        store_outputs(
            operand(matrix, DTYPE, PRECISION), out, right_out, scale, p_v, stride_v, p_out, p_normed, p_rstd, p_weight,
            o_token, o_row, m_row, o_value, eps, V, BLOCK_V, HALF_V, PRECISION,
        )  # fmt: skip


def bidirectional_gla_forward(
    q, k, v, gf, gb, norm_weight, scale, gate_normalizer, norm_eps, out_dtype, keep
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and with a norm and ``keep`` the normalised output and 1 / RMS, else two empty tensors."""
    launch = Launch(q, k, v, gf, gb, gate_normalizer)
    weight = None if norm_weight is None else norm_weight.contiguous()
    normed = rstd = None
    if weight is not None and keep:
        normed = v.new_empty(v.shape, dtype=normed_dtype(v))
        rstd = v.new_empty(v.shape[:3], dtype=torch.float32)
    out = v.new_empty(v.shape, dtype=out_dtype)
    weights = launch.weights(1)
    for strong in (False, True):
        bidirectional_gla_fwd_kernel[(launch.rows * launch.blocks,)](
            *launch.tensors, weight, launch.decayed, launch.exponents, launch.units, launch.entering, weights,
            out, normed, rstd,
            *launch.sizes, launch.gate_factor, scale, norm_eps, *launch.strides,
            **launch.constants, **launch.options("outputs"), STRONG=strong,
        )  # fmt: skip
    if normed is None:
        normed, rstd = v.new_empty(0, dtype=normed_dtype(v)), v.new_empty(0, dtype=torch.float32)
    return out, normed, rstd
