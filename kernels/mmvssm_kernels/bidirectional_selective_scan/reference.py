"""Vim's inner block from its definition (Vision Mamba, arXiv:2401.09417, section 3.2): the specification."""

import torch
import torch.nn.functional as F

from ..selective_scan.reference import selective_scan_reference
from .parameters import ScanParameters


def _one_direction(x: torch.Tensor, parameters: ScanParameters) -> torch.Tensor:
    """Causal convolution, SiLU, projections and scan of (B, E, L), first token first."""
    channels, width = parameters.conv_weight.shape
    u = F.pad(x, (width - 1, 0))
    u = F.silu(F.conv1d(u, parameters.conv_weight[:, None], parameters.conv_bias, groups=channels))
    projected = torch.einsum("bel,ce->bcl", u, parameters.x_proj_weight)
    low_rank, B, C = projected.split([parameters.rank, parameters.state, parameters.state], dim=1)
    delta = torch.einsum("brl,er->bel", low_rank, parameters.dt_proj_weight)
    y, _ = selective_scan_reference(
        u,
        delta,
        -parameters.A_log.exp(),
        B[:, None],
        C[:, None],
        parameters.D,
        delta_bias=parameters.dt_proj_bias,
        delta_softplus=True,
    )
    return y


def bidirectional_selective_scan_reference(
    xz: torch.Tensor, forward: ScanParameters, backward: ScanParameters | None, scale: float
) -> torch.Tensor:
    """Arguments as the public function's; float32 (float64) result (B, L, E), differentiable by autograd."""
    dtype = torch.promote_types(xz.dtype, torch.float32)
    x, z = xz.to(dtype).transpose(1, 2).chunk(2, dim=1)  # (B, E, L) each
    y = _one_direction(x, ScanParameters(*(t.to(dtype) for t in forward)))
    if backward is not None:
        y = y + _one_direction(x.flip(-1), ScanParameters(*(t.to(dtype) for t in backward))).flip(-1)
    return (scale * y * F.silu(z)).transpose(1, 2)
