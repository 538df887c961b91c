"""Four-direction selective scan from its definition (VMamba, arXiv:2401.10166, section 4.2): the specification."""

import torch

from ..selective_scan.reference import selective_scan_reference


def cross_scan(x: torch.Tensor) -> torch.Tensor:
    """Maps (B, D, H, W) to the sequences (B, 4, D, H W): row-major, column-major, and both reversed."""
    rows, columns = x.flatten(2), x.transpose(2, 3).flatten(2)
    return torch.stack([rows, columns, rows.flip(-1), columns.flip(-1)], dim=1)


def cross_merge(y: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Adjoint of :func:`cross_scan`: puts (B, 4, D, H W) back on their pixels and adds the four, (B, D, H, W)."""
    rows = (y[:, 0] + y[:, 2].flip(-1)).unflatten(2, (height, width))
    columns = (y[:, 1] + y[:, 3].flip(-1)).unflatten(2, (width, height))
    return rows + columns.transpose(2, 3)


def selective_scan_2d_reference(x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D) -> torch.Tensor:
    """Arguments as :func:`mmvssm_kernels.selective_scan_2d`; float32 (float64) result, differentiable by autograd."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D = (
        t.to(dtype) for t in (x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    )
    channels, height, width = x.shape[1:]
    rank, state = dt_proj_weight.shape[2], A_log.shape[1]
    sequences = cross_scan(x.to(dtype))
    low_rank, B, C = torch.einsum("bkdl,kcd->bkcl", sequences, x_proj_weight).split([rank, state, state], dim=2)
    delta = torch.einsum("bkrl,kdr->bkdl", low_rank, dt_proj_weight)
    y, _ = selective_scan_reference(
        sequences.flatten(1, 2),
        delta.flatten(1, 2),
        -A_log.exp(),
        B,
        C,
        D,
        delta_bias=dt_proj_bias.flatten(),
        delta_softplus=True,
    )
    return cross_merge(y.unflatten(1, (4, channels)), height, width)
