"""Small layers that the families share."""

from .activation import build_activation
from .channel_last import conv_channel_last
from .checkpointing import run_block
from .downsample import ConvDownsample, PatchMerging
from .drop_path import DropPath, drop_path_rates
from .mlp import Mlp
from .patch_embed import ConvPatchEmbed, PatchEmbed
from .precision import autocast_enabled

__all__ = [
    "ConvDownsample",
    "ConvPatchEmbed",
    "DropPath",
    "Mlp",
    "PatchEmbed",
    "PatchMerging",
    "autocast_enabled",
    "build_activation",
    "conv_channel_last",
    "drop_path_rates",
    "run_block",
]
