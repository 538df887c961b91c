"""Counting operations with torch's FLOP counter, in the two conventions that are in use.

===================  ==========================================  ==========================
operation            ``'papers'`` (multiply-add = 1)             ``'hardware'`` (multiply-add = 2)
===================  ==========================================  ==========================
convolution, matmul  1 per multiply-add                          2 per multiply-add
softmax attention    1 per multiply-add of its two products      2 per multiply-add
selective scan       (9 N + 1) per direction, channel and token  the same
its projections      1 per multiply-add                          2 per multiply-add
gated attention      4 K V per token and head, both directions   8 K V
layer, group norm    5 per element (4 without affine)            the same
RMS norm             4 per element in our operators, else 1      the same
batch norm           2 per element (1 without affine)            the same
pooling, resizing    1 per element                               the same
===================  ==========================================  ==========================

Activations, residual sums, softplus, exponentials and permutations are free in both. ``'papers'`` is the convention of
the published tables of VMamba and of OpenMMLab's and fvcore's counters, which call the result FLOPs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from mmvssm_kernels import ScanParameters  # importing the package registers the operators

CONVENTIONS = ("papers", "hardware")


@dataclass
class FlopCount:
    """Operations of one forward pass.

    Attributes:
        total: All of them.
        by_module: Dotted module name -> operations inside it; '' is the whole.
        by_operator: Name of the operator -> operations.
    """

    total: int
    by_module: dict[str, int] = field(default_factory=dict)
    by_operator: dict[str, int] = field(default_factory=dict)


def count_parameters(model: nn.Module) -> int:
    """Number of parameter elements, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def count_flops(run: Callable[[], Any], model: nn.Module, convention: str = "papers") -> FlopCount:
    """Counts the operations of a call, forward only.

    Args:
        run: What to count, called once under ``torch.no_grad``. Tensors may live on the meta device.
        model: Module whose parts are told apart in the result.
        convention: ``'papers'`` or ``'hardware'``, see this module's docstring.

    Raises:
        ValueError: if the convention is unknown.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {CONVENTIONS}, got {convention!r}")
    counter = FlopCounterMode(display=False, depth=None, custom_mapping=_formulas(convention))
    root = _Root(model, run)
    with counter, torch.no_grad():
        root()
    counts = counter.get_flop_counts()
    prefix = f"{_Root.__name__}.model"
    called = {name[len(prefix) :].lstrip("."): sum(n.values()) for name, n in counts.items() if name.startswith(prefix)}
    called[""] = counter.get_total_flops()
    by_module = {name: _inside(module, name, called) for name, module in model.named_modules()}
    by_operator = {str(operator): number for operator, number in counts.get("Global", {}).items()}
    return FlopCount(counter.get_total_flops(), by_module, by_operator)


class _Root(nn.Module):
    """Gives the counter one outermost module, whichever parts of ``model`` are called."""

    def __init__(self, model: nn.Module, run: Callable[[], Any]):
        super().__init__()
        self.model = model
        self.run = run

    def forward(self) -> None:
        self.run()


def _inside(module: nn.Module, name: str, called: dict[str, int]) -> int:
    """Operations inside a module; of a container that is never called itself, those of its parts."""
    if name in called:
        return called[name]
    return sum(_inside(child, f"{name}.{key}".lstrip("."), called) for key, child in module.named_children())


def selective_scan_flops(batch: int, directions: int, channels: int, state: int, length: int) -> int:
    """(9 N + 1) for each direction, channel and token: the convention of the Mamba family's published figures."""
    return batch * directions * channels * length * (9 * state + 1)


def _formulas(convention: str) -> dict:
    per_multiply_add = CONVENTIONS.index(convention) + 1
    aten = torch.ops.aten
    mapping = {
        aten.native_layer_norm: _layer_norm,
        aten.native_group_norm: _group_norm,
        aten.native_batch_norm: _batch_norm,
        aten._native_batch_norm_legit_no_training: _batch_norm,
        aten.cudnn_batch_norm: _batch_norm,
        aten.mean: _per_input_element,
        aten._adaptive_avg_pool2d: _per_input_element,
        aten.upsample_bilinear2d: _per_output_element,
        aten.upsample_bicubic2d: _per_output_element,
        aten.upsample_nearest2d: _per_output_element,
        torch.ops.mmvssm.selective_scan_2d: _selective_scan_2d(per_multiply_add),
        torch.ops.mmvssm.selective_scan: _selective_scan,
        torch.ops.mmvssm.bidirectional_selective_scan: _bidirectional_selective_scan(per_multiply_add),
        torch.ops.mmvssm.causal_conv1d: _causal_conv1d(per_multiply_add),
        torch.ops.mmvssm.bidirectional_gla: _bidirectional_gla(per_multiply_add),
        torch.ops.mmvssm.add_norm: _add_norm,
        torch.ops.mmvssm.locality_gate: _locality_gate,
        **dict.fromkeys(_attention_operators(), _attention(per_multiply_add)),
    }
    if hasattr(aten, "_fused_rms_norm"):  # elsewhere torch composes it, and what is counted is its mean
        mapping[aten._fused_rms_norm] = _per_input_element
    if per_multiply_add == 1:
        matmuls = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, aten._convolution)
        mapping |= {operator: _halved(flop_registry[operator]) for operator in matmuls}
    return mapping


