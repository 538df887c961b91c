"""Cases, random inputs and comparisons for tests and benchmarks of the operators."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

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
    long = case.length if isinstance(case, Scan) else case.height * case.width
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
