"""Timing of models, on the CPU."""

import pytest
import torch
from torch import nn

from mmvssm.analysis import measure_speed


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
    speed = measure_speed(model, torch.randn(6, 3, 8, 8), mode, dtype, repeats=3, warmup=2)
    assert model.calls == [(training, training, torch_dtype)] * 5
    assert speed.milliseconds > 0
    assert speed.images_per_second == pytest.approx(6e3 / speed.milliseconds)
    assert speed.memory == 0
    assert model.layer.weight.grad is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (dict(mode="testing"), "mode must be one of"),
        (dict(dtype="fp8"), "dtype one of"),
        (dict(repeats=0), "at least 1, got 0"),
        (dict(graph=True), "CUDA graphs need a GPU, but the images are on cpu"),
    ],
)
def test_bad_arguments(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        measure_speed(Recorder(), torch.zeros(1, 3, 4, 4), **arguments)
