"""Four levels from a plain backbone by deconvolution and pooling, for segmentation heads."""

from collections.abc import Sequence

import torch
from mmengine.model import BaseModule, ModuleList, Sequential

from mmvssm.registry import MODELS

from .rescale import STRIDES, check_maps, check_settings, check_widths, rescale_layers


@MODELS.register_module()
class DeconvPyramid(BaseModule):
    """Brings the maps of a plain backbone, all of one stride, to the strides 4, 8, 16 and 32.

    For a backbone of stride 16: two deconvolutions with norm and GELU between them, one deconvolution, the map itself,
    and a 2 x 2 maximum. Every level keeps its width. BEiT (https://arxiv.org/abs/2106.08254) feeds UperNet this way,
    and so do the published segmentation models of Vim.

    Args:
        in_channels: Widths of the four maps, shallowest first; or one width, of one map that feeds all levels.
        stride: Stride of the maps: 16, 8 or 4.
        norm: Norm between two deconvolutions: 'SyncBN' (batch statistics over all GPUs), 'BN' or 'LN' (over channels).
        init_cfg: Initialisation config of mmengine.

    Attributes:
        in_channels: Widths of the maps that go in, as a list.
        out_channels: Widths of the four levels, as a list.

    Example:
        >>> import torch
        >>> from mmvssm.models import DeconvPyramid
        >>> neck = DeconvPyramid([8, 8, 8, 8]).eval()
        >>> [tuple(x.shape) for x in neck([torch.rand(1, 8, 5, 7) for _ in range(4)])]
        [(1, 8, 20, 28), (1, 8, 10, 14), (1, 8, 5, 7), (1, 8, 2, 3)]
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        stride: int = 16,
        norm: str = "SyncBN",
        init_cfg: dict | list[dict] | None = None,
    ):
        super().__init__(init_cfg)
        check_settings(stride, norm)
        self.in_channels = check_widths(in_channels, (1, len(STRIDES)))
        self.out_channels = self.in_channels if len(self.in_channels) > 1 else self.in_channels * len(STRIDES)
        self.levels = ModuleList(
            Sequential(*rescale_layers(width, (width, width), stride, out_stride, norm))
            for width, out_stride in zip(self.out_channels, STRIDES, strict=True)
        )

    def forward(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Build the pyramid.

        Args:
            inputs: One (B, C_i, H, W) map per entry of ``in_channels``.

        Returns:
            Four contiguous maps (B, C_i, H_i, W_i), finest first; the coarser grids are floor(size / 2), at least 1.

        Raises:
            ValueError: If the maps do not fit ``in_channels``.
        """
        check_maps(inputs, self.in_channels, type(self).__name__)
        maps = inputs if len(inputs) > 1 else [inputs[0]] * len(self.levels)
        return tuple(level(x).contiguous() for level, x in zip(self.levels, maps, strict=True))
