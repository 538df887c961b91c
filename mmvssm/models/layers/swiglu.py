"""Gated perceptron (https://arxiv.org/abs/2002.05202)."""

import torch
from mmengine.model import BaseModule

from mmvssm_kernels import swiglu

from .converted import Linear


def swiglu_width(embed_dims: int, multiple: int) -> int:
    """Hidden width that costs what a two-layer perceptron of width 4C does: 8C / 3, rounded up to ``multiple``."""
    return -(-int(8 * embed_dims / 3) // multiple) * multiple


class SwiGLU(BaseModule):
    """fc2(SiLU(a) * b) with [a | b] = fc1(x), without biases, over the last axis.

    Args:
        embed_dims: Input and output width C.
        hidden_dims: Width of a and of b.
        init_cfg: Initialisation config of mmengine.
    """

    def __init__(self, embed_dims: int, hidden_dims: int, init_cfg: dict | None = None):
        super().__init__(init_cfg)
        self.fc1 = Linear(embed_dims, 2 * hidden_dims, bias=False)
        self.fc2 = Linear(hidden_dims, embed_dims, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (..., C) to (..., C)."""
        return self.fc2(swiglu(self.fc1(x)))
