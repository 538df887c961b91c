"""Bidirectional gated linear attention, Triton backward pass.

As in the forward pass, programs own a block of one head and meet all other blocks of its chunk: one as the block that
queries, for the gradient of q, another as the one that is queried, for those of k and v. To a block's left are keys of
the forward and queries of the backward direction. Rows of all products are the block's own tokens.

The gradient of a log-decay is the sum over all pairs of tokens that it stands between: sums of q dq - k dk from a token
to the end of its chunk, and the pairs across that end. These are made of the operands of the products, so that pairs a
gate does not stand between cancel, and no sum is longer than a chunk. A token's share in itself has no decay and is
kept out of them. The launch of ``triton_gates.py`` makes the sums.
"""

import triton
import triton.language as tl
from torch import Tensor

from .triton_fwd import largest_unit
from .triton_gates import COLUMNS, bidirectional_gla_gates_kernel
from .triton_launch import Launch, columns_adjacent
from .triton_tile import (
    half_of,
    load_log_decays,
    load_rows,
    operand,
    other_launch,
    state_operand,
    store_weights,
    strong_gradients,
)


@triton.jit
def store_terms(p_terms, p_sums, o_keys, o_key, terms):
    """Store q dq or k dk (T, K) of a direction, and its sum."""
    tl.store(p_terms + o_keys, terms)
    tl.store(p_sums + o_key, tl.sum(terms, axis=0))


@triton.jit
def state_product(rows, right_rows, p_state, o_key, o_value, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr):
    """Both halves of rows (T, V) times a state (K, V): (T, K)."""
    DTYPE: tl.constexpr = rows.dtype
    p_state += o_key[:, None] * BLOCK_V + o_value[None, :]
    state, unit = state_operand(tl.load(p_state), DTYPE, PRECISION)
    product = tl.exp2(unit) * tl.dot(rows, tl.trans(state), input_precision=PRECISION)
    if o_value.shape[0] < BLOCK_V:
        state, unit = state_operand(tl.load(p_state + o_value.shape[0]), DTYPE, PRECISION)
        product += tl.exp2(unit) * tl.dot(right_rows, tl.trans(state), input_precision=PRECISION)
    return product


