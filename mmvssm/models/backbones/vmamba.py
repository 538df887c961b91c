"""VMamba (https://arxiv.org/abs/2401.10166): a pyramid of blocks that scan the grid in four directions."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from mmengine.model import BaseModule, ModuleList, Sequential
from torch import nn

from mmvssm.registry import MODELS

from ..layers import (
    AddLayerNorm,
    ConvDownsample,
    ConvPatchEmbed,
    DropPath,
    LayerNorm,
    Mlp,
    PatchEmbed,
    PatchMerging,
    drop_casts,
    drop_path_rates,
    run_block,
)
from ..layers.activation import ACTIVATIONS
from ..mixers import SS2D
from .base import REQUIRED, BaseBackbone, check_choice, depths_and_widths

# First generation: gated blocks without MLP, many states, a float32 scan.
VANILLA = dict(
    ssm_ratio=2.0,
    d_state=16,
    gated=True,
    conv_bias=True,
    mlp_ratio=0.0,
    stem="patch",
    downsample="merge",
    fp32_core=True,
)

STEMS = {"patch": PatchEmbed, "conv": ConvPatchEmbed}
DOWNSAMPLES = ("merge", "conv2", "conv3")
ODD_SIZES = ("pad", "crop")


class VSSBlock(BaseModule):
    """Pre-norm residual block: SS2D, then an MLP unless its ratio is 0; channel-last.

    Args:
        embed_dims: Width C.
        drop_path: Rate of stochastic depth for both branches.
        mlp_ratio: Hidden width of the MLP as a multiple of C; 0 leaves the MLP out.
        mlp_act: Activation of the MLP.
        mixer: Further arguments of :class:`SS2D`.
        init_cfg: Initialisation config of mmengine.
    """

    def __init__(
        self,
        embed_dims: int,
        drop_path: float = 0.0,
        mlp_ratio: float = 4.0,
        mlp_act: str | None = "gelu",
        mixer: dict[str, Any] | None = None,
        init_cfg: dict | None = None,
    ):
        super().__init__(init_cfg)
        self.norm1 = AddLayerNorm(embed_dims)
        self.mixer = SS2D(embed_dims, **(mixer or {}))
        self.drop_path = DropPath(drop_path)
        self.has_mlp = mlp_ratio > 0
        if self.has_mlp:
            self.norm2 = AddLayerNorm(embed_dims)
            self.mlp = Mlp(embed_dims, int(mlp_ratio * embed_dims), mlp_act)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, scale: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Run the block. Every branch is added by the norm that follows it, in one pass over memory.

        Args:
            x: Output of the last branch of the block before (B, H, W, C); the stage's input in its first block.
            residual: Residual stream (B, H, W, C), to which ``x`` is still to be added; None in the first block.
            scale: Factor of ``x`` per sample (B), or None: stochastic depth.

        Returns:
            The same of this block.
        """
        dtype = x.dtype if residual is None else residual.dtype
        x, residual = self.norm1(x, residual, scale, dtype)
        x = self.mixer(x)
        if self.has_mlp:
            x, residual = self.norm2(x, residual, self.drop_path.sample_scale(x), dtype)
            x = self.mlp(x)
        return x, residual, self.drop_path.sample_scale(x)


