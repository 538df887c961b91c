"""Bidirectional gated linear attention, Triton backward pass by chunks, for the heads that it is faster for.

The states that enter the chunks and their gradients are made first (``triton_chunk_states.py``). Then a program owns a
chunk of one head of a batch element: one kernel gives the gradients of queries, keys and gates, another that of the
values, so that neither holds too much at once. The mathematics is that of ``triton_bwd.py``; chunks with strong gates
are done level by level as in ``torch_gla.py``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_chunk_states import bidirectional_gla_bwd_kernel_states, load_halves, load_state
from .triton_chunk_tile import (
    ROOM,
    exponents,
    gate_sums,
    level_exponents,
    level_of,
    normalised,
    running_sums,
    unit_of,
)
from .triton_launch import Launch
from .triton_tile import load_log_decays, load_rows, load_upstream, load_vector

# Heads (keys, values), padded to powers of two, that have been measured to be faster this way, with 16-bit inputs.
_HEADS = {(32, 64)}
# Tokens of a chunk, and warps of a program. With four warps, Triton 3.6 takes other instructions of the tensor cores
# for chunks of 64 tokens, and the results are wrong.
_CHUNK, _WARPS = 32, 2
# Programs that walk one state: sequences are cut into segments until there are about so many for two states.
_TARGET_PROGRAMS = 768
# Registers of the kernel for values: more programs at once are worth it, and nothing spills. The other kernel spills.
_VALUE_REGISTERS = 168
# A chunk is mild if no state decays by more than this power of two in either half.
_MILD = {torch.bfloat16: 80.0, torch.float16: 12.0}


def is_faster(launch: Launch) -> bool:
    """Whether to go by chunks."""
    return (launch.block_keys, launch.block_values) in _HEADS and launch.tensors[0].dtype in _MILD


@triton.jit
def store_gate_gradient(
    dgate, p_dgate, p_gate, stride_gate, o_row, o_rows, m_row, o_key, m_key, factor, K: tl.constexpr,
    LOGITS: tl.constexpr,
):  # fmt: skip
    """Store the gradient (T, K) of log-decays, or of the logits that they were made of."""
    dgate *= factor
    if LOGITS:
        dgate *= tl.sigmoid(-load_rows(p_gate, o_row, m_row, stride_gate, o_key, m_key).to(tl.float32))
    m_keys = m_row[:, None] & m_key[None, :]
    tl.store(p_dgate + o_rows[:, None] * K + o_key[None, :], dgate.to(p_dgate.dtype.element_ty), mask=m_keys)


@triton.jit
def mild_direction(
    q, k, v, do, scores, q_unit, k_unit, v_unit, do_unit,
    p_gate, p_dgate, stride_gate, p_state, p_entering, p_prefix, i_state, i_gradient, n_segments, n_chunks, i_chunk,
    first_half, second_half, o_row, o_rows, m_row, o_key, m_key, o_value, gate_factor, scale,
    K: tl.constexpr, LOGITS: tl.constexpr, DTYPE: tl.constexpr,
    KEYS: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    """One direction's share in the gradients of a chunk with mild gates.

    ``q`` and ``k`` are in units, ``v``, ``do`` and ``scores`` are operands, ``first_half`` and ``second_half`` the
    log-decays (K) of the chunk's halves in the direction's order.

    Returns:
        If KEYS, the gradients of q and k (T, K) without a token's share in itself, while that of the gates is stored;
        else the weights (T, T) before masking, and the gradient of v (T, V) by way of the states.
    """
    i, j = o_row[:, None], o_row[None, :]
    gate = load_log_decays(p_gate, o_row, m_row, stride_gate, o_key, m_key, gate_factor, LOGITS)
    exponent = exponents(gate, o_row, REVERSED)
    query_decay, key_decay = tl.exp2(exponent), tl.exp2(-exponent)
    query = (q * query_decay).to(DTYPE)
    key = (k * key_decay).to(DTYPE)
    gradient = load_state(p_state, p_entering, p_prefix, i_gradient, n_segments, n_chunks, i_chunk, o_key, o_value)
    gradient_unit, inverse = unit_of(tl.max(tl.abs(gradient)), DTYPE, 2)
    gradient = (gradient * (tl.exp2(second_half) * inverse)[:, None]).to(DTYPE)
    if KEYS:
        state = load_state(p_state, p_entering, p_prefix, i_state, n_segments, n_chunks, i_chunk, o_key, o_value)
        state_unit, inverse = unit_of(tl.max(tl.abs(state)), DTYPE, 2)
        state = (state * (tl.exp2(first_half) * inverse)[:, None]).to(DTYPE)
        others = tl.where(i < j if REVERSED else i > j, scores, 0.0)
        dq = (do_unit * v_unit * k_unit) * tl.dot(others, key)
        dq += (do_unit * state_unit) * tl.dot(do, tl.trans(state))
        dk = (do_unit * v_unit * q_unit) * tl.dot(tl.trans(others), query)
        dk += (v_unit * gradient_unit) * tl.dot(v, tl.trans(gradient))
        terms = k_unit * key.to(tl.float32) * dk - q_unit * query.to(tl.float32) * dq
        across = (do_unit * q_unit) * tl.dot(tl.trans(query), do)
        across = (across + gradient_unit * gradient.to(tl.float32)) * state.to(tl.float32)
        dgate = running_sums(terms, o_row, DTYPE, REVERSED) + state_unit * tl.sum(across, axis=1)[None, :]
        store_gate_gradient(
            dgate, p_dgate, p_gate, stride_gate, o_row, o_rows, m_row, o_key, m_key, scale * gate_factor, K, LOGITS
        )
        return dq * query_decay, dk * key_decay
    else:
        return tl.dot(query, tl.trans(key)), (k_unit * gradient_unit) * tl.dot(key, gradient)


@triton.jit
def strong_border_gradients(
    q, k, v, do, gate, total, state, gradient, state_unit, gradient_unit, q_unit, k_unit, v_unit, do_unit,
    o_row, DTYPE: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    """What a direction gives to a chunk from the states at its border, for gates of any strength.

    Returns:
        Shares in the gradients of q and k (T, K) and v (T, V); k dk - q dq; the gate gradients' part from pairs across
        the border (K).
    """
    i, t = o_row[:, None], o_row[None, :]
    query_decay = tl.exp2(gate_sums(gate, tl.where(t >= i if REVERSED else t <= i, 1.0, 0.0)))
    key_decay = tl.exp2(gate_sums(gate, tl.where(t < i if REVERSED else t > i, 1.0, 0.0)))
    query = (q * query_decay).to(DTYPE)
    key = (k * key_decay).to(DTYPE)
    dq = (do_unit * state_unit) * tl.dot(do, tl.trans(state))
    dk = (v_unit * gradient_unit) * tl.dot(v, tl.trans(gradient))
    terms = k_unit * key.to(tl.float32) * dk - q_unit * query.to(tl.float32) * dq
    across = (do_unit * q_unit) * tl.dot(tl.trans(query), do)
    across += (gradient_unit * tl.exp2(total))[:, None] * gradient.to(tl.float32)
    across = state_unit * tl.sum(across * state.to(tl.float32), axis=1)
    dv = (k_unit * gradient_unit) * tl.dot(key, gradient)
    return dq * query_decay, dk * key_decay, dv, terms, across


@triton.jit
def strong_gradients(
    q, k, v, do, scores, gf, gb, f_total, b_total, f_state, b_state, f_gradient, b_gradient, state_unit, gradient_unit,
    q_unit, k_unit, v_unit, do_unit, o_row,
    LEVELS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k, v, gf and gb for a chunk with gates of any strength, level by level as in ``torch_gla.py``.

    Those of q and k without a token's share in itself.
    """
    i, j = o_row[:, None], o_row[None, :]
    dq, dk, dv, f_terms, f_across = strong_border_gradients(
        q, k, v, do, gf, f_total, f_state, f_gradient, state_unit, gradient_unit, q_unit, k_unit, v_unit, do_unit,
        o_row, DTYPE, False,
    )  # fmt: skip
    b_dq, b_dk, b_dv, b_terms, b_across = strong_border_gradients(
        q, k, v, do, gb, b_total, b_state, b_gradient, state_unit, gradient_unit, q_unit, k_unit, v_unit, do_unit,
        o_row, DTYPE, True,
    )  # fmt: skip
    dq += b_dq
    dk += b_dk
    dv += b_dv
    own = tl.dot(q.to(DTYPE), tl.trans(k.to(DTYPE)))
    matrix = tl.where(i == j, 2.0 * own, 0.0)
    for level in range(LEVELS):
        pairs, second, middle = level_of(o_row, level)
        query_exponent, key_exponent = level_exponents(gf, gb, o_row, second, middle)
        query_decay, key_decay = tl.exp2(query_exponent), tl.exp2(key_exponent)
        query = (q * query_decay).to(DTYPE)
        key = (k * key_decay).to(DTYPE)
        matrix += tl.where(pairs, tl.dot(query, tl.trans(key)), 0.0)
        others = tl.where(pairs, scores, 0.0)
        dquery = (do_unit * v_unit * k_unit) * tl.dot(others, key)
        dkey = (do_unit * v_unit * q_unit) * tl.dot(tl.trans(others), query)
        dq += dquery * query_decay
        dk += dkey * key_decay
        dquery *= q_unit * query.to(tl.float32)
        dkey *= k_unit * key.to(tl.float32)
        f_terms += tl.where(second, -dquery, dkey)
        b_terms += tl.where(second, dkey, -dquery)
    matrix = tl.trans(matrix.to(DTYPE))
    dv += (q_unit * k_unit * do_unit) * tl.dot(matrix, do)
    dgf = running_sums(f_terms, o_row, DTYPE, False) + f_across[None, :]
    dgb = running_sums(b_terms, o_row, DTYPE, True) + b_across[None, :]
    return dq, dk, dv, dgf, dgb


