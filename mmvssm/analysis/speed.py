"""Time, images per second and memory of a model's step: eager, compiled, or replayed from a CUDA graph."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

MODES = ("inference", "training")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EXECUTIONS = ("eager", "compile", "graph", "compile-graph")
_LEAST_STEPS = 2  # that a time limit leaves: the first may compile kernels, the second may still search for algorithms
_PROFILED_STEPS = 3


@dataclass
class Speed:
    """One measurement.

    Attributes:
        milliseconds: Median time of a step.
        images_per_second: Batch size over that time.
        memory: Peak of allocated GPU memory of a step in MiB, weights and gradients included, without what compilation
            and the search for algorithms take; 0 on a CPU.
        p90: Time in milliseconds that 90 % of the steps stay below.
        p99: Likewise 99 %.
        kernel_milliseconds: Sum of the times of all kernels, copies and fills on the GPU in one step, by torch's
            profiler; None on a CPU, if it was not asked for or if the profiler saw nothing.
        repeats: Number of timed steps.
    """

    milliseconds: float
    images_per_second: float
    memory: float
    p90: float = float("nan")
    p99: float = float("nan")
    kernel_milliseconds: float | None = None
    repeats: int = 0


def measure_speed(
    model: nn.Module,
    images: torch.Tensor,
    mode: str = "inference",
    dtype: str = "fp32",
    execution: str = "eager",
    repeats: int = 10,
    warmup: int = 4,
    seconds: float | None = None,
    kernel_time: bool = False,
) -> Speed:
    """Time a model on a batch.

    Training is forward and backward of the mean of the output, without an optimiser. Weights stay float32; other
    dtypes are those of autocast, with float16 gradients unscaled, which changes nothing about the time. Every step is
    timed by itself, on a GPU between two events, and waited for.

    Args:
        model: Takes images; gives a tensor or a sequence of tensors. It is left in the mode of the measurement.
        images: (B, C, H, W) on the device of the model, in the memory layout that is to be measured.
        mode: 'inference' or 'training'.
        dtype: 'fp32', 'fp16' or 'bf16'.
        execution: 'eager'; 'compile', by torch.compile; 'graph', replayed from a CUDA graph without the work of the
            CPU; 'compile-graph', both.
        repeats: Timed steps, at most.
        warmup: Steps before them, at least one.
        seconds: Limit for the warm-up and for the timed steps each, counted from the end of the first step. At least
            two steps of either are run; None sets no limit.
        kernel_time: Also run three steps under the profiler (on a GPU).

    Raises:
        ValueError: If an argument is not one of those named, or a graph is asked for on a CPU.
    """
    if mode not in MODES or dtype not in DTYPES:
        raise ValueError(f"mode must be one of {MODES} and dtype one of {tuple(DTYPES)}, got {mode!r} and {dtype!r}")
    if execution not in EXECUTIONS:
        raise ValueError(f"execution must be one of {EXECUTIONS}, got {execution!r}")
    if repeats < 1 or warmup < 1:
        raise ValueError(f"repeats and warmup must be at least 1, got {repeats} and {warmup}")
    if seconds is not None and seconds <= 0:
        raise ValueError(f"seconds must be positive or None, got {seconds}")
    cuda = images.device.type == "cuda"
    if "graph" in execution and not cuda:
        raise ValueError(f"CUDA graphs need a GPU, but the images are on {images.device}")
    with _own_stream(images.device) if cuda else contextlib.nullcontext():
        return _measure(model, images, mode, dtype, execution, repeats, warmup, seconds, kernel_time)


def _measure(
    model: nn.Module,
    images: torch.Tensor,
    mode: str,
    dtype: str,
    execution: str,
    repeats: int,
    warmup: int,
    seconds: float | None,
    kernel_time: bool,
) -> Speed:
    cuda = images.device.type == "cuda"
    model.train(mode == "training")
    called = torch.compile(model, dynamic=False) if "compile" in execution else model
    step = _step(model, called, images, mode, dtype)
    limit = math.inf if seconds is None else seconds
    try:
        memory = 0.0
        if "graph" in execution:
            step, memory = _captured(step, warmup, limit)
        _times(step, warmup, limit, cuda)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        times = torch.tensor(_times(step, repeats, limit, cuda), dtype=torch.float64)
        if cuda:
            memory = max(memory, torch.cuda.max_memory_allocated() / 2**20)
        kernels = _kernel_milliseconds(step) if cuda and kernel_time else None
    finally:
        model.zero_grad(set_to_none=True)
        if "compile" in execution:
            torch.compiler.reset()  # it would keep the model alive and count it against the limit of recompilations
    median, p90, p99 = (1e3 * times.quantile(q).item() for q in (0.5, 0.9, 0.99))
    return Speed(median, 1e3 * len(images) / median, memory, p90, p99, kernels, len(times))


def _step(
    model: nn.Module, called: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, mode: str, dtype: str
) -> Callable[[], None]:
    def forward() -> torch.Tensor:
        with torch.autocast(images.device.type, DTYPES[dtype], enabled=dtype != "fp32"):
            y = called(images)
        return y if isinstance(y, torch.Tensor) else y[-1]

    def inference() -> None:
        with torch.no_grad():
            forward()

    def training() -> None:
        model.zero_grad()
        forward().float().mean().backward()

    return inference if mode == "inference" else training


def _captured(step: Callable[[], None], warmup: int, limit: float) -> tuple[Callable[[], None], float]:
    """The replay of a step, and the peak of its memory in MiB, which a graph allocates when it is captured."""
    _times(step, warmup, limit, cuda=True)
    torch.cuda.reset_peak_memory_stats()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        step()
    return graph.replay, torch.cuda.max_memory_allocated() / 2**20


@contextlib.contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """One stream for everything, capture included: cuBLAS keeps 32 MiB for every stream that it served."""
    with torch.cuda.device(device):
        stream = _stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _times(step: Callable[[], None], count: int, limit: float, cuda: bool) -> list[float]:
    """Seconds of up to ``count`` steps; fewer, but at least two (or ``count``), when ``limit`` seconds are over.

    The first step does not count against the limit: in a warm-up it may compile for longer.
    """
    times, start = [], math.inf
    while len(times) < count and (len(times) < _LEAST_STEPS or time.perf_counter() - start < limit):
        times.append(_timed(step, cuda))
        start = min(start, time.perf_counter())
    return times


def _timed(step: Callable[[], None], cuda: bool) -> float:
    if not cuda:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def _kernel_milliseconds(step: Callable[[], None]) -> float | None:
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for _ in range(_PROFILED_STEPS):
                step()
            torch.cuda.synchronize()
        return _sum_of_kernels(profiler.events(), _PROFILED_STEPS)
    except RuntimeError:  # the steps ran before: where the profiler is not allowed, their times are still worth having
        return None


def _sum_of_kernels(events: Iterable, steps: int) -> float | None:
    """Milliseconds on the GPU in one step. Annotated regions lie over kernels and would count them twice."""
    cuda = torch.autograd.DeviceType.CUDA
    kernels = [e for e in events if e.device_type == cuda and not e.is_user_annotation]
    if not kernels:
        return None
    return sum(e.time_range.elapsed_us() for e in kernels) / 1e3 / steps
