"""Building blocks of the scan kernels.

Tiles are (T tokens, N states, C channels). One warp lane owns a channel and keeps all tokens of its tile in registers, so
that a scan over tokens is a chain of multiply-adds without shuffles. For the compiler to choose that layout the channel
stride must not be known to be one: kernels receive it as a run-time number.

Numbers: ``rate`` is ``A log2(e)`` and step sizes are kept as ``v = dt log2(e)``, so that a decay is ``exp2(v A)``
(softplus and decay then share base two); everything is float32.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), linear above 20; below, the series of log1p keeps small step sizes accurate."""
    e = tl.exp2(tl.minimum(x, 20.0) * LOG2_E)
    series = e * (1.0 - e * (0.5 - e * (0.3333333333 - e * (0.25 - e * 0.2))))
    return tl.where(x > 20.0, x, tl.where(e < 0.0625, series, tl.log2(1.0 + e) * LN_2))


@triton.jit
def _chain(decay_1, state_1, decay_2, state_2):
    return decay_1 * decay_2, decay_2 * state_1 + state_2


@triton.jit
def scan_states(decay, value, carry, i_token, EDGE: tl.constexpr, REVERSE: tl.constexpr):
    """States of a tile from decays and inputs (T, N, C), and the state that enters it (N, C); EDGE is its first token."""
    value = tl.where(i_token[:, None, None] == EDGE, value + decay * carry[None, :, :], value)
    _, state = tl.associative_scan((decay, value), 0, _chain, reverse=REVERSE)
    return state


@triton.jit
def _chain_with_inflow(decay_1, state_1, inflow_1, decay_2, state_2, inflow_2):
    return decay_1 * decay_2, decay_2 * state_1 + state_2, decay_2 * state_1 + inflow_2


@triton.jit
def scan_states_and_inflow(decay, value, carry, i_token, EDGE: tl.constexpr, REVERSE: tl.constexpr):
    """As :func:`scan_states`, with what flows in from the token before, ``decay[t] state[t - 1]``, without cancellation."""
    inflow = tl.where(i_token[:, None, None] == EDGE, decay * carry[None, :, :], 0.0)
    _, state, inflow = tl.associative_scan((decay, value + inflow, inflow), 0, _chain_with_inflow, reverse=REVERSE)
    return state, inflow


@triton.jit
def _chain_adjoint(decay_1, open_1, flow_1, grad_1, decay_2, open_2, flow_2, grad_2):
    return decay_1 * decay_2, decay_1 * open_2, decay_2 * flow_1 + flow_2, open_2 * flow_1 + grad_2


@triton.jit
def scan_adjoint(decay, value, carry, i_token, EDGE: tl.constexpr, REVERSE: tl.constexpr):
    """Gradients of the states, ``G[t] = value[t] + decay[t + 1] G[t + 1]``, and ``flow[t] = decay[t] G[t]``.

    ``carry`` (N, C) is the flow that enters at token EDGE, the first in the order of the adjoint scan.
    """
    grad = tl.where(i_token[:, None, None] == EDGE, value + carry[None, :, :], value)
    ones = tl.full(decay.shape, 1.0, tl.float32)
    _, _, flow, grad = tl.associative_scan((decay, ones, decay * grad, grad), 0, _chain_adjoint, reverse=REVERSE)
    return grad, flow


@triton.jit
def _row(tile, i_token, EDGE: tl.constexpr):
    """Token EDGE of a tile (T, N, C)."""
    return tl.sum(tl.where(i_token[:, None, None] == EDGE, tile, 0.0), axis=0)


