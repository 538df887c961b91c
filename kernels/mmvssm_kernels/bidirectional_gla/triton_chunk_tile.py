"""Building blocks of the kernels whose programs own a chunk, for 16-bit inputs.

In a chunk whose gates are mild, the exponent of a token is the sum of the gates between it and the chunk's middle,
positive on the side where the direction starts: a pair of tokens decays by the query's power of two over the key's. All
products are of 16-bit operands. Those in float16 are brought into its range by a power of two for each tile, its unit.

The forward direction's gates are summed to the right, the backward direction's to the left; REVERSED names the latter.
"""

import triton
import triton.language as tl

# Powers of two by which queries and keys may grow on the way from a chunk's middle, so that float16 holds them.
ROOM: tl.constexpr = tl.constexpr(12)


@triton.jit
def unit_of(top, DTYPE: tl.constexpr, SPARE: tl.constexpr):
    """For float16 a power of two that divides ``top`` to about 2^(15 - SPARE), and its inverse; else 1."""
    if DTYPE == tl.float16:  # noqa: SIM300 (a constexpr, but no constant)
        exponent = ((top.to(tl.int32, bitcast=True) >> 23) & 255) + (SPARE - 14)
        exponent = tl.minimum(tl.maximum(exponent, 67), 187)
        unit = (exponent << 23).to(tl.float32, bitcast=True)
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        return unit, inverse
    else:
        return 1.0, 1.0


@triton.jit
def normalised(x, DTYPE: tl.constexpr, SPARE: tl.constexpr):
    """``x`` in float32 and in a unit that leaves room for a factor of 2^SPARE, and that unit."""
    x = x.to(tl.float32)
    if DTYPE == tl.float16:  # noqa: SIM300 (a constexpr, but no constant)
        unit, inverse = unit_of(tl.max(tl.abs(x)), DTYPE, SPARE)
        return x * inverse, unit
    else:
        return x, 1.0


@triton.jit
def gate_sums(gate, signs):
    """For each row the sum of the rows of log-decays (T, K) that ``signs`` (rows, T) names.

    Log-decays are rounded to float16, 11 bits: another gate, as good as one made of 16-bit inputs, since all sums are
    made of the same numbers.
    """
    return tl.dot(signs.to(tl.float16), gate.to(tl.float16))


@triton.jit
def running_sums(terms, o_row, DTYPE: tl.constexpr, REVERSED: tl.constexpr):
    """Sums (T, K) of the terms of the tokens before each token, behind it if REVERSED, of two 16-bit parts of each."""
    i, t = o_row[:, None], o_row[None, :]
    terms, unit = normalised(terms, DTYPE, 2)
    signs = tl.where(t > i if REVERSED else t < i, 1.0, 0.0).to(DTYPE)
    high = terms.to(DTYPE)
    low = (terms - high.to(tl.float32)).to(DTYPE)
    return unit * tl.dot(signs, low, tl.dot(signs, high))


@triton.jit
def half_sums(gate, o_row):
    """Sums (K) of log-decays over a chunk's left and right half."""
    HALF: tl.constexpr = gate.shape[0] // 2
    o_half = tl.arange(0, 16)
    halves = gate_sums(gate, tl.where(o_row[None, :] // HALF == o_half[:, None], 1.0, 0.0))
    left = tl.sum(tl.where(o_half[:, None] == 0, halves, 0.0), axis=0)
    right = tl.sum(tl.where(o_half[:, None] == 1, halves, 0.0), axis=0)
    return left, right


@triton.jit
def exponents(gate, o_row, REVERSED: tl.constexpr):
    """Sums (T, K) of log-decays from the chunk's middle to each token, negative behind it, positive before it."""
    HALF: tl.constexpr = gate.shape[0] // 2
    i, t = o_row[:, None], o_row[None, :]
    if REVERSED:
        signs = tl.where((t < HALF) & (t >= i), 1.0, 0.0) - tl.where((t >= HALF) & (t < i), 1.0, 0.0)
    else:
        signs = tl.where((t >= HALF) & (t <= i), 1.0, 0.0) - tl.where((t < HALF) & (t > i), 1.0, 0.0)
    return gate_sums(gate, signs)


@triton.jit
def level_of(o_row, level):
    """For a level: its pairs (T, T), rows of second halves (T, 1), and the middle of each row's block (T, 1)."""
    half = 1 << level
    distance = o_row[:, None] ^ o_row[None, :]
    pairs = (distance >= half) & (distance < 2 * half)
    second = (o_row[:, None] & half) != 0
    middle = (o_row[:, None] & -(2 * half)) + half
    return pairs, second, middle


@triton.jit
def level_exponents(gf, gb, o_row, second, middle):
    """Log-decays (T, K) of queries and keys to the middle of their blocks: gf from the left, gb from the right.

    Tokens of second halves are queries of the forward and keys of the backward direction, those of first halves the
    reverse. No exponent is positive, however strong the gates.
    """
    i, t = o_row[:, None], o_row[None, :]
    query = gate_sums(gf, tl.where(second & (t >= middle) & (t <= i), 1.0, 0.0))
    query += gate_sums(gb, tl.where((i < middle) & (t < middle) & (t >= i), 1.0, 0.0))
    key = gate_sums(gf, tl.where((i < middle) & (t < middle) & (t > i), 1.0, 0.0))
    key += gate_sums(gb, tl.where(second & (t >= middle) & (t < i), 1.0, 0.0))
    return query, key
