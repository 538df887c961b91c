"""Linear layers and convolutions whose weights a block converts together under autocast.

Autocast converts every weight in a launch of its own just before it is used, seven for a block of ViG. For large images
these launches are 7 % of an inference step.
"""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn import functional as F

from mmvssm_kernels import cast_together

from .precision import autocast_inference

_local = threading.local()


def _converted(parameter: nn.Parameter | None) -> torch.Tensor | None:
    """The copy of a parameter that :func:`weights_converted` has made in this thread, or the parameter itself."""
    copy = getattr(_local, "copies", {}).get(parameter)
    # A sharded parameter is only put together when its block is called, after the copies were made.
    return parameter if copy is None or copy.shape != parameter.shape else copy


class Linear(nn.Linear):
    """torch's layer; see :func:`weights_converted`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (..., C_in) to (..., C_out)."""
        return F.linear(x, _converted(self.weight), _converted(self.bias))


class Conv2d(nn.Conv2d):
    """torch's layer; see :func:`weights_converted`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, C_in, H, W) to (B, C_out, H', W')."""
        return self._conv_forward(x, _converted(self.weight), _converted(self.bias))


def weights_converted(block: nn.Module) -> AbstractContextManager[None]:
    """Context in which the :class:`Linear` and :class:`Conv2d` layers of a block use copies in autocast's dtype.

    The copies are made by one launch and freed at the end. Nothing happens where autocast is off, and where gradients
    are on: then autocast keeps its own copies for the backward pass. Weights in channels_last memory are left to
    autocast, which keeps their layout.
    """
    first = next(block.parameters(), None)
    if first is None or not autocast_inference(first.device):
        return nullcontext()
    layers = [m for m in block.modules() if isinstance(m, Linear | Conv2d)]
    parameters = [p for m in layers for p in (m.weight, m.bias) if p is not None]
    parameters = [p for p in parameters if p.dtype == torch.float32 and p.is_contiguous()]
    return _copies_of(parameters) if parameters else nullcontext()


@contextmanager
def _copies_of(parameters: list[nn.Parameter]) -> Iterator[None]:
    dtype = torch.get_autocast_dtype(parameters[0].device.type)
    copies = cast_together(parameters, dtype)
    outer = getattr(_local, "copies", {})
    _local.copies = dict(zip(parameters, copies, strict=True))
    try:
        yield
    finally:
        _local.copies = outer
