"""ViG and ViG-H (https://arxiv.org/abs/2405.18425): bidirectional gated linear attention, plain and as a pyramid."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from mmengine.model import BaseModule, ModuleList
from torch import nn
from torch.nn import functional as F

from mmvssm.registry import MODELS

from ..layers import (
    ConvDownsample,
    ConvPatchEmbed,
    DropPath,
    LayerNorm,
    SwiGLU,
    conv_channel_last,
    drop_casts,
    drop_path_rates,
    run_emptying,
    swiglu_width,
)
from ..layers.activation import ACTIVATIONS
from ..layers.add_norm import AddLayerNorm, AddRMSNorm
from ..layers.patch_embed import image_to_channel_last
from ..mixers import BidirectionalGLA
from .base import REQUIRED, BaseBackbone, depths_and_widths


class Stream(NamedTuple):
    """A residual stream and the output of the last branch, which the next norm adds to it while it normalises.

    Attributes:
        x: Output of the last branch (B, H, W, C), or the stream itself where it begins.
        residual: The stream before that branch (B, H, W, C), or None where it begins.
        scale: Factor of ``x`` for every sample (B): stochastic depth; None for 1.
    """

    x: torch.Tensor
    residual: torch.Tensor | None = None
    scale: torch.Tensor | None = None

    def total(self) -> torch.Tensor:
        """The stream with the branch added (B, H, W, C), in the dtype of the branch."""
        if self.residual is None:
            return self.x
        x = self.x if self.scale is None else self.x * self.scale.view(-1, 1, 1, 1)
        return (self.residual + x).to(self.x.dtype)


class ViGBlock(BaseModule):
    """Pre-norm residual block: bidirectional gated linear attention, then a gated perceptron; channel-last.

    Args:
        embed_dims: Width C.
        norm: Class of the two norms, called with the width.
        hidden_dims: Hidden width of the perceptron.
        drop_path: Rate of stochastic depth for both branches.
        mixer: Further arguments of :class:`BidirectionalGLA`.
        init_cfg: Initialisation config of mmengine.
    """

    def __init__(
        self,
        embed_dims: int,
        norm: Callable[[int], nn.Module],
        hidden_dims: int,
        drop_path: float = 0.0,
        mixer: dict[str, Any] | None = None,
        init_cfg: dict | None = None,
    ):
        super().__init__(init_cfg)
        self.norm1 = norm(embed_dims)
        self.mixer = BidirectionalGLA(embed_dims, **(mixer or {}))
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm(embed_dims)
        self.mlp = SwiGLU(embed_dims, hidden_dims)

    def forward(
        self,
        x: torch.Tensor | list[torch.Tensor | None],
        residual: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
    ) -> Stream:
        """Pass a stream through the block, given as the members of :class:`Stream` or as a list of them.

        The list is emptied, so that the memory of its tensors is free while the block runs.
        """
        if isinstance(x, list):
            scale, residual, x = x.pop(), x.pop(), x.pop()
        x, residual = self.norm1(x, residual, scale)
        x = self.mixer(x)
        x, residual = self.norm2(x, residual, self.drop_path.sample_scale(x))
        return Stream(self.mlp(x), residual, self.drop_path.sample_scale(x))


# ---------------------------------------------------------------------- plain


class PlainStem(BaseModule):
    """Stem of stride 16: convolutions of kernel 9, stride 8 and kernel 3, stride 2, each with LayerNorm, SiLU between.

    Both pad by 1, so the grid is ceil(n1 / 2) with n1 = floor((size - 7) / 8) + 1: size / 16 for multiples of 16, but
    not always ceil(size / 16) for other sizes.

    Args:
        in_channels: Channels of the image.
        embed_dims: Output width C, even.
        init_cfg: Initialisation config of mmengine.
    """

    stride = 16
    min_size = 7

    def __init__(self, in_channels: int, embed_dims: int, init_cfg: dict | None = None):
        super().__init__(init_cfg)
        self.conv1 = nn.Conv2d(in_channels, embed_dims // 2, kernel_size=9, stride=8, padding=1)
        self.norm1 = LayerNorm(embed_dims // 2)
        self.act = nn.SiLU()
        self.conv2 = nn.Conv2d(embed_dims // 2, embed_dims, kernel_size=3, stride=2, padding=1)
        self.norm2 = LayerNorm(embed_dims)

    @staticmethod
    def grid(size: tuple[int, int]) -> tuple[int, int]:
        """Grid of an image of ``size`` (height, width)."""
        height, width = (((side - 7) // 8 + 2) // 2 for side in size)
        return height, width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, C_in, H, W) to (B, H', W', C)."""
        x = self.norm1(conv_channel_last(self.conv1, image_to_channel_last(x)))
        return self.norm2(conv_channel_last(self.conv2, self.act(x)))


