"""The same computation by other packages, where they are installed and serve the case.

None of them is needed: a missing package, or one that fails, leaves its column empty.
"""

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import torch

from mmvssm_kernels.testing import AddNorm, BidirectionalGla, Conv1d, Scan, SwiGlu


def peer(case: NamedTuple) -> tuple[str, Callable] | None:
    """Name of the package and a function of the case's inputs that gives its first output; None if there is none."""
    found = _PEERS.get(type(case))
    if found is None:
        return None
    package, make = found
    try:
        function = make(case)
    except ImportError:
        return None
    return None if function is None else (package, function)


def _selective_scan(case: Scan) -> Callable | None:
    if case.reverse:
        return None
    function = import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    return lambda *inputs: function(*inputs, delta_softplus=case.softplus)


def _causal_conv1d(case: Conv1d) -> Callable | None:
    if case.reverse or case.padding != "causal":
        return None
    function = import_module("causal_conv1d").causal_conv1d_fn
    return lambda x, weight, bias: function(x, weight.to(x.dtype), bias.to(x.dtype), activation=case.activation)


def _add_norm(case: AddNorm) -> Callable | None:
    if case.drop or case.alone:
        return None
    module = import_module("mamba_ssm.ops.triton.layer_norm")
    function = module.rms_norm_fn if case.norm == "rms" else module.layer_norm_fn
    return lambda x, residual, weight, bias: function(
        x, weight, bias, residual=residual, eps=1e-5, prenorm=True, residual_in_fp32=True
    )[0]


def _bidirectional_gla(case: BidirectionalGla) -> Callable | None:
    """Two calls and flips; the gates become log-decays first."""
    if case.norm:
        return None
    function = import_module("fla.ops.gla").chunk_gla

    def both(q, k, v, gf, gb):
        if case.decay is None:
            gf, gb = (torch.nn.functional.logsigmoid(g.float()) / 16 for g in (gf, gb))
        forward, _ = function(q, k, v, gf)
        backward, _ = function(*(t.flip(1) for t in (q, k, v, gb)))
        return forward + backward.flip(1)

    return both


def _swiglu(case: SwiGlu) -> Callable | None:
    function = import_module("fla.modules.activations").swiglu
    return lambda projected: function(*projected.chunk(2, dim=-1))


_PEERS = {
    Scan: ("mamba_ssm", _selective_scan),
    Conv1d: ("causal_conv1d", _causal_conv1d),
    AddNorm: ("mamba_ssm", _add_norm),
    BidirectionalGla: ("fla", _bidirectional_gla),
    SwiGlu: ("fla", _swiglu),
}
