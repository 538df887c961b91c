"""Parameters and operations of whole models of the three libraries."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from mmvssm.analysis.flops import FlopCount, count_flops, count_parameters

# What a two-stage detector hands to its heads for one image at test time (the stock test_cfg).
PROPOSALS = 1000
DETECTIONS = 100


@dataclass
class ModelCost:
    """Size and cost of a model at one input shape.

    Attributes:
        shape: Input (channels, height, width).
        parameters: Number of parameter elements.
        flops: Operations for one image.
        module_parameters: Dotted module name -> number of parameter elements inside it.
    """

    shape: tuple[int, int, int]
    parameters: int
    flops: FlopCount
    module_parameters: dict[str, int]


def model_cost(model: nn.Module, shape: Sequence[int], convention: str = "papers") -> ModelCost:
    """Counts parameters and the operations of one image, without computing anything.

    Works on classifiers of mmpretrain, detectors of mmdet, segmentors of mmseg (their auxiliary heads do not run) and
    on any module that takes a (1, C, H, W) tensor. Two-stage detectors are counted with 1000 proposals and 100
    detections; RoIAlign and non-maximum suppression are free.

    Args:
        model: The model, on the CPU. It is switched to eval mode for the count.
        shape: (H, W) or (C, H, W).
        convention: ``'papers'`` (multiply-add = 1) or ``'hardware'`` (multiply-add = 2), see
            :mod:`mmvssm.analysis.flops`.

    Raises:
        ValueError: if the shape or the convention is wrong.
    """
    shape = tuple(shape) if len(shape) == 3 else (3, *shape)
    if len(shape) != 3 or any(not isinstance(size, int) or size < 1 for size in shape):
        raise ValueError(f"shape must be two or three positive integers, (H, W) or (C, H, W), got {shape}")
    training = model.training
    model.eval()
    try:
        # Fake tensors pass through the real model on the CPU path: every shape is exact, nothing is calculated.
        with FakeTensorMode(allow_non_fake_inputs=True):
            image = torch.empty(1, *shape)
            flops = count_flops(lambda: _forward_of(model)(image), model, convention)
    finally:
        model.train(training)
    modules = {name: count_parameters(module) for name, module in model.named_modules()}
    return ModelCost(shape, count_parameters(model), flops, modules)


def _forward_of(model: nn.Module) -> Callable:
    if hasattr(model, "extract_feat") and (hasattr(model, "rpn_head") or hasattr(model, "bbox_head")):
        return lambda image: _run_detector(model, image)
    if hasattr(model, "extract_feat"):
        return lambda image: model(image, mode="tensor")
    return model


def _run_detector(model: nn.Module, image: torch.Tensor) -> None:
    features = model.extract_feat(image)
    dense = model.rpn_head if hasattr(model, "rpn_head") else model.bbox_head
    dense(features)
    roi_head = getattr(model, "roi_head", None)
    for name, count in (("bbox_head", PROPOSALS), ("mask_head", DETECTIONS)):
        heads = getattr(roi_head, name, None)
        for head in heads if isinstance(heads, nn.ModuleList) else [heads] * (heads is not None):
            size = head.roi_feat_size
            size = (size, size) if isinstance(size, int) else tuple(size)
            head(image.new_empty(count, head.in_channels, *size))
