"""Building blocks of the kernels: tiles of a block of tokens, sums of gates, units, and pairs with strong gates.

A block has T tokens (rows). Log-decays are in units of log 2. With x the sums of the gates from a block's start,

    forward direction     query[i] = q[i] 2^(x[i] + half)     key[j] = k[j] 2^(-x[j] - half)     x with i's own gate
    backward direction    query[i] = q[i] 2^(-x[i] - half)    key[j] = k[j] 2^(x[j] + half)      x without i's own gate

and ``half`` (K) minus half the block's total, so that no factor of a block with mild gates is above 2^MILD.

What is computed for every token and key is computed in tiles (PARTS, S, K), in which a lane owns VEC neighbouring keys
and S consecutive tokens: sums over tokens need no other lane then, but for one value of each part.
"""

import triton
import triton.language as tl

from ..triton_scan import LOG2_E, rounded, softplus

# Stronger decays are zero in float32 anyway.
STRONGEST: tl.constexpr = tl.constexpr(-160.0)


@triton.jit
def load_rows(p_block, o_row, m_row, stride, o_column, m_column):
    """Tile (T, columns) of one head and block, zero where masked."""
    return tl.load(
        p_block + o_row[:, None] * stride + o_column[None, :], mask=m_row[:, None] & m_column[None, :], other=0.0
    )


@triton.jit
def load_vector(p_vector, o_column, m_column):
    """Optional values (columns) in float32, zero if there are none."""
    if p_vector is None:
        return tl.zeros(o_column.shape, tl.float32)
    else:
        return tl.load(p_vector + o_column, mask=m_column, other=0.0).to(tl.float32)


@triton.jit
def lane_tile(
    n_tokens, T: tl.constexpr, PARTS: tl.constexpr, BLOCK_K: tl.constexpr, K: tl.constexpr, VEC: tl.constexpr
):
    """Tokens (PARTS, S, 1) and keys (1, 1, K) of a tile, and which of its elements exist, of ``n_tokens`` tokens."""
    S: tl.constexpr = T // PARTS
    o_token = S * tl.arange(0, PARTS)[:, None, None] + tl.arange(0, S)[None, :, None]
    # The hint keeps more neighbouring keys from one lane.
    o_key = tl.max_contiguous(tl.arange(0, BLOCK_K), VEC)[None, None, :]
    return o_token, o_key, (o_token < n_tokens) & (o_key < K)


@triton.jit
def rows_of_tile(x):
    """A tile (PARTS, S, K) as rows (T, K), operands of products."""
    return tl.reshape(x, (x.shape[0] * x.shape[1], x.shape[2]))


