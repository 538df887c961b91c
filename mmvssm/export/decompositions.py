"""The operators of :mod:`mmvssm_kernels` in terms of torch's own and of the recurrence of exported models.

For tracing, in inference: what operators keep for their backward pass comes out empty.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvssm_kernels.add_norm.op import is_norm_alone
from mmvssm_kernels.add_norm.reference import add_norm_reference
from mmvssm_kernels.bias_activation.reference import bias_activation_reference
from mmvssm_kernels.bidirectional_selective_scan import ScanParameters
from mmvssm_kernels.cast_together.op import padded
from mmvssm_kernels.causal_conv1d.reference import causal_conv1d_reference
from mmvssm_kernels.checks import computing_dtype
from mmvssm_kernels.locality_gate.reference import locality_gate_reference
from mmvssm_kernels.selective_scan_2d.reference import cross_merge, cross_scan
from mmvssm_kernels.swiglu.reference import swiglu_reference

from .recurrence import scan_tokens


def _selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Scans of several groups: u, delta (B, G, D, L), step sizes final; A (G, D, N); B, C (B, G, N, L); D (G, D)."""
    rows = (t.permute(3, 0, 1, 2) for t in (C, B, delta * u, delta))
    y = scan_tokens(*rows, A.transpose(1, 2)).permute(1, 2, 3, 0)
    return y if D is None else y + D[..., None] * u


def selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, keep_states, out_dtype, backend):
    dtype, groups = computing_dtype(u), B.shape[1]
    u, delta, A, B, C, D, z, delta_bias = (
        None if t is None else t.to(dtype) for t in (u, delta, A, B, C, D, z, delta_bias)
    )
    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    delta = F.softplus(delta) if delta_softplus else delta
    # (B, D, L) to (B, G, D / G, L); the channels of a group are neighbours
    u, delta = (t.unflatten(1, (groups, -1)) for t in (u, delta))
    if reverse:
        u, delta, B, C = (t.flip(-1) for t in (u, delta, B, C))
    A, D = A.unflatten(0, (groups, -1)), None if D is None else D.unflatten(0, (groups, -1))
    y = _selective_scan(u, delta, A, B, C, D)
    y = (y.flip(-1) if reverse else y).flatten(1, 2)
    if z is not None:
        y = y * F.silu(z)
    return y.to(out_dtype), u.new_empty(u.shape[0], *A.shape[:1], 0), u.new_empty(0)


def selective_scan_2d(x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, out_dtype, backend):
    dtype = computing_dtype(x)
    x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D = (
        t.to(dtype) for t in (x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D)
    )
    channels, height, width = x.shape[1:]
    rank, states = dt_proj_weight.shape[2], A_log.shape[1]
    u = cross_scan(x)  # (B, 4, D, L)
    low_rank, B, C = (x_proj_weight @ u).split([rank, states, states], dim=2)
    delta = F.softplus(dt_proj_weight @ low_rank + dt_proj_bias[..., None])
    A, D = -A_log.exp().unflatten(0, (4, channels)), D.unflatten(0, (4, channels))
    y = cross_merge(_selective_scan(u, delta, A, B, C, D), height, width)
    return y.to(out_dtype), x.new_empty(0)


def bidirectional_selective_scan(xz, parameters, scale, keep_states, out_dtype, backend):
    dtype, count = computing_dtype(xz), len(ScanParameters._fields)
    x, z = xz.to(dtype).transpose(1, 2).chunk(2, dim=1)  # (B, E, L) each
    directions = [
        ScanParameters(*(t.to(dtype) for t in parameters[i : i + count])) for i in range(0, len(parameters), count)
    ]
    first = directions[0]
    inputs = [x, x.flip(-1)][: len(directions)]
    u = torch.stack(
        [
            causal_conv1d_reference(x, p.conv_weight, p.conv_bias, activation="silu")
            for x, p in zip(inputs, directions, strict=True)
        ],
        dim=1,
    )  # (B, K, E, L)
    x_proj, dt_proj, dt_bias, A_log, D = (torch.stack([p[i] for p in directions]) for i in range(2, count))
    low_rank, B, C = (x_proj @ u).split([first.rank, first.state, first.state], dim=2)
    delta = F.softplus(dt_proj @ low_rank + dt_bias[..., None])
    y = _selective_scan(u, delta, -A_log.exp(), B, C, D)
    y = y[:, 0] if len(directions) == 1 else y[:, 0] + y[:, 1].flip(-1)
    empty = [x.new_empty(0) for _ in range(4)]
    return (scale * y * F.silu(z)).transpose(1, 2).to(out_dtype), *empty


def bidirectional_gla(q, k, v, gf, gb, norm_weight, scale, gate_normalizer, norm_eps, out_dtype, keep, backend):
    dtype = computing_dtype(q)
    q, k, v, gf, gb = (t.to(dtype).transpose(0, 1) for t in (q, k, v, gf, gb))  # (L, B, heads, .)
    if gate_normalizer is not None:
        gf, gb = (F.logsigmoid(g) / gate_normalizer for g in (gf, gb))
    # Both directions in one scan: (L, 2, B, heads, .), the second from the last token on.
    q, k, v, g = (
        torch.stack([forward, backward.flip(0)], dim=1) for forward, backward in ((q, q), (k, k), (v, v), (gf, gb))
    )
    y = scan_tokens(q, k, v, g)
    y = scale * (y[:, 0] + y[:, 1].flip(0)).transpose(0, 1)
    if norm_weight is not None:
        y = y * (y.square().mean(-1, keepdim=True) + norm_eps).rsqrt() * norm_weight.to(dtype)
    return y.to(out_dtype), y.new_empty(0), y.new_empty(0)


def causal_conv1d(x, weight, bias, activation, reverse, padding, out_dtype, backend):
    return causal_conv1d_reference(x, weight, bias, activation, reverse, padding).to(out_dtype)


def add_norm(x, residual, weight, bias, eps, norm, scale, residual_dtype, out_dtype, backend):
    y, stream = add_norm_reference(x, residual, weight, bias, eps, norm, scale)
    alone = is_norm_alone(x, residual, scale, residual_dtype)
    return y.to(out_dtype), x.new_empty(0) if alone else stream.to(residual_dtype)


def swiglu(x, backend):
    return swiglu_reference(x).to(x.dtype)


def locality_gate(long, x, logits, weight, bias, eps, silu, backend):
    return locality_gate_reference(long, x, logits, weight, bias, eps, silu).to(long.dtype)


def bias_activation(x, bias, activation, residual, backend):
    return bias_activation_reference(x, bias, activation, residual).to(x.dtype)


def cast_together(tensors, dtype, backend):
    return torch.cat([F.pad(t.flatten().to(dtype), (0, padded(t.numel()) - t.numel())) for t in tensors])


_FUNCTIONS = (
    selective_scan,
    selective_scan_2d,
    bidirectional_selective_scan,
    bidirectional_gla,
    causal_conv1d,
    add_norm,
    swiglu,
    locality_gate,
    bias_activation,
    cast_together,
)


def decomposition_table() -> dict:
    """Function by operator."""
    return {getattr(torch.ops.mmvssm, function.__name__).default: function for function in _FUNCTIONS}
