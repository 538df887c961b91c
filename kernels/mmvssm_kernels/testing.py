"""Cases, random inputs and comparisons for tests and benchmarks of the operators."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from . import (
    ScanParameters,
    add_norm,
    bias_activation,
    bidirectional_gla,
    bidirectional_selective_scan,
    causal_conv1d,
    locality_gate,
    selective_scan,
    selective_scan_2d,
    swiglu,
)

# Relative Frobenius error against the float64 recurrence on the same (already rounded) inputs: outputs, gradients.
TOLERANCES = {
    torch.float64: (1e-12, 1e-11),
    torch.float32: (1e-5, 1e-4),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.5e-2, 1.5e-2),
}


class Scan(NamedTuple):
    """A case of :func:`mmvssm_kernels.selective_scan`."""

    batch: int
    channels: int
    length: int
    state: int
    groups: int = 1
    reverse: bool = False
    gate: bool = False
    skip: bool = True
    bias: bool = True
    softplus: bool = True
    step: float | None = None

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Tensor | None]:
        """Fresh random u, delta, A, B, C, D, z and delta_bias; A, D and the bias stay float32 (float64)."""
        wide = torch.promote_types(dtype, torch.float32)

        def normal(*shape, dtype=dtype):
            return torch.randn(*shape, device=device, dtype=torch.float32).to(dtype)

        rows = (self.batch, self.channels, self.length)
        delta = normal(*rows) if self.step is None else torch.full(rows, self.step, device=device, dtype=dtype)
        if not self.softplus:
            delta = delta.abs() * 0.1
        weights = (self.batch, self.groups, self.state, self.length)
        return [
            normal(*rows),
            delta,
            -torch.rand(self.channels, self.state, device=device).to(wide) * self.state - 0.05,
            normal(*weights),
            normal(*weights),
            normal(self.channels, dtype=wide) if self.skip else None,
            normal(*rows) if self.gate else None,
            normal(self.channels, dtype=wide) - 2 if self.bias else None,
        ]

    def options(self) -> dict:
        """Keyword arguments of the operator."""
        return {"delta_softplus": self.softplus, "reverse": self.reverse, "return_last_state": True}


class Scan2d(NamedTuple):
    """A case of :func:`mmvssm_kernels.selective_scan_2d`."""

    batch: int
    channels: int
    height: int
    width: int
    rank: int
    state: int
    channel_last: bool = True
    step: float | None = None

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Tensor]:
        """Fresh random x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log and D; the last three stay float32."""
        wide = torch.promote_types(dtype, torch.float32)

        def normal(*shape, dtype=wide):
            return torch.randn(*shape, device=device, dtype=torch.float32).to(dtype)

        x = normal(self.batch, self.channels, self.height, self.width, dtype=dtype)
        if self.channel_last:
            x = x.contiguous(memory_format=torch.channels_last)
        rates = torch.arange(1, self.state + 1, device=device, dtype=wide).log()
        dt_scale = 0.0 if self.step is not None else 1 / math.sqrt(self.rank)
        return [
            x,
            normal(4, self.rank + 2 * self.state, self.channels, dtype=dtype) / math.sqrt(self.channels),
            normal(4, self.channels, self.rank, dtype=dtype) * dt_scale,
            normal(4, self.channels) - 2 if self.step is None else normal(4, self.channels) * 0.0 + self.step,
            rates + 0.1 * normal(4 * self.channels, self.state),
            normal(4 * self.channels),
        ]

    def options(self) -> dict:
        """Keyword arguments of the operator."""
        return {}


class BidirectionalScan(NamedTuple):
    """A case of :func:`mmvssm_kernels.bidirectional_selective_scan`, with its tensors as one flat list."""

    batch: int
    channels: int
    length: int
    rank: int
    state: int
    width: int = 4
    directions: int = 2
    scale: float = 0.5
    step: float | None = None

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Tensor]:
        """Fresh random xz and the seven parameters of each direction; only the projections have the dtype of xz."""
        wide = torch.promote_types(dtype, torch.float32)

        def normal(*shape, dtype=wide):
            return torch.randn(*shape, device=device, dtype=torch.float32).to(dtype)

        rates = torch.arange(1, self.state + 1, device=device, dtype=wide).log()
        dt_scale = 0.0 if self.step is not None else 1 / math.sqrt(self.rank)
        directions = [
            [
                normal(self.channels, self.width) / math.sqrt(self.width),
                0.1 * normal(self.channels),
                normal(self.rank + 2 * self.state, self.channels, dtype=dtype) / math.sqrt(self.channels),
                normal(self.channels, self.rank, dtype=dtype) * dt_scale,
                normal(self.channels) - 2 if self.step is None else normal(self.channels) * 0.0 + self.step,
                rates + 0.1 * normal(self.channels, self.state),
                normal(self.channels),
            ]
            for _ in range(self.directions)
        ]
        xz = normal(self.batch, self.length, 2 * self.channels, dtype=dtype)
        return [xz, *(t for direction in directions for t in direction)]

    def options(self) -> dict:
        """Keyword arguments of :func:`bidirectional_scan_of_list`."""
        return {"scale": self.scale}


def bidirectional_scan_of_list(xz: Tensor, *parameters: Tensor, **options) -> Tensor:
    """:func:`mmvssm_kernels.bidirectional_selective_scan` of the flat inputs of a :class:`BidirectionalScan`."""
    size = len(ScanParameters._fields)
    forward, backward = ScanParameters(*parameters[:size]), parameters[size:]
    return bidirectional_selective_scan(xz, forward, ScanParameters(*backward) if backward else None, **options)


class BidirectionalGla(NamedTuple):
    """A case of :func:`mmvssm_kernels.bidirectional_gla`; ``decay`` is the mean log-decay, None for raw gate logits."""

    batch: int
    length: int
    heads: int
    keys: int
    values: int
    decay: float | None = None
    norm: bool = False

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Tensor]:
        """Fresh random q, k, v, gf and gb, and a float32 (float64) norm weight if there is a norm."""
        keys = (self.batch, self.length, self.heads, self.keys)

        def normal(*shape):
            return torch.randn(*shape, device=device, dtype=torch.float32)

        gates = [normal(*keys) if self.decay is None else 2 * self.decay * torch.rand_like(normal(*keys)) for _ in "fb"]
        tensors = [normal(*keys), normal(*keys), normal(*keys[:3], self.values), *gates]
        weight = [1 + 0.2 * normal(self.values).to(torch.promote_types(dtype, torch.float32))] if self.norm else []
        return [*(t.to(dtype) for t in tensors), *weight]

    def options(self) -> dict:
        """Keyword arguments of :func:`bidirectional_gla_of_list`."""
        return {"gate_normalizer": 16.0} if self.decay is None else {}


def bidirectional_gla_of_list(q, k, v, gf, gb, norm_weight: Tensor | None = None, **options) -> Tensor:
    """:func:`mmvssm_kernels.bidirectional_gla` of the flat inputs of a :class:`BidirectionalGla`."""
    return bidirectional_gla(q, k, v, gf, gb, norm_weight=norm_weight, **options)


class Conv1d(NamedTuple):
    """A case of :func:`mmvssm_kernels.causal_conv1d`."""

    batch: int
    channels: int
    length: int
    width: int = 4
    bias: bool = True
    activation: str | None = "silu"
    reverse: bool = False
    padding: str = "causal"
    channel_last: bool = True

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Tensor | None]:
        """Fresh random x, weight and bias; the last two stay float32 (float64)."""
        wide = torch.promote_types(dtype, torch.float32)
        shape = (self.batch, self.channels, self.length)
        x = torch.randn(*shape, device=device, dtype=torch.float32).to(dtype)
        if self.channel_last:
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        weight = torch.randn(self.channels, self.width, device=device, dtype=torch.float32).to(wide)
        return [x, weight, torch.randn(self.channels, device=device).to(wide) if self.bias else None]

    def options(self) -> dict:
        """Keyword arguments of the operator."""
        return {"activation": self.activation, "reverse": self.reverse, "padding": self.padding}


class AddNorm(NamedTuple):
    """A case of :func:`mmvssm_kernels.add_norm`; ``alone`` asks for the norm only."""

    batch: int
    length: int
    channels: int
    norm: str = "rms"
    residual: bool = True
    bias: bool = False
    drop: bool = False
    alone: bool = False

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Tensor | None]:
        """Fresh random x, residual, weight and bias; only x has the dtype, the others are float32 (float64)."""
        wide = torch.promote_types(dtype, torch.float32)

        def normal(*shape, dtype=wide):
            return torch.randn(*shape, device=device, dtype=torch.float32).to(dtype)

        rows = (self.batch, self.length, self.channels)
        return [
            normal(*rows, dtype=dtype),
            normal(*rows) if self.residual and not self.alone else None,
            normal(self.channels),
            normal(self.channels) if self.bias else None,
        ]

    def options(self) -> dict:
        """Keyword arguments of :func:`add_norm_with_drop`."""
        return {"norm": self.norm, "drop": self.drop, "alone": self.alone}


def add_norm_with_drop(x: Tensor, *tensors: Tensor | None, drop: bool, alone: bool, **options) -> tuple[Tensor, Tensor]:
    """:func:`mmvssm_kernels.add_norm`, with ``drop`` as drop path: every second sample dropped, the others scaled."""
    scale = None
    if drop:
        scale = (
            torch.arange(len(x), device=x.device).remainder(2).to(torch.promote_types(x.dtype, torch.float32)) * 1.25
        )
    return add_norm(x, *tensors, scale=scale, residual_dtype=x.dtype if alone else None, **options)


class BiasActivation(NamedTuple):
    """A case of :func:`mmvssm_kernels.bias_activation`."""

    batch: int
    length: int
    channels: int
    activation: str | None = None
    residual: bool = False

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Tensor | None]:
        """Fresh random x, bias and, if wanted, residual; the bias is float32 (float64)."""
        rows = (self.batch, self.length, self.channels)
        return [
            torch.randn(*rows, device=device).to(dtype),
            torch.randn(self.channels, device=device).to(torch.promote_types(dtype, torch.float32)),
            torch.randn(*rows, device=device).to(dtype) if self.residual else None,
        ]

    def options(self) -> dict:
        """Keyword arguments of :func:`bias_activation_of_list`."""
        return {"activation": self.activation}


def bias_activation_of_list(x: Tensor, bias: Tensor, residual: Tensor | None, **options) -> Tensor:
    """:func:`mmvssm_kernels.bias_activation` with its tensors first."""
    return bias_activation(x, bias, residual=residual, **options)


class SwiGlu(NamedTuple):
    """A case of :func:`mmvssm_kernels.swiglu`."""

    batch: int
    length: int
    hidden: int

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Tensor | None]:
        """A fresh random projection."""
        return [torch.randn(self.batch, self.length, 2 * self.hidden, device=device).mul_(2).to(dtype)]

    def options(self) -> dict:
        """No further arguments."""
        return {}


class Gate(NamedTuple):
    """A case of :func:`mmvssm_kernels.locality_gate`."""

    batch: int
    length: int
    heads: int
    values: int
    silu: bool = False
    bias: bool = False

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Tensor | None]:
        """Fresh random long, x, logits (a view of a wider tensor), weight and bias; the last two float32 (float64)."""
        parameters = torch.promote_types(dtype, torch.float32)
        heads = (self.batch, self.length, self.heads, self.values)
        channels = self.heads * self.values
        wide = torch.randn(self.batch, self.length, channels + 8, device=device).mul_(2).to(dtype)
        # The RMS norm of one value is its sign, whose gradient no precision resolves, except near sqrt(eps).
        scale = 1e-3 if self.values == 1 else 1.0
        return [
            torch.randn(heads, device=device).to(dtype),
            torch.randn(heads, device=device).mul_(scale).to(dtype),
            wide[..., 8:].view(heads),
            torch.randn(self.values, device=device).to(parameters),
            torch.randn(channels, device=device).to(parameters) if self.bias else None,
        ]

    def options(self) -> dict:
        """Keyword arguments of the function."""
        return {"silu": self.silu}


# Kind of case -> function of its inputs and options.
OPERATORS: dict[type, Callable] = {
    Scan: selective_scan,
    Scan2d: selective_scan_2d,
    BidirectionalScan: bidirectional_scan_of_list,
    BidirectionalGla: bidirectional_gla_of_list,
    Conv1d: causal_conv1d,
    AddNorm: add_norm_with_drop,
    SwiGlu: swiglu,
    Gate: locality_gate,
    BiasActivation: bias_activation_of_list,
}


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in float64 (absolute where ``want`` is zero); infinite if anything is not finite."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    if got.shape != want.shape or not torch.isfinite(got).all():
        return math.inf
    norm = want.norm().item()
    return (got - want).norm().item() / (norm or 1.0)


def check_operator(
    operator: Callable, case: NamedTuple, dtype: torch.dtype, device: torch.device | str = "cpu", backend: str = "torch"
) -> dict[str, float]:
    """Compare outputs and all gradients of a backend with the float64 recurrence on the same inputs.

    Args:
        operator: Public function of the package.
        case: A :class:`Scan` or :class:`Scan2d`.
        dtype: Dtype of the inputs.
        device: Device of the backend's run.
        backend: Backend to check.

    Returns:
        Relative error by name.

    Raises:
        AssertionError: If one exceeds the tolerance of the dtype.
    """
    inputs = [None if t is None else t.requires_grad_() for t in case.inputs(dtype, device)]
    exact = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    got = operator(*inputs, **case.options(), backend=backend)
    want = _by_recurrence(operator, case, exact)
    got, want = (list(t) if isinstance(t, tuple) else [t] for t in (got, want))
    upstream = [torch.randn_like(t) for t in got]
    names = [f"input {i}" for i, t in enumerate(inputs) if t is not None]
    grads = torch.autograd.grad(got, [t for t in inputs if t is not None], upstream)
    exact_grads = torch.autograd.grad(want, [t for t in exact if t is not None], [t.double() for t in upstream])
    errors = {f"output {i}": relative_error(g, w) for i, (g, w) in enumerate(zip(got, want, strict=True))}
    gradient_errors = {n: relative_error(g, w) for n, g, w in zip(names, grads, exact_grads, strict=True)}
    limit, gradient_limit = TOLERANCES[dtype]
    bad = {n: e for n, e in errors.items() if not e <= limit}
    bad |= {n: e for n, e in gradient_errors.items() if not e <= gradient_limit}
    assert not bad, f"{case} {dtype} {backend} on {device}: {bad} (limits {limit}, {gradient_limit})"
    return errors | gradient_errors


def _by_recurrence(operator: Callable, case: NamedTuple, exact: list):
    """The specification; for long sequences the float64 torch backend, which short cases check against it."""
    long = case.height * case.width if isinstance(case, Scan2d) else case.length
    return operator(*exact, **case.options(), backend="reference" if long <= 256 else "torch")


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what ``Tensor.new_empty`` and ``torch.empty_like`` return with NaN: an element never written shows."""

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return wrapper

    with (
        mock.patch.object(Tensor, "new_empty", poisoned(Tensor.new_empty)),
        mock.patch.object(torch, "empty_like", poisoned(torch.empty_like)),
    ):
        yield