@triton.jit
def tile_states(dt, u, B, rate, state, i_token, FIRST: tl.constexpr, LAST: tl.constexpr, REVERSE: tl.constexpr):
    """States of a tile, and the state that leaves it.

    ``dt`` and ``u`` are (T, C), ``B`` is (T, N), ``rate`` and the entering ``state`` are (N, C). FIRST and LAST are the first
    and the last token of the tile in scan order. Tokens with a step size of zero change nothing.
    """
    decay = tl.exp2(dt[:, None, :] * rate[None, :, :])
    states = scan_states(decay, (dt * u)[:, None, :] * B[:, :, None], state, i_token, FIRST, REVERSE)
    return states, _row(states, i_token, LAST)


@triton.jit
def tile_adjoint(dt, C, dy, rate, flow, i_token, FIRST: tl.constexpr, LAST: tl.constexpr, REVERSE: tl.constexpr):
    """Gradients (T, N, C) of the states of a tile, and the flow that leaves it towards the tokens before it."""
    decay = tl.exp2(dt[:, None, :] * rate[None, :, :])
    grad, flows = scan_adjoint(decay, dy[:, None, :] * C[:, :, None], flow, i_token, LAST, not REVERSE)
    return grad, _row(flows, i_token, FIRST)


@triton.jit
def tile_gradients(dt, u, B, dy, rate, state, grad, i_token, FIRST: tl.constexpr, REVERSE: tl.constexpr):
    """Gradients that a tile contributes, from the state that enters it and the gradients of its states.

    Returns:
        states (T, N, C); dA (N, C); dB, dC (T, N), sums over this tile's channels; ddt (T, C); and the gradient of
        ``dt u`` (T, C), of which ``ddt`` already has its share.
    """
    decay = tl.exp2(dt[:, None, :] * rate[None, :, :])
    states, inflow = scan_states_and_inflow(decay, (dt * u)[:, None, :] * B[:, :, None], state, i_token, FIRST, REVERSE)
    inflow *= grad
    dA = tl.sum(dt[:, None, :] * inflow, axis=0)
    dB = tl.sum(grad * (dt * u)[:, None, :], axis=2)
    dC = tl.sum(states * dy[:, None, :], axis=2)
    dinput = tl.sum(grad * B[:, :, None], axis=1)
    ddt = u * dinput + LN_2 * tl.sum(inflow * rate[None, :, :], axis=1)
    return states, dA, dB, dC, ddt, dinput


@triton.jit
def carry_in(p_state, p_step, rate, i_segment, n_segments, o_state, m_state, o_channel, m_channel, stride_state, stride_step,
             SEGMENTS: tl.constexpr, BEFORE: tl.constexpr):
    """State (N, C) that reaches segment ``i_segment`` from the segments before it (after it, if not BEFORE).

    Every segment left the state it reaches from zero, ``p_state``, and the sum of its step sizes, ``p_step``; a decay over
    whole segments is one exponential of a sum, so nothing is multiplied up.
    """
    i_other = tl.arange(0, SEGMENTS)
    if BEFORE:
        m_other = i_other < i_segment
    else:
        m_other = (i_other > i_segment) & (i_other < n_segments)
    steps = tl.load(p_step + i_other[:, None] * stride_step + o_channel[None, :],
                    mask=m_other[:, None] & m_channel[None, :], other=0.0)  # (S, C)
    states = tl.load(p_state + i_other[:, None, None] * stride_state + o_state[None, :, :],
                     mask=m_other[:, None, None] & m_state[None, :, :], other=0.0)  # (S, N, C)
    # Step sizes of the segments that lie between the other segment and this one.
    between = tl.cumsum(steps, axis=0, reverse=BEFORE) - steps
    return tl.sum(states * tl.exp2(between[:, None, :] * rate[None, :, :]), axis=0)


@triton.jit
def softplus_slope(dt):
    """Derivative of softplus in terms of its value, 1 - exp(-dt), without cancellation for small step sizes."""
    series = dt * (1.0 - dt * (0.5 - dt * (0.1666666667 - dt * 0.0416666667)))
    return tl.where(dt < 0.03, series, 1.0 - tl.exp2(-dt * LOG2_E))
