"""States at the borders of segments, for sequences that are cut into several.

Four states (K, V) travel through a sequence: the forward direction's (0) and the gradient of the backward direction's
(3) to the right, the backward direction's (1) and the gradient of the forward direction's (2) to the left. First every
segment is walked from a state of zero, all segments side by side; then a short scan over the segments makes of their
increments and total decays the states that enter them.
"""

import triton
import triton.language as tl

from .triton_tile import load_log_decays, load_rows, load_upstream, load_vector, operand, sums


@triton.jit
def walk(
    p_rows, p_values, p_gate, p_normed, p_rstd, weight,
    stride_rows, stride_values, stride_gate, stride_normed, stride_rstd,
    i_chunk, n_chunks, length, gate_factor,
    K: tl.constexpr, V: tl.constexpr, LOGITS: tl.constexpr, T: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    RIGHTWARDS: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """State (K, V) behind a segment that zero enters, and the segment's total log-decay (K).

    A state decays by a token's gate before it takes the token up, the gradient of a state after.
    """
    DTYPE: tl.constexpr = p_rows.dtype.element_ty
    o_row = tl.arange(0, T)
    o_key = tl.arange(0, BLOCK_K)
    o_value = tl.arange(0, BLOCK_V)
    m_key = o_key < K
    m_value = o_value < V
    o_token = o_row if RIGHTWARDS else T - 1 - o_row
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for i in range(n_chunks):
        i_here = i_chunk + i if RIGHTWARDS else i_chunk + n_chunks - 1 - i
        m_token = o_token < length - i_here * T
        first = (i_here * T).to(tl.int64)
        p_chunk = p_gate + first * stride_gate
        gate = load_log_decays(p_chunk, o_token, m_token, stride_gate, o_key, m_key, gate_factor, LOGITS)
        rows = load_rows(p_rows + first * stride_rows, o_token, m_token, stride_rows, o_key, m_key).to(tl.float32)
        chunk_total = tl.sum(gate, axis=0)
        if GRADIENT:
            p_chunk_normed = None if p_normed is None else p_normed + first * stride_normed
            p_chunk_rstd = None if p_rstd is None else p_rstd + first * stride_rstd
            values, _ = load_upstream(
                p_values + first * stride_values, p_chunk_normed, p_chunk_rstd, weight, o_token, m_token,
                stride_values, stride_normed, stride_rstd, o_value, m_value, V,
            )  # fmt: skip
            values = operand(values, WIDE, PRECISION)
            decay = tl.exp2(sums(gate, o_row[:, None] <= o_row[None, :], DTYPE))
        else:
            values = load_rows(p_values + first * stride_values, o_token, m_token, stride_values, o_value, m_value)
            decay = tl.exp2(sums(gate, o_row[:, None] < o_row[None, :], DTYPE))
        state = tl.exp2(chunk_total)[:, None] * state
        rows = rows * decay
        rows = operand(rows, WIDE, PRECISION) if GRADIENT else rows.to(DTYPE)
        state = tl.dot(tl.trans(rows), values, state, input_precision=PRECISION)
        total += chunk_total
    return state, total


@triton.jit(do_not_specialize=["length", "n_chunks", "n_segments"])
def bidirectional_gla_summary_kernel(
    p_q, p_k, p_v, p_gf, p_gb, p_dout, p_normed, p_rstd, p_weight, p_increment, p_total,
    heads, length, n_chunks, n_segments, gate_factor,
    stride_q_batch, stride_q, stride_q_head, stride_k_batch, stride_k, stride_k_head,
    stride_v_batch, stride_v, stride_v_head, stride_gf_batch, stride_gf, stride_gf_head,
    stride_gb_batch, stride_gb, stride_gb_head, stride_dout_batch, stride_dout, stride_dout_head,
    K: tl.constexpr, V: tl.constexpr, LOGITS: tl.constexpr, T: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Increment (states, rows, segments, K V) and total log-decay (states, rows, segments, K) of each segment."""
    i_row = tl.program_id(0).to(tl.int64)
    i_segment = tl.program_id(1)
    i_state = tl.program_id(2)
    i_batch = i_row // heads
    i_head = i_row % heads
    i_chunk = i_segment * n_chunks
    o_key = tl.arange(0, BLOCK_K)
    o_value = tl.arange(0, BLOCK_V)
    weight = load_vector(p_weight, o_value, o_value < V)
    p_q += i_batch * stride_q_batch + i_head * stride_q_head
    p_k += i_batch * stride_k_batch + i_head * stride_k_head
    p_v += i_batch * stride_v_batch + i_head * stride_v_head
    p_gf += i_batch * stride_gf_batch + i_head * stride_gf_head
    p_gb += i_batch * stride_gb_batch + i_head * stride_gb_head
    if i_state == 0:
        state, total = walk(
            p_k, p_v, p_gf, None, None, weight, stride_k, stride_v, stride_gf, 0, 0,
            i_chunk, n_chunks, length, gate_factor,
            K, V, LOGITS, T, BLOCK_K, BLOCK_V, WIDE, PRECISION, RIGHTWARDS=True, GRADIENT=False,
        )  # fmt: skip
    elif i_state == 1:
        state, total = walk(
            p_k, p_v, p_gb, None, None, weight, stride_k, stride_v, stride_gb, 0, 0,
            i_chunk, n_chunks, length, gate_factor,
            K, V, LOGITS, T, BLOCK_K, BLOCK_V, WIDE, PRECISION, RIGHTWARDS=False, GRADIENT=False,
        )  # fmt: skip
    else:
        state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
        total = tl.zeros((BLOCK_K,), tl.float32)
    if p_dout is not None:
        p_dout += i_batch * stride_dout_batch + i_head * stride_dout_head
        # The normalised output and 1 / RMS are ours, (B, L, heads, V) and (B, L, heads), contiguous.
        if p_normed is not None:
            p_normed += (i_batch * length * heads + i_head) * V
            p_rstd += i_batch * length * heads + i_head
        if i_state == 2:
            state, total = walk(
                p_q, p_dout, p_gf, p_normed, p_rstd, weight, stride_q, stride_dout, stride_gf, heads * V, heads,
                i_chunk, n_chunks, length, gate_factor,
                K, V, LOGITS, T, BLOCK_K, BLOCK_V, WIDE, PRECISION, RIGHTWARDS=False, GRADIENT=True,
            )  # fmt: skip
        if i_state == 3:
            state, total = walk(
                p_q, p_dout, p_gb, p_normed, p_rstd, weight, stride_q, stride_dout, stride_gb, heads * V, heads,
                i_chunk, n_chunks, length, gate_factor,
                K, V, LOGITS, T, BLOCK_K, BLOCK_V, WIDE, PRECISION, RIGHTWARDS=True, GRADIENT=True,
            )  # fmt: skip
    i_slot = (i_state * tl.num_programs(0).to(tl.int64) + i_row) * n_segments + i_segment
    o_state = o_key[:, None] * BLOCK_V + o_value[None, :]
    tl.store(p_increment + i_slot * (BLOCK_K * BLOCK_V) + o_state, state)
    tl.store(p_total + i_slot * BLOCK_K + o_key, total)


@triton.jit
def _chain(decay_1, state_1, decay_2, state_2):
    return decay_1 * decay_2, decay_2 * state_1 + state_2


@triton.jit(do_not_specialize=["n_segments"])
def bidirectional_gla_scan_kernel(
    p_increment, p_total, p_entering, n_segments,
    GROUP: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """States (states, rows, segments, K V) that enter the segments; a program scans BLOCK elements of one state."""
    SIZE: tl.constexpr = BLOCK_K * BLOCK_V
    i_state = tl.program_id(2)
    i_sequence = (i_state * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    o_element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    p_increment += i_sequence * n_segments * SIZE
    p_entering += i_sequence * n_segments * SIZE
    p_total += i_sequence * n_segments * BLOCK_K
    rightwards = (i_state == 0) | (i_state == 3)
    step = tl.where(rightwards, 1, -1)
    start = tl.where(rightwards, 0, n_segments - 1)
    o_group = tl.arange(0, GROUP)
    carry = tl.zeros((BLOCK,), tl.float32)
    tl.store(p_entering + start.to(tl.int64) * SIZE + o_element, carry)
    for i in range(0, n_segments - 1, GROUP):
        order = i + o_group
        m_segment = order < n_segments - 1
        segment = (start + step * order).to(tl.int64)
        o_total = segment[:, None] * BLOCK_K + o_element[None, :] // BLOCK_V
        o_state = segment[:, None] * SIZE + o_element[None, :]
        decay = tl.exp2(tl.load(p_total + o_total, mask=m_segment[:, None], other=0.0))
        state = tl.load(p_increment + o_state, mask=m_segment[:, None], other=0.0)
        state = tl.where(o_group[:, None] == 0, state + decay * carry[None, :], state)
        _, state = tl.associative_scan((decay, state), 0, _chain)
        tl.store(p_entering + o_state + step * SIZE, state, mask=m_segment[:, None])
        carry = tl.sum(tl.where(o_group[:, None] == GROUP - 1, state, 0.0), axis=0)
