"""Timing of models, on the CPU."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmvssm.analysis import measure_speed, speed


class Recorder(nn.Module):
    """Counts its calls and notes how it was called."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)
        self.calls = []

    def forward(self, x):
        y = self.layer(x)
        self.calls.append((self.training, torch.is_grad_enabled(), y.dtype))
        return (y, y.mean((2, 3)))


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_measures_what_it_says(mode, dtype, torch_dtype):
    model, training = Recorder(), mode == "training"
    found = measure_speed(model, torch.randn(6, 3, 8, 8), mode, dtype, repeats=3, warmup=2, kernel_time=True)
    assert model.calls == [(training, training, torch_dtype)] * 5
    assert 0 < found.milliseconds <= found.p90 <= found.p99
    assert found.images_per_second == pytest.approx(6e3 / found.milliseconds)
    assert found.repeats == 3
    assert found.memory == 0
    assert found.kernel_milliseconds is None
    assert model.layer.weight.grad is None


def test_percentiles(monkeypatch):
    times = iter([9.0] + [i / 1000 for i in range(1, 102)])  # the first is warm-up
    monkeypatch.setattr(speed, "_timed", lambda step, cuda: next(times))
    found = measure_speed(Recorder(), torch.zeros(2, 3, 4, 4), repeats=101, warmup=1)
    assert (found.milliseconds, found.p90, found.p99) == pytest.approx((51.0, 91.0, 100.0))
    assert found.images_per_second == pytest.approx(2e3 / 51)


def test_time_limit_leaves_two_steps_of_warmup_and_measurement():
    model = Recorder()
    found = measure_speed(model, torch.zeros(1, 3, 4, 4), repeats=1000, warmup=1000, seconds=1e-9)
    assert found.repeats == 2
    assert len(model.calls) == 4


def test_compiled_step_calls_the_compiled_model(monkeypatch):
    model, compiled = Recorder(), []

    def compile_model(module, dynamic):
        def call(x):
            compiled.append(dynamic)
            return module(x)

        return call

    monkeypatch.setattr(torch, "compile", compile_model)
    monkeypatch.setattr(torch.compiler, "reset", lambda: compiled.append("reset"))
    measure_speed(model, torch.zeros(1, 3, 4, 4), "training", execution="compile", repeats=2, warmup=1)
    assert compiled == [False, False, False, "reset"]
    assert len(model.calls) == 3


def test_gradients_are_freed_after_a_failure():
    class Failing(Recorder):
        def forward(self, x):
            if len(self.calls) == 2:
                raise torch.OutOfMemoryError("too much")
            return super().forward(x)

    model = Failing()
    with pytest.raises(torch.OutOfMemoryError):
        measure_speed(model, torch.zeros(1, 3, 4, 4), "training")
    assert model.layer.weight.grad is None


def test_sum_of_kernels_leaves_out_the_cpu_and_annotations():
    def event(device, microseconds, annotation=False):
        span = SimpleNamespace(elapsed_us=lambda: microseconds)
        device_type = getattr(torch.autograd.DeviceType, device)
        return SimpleNamespace(device_type=device_type, is_user_annotation=annotation, time_range=span)

    events = [event("CPU", 9000), event("CUDA", 1500), event("CUDA", 500), event("CUDA", 2000, annotation=True)]
    assert speed._sum_of_kernels(events, steps=2) == 1.0
    assert speed._sum_of_kernels(events[:1], steps=2) is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (dict(mode="testing"), "mode must be one of"),
        (dict(dtype="fp8"), "dtype one of"),
        (dict(repeats=0), "at least 1, got 0"),
        (dict(execution="fast"), "execution must be one of"),
        (dict(seconds=0.0), "seconds must be positive or None"),
        (dict(execution="graph"), "CUDA graphs need a GPU, but the images are on cpu"),
    ],
)
def test_bad_arguments(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        measure_speed(Recorder(), torch.zeros(1, 3, 4, 4), **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_captured_step_takes_the_memory_of_an_eager_one(mode):
    """What cuBLAS keeps for a stream is as large as this model, so another stream would show."""
    net = nn.Sequential(nn.Flatten(), *(nn.Linear(1024, 1024) for _ in range(3))).cuda()
    images = torch.randn(8192, 1, 32, 32, device="cuda")
    options = dict(mode=mode, dtype="fp16", warmup=2, repeats=2)
    eager, graph = (measure_speed(net, images, execution=execution, **options) for execution in ("eager", "graph"))
    assert graph.memory == pytest.approx(eager.memory, abs=8)
