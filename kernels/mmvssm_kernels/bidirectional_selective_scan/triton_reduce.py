"""Vim's inner block, Triton backward pass: through the projections and convolutions, and the sums of partial sums.

The first kernel makes the gradients of the projections' rows: it adds those of B and C over blocks of channels and
takes those of the step sizes to the low-rank values. The second adds the gradient of u from the projection to that from
the scan and takes it back through the SiLU; the third goes through the convolutions of both directions; the fourth adds
what the programs of all kernels left as partial sums, in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..grids import cdiv
from ..selective_scan.triton_tile import detach_layout
from .triton_launch import register_limit
from .triton_tile import block_channels, load_rows, load_vector, of_blocks, split_both_dot, split_dot

# Rows and warps of a program of the first kernel.
_SUM_ROWS = 32
_SUM_WARPS = 2
# Tokens of a program of the second and of the third kernel.
_PROJECT_TOKENS = 256
_CONVOLVE_TOKENS = 128
_CONVOLVE_CHANNELS = 64
# Channels and programs' sums of a step of the last kernel.
_FINISH_CHANNELS = 32
_FINISH_ROWS = 256
# Of the second kernel: tokens and channels of a step (fewer for float32), warps, and registers of a thread.
_TOKENS = 32
_CHANNELS = 64
_WARPS = 4
_REGISTERS = 128


@triton.jit
def _store_parts(pointers, values, mask, n_part, dtype: tl.constexpr):
    """Store a tile in ``dtype`` and, if that has 16 bits, ``n_part`` values behind it what is missing."""
    head = values.to(dtype)
    tl.store(pointers, head, mask=mask)
    if dtype != tl.float32:
        tl.store(pointers + n_part, (values - head.to(tl.float32)).to(dtype), mask=mask)


@triton.jit
def _parts_dot(head, tail, right, total, PRECISION: tl.constexpr):
    """``total + (head + tail) right``; without ``tail`` for float32."""
    total = split_dot(head, right, total, PRECISION)
    if right.dtype == tl.float32:
        return total
    else:
        return split_dot(tail, right, total, PRECISION)


@triton.jit(do_not_specialize=["n_rows", "n_copy", "n_padded"])
def bidirectional_selective_scan_bwd_kernel_sum(
    p_dprojected,
    p_dweights,
    p_draw,
    p_dt_weight,
    p_dt_weight_b,
    n_rows,
    n_copy,
    n_padded,
    n_blocks,
    channels: tl.constexpr,
    rank,
    N: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the projections (parts, K, B L, row).

    They are sums of dweights (blocks, K, B L, 2N) and products with the first of draw (K, B, blocks, L, 2, C).
    """
    i_direction = tl.program_id(1).to(tl.int64)
    n_copy = n_copy // 16 * 16  # tiles have 16 tokens, which the compiler does not know
    n_part = tl.num_programs(1).to(tl.int64) * n_rows * (RANK + 2 * N)
    p_dprojected += i_direction * n_rows * (RANK + 2 * N)
    p_dweights += i_direction * n_rows * (2 * N)
    p_draw += i_direction * n_rows * n_blocks * (2 * BLOCK_C)
    if tl.num_programs(1) == 2:
        p_dt_weight = tl.where(i_direction == 1, p_dt_weight_b, p_dt_weight)
    i_first = tl.program_id(0).to(tl.int64) * BLOCK_T
    p_dprojected += i_first * (RANK + 2 * N)
    p_dweights += i_first * (2 * N)
    o_row = tl.arange(0, BLOCK_T)
    m_row = o_row < n_rows - i_first
    o_rank = tl.arange(0, BLOCK_R)
    o_weight = tl.arange(0, BLOCK_P)
    m_weight = m_row[:, None] & (o_weight < 2 * N)[None, :]
    p_weights = p_dweights + o_row[:, None] * (2 * N) + o_weight[None, :]
    i_row = i_first + o_row
    p_rows = p_draw + (i_row // n_padded * (n_blocks * n_padded) + i_row % n_padded) * (2 * BLOCK_C)
    p_tile = p_rows[:, None] + tl.max_contiguous(tl.arange(0, BLOCK_C), 4)[None, :]
    narrow = p_dprojected.dtype.element_ty
    weights = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    low_rank = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for i in range(n_blocks):
        o_channel, m_channel = block_channels(i, channels, BLOCK_C)
        weights += tl.load(p_weights, mask=m_weight, other=0.0).to(tl.float32)
        p_weights += n_copy
        draw = tl.load(p_tile, mask=m_row[:, None], other=0.0)
        p_tile += n_padded * (2 * BLOCK_C)
        p_weight = p_dt_weight + o_channel[:, None] * rank + o_rank[None, :]
        weight = tl.load(p_weight, mask=m_channel[:, None] & (o_rank < rank)[None, :], other=0.0)
        low_rank = split_dot(draw, weight.to(narrow), low_rank, PRECISION)
    p_rows = p_dprojected + o_row[:, None] * (RANK + 2 * N)
    m_rank = m_row[:, None] & (o_rank < RANK)[None, :]  # zeros behind the rank
    _store_parts(p_rows + o_rank[None, :], low_rank, m_rank, n_part, narrow)
    _store_parts(p_rows + RANK + o_weight[None, :], weights, m_weight, n_part, narrow)


@triton.jit(do_not_specialize=["length", "n_padded", "n_blocks"])
def bidirectional_selective_scan_bwd_kernel_project(
    p_dprojected,
    p_projected,
    p_inputs,
    p_slope,
    p_draw,
    p_dconv,
    p_partial,
    p_x_weight,
    p_x_weight_b,
    length,
    channels: tl.constexpr,
    rank,
    n_padded,
    n_blocks,
    N: tl.constexpr,
    RANK: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the convolutions' results (K, B, L, E).

    And of every program's partial sums the rows of conv_bias, x_proj_weight, dt_proj_weight and dt_proj_bias.
    """
    i_batch = tl.program_id(2).to(tl.int64) // K
    i_direction = tl.program_id(2) % K
    i_sequence = i_direction * (tl.num_programs(2) // K) + i_batch
    n_part = tl.num_programs(2).to(tl.int64) * n_padded * (RANK + 2 * N)
    p_dprojected += i_sequence * n_padded * (RANK + 2 * N)
    p_projected += i_sequence * n_padded * (RANK + 2 * N)
    o_sequence = i_sequence * n_padded * ((channels + C - 1) // C * C)
    p_draw += 2 * o_sequence
    p_inputs += 2 * o_sequence
    p_slope += o_sequence
    p_dconv += i_sequence * length * channels
    i_program = (i_batch * tl.num_programs(1) + tl.program_id(1)) * K + i_direction
    p_partial += i_program * (2 * rank + 2 * N + 2) * channels
    p_x_weight = tl.where(i_direction == 1, p_x_weight_b, p_x_weight)
    ROW: tl.constexpr = RANK + 2 * N
    o_channel, m_channel = block_channels(tl.program_id(0), channels, BLOCK_C)
    o_row = tl.arange(0, BLOCK_P)
    # Row of the weight that belongs to a column of projections; those between rank and RANK are padding.
    o_weight = tl.where(o_row < RANK, o_row, o_row - RANK + rank)
    m_row = (o_row < rank) | ((o_row >= RANK) & (o_row < ROW))
    m_weight = m_row[:, None] & m_channel[None, :]
    narrow = p_dconv.dtype.element_ty
    o_x_weight = o_weight[:, None] * channels + o_channel[None, :]
    weight = tl.load(p_x_weight + o_x_weight, mask=m_weight, other=0.0).to(narrow)
    dweight = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    dbias = tl.zeros((BLOCK_C,), tl.float32)
    o_rank = tl.arange(0, BLOCK_R)
    dt_dweight = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i in range(n_blocks):
        o_token = (tl.program_id(1) * n_blocks + i) * BLOCK_T + tl.arange(0, BLOCK_T)
        m_token = o_token < length
        # All but the result lies in scan order.
        o_scan = tl.where(i_direction == 1, n_padded - 1 - o_token, o_token)
        p_rows = p_dprojected + o_scan[:, None] * ROW + o_row[None, :]
        m_rows = m_token[:, None] & (o_row < ROW)[None, :]
        head = tl.load(p_rows, mask=m_rows, other=0.0)
        tail = head
        if narrow != tl.float32:
            tail = tl.load(p_rows + n_part, mask=m_rows, other=0.0)
        o_tile = of_blocks(o_scan, o_channel, n_padded, C, 2)
        m_tile = m_token[:, None] & m_channel[None, :]
        du = tl.load(p_draw + C + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        draw = tl.load(p_draw + o_tile, mask=m_tile, other=0.0)
        m_low = m_token[:, None] & (o_rank < rank)[None, :]
        low_rank = tl.load(p_projected + o_scan[:, None] * ROW + o_rank[None, :], mask=m_low, other=0.0)
        # A value of one behind the last makes the gradient of the bias another row of the weight's.
        low_rank = tl.where((o_rank == rank)[None, :], 1.0, low_rank)
        u = tl.load(p_inputs + C + o_tile, mask=m_tile, other=0.0).to(narrow)
        p_tile = p_slope + of_blocks(o_scan, o_channel, n_padded, C, 1)
        slope = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
        # Detached from the layout of the product, so that nothing else is exchanged between lanes for it.
        through = _parts_dot(head, tail, weight, tl.zeros(du.shape, tl.float32), PRECISION)
        dconv = (du + tl.reshape(detach_layout(through[None, :, :]), du.shape)) * slope
        p_tile = p_dconv + o_token[:, None] * channels + o_channel[None, :]
        tl.store(p_tile, dconv.to(p_dconv.dtype.element_ty), mask=m_tile)
        dbias += tl.sum(dconv, axis=0)
        dweight = _parts_dot(tl.trans(head), tl.trans(tail), u, dweight, PRECISION)
        dt_dweight = split_both_dot(tl.trans(low_rank), draw, dt_dweight, narrow, PRECISION)
    tl.store(p_partial + o_channel, dbias, mask=m_channel)
    tl.store(p_partial + channels + o_x_weight, dweight, mask=m_weight)
    p_partial += (rank + 2 * N + 1) * channels
    o_dt_weight = o_rank[:, None] * channels + o_channel[None, :]
    tl.store(p_partial + o_dt_weight, dt_dweight, mask=(o_rank <= rank)[:, None] & m_channel[None, :])


@triton.jit(do_not_specialize=["length", "n_blocks"])
def bidirectional_selective_scan_bwd_kernel_convolve(
    p_x,
    p_dconv,
    p_dxz,
    p_taps,
    p_partial,
    length,
    channels: tl.constexpr,
    n_blocks,
    stride_x_batch,
    stride_x_token,
    W: tl.constexpr,
    BLOCK_W: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The inputs' half of dxz (B, L, 2E), and every program's sums (B S, K, W, E) of conv_weight."""
    i_batch = tl.program_id(2).to(tl.int64)
    o_channel, m_channel = block_channels(tl.program_id(0), channels, BLOCK_C)
    p_x += i_batch * stride_x_batch
    p_dxz += i_batch * length * 2 * channels
    p_partial += (i_batch * tl.num_programs(1) + tl.program_id(1)) * K * W * channels
    dtaps = tl.zeros((K * BLOCK_W, BLOCK_C), tl.float32)
    i_sum = tl.arange(0, K * BLOCK_W)
    for i in range(n_blocks):
        o_token = (tl.program_id(1) * n_blocks + i) * BLOCK_T + tl.arange(0, BLOCK_T)
        m_token = o_token < length
        x = load_rows(p_x, o_token, m_token, o_channel, m_channel, stride_x_token)
        dx = tl.zeros(x.shape, tl.float32)
        for i_direction in tl.static_range(K):
            p_sequence = p_dconv + (i_direction * tl.num_programs(2) + i_batch) * length * channels
            for k in tl.static_range(W):
                # The result that token t enters with tap k is W - 1 - k later in scan order.
                o_result = o_token - (W - 1 - k) if i_direction else o_token + (W - 1 - k)
                m_result = m_token & (o_result >= 0) & (o_result < length)
                dconv = load_rows(p_sequence, o_result, m_result, o_channel, m_channel, channels)
                p_tap = p_taps + (i_direction * (W + 1) + k) * channels
                dx += dconv * load_vector(p_tap, o_channel, m_channel)[None, :]
                dtap = tl.sum(dconv * x, axis=0)[None, :]
                dtaps += tl.where((i_sum == i_direction * BLOCK_W + k)[:, None], dtap, 0.0)
        p_tile = p_dxz + o_token[:, None] * (2 * channels) + o_channel[None, :]
        tl.store(p_tile, dx.to(p_dxz.dtype.element_ty), mask=m_token[:, None] & m_channel[None, :])
    i_row = i_sum // BLOCK_W * W + i_sum % BLOCK_W
    m_sum = (i_sum % BLOCK_W < W)[:, None] & m_channel[None, :]
    tl.store(p_partial + i_row[:, None] * channels + o_channel[None, :], dtaps, mask=m_sum)


@triton.jit(do_not_specialize=["n_scan", "n_project", "n_convolve"])
def bidirectional_selective_scan_bwd_kernel_finish(
    p_scan,
    p_project,
    p_convolve,
    p_gradient,
    n_scan,
    n_project,
    n_convolve,
    channels,
    rank,
    rows,
    N: tl.constexpr,
    W: tl.constexpr,
    K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Sums of the programs' sums, each at its place in the parameters' flat gradients.

    Rows (P, K, rows, E): of the scan A_log (N) and D; of the projection conv_bias, x_proj_weight (R + 2N),
    dt_proj_weight (R) and dt_proj_bias; of the convolution conv_weight (W). Gradients, as in ScanParameters:
    conv_weight (E, W), conv_bias (E), x_proj_weight (R + 2N, E), dt_proj_weight (E, R), dt_proj_bias (E), A_log (E, N),
    D (E).
    """
    i_row = tl.program_id(1)
    i_direction = tl.program_id(2)
    o_channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_channel = o_channel < channels
    n_project_rows = rows + rank + 2
    o_dt_weight = (W + 1 + rows) * channels
    o_A = o_dt_weight + (rank + 1) * channels
    if i_row < N + 1:
        p_partial = p_scan + (i_direction * (N + 1) + i_row) * channels
        stride = K * (N + 1) * channels
        n_programs = n_scan
        o_gradient = o_A + o_channel * N + i_row if i_row < N else o_A + N * channels + o_channel
    elif i_row < N + 1 + n_project_rows:
        i_own = i_row - N - 1
        p_partial = p_project + (i_direction * n_project_rows + i_own) * channels
        stride = K * n_project_rows * channels
        n_programs = n_project
        if i_own < rows + 1:
            o_gradient = (W + i_own) * channels + o_channel
        elif i_own < rows + 1 + rank:
            o_gradient = o_dt_weight + o_channel * rank + i_own - rows - 1
        else:
            o_gradient = o_dt_weight + rank * channels + o_channel
    else:
        i_tap = i_row - N - 1 - n_project_rows
        p_partial = p_convolve + (i_direction * W + i_tap) * channels
        stride = K * W * channels
        n_programs = n_convolve
        o_gradient = o_channel * W + i_tap
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for i in range(tl.cdiv(n_programs, BLOCK_S)):
        o_program = i * BLOCK_S + tl.arange(0, BLOCK_S)
        pointers = p_partial + o_program[:, None].to(tl.int64) * stride + o_channel[None, :]
        total += tl.load(pointers, mask=(o_program < n_programs)[:, None] & m_channel[None, :], other=0.0)
    p_gradient += i_direction * (N + 1 + n_project_rows + W) * channels
    tl.store(p_gradient + o_gradient, tl.sum(total, axis=0), mask=m_channel)


def sum_blocks(launch, dweights: Tensor, gradients: Tensor) -> Tensor:
    """Gradients of the projections (parts, K, B, padded L, row) in the dtype of the inputs.

    They are the sum of both parts, if that has 16 bits, and operands of products; float32 has one part.
    """
    dtype = launch.xz.dtype
    sizes = (1 if dtype == torch.float32 else 2, launch.directions, launch.batch, launch.padded, launch.row)
    dprojected = launch.empty(*sizes, dtype=dtype)
    rows = launch.batch * launch.padded
    bidirectional_selective_scan_bwd_kernel_sum[(cdiv(rows, _SUM_ROWS), launch.directions)](
        dprojected,
        dweights,
        gradients,
        launch.parameters[0][3],
        launch.parameters[-1][3],
        rows,
        dweights.stride(0),
        launch.padded,
        dweights.shape[0],
        launch.channels,
        launch.rank,
        N=launch.state,
        RANK=launch.row - 2 * launch.state,
        BLOCK_T=_SUM_ROWS,
        BLOCK_C=gradients.shape[-1],
        BLOCK_R=max(16, triton.next_power_of_2(launch.rank)),
        BLOCK_P=max(16, triton.next_power_of_2(2 * launch.state)),
        PRECISION=launch.precision,
        num_warps=_SUM_WARPS,
        num_stages=1,
    )
    return dprojected


def project_backward(
    launch,
    dprojected: Tensor,
    projected: Tensor,
    inputs: Tensor,
    slope: Tensor,
    gradients: Tensor,
    dxz: Tensor,
    taps: Tensor,
) -> tuple[Tensor, Tensor]:
    """Fill the inputs' half of ``dxz``; partial sums (P, K, rows, E) of both kernels."""
    directions, batch, length, channels = launch.directions, launch.batch, launch.length, launch.channels
    is_narrow = launch.xz.element_size() == 2
    block_tokens = _TOKENS if launch.block_rows <= 128 else 16  # rows of many states fill the shared memory
    block_channels = _CHANNELS if is_narrow else 32
    segments = cdiv(length, _PROJECT_TOKENS)
    dconv = launch.empty(directions, batch, length, channels, dtype=launch.xz.dtype)
    sums = launch.empty(batch * segments, directions, launch.rows + launch.rank + 2, channels)
    grid = (cdiv(channels, block_channels), segments, batch * directions)
    bidirectional_selective_scan_bwd_kernel_project[grid](
        dprojected,
        projected,
        inputs,
        slope,
        gradients,
        dconv,
        sums,
        launch.parameters[0][2],
        launch.parameters[-1][2],
        length,
        channels,
        launch.rank,
        launch.padded,
        cdiv(min(length, _PROJECT_TOKENS), block_tokens),
        N=launch.state,
        RANK=launch.row - 2 * launch.state,
        C=inputs.shape[-1],
        BLOCK_T=block_tokens,
        BLOCK_C=block_channels,
        BLOCK_P=max(16, triton.next_power_of_2(launch.row)),
        BLOCK_R=max(16, triton.next_power_of_2(launch.rank + 1)),
        PRECISION=launch.precision,
        K=directions,
        num_warps=_WARPS,
        num_stages=1,
        **(register_limit(_REGISTERS) if is_narrow and launch.block_rows <= 64 else {}),
    )
    segments = cdiv(length, _CONVOLVE_TOKENS)
    block_channels = min(_CONVOLVE_CHANNELS, max(32, triton.next_power_of_2(channels)))
    convolved = launch.empty(batch * segments, directions, launch.width, channels)
    grid = (cdiv(channels, block_channels), segments, batch)
    bidirectional_selective_scan_bwd_kernel_convolve[grid](
        launch.xz,
        dconv,
        dxz,
        taps,
        convolved,
        length,
        channels,
        _CONVOLVE_TOKENS // 8,
        *launch.xz.stride()[:2],
        BLOCK_W=triton.next_power_of_2(launch.width),
        BLOCK_T=8,
        BLOCK_C=block_channels,
        W=launch.width,
        K=directions,
        num_warps=1,
        num_stages=1,
    )
    return sums, convolved


def finish(launch, scanned: Tensor, projected: Tensor, convolved: Tensor) -> Tensor:
    """Gradients of all parameters, one after the other in their own layouts."""
    rows = scanned.shape[2] + projected.shape[2] + convolved.shape[2]
    gradient = launch.empty(launch.directions * rows * launch.channels)
    block_channels = _FINISH_CHANNELS
    grid = (cdiv(launch.channels, block_channels), rows, launch.directions)
    bidirectional_selective_scan_bwd_kernel_finish[grid](
        scanned,
        projected,
        convolved,
        gradient,
        scanned.shape[0],
        projected.shape[0],
        convolved.shape[0],
        launch.channels,
        launch.rank,
        launch.rows,
        N=launch.state,
        W=launch.width,
        K=launch.directions,
        BLOCK_C=block_channels,
        BLOCK_S=_FINISH_ROWS,
        num_warps=4,
    )
    return gradient
