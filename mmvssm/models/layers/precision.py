"""Autocast, on devices that have it and on those that do not (the meta device)."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is active for operations on ``device``."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def autocast_inference(device: torch.device) -> bool:
    """Whether a network runs eagerly under autocast on ``device``, and nobody wants gradients."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling() and autocast_enabled(device)


def drop_casts(forward: Callable) -> Callable:
    """Decorator for ``forward(self, x)`` of a network that uses each weight once.

    Autocast keeps the converted copy of every weight for a second use. Without gradients these copies are freed at
    once instead, which is half the size of the network in float16.
    """

    @functools.wraps(forward)
    def wrapped(self, x: torch.Tensor) -> Any:
        device = x.device
        if not autocast_inference(device):
            return forward(self, x)
        with torch.autocast(device.type, torch.get_autocast_dtype(device.type), cache_enabled=False):
            return forward(self, x)

    return wrapped