class VMambaStage(BaseModule):
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
        self.blocks = Sequential(*blocks)
        self.with_cp = with_cp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, C) of the stage before to (B, H', W', C') of this one."""
        if self.downsample is not None:
            x = self.downsample(x)
        residual = scale = None
        for block in self.blocks:
            x, residual, scale = run_block(block, x, residual, scale, with_cp=self.with_cp)
        if scale is not None:
            x = x * scale.to(x.dtype)[:, None, None, None]
        return x if residual is None else residual + x


@MODELS.register_module()
class VMamba(BaseBackbone):
    """VMamba backbone of both published generations, with a LayerNorm on every output.

    Inside, activations are (B, H, W, C) in memory from the stem to the output norms. Height and width are free and
    independent: from 1 x 1 with the convolutional stem, from 4 x 4 with the patch stem.

    Args:
        arch: Name of a published variant ('tiny-s1l8', 'tiny-s2l5', 'small-s2l15', 'small-s1l20', 'base-s2l15',
            'base-s1l20', 'tiny-0220', 'v0-tiny', 'v0-small', 'v0-base'), or a dict with the keys

            - ``embed_dims``: width of the first stage, doubled from stage to stage, or one width per stage (required);
            - ``depths``: blocks per stage (required);
            - ``ssm_ratio``, ``d_state``, ``gated``, ``conv_bias``, ``fp32_core``: see :class:`SS2D`;
            - ``mlp_ratio``: hidden width of the MLP as a multiple of the width, 0 for blocks without MLP;
            - ``stem``: 'conv' (two 3x3 convolutions of stride 2) or 'patch' (one 4x4 convolution of stride 4);
            - ``downsample``: 'conv3', 'conv2' (strided convolution of that kernel) or 'merge' (patch merging);
            - ``drop_path_rate``: rate of the published ImageNet training.

            Keys left out are those of the second generation with ``ssm_ratio`` 1.
        in_channels: Channels of the input.
        img_size: Accepted because other families need it; VMamba has no parameter that depends on the size.
        out_indices: Stages to return, increasing; negative ones count from the end. Stages after the last one are kept
            for loading, do not run and hold no gradients.
        drop_path_rate: Largest rate of stochastic depth (rates grow linearly from 0), in [0, 1); None takes the
            arch's.
        frozen_stages: -1 freezes nothing, 0 the stem, i the stem and the first i stages with their output norms. The
            downsampling layer counts to the stage that it leads to.
        norm_eval: Keeps batch-statistics layers in eval mode. VMamba has none, so that nothing changes.
        with_cp: Whether blocks recompute their activations in the backward pass: less memory, same gradients.
        dt_rank: Rank of the step size, or 'auto' for ceil(width / 16).
        d_conv: Side of the depthwise kernel, odd; 1 leaves the convolution out.
        ssm_act: Activation of the scan branch: 'silu', 'gelu', 'relu' or None.
        gate_act: Activation of the gate where there is one; None gives a linear gate.
        out_act: Activation after the norm that follows the scan.
        mlp_act: Activation of the MLP.
        odd_size: What patch merging does with an odd last row or column: 'pad', or 'crop' as in the code that trained
            the first generation's downstream models. Other downsampling layers ignore it.
        init_cfg: Initialisation config of mmengine, see :class:`BaseBackbone`.

    Example:
        >>> import torch
        >>> from mmvssm.models import VMamba
        >>> net = VMamba("tiny-s1l8").eval()
        >>> [tuple(x.shape) for x in net(torch.rand(1, 3, 64, 96))]
        [(1, 96, 16, 24), (1, 192, 8, 12), (1, 384, 4, 6), (1, 768, 2, 3)]
    """

    family = "vmamba"
    arch_keys: ClassVar = dict(
        embed_dims=REQUIRED,
        depths=REQUIRED,
        ssm_ratio=1.0,
        d_state=1,
        gated=False,
        conv_bias=False,
        mlp_ratio=4.0,
        stem="conv",
        downsample="conv3",
        fp32_core=False,
        drop_path_rate=0.0,
    )
    arch_zoo: ClassVar = {
        "tiny-s1l8": dict(embed_dims=96, depths=(2, 2, 8, 2), ssm_ratio=1.0, drop_path_rate=0.2),
        "tiny-s2l5": dict(embed_dims=96, depths=(2, 2, 5, 2), ssm_ratio=2.0, drop_path_rate=0.2),
        "small-s2l15": dict(embed_dims=96, depths=(2, 2, 15, 2), ssm_ratio=2.0, drop_path_rate=0.3),
        "small-s1l20": dict(embed_dims=96, depths=(2, 2, 20, 2), ssm_ratio=1.0, drop_path_rate=0.3),
        "base-s2l15": dict(embed_dims=128, depths=(2, 2, 15, 2), ssm_ratio=2.0, drop_path_rate=0.6),
        "base-s1l20": dict(embed_dims=128, depths=(2, 2, 20, 2), ssm_ratio=1.0, drop_path_rate=0.5),
        "tiny-0220": dict(embed_dims=96, depths=(2, 2, 4, 2), ssm_ratio=2.0, gated=True, drop_path_rate=0.2),
        # The authors' config for v0-tiny says 0.2 and for v0-base 0.5; the names of the released files say these:
        "v0-tiny": dict(embed_dims=96, depths=(2, 2, 9, 2), drop_path_rate=0.1, **VANILLA),
        "v0-small": dict(embed_dims=96, depths=(2, 2, 27, 2), drop_path_rate=0.3, **VANILLA),
        "v0-base": dict(embed_dims=128, depths=(2, 2, 27, 2), drop_path_rate=0.6, **VANILLA),
    }

    def __init__(
        self,
        arch: str | dict = "tiny-s1l8",
        in_channels: int = 3,
        img_size: int | Sequence[int] | None = None,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        dt_rank: int | str = "auto",
        d_conv: int = 3,
        ssm_act: str | None = "silu",
        gate_act: str | None = "silu",
        out_act: str | None = None,
        mlp_act: str | None = "gelu",
        odd_size: str = "pad",
        init_cfg: dict | list[dict] | None = None,
        **unknown: Any,
    ):
        self.reject_unknown(unknown)
        super().__init__(in_channels, img_size, frozen_stages, norm_eval, with_cp, init_cfg)
        spec = self.resolve_arch(arch)
        self.arch = spec
        self.depths, self.embed_dims = depths_and_widths(spec["depths"], spec["embed_dims"])
        self.drop_path_rate = spec["drop_path_rate"] if drop_path_rate is None else drop_path_rate
        _check_numbers(spec, self.drop_path_rate)
        # Checked here, since a variant without gate, MLP or patch merging would not look at its option.
        check_choice("stem", spec["stem"], STEMS)
        check_choice("downsample", spec["downsample"], DOWNSAMPLES)
        check_choice("odd_size", odd_size, ODD_SIZES)
        for name, act in {"ssm_act": ssm_act, "gate_act": gate_act, "out_act": out_act, "mlp_act": mlp_act}.items():
            check_choice(name, act, ACTIVATIONS)

        self.patch_embed = STEMS[spec["stem"]](in_channels, self.embed_dims[0])
        mixer = dict(
            ssm_ratio=spec["ssm_ratio"],
            d_state=spec["d_state"],
            dt_rank=dt_rank,
            d_conv=d_conv,
            conv_bias=spec["conv_bias"],
            gated=spec["gated"],
            act=ssm_act,
            gate_act=gate_act,
            out_act=out_act,
            fp32_core=spec["fp32_core"],
        )
        rates = drop_path_rates(self.drop_path_rate, self.depths)
        self.stages = ModuleList()
        for i, width in enumerate(self.embed_dims):
            blocks = [VSSBlock(width, rate, spec["mlp_ratio"], mlp_act, mixer) for rate in rates[i]]
            downsample = self._make_downsample(spec["downsample"], i, odd_size) if i else None
            self.stages.append(VMambaStage(downsample, blocks, with_cp))

        strides = [self.patch_embed.stride * 2**i for i in range(len(self.depths))]
        self.set_outputs(out_indices, self.embed_dims, strides)
        for i in self.out_indices:
            self.add_module(f"norm{i}", LayerNorm(self.embed_dims[i]))
        self.freeze()

    def _make_downsample(self, kind: str, stage: int, odd_size: str) -> nn.Module:
        in_dims, out_dims = self.embed_dims[stage - 1 : stage + 1]
        if kind == "merge":
            return PatchMerging(in_dims, out_dims, odd_size)
        return ConvDownsample(in_dims, out_dims, kernel_size=int(kind[-1]))

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
            x = stage(x)
            if i in self.out_indices:
                outs.append(getattr(self, f"norm{i}")(x).permute(0, 3, 1, 2).contiguous())
            if i == self.out_indices[-1]:
                break
        return tuple(outs)


def _check_numbers(spec: dict[str, Any], drop_path_rate: Any) -> None:
    numbers = {"ssm_ratio": spec["ssm_ratio"], "mlp_ratio": spec["mlp_ratio"], "drop_path_rate": drop_path_rate}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}={value!r} must be a number")
    if spec["mlp_ratio"] < 0:
        raise ValueError(f"mlp_ratio={spec['mlp_ratio']!r} must not be negative; 0 gives blocks without MLP")
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f"drop_path_rate={drop_path_rate!r} must be in [0, 1)")
    for name in ("gated", "conv_bias", "fp32_core"):
        if not isinstance(spec[name], bool):
            raise TypeError(f"{name}={spec[name]!r} must be True or False")
