"""MambaVision (https://arxiv.org/abs/2407.08083): convolutions, then windows that are scanned, then attended."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from mmengine.model import BaseModule, ModuleList, Sequential
from torch import nn
from torch.nn import functional as F

from mmvssm.registry import MODELS

from ..layers import (
    AddLayerNorm,
    Conv2d,
    DropPath,
    FusedConv,
    LayerNorm,
    Mlp,
    WindowGrid,
    autocast_enabled,
    drop_casts,
    drop_path_rates,
    merge_windows,
    partition_windows,
    run_block,
)
from ..mixers import MambaVisionMixer, SelfAttention
from .base import REQUIRED, BaseBackbone

CONV_STAGES = 2
OUT_NORMS = ("auto", "ln", "bn", "none")

VARIANTS = {
    "t": dict(embed_dims=80, depths=(1, 3, 8, 4), stem_dims=32, drop_path_rate=0.2),
    "t2": dict(embed_dims=80, depths=(1, 3, 11, 4), stem_dims=32, drop_path_rate=0.2),
    "s": dict(embed_dims=96, depths=(3, 3, 7, 5), drop_path_rate=0.2),
    "b": dict(embed_dims=128, depths=(3, 3, 10, 5), layer_scale=1e-5, drop_path_rate=0.3),
    "l": dict(embed_dims=196, depths=(3, 3, 10, 5), num_heads=(16, 32), layer_scale=1e-5, drop_path_rate=0.3),
    "l2": dict(embed_dims=196, depths=(3, 3, 12, 5), num_heads=(16, 32), layer_scale=1e-5, drop_path_rate=0.3),
}
L3 = dict(embed_dims=256, depths=(3, 3, 20, 10), num_heads=(16, 32), layer_scale=1e-5, drop_path_rate=0.5)
# Pretrained on ImageNet-21k: the same networks, some with windows for larger images.
VARIANTS |= {
    "b-21k": VARIANTS["b"],
    "l-21k": VARIANTS["l"],
    "l2-512-21k": dict(VARIANTS["l2"], window_size=(32, 16)),
    "l3-256-21k": dict(L3, window_size=(16, 8)),
    "l3-512-21k": dict(L3, window_size=(32, 16)),
}


class ConvStem(BaseModule):
    """Two 3x3 convolutions of stride 2, each with batch norm and ReLU; (B, C_in, H, W) to a quarter of the grid.

    The grid is ceil(ceil(size / 2) / 2), so that any size from 1 x 1 on works.

    Args:
        in_channels: Channels of the image.
        stem_dims: Width of the first convolution.
        embed_dims: Output width C.
        init_cfg: Initialisation config of mmengine.
    """

    def __init__(self, in_channels: int, stem_dims: int, embed_dims: int, init_cfg: dict | None = None):
        super().__init__(init_cfg)
        self.conv1 = nn.Conv2d(in_channels, stem_dims, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(stem_dims, eps=1e-4)  # here only; all other norms have torch's 1e-5
        self.conv2 = nn.Conv2d(stem_dims, embed_dims, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(embed_dims, eps=1e-4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, C_in, H, W) to (B, C, ceil(H / 4), ceil(W / 4))."""
        if isinstance(self.conv1, FusedConv):
            return self.conv2(self.conv1(x))
        x = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(x)))

    def fuse_batch_norms(self) -> None:
        """Fold the norms into the convolutions; afterwards for inference only."""
        self.conv1, self.conv2 = FusedConv(self.conv1, self.norm1, "relu"), FusedConv(self.conv2, self.norm2, "relu")
        del self.norm1, self.norm2


