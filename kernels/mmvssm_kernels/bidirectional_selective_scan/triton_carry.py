"""Vim's inner block, Triton: what the segments of a sequence hand on to each other, for either pass."""

import triton
import triton.language as tl
from torch import Tensor

from ..grids import cdiv
from ..selective_scan.triton_tile import last_row, scan_rows
from ..triton_scan import LOG2_E

# Segments that are loaded together, and how many such tiles ahead.
_SEGMENTS = 16
_AHEAD = 3


@triton.jit
def _load_tile(p_values, p_steps, n_left, m_value, STEP: tl.constexpr, N: tl.constexpr, T: tl.constexpr):
    """Values and step sizes (T, BLOCK) of the next segments, of which ``n_left`` are there.

    The hints put lanes along states in either tile.
    """
    # Rows of a tile are constants apart, which cost no instructions.
    o_row = tl.arange(0, T)[:, None]
    mask = (o_row < n_left) & m_value
    steps = tl.load(tl.max_contiguous(p_steps + o_row * STEP, [1, 16]), mask=mask, other=0.0)
    return tl.load(tl.max_contiguous(p_values + o_row * (STEP * N), [1, 32]), mask=mask, other=0.0), steps


@triton.jit(do_not_specialize=["n_batch", "n_segments", "zero"])
def bidirectional_selective_scan_kernel_carry(
    p_summary,
    p_step,
    p_A_log,
    p_A_log_b,
    n_batch,
    n_segments,
    zero,
    channels: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Of what each segment reaches from zero (K, B, S, E, N) makes, in place, what it hands on to the next one.

    ``p_step`` holds the segments' sums of step sizes (K, B, S, E). A program follows a block of states of one sequence,
    one in a lane: ``zero`` is 0, but the compiler does not know that, so loads are not vectors, whose layout would put
    segments across lanes.
    """
    i_sequence = tl.program_id(1)
    o_value = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK) + zero
    m_value = o_value < channels * N
    p_summary += i_sequence.to(tl.int64) * n_segments * (channels * N)
    p_step += i_sequence.to(tl.int64) * n_segments * channels
    if i_sequence < n_batch:
        A_log = tl.load(p_A_log + o_value, mask=m_value, other=0.0).to(tl.float32)
    else:
        A_log = tl.load(p_A_log_b + o_value, mask=m_value, other=0.0).to(tl.float32)
    rate = (-tl.exp2(A_log * LOG2_E) * LOG2_E)[None, :]
    state = tl.zeros((1, BLOCK), tl.float32)
    m_value = (channels * N % BLOCK == 0) | m_value[None, :]
    p_value = p_summary + o_value[None, :]
    p_steps = p_step + (o_value // N)[None, :]
    n_givers = n_segments - 1  # there is none behind the last one
    ahead = ()
    for j in tl.static_range(AHEAD):
        o_values = j * T * channels * N
        o_steps = j * T * channels
        ahead += (_load_tile(p_value + o_values, p_steps + o_steps, n_givers - j * T, m_value, channels, N, T),)
    for i in range(0, n_givers, T):
        # Loads do not move across stores.
        p_next = p_value + AHEAD * T * channels * N
        p_steps += T * channels
        o_steps = (AHEAD - 1) * T * channels
        last = _load_tile(p_next, p_steps + o_steps, n_givers - i - AHEAD * T, m_value, channels, N, T)
        value, steps = ahead[0]
        states = scan_rows(tl.exp2(steps * rate)[:, None, :], value[:, None, :], state)
        state = last_row(states)
        o_row = tl.arange(0, T)[:, None]
        tl.store(
            p_value + o_row * (channels * N), tl.reshape(states, (T, BLOCK)), mask=(o_row < n_givers - i) & m_value
        )
        p_value += T * channels * N
        ahead = ahead[1:]
        ahead += (last,)


def carry(launch, summary: Tensor, steps: Tensor) -> None:
    """Run :func:`bidirectional_selective_scan_kernel_carry`."""
    block = 32
    grid = (cdiv(launch.channels * launch.state, block), launch.directions * launch.batch)
    rates = [p[5] for p in launch.parameters]
    segments = summary.shape[2]
    bidirectional_selective_scan_kernel_carry[grid](
        summary, steps, rates[0], rates[-1], launch.batch, segments, 0, launch.channels, launch.state, _SEGMENTS, block,
        _AHEAD, num_warps=1,
    )  # fmt: skip
