"""The network of the feature export: a backbone, and the neck behind it where its levels are wanted."""

import contextlib
import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import nn

from mmvssm.apis import zoo
from mmvssm.apis.feature_files import Stage

RANDOM = "random"
_PROBE_SIZE = 256  # pixels of the input for which the strides of a neck are measured


class FeatureNetwork(nn.Module):
    """Gives chosen stages of a backbone and levels of a neck.

    Args:
        backbone: One of ours.
        neck: Takes the tuple of the backbone's maps and gives a sequence of maps.

    Attributes:
        outputs: What `forward` gives: stages by number, levels as 'neck0', ...
        strides: Of the outputs.
    """

    def __init__(self, backbone: nn.Module, neck: nn.Module | None = None):
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.outputs: tuple[Stage, ...] = backbone.out_indices
        self.strides: tuple[int, ...] = backbone.out_strides

    def choose(self, stages: Sequence[int] | None, levels: Sequence[int] | None) -> None:
        """Choose the outputs.

        Args:
            stages: Those of the backbone; None for all that it gives.
            levels: Those of the neck, negative ones count from the end; None for all.

        Raises:
            ValueError: There are no such ones, or the neck gives no maps.
        """
        strides = dict(zip(self.backbone.out_indices, self.backbone.out_strides, strict=True))
        chosen: list[Stage] = list(strides if stages is None else stages)
        if self.neck is not None:
            found = self._measure_neck()
            count = len(found)
            for level in range(count) if levels is None else levels:
                if not -count <= level < count:
                    raise ValueError(f"neck must hold levels in -{count}..{count - 1}, got {level!r}")
                name = f"neck{level % count}"
                if name not in chosen:
                    chosen.append(name)
                strides[name] = found[level]
        self.outputs = tuple(chosen)
        self.strides = tuple(strides[name] for name in chosen)

    @torch.inference_mode()
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Map images (B, 3, H, W) to one map (B, C, H', W') per output."""
        maps = self.backbone(x)
        found = dict(zip(self.backbone.out_indices, maps, strict=True))
        if self.neck is not None:
            found.update({f"neck{i}": level for i, level in enumerate(self.neck(tuple(maps)))})
        return [found[name] for name in self.outputs]

    @torch.inference_mode()
    def _measure_neck(self) -> list[int]:
        """Strides of the neck's levels, from the sizes that it gives for maps of a known size."""
        like = next(self.neck.parameters(), next(self.backbone.parameters()))
        probe = tuple(
            torch.zeros(1, channels, _PROBE_SIZE // stride, _PROBE_SIZE // stride, device=like.device)
            for channels, stride in zip(self.backbone.out_channels, self.backbone.out_strides, strict=True)
        )
        levels = self.neck(probe)
        name = type(self.neck).__name__
        if not isinstance(levels, (tuple, list)) or any(level.ndim != 4 for level in levels):
            raise ValueError(f"neck: {name} gives no maps (B, C, H, W), so there are no levels to write")
        return [round(_PROBE_SIZE / level.shape[2]) for level in levels]


def read_config(model: str | os.PathLike | Config) -> Config:
    """The config of a zoo name or file, without what would download weights.

    Raises:
        FileNotFoundError, ValueError, ImportError, TypeError: It is not there, or cannot be used.
    """
    if isinstance(model, Config):
        config = copy.deepcopy(model)
    elif isinstance(model, (str, os.PathLike)):
        config = _read_file(os.fspath(model))
    else:
        raise TypeError(f"model must be a name, a config file or a Config, got {type(model).__name__}")
    if "backbone" not in config.get("model", {}):
        raise ValueError(
            f"{config.filename} has no model.backbone: it is no config of a model that this function can use."
        )
    zoo._drop_pretrained(config.model)
    return config


def _read_file(name: str) -> Config:
    if name.endswith(".py"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"There is no config file {name}.")
    else:
        path = zoo.config_path(name)
    try:
        return Config.fromfile(path)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"The config {path} builds on a library that is not installed ({error}); install it with: pip install "
            '"mmvssm[openmmlab]".'
        ) from error
    except Exception as error:  # whatever executing the file leads to
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"The config {path} cannot be read ({reason}).") from error


