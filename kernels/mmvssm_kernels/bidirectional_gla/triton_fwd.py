"""Bidirectional gated linear attention, Triton forward pass.

A program owns a head of a batch element, or a segment of it, with one direction's state (K, V) in registers. It first
walks its chunks from right to left and leaves the backward direction's outputs in float32, then from left to right,
adds the forward direction's and applies the norm.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .op import normed_dtype
from .triton_launch import Launch
from .triton_tile import (
    MILD,
    before,
    careful_outputs,
    load_log_decays,
    load_rows,
    load_vector,
    mild_outputs,
    sums,
)


@triton.jit
def store_outputs(
    out, p_partial, p_out, p_normed, p_rstd, weight, first, o_token, m_token, o_value, m_value, scale, eps,
    V: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Add the backward direction's outputs and store the result, normalised if NORM; tokens count from ``first``."""
    p_partial += first * V
    p_out += first * V
    o_out = o_token[:, None] * V + o_value[None, :]
    m_out = m_token[:, None] & m_value[None, :]
    out = (out + tl.load(p_partial + o_out, mask=m_out, other=0.0)) * scale
    if NORM:
        rstd = tl.rsqrt(tl.sum(out * out, axis=1) / V + eps)
        out *= rstd[:, None]
        if p_normed is not None:
            tl.store(p_normed + first * V + o_out, out.to(p_normed.dtype.element_ty), mask=m_out)
            tl.store(p_rstd + first + o_token, rstd, mask=m_token)
        out *= weight[None, :]
    tl.store(p_out + o_out, out.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=["length", "n_chunks", "n_segments"])
def bidirectional_gla_fwd_kernel(
    p_q, p_k, p_v, p_gf, p_gb, p_weight, p_entering, p_partial, p_out, p_normed, p_rstd,
    heads, length, n_chunks, n_segments, gate_factor, scale, eps,
    stride_q_batch, stride_q, stride_q_head, stride_k_batch, stride_k, stride_k_head,
    stride_v_batch, stride_v, stride_v_head, stride_gf_batch, stride_gf, stride_gf_head,
    stride_gb_batch, stride_gb, stride_gb_head,
    K: tl.constexpr, V: tl.constexpr, LOGITS: tl.constexpr, T: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output (B, L, heads, V) and, where wanted, the normalised output and 1 / RMS (B, L, heads)."""
    SIZE: tl.constexpr = BLOCK_K * BLOCK_V
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    i_row = tl.program_id(0).to(tl.int64)
    i_segment = tl.program_id(1)
    i_batch = i_row // heads
    i_head = i_row % heads
    i_chunk = i_segment * n_chunks
    o_row = tl.arange(0, T)
    o_key = tl.arange(0, BLOCK_K)
    o_value = tl.arange(0, BLOCK_V)
    m_key = o_key < K
    m_value = o_value < V
    p_q += i_batch * stride_q_batch + i_head * stride_q_head
    p_k += i_batch * stride_k_batch + i_head * stride_k_head
    p_v += i_batch * stride_v_batch + i_head * stride_v_head
    p_gf += i_batch * stride_gf_batch + i_head * stride_gf_head
    p_gb += i_batch * stride_gb_batch + i_head * stride_gb_head
    o_out0 = i_batch * length * heads + i_head
    weight = load_vector(p_weight, o_value, m_value)
    o_state = o_key[:, None] * BLOCK_V + o_value[None, :]
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if p_entering is not None:
        p_entering += (i_row * n_segments + i_segment) * SIZE
        state = tl.load(p_entering + tl.num_programs(0).to(tl.int64) * n_segments * SIZE + o_state)

    for i in range(n_chunks - 1, -1, -1):
        m_token = o_row < length - (i_chunk + i) * T
        first = ((i_chunk + i) * T).to(tl.int64)
        q = load_rows(p_q + first * stride_q, o_row, m_token, stride_q, o_key, m_key)
        k = load_rows(p_k + first * stride_k, o_row, m_token, stride_k, o_key, m_key)
        v = load_rows(p_v + first * stride_v, o_row, m_token, stride_v, o_value, m_value)
        p_gate = p_gb + first * stride_gb
        gate = load_log_decays(p_gate, o_row, m_token, stride_gb, o_key, m_key, gate_factor, LOGITS)
        total = tl.sum(gate, axis=0)
        key_sum = sums(gate, before(o_row, True), DTYPE)
        key = k.to(tl.float32) * tl.exp2(key_sum)
        decayed = tl.exp2(total)[:, None] * state
        p_chunk = p_partial + (o_out0 + first * heads) * V
        p_chunk += (o_row * heads)[:, None] * V + o_value[None, :]
        m_out = m_token[:, None] & m_value[None, :]
        if tl.min(total, axis=0) >= -MILD:
            tl.store(p_chunk, mild_outputs(decayed, q, key, key_sum, v, WIDE, PRECISION, True), mask=m_out)
        else:
            out = careful_outputs(state, q, k, v, gate, DTYPE, WIDE, PRECISION, True, T)
            tl.store(p_chunk, out, mask=m_out)
        state = tl.dot(tl.trans(key.to(DTYPE)), v, decayed, input_precision=PRECISION)
    tl.debug_barrier()

    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if p_entering is not None:
        state = tl.load(p_entering + o_state)
    for i in range(n_chunks):
        m_token = o_row < length - (i_chunk + i) * T
        first = ((i_chunk + i) * T).to(tl.int64)
        q = load_rows(p_q + first * stride_q, o_row, m_token, stride_q, o_key, m_key)
        k = load_rows(p_k + first * stride_k, o_row, m_token, stride_k, o_key, m_key)
        v = load_rows(p_v + first * stride_v, o_row, m_token, stride_v, o_value, m_value)
        p_gate = p_gf + first * stride_gf
        gate = load_log_decays(p_gate, o_row, m_token, stride_gf, o_key, m_key, gate_factor, LOGITS)
        total = tl.sum(gate, axis=0)
        key_sum = sums(gate, before(o_row, False), DTYPE)
        key = k.to(tl.float32) * tl.exp2(key_sum)
        decayed = tl.exp2(total)[:, None] * state
        first = o_out0 + first * heads
        if tl.min(total, axis=0) >= -MILD:
            out = mild_outputs(decayed, q, key, key_sum, v, WIDE, PRECISION, False)
            store_outputs(
                out, p_partial, p_out, p_normed, p_rstd, weight, first, o_row * heads, m_token, o_value, m_value,
                scale, eps, V, p_weight is not None,
            )  # fmt: skip
        else:
            out = careful_outputs(state, q, k, v, gate, DTYPE, WIDE, PRECISION, False, T)
            store_outputs(
                out, p_partial, p_out, p_normed, p_rstd, weight, first, o_row * heads, m_token, o_value, m_value,
                scale, eps, V, p_weight is not None,
            )  # fmt: skip
        state = tl.dot(tl.trans(key.to(DTYPE)), v, decayed, input_precision=PRECISION)


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
    partial = v.new_empty(v.shape, dtype=torch.float32)
    entering = launch.entering_states() if launch.segments > 1 else None
    bidirectional_gla_fwd_kernel[launch.grid](
        *launch.tensors, weight, entering, partial, out, normed, rstd,
        *launch.sizes, launch.gate_factor, scale, norm_eps, *launch.strides,
        **launch.constants,
    )  # fmt: skip
    if normed is None:
        normed, rstd = v.new_empty(0, dtype=normed_dtype(v)), v.new_empty(0, dtype=torch.float32)
    return out, normed, rstd
