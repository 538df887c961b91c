"""Models by name for comparisons: those of the zoo, and those of timm where it is installed.

A name is a short name or stem of the zoo (``vim-tiny``), or ``timm:`` and a name of timm
(``timm:swin_tiny_patch4_window7_224``), and may end in variants:

``@plain``
    timm only: attention as two products and a softmax instead of torch's fused operator.
``@folded``
    zoo only: batch norms folded into the convolutions, for inference, where a backbone has ``fuse_batch_norms``.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from mmvssm.apis import zoo

VARIANTS = ("plain", "folded")
TIMM = "timm:"


class Contender(NamedTuple):
    """A parsed name: that of the zoo or of timm, which of the two, and the variants asked for."""

    base: str
    from_timm: bool
    variants: tuple[str, ...]


def parse_contender(name: str) -> Contender:
    """Take a name apart, and check as much of it as can be checked without building the model.

    Args:
        name: As in this module's docstring.

    Raises:
        ValueError: A model or variant is unknown.
        ImportError: timm is asked for and not installed.
    """
    base, *variants = name.split("@")
    if unknown := [v for v in variants if v not in VARIANTS]:
        raise ValueError(f"{name} asks for the variant {unknown[0]!r}; known: {', '.join(VARIANTS)}")
    from_timm = base.startswith(TIMM)
    wrong = "folded" if from_timm else "plain"
    if wrong in variants:
        raise ValueError(f"{name}: the variant {wrong!r} is for {'the zoo' if from_timm else 'timm'} only")
    if not from_timm:
        zoo.config_path(base)
        return Contender(base, False, tuple(variants))
    base = base.removeprefix(TIMM)
    timm = _import_timm(name)
    if not timm.is_model(base):
        near = timm.list_models(f"*{base}*")[:4]
        raise ValueError(f"timm has no model {base!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))
    return Contender(base, True, tuple(variants))


def build_classifier(name: str, size: Sequence[int], device: str | torch.device = "cpu") -> nn.Module:
    """A classifier with random weights for images of one size: (B, 3, H, W) -> (B, classes).

    Position embeddings are made for that size, so that none is interpolated at run time. Layers that timm built with
    fixed windows pad as its own code does.

    Args:
        name: As in this module's docstring.
        size: (H, W).
        device: Where the model goes.

    Raises:
        ValueError, ImportError: As :func:`parse_contender`, or a variant has nothing to act upon.
    """
    contender, size = parse_contender(name), tuple(size)
    build = _build_timm if contender.from_timm else _build_zoo
    model = build(contender.base, size)
    if "plain" in contender.variants:
        layers = [module for module in model.modules() if hasattr(module, "fused_attn")]
        if not layers:
            raise ValueError(f"{name}: this model has no attention that could be plain")
        for layer in layers:
            layer.fused_attn = False
    if "folded" in contender.variants:
        if not hasattr(model.backbone, "fuse_batch_norms"):
            raise ValueError(f"{name}: {type(model.backbone).__name__} has no batch norms to fold")
        model.backbone.fuse_batch_norms()
    return model.to(device).eval()


class TimmFeatures(nn.Module):
    """The last map of a model of timm: (B, 3, H, W) -> ((B, C, h, w),), as the backbones of this project give it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.model.forward_intermediates(x, indices=1, intermediates_only=True)[-1],)


def build_backbone(
    name: str, size: Sequence[int], stage: int = -1, checkpoint: str | os.PathLike | None = None
) -> nn.Module:
    """A backbone that gives one map, with random or trained weights, in eval mode.

    Args:
        name: As in this module's docstring, without variants.
        size: (H, W) of the images.
        stage: Which stage (block, for plain backbones) gives the map; for timm only the last, -1.
        checkpoint: Path or URL of weights, read as data; None for random ones.

    Returns:
        A module (B, 3, H, W) -> a tuple of one (B, C, h, w).

    Raises:
        ValueError, ImportError: As :func:`parse_contender`, or the stage or checkpoint does not fit.
    """
    contender, size = parse_contender(name), tuple(size)
    if contender.variants:
        raise ValueError(f"{name}: variants make no difference to features; leave them out")
    if not contender.from_timm:
        return zoo.get_backbone(contender.base, checkpoint, out_indices=(stage,), img_size=size)
    if stage != -1:
        raise ValueError(f"{name}: of timm's models only the last stage, -1, is available, got {stage}")
    model = _build_timm(contender.base, size)
    if checkpoint is not None:
        from mmvssm.checkpoints.reader import read_checkpoint
        from mmvssm.checkpoints.wrappers import unwrap

        try:
            model.load_state_dict(unwrap(read_checkpoint(checkpoint)))
        except RuntimeError as error:
            raise ValueError(f"checkpoint {os.fspath(checkpoint)} does not fit {name}: {error}") from error
    return TimmFeatures(model).eval()


def _import_timm(name: str):
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ImportError(f"{name} needs timm, which is not installed ({error}): pip install timm") from error
    return timm


def _build_zoo(name: str, size: tuple[int, int]) -> nn.Module:
    return zoo.get_model(name, img_size=size)


def _build_timm(name: str, size: tuple[int, int]) -> nn.Module:
    timm = _import_timm(TIMM + name)
    try:
        return timm.create_model(name, img_size=size)
    except TypeError as error:  # convolutional networks take any size and have no such argument
        if "img_size" not in str(error):
            raise
        return timm.create_model(name)
