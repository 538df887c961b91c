"""States at the borders of blocks: what each block adds to them, and the scan over blocks.

Four states (K, V) travel through a sequence: the forward direction's (0) and the gradient of the backward direction's
(3) to the right, the backward direction's (1) and the gradient of the forward direction's (2) to the left. States of
16-bit inputs are kept in float16, with a power of two for each key.
"""

import triton
import triton.language as tl

from .triton_tile import (
    lane_tile,
    load_gate_sums,
    load_rows,
    load_upstream,
    load_vector,
    operand,
    rows_of_tile,
    unit_of,
)


@triton.jit
def _store_state(p_states, p_units, state, unit, o_key, o_value, BLOCK_V: tl.constexpr):
    """Store a state (K, V) that is in units of 2^unit."""
    DTYPE: tl.constexpr = p_states.dtype.element_ty
    own = unit_of(state, DTYPE)
    if DTYPE == tl.float16:  # noqa: SIM300 (a constexpr, but no constant)
        state *= tl.exp2(-own)
    tl.store(p_states + o_key[:, None] * BLOCK_V + o_value[None, :], state.to(DTYPE))
    tl.store(p_units + o_key, tl.zeros(o_key.shape, tl.float32) + (own + unit))


@triton.jit(do_not_specialize=["length", "n_blocks"])
def bidirectional_gla_states_kernel(
    p_q, p_k, p_v, p_gf, p_gb, p_dout, p_normed, p_rstd, p_weight,
    p_states, p_units, p_totals, p_strong, p_do, p_do_units, p_dweight,
    heads, length, n_blocks, gate_factor,
    stride_q_batch, stride_q, stride_q_head, stride_k_batch, stride_k, stride_k_head,
    stride_v_batch, stride_v, stride_v_head, stride_gf_batch, stride_gf, stride_gf_head,
    stride_gb_batch, stride_gb, stride_gb_head, stride_dout_batch, stride_dout, stride_dout_head,
    K: tl.constexpr, V: tl.constexpr, LOGITS: tl.constexpr, T: tl.constexpr, PARTS: tl.constexpr, VEC: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, MILD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a block adds to the states, its total log-decays (2, rows, blocks, K), and whether its gates are strong.

    With upstream gradients also the gradient before the norm (rows, blocks, T, V) and the exponents of its units.
    """
    DTYPE: tl.constexpr = p_k.dtype.element_ty
    SIZE: tl.constexpr = BLOCK_K * BLOCK_V
    i_program = tl.program_id(0).to(tl.int64)
    stride = tl.num_programs(0).to(tl.int64)
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
    p_k += i_batch * stride_k_batch + i_head * stride_k_head + first * stride_k
    p_v += i_batch * stride_v_batch + i_head * stride_v_head + first * stride_v
    p_gf += i_batch * stride_gf_batch + i_head * stride_gf_head + first * stride_gf
    p_gb += i_batch * stride_gb_batch + i_head * stride_gb_head + first * stride_gb
    p_states += i_program * SIZE
    p_units += i_program * BLOCK_K
    p_totals += i_program * BLOCK_K

    v = load_rows(p_v, o_row, m_row, stride_v, o_value, m_value)
    k = tl.load(p_k + o_token * stride_k + o_keys, mask=m_tile, other=0.0).to(tl.float32)
    f_sums, f_before, f_total = load_gate_sums(p_gf, o_token, o_keys, m_tile, stride_gf, gate_factor, LOGITS, False)
    b_sums, b_before, b_total = load_gate_sums(p_gb, o_token, o_keys, m_tile, stride_gb, gate_factor, LOGITS, True)
    tl.store(p_totals + o_key, f_total)
    tl.store(p_totals + stride * BLOCK_K + o_key, b_total)
    tl.store(p_strong + i_program, (tl.min(tl.minimum(f_total, b_total), axis=0) <= -2 * MILD).to(tl.int32))
    unit = unit_of(k, DTYPE)
    key = operand(k * tl.exp2((f_total[None, :] - unit - f_before)[:, None, :] - f_sums), DTYPE, PRECISION)
    state = tl.dot(tl.trans(rows_of_tile(key)), v, input_precision=PRECISION)
    _store_state(p_states, p_units, state, unit, o_key, o_value, BLOCK_V)
    key = operand(k * tl.exp2(b_sums + (b_before - unit)[:, None, :]), DTYPE, PRECISION)
    state = tl.dot(tl.trans(rows_of_tile(key)), v, input_precision=PRECISION)
    _store_state(p_states + stride * SIZE, p_units + stride * BLOCK_K, state, unit, o_key, o_value, BLOCK_V)
    if p_dout is not None:
        p_q += i_batch * stride_q_batch + i_head * stride_q_head + first * stride_q
        p_dout += i_batch * stride_dout_batch + i_head * stride_dout_head + first * stride_dout
        o_first = (i_batch * length + first) * heads + i_head
        do, token_dweight = load_upstream(
            p_dout, p_normed, p_rstd, load_vector(p_weight, o_value, m_value), o_first, o_row, m_row, stride_dout,
            heads, o_value, m_value, V,
        )  # fmt: skip
        if p_dweight is not None:
            tl.store(p_dweight + i_program * V + o_value, tl.sum(token_dweight, axis=0), mask=m_value)
        q = tl.load(p_q + o_token * stride_q + o_keys, mask=m_tile, other=0.0).to(tl.float32)
        upstream_unit = tl.full((), 0.0, tl.float32)
        if DTYPE == tl.float16:  # noqa: SIM300 (a constexpr, but no constant)
            # At most 2^-4, so that products with 64 values of up to 2^13 stay in the range of float16.
            upstream_unit = unit_of(do, DTYPE) + 5.0
            do *= tl.exp2(-upstream_unit)
        do = operand(do, DTYPE, PRECISION)
        p_do += i_program * (T * BLOCK_V)
        tl.store(p_do + o_row[:, None] * BLOCK_V + o_value[None, :], do)
        tl.store(p_do_units + i_program, upstream_unit)
        query_unit = unit_of(q, DTYPE)
        unit = query_unit + upstream_unit
        query = operand(q * tl.exp2(f_sums + (f_before - query_unit)[:, None, :]), DTYPE, PRECISION)
        state = tl.dot(tl.trans(rows_of_tile(query)), do, input_precision=PRECISION)
        p_states += 2 * stride * SIZE
        p_units += 2 * stride * BLOCK_K
        _store_state(p_states, p_units, state, unit, o_key, o_value, BLOCK_V)
        query = operand(q * tl.exp2((b_total[None, :] - query_unit - b_before)[:, None, :] - b_sums), DTYPE, PRECISION)
        state = tl.dot(tl.trans(rows_of_tile(query)), do, input_precision=PRECISION)
        _store_state(p_states + stride * SIZE, p_units + stride * BLOCK_K, state, unit, o_key, o_value, BLOCK_V)


@triton.jit
def _chain(decay_1, state_1, bound_1, decay_2, state_2, bound_2):
    return decay_1 * decay_2, decay_2 * state_1 + state_2, decay_2 * bound_1 + bound_2


@triton.jit
def _of_last(x, AXIS: tl.constexpr):
    """The last elements along an axis that one lane holds: what to take is known when the kernel is compiled."""
    SIZE: tl.constexpr = x.shape[AXIS]
    o_last = tl.arange(0, SIZE)
    o_last = o_last[None, None, :] if AXIS == 2 else o_last[None, :]
    return tl.sum(tl.where(o_last == SIZE - 1, x, 0.0), axis=AXIS)


@triton.jit
def _of_previous(x, PARTS: tl.constexpr):
    """Columns (V, PARTS) moved by one to the right, zero in the first."""
    o_part = tl.arange(0, PARTS)
    previous = o_part[None, :, None] == o_part[None, None, :] + 1
    return tl.sum(tl.where(previous, x[:, None, :], 0.0), axis=2)


@triton.jit(do_not_specialize=["n_blocks"])
def bidirectional_gla_scan_kernel(
    p_states, p_units, p_totals, p_entering, p_entering_units, n_blocks,
    PARTS: tl.constexpr, S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PART_V: tl.constexpr,
):  # fmt: skip
    """States (states, rows, blocks, K, V) that enter the blocks.

    A program scans PART_V values of one key of one state, PARTS S blocks at once. Lanes own values and warps parts, so
    that blocks of a part need no exchange between lanes; that is why the units of the results are made of a bound and
    not of their magnitude.
    """
    DTYPE: tl.constexpr = p_states.dtype.element_ty
    GROUP: tl.constexpr = PARTS * S
    SLICES: tl.constexpr = BLOCK_V // PART_V
    i_row = tl.program_id(0).to(tl.int64)
    n_rows = tl.num_programs(0)
    i_key = tl.program_id(1) // SLICES
    i_state = tl.program_id(2)
    i_first = (i_state * n_rows + i_row) * n_blocks
    # Values come first, and the hint keeps more neighbours from one lane.
    VEC: tl.constexpr = 2 if PART_V > 32 else 1
    o_value = tl.program_id(1) % SLICES * PART_V + tl.max_contiguous(tl.arange(0, PART_V), VEC)
    rightwards = (i_state == 0) | (i_state == 3)
    step = tl.where(rightwards, 1, -1)
    start = tl.where(rightwards, 0, n_blocks - 1)
    # All from the block where the state starts; both states of a direction decay alike.
    i_key += start * BLOCK_K
    p_units += i_first * BLOCK_K + i_key
    p_entering_units += i_first * BLOCK_K + i_key
    p_states += (i_first * BLOCK_K + i_key) * BLOCK_V
    p_entering += (i_first * BLOCK_K + i_key) * BLOCK_V
    p_totals += (i_state % 2 * n_rows + i_row) * n_blocks * BLOCK_K + i_key
    o_part = tl.arange(0, PARTS)[None, :, None]
    o_group = o_part * S + tl.arange(0, S)[None, None, :]
    carry = tl.zeros((PART_V, 1, 1), tl.float32)
    bound_carry = tl.zeros((PART_V, 1, 1), tl.float32)
    tl.store(p_entering + o_value, tl.zeros((PART_V,), DTYPE))
    tl.store(p_entering_units, 0.0)
    for i in range(0, n_blocks - 1, GROUP):
        m_block = i + o_group < n_blocks - 1
        o_block = step * BLOCK_K * (i + o_group)
        o_state = o_value[:, None, None] + o_block.to(tl.int64) * BLOCK_V
        state = tl.load(p_states + o_state, mask=m_block, other=0.0).to(tl.float32)
        decay = tl.exp2(tl.load(p_totals + o_block, mask=m_block, other=0.0))
        unit = tl.exp2(tl.load(p_units + o_block, mask=m_block, other=-127.0))
        state *= unit
        decay = tl.broadcast_to(decay, state.shape)
        bound = tl.broadcast_to(2.0 * unit, state.shape)
        state += tl.where(o_group == 0, decay * carry, 0.0)
        bound += tl.where(o_group == 0, decay * bound_carry, 0.0)
        decay, state, bound = tl.associative_scan((decay, state, bound), 2, _chain)
        part_decay = _of_last(decay, 2)
        part_state = _of_last(state, 2)
        part_bound = _of_last(bound, 2)
        if PARTS > 1:
            _, part_state, part_bound = tl.associative_scan((part_decay, part_state, part_bound), 1, _chain)
            state += decay * _of_previous(part_state, PARTS)[:, :, None]
            bound += decay * _of_previous(part_bound, PARTS)[:, :, None]
        carry = _of_last(part_state, 1)[:, None, None]
        bound_carry = _of_last(part_bound, 1)[:, None, None]
        if DTYPE == tl.float16:  # noqa: SIM300 (a constexpr, but no constant)
            own = (((bound.to(tl.int32, bitcast=True) >> 23) & 255) - 127).to(tl.float32)
            state *= tl.exp2(-own)
        else:
            own = tl.zeros(state.shape, tl.float32)
        tl.store(p_entering + o_state + step * (BLOCK_K * BLOCK_V), state.to(DTYPE), mask=m_block)
        tl.store(p_entering_units + o_block + step * BLOCK_K, tl.max(own, axis=0)[None, :, :], mask=m_block)


@triton.jit(do_not_specialize=["n_sums"])
def bidirectional_gla_weight_kernel(p_sums, p_dweight, n_sums):
    """The gradient of the norm's weight (V), from partial sums (n_sums, V); a program for each of its elements."""
    ROWS: tl.constexpr = 1024
    i_value = tl.program_id(0)
    n_values = tl.num_programs(0)
    total = tl.zeros((ROWS,), tl.float32)
    for i in range(0, n_sums, ROWS):
        o_sum = i + tl.arange(0, ROWS)
        total += tl.load(p_sums + o_sum.to(tl.int64) * n_values + i_value, mask=o_sum < n_sums, other=0.0)
    tl.store(p_dweight + i_value, tl.sum(total, axis=0).to(p_dweight.dtype.element_ty))
