"""``mmcv._ext`` where mmcv has no usable compiled operators; bfloat16 and strided maps where it has.

mmcv-lite lacks the compiled module ``mmcv._ext``, and one built for another torch or C library fails to load. Of its
functions stock two-stage detectors need three: ``nms``, ``roi_align_forward`` and ``roi_align_backward``. A finder
answers for ``mmcv._ext`` only: a compiled module that imports is used as it is; otherwise a stand-in offers the three,
from torchvision when its compiled part loads, else in plain torch. Every other operator raises when called, not at
import, because mmcv looks all names up at import.

Neither mmcv nor torchvision has a bfloat16 RoIAlign, which stops bfloat16 AMP in the RoI head; whatever the source, the
three functions therefore compute bfloat16 (and float16 on CPU) in float32. And mmcv's compiled RoIAlign reads any map
as if it were contiguous: of a channels_last map, such as a LayerNorm over channels or a channels_last convolution
returns, it takes the wrong numbers without a word, so that heads see noise. Maps are made contiguous for it.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from mmvssm.compat import pieces
from mmvssm.compat.import_hooks import WrappedLoader, find_spec_of_others, install_finder

if TYPE_CHECKING:
    from torch import Tensor

NAME = "mmcv._ext"

STAND_IN = pieces.register(
    "mmcv operators",
    reason="mmcv-lite has no compiled operators and foreign builds fail to load; detectors need nms and roi_align",
    until="mmcv publishes wheels with operators for current torch",
)
BFLOAT16 = pieces.register(
    "bfloat16 operators",
    reason="compiled nms and roi_align of mmcv (<= 2.2, onedl <= 2.3.6) and torchvision have no bfloat16 kernels",
    until="mmcv and torchvision dispatch bfloat16 in nms and roi_align",
)
STRIDES = pieces.register(
    "strided operators",
    reason="compiled nms and roi_align of mmcv (<= 2.2) read permuted and channels_last maps as if contiguous",
    until="mmcv makes their arguments contiguous or refuses others",
)


def install() -> None:
    """Answer for ``mmcv._ext`` from now on. Must come before ``mmcv.ops`` is imported."""
    module = sys.modules.get(NAME)
    if module is not None:
        if not isinstance(module, StandIn):
            _adapt_compiled(module)
        return
    install_finder(_FINDER)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the compiled module if there is one, else the stand-in."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != NAME:
            return None
        spec = find_spec_of_others(fullname, path, target, self)
        if spec is None or spec.loader is None:
            return importlib.machinery.ModuleSpec(NAME, _StandInLoader("mmcv has no compiled operators"))
        spec.loader = _CompiledLoader(spec.loader)
        return spec


_FINDER = _Finder()


class _StandInLoader(importlib.abc.Loader):
    """Makes the stand-in module."""

    def __init__(self, why: str) -> None:
        self.why = why

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return StandIn(self.why)

    def exec_module(self, module: ModuleType) -> None:
        STAND_IN.activate(f"{self.why}; nms and roi_align come from {stand_in_source()}")
        BFLOAT16.stand_by("the stand-in computes bfloat16 in float32 anyway")
        STRIDES.stand_by("the stand-in takes any strides")


class _CompiledLoader(WrappedLoader):
    """Loads the compiled module; one that cannot be loaded counts as absent, with a notice."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        try:
            return super().create_module(spec)
        except ImportError as error:
            return self._absent(error)

    def exec_module(self, module: ModuleType) -> None:
        if isinstance(module, StandIn):
            _StandInLoader(module.why).exec_module(module)
            return
        try:
            super().exec_module(module)
        except ImportError as error:
            module = self._absent(error)
            sys.modules[NAME] = module  # the import system returns what stands here
            _StandInLoader(module.why).exec_module(module)
            return
        STAND_IN.stand_by("compiled mmcv operators are used")
        _adapt_compiled(module)

    @staticmethod
    def _absent(error: ImportError) -> StandIn:
        warnings.warn(
            f"mmvssm: the compiled operators of mmcv do not load ({str(error)[:300]}); they were probably built for "
            "another torch, Python or C library. Slower replacements of nms and roi_align are used instead.",
            stacklevel=2,
        )
        return StandIn("the compiled mmcv operators do not load")


class StandIn(ModuleType):
    """Module with mmcv's three essential operators; any other attribute is a function that raises when called."""

    def __init__(self, why: str) -> None:
        super().__init__(NAME, "Stand-in for mmcv's compiled operators.")
        self.why = why
        self.nms = _nms
        self.roi_align_forward = _roi_align_forward
        self.roi_align_backward = _roi_align_backward

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args, **kwargs):
            raise NotImplementedError(
                f"{name} needs compiled mmcv operators ({self.why}). Build mmcv with operators for this torch, or use "
                "a config that needs no other operators than nms and roi_align."
            )

        missing.__name__ = name
        return missing


