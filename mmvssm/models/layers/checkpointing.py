"""Activation checkpointing."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def run_block(block: nn.Module, *args: torch.Tensor, with_cp: bool = False) -> torch.Tensor:
    """Call ``block(*args)``; with ``with_cp`` its activations are recomputed in the backward pass."""
    if with_cp and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)
