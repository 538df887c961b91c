"""What the blocks of a sequence exchange: decayed queries and keys, log-decays, and states between chunks.

Four states (K, V) travel through a sequence: the forward direction's (0) and the gradient of the backward direction's
(3) to the right, the backward direction's (1) and the gradient of the forward direction's (2) to the left. What each
chunk adds to them is made beside its operands; then a short scan over the chunks makes the states that enter them.
"""

import triton
import triton.language as tl

from .triton_tile import half_of, load_log_decays, load_rows, load_upstream, load_vector, operand, unit_of


@triton.jit
def store_exponents(p_exponents, stride, o_key, total, half, key_unit, query_unit):
    """Total log-decay (K) of a block, and by which powers of two its keys and queries have to be taken."""
    tl.store(p_exponents + o_key, total)
    tl.store(p_exponents + stride + o_key, key_unit - half)
    tl.store(p_exponents + 2 * stride + o_key, query_unit - half)


@triton.jit(do_not_specialize=["length", "n_blocks"])
def bidirectional_gla_prepare_kernel(
    p_q, p_k, p_v, p_gf, p_gb, p_dout, p_normed, p_rstd, p_weight,
    p_decayed, p_exponents, p_units, p_decay, p_do, p_dweight, p_increment, p_total,
    heads, length, n_blocks, gate_factor,
    stride_q_batch, stride_q, stride_q_head, stride_k_batch, stride_k, stride_k_head,
    stride_v_batch, stride_v, stride_v_head, stride_gf_batch, stride_gf, stride_gf_head,
    stride_gb_batch, stride_gb, stride_gb_head, stride_dout_batch, stride_dout, stride_dout_head,
    K: tl.constexpr, V: tl.constexpr, LOGITS: tl.constexpr, T: tl.constexpr, MOST: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, MILD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Everything that ``Launch`` lists, for ``n_blocks`` blocks; increments and totals of a chunk where wanted."""
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    STATES: tl.constexpr = p_increment is not None
    GRADIENTS: tl.constexpr = p_dout is not None
    i_row = tl.program_id(0).to(tl.int64)
    i_batch = i_row // heads
    i_head = i_row % heads
    n_programs = tl.num_programs(1)
    i_first = tl.program_id(1) * n_blocks
    o_row = tl.arange(0, T)
    o_key = tl.arange(0, BLOCK_K)
    o_value = tl.arange(0, BLOCK_V)
    m_key = o_key < K
    m_value = o_value < V
    o_keys = o_row[:, None] * BLOCK_K + o_key[None, :]
    p_q += i_batch * stride_q_batch + i_head * stride_q_head
    p_k += i_batch * stride_k_batch + i_head * stride_k_head
    p_v += i_batch * stride_v_batch + i_head * stride_v_head
    p_gf += i_batch * stride_gf_batch + i_head * stride_gf_head
    p_gb += i_batch * stride_gb_batch + i_head * stride_gb_head
    stride = tl.num_programs(0).to(tl.int64) * n_programs * n_blocks  # blocks of all rows
    if GRADIENTS:
        weight = load_vector(p_weight, o_value, m_value)
        p_dout += i_batch * stride_dout_batch + i_head * stride_dout_head
        dweight = tl.zeros((BLOCK_V,), tl.float32)
    if STATES:
        f_total = tl.zeros((BLOCK_K,), tl.float32)
        b_total = tl.zeros((BLOCK_K,), tl.float32)
        f_state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
        b_state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
        if GRADIENTS:
            f_gradient = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
            b_gradient = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)

    for i in range(n_blocks):
        m_row = o_row < length - (i_first + i) * T
        first = ((i_first + i) * T).to(tl.int64)
        slot = i_row * n_programs * n_blocks + i_first + i
        q = load_rows(p_q + first * stride_q, o_row, m_row, stride_q, o_key, m_key).to(tl.float32)
        k = load_rows(p_k + first * stride_k, o_row, m_row, stride_k, o_key, m_key).to(tl.float32)
        query_unit = unit_of(q, DTYPE)
        key_unit = unit_of(k, DTYPE)
        if DTYPE == tl.float16:  # noqa: SIM300 (a constexpr, but no constant)
            q *= tl.exp2(-query_unit)
            k *= tl.exp2(-key_unit)
        tl.store(p_units + slot, key_unit)
        upstream_unit = 0.0
        if GRADIENTS:
            if p_normed is None:
                p_block_normed = None
                p_block_rstd = None
            else:  # these are ours, (B, L, heads, V) and (B, L, heads), contiguous
                o_token = (i_batch * length + first) * heads + i_head
                p_block_normed = p_normed + o_token * V
                p_block_rstd = p_rstd + o_token
            do, token_dweight = load_upstream(
                p_dout + first * stride_dout, p_block_normed, p_block_rstd, weight, o_row, m_row,
                stride_dout, heads * V, heads, o_value, m_value, V,
            )  # fmt: skip
            dweight += tl.sum(token_dweight, axis=0)
            # At most 2^-4, so that products with 64 values of up to 2^13 stay in the range of float16.
            if DTYPE == tl.float16:  # noqa: SIM300 (a constexpr, but no constant)
                upstream_unit = unit_of(do, DTYPE) + 5.0
                do *= tl.exp2(-upstream_unit)
            do = operand(do, DTYPE, PRECISION)
            tl.store(p_do + slot * (T * BLOCK_V) + o_row[:, None] * BLOCK_V + o_value[None, :], do)
            tl.store(p_units + 2 * stride + slot, upstream_unit)
        tl.store(p_units + stride + slot, query_unit + upstream_unit)

        p_block = p_decayed + slot * (T * BLOCK_K) + o_keys
        stride_decayed = stride * (T * BLOCK_K)
        p_exponent = p_exponents + slot * BLOCK_K
        stride_exponent = stride * BLOCK_K
        gf = load_log_decays(p_gf + first * stride_gf, o_row, m_row, stride_gf, o_key, m_key, gate_factor, LOGITS)
        total_f = tl.sum(gf, axis=0)
        half = half_of(total_f, MILD)
        store_exponents(p_exponent, stride_exponent, o_key, total_f, half, key_unit, query_unit + upstream_unit)
        to_query = tl.cumsum(gf, axis=0)
        to_key = (total_f + half)[None, :] - to_query
        query_decay = tl.exp2(to_query + half[None, :])
        query = operand(q * query_decay, DTYPE, PRECISION)
        key = operand(k * tl.exp2(to_key), DTYPE, PRECISION)
        tl.store(p_block, query)
        tl.store(p_block + stride_decayed, key)
        if GRADIENTS:
            p_block_decay = p_decay + slot * (T * BLOCK_K) + o_keys
            tl.store(p_block_decay, query_decay.to(p_decay.dtype.element_ty))
        if STATES:
            v = load_rows(p_v + first * stride_v, o_row, m_row, stride_v, o_value, m_value)
            added = tl.dot(tl.trans(key), v, input_precision=PRECISION)
            f_state = tl.exp2(total_f)[:, None] * f_state + tl.exp2(key_unit - half)[:, None] * added
            if GRADIENTS:
                added = tl.dot(tl.trans(query), do, input_precision=PRECISION)
                f_gradient += tl.exp2(f_total + (query_unit + upstream_unit - half))[:, None] * added
            f_total += total_f

        tl.debug_barrier()
        gb = load_log_decays(p_gb + first * stride_gb, o_row, m_row, stride_gb, o_key, m_key, gate_factor, LOGITS)
        total_b = tl.sum(gb, axis=0)
        half = half_of(total_b, MILD)
        p_exponent += 3 * stride_exponent
        store_exponents(p_exponent, stride_exponent, o_key, total_b, half, key_unit, query_unit + upstream_unit)
        to_key = tl.cumsum(gb, axis=0) - gb
        to_query = (total_b + half)[None, :] - to_key
        query_decay = tl.exp2(to_query)
        query = operand(q * query_decay, DTYPE, PRECISION)
        key = operand(k * tl.exp2(to_key + half[None, :]), DTYPE, PRECISION)
        tl.store(p_block + 2 * stride_decayed, query)
        tl.store(p_block + 3 * stride_decayed, key)
        if GRADIENTS:
            tl.store(p_block_decay + stride_decayed, query_decay.to(p_decay.dtype.element_ty))
        if STATES:
            added = tl.dot(tl.trans(key), v, input_precision=PRECISION)
            b_state += tl.exp2(b_total + (key_unit - half))[:, None] * added
            if GRADIENTS:
                added = tl.dot(tl.trans(query), do, input_precision=PRECISION)
                b_gradient = tl.exp2(total_b)[:, None] * b_gradient
                b_gradient += tl.exp2(query_unit + upstream_unit - half)[:, None] * added
            b_total += total_b

    i_program = i_row * n_programs + tl.program_id(1)
    if p_dweight is not None:
        tl.store(p_dweight + i_program * V + o_value, dweight, mask=m_value)
    if STATES:
        SIZE: tl.constexpr = BLOCK_K * BLOCK_V
        stride = tl.num_programs(0).to(tl.int64) * n_programs
        p_increment += i_program * SIZE + o_key[:, None] * BLOCK_V + o_value[None, :]
        tl.store(p_increment, f_state)
        tl.store(p_increment + stride * SIZE, b_state)
        if GRADIENTS:
            tl.store(p_increment + 2 * stride * SIZE, f_gradient)
            tl.store(p_increment + 3 * stride * SIZE, b_gradient)
        tl.store(p_total + i_program * BLOCK_K + o_key, f_total)
        tl.store(p_total + (stride + i_program) * BLOCK_K + o_key, b_total)


@triton.jit
def _chain(decay_1, state_1, decay_2, state_2):
    return decay_1 * decay_2, decay_2 * state_1 + state_2


@triton.jit(do_not_specialize=["n_chunks"])
def bidirectional_gla_scan_kernel(
    p_increment, p_total, p_entering, n_chunks,
    GROUP: tl.constexpr, BLOCK_K: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """States (states, rows, chunks, SIZE) that enter the chunks; a program scans BLOCK elements of one state."""
    i_state = tl.program_id(2)
    i_row = tl.program_id(0).to(tl.int64)
    n_rows = tl.num_programs(0)
    o_element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    p_increment += (i_state * n_rows + i_row) * n_chunks * SIZE
    p_entering += (i_state * n_rows + i_row) * n_chunks * SIZE
    # Both states of a direction decay alike.
    p_total += (i_state % 2 * n_rows + i_row) * n_chunks * BLOCK_K
    rightwards = (i_state == 0) | (i_state == 3)
    step = tl.where(rightwards, 1, -1)
    start = tl.where(rightwards, 0, n_chunks - 1)
    o_group = tl.arange(0, GROUP)
    carry = tl.zeros((BLOCK,), tl.float32)
    tl.store(p_entering + start.to(tl.int64) * SIZE + o_element, carry)
    for i in range(0, n_chunks - 1, GROUP):
        order = i + o_group
        m_chunk = order < n_chunks - 1
        chunk = (start + step * order).to(tl.int64)
        o_total = chunk[:, None] * BLOCK_K + o_element[None, :] // (SIZE // BLOCK_K)
        o_state = chunk[:, None] * SIZE + o_element[None, :]
        decay = tl.exp2(tl.load(p_total + o_total, mask=m_chunk[:, None], other=0.0))
        state = tl.load(p_increment + o_state, mask=m_chunk[:, None], other=0.0)
        state = tl.where(o_group[:, None] == 0, state + decay * carry[None, :], state)
        _, state = tl.associative_scan((decay, state), 0, _chain)
        tl.store(p_entering + o_state + step * SIZE, state, mask=m_chunk[:, None])
        carry = tl.sum(tl.where(o_group[:, None] == GROUP - 1, state, 0.0), axis=0)