class ConvBlock(BaseModule):
    """Residual block of two 3x3 convolutions with batch norm; (B, C, H, W) in and out.

    Its GELU is the tanh approximation, unlike that of the MLPs.

    Args:
        embed_dims: Width C.
        drop_path: Rate of stochastic depth.
        init_cfg: Initialisation config of mmengine.
    """

    def __init__(self, embed_dims: int, drop_path: float = 0.0, init_cfg: dict | None = None):
        super().__init__(init_cfg)
        self.conv1 = Conv2d(embed_dims, embed_dims, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(embed_dims)
        self.conv2 = Conv2d(embed_dims, embed_dims, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(embed_dims)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, C, H, W) to (B, C, H, W)."""
        if isinstance(self.conv1, FusedConv):
            return self.conv2(self.conv1(x), residual=x)
        y = F.gelu(self.norm1(self.conv1(x)), approximate="tanh")
        return x + self.drop_path(self.norm2(self.conv2(y)))

    def fuse_batch_norms(self) -> None:
        """Fold the norms into the convolutions; afterwards for inference only."""
        self.conv1, self.conv2 = FusedConv(self.conv1, self.norm1, "gelu_tanh"), FusedConv(self.conv2, self.norm2)
        del self.norm1, self.norm2


class TokenBlock(BaseModule):
    """Pre-norm residual block: a token mixer, then an MLP; tokens (B, L, C), B counting windows.

    What a branch computes is added to the residual stream by the norm that follows, in the same pass over memory, so a
    block takes and gives the stream and the branch before that is still to be added.

    Args:
        embed_dims: Width C.
        mixer: The token mixer.
        mlp_ratio: Hidden width of the MLP as a multiple of C.
        layer_scale: Initial value of a factor per channel on both branches; None for no such factor.
        drop_path: Rate of stochastic depth for both branches; windows are dropped one by one.
        init_cfg: Initialisation config of mmengine.
    """

    def __init__(
        self,
        embed_dims: int,
        mixer: nn.Module,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        init_cfg: dict | None = None,
    ):
        super().__init__(init_cfg)
        self.norm1 = AddLayerNorm(embed_dims)
        self.mixer = mixer
        self.norm2 = AddLayerNorm(embed_dims)
        self.mlp = Mlp(embed_dims, int(mlp_ratio * embed_dims))
        self.drop_path = DropPath(drop_path)
        self.has_layer_scale = layer_scale is not None
        if self.has_layer_scale:
            self.gamma1 = nn.Parameter(torch.full((embed_dims,), float(layer_scale)))
            self.gamma2 = nn.Parameter(torch.full((embed_dims,), float(layer_scale)))

    def forward(
        self, x: torch.Tensor, stream: torch.Tensor | None = None, scale: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Pass a stream through the block.

        Args:
            x: Output of the last branch (B, L, C), or the stream itself where it begins.
            stream: The stream before that branch (B, L, C), or None where it begins.
            scale: Factor of ``x`` for every window (B), stochastic depth; None for 1.

        Returns:
            The same three after this block.
        """
        x, stream = self._add(self.norm1, x, stream, scale)
        x = self.mixer(x)
        x = self.gamma1 * x if self.has_layer_scale else x
        x, stream = self._add(self.norm2, x, stream, self.drop_path.sample_scale(x))
        x = self.mlp(x)
        x = self.gamma2 * x if self.has_layer_scale else x
        return x, stream, self.drop_path.sample_scale(x)

    @staticmethod
    def _add(norm: AddLayerNorm, x: torch.Tensor, stream: torch.Tensor | None, scale: torch.Tensor | None):
        # The stream has the dtype that a plain sum would have: float32 with layer scale, else that of the branches.
        dtype = x.dtype if stream is None else torch.promote_types(x.dtype, stream.dtype)
        return norm(x, stream, scale, dtype)


class MambaVisionStage(BaseModule):
    """Downsampling (from the second stage on), then blocks at one width; maps (B, C, H, W), channels_last in memory.

    Args:
        downsample: The layer that halves the grid, or None.
        blocks: The blocks: convolutional ones, or, with ``windowed``, blocks over tokens.
        windowed: Whether the map is cut into windows. It is padded once, before the first block; what was padded takes
            part in all blocks, and is cut off after the last.
        window_size: Side of the windows, or None for one window that is the map.
        fit_windows: See :meth:`WindowGrid.cover`.
        with_cp: Whether the blocks recompute their activations in the backward pass.
        init_cfg: Initialisation config of mmengine.
    """

    def __init__(
        self,
        downsample: nn.Module | None,
        blocks: Sequence[nn.Module],
        windowed: bool = False,
        window_size: int | None = None,
        fit_windows: bool = False,
        with_cp: bool = False,
        init_cfg: dict | None = None,
    ):
        super().__init__(init_cfg)
        self.downsample = downsample
        self.blocks = Sequential(*blocks)
        self.windowed = windowed
        self.window_size = window_size
        self.fit_windows = fit_windows
        self.with_cp = with_cp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) of the stage before to (B, C', H', W') of this one."""
        if self.downsample is not None:
            x = self.downsample(x)
        if self.windowed:
            return self._forward_windows(x)
        for block in self.blocks:
            x = run_block(block, x, with_cp=self.with_cp)
        return x

    def _forward_windows(self, x: torch.Tensor) -> torch.Tensor:
        grid = WindowGrid.cover(*x.shape[2:], self.window_size, self.fit_windows)
        state = (partition_windows(x.permute(0, 2, 3, 1), grid), None, None)
        for block in self.blocks:
            state = run_block(block, *state, with_cp=self.with_cp)
        x, stream, scale = state
        x = stream + (x if scale is None else x * scale.to(x.dtype)[:, None, None])
        return merge_windows(x, grid).permute(0, 3, 1, 2)


@MODELS.register_module()
class MambaVision(BaseBackbone):
    """MambaVision backbone: two stages of convolutions, two of windows that are scanned and then attended.

    In the last two stages the first half of the blocks (rounded up) mixes the tokens of a window by
    :class:`MambaVisionMixer`, the rest by attention. Height and width of the image are free and independent, from
    1 x 1; maps are channels_last in memory from the stem to the outputs.

    **The window size is part of the function.** Padding up to whole windows takes part in scan and attention and is
    not masked, so the same weights give other features with other windows. Published weights belong to the published
    sizes: 14 and 7 at 224 x 224 is one window for the whole map; the authors' detectors and segmentors have windows
    far larger than many maps, with up to 25 times as many tokens as the map has. For new dense models
    ``fit_windows=True`` with a bound such as (32, 16), or ``window_size="map"``, costs much less.

    Args:
        arch: Name of a published variant ('t', 't2', 's', 'b', 'l', 'l2', 'b-21k', 'l-21k', 'l2-512-21k', 'l3-256-21k',
            'l3-512-21k'), or a dict with the keys

            - ``embed_dims``: width of the first stage, doubled from stage to stage (required);
            - ``depths``: blocks of each of the four stages (required);
            - ``stem_dims``: width of the first convolution of the stem;
            - ``num_heads``: attention heads of the third and fourth stage;
            - ``window_size``: side of the windows of the third and fourth stage;
            - ``layer_scale``: initial factor on the branches of token blocks, None for none;
            - ``mlp_ratio``: hidden width of the MLPs as a multiple of the width;
            - ``d_state``: states per scanned channel;
            - ``drop_path_rate``: rate of the published ImageNet training.

        in_channels: Channels of the input.
        img_size: Accepted because other families need it; MambaVision has no parameter that depends on the size.
        out_indices: Stages to return, increasing; negative ones count from the end. Stages after the last one are kept
            for loading, do not run and hold no gradients.
        window_size: Windows of the third and fourth stage, a pair, each an integer or 'map' (the window is the map, no
            padding; scan and attention then run over all of it); or one of them for both stages. None takes the
            arch's.
        fit_windows: If True, ``window_size`` is an upper bound instead: the map is divided into as few equal windows as
            it allows, rectangular, with next to no padding. A map that is one window of exactly that size gives the
            same either way.
        out_norm: Norm of the outputs: 'ln', LayerNorm over channels, as the authors' detectors and segmentors have;
            'bn', BatchNorm, as their classifiers have on the last stage; 'none', as their feature extractor; 'auto',
            'bn' if the last stage is the only output and else 'ln'. They are called ``norm{i}`` and ``batch_norm{i}``.
        drop_path_rate: Largest rate of stochastic depth (rates grow linearly from 0), in [0, 1); None takes the
            arch's. The authors' detectors and segmentors were all built with 0.2, whatever their configs say.
        frozen_stages: -1 freezes nothing, 0 the stem, i the stem and the first i stages with their output norms. The
            downsampling layer counts to the stage that it leads to.
        norm_eval: Keeps the batch norms in eval mode during training. In the authors' detectors and segmentors they
            train, with one or two images per GPU.
        with_cp: Whether blocks recompute their activations in the backward pass: less memory, same gradients.
        dt_init: Step sizes at the start of training, see :class:`MambaVisionMixer`.
        init_cfg: Initialisation config of mmengine, see :class:`BaseBackbone`.

    Example:
        >>> import torch
        >>> from mmvssm.models import MambaVision
        >>> net = MambaVision("t").eval()
        >>> [tuple(x.shape) for x in net(torch.rand(1, 3, 64, 96))]
        [(1, 80, 16, 24), (1, 160, 8, 12), (1, 320, 4, 6), (1, 640, 2, 3)]
    """

    family = "mambavision"
    arch_keys: ClassVar = dict(
        embed_dims=REQUIRED,
        depths=REQUIRED,
        stem_dims=64,
        num_heads=(8, 16),
        window_size=(14, 7),
        layer_scale=None,
        mlp_ratio=4.0,
        d_state=8,
        drop_path_rate=0.0,
    )
    arch_zoo: ClassVar = VARIANTS

    def __init__(
        self,
        arch: str | dict = "t",
        in_channels: int = 3,
        img_size: int | Sequence[int] | None = None,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        window_size: int | str | Sequence[int | str] | None = None,
        fit_windows: bool = False,
        out_norm: str = "auto",
        drop_path_rate: float | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        dt_init: str = "mamba",
        init_cfg: dict | list[dict] | None = None,
        **unknown: Any,
    ):
        self.reject_unknown(unknown)
        super().__init__(in_channels, img_size, frozen_stages, norm_eval, with_cp, init_cfg)
        spec = self.resolve_arch(arch)
        self.arch = spec
        self.drop_path_rate = spec["drop_path_rate"] if drop_path_rate is None else drop_path_rate
        _check_arch(spec, self.drop_path_rate)
        if not isinstance(fit_windows, bool):
            raise TypeError(f"fit_windows={fit_windows!r} must be True or False")
        if out_norm not in OUT_NORMS:
            raise ValueError(f"out_norm={out_norm!r} is unknown; choose one of {', '.join(map(repr, OUT_NORMS))}")
        self.depths = tuple(spec["depths"])
        self.embed_dims = tuple(spec["embed_dims"] * 2**i for i in range(len(self.depths)))
        self.window_size = _windows(spec["window_size"] if window_size is None else window_size)
        self.fit_windows = fit_windows
        self.fused = False

        self.patch_embed = ConvStem(in_channels, spec["stem_dims"], self.embed_dims[0])
        rates = drop_path_rates(self.drop_path_rate, self.depths)
        self.stages = ModuleList()
        for i, width in enumerate(self.embed_dims):
            # The authors draw a norm after this convolution in the paper; code and weights have none.
            downsample = nn.Conv2d(width // 2, width, 3, stride=2, padding=1, bias=False) if i else None
            if i < CONV_STAGES:
                blocks = [ConvBlock(width, rate) for rate in rates[i]]
                self.stages.append(MambaVisionStage(downsample, blocks, with_cp=with_cp))
                continue
            blocks = [
                TokenBlock(width, mixer, spec["mlp_ratio"], spec["layer_scale"], rate)
                for mixer, rate in zip(_mixers(spec, i, dt_init), rates[i], strict=True)
            ]
            window = self.window_size[i - CONV_STAGES]
            side = None if window == "map" else window
            self.stages.append(MambaVisionStage(downsample, blocks, True, side, fit_windows, with_cp))

        self.set_outputs(out_indices, self.embed_dims, [4 * 2**i for i in range(len(self.depths))])
        if out_norm == "auto":
            out_norm = "bn" if self.out_indices == (len(self.depths) - 1,) else "ln"
        self.out_norm = out_norm
        for i in self.out_indices:
            if out_norm == "ln":
                self.add_module(f"norm{i}", LayerNorm(self.embed_dims[i]))
            elif out_norm == "bn":
                self.add_module(f"batch_norm{i}", nn.BatchNorm2d(self.embed_dims[i]))
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
        self.check_input(x)
        dtype = x.dtype
        if dtype == torch.float32 and autocast_enabled(x.device):
            dtype = torch.get_autocast_dtype(x.device.type)  # what the first convolution would make of it
        x = self.patch_embed(x.to(dtype, memory_format=torch.channels_last))
        outs = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                outs.append(self._output(i, x))
            if i == self.out_indices[-1]:
                break
        return tuple(outs)

    def _output(self, stage: int, x: torch.Tensor) -> torch.Tensor:
        if self.out_norm == "ln":
            x = getattr(self, f"norm{stage}")(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        elif self.out_norm == "bn":
            x = getattr(self, f"batch_norm{stage}")(x)
        return x.contiguous()

    def freeze_groups(self) -> list[list[nn.Module | nn.Parameter]]:
        """What freezes together: the stem, then every stage with its output norm, in order."""
        stages = [[stage] for stage in self.stages]
        name = {"ln": "norm{}", "bn": "batch_norm{}"}.get(self.out_norm)
        for i in self.out_indices if name else ():
            stages[i].append(getattr(self, name.format(i)))
        return [[self.patch_embed], *stages]

    # ------------------------------------------------------------------ inference

    def fuse_batch_norms(self) -> "MambaVision":
        """Fold the batch norms of the stem and the convolutional stages into their convolutions, for inference.

        The outputs stay the same up to rounding; what follows a convolution becomes one pass over memory, and the
        weights of convolutions become channels_last. Load weights before: afterwards the network has other parameters,
        and cannot be trained any more. A second call changes nothing.

        Returns:
            The network itself, in eval mode.
        """
        if not self.fused:
            for part in (self.patch_embed, *(block for stage in self.stages[:CONV_STAGES] for block in stage.blocks)):
                part.fuse_batch_norms()
            self.fused = True
        return self.eval().to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> "MambaVision":
        """Set the training mode; frozen parts stay frozen and, with ``norm_eval``, batch statistics fixed.

        Raises:
            ValueError: If the batch norms have been folded away.
        """
        if mode and self.fused:
            raise ValueError("fuse_batch_norms() has removed the batch norms: build the network anew to train it")
        return super().train(mode)


def _mixers(spec: dict[str, Any], stage: int, dt_init: str) -> list[nn.Module]:
    """Token mixers of a stage: scans in the first half of the blocks (rounded up), attention in the rest."""
    width, depth = spec["embed_dims"] * 2**stage, spec["depths"][stage]
    heads = spec["num_heads"][stage - CONV_STAGES]
    scans = [MambaVisionMixer(width, spec["d_state"], dt_init=dt_init) for _ in range(-(-depth // 2))]
    return scans + [SelfAttention(width, heads) for _ in range(depth // 2)]


def _windows(given: Any) -> tuple[int | str, int | str]:
    """One window size per token stage, checked."""
    pair = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given, given)
    if len(pair) != 2 or not all(window == "map" or _is_count(window) for window in pair):
        raise ValueError(
            f"window_size={given!r} must be a positive integer or 'map', or a pair of them for the last two stages"
        )
    return pair


def _check_arch(spec: dict[str, Any], drop_path_rate: Any) -> None:
    for name, count in {"depths": 4, "num_heads": 2}.items():
        value = spec[name]
        if not isinstance(value, Sequence) or len(value) != count or not all(map(_is_count, value)):
            raise ValueError(f"{name}={value!r} must be {count} positive integers")
    for name in ("embed_dims", "stem_dims"):
        if not _is_count(spec[name]):
            raise ValueError(f"{name}={spec[name]!r} must be a positive integer")
    for name, value in {"mlp_ratio": spec["mlp_ratio"], "drop_path_rate": drop_path_rate}.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}={value!r} must be a number")
    if int(spec["mlp_ratio"] * spec["embed_dims"]) < 1:
        raise ValueError(f"mlp_ratio={spec['mlp_ratio']!r} leaves no hidden channels")
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f"drop_path_rate={drop_path_rate!r} must be in [0, 1)")
    scale = spec["layer_scale"]
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float))):
        raise TypeError(f"layer_scale={scale!r} must be a number, or None for no layer scale")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
