"""Bidirectional gated linear attention, Triton forward pass.

A program owns a block of one head of a batch element: its own tokens as a matrix (T, T) for both directions, all others
by the two states that enter the block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .op import normed_dtype
from .triton_launch import Launch
from .triton_tile import (
    entering_state,
    lane_tile,
    load_gate_sums,
    load_log_decays,
    load_rows,
    load_vector,
    next_blocks,
    not_before,
    operand,
    rows_of_tile,
    strong_matrix,
    unit_of,
)


@triton.jit
def _store_outputs(
    out, scale, p_out, p_normed, p_rstd, p_weight, o_first, o_row, m_row, o_value, heads, eps, V: tl.constexpr
):  # fmt: skip
    """Store ``scale`` times the outputs (T, V), normalised if there is a weight."""
    m_value = o_value < V
    m_out = m_row[:, None] & m_value[None, :]
    o_out = o_row[:, None] * (heads * V) + o_value[None, :]
    if p_weight is not None:
        rstd = tl.rsqrt(tl.sum(out * out, axis=1) * (scale * scale / V) + eps)
        out *= (rstd * scale)[:, None]
        if p_normed is not None:
            tl.store(p_rstd + o_first + o_row * heads, rstd, mask=m_row)
            tl.store(p_normed + o_first * V + o_out, out.to(p_normed.dtype.element_ty), mask=m_out)
        out *= load_vector(p_weight, o_value, m_value)[None, :]
    else:
        out *= scale
    tl.store(p_out + o_first * V + o_out, out.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit
def _block_outputs(
    i_program, p_q, p_k, p_v, p_gf, p_gb, p_weight, p_states, p_units, p_totals, p_out, p_normed, p_rstd,
    rows, heads, length, n_blocks, gate_factor, scale, eps,
    stride_q_batch, stride_q, stride_q_head, stride_k_batch, stride_k, stride_k_head,
    stride_v_batch, stride_v, stride_v_head, stride_gf_batch, stride_gf, stride_gf_head,
    stride_gb_batch, stride_gb, stride_gb_head,
    K: tl.constexpr, V: tl.constexpr, LOGITS: tl.constexpr, T: tl.constexpr, PARTS: tl.constexpr, VEC: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr, SCANNED: tl.constexpr, STRONG: tl.constexpr,
):  # fmt: skip
    """Output of one block."""
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    i_row = i_program // n_blocks
    i_block = (i_program % n_blocks).to(tl.int32)
    i_batch = i_row // heads
    i_head = i_row % heads
    first = i_block.to(tl.int64) * T
    n_tokens = length - i_block * T
    o_row = tl.arange(0, T)
    o_key = tl.arange(0, BLOCK_K)
    o_value = tl.arange(0, BLOCK_V)
    m_row = o_row < n_tokens
    o_token, o_keys, m_tile = lane_tile(n_tokens, T, PARTS, BLOCK_K, K, VEC)
    p_q += i_batch * stride_q_batch + i_head * stride_q_head + first * stride_q
    p_k += i_batch * stride_k_batch + i_head * stride_k_head + first * stride_k
    p_v += i_batch * stride_v_batch + i_head * stride_v_head + first * stride_v
    p_gf += i_batch * stride_gf_batch + i_head * stride_gf_head + first * stride_gf
    p_gb += i_batch * stride_gb_batch + i_head * stride_gb_head + first * stride_gb
    stride = rows.to(tl.int64) * n_blocks
    q = tl.load(p_q + o_token * stride_q + o_keys, mask=m_tile, other=0.0).to(tl.float32)
    k = tl.load(p_k + o_token * stride_k + o_keys, mask=m_tile, other=0.0).to(tl.float32)
    query_unit = unit_of(q, DTYPE)
    key_unit = unit_of(k, DTYPE)
    # One direction after the other, so that not all of both is held at once.
    sums, before, total = load_gate_sums(p_gf, o_token, o_keys, m_tile, stride_gf, gate_factor, LOGITS, False)
    # Operands of blocks with strong gates are not moved: they only meet the states.
    half = tl.zeros((BLOCK_K,), tl.float32) if STRONG else 0.5 * total
    state, unit = entering_state(
        p_states, p_units, p_totals, i_program, i_block, half, o_key, o_value,
        BLOCK_K, BLOCK_V, SCANNED, DTYPE, PRECISION,
    )  # fmt: skip
    f_unit = tl.max(unit, axis=0)
    before -= half[None, :]
    query = q * tl.exp2(sums + (before - query_unit)[:, None, :])
    # Queries take the units of the state's keys.
    f_query = rows_of_tile(operand(query * tl.exp2(unit - f_unit)[None, None, :], DTYPE, PRECISION))
    f_state = state
    if not STRONG:
        query = rows_of_tile(operand(query, DTYPE, PRECISION))
        key = rows_of_tile(operand(k * tl.exp2((-key_unit - before)[:, None, :] - sums), DTYPE, PRECISION))
        f_matrix = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        f_matrix = operand(tl.where(not_before(o_row, False), f_matrix, 0.0), DTYPE, PRECISION)

    sums, before, total = load_gate_sums(p_gb, o_token, o_keys, m_tile, stride_gb, gate_factor, LOGITS, True)
    half = total if STRONG else 0.5 * total
    state, unit = entering_state(
        p_states + stride * (BLOCK_K * BLOCK_V), p_units + stride * BLOCK_K, p_totals + stride * BLOCK_K,
        i_program, i_block - (n_blocks - 1), total - half, o_key, o_value,
        BLOCK_K, BLOCK_V, SCANNED, DTYPE, PRECISION,
    )  # fmt: skip
    b_unit = tl.max(unit, axis=0)
    before -= half[None, :]
    query = q * tl.exp2((-query_unit - before)[:, None, :] - sums)
    b_query = rows_of_tile(operand(query * tl.exp2(unit - b_unit)[None, None, :], DTYPE, PRECISION))
    if not STRONG:
        query = rows_of_tile(operand(query, DTYPE, PRECISION))
        key = rows_of_tile(operand(k * tl.exp2(sums + (before - key_unit)[:, None, :]), DTYPE, PRECISION))
        matrix = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        matrix = operand(tl.where(not_before(o_row, True), matrix, 0.0), DTYPE, PRECISION) + f_matrix
    else:
        # In rows: every pair of tokens has an exponential of its own.
        m_key = o_key < K
        q = load_rows(p_q, o_row, m_row, stride_q, o_key, m_key).to(tl.float32) * tl.exp2(-query_unit)
        k = load_rows(p_k, o_row, m_row, stride_k, o_key, m_key).to(tl.float32) * tl.exp2(-key_unit)
        gate = load_log_decays(p_gf, o_row, m_row, stride_gf, o_key, m_key, gate_factor, LOGITS)
        matrix = strong_matrix(q, k, gate, T, False)
        gate = load_log_decays(p_gb, o_row, m_row, stride_gb, o_key, m_key, gate_factor, LOGITS)
        matrix = operand(matrix + strong_matrix(q, k, gate, T, True), DTYPE, PRECISION)
    out = tl.dot(f_query, f_state, input_precision=PRECISION) * tl.exp2(f_unit - b_unit)
    out = tl.dot(b_query, state, out, input_precision=PRECISION) * tl.exp2(b_unit - key_unit)
    v = load_rows(p_v, o_row, m_row, stride_v, o_value, o_value < V)
    out = tl.dot(matrix, v, out, input_precision=PRECISION)
    scale *= tl.exp2(query_unit + key_unit)
    o_first = (i_batch * length + first) * heads + i_head
    _store_outputs(out, scale, p_out, p_normed, p_rstd, p_weight, o_first, o_row, m_row, o_value, heads, eps, V)


@triton.jit(do_not_specialize=["length", "n_blocks", "rows"])
def bidirectional_gla_fwd_kernel(
    p_q, p_k, p_v, p_gf, p_gb, p_weight, p_states, p_units, p_totals, p_strong, p_out, p_normed, p_rstd,
    rows, heads, length, n_blocks, gate_factor, scale, eps,
    stride_q_batch, stride_q, stride_q_head, stride_k_batch, stride_k, stride_k_head,
    stride_v_batch, stride_v, stride_v_head, stride_gf_batch, stride_gf, stride_gf_head,
    stride_gb_batch, stride_gb, stride_gb_head,
    K: tl.constexpr, V: tl.constexpr, LOGITS: tl.constexpr, T: tl.constexpr, PARTS: tl.constexpr, VEC: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr, SCANNED: tl.constexpr, STRONG: tl.constexpr,
):  # fmt: skip
    """Output (B, L, heads, V) and, where wanted, the normalised output and 1 / RMS (B, L, heads).

    One launch serves blocks with mild gates, a program each, another those with strong gates, a few programs for all.
    """
    i_program = tl.program_id(0).to(tl.int64)
    if STRONG:
        n_all = rows.to(tl.int64) * n_blocks
        n_programs = tl.num_programs(0)
        while i_program < n_all:
            i_program, found = next_blocks(p_strong, i_program, n_all, n_programs)
            if found:
                _block_outputs(
                    i_program, p_q, p_k, p_v, p_gf, p_gb, p_weight, p_states, p_units, p_totals, p_out, p_normed,
                    p_rstd, rows, heads, length, n_blocks, gate_factor, scale, eps,
                    stride_q_batch, stride_q, stride_q_head, stride_k_batch, stride_k, stride_k_head,
                    stride_v_batch, stride_v, stride_v_head, stride_gf_batch, stride_gf, stride_gf_head,
                    stride_gb_batch, stride_gb, stride_gb_head,
                    K, V, LOGITS, T, PARTS, VEC, BLOCK_K, BLOCK_V, PRECISION, SCANNED, True,
                )  # fmt: skip
            i_program += n_programs
    elif tl.load(p_strong + i_program) == 0:
        _block_outputs(
            i_program, p_q, p_k, p_v, p_gf, p_gb, p_weight, p_states, p_units, p_totals, p_out, p_normed,
            p_rstd, rows, heads, length, n_blocks, gate_factor, scale, eps,
            stride_q_batch, stride_q, stride_q_head, stride_k_batch, stride_k, stride_k_head,
            stride_v_batch, stride_v, stride_v_head, stride_gf_batch, stride_gf, stride_gf_head,
            stride_gb_batch, stride_gb, stride_gb_head,
            K, V, LOGITS, T, PARTS, VEC, BLOCK_K, BLOCK_V, PRECISION, SCANNED, False,
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
    for strong in (False, True):
        bidirectional_gla_fwd_kernel[launch.grid(strong)](
            *launch.tensors, weight, *launch.states, launch.totals, launch.strong, out, normed, rstd,
            *launch.sizes, launch.gate_factor, scale, norm_eps, *launch.strides,
            **launch.constants, **launch.options("outputs", strong), SCANNED=launch.scanned, STRONG=strong,
        )  # fmt: skip
    if normed is None:
        normed, rstd = v.new_empty(0, dtype=normed_dtype(v)), v.new_empty(0, dtype=torch.float32)
    return out, normed, rstd