def _halved(formula: Callable[..., int]) -> Callable[..., int]:
    def half(*args, **kwargs) -> int:
        return formula(*args, **kwargs) // 2

    half._get_raw = True  # takes tensors as the registered formula does, not shapes
    return half


def _layer_norm(input_shape, normalized_shape, weight=None, *args, out_shape=None, **kwargs) -> int:
    return math.prod(input_shape) * (4 if weight is None else 5)


def _group_norm(input_shape, weight=None, *args, out_shape=None, **kwargs) -> int:
    return math.prod(input_shape) * (4 if weight is None else 5)


def _add_norm(x_shape, residual_shape, weight_shape, bias_shape, eps, norm, *args, out_shape=None, **kwargs) -> int:
    return math.prod(x_shape) * (4 if norm == "rms" else 5)


def _causal_conv1d(per_multiply_add: int) -> Callable[..., int]:
    def formula(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
        return per_multiply_add * math.prod(x_shape) * weight_shape[1]

    return formula


def _locality_gate(long_shape, *args, out_shape=None, **kwargs) -> int:
    return 4 * math.prod(long_shape)  # its RMS norm


def _batch_norm(input_shape, weight=None, *args, out_shape=None, **kwargs) -> int:
    return math.prod(input_shape) * (1 if weight is None else 2)


def _attention_operators() -> list:
    """Forward operators behind ``scaled_dot_product_attention``, as far as this torch has them; on a CPU too."""
    kinds = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
    names = [f"_scaled_dot_product_{kind}" for kind in kinds]
    return [getattr(torch.ops.aten, name) for name in names if hasattr(torch.ops.aten, name)]


def _attention(per_multiply_add: int) -> Callable[..., int]:
    def formula(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
        batch, heads, length, width = q_shape
        return per_multiply_add * batch * heads * length * k_shape[2] * (width + v_shape[3])

    return formula


def _per_input_element(input_shape, *args, out_shape=None, **kwargs) -> int:
    return math.prod(input_shape)


def _per_output_element(*args, out_shape=None, **kwargs) -> int:
    return math.prod(out_shape)


def _selective_scan(u_shape, delta_shape, A_shape, *args, out_shape=None, **kwargs) -> int:
    batch, channels, length = u_shape
    return selective_scan_flops(batch, 1, channels, A_shape[1], length)


def _selective_scan_2d(per_multiply_add: int) -> Callable[..., int]:
    def formula(x_shape, x_proj_shape, dt_proj_shape, dt_bias_shape, A_shape, *args, out_shape=None, **kwargs) -> int:
        batch, channels, height, width = x_shape
        length = height * width
        directions, _, rank = dt_proj_shape
        projections = math.prod(x_proj_shape) + directions * channels * rank  # multiply-adds per token
        scan = selective_scan_flops(batch, directions, channels, A_shape[1], length)
        return scan + per_multiply_add * batch * length * projections

    return formula


def _bidirectional_selective_scan(per_multiply_add: int) -> Callable[..., int]:
    def formula(xz_shape, parameter_shapes, *args, out_shape=None, **kwargs) -> int:
        batch, length, columns = xz_shape
        directions = len(parameter_shapes) // len(ScanParameters._fields)
        one = ScanParameters(*parameter_shapes[: len(ScanParameters._fields)])
        # Multiply-adds per token and direction: convolution and projections.
        others = sum(math.prod(shape) for shape in (one.conv_weight, one.x_proj_weight, one.dt_proj_weight))
        scan = selective_scan_flops(batch, directions, columns // 2, one.A_log[1], length)
        return scan + per_multiply_add * directions * batch * length * others

    return formula


def _bidirectional_gla(per_multiply_add: int) -> Callable[..., int]:
    def formula(q_shape, k_shape, v_shape, gf_shape, gb_shape, norm_shape, *args, out_shape=None, **kwargs) -> int:
        batch, length, heads, keys = q_shape
        values = v_shape[3]
        # As recurrences: both directions update a state of keys x values and read it out.
        recurrences = 4 * keys * values * per_multiply_add
        norm = 0 if norm_shape is None else 4 * values
        return batch * length * heads * (recurrences + norm)

    return formula
