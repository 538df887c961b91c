"""Multi-head self-attention over short sequences."""

import torch
from mmengine.model import BaseModule
from torch.nn import functional as F

from ..layers import Linear


class SelfAttention(BaseModule):
    """Softmax attention among all tokens of a sequence, without mask or position information.

    torch picks the kernel; on a GPU it is a fused one for any head width (widths that are no multiple of 8 are padded
    inside).

    Args:
        embed_dims: Width C.
        num_heads: Number of heads, a divisor of C.
        init_cfg: Initialisation config of mmengine.

    Raises:
        ValueError: If ``num_heads`` does not divide ``embed_dims``.
    """

    def __init__(self, embed_dims: int, num_heads: int, init_cfg: dict | None = None):
        super().__init__(init_cfg)
        if embed_dims % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide the width {embed_dims}")
        self.num_heads = num_heads
        self.qkv = Linear(embed_dims, 3 * embed_dims)
        self.proj = Linear(embed_dims, embed_dims)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, L, C) to (B, L, C)."""
        B, L, C = x.shape
        # (3, B, heads, L, C / heads), views only
        q, k, v = self.qkv(x).view(B, L, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(B, L, C))
