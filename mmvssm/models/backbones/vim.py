"""Vim, Vision Mamba (https://arxiv.org/abs/2401.09417): a plain stack of blocks that scan patches in two directions."""

import random
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from mmengine.model import BaseModule, ModuleList
from torch import nn

from mmvssm.registry import MODELS

from ..layers import (
    ADD_NORMS,
    CLASS_POSITIONS,
    DropPath,
    GridCache,
    GridRope,
    PaddedPatchEmbed,
    autocast_enabled,
    class_indices,
    drop_casts,
    insert_class_rows,
    resize_position_embedding,
    run_block,
    run_emptying,
    split_class_rows,
    square_grid,
)
from ..mixers import BidirectionalMamba
from .base import REQUIRED, BaseBackbone, check_choice

OUT_TYPES = ("featmap", "cls_token", "avg_featmap", "last_token", "raw")
FEATURES = ("stream", "mixer")
OUT_NORMS = ("shared", "last", "each", None)


class VimBlock(BaseModule):
    """Addition to the residual stream, norm, mixer.

    The output of the mixer is added by the next block, so that addition and norm are one operation.

    Args:
        embed_dims: Width C.
        drop_path: Rate of stochastic depth for what the block is given, the output of the mixer before.
        norm: 'rms' or 'layer'.
        residual_in_fp32: Whether the residual stream is float32 under mixed precision and with half weights; else it
            has the dtype of the mixer's output.
        mixer: Further arguments of :class:`BidirectionalMamba`.
        init_cfg: Initialisation config of mmengine.
    """

    def __init__(
        self,
        embed_dims: int,
        drop_path: float = 0.0,
        norm: str = "rms",
        residual_in_fp32: bool = True,
        mixer: dict[str, Any] | None = None,
        init_cfg: dict | None = None,
    ):
        super().__init__(init_cfg)
        self.residual_in_fp32 = residual_in_fp32
        self.drop_path = DropPath(drop_path)
        self.norm = ADD_NORMS[norm](embed_dims)
        self.mixer = BidirectionalMamba(embed_dims, **(mixer or {}))

    def forward(
        self, x: torch.Tensor | list[torch.Tensor | None], residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the block.

        Args:
            x: Output of the mixer before (B, L, C); the tokens in the first block. Or a list of this and ``residual``,
                which is emptied, so that the memory of both is free while the mixer runs.
            residual: Residual stream (B, L, C); None in the first block.

        Returns:
            Output of the mixer, and the residual stream, to which that output is still to be added.
        """
        if isinstance(x, list):
            residual, x = x.pop(), x.pop()
        residual_dtype = None if self.residual_in_fp32 else x.dtype
        normed = list(self.norm(x, residual, self.drop_path.sample_scale(x), residual_dtype))
        del x
        residual = normed.pop()
        return self.mixer(normed), residual


@MODELS.register_module()
class Vim(BaseBackbone):
    """Vim backbone: patches, class token and position embedding, and one stack of blocks at one stride.

    Height and width are free and independent, from 1 x 1 pixels on. Images are padded with zeros at the bottom and
    right until the patches cover them, and features are those of the padded grid. The position embedding is
    interpolated to that grid, without its class rows, which stand where the class tokens do.

    For dense prediction leave the class token out (``with_cls_token=False``), choose blocks by ``out_indices`` and
    give the maps, which all have one stride, to :class:`~mmvssm.models.DeconvPyramid` or
    :class:`~mmvssm.models.SimpleFeaturePyramid`.

    Args:
        arch: Name of a published variant ('tiny', 'tiny-plus', 'small', 'small-plus', 'base'; 'plus' has overlapping
            patches, four times as many), or a dict with the keys

            - ``embed_dims``: width C (required);
            - ``depth``: number of blocks;
            - ``patch_size``, ``stride``: side and distance of patches, see :class:`PaddedPatchEmbed`;
            - ``expand``, ``d_state``, ``d_conv``, ``dt_rank``: see :class:`BidirectionalMamba`;
            - ``drop_path_rate``: rate of the published ImageNet training.

            Keys left out are those of 'tiny'.
        in_channels: Channels of the input.
        img_size: Image size that the stored position embedding fits, an integer or (height, width).
        out_indices: Blocks whose outputs are returned, increasing; negative ones count from the end. Blocks after the
            last one are kept for loading, do not run and hold no gradients.
        drop_path_rate: Largest rate of stochastic depth (rates grow linearly from 0), in [0, 1); None takes the
            arch's.
        frozen_stages: -1 freezes nothing, 0 the stem (patches, class token, position embedding), i the stem and the
            first i blocks.
        norm_eval: Keeps batch-statistics layers in eval mode. Vim has none, so that nothing changes.
        with_cp: Whether blocks recompute their activations in the backward pass: less memory, same gradients.
        out_type: What is made of the tokens after a block: 'featmap' (B, C, h, w), class tokens left out;
            'cls_token' (B, C), the mean of two; 'avg_featmap' (B, C), the mean of the patches; 'last_token' (B, C);
            'raw' (B, L, C), all tokens.
        feature: 'stream' is the residual stream after the block, 'mixer' the output of its mixer alone, as the
            authors' smallest segmentation model uses it.
        out_norm: 'shared' (one norm for all outputs, that of the classifier), 'last' (that norm for the last output
            only), 'each' (a LayerNorm for each output) or None.
        with_cls_token: Whether there is a class token. It takes part in every scan.
        cls_token: Where it is: 'middle' of the patches, 'head', or 'double', one at each end. Without class token:
            where that of classifiers was whose files are loaded.
        with_pos_embed: Whether there is a learned position embedding.
        rope: Whether the output of every mixer (first, the tokens) is rotated by :class:`GridRope`.
        rope_residual: Whether the residual stream is rotated too, before every block.
        rope_reference: Cells per axis to which the rotation scales positions.
        norm: 'rms' or 'layer'.
        residual_in_fp32: Whether the residual stream stays float32 under mixed precision.
        directions: 'separate', 'shared' or 'forward', see :class:`BidirectionalMamba`.
        divide_out: Whether the two directions are averaged instead of added.
        layer_scale: Start of a learned factor per channel on the output of every mixer; None for no factor.
        alternate: Whether blocks come in pairs, of which the second sees the sequence reversed; for
            ``directions='forward'``. The residual stream doubles with every pair, as in the authors' code.
        flip_ratio: Probability of reversing the sequence of tokens, in evaluation too; a class token is then read
            where it was before.
        drop_rate: Rate of dropout after the position embedding.
        dt_init: 'mamba' for step sizes of 0.001 to 0.1 in both directions, 'official' for those of the authors'
            training, see :class:`BidirectionalMamba`.
        init_cfg: Initialisation config of mmengine, see :class:`BaseBackbone`.

    Example:
        >>> import torch
        >>> from mmvssm.models import Vim
        >>> net = Vim("tiny", out_indices=(5, 11, 17, 23), with_cls_token=False).eval()
        >>> [tuple(x.shape) for x in net(torch.rand(1, 3, 64, 90))]
        [(1, 192, 4, 6), (1, 192, 4, 6), (1, 192, 4, 6), (1, 192, 4, 6)]
    """

    family = "vim"
    arch_keys: ClassVar = dict(
        embed_dims=REQUIRED,
        depth=24,
        patch_size=16,
        stride=None,
        expand=2,
        d_state=16,
        d_conv=4,
        dt_rank="auto",
        drop_path_rate=0.0,
    )
    arch_zoo: ClassVar = {
        "tiny": dict(embed_dims=192),
        "tiny-plus": dict(embed_dims=192, stride=8),
        "small": dict(embed_dims=384, drop_path_rate=0.05),
        "small-plus": dict(embed_dims=384, stride=8),
        "base": dict(embed_dims=768),
    }
    # The published initialisation; BidirectionalMamba and the constructor draw what is not a norm.
    default_init_cfg: ClassVar = [dict(type="Constant", layer=["LayerNorm", "RMSNorm"], val=1.0, bias=0.0)]

    def __init__(
        self,
        arch: str | dict = "tiny",
        in_channels: int = 3,
        img_size: int | Sequence[int] = 224,
        out_indices: int | Sequence[int] = -1,
        drop_path_rate: float | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        out_type: str = "featmap",
        feature: str = "stream",
        out_norm: str | None = "shared",
        with_cls_token: bool = True,
        cls_token: str = "middle",
        with_pos_embed: bool = True,
        rope: bool = False,
        rope_residual: bool = False,
        rope_reference: int = 14,
        norm: str = "rms",
        residual_in_fp32: bool = True,
        directions: str = "separate",
        divide_out: bool = True,
        layer_scale: float | None = None,
        alternate: bool = False,
        flip_ratio: float = 0.0,
        drop_rate: float = 0.0,
        dt_init: str = "mamba",
        init_cfg: dict | list[dict] | None = None,
        **unknown: Any,
    ):
        self.reject_unknown(unknown)
        super().__init__(in_channels, img_size, frozen_stages, norm_eval, with_cp, init_cfg)
        spec = self.resolve_arch(arch)
        self.arch = spec
        self.embed_dims, depth = _positive("embed_dims", spec["embed_dims"]), _positive("depth", spec["depth"])
        self.depths = (depth,)
        self.drop_path_rate = spec["drop_path_rate"] if drop_path_rate is None else drop_path_rate
        for name, rate in {"drop_path_rate": self.drop_path_rate, "drop_rate": drop_rate}.items():
            if isinstance(rate, bool) or not isinstance(rate, int | float):
                raise TypeError(f"{name}={rate!r} must be a number")
            if not 0 <= rate < 1:
                raise ValueError(f"{name}={rate!r} must be in [0, 1)")
        for name, value, choices in (
            ("out_type", out_type, OUT_TYPES),
            ("feature", feature, FEATURES),
            ("out_norm", out_norm, OUT_NORMS),
            ("cls_token", cls_token, CLASS_POSITIONS),
            ("norm", norm, ADD_NORMS),
        ):
            check_choice(name, value, choices)
        if self.img_size is None:
            raise ValueError("img_size=None: the position embedding needs a size, an integer or a pair (height, width)")
        if out_type == "cls_token" and not with_cls_token:
            raise ValueError("out_type='cls_token' needs a class token, but with_cls_token is False")
        if rope_residual and not rope:
            raise ValueError("rope_residual=True needs rope=True")
        if alternate and (directions != "forward" or depth % 2):
            raise ValueError(
                f"alternate=True needs directions='forward' and an even depth, got {directions!r} and {depth}"
            )
        self.out_type = out_type
        self.feature = feature
        self.cls_token_position = cls_token
        self.with_cls_token = with_cls_token
        self.rope_residual = rope_residual
        self.alternate = alternate
        self.flip_ratio = flip_ratio

        self.patch_embed = PaddedPatchEmbed(in_channels, self.embed_dims, spec["patch_size"], spec["stride"])
        self.patch_grid = self.patch_embed.grid(*self.img_size)
        for name in self._class_token_names():
            self.register_parameter(name, nn.Parameter(torch.zeros(1, 1, self.embed_dims)))
        self.pos_embed = None
        if with_pos_embed:
            rows = self.patch_grid[0] * self.patch_grid[1] + self._num_class_tokens()
            self.pos_embed = nn.Parameter(torch.zeros(1, rows, self.embed_dims))
        self.drop_after_pos = nn.Dropout(drop_rate)
        self.rope = GridRope(self.embed_dims, rope_reference) if rope else None

        mixer = dict(
            expand=spec["expand"],
            d_state=spec["d_state"],
            d_conv=spec["d_conv"],
            dt_rank=spec["dt_rank"],
            directions=directions,
            divide_out=divide_out,
            layer_scale=layer_scale,
            dt_init=dt_init,
            depth=depth,
        )
        # Rate j belongs to the output of mixer j, which block j + 1 adds, or the norm after the last block.
        rates = [self.drop_path_rate * j / max(depth - 1, 1) for j in range(depth)]
        self.layers = ModuleList(
            VimBlock(self.embed_dims, rate, norm, residual_in_fp32, mixer) for rate in [0.0, *rates[:-1]]
        )
        self.drop_path = DropPath(rates[-1])

        self.set_outputs(out_indices, [self.embed_dims] * depth, [self.patch_embed.stride] * depth)
        if alternate and any(i % 2 == 0 for i in self.out_indices):
            raise ValueError(f"out_indices={out_indices!r} must be odd with alternate=True, the ends of pairs")
        self.out_norm = out_norm
        if out_norm in ("shared", "last"):
            self.norm = ADD_NORMS[norm](self.embed_dims)
        elif out_norm == "each":
            for i in self.out_indices:
                self.add_module(f"norm{i}", nn.LayerNorm(self.embed_dims))
        self._positions = GridCache()
        self._init_embeddings()
        self.freeze()

    # ------------------------------------------------------------------ forward

    @drop_casts
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Extract the features of ``out_indices``.

        Args:
            x: Images (B, in_channels, H, W), floating point.

        Returns:
            One tensor per out index, of the shape that ``out_type`` says; maps (B, C, h, w) are contiguous.

        Raises:
            ValueError: If the shape or dtype does not fit.
        """
        self.check_input(x)
        out_dtype = None if autocast_enabled(x.device) else x.dtype
        x, grid = self._embed(x)
        flipped = self.flip_ratio - random.random() > 1e-5 if self.flip_ratio else False
        if flipped:
            x = x.flip(1)
        residual = None
        outs = {}
        last = self.out_indices[-1]
        for first, step in self._steps():
            stream = list(self._rotate(x, residual, grid, flipped))
            del x, residual  # the block frees them
            x, residual = step(stream)
            # What has just been formed is the stream after the block before.
            if self.feature == "stream" and first - 1 in self.out_indices:
                outs[first - 1] = self._normalise(first - 1, residual)
            end = first + 1 if self.alternate else first
            if self.feature == "mixer" and end in self.out_indices:
                outs[end] = self._normalise(end, x)
            if end == last:
                break
        if self.feature == "stream":
            outs[last] = self._final_stream(x, residual, grid, flipped)
        return tuple(self._read_out(outs[i], grid, flipped, out_dtype) for i in self.out_indices)

    def _embed(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Images to tokens (B, L, C) with class tokens and position embedding, and the grid."""
        x, grid = self.patch_embed(x)
        names = self._class_token_names()
        if names:
            class_rows = [getattr(self, name).to(x.dtype).expand(x.shape[0], -1, -1) for name in names]
            x = insert_class_rows(x, class_rows, self._class_indices(grid))
        if self.pos_embed is not None:
            x = x + self._position_embedding(grid)
        return self.drop_after_pos(x), grid

    def _position_embedding(self, grid: tuple[int, int]) -> torch.Tensor:
        """(1, L, C) for ``grid``; interpolated anew in every training step, kept otherwise."""
        if grid == self.patch_grid:
            return self.pos_embed
        position = self.cls_token_position if self.with_cls_token else None

        def resized() -> torch.Tensor:
            return resize_position_embedding(self.pos_embed, position, self.patch_grid, position, grid)

        if torch.is_grad_enabled() and self.pos_embed.requires_grad:
            return resized()
        if torch.compiler.is_compiling():
            return resized()
        version = None if self.pos_embed.is_inference() else self.pos_embed._version
        key = (grid, self.pos_embed.data_ptr(), version, self.pos_embed.dtype, self.pos_embed.device)
        return self._positions.get(key, resized, self.pos_embed.device)

    def _steps(self):
        """First block of every step, and a function of [x, residual] that runs it: a block, or a pair of them."""
        if not self.alternate:
            for i, block in enumerate(self.layers):
                yield i, lambda stream, block=block: run_emptying(block, stream, with_cp=self.with_cp)
            return
        for i in range(0, len(self.layers), 2):
            yield i, lambda stream, i=i: self._run_pair(self.layers[i], self.layers[i + 1], *stream)

    def _run_pair(self, forward_block: nn.Module, backward_block: nn.Module, x, residual):
        reversed_residual = None if residual is None else residual.flip(1)
        y, r = run_block(forward_block, x, residual, with_cp=self.with_cp)
        y_back, r_back = run_block(backward_block, x.flip(1), reversed_residual, with_cp=self.with_cp)
        return y + y_back.flip(1), r + r_back.flip(1)

    def _rotate(self, x, residual, grid: tuple[int, int], flipped: bool):
        """Rotary embedding of the mixer's output and, if asked for, of the stream."""
        if self.rope is None:
            return x, residual

        def rotated(tokens: torch.Tensor) -> torch.Tensor:
            tokens = tokens.flip(1) if flipped else tokens
            tokens = self.rope(tokens, grid, self._num_class_tokens())
            return tokens.flip(1) if flipped else tokens

        return rotated(x), rotated(residual) if self.rope_residual and residual is not None else residual

    def _final_stream(self, x, residual, grid: tuple[int, int], flipped: bool) -> torch.Tensor:
        """Stream after the last block that ran, normalised; as the next block would form it, if there is one."""
        last = self.out_indices[-1]
        scale = None
        if last + 1 < len(self.layers):
            x, residual = self._rotate(x, residual, grid, flipped)
            scale = self.layers[last + 1].drop_path.sample_scale(x)
        elif self.out_norm is not None:  # without norm, the authors add the last output without stochastic depth
            scale = self.drop_path.sample_scale(x)
        if self.out_norm in ("shared", "last"):
            return self.norm(x, residual, scale)[0]
        stream = residual + (x if scale is None else x * scale[:, None, None])
        return self._normalise(last, stream)

    def _normalise(self, index: int, tokens: torch.Tensor) -> torch.Tensor:
        """The output norm of ``index``, if there is one, on tokens (B, L, C)."""
        if self.out_norm == "each":
            layer = getattr(self, f"norm{index}")
            return layer(tokens.to(layer.weight.dtype) if not autocast_enabled(tokens.device) else tokens)
        if self.out_norm == "shared" or (self.out_norm == "last" and index == self.out_indices[-1]):
            return self.norm(tokens)[0]
        return tokens

    def _read_out(
        self, tokens: torch.Tensor, grid: tuple[int, int], flipped: bool, dtype: torch.dtype | None
    ) -> torch.Tensor:
        """What ``out_type`` makes of tokens (B, L, C)."""
        tokens = tokens if dtype is None else tokens.to(dtype)
        indices = self._class_indices(grid)
        if self.out_type == "raw":
            return tokens
        if self.out_type == "last_token":
            return tokens[:, -1].contiguous()
        if self.out_type == "cls_token":
            _, class_rows = split_class_rows(tokens, indices)
            return (class_rows[0] if len(class_rows) == 1 else sum(class_rows) / 2).squeeze(1).contiguous()
        tokens = tokens.flip(1) if flipped else tokens
        patches, _ = split_class_rows(tokens, indices)
        if self.out_type == "avg_featmap":
            return patches.mean(1)
        return patches.transpose(1, 2).unflatten(2, grid).contiguous()

    # ------------------------------------------------------------------ class tokens

    def _num_class_tokens(self) -> int:
        return (2 if self.cls_token_position == "double" else 1) if self.with_cls_token else 0

    def _class_token_names(self) -> tuple[str, ...]:
        return ((), ("cls_token",), ("cls_token_head", "cls_token_tail"))[self._num_class_tokens()]

    def _class_indices(self, grid: tuple[int, int]) -> tuple[int, ...]:
        return class_indices(self.cls_token_position if self.with_cls_token else None, grid[0] * grid[1])

    # ------------------------------------------------------------------ freezing, initialisation, loading

    def freeze_groups(self) -> list[list[nn.Module | nn.Parameter]]:
        """The stem (patches, class tokens, position embedding), then every block; norms with the block they follow."""
        stem = [self.patch_embed, *(getattr(self, name) for name in self._class_token_names())]
        if self.pos_embed is not None:
            stem.append(self.pos_embed)
        blocks: list[list] = [[block] for block in self.layers]
        if self.out_norm in ("shared", "last"):
            blocks[self.out_indices[-1]].append(self.norm)
        elif self.out_norm == "each":
            for i in self.out_indices:
                blocks[i].append(getattr(self, f"norm{i}"))
        return [stem, *blocks]

    def train(self, mode: bool = True):
        """Set the training mode, as :class:`BaseBackbone` does, and forget interpolated position embeddings.

        Averaging hooks exchange weights in a way that leaves no trace on the parameter, but set the mode afterwards.
        """
        self._positions.clear()
        return super().train(mode)

    def _init_embeddings(self) -> None:
        for name in ("pos_embed", *self._class_token_names()):
            if getattr(self, name) is not None:
                nn.init.trunc_normal_(getattr(self, name), std=0.02)

    def adapt_state_dict(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Bring a state dict of another image size, or of a classifier, to this backbone, see :class:`BaseBackbone`.

        The position embedding loses its class rows, at their true places, where this backbone has no class token, and
        is interpolated to this backbone's grid; the class token itself and output norms without a place are left out.
        What cannot be brought to fit stays as it is.
        """
        adapted = dict(state_dict)
        has = {"cls_token": self.cls_token_position, "cls_token_head": "double"}
        position = next((p for name, p in has.items() if name in state_dict), None)
        if position == "double" and "cls_token" in state_dict:
            position = "middle"  # one token is one token, whatever this backbone would have
        if not self.with_cls_token:
            for name in ("cls_token", "cls_token_head", "cls_token_tail"):
                adapted.pop(name, None)
        if self.out_norm not in ("shared", "last"):
            for name in ("norm.weight", "norm.bias"):
                adapted.pop(name, None)
        rows = adapted.get("pos_embed")
        if rows is None or self.pos_embed is None or rows.shape == self.pos_embed.shape or rows.ndim != 3:
            return adapted
        new_position = self.cls_token_position if self.with_cls_token else None
        grid = square_grid(rows.shape[1] - len(class_indices(position, rows.shape[1])))
        if grid is not None and new_position in (None, position):
            adapted["pos_embed"] = resize_position_embedding(rows, position, grid, new_position, self.patch_grid)
        return adapted

    # ------------------------------------------------------------------ parameter groups

    def no_weight_decay(self) -> set[str]:
        """Position embedding, class tokens, and what the mixers name: decays, skips, step biases."""
        own = {*self._class_token_names(), *(("pos_embed",) if self.pos_embed is not None else ())}
        return super().no_weight_decay() | own

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """Depth of a parameter for layer-wise learning-rate decay: the stem is 0, block i is i + 1, the rest last.

        Args:
            param_name: Name of the parameter.
            prefix: Prefix of the backbone's names, e.g. 'backbone.'.

        Returns:
            Depth and number of depths.
        """
        num_layers = len(self.layers) + 2
        parts = param_name[len(prefix) :].split(".") if param_name.startswith(prefix) else [""]
        if parts[0] == "patch_embed" or parts[0].startswith(("cls_token", "pos_embed")):
            return 0, num_layers
        return (int(parts[1]) + 1 if parts[0] == "layers" else num_layers - 1), num_layers


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be a positive integer")
    return value
