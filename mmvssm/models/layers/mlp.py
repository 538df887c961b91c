"""Two-layer perceptron of the transformer kind."""

import torch
from mmengine.model import BaseModule

from .activation import build_activation
from .converted import Linear


class Mlp(BaseModule):
    """Linear, activation, Linear over the last axis.

    Args:
        embed_dims: Input and output width C.
        hidden_dims: Width of the hidden layer.
        act: Name of the activation, see :func:`build_activation`.
        init_cfg: Initialisation config of mmengine.
    """

    def __init__(self, embed_dims: int, hidden_dims: int, act: str | None = "gelu", init_cfg: dict | None = None):
        super().__init__(init_cfg)
        self.fc1 = Linear(embed_dims, hidden_dims)
        self.act = build_activation(act, "mlp_act")
        self.fc2 = Linear(hidden_dims, embed_dims)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (..., C) to (..., C)."""
        return self.fc2(self.act(self.fc1(x)))
