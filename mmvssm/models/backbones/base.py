"""What all backbones share: arguments, outputs, freezing, initialisation, parameter groups."""

import copy
import inspect
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import torch
from mmengine.model import BaseModule, PretrainedInit
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

REQUIRED = object()
"""Marks a key of ``arch_keys`` that has no default."""


class BaseBackbone(BaseModule):
    """Base class of the backbones.

    A subclass describes itself by the class attributes below, builds ``patch_embed``, ``stages`` and ``norm{i}``
    (or overrides :meth:`freeze_groups` and :meth:`get_layer_depth`), and calls :meth:`set_outputs` and, last in its
    constructor, :meth:`freeze`.

    Class attributes:
        family: Name of the model family in :mod:`mmvssm.checkpoints`.
        arch_zoo: The published variants, name -> dict of the keys in ``arch_keys``.
        arch_keys: Every key that an arch dict may hold, with its default (or ``REQUIRED``).
        default_init_cfg: Initialisation used unless ``init_cfg`` names another one than loading a checkpoint.

    Args:
        in_channels: Channels of the input.
        img_size: Input size for which size-dependent parameters are made, an integer or (height, width); None where
            the family has none.
        frozen_stages: -1 freezes nothing, 0 the stem, i the stem and the first i stages.
        norm_eval: Whether batch-statistics layers stay in eval mode during training.
        with_cp: Whether blocks recompute their activations in the backward pass to save memory.
        init_cfg: Initialisation config of mmengine. ``dict(type='Pretrained', checkpoint=..., prefix='backbone.')``
            takes files of this project and of the authors.
    """

    family: ClassVar[str]
    arch_zoo: ClassVar[dict[str, dict]] = {}
    arch_keys: ClassVar[dict[str, Any]] = {}
    default_init_cfg: ClassVar[list[dict]] = [
        dict(type="TruncNormal", layer="Linear", std=0.02, bias=0.0),
        dict(type="Constant", layer="LayerNorm", val=1.0, bias=0.0),
    ]

    def __init__(
        self,
        in_channels: int = 3,
        img_size: int | Sequence[int] | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ):
        super().__init__(init_cfg)
        if not _is_int(in_channels) or in_channels < 1:
            raise ValueError(f"in_channels={in_channels!r} must be a positive integer")
        if not _is_int(frozen_stages):
            raise TypeError(f"frozen_stages={frozen_stages!r} must be an integer, -1 for none")
        self.in_channels = in_channels
        self.img_size = _to_size(img_size)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_cp = with_cp
        self.register_load_state_dict_pre_hook(_adapt_hook)

    # ------------------------------------------------------------------ arguments

    @classmethod
    def reject_unknown(cls, unknown: dict[str, Any]) -> None:
        """Raise TypeError for constructor arguments that do not exist, listing those that do."""
        if unknown:
            parameters = inspect.signature(cls.__init__).parameters.values()
            known = [p.name for p in parameters if p.name != "self" and p.kind is not p.VAR_KEYWORD]
            names = ", ".join(repr(name) for name in unknown)
            raise TypeError(f"{cls.__name__} has no argument {names}; known arguments: {', '.join(known)}")

    @classmethod
    def resolve_arch(cls, arch: str | dict) -> dict[str, Any]:
        """The complete description of a variant.

        Args:
            arch: Name in ``arch_zoo``, or a dict with keys of ``arch_keys``; what is left out takes its default.

        Returns:
            A new dict with every key of ``arch_keys``.

        Raises:
            ValueError: If the name or a key is unknown or a required key is missing.
            TypeError: If ``arch`` is neither a string nor a dict.
        """
        if isinstance(arch, str):
            if arch not in cls.arch_zoo:
                raise ValueError(f"{cls.__name__} has no arch {arch!r}; known: {', '.join(cls.arch_zoo)}, or a dict")
            arch = cls.arch_zoo[arch]
        elif not isinstance(arch, dict):
            raise TypeError(f"arch must be a name or a dict, got {type(arch).__name__}")
        known = ", ".join(cls.arch_keys)
        if unknown := [key for key in arch if key not in cls.arch_keys]:
            raise ValueError(f"arch has unknown keys {', '.join(map(repr, unknown))}; known keys: {known}")
        full = {**cls.arch_keys, **arch}
        if missing := [key for key, value in full.items() if value is REQUIRED]:
            raise ValueError(f"arch lacks the keys {', '.join(map(repr, missing))}; known keys: {known}")
        return copy.deepcopy(full)

    def set_outputs(self, out_indices: int | Sequence[int], channels: Sequence[int], strides: Sequence[int]) -> None:
        """Check ``out_indices`` and set ``out_indices``, ``out_channels`` and ``out_strides`` as tuples.

        Args:
            out_indices: Stages whose outputs are returned, increasing; negative ones count from the end.
            channels: Width of every stage.
            strides: Stride of every stage.

        Raises:
            ValueError: If an index is out of range, or they are empty, repeated or out of order.
            TypeError: If they are not integers.
        """
        count = len(channels)
        given = out_indices
        out_indices = (out_indices,) if _is_int(out_indices) else out_indices
        if not isinstance(out_indices, Sequence) or isinstance(out_indices, str) or not all(map(_is_int, out_indices)):
            raise TypeError(f"out_indices={given!r} must be a sequence of integers")
        resolved = tuple(i + count if i < 0 else i for i in out_indices)
        if not resolved or any(not 0 <= i < count for i in resolved):
            raise ValueError(f"out_indices={given!r} must hold stages in -{count}..{count - 1}, at least one")
        if list(resolved) != sorted(set(resolved)):
            raise ValueError(f"out_indices={given!r} must be increasing and without repetition")
        if self.frozen_stages > count or self.frozen_stages < -1:
            raise ValueError(f"frozen_stages={self.frozen_stages} must be in -1..{count}")
        self.out_indices = resolved
        self.out_channels = tuple(channels[i] for i in resolved)
        self.out_strides = tuple(strides[i] for i in resolved)

    def check_input(self, x: torch.Tensor, min_size: int = 1) -> None:
        """Raise ValueError unless x is (B, in_channels, H, W) with H and W of at least ``min_size``."""
        name = type(self).__name__
        if x.ndim != 4:
            raise ValueError(f"{name} takes images of shape (B, {self.in_channels}, H, W), got {tuple(x.shape)}")
        if x.shape[1] != self.in_channels:
            raise ValueError(
                f"{name} was built with in_channels={self.in_channels}, got an input of {x.shape[1]} channels, "
                f"shape {tuple(x.shape)}"
            )
        H, W = x.shape[2:]
        if min(H, W) < min_size:
            raise ValueError(f"{name} needs inputs of at least {min_size} x {min_size} pixels, got {H} x {W}")
        if not x.is_floating_point():
            raise ValueError(f"{name} takes floating-point images, got {x.dtype}: normalise them first")

    # ------------------------------------------------------------------ freezing and training mode

    def freeze_groups(self) -> list[list[nn.Module | nn.Parameter]]:
        """What freezes together: the stem, then every stage with its output norm, in order."""
        stages = [[stage] for stage in self.stages]
        for i in self.out_indices:
            stages[i].append(getattr(self, f"norm{i}"))
        return [[self.patch_embed], *stages]

    def freeze(self) -> None:
        """Freeze the stem and the first ``frozen_stages`` stages, and the stages after the last output.

        The latter do not run; they are kept so that whole checkpoints fit, and must not ask for gradients, because
        distributed training waits for every parameter that does.
        """
        groups = self.freeze_groups()
        for part in (part for group in groups[: self.frozen_stages + 1] for part in group):
            part.requires_grad_(False)
            if isinstance(part, nn.Module):
                part.eval()
        for part in (part for group in groups[self.out_indices[-1] + 2 :] for part in group):
            part.requires_grad_(False)

    def train(self, mode: bool = True):
        """Set the training mode; frozen parts stay frozen and, with ``norm_eval``, batch statistics fixed."""
        super().train(mode)
        self.freeze()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _NormBase):
                    module.eval()
        return self

    # ------------------------------------------------------------------ initialisation

    def init_weights(self) -> None:
        """Initialise the parameters, then load the checkpoint of a 'Pretrained' ``init_cfg``.

        mmengine's own loading ignores whatever does not match; ours knows the authors' files and raises when little
        matched.
        """
        if self.is_init:
            super().init_weights()  # warns
            return
        given = self.init_cfg
        configs = [given] if isinstance(given, dict) else list(given or [])
        pretrained = [cfg for cfg in configs if cfg.get("type") in ("Pretrained", PretrainedInit)]
        self.init_cfg = [cfg for cfg in configs if cfg not in pretrained] or copy.deepcopy(self.default_init_cfg)
        try:
            super().init_weights()
        finally:
            self.init_cfg = given
        for cfg in pretrained:
            arguments = {key: value for key, value in cfg.items() if key != "type"}
            if "checkpoint" not in arguments or set(arguments) - {"checkpoint", "prefix", "map_location"}:
                raise ValueError(
                    f"init_cfg of type 'Pretrained' takes checkpoint and, if wanted, prefix and map_location; got {cfg}"
                )
            self.load_pretrained(**arguments)

    def load_pretrained(self, checkpoint: str, prefix: str | None = None, map_location: str | None = None) -> None:
        """Load a checkpoint of this project or of the authors and log how much of it matched.

        Args:
            checkpoint: Path or URL.
            prefix: Part of the state dict that holds the backbone; None lets the loader find it.
            map_location: Accepted as mmengine passes it; tensors are read on the CPU and copied.
        """
        from mmvssm.checkpoints import load_into

        load_into(self, checkpoint, prefix=prefix)

    def adapt_state_dict(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Bring a state dict of another image size or task to this backbone, before it is loaded in whatever way.

        Args:
            state_dict: Names of this project, of the backbone alone.

        Returns:
            A dict that may lack names that have no place, and hold resized tensors; what fits is the same. Here: what
            came in.
        """
        return state_dict

    # ------------------------------------------------------------------ parameter groups

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone, as in timm.

        These are the ones that mixers list in ``no_weight_decay_params``. Norms and biases are not listed: the
        optimiser-wrapper constructors have options for them.
        """
        names = set()
        for prefix, module in self.named_modules():
            for name in getattr(module, "no_weight_decay_params", ()):
                names.add(f"{prefix}.{name}" if prefix else name)
        return names

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """Depth of a parameter for layer-wise learning-rate decay, as in mmpretrain.

        The stem is 0, blocks count from 1 through all stages, a downsampling layer belongs to the block before it,
        and everything after the last block, other modules included, has the last depth.

        Args:
            param_name: Name of the parameter.
            prefix: Prefix of the backbone's names, e.g. 'backbone.'.

        Returns:
            Depth and number of depths.
        """
        num_layers = sum(self.depths) + 2
        if not param_name.startswith(prefix):
            return num_layers - 1, num_layers
        parts = param_name[len(prefix) :].split(".")
        if parts[0] == "patch_embed":
            return 0, num_layers
        if parts[0] == "stages":
            before = sum(self.depths[: int(parts[1])])
            return (before + int(parts[3]) + 1 if parts[2] == "blocks" else before), num_layers
        return num_layers - 1, num_layers


def depths_and_widths(depths: Any, widths: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Check an arch's depths and widths, and expand a single width to one per stage, doubled from stage to stage."""

    def positive(values: Any) -> bool:
        return isinstance(values, Sequence) and len(values) > 0 and all(isinstance(v, int) and v > 0 for v in values)

    if not positive(depths):
        raise ValueError(f"depths={depths!r} must be a sequence of positive integers, one per stage")
    if isinstance(widths, int):
        widths = [widths * 2**i for i in range(len(depths))]
    if not positive(widths):
        raise ValueError(f"embed_dims={widths!r} must be a positive integer, or a sequence of them, one per stage")
    if len(widths) != len(depths):
        raise ValueError(f"arch names {len(widths)} widths but {len(depths)} depths")
    return tuple(depths), tuple(widths)


def check_choice(name: str, value: Any, choices: Collection) -> None:
    """Raise ValueError unless the argument ``name`` is one of ``choices``."""
    if value not in tuple(choices):
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}")


def _adapt_hook(module: BaseBackbone, state_dict: dict, prefix: str, *_: Any) -> None:
    """Adapt what ``load_state_dict`` is about to load, in place."""
    own = {name[len(prefix) :]: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    adapted = module.adapt_state_dict(own)
    for name in own:
        if name not in adapted:
            del state_dict[prefix + name]
        elif adapted[name] is not own[name]:
            state_dict[prefix + name] = adapted[name]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _to_size(img_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if img_size is None:
        return None
    size = (img_size, img_size) if _is_int(img_size) else tuple(img_size) if isinstance(img_size, Sequence) else ()
    if len(size) != 2 or not all(_is_int(side) and side > 0 for side in size):
        raise ValueError(f"img_size={img_size!r} must be a positive integer or a pair (height, width) of them")
    return size