@triton.jit
def query_gradients(
    do, right_do, p_q, p_k, p_v, p_gf, p_gb, p_decayed, stride_decayed, p_exponents, stride_exponent, p_units,
    stride_units, p_state, stride_state, p_decay, p_weights, p_dq, p_terms, p_sums,
    stride_q, stride_k, stride_v, stride_gf, stride_gb, f_half, b_half, upstream_unit, here, n_here, i_block, length,
    o_row, m_row, o_key, m_key, o_value, gate_factor, scale,
    V: tl.constexpr, LOGITS: tl.constexpr, T: tl.constexpr, MOST: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, HALF_V: tl.constexpr, PRECISION: tl.constexpr, STRONG: tl.constexpr,
):  # fmt: skip
    """Gradient of q, and q dq of both directions: the block's tokens as those that query.

    Pointers are those of the block; ``p_dq`` is a tile. Gradients of decayed queries are in units of 2^upstream_unit.
    """
    DTYPE: tl.constexpr = do.dtype
    p_first = p_exponents - here * BLOCK_K
    to_left, to_right = store_weights(
        p_weights, p_first, p_first + 3 * stride_exponent, stride_exponent, f_half, b_half, 0.0, here, n_here, o_key,
        1, MOST,
    )  # fmt: skip
    o_keys = o_row[:, None] * BLOCK_K + o_key[None, :]
    f_dq = tl.zeros((T, BLOCK_K), tl.float32)
    b_dq = tl.zeros((T, BLOCK_K), tl.float32)
    if p_state is not None:
        f_dq = state_product(do, right_do, p_state, o_key, o_value, BLOCK_V, PRECISION)
        f_dq *= tl.exp2(to_left)[None, :]
        b_dq = state_product(do, right_do, p_state + stride_state, o_key, o_value, BLOCK_V, PRECISION)
        b_dq *= tl.exp2(to_right)[None, :]
    tl.debug_barrier()
    for i in range(n_here - 1):
        is_left = i < here
        offset = tl.where(is_left, i, i + 1) - here
        weight = tl.load(p_weights + (here + offset) * BLOCK_K + o_key)
        p_keys = p_decayed + tl.where(is_left, stride_decayed, 3 * stride_decayed) + offset * (T * BLOCK_K)
        key = tl.load(p_keys + o_keys)
        m_far = o_row < length - (i_block + offset) * T
        p_far_v = p_v + offset * T * stride_v
        v = load_rows(p_far_v, o_row, m_far, stride_v, o_value, o_value < V)
        scores = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if HALF_V < BLOCK_V:
            v = load_rows(p_far_v + HALF_V, o_row, m_far, stride_v, o_value, o_value < V - HALF_V)
            scores = tl.dot(right_do, tl.trans(v), scores, input_precision=PRECISION)
        dq = tl.dot(operand(scores, DTYPE, PRECISION), key, input_precision=PRECISION)
        f_dq += tl.where(is_left, weight, 0.0)[None, :] * dq
        b_dq += tl.where(is_left, 0.0, weight)[None, :] * dq

    i, j = o_row[:, None], o_row[None, :]
    scores = tl.dot(
        do, tl.trans(load_rows(p_v, o_row, m_row, stride_v, o_value, o_value < V)), input_precision=PRECISION
    )
    if HALF_V < BLOCK_V:
        v = load_rows(p_v + HALF_V, o_row, m_row, stride_v, o_value, o_value < V - HALF_V)
        scores = tl.dot(right_do, tl.trans(v), scores, input_precision=PRECISION)
    own = 2.0 * tl.sum(tl.where(i == j, scores, 0.0), axis=1)[:, None]
    k = load_rows(p_k, o_row, m_row, stride_k, o_key, m_key).to(tl.float32)
    query_factor = tl.exp2(tl.load(p_units + stride_units))  # with upstream gradients
    m_keys = m_row[:, None] & m_key[None, :]
    scale *= tl.exp2(upstream_unit)
    if not STRONG:
        key_factor = tl.exp2(tl.load(p_units))
        part = operand(tl.where(i > j, scores, 0.0), DTYPE, PRECISION)
        f_key = tl.load(p_decayed + stride_decayed + o_keys)
        f_dq += key_factor * tl.dot(part, f_key, input_precision=PRECISION)
        part = operand(tl.where(i < j, scores, 0.0), DTYPE, PRECISION)
        b_key = tl.load(p_decayed + 3 * stride_decayed + o_keys)
        b_dq += key_factor * tl.dot(part, b_key, input_precision=PRECISION)
        query = tl.load(p_decayed + o_keys).to(tl.float32) * query_factor
        store_terms(p_terms, p_sums, o_keys, o_key, query * f_dq)
        query = tl.load(p_decayed + 2 * stride_decayed + o_keys).to(tl.float32) * query_factor
        store_terms(p_terms + stride_decayed, p_sums + 3 * stride_exponent, o_keys, o_key, query * b_dq)
        f_decay = tl.load(p_decay + o_keys).to(tl.float32)
        b_decay = tl.load(p_decay + stride_decayed + o_keys).to(tl.float32)
        dq = (f_decay * f_dq + b_decay * b_dq + own * k) * scale
        tl.store(p_dq, dq.to(p_dq.dtype.element_ty), mask=m_keys)
    else:
        q = load_rows(p_q, o_row, m_row, stride_q, o_key, m_key).to(tl.float32)
        gate = load_log_decays(p_gf, o_row, m_row, stride_gf, o_key, m_key, gate_factor, LOGITS)
        near, _, _ = strong_gradients(q, k, scores, gate, T, False)
        query = tl.load(p_decayed + o_keys).to(tl.float32) * query_factor
        terms = query * f_dq + tl.exp2(upstream_unit) * q * near
        store_terms(p_terms, p_sums, o_keys, o_key, terms)
        dq = near + tl.exp2(tl.cumsum(gate, axis=0) + f_half[None, :]) * f_dq + own * k
        gate = load_log_decays(p_gb, o_row, m_row, stride_gb, o_key, m_key, gate_factor, LOGITS)
        near, _, _ = strong_gradients(q, k, scores, gate, T, True)
        query = tl.load(p_decayed + 2 * stride_decayed + o_keys).to(tl.float32) * query_factor
        terms = query * b_dq + tl.exp2(upstream_unit) * q * near
        store_terms(p_terms + stride_decayed, p_sums + 3 * stride_exponent, o_keys, o_key, terms)
        dq += near + tl.exp2(tl.cumsum(gate, axis=0, reverse=True) + b_half[None, :]) * b_dq
        tl.store(p_dq, (dq * scale).to(p_dq.dtype.element_ty), mask=m_keys)


