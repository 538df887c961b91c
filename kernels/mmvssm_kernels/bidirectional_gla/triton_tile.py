"""Building blocks of the kernels: tiles of a chunk, sums of log-decays, what one direction does with a chunk.

A chunk has T tokens (rows). Log-decays are in units of log 2. The ``key`` sum of a token is that of the gates behind it
in the direction's order, to the end of the chunk; its ``query`` sum is that from the chunk's start to the token's own.
Sums are products with triangular matrices of ones: nothing is subtracted, and a strong gate does not swallow its
neighbours.

A pair of tokens decays by exp2(key sum of the earlier - key sum of the later token). In a chunk whose gates are mild
the two factors are formed alone: the one is at most 1, the other at most 2^MILD. Any other chunk takes a slower path,
on which no exponent is ever positive: :func:`careful_outputs`.
"""

import triton
import triton.language as tl

from ..triton_scan import LOG2_E, softplus

# A chunk in which no state decays by more than this power of two: far from the ends of float32 and bfloat16.
MILD: tl.constexpr = tl.constexpr(80.0)
# Stronger decays are zero in float32 anyway, however often they occur.
STRONGEST: tl.constexpr = tl.constexpr(-256.0)


@triton.jit
def before(o_row, REVERSED: tl.constexpr):
    """Pairs (T, T) whose first token comes before the second in the direction's order."""
    return o_row[:, None] > o_row[None, :] if REVERSED else o_row[:, None] < o_row[None, :]


@triton.jit
def not_before(o_row, REVERSED: tl.constexpr):
    """Pairs (T, T) whose first token does not come before the second: what a query attends to."""
    return o_row[:, None] <= o_row[None, :] if REVERSED else o_row[:, None] >= o_row[None, :]


@triton.jit
def load_rows(p_chunk, o_row, m_row, stride, o_column, m_column):
    """Tile (T, columns) of one head and chunk, zero where masked."""
    return tl.load(
        p_chunk + o_row[:, None] * stride + o_column[None, :], mask=m_row[:, None] & m_column[None, :], other=0.0
    )


@triton.jit
def load_vector(p_vector, o_column, m_column):
    """Optional values (columns) in float32, zero if there are none."""
    if p_vector is None:
        return tl.zeros(o_column.shape, tl.float32)
    else:
        return tl.load(p_vector + o_column, mask=m_column, other=0.0).to(tl.float32)


@triton.jit
def load_log_decays(p_chunk, o_row, m_row, stride, o_key, m_key, gate_factor, LOGITS: tl.constexpr):
    """Log-decays (T, K) in units of log 2, zero where masked; from raw logits if LOGITS."""
    gate = load_rows(p_chunk, o_row, m_row, stride, o_key, m_key).to(tl.float32)
    if LOGITS:
        gate = tl.where(m_row[:, None], -softplus(-gate), 0.0)
    return tl.maximum(gate * (gate_factor * LOG2_E), STRONGEST)


@triton.jit
def load_upstream(
    p_dout, p_normed, p_rstd, weight, o_row, m_row, stride_dout, stride_normed, stride_rstd, o_value, m_value,
    V: tl.constexpr,
):  # fmt: skip
    """Gradient (T, V) of the sum of both directions before the norm, if any, and each token's gradient of its weight.

    Pointers are those of the chunk; in float32.
    """
    dout = load_rows(p_dout, o_row, m_row, stride_dout, o_value, m_value).to(tl.float32)
    if p_normed is None:
        return dout, dout
    else:
        normed = load_rows(p_normed, o_row, m_row, stride_normed, o_value, m_value).to(tl.float32)
        rstd = tl.load(p_rstd + o_row * stride_rstd, mask=m_row, other=0.0)
        dnormed = dout * weight[None, :]
        mean = tl.sum(dnormed * normed, axis=1) / V
        return rstd[:, None] * (dnormed - normed * mean[:, None]), dout * normed


@triton.jit
def operand(x, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """Computed float32 values as an operand of a product; tensor cores would cut TF32 off instead of rounding it."""
    if WIDE == tl.float32 and PRECISION == "tf32":  # noqa: SIM300 (a constexpr, but no constant)
        return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
    else:
        return x.to(WIDE)


@triton.jit
def wide_sums(x, chosen):
    """For each row the sum of the rows of ``x`` (T, K) that ``chosen`` (T, T) names.

    TF32 tensor cores add two terms of each value, 22 bits.
    """
    ones = tl.where(chosen, 1.0, 0.0)
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    total = tl.dot(ones, high, input_precision="tf32")
    return tl.dot(ones, x - high, total, input_precision="tf32")


@triton.jit
def sums(gate, chosen, DTYPE: tl.constexpr):
    """:func:`wide_sums` of log-decays; for 16-bit inputs two terms of 16 bits, which hold 16 bits (bfloat16) or 22."""
    if DTYPE == tl.float32:  # noqa: SIM300 (a constexpr, but no constant)
        return wide_sums(gate, chosen)
    else:
        ones = tl.where(chosen, 1.0, 0.0).to(DTYPE)
        high = gate.to(DTYPE)
        low = (gate - high.to(tl.float32)).to(DTYPE)
        return tl.dot(ones, low, tl.dot(ones, high))


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
def careful_outputs(
    state, q, k, v, gate, DTYPE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, REVERSED: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """Outputs (T, V) of a chunk for gates of any strength, key by key: every pair of tokens has its own exponent."""
    o_row = tl.arange(0, T)
    q, k = q.to(tl.float32), k.to(tl.float32)
    query_sum = sums(gate, not_before(o_row, REVERSED), DTYPE)
    matrix = tl.zeros((T, T), tl.float32)
    decay_sum = tl.zeros(q.shape, tl.float32)
    for i in range(T):
        j = i if REVERSED else T - 1 - i
        decay_sum = lengthen(decay_sum, gate, o_row, j, REVERSED)
        this = o_row == j
        decay = tl.exp2(decay_sum)
        weights = tl.sum(q * row_of(k, this)[None, :] * decay, axis=1)
        matrix = tl.where(this[None, :], weights[:, None], matrix)
    matrix = tl.where(not_before(o_row, REVERSED), matrix, 0.0)
    out = tl.dot(
        operand(q * tl.exp2(query_sum), WIDE, PRECISION), operand(state, WIDE, PRECISION), input_precision=PRECISION
    )
    return tl.dot(operand(matrix, WIDE, PRECISION), v.to(WIDE), out, input_precision=PRECISION)


@triton.jit
def mild_outputs(decayed, q, key, key_sum, v, WIDE: tl.constexpr, PRECISION: tl.constexpr, REVERSED: tl.constexpr):
    """Outputs (T, V) of a chunk whose gates are mild, from its decayed entering state and decayed keys."""
    o_row = tl.arange(0, q.shape[0])
    query = operand(q.to(tl.float32) * tl.exp2(-key_sum), WIDE, PRECISION)
    matrix = tl.dot(query, tl.trans(operand(key, WIDE, PRECISION)), input_precision=PRECISION)
    matrix = tl.where(not_before(o_row, REVERSED), matrix, 0.0)
    out = tl.dot(query, operand(decayed, WIDE, PRECISION), input_precision=PRECISION)
    return tl.dot(operand(matrix, WIDE, PRECISION), v.to(WIDE), out, input_precision=PRECISION)
