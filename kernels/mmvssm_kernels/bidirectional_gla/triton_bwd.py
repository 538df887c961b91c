"""Bidirectional gated linear attention, Triton backward pass.

As in the forward pass, a program owns a block of one head and meets all others by the states that enter it: the forward
direction's from the left, the backward direction's from the right, and their gradients from the other sides.

The gradient of a log-decay is the sum over all pairs of tokens that it stands between. With a query's share q dq and a
key's k dk of a direction, pairs within the block, and those with one token before it, are a sum of q dq - k dk from the
token to the block's end (forward direction), pairs with one token behind it a sum of k dk up to the token, and pairs
around the block are left: a product of the state and its gradient. All are made of the rounded operands of the
products, so that pairs a gate does not stand between cancel. A token's share in itself has no decay and is kept out.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..triton_scan import rounded, sigmoid
from .triton_launch import Launch, columns_adjacent
from .triton_states import bidirectional_gla_weight_kernel
from .triton_tile import (
    entering_state,
    lane_tile,
    load_gate_sums,
    load_log_decays,
    load_rows,
    next_blocks,
    operand,
    rows_of_tile,
    strong_gradients,
    tile_of_rows,
    unit_of,
)


@triton.jit
def _direction(
    dv, unit, q, k, p_q, p_k, v, do, scores, scores_of_keys, query_unit, key_unit, upstream_unit,
    p_gate, stride_gate, stride_q, stride_k, p_states, p_units, p_totals, stride, i_program, left, right,
    p_dgate, o_gate, gate_factor, scale, o_token, o_keys, m_tile, o_row, m_row, o_key, o_value,
    K: tl.constexpr, LOGITS: tl.constexpr, T: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr, SCANNED: tl.constexpr, STRONG: tl.constexpr,
    REVERSED: tl.constexpr,
):  # fmt: skip
    """Store the gradient of a direction's gates; gradients (PARTS, S, K) of q and k, and ``dv`` with what it adds.

    ``dv`` is in units of 2^(unit + key_unit), and everything also in those of upstream gradients. Queries and keys come
    in units. The unit that ``dv`` has then is the last result.
    """
    DTYPE: tl.constexpr = do.dtype
    sums, before, total = load_gate_sums(p_gate, o_token, o_keys, m_tile, stride_gate, gate_factor, LOGITS, REVERSED)
    # With strong gates operands are not moved, they only meet the states.
    half = tl.zeros((BLOCK_K,), tl.float32) if STRONG else 0.5 * total
    state, state_unit = entering_state(
        p_states, p_units, p_totals, i_program, right if REVERSED else left, half, o_key, o_value,
        BLOCK_K, BLOCK_V, SCANNED, DTYPE, PRECISION,
    )  # fmt: skip
    gradient, gradient_unit = entering_state(
        p_states + 2 * stride * (BLOCK_K * BLOCK_V), p_units + 2 * stride * BLOCK_K, p_totals, i_program,
        left if REVERSED else right, half - upstream_unit, o_key, o_value,
        BLOCK_K, BLOCK_V, SCANNED, DTYPE, PRECISION,
    )  # fmt: skip
    across = tl.exp2(state_unit + gradient_unit) * tl.sum(state.to(tl.float32) * gradient.to(tl.float32), axis=1)
    # Values' gradients take the largest unit of what is added to them, and keys those of the state's keys.
    new_unit = tl.maximum(tl.max(gradient_unit, axis=0), query_unit)
    ahead = sums + (before - half[None, :])[:, None, :]
    behind = (total - half)[None, :] - before
    behind = behind[:, None, :] - sums
    query_decay = tl.exp2(behind if REVERSED else ahead)
    key_decay = tl.exp2(ahead if REVERSED else behind)
    query = operand(q * query_decay, DTYPE, PRECISION)
    key = k * key_decay
    far_key = operand(key * tl.exp2(gradient_unit - new_unit)[None, None, :], DTYPE, PRECISION)
    key = operand(key, DTYPE, PRECISION)
    query_rows = rows_of_tile(query)
    key_rows = rows_of_tile(key)
    query_factor = tl.exp2(query_unit)
    key_factor = tl.exp2(key_unit)

    i, j = o_row[:, None], o_row[None, :]
    dq = tl.dot(do, tl.trans(state), input_precision=PRECISION)
    far_dk = tl.dot(v, tl.trans(gradient), input_precision=PRECISION)
    far_dk = tile_of_rows(far_dk, PARTS) * tl.exp2(gradient_unit)[None, None, :]
    dv = tl.dot(rows_of_tile(far_key), gradient, dv * tl.exp2(unit - new_unit), input_precision=PRECISION)
    if STRONG:
        across *= tl.exp2(total)
        m_key = o_key < K
        q_rows = load_rows(p_q, o_row, m_row, stride_q, o_key, m_key).to(tl.float32) * tl.exp2(-query_unit)
        k_rows = load_rows(p_k, o_row, m_row, stride_k, o_key, m_key).to(tl.float32) * tl.exp2(-key_unit)
        gate = load_log_decays(p_gate, o_row, m_row, stride_gate, o_key, m_key, gate_factor, LOGITS)
        near_dq, near_dk, matrix = strong_gradients(q_rows, k_rows, scores, gate, T, REVERSED)
        matrix = tl.trans(matrix)
        near_dq = tile_of_rows(near_dq, PARTS) * key_factor
        near_dk = tile_of_rows(near_dk, PARTS) * query_factor
        dq = tile_of_rows(dq, PARTS) * tl.exp2(state_unit)[None, None, :]
        terms = query_factor * (query.to(tl.float32) * dq + q * near_dq) - key_factor * (k * near_dk)
        dq = query_decay * dq + near_dq
        dk = key_decay * far_dk + near_dk
    else:
        others = i < j if REVERSED else i > j
        dq *= tl.exp2(state_unit - key_unit)[None, :]
        part = operand(tl.where(others, scores, 0.0), DTYPE, PRECISION)
        dq = tl.dot(part, key_rows, dq, input_precision=PRECISION)
        dq = tile_of_rows(dq, PARTS) * key_factor
        others = i > j if REVERSED else i < j
        part = operand(tl.where(others, scores_of_keys, 0.0), DTYPE, PRECISION)
        near_dk = tl.dot(part, query_rows, input_precision=PRECISION)
        near_dk = tile_of_rows(near_dk, PARTS) * query_factor
        terms = query.to(tl.float32) * (dq * query_factor) - key.to(tl.float32) * (near_dk * key_factor)
        dq *= query_decay
        dk = key_decay * (far_dk + near_dk)
        matrix = tl.dot(key_rows, tl.trans(query_rows), input_precision=PRECISION)
        matrix = tl.where(i >= j if REVERSED else i <= j, matrix, 0.0)
    matrix = operand(matrix * tl.exp2(query_unit - new_unit), DTYPE, PRECISION)
    dv = tl.dot(matrix, do, dv, input_precision=PRECISION)

    # Sums from one end as a sum from the other.
    far_terms = key.to(tl.float32) * (far_dk * key_factor)
    across += tl.sum(tl.sum(rounded(far_terms) if REVERSED else terms, axis=1), axis=0)
    terms -= far_terms
    part = tl.sum(terms, axis=1)
    before = tl.cumsum(part, axis=0) - part
    sums = tl.cumsum(terms, axis=1)
    if REVERSED:
        dgate = (across[None, :] + before)[:, None, :] + sums
    else:
        dgate = (across[None, :] - before)[:, None, :] - (sums - terms)
    dgate *= scale * gate_factor * tl.exp2(upstream_unit)
    if LOGITS:
        logits = tl.load(p_gate + o_token * stride_gate + o_keys, mask=m_tile, other=0.0).to(tl.float32)
        dgate *= sigmoid(-logits)
    tl.store(p_dgate + o_gate, dgate.to(p_dgate.dtype.element_ty), mask=m_tile)
    return dq, dk, dv, new_unit


@triton.jit
def _block_gradients(
    i_program, p_q, p_k, p_v, p_gf, p_gb, p_do, p_do_units, p_states, p_units, p_totals,
    p_dq, p_dk, p_dv, p_dgf, p_dgb, rows, heads, length, n_blocks, gate_factor, scale,
    stride_q_batch, stride_q, stride_q_head, stride_k_batch, stride_k, stride_k_head,
    stride_v_batch, stride_v, stride_v_head, stride_gf_batch, stride_gf, stride_gf_head,
    stride_gb_batch, stride_gb, stride_gb_head,
    K: tl.constexpr, V: tl.constexpr, LOGITS: tl.constexpr, T: tl.constexpr, PARTS: tl.constexpr, VEC: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr, SCANNED: tl.constexpr, STRONG: tl.constexpr,
):  # fmt: skip
    """All gradients of one block."""
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
    m_value = o_value < V
    o_token, o_keys, m_tile = lane_tile(n_tokens, T, PARTS, BLOCK_K, K, VEC)
    p_q += i_batch * stride_q_batch + i_head * stride_q_head + first * stride_q
    p_k += i_batch * stride_k_batch + i_head * stride_k_head + first * stride_k
    p_v += i_batch * stride_v_batch + i_head * stride_v_head + first * stride_v
    p_gf += i_batch * stride_gf_batch + i_head * stride_gf_head + first * stride_gf
    p_gb += i_batch * stride_gb_batch + i_head * stride_gb_head + first * stride_gb
    o_first = (i_batch * length + first) * heads + i_head
    stride = rows.to(tl.int64) * n_blocks
    v = load_rows(p_v, o_row, m_row, stride_v, o_value, m_value)
    do = tl.load(p_do + i_program * (T * BLOCK_V) + o_row[:, None] * BLOCK_V + o_value[None, :])
    upstream_unit = tl.load(p_do_units + i_program)
    q = tl.load(p_q + o_token * stride_q + o_keys, mask=m_tile, other=0.0).to(tl.float32)
    k = tl.load(p_k + o_token * stride_k + o_keys, mask=m_tile, other=0.0).to(tl.float32)
    query_unit = unit_of(q, DTYPE)
    key_unit = unit_of(k, DTYPE)
    q *= tl.exp2(-query_unit)
    k *= tl.exp2(-key_unit)
    scores = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    scores_of_keys = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    dv = tl.zeros((T, BLOCK_V), tl.float32)
    unit = query_unit
    p_dq += o_first * K
    p_dk += o_first * K
    p_dgf += o_first * K
    p_dgb += o_first * K
    o_gate = o_token * (heads * K) + o_keys
    left = i_block
    right = i_block - (n_blocks - 1)
    dq, dk, dv, unit = _direction(
        dv, unit, q, k, p_q, p_k, v, do, scores, scores_of_keys, query_unit, key_unit, upstream_unit,
        p_gf, stride_gf, stride_q, stride_k, p_states, p_units, p_totals, stride, i_program, left, right,
        p_dgf, o_gate, gate_factor, scale, o_token, o_keys, m_tile, o_row, m_row, o_key, o_value,
        K, LOGITS, T, PARTS, BLOCK_K, BLOCK_V, PRECISION, SCANNED, STRONG, False,
    )  # fmt: skip
    p_states += stride * (BLOCK_K * BLOCK_V)
    b_dq, b_dk, dv, unit = _direction(
        dv, unit, q, k, p_q, p_k, v, do, scores, scores_of_keys, query_unit, key_unit, upstream_unit,
        p_gb, stride_gb, stride_q, stride_k, p_states, p_units + stride * BLOCK_K, p_totals + stride * BLOCK_K, stride,
        i_program, left, right,
        p_dgb, o_gate, gate_factor, scale, o_token, o_keys, m_tile, o_row, m_row, o_key, o_value,
        K, LOGITS, T, PARTS, BLOCK_K, BLOCK_V, PRECISION, SCANNED, STRONG, True,
    )  # fmt: skip
    own = 2.0 * tl.sum(tl.where(o_row[:, None] == o_row[None, :], scores, 0.0), axis=1)
    own = tl.reshape(own, (PARTS, T // PARTS))[:, :, None]
    scale *= tl.exp2(upstream_unit)
    dq = (dq + b_dq + own * tl.exp2(key_unit) * k) * scale
    tl.store(p_dq + o_gate, dq.to(p_dq.dtype.element_ty), mask=m_tile)
    dk = (dk + b_dk + own * tl.exp2(query_unit) * q) * scale
    tl.store(p_dk + o_gate, dk.to(p_dk.dtype.element_ty), mask=m_tile)
    dv *= scale * tl.exp2(unit + key_unit)
    p_dv += o_first * V + o_row[:, None] * (heads * V) + o_value[None, :]
    tl.store(p_dv, dv.to(p_dv.dtype.element_ty), mask=m_row[:, None] & m_value[None, :])


@triton.jit(do_not_specialize=["length", "n_blocks", "rows"])
def bidirectional_gla_bwd_kernel(
    p_q, p_k, p_v, p_gf, p_gb, p_do, p_do_units, p_states, p_units, p_totals, p_strong,
    p_dq, p_dk, p_dv, p_dgf, p_dgb,
    rows, heads, length, n_blocks, gate_factor, scale,
    stride_q_batch, stride_q, stride_q_head, stride_k_batch, stride_k, stride_k_head,
    stride_v_batch, stride_v, stride_v_head, stride_gf_batch, stride_gf, stride_gf_head,
    stride_gb_batch, stride_gb, stride_gb_head,
    K: tl.constexpr, V: tl.constexpr, LOGITS: tl.constexpr, T: tl.constexpr, PARTS: tl.constexpr, VEC: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr, SCANNED: tl.constexpr, STRONG: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k, v and the gates, contiguous; launches as in the forward pass."""
    i_program = tl.program_id(0).to(tl.int64)
    if STRONG:
        n_all = rows.to(tl.int64) * n_blocks
        n_programs = tl.num_programs(0)
        while i_program < n_all:
            i_program, found = next_blocks(p_strong, i_program, n_all, n_programs)
            if found:
                _block_gradients(
                    i_program, p_q, p_k, p_v, p_gf, p_gb, p_do, p_do_units, p_states, p_units,
                    p_totals, p_dq, p_dk, p_dv, p_dgf, p_dgb, rows, heads, length, n_blocks, gate_factor, scale,
                    stride_q_batch, stride_q, stride_q_head, stride_k_batch, stride_k, stride_k_head,
                    stride_v_batch, stride_v, stride_v_head, stride_gf_batch, stride_gf, stride_gf_head,
                    stride_gb_batch, stride_gb, stride_gb_head,
                    K, V, LOGITS, T, PARTS, VEC, BLOCK_K, BLOCK_V, PRECISION, SCANNED, True,
                )  # fmt: skip
            i_program += n_programs
    elif tl.load(p_strong + i_program) == 0:
        _block_gradients(
            i_program, p_q, p_k, p_v, p_gf, p_gb, p_do, p_do_units, p_states, p_units,
            p_totals, p_dq, p_dk, p_dv, p_dgf, p_dgb, rows, heads, length, n_blocks, gate_factor, scale,
            stride_q_batch, stride_q, stride_q_head, stride_k_batch, stride_k, stride_k_head,
            stride_v_batch, stride_v, stride_v_head, stride_gf_batch, stride_gf, stride_gf_head,
            stride_gb_batch, stride_gb, stride_gb_head,
            K, V, LOGITS, T, PARTS, VEC, BLOCK_K, BLOCK_V, PRECISION, SCANNED, False,
        )  # fmt: skip


def bidirectional_gla_backward(
    dout, q, k, v, gf, gb, norm_weight, normed, rstd, scale, gate_normalizer
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, gf, gb and the norm's weight (empty without one)."""
    norm = () if norm_weight is None else (normed, rstd, norm_weight.contiguous())
    launch = Launch(q, k, v, gf, gb, gate_normalizer, upstream=(columns_adjacent(dout), *norm))
    grads = tuple(t.new_empty(t.shape) for t in (q, k, v, gf, gb))
    for strong in (False, True):
        bidirectional_gla_bwd_kernel[launch.grid(strong)](
            *launch.tensors, launch.do, launch.do_units, *launch.states, launch.totals, launch.strong, *grads,
            *launch.sizes, launch.gate_factor, scale, *launch.strides,
            **launch.constants, **launch.options("gradients", strong), SCANNED=launch.scanned, STRONG=strong,
        )  # fmt: skip
    if norm_weight is None:
        return *grads, q.new_empty(0)
    dweight = norm_weight.new_empty(norm_weight.shape)
    bidirectional_gla_weight_kernel[(len(dweight),)](launch.dweight, dweight, len(launch.dweight), num_warps=4)
    return *grads, dweight
