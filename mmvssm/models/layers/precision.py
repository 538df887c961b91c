"""Autocast, on devices that have it and on those that do not (the meta device)."""

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is active for operations on ``device``."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def casts_dropped(device: torch.device) -> AbstractContextManager:
    """Context for a network that uses each weight once: without gradients, autocast keeps no converted copies in it."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device.type, torch.get_autocast_dtype(device.type), cache_enabled=False)