@MODELS.register_module()
class ViG(BaseBackbone):
    """Plain ViG: blocks at one width on a grid of stride 16, with an absolute position embedding.

    Inside, activations are (B, H, W, C) in memory. Height and width are free and independent, from 7 x 7 pixels on; the
    position embedding is resized bicubically to the grid at hand.

    Args:
        arch: Name of a published variant ('tiny', 'small', 'base'), or a dict with the keys

            - ``embed_dims``: width (required);
            - ``depth``: number of blocks;
            - ``head_dims``: value channels per head; key channels are half as many;
            - ``conv_act``, ``out_act``: activations after the depthwise convolution and before the output projection
              of the mixer: 'silu', 'gelu', 'relu' or None;
            - ``mlp_multiple``: the hidden width of the perceptrons is 8/3 of the width, rounded up to a multiple of it;
            - ``drop_path_rate``: rate of the published ImageNet training.

            Keys left out are those of 'small'.
        in_channels: Channels of the input.
        img_size: Input size, an integer or (height, width), for whose grid the position embedding is made.
        out_indices: Blocks after which the features are returned, increasing; negative ones count from the end. The
            map after the last block is normalised by the final norm, the others are the residual stream as it is.
            Blocks after the last index are kept for loading, do not run and hold no gradients.
        drop_path_rate: Largest rate of stochastic depth (rates grow linearly from 0), in [0, 1); None takes the
            arch's.
        frozen_stages: -1 freezes nothing, 0 the stem and the position embedding, i also the first i blocks.
        norm_eval: Keeps batch-statistics layers in eval mode. ViG has none, so that nothing changes.
        with_cp: Whether blocks recompute their activations in the backward pass: less memory, same gradients.
        eval_merge: Weight of the sum of the two scan directions in eval mode. Training takes 1/2, but the authors'
            evaluation of the plain models 1/4, with which the published accuracies were measured; the norm that
            follows leaves of this a difference of about 3e-4 in the features.
        init_cfg: Initialisation config of mmengine, see :class:`BaseBackbone`.

    Example:
        >>> import torch
        >>> from mmvssm.models import ViG
        >>> net = ViG("tiny", out_indices=(2, 5, 8, 11)).eval()
        >>> [tuple(x.shape) for x in net(torch.rand(1, 3, 64, 96))]
        [(1, 192, 4, 6), (1, 192, 4, 6), (1, 192, 4, 6), (1, 192, 4, 6)]
    """

    family = "vig"
    no_weight_decay_params = ("pos_embed",)
    default_init_cfg: ClassVar = [
        dict(type="Normal", layer="Linear", std=0.02, bias=0.0),
        dict(type="Constant", layer="LayerNorm", val=1.0, bias=0.0),
    ]
    arch_keys: ClassVar = dict(
        embed_dims=REQUIRED,
        depth=12,
        head_dims=64,
        conv_act=None,
        out_act=None,
        mlp_multiple=256,
        drop_path_rate=0.0,
    )
    arch_zoo: ClassVar = {
        "tiny": dict(embed_dims=192, conv_act="silu", out_act="silu"),
        "small": dict(embed_dims=384, drop_path_rate=0.2),
        "base": dict(embed_dims=768, drop_path_rate=0.5),
    }

    def __init__(
        self,
        arch: str | dict = "tiny",
        in_channels: int = 3,
        img_size: int | Sequence[int] = 224,
        out_indices: int | Sequence[int] = (-1,),
        drop_path_rate: float | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        eval_merge: float = 0.25,
        init_cfg: dict | list[dict] | None = None,
        **unknown: Any,
    ):
        self.reject_unknown(unknown)
        super().__init__(in_channels, img_size, frozen_stages, norm_eval, with_cp, init_cfg)
        spec = self.resolve_arch(arch)
        self.arch = spec
        self.embed_dims, self.depth = spec["embed_dims"], spec["depth"]
        self.drop_path_rate = spec["drop_path_rate"] if drop_path_rate is None else drop_path_rate
        _check_arch(spec, self.drop_path_rate)
        _check_positive("depth", self.depth)
        for name in ("conv_act", "out_act"):
            if spec[name] not in tuple(ACTIVATIONS):
                raise ValueError(f"{name}={spec[name]!r} is unknown; choose one of {', '.join(map(repr, ACTIVATIONS))}")
        if self.img_size is None or min(self.img_size) < PlainStem.min_size:
            raise ValueError(
                f"img_size={img_size!r} must be at least {PlainStem.min_size}: an integer or a pair of them"
            )
        if isinstance(eval_merge, bool) or not isinstance(eval_merge, (int, float)) or eval_merge <= 0:
            raise ValueError(f"eval_merge={eval_merge!r} must be a positive number")

        self.patch_embed = PlainStem(in_channels, self.embed_dims)
        # With its grid, so that a file says for which rectangle it was made.
        self.pos_embed = nn.Parameter(torch.empty(1, *PlainStem.grid(self.img_size), self.embed_dims))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        mixer = dict(
            head_dims=spec["head_dims"], conv_act=spec["conv_act"], out_act=spec["out_act"], eval_merge=eval_merge
        )
        hidden = swiglu_width(self.embed_dims, spec["mlp_multiple"])
        (rates,) = drop_path_rates(self.drop_path_rate, (self.depth,))
        norm = partial(AddRMSNorm, eps=1e-6)
        self.blocks = ModuleList([ViGBlock(self.embed_dims, norm, hidden, rate, mixer) for rate in rates])
        self.norm = norm(self.embed_dims)
        self.set_outputs(out_indices, (self.embed_dims,) * self.depth, (PlainStem.stride,) * self.depth)
        self.freeze()

    @drop_casts
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Extract the feature maps of ``out_indices``.

        Args:
            x: Images (B, in_channels, H, W), floating point.

        Returns:
            One contiguous (B, C, h, w) map per out index, about H / 16 and W / 16 large (see :class:`PlainStem`).

        Raises:
            ValueError: If the shape or dtype does not fit.
        """
        self.check_input(x, self.patch_embed.min_size)
        stream = list(Stream(self._embed(x)))
        outs = []
        for i, block in enumerate(self.blocks):
            stream = list(run_emptying(block, stream, with_cp=self.with_cp))
            if i in self.out_indices:
                out = self.norm(*stream)[0] if i == self.depth - 1 else Stream(*stream).total()
                outs.append(out.permute(0, 3, 1, 2).contiguous())
            if i == self.out_indices[-1]:
                break
        return tuple(outs)

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        """Images to patches with their positions, (B, H, W, C)."""
        x = self.patch_embed(x)
        return x + self._position_embedding(x.shape[1:3]).to(x.dtype)

    def _position_embedding(self, grid: torch.Size) -> torch.Tensor:
        """The embedding (1, H, W, C) for a grid."""
        # A traced program serves all sizes; resizing to the same size changes nothing.
        if not torch.compiler.is_compiling() and self.pos_embed.shape[1:3] == grid:
            return self.pos_embed
        return resize_position_embedding(self.pos_embed, grid)

    def freeze_groups(self) -> list[list[nn.Module | nn.Parameter]]:
        """The stem with the position embedding, then every block; the final norm belongs to the last one."""
        blocks = [[block] for block in self.blocks]
        blocks[-1].append(self.norm)
        return [[self.patch_embed, self.pos_embed], *blocks]

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """Depth of a parameter for layer-wise learning-rate decay, as in mmpretrain.

        Stem and position embedding are 0, blocks count from 1, the rest has the last depth.

        Args:
            param_name: Name of the parameter.
            prefix: Prefix of the backbone's names, e.g. 'backbone.'.

        Returns:
            Depth and number of depths.
        """
        num_layers = self.depth + 2
        if param_name.startswith(prefix):
            first, *rest = param_name[len(prefix) :].split(".")
            if first in ("patch_embed", "pos_embed"):
                return 0, num_layers
            if first == "blocks":
                return int(rest[0]) + 1, num_layers
        return num_layers - 1, num_layers


def resize_position_embedding(pos_embed: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """Resize (1, H, W, C) bicubically to (1, *grid, C), in float32 at least, as the authors' code does."""
    maps = pos_embed.to(torch.promote_types(pos_embed.dtype, torch.float32)).permute(0, 3, 1, 2)
    resized = F.interpolate(maps, size=tuple(grid), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).to(pos_embed.dtype)


