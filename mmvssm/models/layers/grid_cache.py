"""Tensors that depend on the grid of the image, kept between calls."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch


class GridCache:
    """The results of the last few keys.

    What a CUDA graph was captured with is kept for good, since the graph reads its memory. While torch traces or
    compiles nothing is kept, because the tensors are stand-ins.

    Args:
        limit: Number of results kept.
    """

    def __init__(self, limit: int = 16):
        self.limit = limit
        self._recent: OrderedDict[Hashable, Any] = OrderedDict()
        self._captured: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], Any], device: torch.device) -> Any:
        """The result of ``make()`` for ``key``: a tensor or tuple of tensors on ``device``, without gradients."""
        if torch.compiler.is_compiling():
            return make()
        value = self._captured.get(key)
        if value is not None:
            return value
        value = self._recent.pop(key, None)
        if value is None:
            with torch.inference_mode(False), torch.no_grad():  # kept beyond this call, perhaps for training
                value = make()
        if type(value[0] if isinstance(value, tuple) else value) is torch.Tensor:
            self._recent[key] = value
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                self._captured[key] = value
            while len(self._recent) > self.limit:
                self._recent.popitem(last=False)
        return value

    def clear(self) -> None:
        """Forget everything but what CUDA graphs read."""
        self._recent.clear()
