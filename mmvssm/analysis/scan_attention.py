"""The selective scan of VMamba seen as attention: how much each pixel weighs in the output at one pixel.

Unrolled, a scan is a weighted sum over the tokens before (https://arxiv.org/abs/2401.10166, the section on activation
maps). In a direction in which the query q is visited at time t, the token visited at time s <= t weighs, in channel d,

    w[d, s] = sum_n C[n, t] * exp(A[d, n] * (delta[d, s + 1] + ... + delta[d, t])) * B[n, s] * delta[d, s]

and y[d, t] = sum_s w[d, s] * u[d, s] + D[d] * u[d, t]. One query costs as much as the scan itself.
"""

import torch
from torch import nn
from torch.nn import functional as F

from mmvssm.models.mixers import SS2D
from mmvssm_kernels.selective_scan_2d.reference import cross_scan


@torch.no_grad()
def scan_weights(mixer: SS2D, u: torch.Tensor, query: tuple[int, int]) -> torch.Tensor:
    """Weights of all pixels in the output of the four scans at one pixel.

    Args:
        mixer: Holds the parameters.
        u: Input of its scan, (D, H, W).
        query: Row and column.

    Returns:
        (4, D, H, W) in float64: directions rows, columns, and both reversed. Pixels that a direction visits after the
        query weigh nothing. The skip connection is not part of it.

    Raises:
        ValueError: If the query lies outside.
    """
    D, H, W = u.shape
    y, x = query
    if not (0 <= y < H and 0 <= x < W):
        raise ValueError(f"query must be a row and column of the {H} x {W} map, got {query}")
    x_proj, dt_proj, dt_bias = (p.double() for p in (mixer.x_proj_weight, mixer.dt_proj_weight, mixer.dt_proj_bias))
    R, N = dt_proj.shape[2], mixer.A_log.shape[1]
    sequences = cross_scan(u[None].double())[0]  # (4, D, L)
    low_rank, B, C = torch.einsum("kdl,kcd->kcl", sequences, x_proj).split([R, N, N], dim=1)
    delta = F.softplus(torch.einsum("krl,kdr->kdl", low_rank, dt_proj) + dt_bias[..., None])
    A = -mixer.A_log.double().exp().unflatten(0, (4, D))  # (4, D, N)
    passed = delta.cumsum(-1)
    cells = cross_scan(torch.arange(H * W).reshape(1, 1, H, W))[0, :, 0]  # (4, L)
    found = torch.zeros(4, D, H * W, dtype=torch.float64, device=u.device)
    for k in range(4):
        t = int((cells[k] == y * W + x).nonzero())
        since = passed[k, :, t, None] - passed[k, :, : t + 1]  # (D, t + 1)
        weights = torch.zeros_like(since)
        for n in range(N):  # one state at a time: all of them would be N times the memory of the map
            weights += C[k, n, t] * torch.exp(A[k, :, n, None] * since) * B[k, n, : t + 1]
        found[k][:, cells[k, : t + 1].to(u.device)] = weights * delta[k, :, : t + 1]
    return found.unflatten(2, (H, W))


@torch.no_grad()
def activation_maps(
    backbone: nn.Module, image: torch.Tensor, stage: int, query: tuple[int, int], block: int = -1
) -> torch.Tensor:
    """What one position of a stage looks at, by direction: the mean of the weights' sizes over the channels.

    Args:
        backbone: A VMamba, in eval mode.
        image: (1, 3, H, W), normalised.
        stage: Number of the stage.
        query: Row and column in the map of the stage.
        block: Which block of the stage; the last by default.

    Returns:
        (4, h, w) on the CPU: directions rows, columns, and both reversed.

    Raises:
        ValueError: If this is no VMamba, or stage, block or query lie outside.
    """
    stages = getattr(backbone, "stages", ())
    if not -len(stages) <= stage < len(stages):
        raise ValueError(f"stage must be one of the {len(stages)} stages of {type(backbone).__name__}, got {stage}")
    mixers = [module for module in stages[stage].modules() if isinstance(module, SS2D)]
    if not mixers:
        raise ValueError(f"activation maps of a query are made for VMamba, and {type(backbone).__name__} is none")
    if not -len(mixers) <= block < len(mixers):
        raise ValueError(f"stage {stage} has {len(mixers)} blocks, there is no block {block}")
    mixer, inputs = mixers[block], []
    hook = mixer.act.register_forward_hook(lambda module, args, output: inputs.append(output))
    try:
        backbone(image)
    finally:
        hook.remove()
    u = inputs[-1][0].permute(2, 0, 1)  # what goes into the scan, (D, h, w)
    return scan_weights(mixer, u, query).abs().mean(1).cpu()
