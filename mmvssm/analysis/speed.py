"""Images per second and memory of a model, eager or in a CUDA graph."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

MODES = ("inference", "training")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Speed:
    """One measurement.

    Attributes:
        milliseconds: Median time of a step.
        images_per_second: Batch size over that time.
        memory: Peak of allocated GPU memory in MiB, weights and gradients included; 0 on a CPU.
    """

    milliseconds: float
    images_per_second: float
    memory: float


def measure_speed(
    model: nn.Module,
    images: torch.Tensor,
    mode: str = "inference",
    dtype: str = "fp32",
    graph: bool = False,
    repeats: int = 10,
    warmup: int = 4,
) -> Speed:
    """Time a model on a batch.

    Training is forward and backward of the mean of the output, without an optimiser. Weights stay float32; other
    dtypes are those of autocast, with float16 gradients unscaled, which changes nothing about the time.

    Args:
        model: Takes images; gives a tensor or a sequence of tensors. It is left in the mode of the measurement.
        images: (B, C, H, W) on the device of the model.
        mode: 'inference' or 'training'.
        dtype: 'fp32', 'fp16' or 'bf16'.
        graph: Replay the step from a CUDA graph, without the work of the CPU.
        repeats: Timed steps.
        warmup: Steps before them, at least one.

    Raises:
        ValueError: If an argument is not one of those named, or a graph is asked for on a CPU.
    """
    if mode not in MODES or dtype not in DTYPES:
        raise ValueError(f"mode must be one of {MODES} and dtype one of {tuple(DTYPES)}, got {mode!r} and {dtype!r}")
    if repeats < 1 or warmup < 1:
        raise ValueError(f"repeats and warmup must be at least 1, got {repeats} and {warmup}")
    cuda = images.device.type == "cuda"
    if graph and not cuda:
        raise ValueError(f"CUDA graphs need a GPU, but the images are on {images.device}")
    model.train(mode == "training")
    step = _step(model, images, mode, dtype)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    if graph:
        step = _captured(step, warmup)
    for _ in range(warmup):
        step()
    seconds = statistics.median(_timed(step, cuda) for _ in range(repeats))
    memory = torch.cuda.max_memory_allocated() / 2**20 if cuda else 0.0
    model.zero_grad(set_to_none=True)
    return Speed(1e3 * seconds, len(images) / seconds, memory)


def _step(model: nn.Module, images: torch.Tensor, mode: str, dtype: str) -> Callable[[], None]:
    def forward() -> torch.Tensor:
        with torch.autocast(images.device.type, DTYPES[dtype], enabled=dtype != "fp32"):
            y = model(images)
        return y if isinstance(y, torch.Tensor) else y[-1]

    def inference() -> None:
        with torch.no_grad():
            forward()

    def training() -> None:
        model.zero_grad(set_to_none=False)
        forward().float().mean().backward()

    return inference if mode == "inference" else training


def _captured(step: Callable[[], None], warmup: int) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


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
