"""Grids of operator cases shared by the CPU, interpreter and GPU tests."""

import torch

from mmvssm_kernels.testing import (
    AddNorm,
    BiasActivation,
    BidirectionalGla,
    BidirectionalScan,
    Conv1d,
    Gate,
    Scan,
    Scan2d,
    SwiGlu,
)

# Short enough for the recurrence itself to be the yardstick.
SHORT = [
    *(Scan(2, 6, length, 4, gate=True, reverse=length % 2 == 0) for length in (1, 2, 7, 49, 63, 131, 197)),
    *(Scan(1, channels, 33, 1) for channels in (1, 3, 96)),
    *(Scan(2, 8, 21, state, groups=2, gate=True) for state in (1, 3, 8, 16, 64)),
    Scan(1, 4, 40, 2, reverse=True, skip=False, bias=False, softplus=False),
    Scan(1, 4, 40, 8, step=30.0),
    Scan(1, 4, 40, 8, step=-20.0, bias=False),
    *(Scan2d(2, 6, h, w, 3, 1) for h, w in ((1, 1), (1, 7), (7, 1), (2, 2), (5, 7), (14, 14), (9, 16))),
    *(Scan2d(1, 10, 6, 11, 4, state, channel_last=False) for state in (1, 4, 16)),
    Scan2d(1, 4, 5, 6, 2, 8, step=30.0),
    Scan2d(1, 4, 5, 6, 2, 8, step=-20.0),
    *(BidirectionalScan(2, 6, length, 2, 4) for length in (1, 2, 7, 49, 63, 131, 197)),
    *(BidirectionalScan(1, 5, 33, 3, state) for state in (1, 3, 16)),
    *(BidirectionalScan(1, channels, 40, 20, 8) for channels in (1, 3, 96)),
    *(BidirectionalScan(2, 6, 9, 2, 4, width=width, scale=1.0) for width in (1, 3, 5)),
    BidirectionalScan(2, 6, 35, 2, 4, directions=1),
    BidirectionalScan(1, 4, 40, 2, 8, step=30.0),
    BidirectionalScan(1, 4, 40, 2, 8, step=-20.0),
    *(BidirectionalGla(2, length, 2, 8, 12, norm=length % 2 == 0) for length in (1, 2, 7, 49, 63, 131, 196)),
    *(BidirectionalGla(1, 40, 1, keys, values) for keys, values in ((1, 1), (3, 5), (16, 32), (32, 64), (20, 48))),
    BidirectionalGla(1, 290, 1, 64, 128, norm=True),
    *(BidirectionalGla(1, 70, 3, 16, 8, decay=decay) for decay in (-8.0, -1.0, -0.3, 0.0)),
    *(Conv1d(2, 6, length, reverse=length % 2 == 0) for length in (1, 2, 7, 49, 131, 197)),
    *(Conv1d(1, channels, 33, 3, bias=False, padding="same") for channels in (1, 3, 96, 392)),
    *(Conv1d(2, 5, 9, width, activation=None, reverse=True, padding="same") for width in (1, 2, 3, 4)),
    *(Conv1d(2, 6, 21, width, reverse=width == 2, channel_last=False) for width in (1, 2, 3, 4)),
    *(AddNorm(2, length, 24, norm) for length in (1, 7, 131) for norm in ("rms", "layer")),
    *(AddNorm(3, 5, channels, "layer", bias=True, drop=True) for channels in (3, 192, 1000, 4096)),
    *(AddNorm(2, 9, 40, norm, residual=False, bias=norm == "layer") for norm in ("rms", "layer")),
    AddNorm(3, 5, 33, bias=True, drop=True),
    *(AddNorm(2, 9, channels, norm, bias=True, alone=True) for channels, norm in ((1, "rms"), (96, "layer"))),
    *(SwiGlu(2, length, hidden) for length, hidden in ((1, 1), (7, 3), (49, 352), (131, 40))),
    *(Gate(2, 9, heads, values) for heads, values in ((1, 1), (3, 64), (5, 20), (12, 32))),
    *(Gate(1, length, 3, 32, silu=True, bias=True) for length in (1, 7, 131)),
    *(BiasActivation(2, 9, channels, "gelu_tanh") for channels in (1, 3, 80, 300)),
    *(BiasActivation(2, length, 40, "relu", residual=length > 1) for length in (1, 131)),
    BiasActivation(2, 9, 33, residual=True),
]

