"""Times of a function: wall clock of a call, kernel time and launches, memory held for the backward pass."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Parts of the names of cuBLAS's and CUTLASS's kernels.
_MATRIX_PRODUCTS = ("gemm", "nvjet", "cutlass", "splitk", "xmma")
_PROFILED_CALLS = 5


class Kernels(NamedTuple):
    """What one call runs on the GPU.

    Attributes:
        milliseconds: Sum over all kernels, without the gaps between them.
        launches: Kernels that are no matrix products.
        products: Matrix products.
    """

    milliseconds: float
    launches: float
    products: float


class Call:
    """Forward and backward pass of a function of some tensors, each of which can be repeated.

    Args:
        function: Takes the inputs, gives a tensor or a tuple of tensors.
        inputs: Tensors, or None where there is none; all of them get gradients.
    """

    def __init__(self, function: Callable, inputs: Sequence[Tensor | None]):
        self._function, self._inputs = function, inputs
        self._leaves = [t for t in inputs if t is not None]
        for leaf in self._leaves:
            leaf.requires_grad_(False)

    def forward(self) -> tuple[Tensor, ...]:
        """The outputs."""
        results = self._function(*self._inputs)
        return results if isinstance(results, tuple) else (results,)

    def backward(self) -> tuple[Callable, float]:
        """A function that runs the backward pass, and the MiB held for it beside the outputs and the first input.

        The outputs belong to the consumer. The first input belongs to the producer, but is counted, because it has to
        be kept.
        """
        for leaf in self._leaves:
            leaf.requires_grad_()
        cuda = self._leaves[0].device.type == "cuda"
        before = torch.cuda.memory_allocated() if cuda else 0
        results = self.forward()
        held = (torch.cuda.memory_allocated() - before - sum(map(_bytes, results))) if cuda else 0
        upstream = [torch.randn_like(t) for t in results]
        held += _bytes(self._leaves[0])
        gradients = lambda: torch.autograd.grad(results, self._leaves, upstream, retain_graph=True)  # noqa: E731
        return gradients, held / 2**20


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def median_ms(function: Callable, device: str, repetition_ms: int = 100) -> float:
    """Median milliseconds of a call; on a GPU by events and with a cold L2 cache."""
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(function, warmup=25, rep=repetition_ms, return_mode="median")
    function()
    times = []
    while sum(times) * 1e3 < repetition_ms or len(times) < 3:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def profile_kernels(function: Callable) -> Kernels:
    """Kernel time and launches of a call on a GPU, by torch's profiler."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(_PROFILED_CALLS):
            function()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.key_averages() if event.device_type == DeviceType.CUDA]
    products = [event for event in kernels if any(part in event.key.lower() for part in _MATRIX_PRODUCTS)]
    calls, product_calls = (sum(event.count for event in events) for events in (kernels, products))
    return Kernels(
        sum(event.self_device_time_total for event in kernels) / (1e3 * _PROFILED_CALLS),
        (calls - product_calls) / _PROFILED_CALLS,
        product_calls / _PROFILED_CALLS,
    )
