"""Activation checkpointing."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from .converted import weights_converted


def run_block(block: nn.Module, *args: torch.Tensor | None, with_cp: bool = False) -> Any:
    """Call ``block(*args)``; with ``with_cp`` its activations are recomputed in the backward pass.

    Running statistics of batch norms are updated once, in the forward pass.
    """
    if not (with_cp and torch.is_grad_enabled()):
        with weights_converted(block):
            return block(*args)
    norms = [m for m in block.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    if not norms:
        return checkpoint(block, *args, use_reentrant=False)
    return checkpoint(block, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _statistics_kept(norms)))


def run_emptying(block: nn.Module, tensors: list[torch.Tensor | None], with_cp: bool = False) -> Any:
    """Call a block that takes its tensors out of a list, so that their memory is free while it runs.

    With ``with_cp`` the block gets them as arguments of their own, as it needs them again in the backward pass.
    """
    if with_cp and torch.is_grad_enabled():
        return run_block(block, *tensors, with_cp=True)
    with weights_converted(block):
        return block(tensors)


@contextmanager
def _statistics_kept(norms: list[_NormBase]) -> Iterator[None]:
    """Batch norms in training mode update copies of their running statistics instead of these themselves."""
    kept = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        norm._buffers.update({name: None if t is None else t.clone() for name, t in norm._buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)
