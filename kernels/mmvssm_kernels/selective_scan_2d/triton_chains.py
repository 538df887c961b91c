"""Scans inside a tile of the four-direction scan.

A lane has T consecutive tokens of V channels in registers (``triton_tile.py``), and scans them by multiply-adds. What
goes from group to group of lanes passes through shared memory to another layout, where a lane has one channel and half
of the groups (:func:`as_chains`), is scanned there by multiply-adds, too, and returns (:func:`enter_groups`).
"""

import triton
import triton.language as tl


@triton.jit
def chain(decay_1, state_1, decay_2, state_2):
    return decay_1 * decay_2, decay_2 * state_1 + state_2


@triton.jit
def _pick(wanted_1, value_1, wanted_2, value_2):
    return wanted_1 | wanted_2, tl.where(wanted_1 != 0, value_1, value_2)


@triton.jit
def row(tile, TOKEN: tl.constexpr):
    """Row ``TOKEN`` of the first of three axes. It is in registers and the indices are known, so this costs nothing.

    Scans are spelled out row by row, because ``tl.associative_scan`` has a layout of its own.
    """
    wanted = (tl.arange(0, tile.shape[0]) == TOKEN).to(tl.int32)[:, None, None]
    _, token = tl.reduce((tl.broadcast_to(wanted, tile.shape), tile), 0, _pick)
    return token


@triton.jit
def set_row(tile, token, TOKEN: tl.constexpr):
    return tl.where((tl.arange(0, tile.shape[0]) == TOKEN)[:, None, None], token[None, :, :], tile)


@triton.jit
def product(decay):
    """Product (Q, C) over the tokens of a lane."""
    total = row(decay, 0)
    for i in tl.static_range(1, decay.shape[0]):
        total *= row(decay, i)
    return total


@triton.jit
def end_state(decay, value):
    """State (Q, C) after the tokens of a lane, from a zero state."""
    state = row(value, 0)
    for i in tl.static_range(1, decay.shape[0]):
        state = row(decay, i) * state + row(value, i)
    return state


@triton.jit
def end_flow(decay, value):
    """Adjoint flow (Q, C) that leaves the tokens of a lane if none enters: ``decay[t] (value[t] + flow)``."""
    T: tl.constexpr = decay.shape[0]
    flow = row(decay, T - 1) * row(value, T - 1)
    for i in tl.static_range(1, T):
        flow = row(decay, T - 1 - i) * (row(value, T - 1 - i) + flow)
    return flow


@triton.jit
def _second(first, second):
    return second


@triton.jit
def as_chains(rows):
    """(Q, C) of groups as (Q / 2, 2, C): a lane has a channel and the groups of a half, which it can scan alone.

    The scan changes nothing but the layout: default here, that of the tile in what is computed before.
    """
    rows = tl.reshape(rows, (2, rows.shape[0] // 2, rows.shape[1]))
    return tl.associative_scan(tl.permute(rows, (1, 0, 2)), 0, _second)


@triton.jit
def other_half(rows):
    """What the other half has in ``rows`` (2, C): one shuffle, in whatever layout.

    The sum without carry of both, less the own one; the compiler sees that nothing has to be added.
    """
    bits = rows.to(tl.int32, bitcast=True)
    bits = tl.xor_sum(bits, axis=0, keep_dims=True) ^ bits
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def chain_ends(decay, state, entering, REVERSE: tl.constexpr):
    """State (2, C) behind each half of chains (Q / 2, 2, C), and behind both; ``entering`` (2, C) is in both halves.

    The second half is the first one in a ``REVERSE`` scan.
    """
    H: tl.constexpr = decay.shape[0]
    total, end = row(decay, H - 1 if REVERSE else 0), row(state, H - 1 if REVERSE else 0)
    for i in tl.static_range(1, H):
        step = row(decay, H - 1 - i if REVERSE else i)
        total, end = total * step, step * end + row(state, H - 1 - i if REVERSE else i)
    is_late = (tl.arange(0, 2)[:, None] == 1) != REVERSE
    entering = tl.where(is_late, other_half(total * entering + end), entering)
    end = total * entering + end
    return total, entering, tl.where(is_late, end, other_half(end))


@triton.jit
def enter_groups(decay, state, entering, REVERSE: tl.constexpr):
    """States (Q, C) that enter the groups, and (2, C) that leaves the last one, from what enters the first one.

    ``decay`` are chains of the groups' decays already (:func:`as_chains`), ``state`` the states (Q, C) they end with.
    """
    H: tl.constexpr = decay.shape[0]
    C: tl.constexpr = decay.shape[2]
    state = as_chains(state)
    _, now, leaving = chain_ends(decay, state, entering, REVERSE)
    groups = state
    for i in tl.static_range(H):
        groups = set_row(groups, now, H - 1 - i if REVERSE else i)
        now = row(decay, H - 1 - i if REVERSE else i) * now + row(state, H - 1 - i if REVERSE else i)
    return tl.reshape(tl.permute(groups, (1, 0, 2)), (2 * H, C)), leaving


@triton.jit
def half_offsets(i_channel, C: tl.constexpr):
    """Channels (2, C) of the halves of chains, the same in both."""
    return tl.zeros((2, 1), tl.int32) + (i_channel + tl.arange(0, C))[None, :]


@triton.jit
def scan_states(decay, value, state):
    """States (T, Q, C) before the tokens, and after them; ``state`` (Q, C) enters."""
    before, after = value, value
    for i in tl.static_range(decay.shape[0]):
        before = set_row(before, state, i)
        state = row(decay, i) * state + row(value, i)
        after = set_row(after, state, i)
    return before, after


@triton.jit
def scan_adjoint(decay, value, flow):
    """Gradients ``G[t] = value[t] + decay[t + 1] G[t + 1]`` (T, Q, C) of the states, and ``decay[t] G[t]``.

    ``flow`` (Q, C) enters.
    """
    grads, flows = value, value
    T: tl.constexpr = decay.shape[0]
    for i in tl.static_range(T):
        grad = row(value, T - 1 - i) + flow
        flow = row(decay, T - 1 - i) * grad
        grads = set_row(grads, grad, T - 1 - i)
        flows = set_row(flows, flow, T - 1 - i)
    return grads, flows
