"""Autocast, on devices that have it and on those that do not (the meta device)."""

import torch


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is active for operations on ``device``."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
