"""Bidirectional gated linear attention, Triton backward pass.

A program owns a head of a batch element, or a segment of it, and walks its chunks three times:

1. left to right with the forward direction's state, which it leaves at every chunk;
2. right to left with the gradient of that state, for the forward direction's share in all gradients, and with the
   backward direction's state, which it leaves at every chunk;
3. left to right with the gradient of that state, for the backward direction's share.

The gradient of a log-decay is the sum over all pairs of tokens that it stands between. Those pairs inside a chunk
follow from running sums of k dk - q dq over the chunk, the others from the states at its border, so no sum is longer
than a chunk. A token's share in itself has no decay and is kept out of these sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import Launch, columns_adjacent
from .triton_tile import (
    MILD,
    before,
    lengthen,
    load_log_decays,
    load_rows,
    load_upstream,
    load_vector,
    not_before,
    operand,
    row_of,
    sums,
    wide_sums,
)


@triton.jit
def mild_gradients(
    decayed, gradient, passed, q, k, v, do, scores, key, key_sum,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    """What a chunk with mild gates gives.

    ``decayed`` is the entering state after all gates, ``passed`` the gradient of the leaving state as an operand.
    The terms of gate gradients are made of the rounded operands, each from both sides: a pair of tokens that a gate
    does not stand between then vanishes exactly.

    Returns:
        Gradients of q and k (T, K) without a token's share in itself; k dk - q dq; the gate gradients' part from
        pairs across the chunk's start (K); the matrix (T, T).
    """
    o_row = tl.arange(0, q.shape[0])
    keep = not_before(o_row, REVERSED)
    query = operand(q * tl.exp2(-key_sum), WIDE, PRECISION)
    matrix = tl.where(keep, tl.dot(query, tl.trans(key), input_precision=PRECISION), 0.0)
    others = operand(tl.where(keep & (o_row[:, None] != o_row[None, :]), scores, 0.0), WIDE, PRECISION)
    decayed = operand(decayed, WIDE, PRECISION)
    across = tl.dot(tl.trans(query), do, gradient, input_precision=PRECISION)
    across = tl.sum(across * decayed.to(tl.float32), axis=1)
    dq = tl.dot(do, tl.trans(decayed), input_precision=PRECISION)
    dq = tl.dot(others, key, dq, input_precision=PRECISION)
    dk = tl.dot(v, tl.trans(passed), input_precision=PRECISION)
    dk = tl.dot(tl.trans(others), query, dk, input_precision=PRECISION)
    terms = key.to(tl.float32) * dk - query.to(tl.float32) * dq
    return tl.exp2(-key_sum) * dq, tl.exp2(key_sum) * dk, terms, across, matrix


@triton.jit
def careful_gradients(
    state, entering, passed, q, k, v, do, scores, query, gate, query_sum, key_sum,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, REVERSED: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """As :func:`mild_gradients`, for gates of any strength; ``entering`` is the gradient of the state ``state``."""
    o_row = tl.arange(0, T)
    keep = not_before(o_row, REVERSED)
    others = tl.where(keep & (o_row[:, None] != o_row[None, :]), scores, 0.0)
    matrix = tl.zeros((T, T), tl.float32)
    state = operand(state, WIDE, PRECISION)
    across = tl.sum(state.to(tl.float32) * entering, axis=1)
    dquery = tl.dot(do, tl.trans(state), input_precision=PRECISION)
    dq = tl.zeros(q.shape, tl.float32)
    dk = tl.exp2(key_sum) * tl.dot(v, tl.trans(passed), input_precision=PRECISION)
    decay_sum = tl.zeros(q.shape, tl.float32)
    for i in range(T):
        j = i if REVERSED else T - 1 - i
        decay_sum = lengthen(decay_sum, gate, o_row, j, REVERSED)
        this = o_row == j
        key = row_of(k, this)[None, :]
        decay = tl.exp2(decay_sum)
        matrix = tl.where(this[None, :], tl.sum(q * key * decay, axis=1)[:, None], matrix)
        decay *= tl.sum(tl.where(this[None, :], others, 0.0), axis=1)[:, None]
        dq += decay * key
        dk += tl.where(this[:, None], tl.sum(decay * q, axis=0)[None, :], 0.0)
    terms = k * dk - q * dq - query.to(tl.float32) * dquery
    return dq + tl.exp2(query_sum) * dquery, dk, terms, across, tl.where(keep, matrix, 0.0)


@triton.jit
def store_gradients(
    dq, dk, terms, across, matrix, gradient, q, k, do, scores, key,
    p_partial_q, p_partial_k, p_partial_v, p_dq, p_dk, p_dv, p_dgate, p_gate, stride_gate,
    first, o_token, m_token, o_row, o_key, m_key, o_value, m_value, scale, gate_factor,
    K: tl.constexpr, V: tl.constexpr, LOGITS: tl.constexpr, PRECISION: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    """Store a direction's gate gradient and add its share to the other gradients, which REVERSED, the second, ends.

    Tokens count from ``first``.
    """
    p_dgate += first * K
    o_keys = o_token[:, None] * K + o_key[None, :]
    m_keys = m_token[:, None] & m_key[None, :]
    o_values = o_token[:, None] * V + o_value[None, :]
    m_values = m_token[:, None] & m_value[None, :]
    dgate = wide_sums(terms, before(o_row, not REVERSED))
    dgate = (dgate + across[None, :]) * (scale * gate_factor)
    if LOGITS:
        dgate *= tl.sigmoid(-load_rows(p_gate, o_row, m_token, stride_gate, o_key, m_key).to(tl.float32))
    tl.store(p_dgate + o_keys, dgate.to(p_dgate.dtype.element_ty), mask=m_keys)
    dv = tl.dot(key, gradient, input_precision=PRECISION)
    dv = tl.dot(tl.trans(operand(matrix, do.dtype, PRECISION)), do, dv, input_precision=PRECISION)
    p_partial_q += first * K
    p_partial_k += first * K
    p_partial_v += first * V
    if REVERSED:
        p_dq += first * K
        p_dk += first * K
        p_dv += first * V
        own = 2.0 * tl.sum(tl.where(o_row[:, None] == o_row[None, :], scores, 0.0), axis=1)[:, None]
        dq = (dq + own * k + tl.load(p_partial_q + o_keys, mask=m_keys, other=0.0)) * scale
        dk = (dk + own * q + tl.load(p_partial_k + o_keys, mask=m_keys, other=0.0)) * scale
        dv = (dv + tl.load(p_partial_v + o_values, mask=m_values, other=0.0)) * scale
        tl.store(p_dq + o_keys, dq.to(p_dq.dtype.element_ty), mask=m_keys)
        tl.store(p_dk + o_keys, dk.to(p_dk.dtype.element_ty), mask=m_keys)
        tl.store(p_dv + o_values, dv.to(p_dv.dtype.element_ty), mask=m_values)
    else:
        tl.store(p_partial_q + o_keys, dq, mask=m_keys)
        tl.store(p_partial_k + o_keys, dk, mask=m_keys)
        tl.store(p_partial_v + o_values, dv, mask=m_values)


@triton.jit
def chunk_gradients(
    state, gradient, q, k, v, do, gate,
    p_partial_q, p_partial_k, p_partial_v, p_dq, p_dk, p_dv, p_dgate, p_gate, stride_gate,
    first, o_token, m_token, o_row, o_key, m_key, o_value, m_value, scale, gate_factor,
    K: tl.constexpr, V: tl.constexpr, LOGITS: tl.constexpr, T: tl.constexpr, DTYPE: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    """Store a direction's share in a chunk's gradients.

    Args:
        state: State (K, V) that enters the chunk in the direction's order.
        gradient: Gradient of the state that leaves it.
        q, k: Rows (T, K) in float32.
        v, do: Rows (T, V) in WIDE.
        gate: Log-decays (T, K).

    Returns:
        Gradient of the state that enters the chunk.
    """
    total = tl.sum(gate, axis=0)
    key_sum = sums(gate, before(o_row, REVERSED), DTYPE)
    key = operand(k * tl.exp2(key_sum), WIDE, PRECISION)
    query_sum = sums(gate, not_before(o_row, REVERSED), DTYPE)
    query = operand(q * tl.exp2(query_sum), WIDE, PRECISION)
    passed = operand(gradient, WIDE, PRECISION)
    entering = tl.exp2(total)[:, None] * gradient
    entering = tl.dot(tl.trans(query), do, entering, input_precision=PRECISION)
    scores = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    # Each branch stores what it makes: values handed out of a branch would be kept in costly register layouts.
    if tl.min(total, axis=0) >= -MILD:
        decayed = tl.exp2(total)[:, None] * state
        dq, dk, terms, across, matrix = mild_gradients(
            decayed, gradient, passed, q, k, v, do, scores, key, key_sum, WIDE, PRECISION, REVERSED
        )
        store_gradients(
            dq, dk, terms, across, matrix, passed, q, k, do, scores, key,
            p_partial_q, p_partial_k, p_partial_v, p_dq, p_dk, p_dv, p_dgate, p_gate, stride_gate,
            first, o_token, m_token, o_row, o_key, m_key, o_value, m_value, scale, gate_factor,
            K, V, LOGITS, PRECISION, REVERSED,
        )  # fmt: skip
    else:
        dq, dk, terms, across, matrix = careful_gradients(
            state, entering, passed, q, k, v, do, scores, query, gate, query_sum, key_sum, WIDE, PRECISION, REVERSED, T
        )
        store_gradients(
            dq, dk, terms, across, matrix, passed, q, k, do, scores, key,
            p_partial_q, p_partial_k, p_partial_v, p_dq, p_dk, p_dv, p_dgate, p_gate, stride_gate,
            first, o_token, m_token, o_row, o_key, m_key, o_value, m_value, scale, gate_factor,
            K, V, LOGITS, PRECISION, REVERSED,
        )  # fmt: skip
    return entering


@triton.jit(do_not_specialize=["length", "n_chunks", "n_segments"])
def bidirectional_gla_bwd_kernel(
    p_q, p_k, p_v, p_gf, p_gb, p_dout, p_normed, p_rstd, p_weight, p_entering, p_border,
    p_partial_q, p_partial_k, p_partial_v, p_dq, p_dk, p_dv, p_dgf, p_dgb, p_dweight,
    heads, length, n_chunks, n_segments, gate_factor, scale,
    stride_q_batch, stride_q, stride_q_head, stride_k_batch, stride_k, stride_k_head,
    stride_v_batch, stride_v, stride_v_head, stride_gf_batch, stride_gf, stride_gf_head,
    stride_gb_batch, stride_gb, stride_gb_head, stride_dout_batch, stride_dout, stride_dout_head,
    K: tl.constexpr, V: tl.constexpr, LOGITS: tl.constexpr, T: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k, v, gf and gb, contiguous, and each program's share (V) in that of the norm's weight."""
    SIZE: tl.constexpr = BLOCK_K * BLOCK_V
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    i_row = tl.program_id(0).to(tl.int64)
    i_segment = tl.program_id(1)
    i_batch = i_row // heads
    i_head = i_row % heads
    i_chunk = i_segment * n_chunks
    i_program = i_row * n_segments + i_segment
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
    p_dout += i_batch * stride_dout_batch + i_head * stride_dout_head
    o_token0 = i_batch * length * heads + i_head
    weight = load_vector(p_weight, o_value, m_value)
    o_state = o_key[:, None] * BLOCK_V + o_value[None, :]
    stride_states = tl.num_programs(0).to(tl.int64) * n_segments * SIZE
    p_border += i_program * n_chunks * SIZE

    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if p_entering is not None:
        p_entering += i_program * SIZE
        state = tl.load(p_entering + o_state)
    for i in range(n_chunks):
        tl.store(p_border + i * SIZE + o_state, state)
        m_row = o_row < length - (i_chunk + i) * T
        first = ((i_chunk + i) * T).to(tl.int64)
        k = load_rows(p_k + first * stride_k, o_row, m_row, stride_k, o_key, m_key).to(tl.float32)
        v = load_rows(p_v + first * stride_v, o_row, m_row, stride_v, o_value, m_value)
        p_gate = p_gf + first * stride_gf
        gate = load_log_decays(p_gate, o_row, m_row, stride_gf, o_key, m_key, gate_factor, LOGITS)
        key = (k * tl.exp2(sums(gate, before(o_row, False), DTYPE))).to(DTYPE)
        state = tl.exp2(tl.sum(gate, axis=0))[:, None] * state
        state = tl.dot(tl.trans(key), v, state, input_precision=PRECISION)
    tl.debug_barrier()

    gradient = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if p_entering is not None:
        gradient = tl.load(p_entering + 2 * stride_states + o_state)
        state = tl.load(p_entering + stride_states + o_state)
    for i in range(n_chunks - 1, -1, -1):
        m_row = o_row < length - (i_chunk + i) * T
        first = ((i_chunk + i) * T).to(tl.int64)
        q = load_rows(p_q + first * stride_q, o_row, m_row, stride_q, o_key, m_key).to(tl.float32)
        k = load_rows(p_k + first * stride_k, o_row, m_row, stride_k, o_key, m_key).to(tl.float32)
        v = load_rows(p_v + first * stride_v, o_row, m_row, stride_v, o_value, m_value)
        o_token = o_token0 + first * heads
        do, _ = load_upstream(
            p_dout + first * stride_dout, None if p_normed is None else p_normed + o_token * V,
            None if p_rstd is None else p_rstd + o_token, weight, o_row, m_row,
            stride_dout, heads * V, heads, o_value, m_value, V,
        )  # fmt: skip
        p_gate = p_gf + first * stride_gf
        gate = load_log_decays(p_gate, o_row, m_row, stride_gf, o_key, m_key, gate_factor, LOGITS)
        entering = tl.load(p_border + i * SIZE + o_state)
        gradient = chunk_gradients(
            entering, gradient, q, k, v.to(WIDE), operand(do, WIDE, PRECISION), gate,
            p_partial_q, p_partial_k, p_partial_v, p_dq, p_dk, p_dv, p_dgf, p_gate, stride_gf,
            o_token, o_row * heads, m_row, o_row, o_key, m_key, o_value, m_value, scale, gate_factor,
            K, V, LOGITS, T, DTYPE, WIDE, PRECISION, False,
        )  # fmt: skip
        # All threads have read the forward direction's state before the backward direction's takes its place.
        tl.debug_barrier()
        tl.store(p_border + i * SIZE + o_state, state)
        p_gate = p_gb + first * stride_gb
        gate = load_log_decays(p_gate, o_row, m_row, stride_gb, o_key, m_key, gate_factor, LOGITS)
        key = (k * tl.exp2(sums(gate, before(o_row, True), DTYPE))).to(DTYPE)
        state = tl.exp2(tl.sum(gate, axis=0))[:, None] * state
        state = tl.dot(tl.trans(key), v, state, input_precision=PRECISION)
    tl.debug_barrier()

    dweight = tl.zeros((T, BLOCK_V), tl.float32)
    gradient = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if p_entering is not None:
        gradient = tl.load(p_entering + 3 * stride_states + o_state)
    for i in range(n_chunks):
        m_row = o_row < length - (i_chunk + i) * T
        first = ((i_chunk + i) * T).to(tl.int64)
        q = load_rows(p_q + first * stride_q, o_row, m_row, stride_q, o_key, m_key).to(tl.float32)
        k = load_rows(p_k + first * stride_k, o_row, m_row, stride_k, o_key, m_key).to(tl.float32)
        v = load_rows(p_v + first * stride_v, o_row, m_row, stride_v, o_value, m_value)
        o_token = o_token0 + first * heads
        do, token_dweight = load_upstream(
            p_dout + first * stride_dout, None if p_normed is None else p_normed + o_token * V,
            None if p_rstd is None else p_rstd + o_token, weight, o_row, m_row,
            stride_dout, heads * V, heads, o_value, m_value, V,
        )  # fmt: skip
        p_gate = p_gb + first * stride_gb
        gate = load_log_decays(p_gate, o_row, m_row, stride_gb, o_key, m_key, gate_factor, LOGITS)
        entering = tl.load(p_border + i * SIZE + o_state)
        gradient = chunk_gradients(
            entering, gradient, q, k, v.to(WIDE), operand(do, WIDE, PRECISION), gate,
            p_partial_q, p_partial_k, p_partial_v, p_dq, p_dk, p_dv, p_dgb, p_gate, stride_gb,
            o_token, o_row * heads, m_row, o_row, o_key, m_key, o_value, m_value, scale, gate_factor,
            K, V, LOGITS, T, DTYPE, WIDE, PRECISION, True,
        )  # fmt: skip
        if p_dweight is not None:
            dweight += token_dweight
    if p_dweight is not None:
        tl.store(p_dweight + i_program * V + o_value, tl.sum(dweight, axis=0), mask=m_value)


def bidirectional_gla_backward(
    dout, q, k, v, gf, gb, norm_weight, normed, rstd, scale, gate_normalizer
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, gf, gb and the norm's weight (empty without one)."""
    launch = Launch(q, k, v, gf, gb, gate_normalizer)
    dout = columns_adjacent(dout)
    norm = (None, None, None) if norm_weight is None else (normed, rstd, norm_weight.contiguous())
    entering = launch.entering_states(dout, *norm) if launch.segments > 1 else None
    grads = [t.new_empty(t.shape) for t in (q, k, v, gf, gb)]
    partials = [g.new_empty(g.shape, dtype=torch.float32) for g in grads[:3]]
    dweight = None
    if norm_weight is not None:
        dweight = q.new_empty(launch.rows * launch.segments, v.shape[3], dtype=torch.float32)
    bidirectional_gla_bwd_kernel[launch.grid](
        *launch.tensors, dout, *norm, entering, launch.new_borders(), *partials, *grads, dweight,
        *launch.sizes, launch.gate_factor, scale, *launch.strides, *dout.stride()[:3],
        **launch.constants,
    )  # fmt: skip
    return *grads, q.new_empty(0) if dweight is None else dweight.sum(0).to(norm_weight.dtype)