@triton.jit
def tile_of_rows(x, PARTS: tl.constexpr):
    """The inverse of :func:`rows_of_tile`."""
    return tl.reshape(x, (PARTS, x.shape[0] // PARTS, x.shape[1]))


@triton.jit
def log_decay(gate, gate_factor, LOGITS: tl.constexpr, SHORT: tl.constexpr):
    """Log-decays in units of log 2, from raw logits if LOGITS."""
    gate = softplus(-gate, SHORT) * (-gate_factor * LOG2_E) if LOGITS else gate * LOG2_E
    return tl.maximum(gate, STRONGEST)


@triton.jit
def load_log_decays(p_block, o_row, m_row, stride, o_key, m_key, gate_factor, LOGITS: tl.constexpr):
    """Log-decays (T, K) in units of log 2, zero where masked; from raw logits if LOGITS."""
    # A logit of 1e4 is a decay of 1.
    gate = tl.load(
        p_block + o_row[:, None] * stride + o_key[None, :],
        mask=m_row[:, None] & m_key[None, :],
        other=10000.0 if LOGITS else 0.0,
    )
    return log_decay(gate.to(tl.float32), gate_factor, LOGITS, False)


@triton.jit
def load_gate_sums(p_block, o_token, o_key, m_tile, stride, gate_factor, LOGITS: tl.constexpr, EXCLUSIVE: tl.constexpr):
    """Sums of the log-decays from a block's start, with a token's own unless EXCLUSIVE, and the total (K).

    In two parts, because more is added to them: from the start of a part (PARTS, S, K) and up to there (PARTS, K).
    """
    gate = tl.load(p_block + o_token * stride + o_key, mask=m_tile, other=10000.0 if LOGITS else 0.0)
    SHORT: tl.constexpr = gate.dtype != tl.float32
    gate = log_decay(gate.to(tl.float32), gate_factor, LOGITS, SHORT)
    sums = tl.cumsum(gate, axis=1)
    # The last of a part: which one it is, is known when the kernel is compiled.
    o_last = tl.arange(0, gate.shape[1])[None, :, None]
    part = tl.sum(tl.where(o_last == gate.shape[1] - 1, sums, 0.0), axis=1)
    before = tl.cumsum(part, axis=0) - part
    if EXCLUSIVE:
        sums -= gate
    return sums, before, tl.sum(part, axis=0)


@triton.jit
def load_upstream(
    p_dout, p_normed, p_rstd, weight, o_first, o_row, m_row, stride_dout, heads, o_value, m_value, V: tl.constexpr
):
    """Gradient (T, V) of the sum of both directions before the norm, if any, and each token's gradient of its weight.

    ``p_dout`` is that of the block; the others are ours, (B, L, heads, V) and (B, L, heads), contiguous, with the
    block's first token at ``o_first``. In float32.
    """
    dout = load_rows(p_dout, o_row, m_row, stride_dout, o_value, m_value).to(tl.float32)
    if p_normed is None:
        return dout, dout
    else:
        normed = load_rows(p_normed + o_first * V, o_row, m_row, heads * V, o_value, m_value).to(tl.float32)
        rstd = tl.load(p_rstd + o_first + o_row * heads, mask=m_row, other=0.0)
        dnormed = dout * weight[None, :]
        mean = tl.sum(dnormed * normed, axis=1) / V
        return rstd[:, None] * (dnormed - normed * mean[:, None]), dout * normed


@triton.jit
def unit_of(x, DTYPE: tl.constexpr):
    """For float16 the exponent of the largest magnitude in ``x``, by which a tile is scaled into range; else 0."""
    if DTYPE == tl.float16:  # noqa: SIM300 (a constexpr, but no constant)
        top = tl.max(tl.abs(x.to(tl.float32)))
        exponent = ((top.to(tl.int32, bitcast=True) >> 23) & 255) - 127
        return tl.maximum(exponent, -60).to(tl.float32)
    else:
        return tl.full((), 0.0, tl.float32)


@triton.jit
def entering_state(
    p_states, p_units, p_totals, i_program, way, exponent, o_key, o_value,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, SCANNED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """2^exponent (K) times the state (K, V) that enters a block, as an operand and the exponents (K) of its units.

    Without SCANNED the states are what a block adds, and this one has ``abs(way)`` to its left, or right if negative.
    """
    o_state = o_key[:, None] * BLOCK_V + o_value[None, :]
    if SCANNED:
        unit = tl.load(p_units + i_program * BLOCK_K + o_key)
        return tl.load(p_states + i_program * (BLOCK_K * BLOCK_V) + o_state).to(DTYPE), exponent + unit
    else:
        step = tl.where(way < 0, 1, -1)
        state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
        for i in range(tl.abs(way)):
            i_other = i_program + step * (i + 1)
            unit = tl.load(p_units + i_other * BLOCK_K + o_key)
            added = tl.load(p_states + i_other * (BLOCK_K * BLOCK_V) + o_state).to(tl.float32)
            state += tl.exp2(exponent + unit)[:, None] * added
            exponent += tl.load(p_totals + i_other * BLOCK_K + o_key)
        unit = unit_of(state, DTYPE)
        if DTYPE == tl.float16:  # noqa: SIM300 (a constexpr, but no constant)
            state *= tl.exp2(-unit)
        return operand(state, DTYPE, PRECISION), tl.zeros((BLOCK_K,), tl.float32) + unit


@triton.jit
def next_blocks(p_strong, i_program, n_all, n_programs):
    """The first of a program's blocks from ``i_program`` on whose gates are strong, and whether there is one.

    Looks at 64 of its blocks, the last one looked at is returned if there is none.
    """
    MANY: tl.constexpr = 64
    o_next = tl.arange(0, MANY)
    i_next = i_program + o_next * n_programs.to(tl.int64)
    strong = tl.load(p_strong + i_next, mask=i_next < n_all, other=0) != 0
    ahead = tl.min(tl.where(strong, o_next, MANY), axis=0)
    return i_program + tl.minimum(ahead, MANY - 1).to(tl.int64) * n_programs, ahead < MANY


@triton.jit
def operand(x, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Computed float32 values as an operand of a product; tensor cores would cut TF32 off instead of rounding it."""
    if DTYPE == tl.float32 and PRECISION == "tf32":  # noqa: SIM300 (a constexpr, but no constant)
        return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def not_before(o_row, REVERSED: tl.constexpr):
    """Pairs (T, T) whose first token does not come before the second: what a query attends to."""
    return o_row[:, None] <= o_row[None, :] if REVERSED else o_row[:, None] >= o_row[None, :]


@triton.jit
def row_of(x, this):
    """The row (columns) of ``x`` (T, columns) that ``this`` (T) marks."""
    return tl.sum(tl.where(this[:, None], x, 0.0), axis=0)


@triton.jit
def lengthen(decay_sum, gate, o_row, j, REVERSED: tl.constexpr):
    """Sums (T, K) of the gates behind token ``j``, from those behind the token that follows it."""
    if REVERSED:
        return tl.where((o_row < j)[:, None], decay_sum + row_of(gate, o_row == j - 1)[None, :], 0.0)
    else:
        return tl.where((o_row > j)[:, None], decay_sum + row_of(gate, o_row == j + 1)[None, :], 0.0)


@triton.jit
def strong_matrix(q, k, gate, T: tl.constexpr, REVERSED: tl.constexpr):
    """Weights (T, T) of the pairs in a block for gates of any strength: every pair has its own exponent."""
    o_row = tl.arange(0, T)
    matrix = tl.zeros((T, T), tl.float32)
    decay_sum = tl.zeros(q.shape, tl.float32)
    for i in range(T):
        j = i if REVERSED else T - 1 - i
        decay_sum = lengthen(decay_sum, gate, o_row, j, REVERSED)
        this = o_row == j
        weights = tl.sum(rounded(q * row_of(k, this)[None, :] * tl.exp2(decay_sum)), axis=1)
        matrix = tl.where(this[None, :], weights[:, None], matrix)
    return tl.where(not_before(o_row, REVERSED), matrix, 0.0)


@triton.jit
def strong_gradients(q, k, scores, gate, T: tl.constexpr, REVERSED: tl.constexpr):
    """Gradients of q and k (T, K) by way of :func:`strong_matrix`, without a token's share in itself, and that matrix.

    ``scores`` (T, T) is the gradient of the matrix.
    """
    o_row = tl.arange(0, T)
    keep = not_before(o_row, REVERSED)
    others = tl.where(keep & (o_row[:, None] != o_row[None, :]), scores, 0.0)
    matrix = tl.zeros((T, T), tl.float32)
    decay_sum = tl.zeros(q.shape, tl.float32)
    dq = tl.zeros(q.shape, tl.float32)
    dk = tl.zeros(q.shape, tl.float32)
    for i in range(T):
        j = i if REVERSED else T - 1 - i
        decay_sum = lengthen(decay_sum, gate, o_row, j, REVERSED)
        this = o_row == j
        key = row_of(k, this)[None, :]
        decay = tl.exp2(decay_sum)
        matrix = tl.where(this[None, :], tl.sum(rounded(q * key * decay), axis=1)[:, None], matrix)
        decay *= tl.sum(tl.where(this[None, :], others, 0.0), axis=1)[:, None]
        dq += decay * key
        dk += tl.where(this[:, None], tl.sum(decay * q, axis=0)[None, :], 0.0)
    return dq, dk, tl.where(keep, matrix, 0.0)