def build_network(
    config: Config,
    checkpoint: str | os.PathLike,
    out_indices: int | Sequence[int] | None,
    neck: bool | int | Sequence[int],
    device: torch.device,
) -> FeatureNetwork:
    """Build what a config describes, load its weights, choose its outputs.

    Args:
        config: From `read_config`.
        checkpoint: Path or URL, or 'random'.
        out_indices: Stages; None for those of the config; empty for none, beside levels of the neck.
        neck: False, True for all levels, or levels.
        device: Where it goes.

    Raises:
        ValueError: The checkpoint does not fit, or there is no such stage, neck or level.
    """
    part = config.model.backbone
    part.pop("out_type", None)  # a classifier's backbone may be set to give a vector
    stages = (out_indices,) if isinstance(out_indices, int) else out_indices
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for 'random'
        if neck is False:
            if stages is not None:
                part.out_indices = tuple(stages)
            backbone = _build_backbone(config, part)
            zoo._finish(backbone, None if checkpoint == RANDOM else checkpoint, device)
            return FeatureNetwork(backbone).eval().requires_grad_(False)
        backbone = _build_backbone(config, part)
        stages = _stages_beside_neck(config, backbone, stages)
        network = FeatureNetwork(backbone, _build_neck(config))
        if checkpoint == RANDOM:
            zoo._init_weights(network.backbone)
            zoo._init_weights(network.neck)
        else:
            _load_with_neck(network, checkpoint)
    network.to(device).eval().requires_grad_(False)
    levels = None if neck is True else (neck,) if isinstance(neck, int) else neck
    network.choose(stages, levels)
    return network


def _build_backbone(config: Config, part: dict) -> nn.Module:
    backbone = zoo._build(config, part)
    if not hasattr(backbone, "out_indices") or not hasattr(backbone, "out_strides"):
        raise ValueError(f"{config.filename}: {type(backbone).__name__} is no backbone of this project.")
    if backbone.in_channels != 3:
        raise ValueError(f"{config.filename}: the backbone takes {backbone.in_channels} channels, images have 3.")
    return backbone


def _stages_beside_neck(config: Config, backbone: nn.Module, stages: Sequence[int] | None) -> Sequence[int] | None:
    """The wanted stages with non-negative numbers. The neck takes what its config says, so no others can be had."""
    if not stages:
        return stages
    wanted = _build_backbone(config, {**config.model.backbone, "out_indices": tuple(stages)}).out_indices
    if absent := [stage for stage in wanted if stage not in backbone.out_indices]:
        raise ValueError(
            f"out_indices={tuple(stages)}: beside the neck only the stages that it takes can be written, "
            f"{backbone.out_indices} in {config.filename}, got {absent[0]}"
        )
    return wanted


def _build_neck(config: Config) -> nn.Module:
    part = config.model.get("neck")
    if not part:
        raise ValueError(
            f"neck: {config.filename} has no model.neck; detectors have one, and segmenters of plain backbones"
        )
    return zoo._build(config, part)


def _load_with_neck(network: FeatureNetwork, checkpoint: str | os.PathLike) -> None:
    """Load a file of a whole model without its heads."""
    from mmvssm.checkpoints import convert_official, load_into
    from mmvssm.checkpoints.families import get_family
    from mmvssm.checkpoints.reader import read_checkpoint
    from mmvssm.checkpoints.wrappers import unwrap

    family = get_family(network.backbone.family)
    try:
        tensors = convert_official(unwrap(read_checkpoint(checkpoint), family.prefer_ema), family=family.name)
        if not any(name.startswith("neck.") for name in tensors) and network.neck.state_dict():
            raise ValueError("it holds no neck; its levels need the weights of a whole detector or segmenter")
        load_into(network, {k: v for k, v in tensors.items() if k.startswith(("backbone.", "neck."))})
    except ValueError as error:
        raise ValueError(f"checkpoint {os.fspath(checkpoint)}: {error}") from error


def forward_batch(network: FeatureNetwork, x: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """One map (B, C, H, W) of `dtype` on the CPU per output, for images (B, 3, H, W).

    Raises:
        RuntimeError: Out of memory.
        ValueError: A size that the network refuses.
    """
    mixed = torch.autocast(x.device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
    try:
        with mixed:
            return [m.to("cpu", dtype) for m in network(x)]
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"Out of memory with a batch of {tuple(x.shape)}: give a smaller batch_size or size."
        ) from error


def hash_checkpoint(checkpoint: str | os.PathLike) -> str | None:
    """SHA-256 of the file, which is downloaded if it is a URL; None for random weights."""
    from mmvssm.checkpoints.download import download, sha256_of_file

    path = os.fspath(checkpoint)
    if path == RANDOM:
        return None
    if path.startswith(("http://", "https://")):
        path = download(path, check_name=True)
    path = path.removeprefix("file://")
    if not Path(path).expanduser().is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    return sha256_of_file(path)


def name_of(model: str | os.PathLike | Config, config: Config) -> str:
    """Name in the zoo that `model` gives, or the stem of its config's file."""
    is_name = isinstance(model, str) and not model.endswith(".py")
    return model if is_name else Path(config.filename or "config").stem


def describe_network(config: Config, neck: bool) -> dict[str, Any]:
    """What of the config decides about the features, as text."""
    names = ("backbone", "neck") if neck else ("backbone",)
    return {name: json.dumps(config.model[name], sort_keys=True, default=str) for name in names}
