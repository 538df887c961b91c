"""The gate that lets long and short context compete in ViG (https://arxiv.org/abs/2405.18425)."""

import torch
from torch import nn

from mmvssm_kernels import locality_gate

from .activation import build_activation


class LocalityGate(nn.Module):
    """act(s * long + (1 - s) * RMSNorm(x)) with s = sigmoid(logits + bias), the norm over the channels of each head.

    Args:
        embed_dims: Channels C of all heads together.
        head_dims: Channels per head V; the weight of the norm, of this length, is shared by all heads.
        eps: Added to the mean square.
        act: Activation of the result: 'silu', 'gelu', 'relu' or None.
    """

    def __init__(self, embed_dims: int, head_dims: int, eps: float = 1e-6, act: str | None = None):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(embed_dims))
        self.norm = nn.RMSNorm(head_dims, eps=eps)
        self.silu = act == "silu"  # inside the operator
        self.act = build_activation(None if self.silu else act, "out_act")

    def forward(self, long: torch.Tensor, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Mix two contexts.

        Args:
            long: Normalised long context (..., heads, V).
            x: Short context, the features around each token (..., heads, V).
            logits: Of the gate, without their bias (..., heads, V); strided views are fine.

        Returns:
            Contiguous (..., heads, V) in the dtype of ``long``.
        """
        return self.act(locality_gate(long, x, logits, self.norm.weight, self.bias, self.norm.eps, self.silu))
