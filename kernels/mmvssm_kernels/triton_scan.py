"""Building blocks of the scan kernels.

Tiles are (T tokens, N states, C channels). One warp lane owns a channel and keeps all tokens of its tile in registers,
so that a scan over tokens is a chain of multiply-adds without shuffles. For the compiler to choose that layout the
channel stride must not be known to be one: kernels receive it as a run-time number.

Row i of a tile is the i-th token in scan order whatever the direction, so states are always scanned downwards and their
gradients upwards. Numbers: ``rate`` is ``A log2(e)``, so that a decay is ``exp2(dt rate)``; everything is float32.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) as max(x, 0) + log1p(exp(-|x|)).

    log1p(e) / e on [0, 1] is a Chebyshev fit of degree 7 (relative error 3e-7), which keeps small step sizes accurate
    and needs no logarithm from the special-function unit.
    """
    e = tl.exp2(-tl.abs(x) * LOG2_E)
    series = 0.0433708499 - e * 0.00833649755
    series = -0.106677904 + e * series
    series = 0.176754933 + e * series
    series = -0.244704696 + e * series
    series = 0.332711867 + e * series
    series = -0.499971261 + e * series
    series = 0.999999775 + e * series
    return tl.maximum(x, 0.0) + e * series


@triton.jit
def _chain(decay_1, state_1, decay_2, state_2):
    return decay_1 * decay_2, decay_2 * state_1 + state_2


@triton.jit
def _scan_states(decay, value, carry, i_token):
    """States of a tile from decays and inputs (T, N, C), and the state that enters it (N, C)."""
    value = tl.where(i_token[:, None, None] == 0, value + decay * carry[None, :, :], value)
    _, state = tl.associative_scan((decay, value), 0, _chain)
    return state


@triton.jit
def _chain_with_inflow(decay_1, state_1, inflow_1, decay_2, state_2, inflow_2):
    return decay_1 * decay_2, decay_2 * state_1 + state_2, decay_2 * state_1 + inflow_2


@triton.jit
def _scan_states_and_inflow(decay, value, carry, i_token):
    """As :func:`_scan_states`, with the inflow ``decay[t] state[t - 1]`` of every token, without cancellation."""
    inflow = tl.where(i_token[:, None, None] == 0, decay * carry[None, :, :], 0.0)
    _, state, inflow = tl.associative_scan((decay, value + inflow, inflow), 0, _chain_with_inflow)
    return state, inflow


@triton.jit
def _chain_adjoint(decay_1, open_1, flow_1, grad_1, decay_2, open_2, flow_2, grad_2):
    return decay_1 * decay_2, decay_1 * open_2, decay_2 * flow_1 + flow_2, open_2 * flow_1 + grad_2


@triton.jit
def _scan_adjoint(decay, value, carry, i_token):
    """Gradients of the states, ``G[t] = value[t] + decay[t + 1] G[t + 1]``, and ``flow[t] = decay[t] G[t]``.

    ``carry`` (N, C) is the flow that enters at the last token, the first in the order of the adjoint scan.
    """
    grad = tl.where(i_token[:, None, None] == decay.shape[0] - 1, value + carry[None, :, :], value)
    ones = tl.full(decay.shape, 1.0, tl.float32)
    _, _, flow, grad = tl.associative_scan((decay, ones, decay * grad, grad), 0, _chain_adjoint, reverse=True)
    return grad, flow


@triton.jit
def _row(tile, i_token, ROW: tl.constexpr):
    """One token of a tile (T, N, C)."""
    return tl.sum(tl.where(i_token[:, None, None] == ROW, tile, 0.0), axis=0)


@triton.jit
def tile_states(dt, u, B, rate, state, i_token):
    """States of a tile, and the state that leaves it.

    ``dt`` and ``u`` are (T, C), ``B`` is (T, N), ``rate`` and the entering ``state`` are (N, C), ``i_token`` is (T).
    Tokens with a step size of zero change nothing.
    """
    decay = tl.exp2(dt[:, None, :] * rate[None, :, :])
    states = _scan_states(decay, (dt * u)[:, None, :] * B[:, :, None], state, i_token)
    return states, _row(states, i_token, dt.shape[0] - 1)


@triton.jit
def tile_adjoint(dt, C, dy, rate, flow, i_token):
    """Gradients (T, N, C) of the states of a tile, and the flow that leaves it towards the tokens before it."""
    decay = tl.exp2(dt[:, None, :] * rate[None, :, :])
    grad, flows = _scan_adjoint(decay, dy[:, None, :] * C[:, :, None], flow, i_token)
    return grad, _row(flows, i_token, 0)


@triton.jit
def tile_gradients(dt, u, B, dy, rate, state, grad, i_token):
    """Gradients that a tile contributes, from the state that enters it and the gradients of its states.

    Returns:
        states (T, N, C); dA (N, C); dB, dC (T, N), sums over this tile's channels; ddt (T, C); and the gradient of
        ``dt u`` (T, C), of which ``ddt`` already has its share.
    """
    decay = tl.exp2(dt[:, None, :] * rate[None, :, :])
    states, inflow = _scan_states_and_inflow(decay, (dt * u)[:, None, :] * B[:, :, None], state, i_token)
    inflow *= grad
    dA = tl.sum(dt[:, None, :] * inflow, axis=0)
    dB = tl.sum(grad * (dt * u)[:, None, :], axis=2)
    dC = tl.sum(states * dy[:, None, :], axis=2)
    dinput = tl.sum(grad * B[:, :, None], axis=1)
    ddt = u * dinput + LN_2 * tl.sum(inflow * rate[None, :, :], axis=1)
    return states, dA, dB, dC, ddt, dinput


@triton.jit
def carry_in(
    p_state,
    p_step,
    rate,
    i_segment,
    n_segments,
    o_state,
    m_state,
    o_channel,
    m_channel,
    stride_state,
    stride_step,
    ascending,
):
    """State (N, C) that reaches segment ``i_segment`` from the segments before it (after it, if not ``ascending``).

    Every segment left the state it reaches from zero, ``p_state``, and the sum of its step sizes, ``p_step``.
    """
    state = tl.zeros(rate.shape, tl.float32)
    n_others = tl.where(ascending, i_segment, n_segments - 1 - i_segment)
    for i in range(n_others):
        i_other = tl.where(ascending, i, n_segments - 1 - i)
        steps = tl.load(p_step + i_other * stride_step + o_channel, mask=m_channel, other=0.0)
        local = tl.load(p_state + i_other * stride_state + o_state, mask=m_state, other=0.0)
        state = local + tl.exp2(steps[None, :] * rate) * state
    return state


@triton.jit
def softplus_slope(dt):
    """Derivative of softplus in terms of its value, 1 - exp(-dt), without cancellation for small step sizes."""
    series = dt * (1.0 - dt * (0.5 - dt * (0.1666666667 - dt * 0.0416666667)))
    return tl.where(dt < 0.03, series, 1.0 - tl.exp2(-dt * LOG2_E))
