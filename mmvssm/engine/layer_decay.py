"""Optimiser-wrapper constructor with no-decay sets and layer-wise learning-rate decay."""

import logging
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from mmvssm.registry import OPTIM_WRAPPER_CONSTRUCTORS

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")
_PRESETS = ("default", "official", "official-classification", "official-dense")
_RATE_KEYS = ("norm_decay_mult", "bias_decay_mult", "flat_decay_mult")
_KNOWN_KEYS = ("preset", "layer_decay_rate", *_RATE_KEYS, "custom_keys", "bypass_duplicate")


@dataclass
class _Group:
    """Parameters that share their settings."""

    settings: dict[str, Any]
    names: list[str] = field(default_factory=list)
    parameters: list[nn.Parameter] = field(default_factory=list)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Parameter groups for our backbones in mmpretrain, mmdet and mmseg.

    Which parameters are not decayed is asked of the backbone (`no_weight_decay()`: A, D, step-size biases, position
    embeddings; the stock recipes decay them), and so is the depth for layer-wise learning-rate decay
    (`get_layer_depth()`). Necks and heads train at the full rate. Backbones of other projects work too; without
    `get_layer_depth()` they cannot have a layer-wise rate.

    `paramwise_cfg` may hold:

    - `preset`: Which parameters are left without weight decay.
      'default': what the backbone names, norms, biases and everything one-dimensional.
      'official': what the authors' runs really left out: 'official-classification' in a classifier, else
      'official-dense'.
      'official-classification': one-dimensional tensors, names that end in '.bias', pos_embed and class tokens. Packed
      step-size biases and A (two-dimensional) are decayed.
      'official-dense': names that contain 'norm' in the authors' code, and nothing else: all biases, A, D, and the
      norms of stems and convolutional downsamplings are decayed.
    - `layer_decay_rate` (float): Factor on the learning rate per layer, counted from the last. Default: 1.
    - `norm_decay_mult`, `bias_decay_mult`, `flat_decay_mult` (float): Factors on the weight decay of norms, biases and
      other one-dimensional parameters, with the preset 'default' only. Default: 0.
    - `custom_keys` (dict): Part of a name -> dict of `lr_mult`, `decay_mult` and settings of the optimiser; the longest
      match decides. `lr_mult` multiplies the layer-wise rate; without `decay_mult` the preset decides (MMEngine's own
      constructor then decays everything that matches, norms included).
    - `bypass_duplicate`: Accepted and ignored; shared parameters are always entered once.

    Example:
        >>> optim_wrapper = dict(
        ...     type='OptimWrapper',
        ...     optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
        ...     constructor='mmvssm.LayerDecayOptimWrapperConstructor',
        ...     paramwise_cfg=dict(layer_decay_rate=0.9))

    Raises:
        ValueError: Unknown or contradictory keys in `paramwise_cfg`.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        # The base class would skip its groups for an empty dict.
        super().__init__(optim_wrapper_cfg, paramwise_cfg or {"preset": "default"})

    def _validate_cfg(self) -> None:
        cfg = self.paramwise_cfg
        if not isinstance(cfg, dict):
            raise TypeError(f"paramwise_cfg must be a dict or None, got {type(cfg).__name__}.")
        unknown = [k for k in cfg if k not in _KNOWN_KEYS]
        if unknown:
            raise ValueError(
                f"paramwise_cfg has no {', '.join(map(repr, unknown))} with "
                f"{type(self).__name__}; known are {', '.join(_KNOWN_KEYS)}."
            )
        preset = cfg.get("preset", "default")
        if preset not in _PRESETS:
            raise ValueError(f"preset must be one of {', '.join(_PRESETS)}, got {preset!r}.")
        clashing = [k for k in _RATE_KEYS if k in cfg]
        if preset != "default" and clashing:
            raise ValueError(
                f"preset={preset!r} fixes the weight decay, so {', '.join(clashing)} cannot be given as well; if an "
                f"inherited config has them, write paramwise_cfg=dict(_delete_=True, preset={preset!r})."
            )
        rate = cfg.get("layer_decay_rate", 1.0)
        if not _is_number(rate) or not 0 < rate <= 1:
            raise ValueError(f"layer_decay_rate must be a number above 0 and at most 1, got {rate!r}.")
        for key in clashing:
            if not _is_number(cfg[key]):
                raise ValueError(f"{key} must be a number, got {cfg[key]!r}.")
        custom = cfg.get("custom_keys", {})
        if not isinstance(custom, dict) or not all(isinstance(v, dict) for v in custom.values()):
            raise TypeError(f"custom_keys must be a dict of dicts (part of a name -> settings), got {custom!r}.")
        if self.base_lr is None and (rate != 1 or any("lr_mult" in v for v in custom.values())):
            raise ValueError("The optimizer has no lr, which layer_decay_rate and lr_mult are factors of.")

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = "", **kwargs: Any) -> None:
        """Append the parameter groups of `module` (the whole model) to `params` and log them as a table."""
        backbones = dict(_find_backbones(module))
        spared = {n for p, b in backbones.items() for n in _spared_names(p, b)}
        preset = self._resolve_preset(module)
        official_names = _official_names(backbones) if preset == "official-dense" else {}
        groups: dict[tuple, _Group] = {}
        for name, parameter, owner in _parameters(module):
            if not parameter.requires_grad:
                continue
            lr_scale = self._layer_scale(name, backbones)
            settings, decay_mult = self._custom_settings(name, lr_scale)
            if decay_mult is None and preset == "default":
                decay_mult = self._default_decay(name, parameter, owner, spared)
            elif decay_mult is None and preset == "official-classification":
                decay_mult = 0.0 if parameter.ndim <= 1 or name.endswith(".bias") or _is_embedding(name) else 1.0
            elif decay_mult is None:
                decay_mult = 0.0 if "norm" in official_names.get(name, name) else 1.0
            if self.base_wd is not None:
                settings["weight_decay"] = self.base_wd * decay_mult
            key = tuple(sorted((k, repr(v)) for k, v in settings.items()))
            group = groups.setdefault(key, _Group(settings))
            group.names.append(name)
            group.parameters.append(parameter)
        params.extend({"params": g.parameters, **g.settings} for g in groups.values())
        print_log(self._table(preset, list(groups.values())), logger="current", level=logging.INFO)

    def _resolve_preset(self, module: nn.Module) -> str:
        preset = self.paramwise_cfg.get("preset", "default")
        if preset != "official":
            return preset
        # mmpretrain's classifiers are the only models whose head is called just that.
        return "official-classification" if hasattr(module, "head") else "official-dense"

    def _custom_settings(self, name: str, lr_scale: float) -> tuple[dict[str, Any], float | None]:
        """Settings by `custom_keys` and depth, and the factor on the weight decay (None: the preset decides)."""
        custom = self.paramwise_cfg.get("custom_keys", {})
        # The longest match, the alphabetically first among equals, as in MMEngine.
        key = next((k for k in sorted(sorted(custom), key=len, reverse=True) if k in name), None)
        chosen = dict(custom[key]) if key is not None else {}
        lr_mult = chosen.pop("lr_mult", 1.0)
        decay_mult = chosen.pop("decay_mult", None)
        if self.base_lr is not None:
            chosen["lr"] = self.base_lr * lr_mult * lr_scale
        return chosen, decay_mult

    def _default_decay(self, name: str, parameter: nn.Parameter, owner: nn.Module, spared: Collection[str]) -> float:
        cfg = self.paramwise_cfg
        if name in spared:
            return 0.0
        if isinstance(owner, _NORMS):
            return cfg.get("norm_decay_mult", 0.0)
        if name.rpartition(".")[2] == "bias":
            return cfg.get("bias_decay_mult", 0.0)
        return cfg.get("flat_decay_mult", 0.0) if parameter.ndim <= 1 else 1.0

    def _layer_scale(self, name: str, backbones: dict[str, nn.Module]) -> float:
        rate = self.paramwise_cfg.get("layer_decay_rate", 1.0)
        prefix = next((p for p in backbones if name.startswith(p)), None)
        if rate == 1 or prefix is None:
            return 1.0
        backbone = backbones[prefix]
        if not hasattr(backbone, "get_layer_depth"):
            raise ValueError(
                f"layer_decay_rate={rate} needs a backbone with get_layer_depth(); {type(backbone).__name__} has none."
            )
        depth, depths = backbone.get_layer_depth(name, prefix)
        return rate ** (depths - depth - 1)

    def _table(self, preset: str, groups: list[_Group]) -> str:
        """One row per group, for the log."""
        rows = [("group", "lr", "weight decay", "tensors", "parameters", "for example")]
        for i, group in enumerate(groups):
            count = sum(p.numel() for p in group.parameters)
            lr, decay = group.settings.get("lr"), group.settings.get("weight_decay")
            rows.append((str(i), _short(lr), _short(decay), str(len(group.names)), f"{count:,}", group.names[0]))
        widths = [max(len(row[c]) for row in rows) for c in range(5)]
        lines = ["  ".join([*(cell.rjust(w) for cell, w in zip(row, widths, strict=False)), row[5]]) for row in rows]
        return "\n".join([f"Parameter groups, preset {preset!r}:", *lines])


