"""Gradients of the gates, from what the gradients of queries and keys leave, and the last sum of the norm's weight."""

import triton
import triton.language as tl

from ..triton_scan import sigmoid
from .triton_tile import load_rows

# Columns of the norm's weight that one program adds up: few, because the other programs are done soon.
COLUMNS = 2


@triton.jit(do_not_specialize=["length", "n_blocks", "n_chunks", "rows", "n_parts", "n_sums"])
def bidirectional_gla_gates_kernel(
    p_gf, p_gb, p_terms, p_sums, p_dgf, p_dgb, p_dweight, p_weight_gradient,
    rows, heads, length, n_blocks, n_chunks, n_parts, n_sums, factor,
    stride_gf_batch, stride_gf, stride_gf_head, stride_gb_batch, stride_gb, stride_gb_head,
    K: tl.constexpr, V: tl.constexpr, LOGITS: tl.constexpr, T: tl.constexpr, MOST: tl.constexpr,
    BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Gradients of the gates, contiguous, by programs that own a direction of a block.

    The first ``n_parts`` programs add up the ``n_sums`` partial gradients of the norm's weight, COLUMNS each.
    """
    if tl.program_id(0) < n_parts:
        if p_dweight is not None:
            ROWS: tl.constexpr = 2048 // COLUMNS
            o_value = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
            total = tl.zeros((ROWS, COLUMNS), tl.float32)
            for i in range(0, n_sums, ROWS):
                o_sum = i + tl.arange(0, ROWS)
                m_sum = (o_sum < n_sums)[:, None] & (o_value < V)[None, :]
                total += tl.load(p_dweight + o_sum[:, None].to(tl.int64) * V + o_value[None, :], mask=m_sum, other=0.0)
            total = tl.sum(total, axis=0)
            tl.store(p_weight_gradient + o_value, total.to(p_weight_gradient.dtype.element_ty), mask=o_value < V)
    else:
        i_program = tl.program_id(0) - n_parts
        n_all = tl.cdiv(length, T)
        backward = i_program % 2
        i_row = (i_program // 2 // n_all).to(tl.int64)
        i_block = i_program // 2 % n_all
        i_first = i_block // n_blocks * n_blocks
        i_batch = i_row // heads
        i_head = i_row % heads
        o_row = tl.arange(0, T)
        # Two keys to a lane: most tokens of a key are in one lane then, between which sums need no shuffles.
        o_key = tl.max_contiguous(tl.arange(0, BLOCK_K), 2)
        m_row = o_row < length - i_block * T
        m_key = o_key < K
        first = i_block.to(tl.int64) * T
        slot = i_row * n_chunks * n_blocks
        stride = rows.to(tl.int64) * n_chunks * n_blocks
        o_terms = o_row[:, None] * BLOCK_K + o_key[None, :]
        o_terms += (backward * stride + slot + i_block) * (T * BLOCK_K)
        terms = tl.load(p_terms + o_terms) - tl.load(p_terms + 2 * stride * (T * BLOCK_K) + o_terms)
        # The blocks behind this one in the direction's order.
        o_block = tl.arange(0, MOST)
        m_behind = tl.where(backward == 1, o_block < i_block - i_first, o_block > i_block - i_first)
        m_block = o_block < tl.minimum(n_blocks, n_all - i_first)
        o_sums = (backward * 3 * stride + slot + i_first) * BLOCK_K + o_block[:, None] * BLOCK_K + o_key[None, :]
        m_behind = (m_behind & m_block)[:, None]
        sums = tl.load(p_sums + o_sums, mask=m_behind, other=0.0)
        sums -= tl.load(p_sums + stride * BLOCK_K + o_sums, mask=m_behind, other=0.0)
        if STATES:
            sums += tl.load(p_sums + 2 * stride * BLOCK_K + o_sums, mask=m_block[:, None], other=0.0)
        behind = tl.sum(sums, axis=0)
        o_token = (i_batch * length + first) * heads + i_head + o_row.to(tl.int64) * heads
        o_gate = o_token[:, None] * K + o_key[None, :]
        m_gate = m_row[:, None] & m_key[None, :]
        if backward == 0:
            dgate = (behind[None, :] + tl.cumsum(terms, axis=0, reverse=True)) * factor
            if LOGITS:
                p_gf += i_batch * stride_gf_batch + i_head * stride_gf_head + first * stride_gf
                dgate *= sigmoid(-load_rows(p_gf, o_row, m_row, stride_gf, o_key, m_key).to(tl.float32))
            tl.store(p_dgf + o_gate, dgate.to(p_dgf.dtype.element_ty), mask=m_gate)
        else:
            dgate = (behind[None, :] + tl.cumsum(terms, axis=0)) * factor
            if LOGITS:
                p_gb += i_batch * stride_gb_batch + i_head * stride_gb_head + first * stride_gb
                dgate *= sigmoid(-load_rows(p_gb, o_row, m_row, stride_gb, o_key, m_key).to(tl.float32))
            tl.store(p_dgb + o_gate, dgate.to(p_dgb.dtype.element_ty), mask=m_gate)