# ---------------------------------------------------------------------- pyramid


class ViGHStage(BaseModule):
    """Downsampling (from the second stage on), then blocks at one width; channel-last.

    Args:
        downsample: The layer that halves the grid, or None.
        blocks: The blocks.
        with_cp: Whether the blocks recompute their activations in the backward pass.
        init_cfg: Initialisation config of mmengine.
    """

    def __init__(
        self,
        downsample: nn.Module | None,
        blocks: Sequence[nn.Module],
        with_cp: bool = False,
        init_cfg: dict | None = None,
    ):
        super().__init__(init_cfg)
        self.downsample = downsample
        self.blocks = ModuleList(blocks)
        self.with_cp = with_cp

    def forward(self, x: torch.Tensor) -> Stream:
        """Map (B, H, W, C) of the stage before to the stream (B, H', W', C') of this one."""
        stream = list(Stream(x if self.downsample is None else self.downsample(x)))
        del x
        for block in self.blocks:
            stream = list(run_emptying(block, stream, with_cp=self.with_cp))
        return Stream(*stream)


@MODELS.register_module()
class ViGH(BaseBackbone):
    """ViG-H: four stages of strides 4 to 32, with a LayerNorm on every output.

    Inside, activations are (B, H, W, C) in memory from the stem to the output norms. Height and width are free and
    independent, from 1 x 1 pixel on; every convolution of stride 2 rounds the grid up.

    Args:
        arch: Name of a published variant ('tiny', 'small', 'base'), or a dict with the keys

            - ``embed_dims``: width of the first stage, doubled from stage to stage, or one width per stage (required);
            - ``depths``: blocks per stage (required);
            - ``head_dims``: value channels per head; key channels are half as many;
            - ``mlp_multiple``: the hidden width of the perceptrons is 8/3 of the width, rounded up to a multiple of it;
            - ``drop_path_rate``: rate of the published ImageNet training.
        in_channels: Channels of the input.
        img_size: Accepted because other families need it; ViG-H has no parameter that depends on the size.
        out_indices: Stages to return, increasing; negative ones count from the end. Stages after the last one are kept
            for loading, do not run and hold no gradients.
        drop_path_rate: Largest rate of stochastic depth (rates grow linearly from 0), in [0, 1); None takes the
            arch's.
        frozen_stages: -1 freezes nothing, 0 the stem, i the stem and the first i stages with their output norms. The
            downsampling layer counts to the stage that it leads to.
        norm_eval: Keeps batch-statistics layers in eval mode. ViG-H has none, so that nothing changes.
        with_cp: Whether blocks recompute their activations in the backward pass: less memory, same gradients.
        init_cfg: Initialisation config of mmengine, see :class:`BaseBackbone`.

    Example:
        >>> import torch
        >>> from mmvssm.models import ViGH
        >>> net = ViGH("tiny").eval()
        >>> [tuple(x.shape) for x in net(torch.rand(1, 3, 64, 96))]
        [(1, 96, 16, 24), (1, 192, 8, 12), (1, 384, 4, 6), (1, 768, 2, 3)]
    """

    family = "vig"
    arch_keys: ClassVar = dict(embed_dims=REQUIRED, depths=REQUIRED, head_dims=32, mlp_multiple=32, drop_path_rate=0.0)
    arch_zoo: ClassVar = {
        "tiny": dict(embed_dims=96, depths=(2, 2, 5, 2), drop_path_rate=0.2),
        "small": dict(embed_dims=96, depths=(2, 2, 17, 2), drop_path_rate=0.3),
        "base": dict(embed_dims=128, depths=(2, 2, 17, 2), drop_path_rate=0.6),
    }

    def __init__(
        self,
        arch: str | dict = "tiny",
        in_channels: int = 3,
        img_size: int | Sequence[int] | None = None,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
        **unknown: Any,
    ):
        self.reject_unknown(unknown)
        super().__init__(in_channels, img_size, frozen_stages, norm_eval, with_cp, init_cfg)
        spec = self.resolve_arch(arch)
        self.arch = spec
        self.depths, self.embed_dims = depths_and_widths(spec["depths"], spec["embed_dims"])
        self.drop_path_rate = spec["drop_path_rate"] if drop_path_rate is None else drop_path_rate
        _check_arch(spec, self.drop_path_rate)

        self.patch_embed = ConvPatchEmbed(in_channels, self.embed_dims[0])
        # The published runs drew all linear layers alike (default_init_cfg), unlike those of the plain family.
        mixer = dict(head_dims=spec["head_dims"], xavier_init=False)
        rates = drop_path_rates(self.drop_path_rate, self.depths)
        self.stages = ModuleList()
        for i, width in enumerate(self.embed_dims):
            hidden = swiglu_width(width, spec["mlp_multiple"])
            blocks = [ViGBlock(width, AddLayerNorm, hidden, rate, mixer) for rate in rates[i]]
            downsample = ConvDownsample(self.embed_dims[i - 1], width) if i else None
            self.stages.append(ViGHStage(downsample, blocks, with_cp))

        strides = [self.patch_embed.stride * 2**i for i in range(len(self.depths))]
        self.set_outputs(out_indices, self.embed_dims, strides)
        for i in self.out_indices:
            self.add_module(f"norm{i}", AddLayerNorm(self.embed_dims[i]))
        self.freeze()

    @drop_casts
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Extract the feature maps of ``out_indices``.

        Args:
            x: Images (B, in_channels, H, W), floating point.

        Returns:
            One contiguous (B, C_i, H_i, W_i) map per out index.

        Raises:
            ValueError: If the shape or dtype does not fit.
        """
        self.check_input(x, self.patch_embed.min_size)
        x = self.patch_embed(x)
        outs = []
        for i, stage in enumerate(self.stages):
            stream = stage(x)
            if i in self.out_indices:
                out, x = getattr(self, f"norm{i}")(*stream)
                x = x.to(out.dtype)
                outs.append(out.permute(0, 3, 1, 2).contiguous())
            else:
                x = stream.total()
            if i == self.out_indices[-1]:
                break
        return tuple(outs)


# ---------------------------------------------------------------------- checks of the arguments


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be a positive integer")


def _check_arch(spec: dict[str, Any], drop_path_rate: Any) -> None:
    """What both families have; widths and depths of the pyramid are checked by their own function."""
    if not isinstance(spec["embed_dims"], Sequence):
        _check_positive("embed_dims", spec["embed_dims"])
    _check_positive("mlp_multiple", spec["mlp_multiple"])
    if isinstance(drop_path_rate, bool) or not isinstance(drop_path_rate, (int, float)):
        raise TypeError(f"drop_path_rate={drop_path_rate!r} must be a number")
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f"drop_path_rate={drop_path_rate!r} must be in [0, 1)")
