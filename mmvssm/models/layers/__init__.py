"""Small layers that the families share."""

from .activation import build_activation
from .add_norm import ADD_NORMS, AddLayerNorm, AddRMSNorm
from .channel_last import conv_channel_last
from .checkpointing import run_block, run_emptying
from .converted import Conv2d, Linear
from .downsample import ConvDownsample, PatchMerging
from .drop_path import DropPath, drop_path_rates
from .fused_conv import FusedConv
from .grid_cache import GridCache
from .layer_norm_2d import LayerNorm2d
from .locality_gate import LocalityGate
from .mlp import Mlp
from .norm import LayerNorm
from .padded_patch_embed import PaddedPatchEmbed
from .patch_embed import ConvPatchEmbed, PatchEmbed
from .position import (
    CLASS_POSITIONS,
    class_indices,
    insert_class_rows,
    resize_position_embedding,
    split_class_rows,
    square_grid,
)
from .precision import autocast_enabled, drop_casts
from .rope import GridRope
from .swiglu import SwiGLU, swiglu_width
from .windows import WindowGrid, merge_windows, partition_windows

__all__ = [
    "ADD_NORMS",
    "CLASS_POSITIONS",
    "AddLayerNorm",
    "AddRMSNorm",
    "Conv2d",
    "ConvDownsample",
    "ConvPatchEmbed",
    "DropPath",
    "FusedConv",
    "GridCache",
    "GridRope",
    "LayerNorm",
    "LayerNorm2d",
    "Linear",
    "LocalityGate",
    "Mlp",
    "PaddedPatchEmbed",
    "PatchEmbed",
    "PatchMerging",
    "SwiGLU",
    "WindowGrid",
    "autocast_enabled",
    "build_activation",
    "class_indices",
    "conv_channel_last",
    "drop_casts",
    "drop_path_rates",
    "insert_class_rows",
    "merge_windows",
    "partition_windows",
    "resize_position_embedding",
    "run_block",
    "run_emptying",
    "split_class_rows",
    "square_grid",
    "swiglu_width",
]
