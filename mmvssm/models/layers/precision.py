"""Autocast, on devices that have it and on those that do not (the meta device)."""

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is active for operations on ``device``."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Context in which operations on ``device`` keep the dtypes that they are given."""
    return torch.autocast(device.type, enabled=False) if autocast_enabled(device) else nullcontext()