@triton.jit
def store_values(
    matrix, do, right_do, dv, right_dv, scale, p_dv, m_row, o_value,
    V: tl.constexpr, BLOCK_V: tl.constexpr, HALF_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the weights (T, T) of a block's own tokens give and store the gradient of v."""
    dv = tl.dot(matrix, do, dv, input_precision=PRECISION) * scale
    tl.store(p_dv, dv.to(p_dv.dtype.element_ty), mask=m_row[:, None] & (o_value < V)[None, :])
    if HALF_V < BLOCK_V:
        dv = tl.dot(matrix, right_do, right_dv, input_precision=PRECISION) * scale
        m_values = m_row[:, None] & (o_value < V - HALF_V)[None, :]
        tl.store(p_dv + HALF_V, dv.to(p_dv.dtype.element_ty), mask=m_values)


@triton.jit
def add_state_values(
    dv, right_dv, key, weight, p_state, unit, o_key, o_value, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr
):
    """Add to both halves of the gradient of v, in units of 2^unit, what decayed keys get from a state's gradient."""
    DTYPE: tl.constexpr = key.dtype
    p_state += o_key[:, None] * BLOCK_V + o_value[None, :]
    decayed = operand(key.to(tl.float32) * weight[None, :], DTYPE, PRECISION)
    state, state_unit = state_operand(tl.load(p_state), DTYPE, PRECISION)
    dv += tl.exp2(state_unit - unit) * tl.dot(decayed, state, input_precision=PRECISION)
    if o_value.shape[0] < BLOCK_V:
        state, state_unit = state_operand(tl.load(p_state + o_value.shape[0]), DTYPE, PRECISION)
        right_dv += tl.exp2(state_unit - unit) * tl.dot(decayed, state, input_precision=PRECISION)
    return dv, right_dv


@triton.jit
def across_chunk(p_state, p_gradient, p_total, n_here, o_key, MOST: tl.constexpr, BLOCK_V: tl.constexpr):
    """The gates' share (K) in pairs of tokens to both sides of a chunk."""
    o_block = tl.arange(0, MOST)[:, None]
    total = tl.load(p_total + o_block * o_key.shape[0] + o_key[None, :], mask=o_block < n_here, other=0.0)
    o_state = o_key[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    pairs = tl.load(p_state + o_state) * tl.load(p_gradient + o_state)
    return tl.exp2(tl.sum(total, axis=0)) * tl.sum(pairs, axis=1)


@triton.jit
def key_gradients(
    do, right_do, p_q, p_k, p_v, p_gf, p_gb, p_decayed, stride_decayed, p_exponents, stride_exponent, p_units,
    stride_units, p_state, stride_state, p_decay, p_do, p_weights, p_dk, p_dv, p_terms, p_sums,
    stride_q, stride_k, stride_v, stride_gf, stride_gb, f_half, b_half, upstream_unit, here, n_here, i_block, length,
    o_row, m_row, o_key, m_key, o_value, gate_factor, scale,
    V: tl.constexpr, LOGITS: tl.constexpr, T: tl.constexpr, MOST: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, HALF_V: tl.constexpr, PRECISION: tl.constexpr, STRONG: tl.constexpr,
):  # fmt: skip
    """Gradients of k and v, k dk of both directions and what of it is across the chunk's end: tokens that are queried.

    As :func:`query_gradients`; gradients of decayed keys and of values are in units of 2^unit.
    """
    DTYPE: tl.constexpr = do.dtype
    unit = largest_unit(p_units + stride_units - here, n_here, DTYPE, MOST)
    p_first = p_exponents - here * BLOCK_K
    to_left, to_right = store_weights(
        p_weights, p_first + 3 * stride_exponent, p_first, stride_exponent, b_half, f_half, unit, here, n_here, o_key,
        2, MOST,
    )  # fmt: skip
    o_keys = o_row[:, None] * BLOCK_K + o_key[None, :]
    o_values = o_row[:, None] * BLOCK_V + o_value[None, :]
    key_unit = tl.load(p_units)
    v = load_rows(p_v, o_row, m_row, stride_v, o_value, o_value < V)
    right_v = v
    if HALF_V < BLOCK_V:
        right_v = load_rows(p_v + HALF_V, o_row, m_row, stride_v, o_value, o_value < V - HALF_V)
    f_key = tl.load(p_decayed + stride_decayed + o_keys)
    b_key = tl.load(p_decayed + 3 * stride_decayed + o_keys)
    f_dk = tl.zeros((T, BLOCK_K), tl.float32)
    b_dk = tl.zeros((T, BLOCK_K), tl.float32)
    dv = tl.zeros((T, HALF_V), tl.float32)
    right_dv = tl.zeros((T, HALF_V), tl.float32)
    if p_state is not None:
        p_f_gradient = p_state + 2 * stride_state
        p_b_gradient = p_state + 3 * stride_state
        f_dk = state_product(v, right_v, p_f_gradient, o_key, o_value, BLOCK_V, PRECISION)
        f_dk *= tl.exp2(to_right - unit)[None, :]
        b_dk = state_product(v, right_v, p_b_gradient, o_key, o_value, BLOCK_V, PRECISION)
        b_dk *= tl.exp2(to_left - unit)[None, :]
        dv, right_dv = add_state_values(
            dv, right_dv, f_key, tl.exp2(to_right), p_f_gradient, unit, o_key, o_value, BLOCK_V, PRECISION
        )
        dv, right_dv = add_state_values(
            dv, right_dv, b_key, tl.exp2(to_left), p_b_gradient, unit, o_key, o_value, BLOCK_V, PRECISION
        )
        f_across = tl.exp2(key_unit + unit) * tl.sum(f_key.to(tl.float32) * f_dk, axis=0)
        b_across = tl.exp2(key_unit + unit) * tl.sum(b_key.to(tl.float32) * b_dk, axis=0)
        if here == 0:
            f_across += across_chunk(p_state, p_f_gradient, p_first, n_here, o_key, MOST, BLOCK_V)
            p_state += stride_state
            p_first += 3 * stride_exponent
            b_across += across_chunk(p_state, p_b_gradient, p_first, n_here, o_key, MOST, BLOCK_V)
        tl.store(p_sums + 2 * stride_exponent + o_key, f_across)
        tl.store(p_sums + 5 * stride_exponent + o_key, b_across)
    tl.debug_barrier()
    for i in range(n_here - 1):
        is_left = i < here
        offset = tl.where(is_left, i, i + 1) - here
        weight = tl.load(p_weights + (here + offset) * BLOCK_K + o_key)
        p_queries = p_decayed + tl.where(is_left, 2 * stride_decayed, 0) + offset * (T * BLOCK_K)
        query = tl.load(p_queries + o_keys)
        p_far_do = p_do + offset * (T * BLOCK_V) + o_values
        far_do = tl.load(p_far_do)
        scores = tl.dot(v, tl.trans(far_do), input_precision=PRECISION)
        if HALF_V < BLOCK_V:
            far_right_do = tl.load(p_far_do + HALF_V)
            scores = tl.dot(right_v, tl.trans(far_right_do), scores, input_precision=PRECISION)
        dk = tl.dot(operand(scores, DTYPE, PRECISION), query, input_precision=PRECISION)
        f_dk += tl.where(is_left, 0.0, weight)[None, :] * dk
        b_dk += tl.where(is_left, weight, 0.0)[None, :] * dk
        decayed = tl.where(is_left, b_key, f_key).to(tl.float32) * weight[None, :]
        decayed = operand(decayed, DTYPE, PRECISION)
        matrix = operand(tl.dot(decayed, tl.trans(query), input_precision=PRECISION), DTYPE, PRECISION)
        dv = tl.dot(matrix, far_do, dv, input_precision=PRECISION)
        if HALF_V < BLOCK_V:
            right_dv = tl.dot(matrix, far_right_do, right_dv, input_precision=PRECISION)

    i, j = o_row[:, None], o_row[None, :]
    q = load_rows(p_q, o_row, m_row, stride_q, o_key, m_key).to(tl.float32)
    m_keys = m_row[:, None] & m_key[None, :]
    # Of the block's own queries and upstream gradients.
    own_unit = tl.load(p_units + stride_units)
    key_factor = tl.exp2(key_unit + unit)
    if not STRONG:
        scores = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        if HALF_V < BLOCK_V:
            scores = tl.dot(right_v, tl.trans(right_do), scores, input_precision=PRECISION)
        own = 2.0 * tl.exp2(upstream_unit - unit) * tl.sum(tl.where(i == j, scores, 0.0), axis=1)[:, None]
        factor = tl.exp2(own_unit - unit)
        part = operand(tl.where(j > i, scores, 0.0), DTYPE, PRECISION)
        f_query = tl.load(p_decayed + o_keys)
        f_dk += factor * tl.dot(part, f_query, input_precision=PRECISION)
        part = operand(tl.where(j < i, scores, 0.0), DTYPE, PRECISION)
        b_query = tl.load(p_decayed + 2 * stride_decayed + o_keys)
        b_dk += factor * tl.dot(part, b_query, input_precision=PRECISION)
        store_terms(p_terms, p_sums + stride_exponent, o_keys, o_key, key_factor * f_key.to(tl.float32) * f_dk)
        store_terms(
            p_terms + stride_decayed, p_sums + 4 * stride_exponent, o_keys, o_key,
            key_factor * b_key.to(tl.float32) * b_dk,
        )  # fmt: skip
        # 1 / decay, without a division.
        f_decay = tl.rsqrt(tl.load(p_decay + o_keys).to(tl.float32))
        b_decay = tl.rsqrt(tl.load(p_decay + stride_decayed + o_keys).to(tl.float32))
        dk = (f_decay * f_decay * f_dk + b_decay * b_decay * b_dk + own * q) * (scale * tl.exp2(unit))
        tl.store(p_dk, dk.to(p_dk.dtype.element_ty), mask=m_keys)
        matrix = tl.where(j >= i, tl.dot(f_key, tl.trans(f_query), input_precision=PRECISION), 0.0)
        matrix += tl.where(j <= i, tl.dot(b_key, tl.trans(b_query), input_precision=PRECISION), 0.0)
        store_values(
            operand(matrix * factor, DTYPE, PRECISION), do, right_do, dv, right_dv, scale * key_factor,
            p_dv, m_row, o_value, V, BLOCK_V, HALF_V, PRECISION,
        )  # fmt: skip
    else:
        k = load_rows(p_k, o_row, m_row, stride_k, o_key, m_key).to(tl.float32)
        scores = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if HALF_V < BLOCK_V:
            scores = tl.dot(right_do, tl.trans(right_v), scores, input_precision=PRECISION)
        scores *= tl.exp2(upstream_unit)
        own = 2.0 * tl.sum(tl.where(i == j, scores, 0.0), axis=1)[:, None]
        f_dk *= tl.exp2(unit)
        b_dk *= tl.exp2(unit)
        gate = load_log_decays(p_gf, o_row, m_row, stride_gf, o_key, m_key, gate_factor, LOGITS)
        _, near, matrix = strong_gradients(q, k, scores, gate, T, False)
        terms = tl.exp2(key_unit) * f_key.to(tl.float32) * f_dk + k * near
        store_terms(p_terms, p_sums + stride_exponent, o_keys, o_key, terms)
        dk = near + tl.exp2(tl.cumsum(gate, axis=0, reverse=True) - gate + f_half[None, :]) * f_dk + own * q
        gate = load_log_decays(p_gb, o_row, m_row, stride_gb, o_key, m_key, gate_factor, LOGITS)
        _, near, b_matrix = strong_gradients(q, k, scores, gate, T, True)
        terms = tl.exp2(key_unit) * b_key.to(tl.float32) * b_dk + k * near
        store_terms(p_terms + stride_decayed, p_sums + 4 * stride_exponent, o_keys, o_key, terms)
        dk += near + tl.exp2(tl.cumsum(gate, axis=0) - gate + b_half[None, :]) * b_dk
        tl.store(p_dk, (dk * scale).to(p_dk.dtype.element_ty), mask=m_keys)
        matrix = tl.trans((matrix + b_matrix) * tl.exp2(upstream_unit - key_unit - unit))
        store_values(
            operand(matrix, DTYPE, PRECISION), do, right_do, dv, right_dv, scale * key_factor,
            p_dv, m_row, o_value, V, BLOCK_V, HALF_V, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["length", "n_blocks", "n_chunks", "rows"])
def bidirectional_gla_bwd_kernel(
    p_q, p_k, p_v, p_gf, p_gb, p_decayed, p_exponents, p_units, p_entering, p_decay, p_do, p_weights,
    p_dq, p_dk, p_dv, p_terms, p_sums,
    rows, heads, length, n_blocks, n_chunks, gate_factor, scale,
    stride_q_batch, stride_q, stride_q_head, stride_k_batch, stride_k, stride_k_head,
    stride_v_batch, stride_v, stride_v_head, stride_gf_batch, stride_gf, stride_gf_head,
    stride_gb_batch, stride_gb, stride_gb_head,
    K: tl.constexpr, V: tl.constexpr, LOGITS: tl.constexpr, T: tl.constexpr, MOST: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, MILD: tl.constexpr, PRECISION: tl.constexpr,
    STRONG: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k and v, contiguous, and what those of the gates are made of.

    These are q dq and k dk (2, 2, rows, blocks, T, K) of the forward and the backward direction, without decays, and
    for each direction their sums and what keys get across the chunk's end (2, 3, rows, blocks, K). A block has two
    programs, so that neither holds too much.
    """
    SIZE: tl.constexpr = BLOCK_K * BLOCK_V
    n_all = tl.cdiv(length, T)
    i_program = tl.program_id(0) // 2
    i_row = (i_program // n_all).to(tl.int64)
    i_block = i_program % n_all
    i_chunk = i_block // n_blocks
    i_first = i_chunk * n_blocks
    i_batch = i_row // heads
    i_head = i_row % heads
    o_row = tl.arange(0, T)
    o_key = tl.arange(0, BLOCK_K)
    # Halves of the values, as in the forward pass.
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
    f_half = half_of(tl.load(p_exponents + o_key), MILD)
    b_half = half_of(tl.load(p_exponents + 3 * stride_exponent + o_key), MILD)
    if other_launch(f_half, b_half, MILD, STRONG):
        return
    p_decay += slot * (T * BLOCK_K)
    p_do += slot * (T * BLOCK_V)
    p_terms += slot * (T * BLOCK_K)
    p_sums += slot * BLOCK_K
    p_units += slot
    p_weights += tl.program_id(0).to(tl.int64) * (MOST * BLOCK_K)
    p_q += i_batch * stride_q_batch + i_head * stride_q_head + first * stride_q
    p_k += i_batch * stride_k_batch + i_head * stride_k_head + first * stride_k
    p_v += i_batch * stride_v_batch + i_head * stride_v_head + first * stride_v
    p_gf += i_batch * stride_gf_batch + i_head * stride_gf_head + first * stride_gf
    p_gb += i_batch * stride_gb_batch + i_head * stride_gb_head + first * stride_gb
    if p_entering is not None:
        p_entering += (i_row * n_chunks + i_chunk) * SIZE
    stride_state = rows.to(tl.int64) * n_chunks * SIZE
    o_values = o_row[:, None] * BLOCK_V + o_value[None, :]
    do = tl.load(p_do + o_values)
    right_do = do
    if HALF_V < BLOCK_V:
        right_do = tl.load(p_do + HALF_V + o_values)
    upstream_unit = tl.load(p_units + 2 * stride)
    n_here = tl.minimum(n_blocks, n_all - i_first)
    here = i_block - i_first
    o_token = (i_batch * length + first) * heads + i_head + o_row.to(tl.int64) * heads
    o_tile = o_token[:, None] * K + o_key[None, :]
    if tl.program_id(0) % 2 == 0:
        query_gradients(
            do, right_do, p_q, p_k, p_v, p_gf, p_gb, p_decayed, stride_decayed, p_exponents, stride_exponent, p_units,
            stride, p_entering, stride_state, p_decay, p_weights, p_dq + o_tile, p_terms, p_sums,
            stride_q, stride_k, stride_v, stride_gf, stride_gb, f_half, b_half, upstream_unit, here, n_here, i_block,
            length, o_row, m_row, o_key, m_key, o_value, gate_factor, scale,
            V, LOGITS, T, MOST, BLOCK_K, BLOCK_V, HALF_V, PRECISION, STRONG,
        )  # fmt: skip
    else:
        key_gradients(
            do, right_do, p_q, p_k, p_v, p_gf, p_gb, p_decayed, stride_decayed, p_exponents, stride_exponent, p_units,
            stride, p_entering, stride_state, p_decay, p_do, p_weights, p_dk + o_tile,
            p_dv + o_token[:, None] * V + o_value[None, :], p_terms + 2 * stride_decayed, p_sums,
            stride_q, stride_k, stride_v, stride_gf, stride_gb, f_half, b_half, upstream_unit, here, n_here, i_block,
            length, o_row, m_row, o_key, m_key, o_value, gate_factor, scale,
            V, LOGITS, T, MOST, BLOCK_K, BLOCK_V, HALF_V, PRECISION, STRONG,
        )  # fmt: skip


def bidirectional_gla_backward(
    dout, q, k, v, gf, gb, norm_weight, normed, rstd, scale, gate_normalizer
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, gf, gb and the norm's weight (empty without one)."""
    norm = () if norm_weight is None else (normed, rstd, norm_weight.contiguous())
    launch = Launch(q, k, v, gf, gb, gate_normalizer, upstream=(columns_adjacent(dout), *norm))
    dq, dk, dv, dgf, dgb = (t.new_empty(t.shape) for t in (q, k, v, gf, gb))
    dweight = q.new_empty(0) if norm_weight is None else norm_weight.new_empty(norm_weight.shape)
    terms = launch.new(2, 2, *launch.decayed.shape[1:])
    sums = launch.new(2, 3, *launch.exponents.shape[2:])
    weights = launch.weights(2)
    for strong in (False, True):
        bidirectional_gla_bwd_kernel[(2 * launch.rows * launch.blocks,)](
            *launch.tensors, launch.decayed, launch.exponents, launch.units, launch.entering, launch.decay, launch.do,
            weights, dq, dk, dv, terms, sums,
            *launch.sizes, launch.gate_factor, scale, *launch.strides,
            **launch.constants, **launch.options("gradients"), STRONG=strong,
        )  # fmt: skip
    parts = 0 if norm_weight is None else triton.cdiv(launch.block_values, COLUMNS)
    names = ("K", "V", "LOGITS", "T", "MOST", "BLOCK_K")
    bidirectional_gla_gates_kernel[(parts + 2 * launch.rows * launch.blocks,)](
        *launch.tensors[3:], terms, sums, dgf, dgb, launch.dweight, dweight,
        *launch.sizes, parts, len(launch.dweight) if parts else 0, scale * launch.gate_factor, *launch.strides[9:],
        **{name: launch.constants[name] for name in names}, COLUMNS=COLUMNS, STATES=launch.entering is not None,
        num_warps=1,
    )  # fmt: skip
    return dq, dk, dv, dgf, dgb, dweight