@triton.jit(do_not_specialize=["rows", "length", "n_chunks", "n_segments"])
def bidirectional_gla_bwd_kernel_chunk(
    p_q, p_k, p_v, p_gf, p_gb, p_dout, p_normed, p_rstd, p_weight, p_state, p_halves, p_prefix, p_entering,
    p_dq, p_dk, p_dv, p_dgf, p_dgb, p_dweight,
    rows, heads, length, n_chunks, n_segments, gate_factor, scale,
    stride_q_batch, stride_q, stride_q_head, stride_k_batch, stride_k, stride_k_head,
    stride_v_batch, stride_v, stride_v_head, stride_gf_batch, stride_gf, stride_gf_head,
    stride_gb_batch, stride_gb, stride_gb_head, stride_dout_batch, stride_dout, stride_dout_head,
    K: tl.constexpr, V: tl.constexpr, LOGITS: tl.constexpr, T: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, MILD: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """If KEYS, gradients of q, k, gf and gb, contiguous, and each program's share (V) in that of the norm's weight.

    Else the gradient of v, which the launch with KEYS has stored for chunks with strong gates.
    """
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    i_row = (tl.program_id(0) % rows).to(tl.int64)
    i_chunk = (tl.program_id(0) // rows).to(tl.int64)
    i_batch = i_row // heads
    i_head = i_row % heads
    first = i_chunk * T
    o_row = tl.arange(0, T)
    o_key = tl.arange(0, BLOCK_K)
    o_value = tl.arange(0, BLOCK_V)
    m_row = o_row < length - first
    m_key = o_key < K
    m_value = o_value < V
    p_q += i_batch * stride_q_batch + i_head * stride_q_head + first * stride_q
    p_k += i_batch * stride_k_batch + i_head * stride_k_head + first * stride_k
    p_v += i_batch * stride_v_batch + i_head * stride_v_head + first * stride_v
    p_gf += i_batch * stride_gf_batch + i_head * stride_gf_head + first * stride_gf
    p_gb += i_batch * stride_gb_batch + i_head * stride_gb_head + first * stride_gb
    p_dout += i_batch * stride_dout_batch + i_head * stride_dout_head + first * stride_dout
    # What is ours is contiguous, with a token of one head after the other.
    first = (i_batch * length + first) * heads + i_head
    o_rows = o_row * heads
    p_dq += first * K
    p_dk += first * K
    p_dv += first * V
    p_dgf += first * K
    p_dgb += first * K
    if p_normed is not None:
        p_normed += first * V
        p_rstd += first
    weight = load_vector(p_weight, o_value, m_value)
    q, q_unit = normalised(load_rows(p_q, o_row, m_row, stride_q, o_key, m_key), DTYPE, ROOM)
    k, k_unit = normalised(load_rows(p_k, o_row, m_row, stride_k, o_key, m_key), DTYPE, ROOM)
    do, dweight = load_upstream(
        p_dout, p_normed, p_rstd, weight, o_row, m_row, stride_dout, heads * V, heads, o_value, m_value, V
    )
    if KEYS and p_dweight is not None:
        p_dweight += (i_row * tl.cdiv(length, T) + i_chunk) * V
        tl.store(p_dweight + o_value, tl.sum(dweight, axis=0), mask=m_value)
    do, do_unit = normalised(do, DTYPE, 11)
    do = do.to(DTYPE)
    i_slot = i_row * n_segments * n_chunks + i_chunk
    f_left, f_right = load_halves(p_halves, i_slot, o_key)
    b_left, b_right = load_halves(p_halves, i_slot + rows.to(tl.int64) * n_segments * n_chunks, o_key)
    mildest = tl.minimum(tl.minimum(f_left, f_right), tl.minimum(b_left, b_right))
    mild = tl.min(mildest, axis=0) >= -MILD
    o_keys = o_rows[:, None] * K + o_key[None, :]
    m_keys = m_row[:, None] & m_key[None, :]
    o_values = o_rows[:, None] * V + o_value[None, :]
    m_values = m_row[:, None] & m_value[None, :]
    v, v_unit, scores, own = do, do_unit, do, q  # not used unless KEYS
    if KEYS:
        v, v_unit = normalised(load_rows(p_v, o_row, m_row, stride_v, o_value, m_value), DTYPE, 11)
        v = v.to(DTYPE)
        scores = tl.dot(do, tl.trans(v))
        own = tl.sum(tl.where(o_row[:, None] == o_row[None, :], scores, 0.0), axis=1)[:, None]
        own *= 2.0 * do_unit * v_unit
        scores = scores.to(DTYPE)
    if mild:
        # Gradients of q and k if KEYS, else weights and the gradient of v.
        f_first, f_second = mild_direction(
            q, k, v, do, scores, q_unit, k_unit, v_unit, do_unit,
            p_gf, p_dgf, stride_gf, p_state, p_entering, p_prefix, i_row, i_row + 2 * rows, n_segments, n_chunks,
            i_chunk, f_left, f_right, o_row, o_rows, m_row, o_key, m_key, o_value, gate_factor, scale,
            K, LOGITS, DTYPE, KEYS, False,
        )  # fmt: skip
        b_first, b_second = mild_direction(
            q, k, v, do, scores, q_unit, k_unit, v_unit, do_unit,
            p_gb, p_dgb, stride_gb, p_state, p_entering, p_prefix, i_row + rows, i_row + 3 * rows, n_segments, n_chunks,
            i_chunk, b_right, b_left, o_row, o_rows, m_row, o_key, m_key, o_value, gate_factor, scale,
            K, LOGITS, DTYPE, KEYS, True,
        )  # fmt: skip
        if KEYS:
            dq = (f_first + b_first + own * k_unit * k) * scale
            dk = (f_second + b_second + own * q_unit * q) * scale
            tl.store(p_dq + o_keys, dq.to(p_dq.dtype.element_ty), mask=m_keys)
            tl.store(p_dk + o_keys, dk.to(p_dk.dtype.element_ty), mask=m_keys)
        else:
            i, j = o_row[:, None], o_row[None, :]
            weights = tl.where(i >= j, f_first, 0.0) + tl.where(i <= j, b_first, 0.0)
            dv = (q_unit * k_unit * do_unit) * tl.dot(tl.trans(weights.to(DTYPE)), do)
            dv += f_second + b_second
            tl.store(p_dv + o_values, (dv * scale).to(p_dv.dtype.element_ty), mask=m_values)
    elif KEYS:
        factor = scale * gate_factor
        gf = load_log_decays(p_gf, o_row, m_row, stride_gf, o_key, m_key, gate_factor, LOGITS)
        gb = load_log_decays(p_gb, o_row, m_row, stride_gb, o_key, m_key, gate_factor, LOGITS)
        f_state = load_state(p_state, p_entering, p_prefix, i_row, n_segments, n_chunks, i_chunk, o_key, o_value)
        b_state = load_state(p_state, p_entering, p_prefix, i_row + rows, n_segments, n_chunks, i_chunk, o_key, o_value)
        f_gradient = load_state(
            p_state, p_entering, p_prefix, i_row + 2 * rows, n_segments, n_chunks, i_chunk, o_key, o_value
        )
        b_gradient = load_state(
            p_state, p_entering, p_prefix, i_row + 3 * rows, n_segments, n_chunks, i_chunk, o_key, o_value
        )
        state_unit, inverse = unit_of(tl.max(tl.maximum(tl.abs(f_state), tl.abs(b_state))), DTYPE, 2)
        f_state, b_state = (f_state * inverse).to(DTYPE), (b_state * inverse).to(DTYPE)
        gradient_unit, inverse = unit_of(tl.max(tl.maximum(tl.abs(f_gradient), tl.abs(b_gradient))), DTYPE, 2)
        f_gradient = (f_gradient * inverse).to(DTYPE)
        b_gradient = (b_gradient * inverse).to(DTYPE)
        all_dq, all_dk, all_dv, dgf, dgb = strong_gradients(
            q, k, v, do, scores, gf, gb, f_left + f_right, b_left + b_right, f_state, b_state, f_gradient, b_gradient,
            state_unit, gradient_unit, q_unit, k_unit, v_unit, do_unit, o_row, LEVELS, DTYPE,
        )  # fmt: skip
        all_dq = (all_dq + own * k_unit * k) * scale
        all_dk = (all_dk + own * q_unit * q) * scale
        tl.store(p_dq + o_keys, all_dq.to(p_dq.dtype.element_ty), mask=m_keys)
        tl.store(p_dk + o_keys, all_dk.to(p_dk.dtype.element_ty), mask=m_keys)
        tl.store(p_dv + o_values, (all_dv * scale).to(p_dv.dtype.element_ty), mask=m_values)
        store_gate_gradient(dgf, p_dgf, p_gf, stride_gf, o_row, o_rows, m_row, o_key, m_key, factor, K, LOGITS)
        store_gate_gradient(dgb, p_dgb, p_gb, stride_gb, o_row, o_rows, m_row, o_key, m_key, factor, K, LOGITS)


def chunked_backward(launch: Launch, dout: Tensor, norm: tuple, scale: float, grads: list[Tensor]) -> Tensor | None:
    """Fill ``grads`` of q, k, v, gf and gb; returns shares (programs, V) in the gradient of the norm's weight, if any.

    ``norm`` is the normalised output, 1 / RMS and weight, or three times None.
    """
    q, _, v, _, _ = launch.tensors
    _, length, heads, keys = q.shape
    rows, block_keys, block_values = launch.rows, launch.block_keys, launch.block_values
    chunks = triton.cdiv(length, _CHUNK)
    chunks_per_segment = triton.cdiv(chunks, min(chunks, triton.cdiv(_TARGET_PROGRAMS, 2 * rows)))
    segments = triton.cdiv(chunks, chunks_per_segment)
    sizes = (heads, length, chunks_per_segment, segments)
    strides = (*launch.strides, *dout.stride()[:3])
    constants = dict(
        K=keys,
        V=v.shape[3],
        LOGITS=launch.constants["LOGITS"],
        T=_CHUNK,
        BLOCK_K=block_keys,
        BLOCK_V=block_values,
        num_warps=_WARPS,
    )

    def new(*shape: int) -> Tensor:
        return q.new_empty(shape, dtype=torch.float32)

    padded = segments * chunks_per_segment
    state, halves = new(4, rows, padded, block_values * block_keys), new(2, rows, padded, 2, block_keys)
    prefix = increments = totals = entering = None
    if segments > 1:
        prefix = new(4, rows, padded, block_keys)
        increments, totals = new(4, rows, segments, block_values * block_keys), new(4, rows, segments, block_keys)
    bidirectional_gla_bwd_kernel_states[(rows, segments, 4)](
        *launch.tensors, dout, *norm, state, halves, prefix, increments, totals,
        *sizes, launch.gate_factor, *strides, **constants, num_stages=2,
    )  # fmt: skip
    if segments > 1:
        entering = launch.scan_segments(increments, totals, 1)
    dweight = None if norm[2] is None else new(rows * chunks, v.shape[3])
    for part in ("keys", "values"):
        registers = part == "values" and q.is_cuda and torch.version.hip is None
        bidirectional_gla_bwd_kernel_chunk[(rows * chunks,)](
            *launch.tensors, dout, *norm, state, halves, prefix, entering, *grads, dweight,
            rows, *sizes, launch.gate_factor, scale, *strides, **constants,
            LEVELS=_CHUNK.bit_length() - 1, MILD=_MILD[q.dtype], KEYS=part == "keys",
            **({"maxnreg": _VALUE_REGISTERS} if registers else {}),
        )  # fmt: skip
    return dweight