def _official_names(backbones: dict[str, nn.Module]) -> dict[str, str]:
    """Our names -> the authors', for the parameters of our backbones; other names are the same here and there."""
    from mmvssm.checkpoints.families import get_family

    names = {}
    for prefix, backbone in backbones.items():
        if isinstance(getattr(backbone, "family", None), str):
            family = get_family(backbone.family)
            own = {_clean(name) for name, _ in backbone.named_parameters()}
            names.update((prefix + name, prefix + family.official_name(name, own)) for name in own)
    return names


def _parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Name (without those of wrappers), parameter and owning module, each parameter once."""
    seen: set[int] = set()
    for module_name, owner in module.named_modules():
        for leaf, parameter in owner.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield _clean(f"{module_name}.{leaf}" if module_name else leaf), parameter, owner


def _find_backbones(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Prefix and module of the outermost backbones: ours, and whatever is called `backbone`."""
    found: list[str] = []
    for name, part in module.named_modules():
        name = _clean(name)
        is_backbone = isinstance(getattr(part, "family", None), str) or name.rpartition(".")[2] == "backbone"
        prefix = f"{name}." if name else ""
        if is_backbone and not any(prefix.startswith(outer) for outer in found):
            found.append(prefix)
            yield prefix, part


def _spared_names(prefix: str, backbone: nn.Module) -> Iterator[str]:
    if hasattr(backbone, "no_weight_decay"):
        yield from (prefix + _clean(name) for name in backbone.no_weight_decay())


def _clean(name: str) -> str:
    """`name` without what sharding, compilation and activation checkpointing put into it."""
    name += "."
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.rstrip(".")


def _is_embedding(name: str) -> bool:
    """Position embedding or class token."""
    return "pos_embed" in name or "cls_token" in name


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