@functools.cache
def stand_in_source() -> str:
    """Where the stand-in takes its operators from: ``'torchvision'`` or ``'plain torch'``."""
    try:
        import torchvision
    except Exception:  # missing, or a build that does not fit torch: either way there is nothing to use
        return "plain torch"
    has_ops = getattr(torchvision.extension, "_has_ops", lambda: False)()
    return "torchvision" if has_ops else "plain torch"


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """``mmcv._ext.nms``: indices that greedy suppression keeps."""
    if stand_in_source() == "torchvision":
        import torch
        from torchvision.ops import nms

        boxes, scores = _widened(boxes), _widened(scores)
        if offset:  # widths x2 - x1 + offset are plain widths of boxes that end `offset` later
            boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
        # torchvision on GPU wants both in one dtype
        dtype = torch.promote_types(boxes.dtype, scores.dtype)
        return nms(boxes.to(dtype), scores.to(dtype), float(iou_threshold))
    from mmvssm.compat.nms import nms

    return nms(boxes, scores, float(iou_threshold), int(offset))


def _roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """``mmcv._ext.roi_align_forward``: writes into ``output`` (K, C, aligned_height, aligned_width)."""
    _only_average(pool_mode)
    if stand_in_source() == "torchvision":
        import torch

        features = _widened(input)
        pooled = torch.ops.torchvision.roi_align(
            features, rois.to(features.dtype), spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned
        )
    else:
        from mmvssm.compat.roi_align import roi_align

        pooled = roi_align(input, rois, (aligned_height, aligned_width), spatial_scale, sampling_ratio, aligned)
    output.copy_(pooled)


def _roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """``mmcv._ext.roi_align_backward``: adds to ``grad_input`` (N, C, H, W), which arrives as zeros."""
    _only_average(pool_mode)
    if stand_in_source() == "torchvision":
        import torch

        grad = _widened(grad_output)
        gradient = torch.ops.torchvision._roi_align_backward(
            grad,
            rois.to(grad.dtype),
            spatial_scale,
            aligned_height,
            aligned_width,
            *grad_input.shape,
            sampling_ratio,
            aligned,
        )
    else:
        from mmvssm.compat.roi_align import roi_align_backward

        gradient = roi_align_backward(
            grad_output, rois, tuple(grad_input.shape), spatial_scale, sampling_ratio, aligned
        )
    grad_input.add_(gradient)


def _only_average(pool_mode: int) -> None:
    if pool_mode == 0:
        raise NotImplementedError(
            "RoIAlign with pool_mode='max' needs compiled mmcv operators; pool_mode='avg' (the default) does not"
        )


def _needs_widening(tensor: Tensor) -> bool:
    import torch

    return tensor.dtype == torch.bfloat16 or (tensor.dtype == torch.float16 and tensor.device.type == "cpu")


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if _needs_widening(tensor) else tensor


# Functions to adapt -> position and name of the tensor that they write into (None: they return their result).
_WRITES = {"nms": None, "roi_align_forward": (2, "output"), "roi_align_backward": (4, "grad_input")}


def _adapt_compiled(module: ModuleType) -> None:
    """Let the compiled functions of ``mmcv._ext`` take bfloat16 (and float16 on CPU) and any strides."""
    for name, written in _WRITES.items():
        function = getattr(module, name, None)
        if function is not None and not hasattr(function, "__wrapped__"):
            setattr(module, name, _adapted(function, written))
    BFLOAT16.activate("compiled nms and roi_align take bfloat16 through float32")
    STRIDES.activate("compiled nms and roi_align take contiguous copies of strided maps")


def _adapted(function: Callable, written: tuple[int, str] | None) -> Callable:
    """``function`` on contiguous and wide tensors; the one it writes into is copied back."""

    @functools.wraps(function, assigned=(), updated=())
    def wrapper(*args, **kwargs):
        import torch

        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        narrow = [tensor for tensor in tensors if _needs_widening(tensor)]
        if narrow and kwargs.get("pool_mode", 1) == 0:
            # It stores the positions of maxima in the input's dtype, where they would not survive the way back.
            raise NotImplementedError(f"RoIAlign with pool_mode='max' does not work in {narrow[0].dtype}; use float32")
        fitting = {id(tensor): _widened(tensor).contiguous() for tensor in tensors}

        def swap(value):
            return fitting.get(id(value), value)

        result = function(*map(swap, args), **{name: swap(value) for name, value in kwargs.items()})
        if written is not None:
            position, name = written
            target = args[position] if len(args) > position else kwargs[name]
            if swap(target) is not target:
                target.copy_(swap(target))
        return result

    return wrapper