# Few programs each: interpreting a kernel costs seconds.
INTERPRETED = [
    Scan(1, 5, 1, 1),
    Scan(1, 6, 19, 3, groups=2, gate=True),
    Scan(1, 5, 35, 1, reverse=True, skip=False, bias=False, softplus=False),
    Scan2d(1, 6, 5, 7, 3, 1),
    Scan2d(1, 33, 3, 6, 2, 2, channel_last=False),
    BidirectionalScan(1, 5, 20, 2, 2),
    BidirectionalScan(1, 33, 35, 3, 1, 3, directions=1),
    Conv1d(2, 5, 18),
    Conv1d(1, 70, 21, 3, bias=False, activation=None, reverse=True, padding="same"),
    Conv1d(1, 3, 17, 2, reverse=True, channel_last=False),
    AddNorm(2, 17, 40),
    AddNorm(2, 17, 600, "layer", bias=True, drop=True),
    AddNorm(2, 17, 24, "layer", residual=False),
    AddNorm(2, 17, 33, "layer", bias=True, alone=True),
    SwiGlu(2, 17, 33),
    SwiGlu(1, 5, 130),
    Gate(2, 35, 3, 32, silu=True, bias=True),
    Gate(1, 17, 2, 20),
    BiasActivation(2, 70, 33, "gelu_tanh", residual=True),
    BiasActivation(1, 5, 300, "relu"),
    BidirectionalGla(1, 1, 1, 1, 1),
    BidirectionalGla(1, 70, 2, 12, 24, norm=True),
    BidirectionalGla(1, 70, 1, 8, 40, decay=-8.0),
]

LARGE = [
    *(Scan(2, 96, length, 1) for length in (1000, 3136, 60800)),
    *(Scan(2, 392, 196, 8, gate=True, reverse=reverse) for reverse in (False, True)),
    Scan(4, 384, 197, 16, gate=True),
    Scan(1, 40, 3136, 64, reverse=True),
    Scan(2, 96, 1000, 16, groups=4),
    *(Scan2d(2, 96, h, w, 6, 1) for h, w in ((56, 56), (200, 304), (13, 640), (640, 13), (75, 107))),
    Scan2d(1, 16, 300, 400, 4, 1),
    Scan2d(8, 192, 28, 28, 12, 1),
    Scan2d(8, 768, 7, 7, 48, 1),
    Scan2d(2, 192, 56, 56, 6, 16),
    Scan2d(2, 384, 50, 76, 12, 1, channel_last=False),
    BidirectionalScan(8, 384, 197, 12, 16),
    BidirectionalScan(2, 392, 196, 24, 8, width=3),
    BidirectionalScan(2, 384, 4097, 12, 16),
    BidirectionalScan(1, 96, 16129, 12, 1),
    BidirectionalScan(1, 96, 1000, 48, 64),
    BidirectionalScan(4, 768, 197, 24, 16, directions=1),
    Conv1d(16, 384, 197),
    Conv1d(2, 392, 3136, 3, bias=False, padding="same"),
    Conv1d(1, 96, 60800, reverse=True),
    Conv1d(2, 160, 1000, channel_last=False),
    AddNorm(16, 197, 192),
    AddNorm(2, 3136, 384, "layer", bias=True, drop=True),
    AddNorm(2, 1000, 768, residual=False),
    AddNorm(2, 300, 8192, drop=True),
    AddNorm(4, 3136, 96, "layer", bias=True, alone=True),
    SwiGlu(16, 196, 512),
    SwiGlu(2, 3136, 352),
    Gate(16, 196, 3, 64, silu=True, bias=True),
    Gate(2, 3136, 4, 32, bias=True),
    Gate(1, 49, 32, 32),
    *(BiasActivation(2, 12544, channels, activation) for channels, activation in ((32, "relu"), (80, "gelu_tanh"))),
    BiasActivation(4, 784, 160, residual=True),
    BidirectionalGla(100, 196, 3, 32, 64, norm=True),
    *(BidirectionalGla(2, length, 3, 16, 32) for length in (1000, 3136, 60800)),
    BidirectionalGla(4, 4096, 3, 32, 64),
    BidirectionalGla(8, 250, 3, 16, 32, norm=True),
    BidirectionalGla(2, 300, 24, 24, 48, norm=True),
    *(BidirectionalGla(2, 1000, 4, 32, 64, decay=decay) for decay in (-8.0, -1.0, 0.0)),
]


# One of each operator whose result may have a dtype of its own.
WITH_OUT_DTYPE = [
    Scan(2, 4, 9, 3, gate=True),
    Scan2d(2, 4, 3, 5, 2, 1),
    BidirectionalScan(2, 4, 9, 2, 3),
    BidirectionalScan(2, 4, 9, 2, 3, directions=1),
    BidirectionalGla(2, 9, 2, 4, 8, norm=True),
    Conv1d(2, 4, 9),
    AddNorm(2, 9, 8),
]


def laid_out_as_in_models(inputs: list) -> list:
    """Inputs of a Scan whose channels are adjacent and whose weights are slices of one projection."""
    u, delta, A, B, C, D, z, bias = inputs
    u, delta, z = (None if t is None else t.transpose(1, 2).contiguous().transpose(1, 2) for t in (u, delta, z))
    # (B, L, 3 + 2 G N), the first three values being somebody else's
    projected = (
        torch.cat([B[:, 0, :1].repeat(1, 3, 1), B.flatten(1, 2), C.flatten(1, 2)], 1).transpose(1, 2).contiguous()
    )
    size = B.shape[1] * B.shape[2]
    B, C = (projected[..., i : i + size].transpose(1, 2).view_as(t) for i, t in ((3, B), (3 + size, C)))
    return [u, delta, A, B, C, D, z, bias]


def case_id(case) -> str:
    """Readable test id."""
    return type(case).__name__ + "-" + "-".join(f"{k}{v}" for k, v in case._asdict().items() if v not in (None, False))
