"""Vim's inner block in plain torch: both sequences are laid out time-first, as groups of one scan."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import computing_dtype
from ..selective_scan.torch_scan import scan_backward, scan_forward
from .parameters import ScanParameters, split_parameters


def _sequences(x: Tensor, directions: int) -> Tensor:
    """(B, L, E) to (L, B, K, E), every direction in its own scan order."""
    x = x.transpose(0, 1)
    return torch.stack([x, x.flip(0)][:directions], dim=2)


def _merge(sequences: Tensor) -> Tensor:
    """Adjoint of :func:`_sequences`: the sum of the directions (B, L, E)."""
    merged = sequences[:, :, 0]
    if sequences.shape[2] == 2:
        merged = merged + sequences[:, :, 1].flip(0)
    return merged.transpose(0, 1)


class _Block:
    """What forward and backward both need: convolved sequences, projections and parameters, in one dtype."""

    def __init__(self, xz: Tensor, parameters: list[Tensor]):
        dtype = computing_dtype(xz)
        stacked = (torch.stack(tensors).to(dtype) for tensors in zip(*split_parameters(parameters), strict=True))
        self.parameters = ScanParameters(*stacked)  # each (K, ...)
        x, self.z = xz.to(dtype).chunk(2, dim=-1)  # (B, L, E) each
        self.directions, self.channels, self.width = self.parameters.conv_weight.shape
        self.rank, self.state = self.parameters.dt_proj_weight.shape[2], self.parameters.A_log.shape[2]
        self.length = x.shape[1]
        self.padded = F.pad(_sequences(x, self.directions), (0, 0, 0, 0, 0, 0, self.width - 1, 0))
        # (L, B, K, E)
        self.convolved = self.parameters.conv_bias.expand(self.length, x.shape[0], -1, -1).clone()
        for k, tap in enumerate(self.taps()):
            self.convolved.addcmul_(self.padded[k : k + self.length], tap)
        self.u = F.silu(self.convolved)
        projected = torch.einsum("lbke,kce->lbkc", self.u, self.parameters.x_proj_weight)
        self.low_rank, B, C = projected.split([self.rank, self.state, self.state], dim=-1)
        delta = torch.einsum("lbkr,ker->lbke", self.low_rank, self.parameters.dt_proj_weight)
        self.A = -self.parameters.A_log.exp()
        self.arguments = (
            self.u.flatten(2),
            delta.flatten(2),
            self.A.flatten(0, 1),
            B.contiguous(),
            C.contiguous(),
            self.parameters.D.flatten(),
            self.parameters.dt_proj_bias.flatten(),
            True,
        )

    def taps(self) -> tuple[Tensor, ...]:
        """Weights (K, E) of the convolution, oldest token first."""
        return self.parameters.conv_weight.unbind(2)

    def scanned(self) -> Tensor:
        """Sum of both directions before the gate (B, L, E)."""
        y, _ = scan_forward(*self.arguments)
        return _merge(y.view(self.u.shape))


def bidirectional_forward(xz: Tensor, parameters: list[Tensor], scale: float) -> Tensor:
    """Result (B, L, E) in the computing dtype; ``parameters`` are those of the directions one after the other."""
    block = _Block(xz, parameters)
    return scale * block.scanned() * F.silu(block.z)


def bidirectional_backward(dout: Tensor, xz: Tensor, parameters: list[Tensor], scale: float) -> list[Tensor]:
    """Gradients of ``xz`` and of all parameters in the computing dtype."""
    block = _Block(xz, parameters)
    own = block.parameters
    dout = scale * dout.to(block.u.dtype)
    gate = torch.sigmoid(block.z)
    dz = dout * block.scanned() * gate * (1 + block.z * (1 - gate))
    dy = _sequences(dout * block.z * gate, block.directions)
    grads = scan_backward(dy.flatten(2), None, *block.arguments)
    ddelta = grads.delta.view(block.u.shape)
    dprojected = torch.cat([torch.einsum("lbke,ker->lbkr", ddelta, own.dt_proj_weight), grads.B, grads.C], dim=-1)
    du = grads.u.view(block.u.shape) + torch.einsum("lbkc,kce->lbke", dprojected, own.x_proj_weight)
    sigmoid = torch.sigmoid(block.convolved)
    dconvolved = du * sigmoid * (1 + block.convolved * (1 - sigmoid))
    dpadded = torch.zeros_like(block.padded)
    dconv_weight = torch.empty_like(own.conv_weight)
    for k, tap in enumerate(block.taps()):
        window = slice(k, k + block.length)
        dpadded[window].addcmul_(dconvolved, tap)
        dconv_weight[..., k] = (dconvolved * block.padded[window]).sum((0, 1))
    gradients = ScanParameters(
        conv_weight=dconv_weight,
        conv_bias=dconvolved.sum((0, 1)),
        x_proj_weight=torch.einsum("lbkc,lbke->kce", dprojected, block.u),
        dt_proj_weight=torch.einsum("lbke,lbkr->ker", ddelta, block.low_rank),
        dt_proj_bias=grads.delta_bias.view(block.directions, -1),
        A_log=grads.A.view(block.A.shape) * block.A,
        D=grads.D.view(block.directions, -1),
    )
    dxz = torch.cat([_merge(dpadded[block.width - 1 :]), dz], dim=-1)
    return [dxz, *(g[i] for i in range(block.directions) for g in gradients)]
