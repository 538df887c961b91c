"""States that enter the chunks, for the kernels whose programs own a chunk.

The four states of ``triton_states.py``. A program walks one of them through a segment of a sequence, from zero, and
leaves it, transposed (V, K), at every chunk. The states that enter the segments, if there are several, are made by the
scan of ``triton_states.py``; their share in a chunk's state is added where it is used.
"""

import triton
import triton.language as tl

from .triton_chunk_tile import gate_sums, half_sums, normalised
from .triton_tile import load_log_decays, load_rows, load_upstream, load_vector


@triton.jit
def walk(
    p_rows, p_values, p_gate, p_normed, p_rstd, weight, p_state, p_prefix, p_halves,
    stride_rows, stride_values, stride_gate, stride_normed, stride_rstd,
    i_chunk, n_chunks, length, gate_factor,
    K: tl.constexpr, V: tl.constexpr, LOGITS: tl.constexpr, T: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, RIGHTWARDS: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Transposed state (V, K) behind a segment that zero enters, and the segment's total log-decay (K).

    A state decays by a token's gate before it takes the token up, the gradient of a state after.
    """
    DTYPE: tl.constexpr = p_rows.dtype.element_ty
    SIZE: tl.constexpr = BLOCK_K * BLOCK_V
    o_row = tl.arange(0, T)
    o_key = tl.arange(0, BLOCK_K)
    o_value = tl.arange(0, BLOCK_V)
    m_key = o_key < K
    m_value = o_value < V
    o_state = o_value[:, None] * BLOCK_K + o_key[None, :]
    i, t = o_row[:, None], o_row[None, :]
    # Gates between a token and the end of its chunk towards which the state travels.
    chosen = t > i if RIGHTWARDS else t < i
    chosen = chosen | (t == i) if GRADIENT else chosen
    chosen = tl.where(chosen, 1.0, 0.0)
    state = tl.zeros((BLOCK_V, BLOCK_K), tl.float32)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for step in range(n_chunks):
        i_here = i_chunk + step if RIGHTWARDS else i_chunk + n_chunks - 1 - step
        i_slot = i_here.to(tl.int64)
        tl.store(p_state + i_slot * SIZE + o_state, state)
        if p_prefix is not None:
            tl.store(p_prefix + i_slot * BLOCK_K + o_key, total)
        m_token = o_row < length - i_here * T
        first = i_slot * T
        p_chunk = p_gate + first * stride_gate
        gate = load_log_decays(p_chunk, o_row, m_token, stride_gate, o_key, m_key, gate_factor, LOGITS)
        rows = load_rows(p_rows + first * stride_rows, o_row, m_token, stride_rows, o_key, m_key).to(tl.float32)
        left, right = half_sums(gate, o_row)
        rows *= tl.exp2(gate_sums(gate, chosen))
        state *= tl.exp2(left + right)[None, :]
        if GRADIENT:
            p_chunk_normed = None if p_normed is None else p_normed + first * stride_normed
            p_chunk_rstd = None if p_rstd is None else p_rstd + first * stride_rstd
            values, _ = load_upstream(
                p_values + first * stride_values, p_chunk_normed, p_chunk_rstd, weight, o_row, m_token,
                stride_values, stride_normed, stride_rstd, o_value, m_value, V,
            )  # fmt: skip
            values, unit = normalised(values, DTYPE, 2)
            state += unit * tl.dot(tl.trans(values.to(DTYPE)), rows.to(DTYPE))
        else:
            tl.store(p_halves + i_slot * 2 * BLOCK_K + o_key, left)
            tl.store(p_halves + i_slot * 2 * BLOCK_K + BLOCK_K + o_key, right)
            values = load_rows(p_values + first * stride_values, o_row, m_token, stride_values, o_value, m_value)
            state = tl.dot(tl.trans(values), rows.to(DTYPE), state)
        total += left + right
    return state, total


@triton.jit(do_not_specialize=["length", "n_chunks", "n_segments"])
def bidirectional_gla_bwd_kernel_states(
    p_q, p_k, p_v, p_gf, p_gb, p_dout, p_normed, p_rstd, p_weight,
    p_state, p_halves, p_prefix, p_increment, p_total,
    heads, length, n_chunks, n_segments, gate_factor,
    stride_q_batch, stride_q, stride_q_head, stride_k_batch, stride_k, stride_k_head,
    stride_v_batch, stride_v, stride_v_head, stride_gf_batch, stride_gf, stride_gf_head,
    stride_gb_batch, stride_gb, stride_gb_head, stride_dout_batch, stride_dout, stride_dout_head,
    K: tl.constexpr, V: tl.constexpr, LOGITS: tl.constexpr, T: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """States (states, rows, chunks, K V) from the start of each segment, and log-decays.

    Log-decays are sums over both halves of the chunks (2, rows, chunks, 2, K) and, with several segments, from the
    segment's start to the chunk (states, rows, chunks, K); then also what leaves the segments, increments (states,
    rows, segments, K V) and totals (states, rows, segments, K).
    """
    SIZE: tl.constexpr = BLOCK_K * BLOCK_V
    i_row = tl.program_id(0).to(tl.int64)
    i_segment = tl.program_id(1)
    i_state = tl.program_id(2)
    i_batch = i_row // heads
    i_head = i_row % heads
    i_chunk = i_segment * n_chunks
    i_sequence = i_state * tl.num_programs(0).to(tl.int64) + i_row
    i_slot = i_sequence * n_segments * n_chunks
    o_key = tl.arange(0, BLOCK_K)
    o_value = tl.arange(0, BLOCK_V)
    weight = load_vector(p_weight, o_value, o_value < V)
    p_q += i_batch * stride_q_batch + i_head * stride_q_head
    p_k += i_batch * stride_k_batch + i_head * stride_k_head
    p_v += i_batch * stride_v_batch + i_head * stride_v_head
    p_gf += i_batch * stride_gf_batch + i_head * stride_gf_head
    p_gb += i_batch * stride_gb_batch + i_head * stride_gb_head
    p_state += i_slot * SIZE
    p_halves += i_slot * 2 * BLOCK_K
    if p_prefix is not None:
        p_prefix += i_slot * BLOCK_K
    if i_state == 0:
        state, total = walk(
            p_k, p_v, p_gf, None, None, weight, p_state, p_prefix, p_halves, stride_k, stride_v, stride_gf, 0, 0,
            i_chunk, n_chunks, length, gate_factor,
            K, V, LOGITS, T, BLOCK_K, BLOCK_V, RIGHTWARDS=True, GRADIENT=False,
        )  # fmt: skip
    elif i_state == 1:
        state, total = walk(
            p_k, p_v, p_gb, None, None, weight, p_state, p_prefix, p_halves, stride_k, stride_v, stride_gb, 0, 0,
            i_chunk, n_chunks, length, gate_factor,
            K, V, LOGITS, T, BLOCK_K, BLOCK_V, RIGHTWARDS=False, GRADIENT=False,
        )  # fmt: skip
    else:
        state = tl.zeros((BLOCK_V, BLOCK_K), tl.float32)
        total = tl.zeros((BLOCK_K,), tl.float32)
    if p_dout is not None:
        p_dout += i_batch * stride_dout_batch + i_head * stride_dout_head
        # The normalised output and 1 / RMS are ours, (B, L, heads, V) and (B, L, heads), contiguous.
        if p_normed is not None:
            p_normed += (i_batch * length * heads + i_head) * V
            p_rstd += i_batch * length * heads + i_head
        if i_state == 2:
            state, total = walk(
                p_q, p_dout, p_gf, p_normed, p_rstd, weight, p_state, p_prefix, None,
                stride_q, stride_dout, stride_gf, heads * V, heads, i_chunk, n_chunks, length, gate_factor,
                K, V, LOGITS, T, BLOCK_K, BLOCK_V, RIGHTWARDS=False, GRADIENT=True,
            )  # fmt: skip
        if i_state == 3:
            state, total = walk(
                p_q, p_dout, p_gb, p_normed, p_rstd, weight, p_state, p_prefix, None,
                stride_q, stride_dout, stride_gb, heads * V, heads, i_chunk, n_chunks, length, gate_factor,
                K, V, LOGITS, T, BLOCK_K, BLOCK_V, RIGHTWARDS=True, GRADIENT=True,
            )  # fmt: skip
    if p_increment is not None:
        o_state = o_value[:, None] * BLOCK_K + o_key[None, :]
        tl.store(p_increment + (i_sequence * n_segments + i_segment) * SIZE + o_state, state)
        tl.store(p_total + (i_sequence * n_segments + i_segment) * BLOCK_K + o_key, total)


@triton.jit
def load_state(p_state, p_entering, p_prefix, i_sequence, n_segments, n_chunks, i_chunk, o_key, o_value):
    """State (K, V) that enters a chunk in the order of its walk."""
    BLOCK_K: tl.constexpr = o_key.shape[0]
    BLOCK_V: tl.constexpr = o_value.shape[0]
    SIZE: tl.constexpr = BLOCK_K * BLOCK_V
    o_state = o_key[:, None] + o_value[None, :] * BLOCK_K
    i_slot = i_sequence * n_segments * n_chunks + i_chunk
    state = tl.load(p_state + i_slot * SIZE + o_state)
    if p_entering is not None:
        decay = tl.exp2(tl.load(p_prefix + i_slot * BLOCK_K + o_key))
        i_segment = i_sequence * n_segments + i_chunk // n_chunks
        state += decay[:, None] * tl.load(p_entering + i_segment * SIZE + o_state)
    return state


@triton.jit
def load_halves(p_halves, i_slot, o_key):
    """Log-decays (K) of a chunk's left and right half."""
    BLOCK_K: tl.constexpr = o_key.shape[0]
    p_halves += i_slot * 2 * BLOCK_K
    return tl.load(p_halves + o_key), tl.load(p_halves + BLOCK_K + o_key)
