"""Addition to a residual stream and the norm that follows, as one module."""

import torch
from torch import nn

from mmvssm_kernels import add_norm


class AddRMSNorm(nn.RMSNorm):
    """RMSNorm of a residual stream to which a branch is added first.

    The sum and the statistics are float32, whatever autocast says.

    Args:
        embed_dims: Width C.
        eps: Added to the mean square.
    """

    kind = "rms"

    def __init__(self, embed_dims: int, eps: float = 1e-5):
        super().__init__(embed_dims, eps=eps)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        residual_dtype: torch.dtype | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add and normalise.

        Args:
            x: Output of a branch (B, ..., C).
            residual: Residual stream of the same shape, or None where it begins.
            scale: Factor of ``x`` per sample (B), or None: stochastic depth.
            residual_dtype: Dtype of the returned stream; None for float32.
            out_dtype: Dtype of the normalised stream; None for that of ``x``.

        Returns:
            The normalised stream, and the stream, which is ``x`` itself where nothing is added, scaled or converted.
        """
        bias = getattr(self, "bias", None)
        return add_norm(x, residual, self.weight, bias, self.eps, self.kind, scale, residual_dtype, out_dtype)


class AddLayerNorm(nn.LayerNorm):
    """LayerNorm of a residual stream to which a branch is added first; otherwise as :class:`AddRMSNorm`."""

    kind = "layer"

    def __init__(self, embed_dims: int, eps: float = 1e-5):
        super().__init__(embed_dims, eps=eps)

    forward = AddRMSNorm.forward


ADD_NORMS: dict[str, type[nn.Module]] = {"rms": AddRMSNorm, "layer": AddLayerNorm}
