"""The gate between long and short context on a CPU: what the grid of all operators (cases.py) does not cover."""

import pytest
import torch
import torch.nn.functional as F

from mmvssm_kernels import locality_gate
from mmvssm_kernels.testing import Gate, relative_error

from .cases import case_id


@pytest.mark.parametrize("silu", [False, True])
def test_is_the_formula(silu):
    long, x, logits, weight, bias = Gate(2, 5, 3, 12, bias=True).inputs(torch.float64)
    s = (logits + bias.view(3, 12)).sigmoid()
    want = s * long + (1 - s) * F.rms_norm(x, (12,), weight, 1e-3)
    want = F.silu(want) if silu else want
    assert relative_error(locality_gate(long, x, logits, weight, bias, 1e-3, silu), want) < 1e-14


def test_open_and_closed_gates():
    long, x, _, weight, _ = Gate(2, 5, 3, 8).inputs(torch.float32)
    assert torch.equal(locality_gate(long, x, torch.full_like(x, 200.0), weight), long)
    short = locality_gate(long, x, torch.full_like(x, -200.0), weight)
    assert relative_error(short, F.rms_norm(x, (8,), weight, 1e-6)) < 1e-6


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 5, 7, 3, 4)])
def test_any_number_of_axes(shape):
    long, x, logits = torch.randn(3, *shape).unbind()
    weight = torch.randn(4)
    y = locality_gate(long, x, logits, weight)
    assert y.shape == shape
    assert relative_error(y, locality_gate(long, x, logits, weight, backend="reference")) < 1e-6


@pytest.mark.parametrize("case", [Gate(1, 3, 2, 4), Gate(1, 3, 2, 4, silu=True, bias=True)], ids=case_id)
def test_gradcheck(case):
    inputs = [None if t is None else t.requires_grad_() for t in case.inputs(torch.float64)]
    assert torch.autograd.gradcheck(lambda *tensors: locality_gate(*tensors, silu=case.silu), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("silu", [False, True])
def test_opcheck(dtype, silu):
    tolerances = {} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    inputs = [None if t is None else t.requires_grad_() for t in Gate(2, 3, 2, 8, bias=silu).inputs(dtype)]
    torch.library.opcheck(torch.ops.mmvssm.locality_gate.default, (*inputs, 1e-6, silu, "auto"), **tolerances)


LAYOUTS = {
    "transposed": lambda: torch.randn(2, 3, 5, 6).transpose(1, 2),
    "slice of a projection": lambda: torch.randn(2, 5, 40)[..., 7:25].view(2, 5, 3, 6),
    "slice of tokens": lambda: torch.randn(2, 7, 3, 6)[:, 1:6],
    "every second channel": lambda: torch.randn(2, 5, 3, 12)[..., ::2],
    "one token for all": lambda: torch.randn(3, 6).expand(2, 5, 3, 6),
    "one head for all": lambda: torch.randn(6).expand(2, 5, 3, 6),
}


def strided_and_dense(layout, device="cpu", backend="auto"):
    with torch.device(device):
        tensors = [*(LAYOUTS[layout]() for _ in range(3)), torch.randn(12)[::2], torch.randn(36)[::2]]
        upstream = torch.randn(2, 3, 5, 6).transpose(1, 2)
    results = []
    for inputs in (tensors, [t.clone(memory_format=torch.contiguous_format) for t in tensors]):
        inputs = [t.detach().requires_grad_() for t in inputs]
        y = locality_gate(*inputs, silu=True, backend=backend)
        assert y.is_contiguous()
        results.append((y, *torch.autograd.grad(y, inputs, upstream)))
    return zip(*results, strict=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    assert all(relative_error(got, want) < 1e-6 for got, want in strided_and_dense(layout))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_on_a_gpu(layout):
    assert all(relative_error(got, want) < 1e-6 for got, want in strided_and_dense(layout, "cuda", "triton"))


class TestDtypes:
    def test_result_and_gradients_have_those_of_the_inputs(self):
        inputs = Gate(2, 3, 2, 8, bias=True).inputs(torch.float32)
        dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float32, torch.float16)
        inputs = [t.detach().to(dtype).requires_grad_() for t, dtype in zip(inputs, dtypes, strict=True)]
        y = locality_gate(*inputs)
        assert y.dtype == torch.bfloat16
        assert tuple(g.dtype for g in torch.autograd.grad(y.sum(), inputs)) == dtypes

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_rounds_once(self, dtype):
        inputs = Gate(2, 3, 2, 32, silu=True, bias=True).inputs(dtype)
        want = locality_gate(*(t.float() for t in inputs), silu=True).to(dtype)
        assert torch.equal(locality_gate(*inputs, silu=True), want)

    def test_squares_beyond_float16(self):
        """A feature of 1000 has a square that float16 cannot hold."""
        x = torch.full((1, 1, 1, 4), 1000.0, dtype=torch.float16)
        y = locality_gate(torch.zeros_like(x), x, torch.full_like(x, -100.0), torch.ones(4))
        assert y.flatten().tolist() == pytest.approx([1.0] * 4)

    @pytest.mark.parametrize("backend", ["torch", "reference"])
    def test_autocast_does_not_reach_inside(self, backend):
        inputs = Gate(2, 3, 2, 8, bias=True).inputs(torch.float32)
        want = locality_gate(*inputs, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(locality_gate(*inputs, backend=backend), want)


class Model(torch.nn.Module):
    """Three contexts from one projection, for tracing."""

    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Linear(8, 24)
        self.weight = torch.nn.Parameter(torch.rand(4))

    def forward(self, x):
        long, short, logits = self.proj(x).unflatten(-1, (3, 2, 4)).unbind(-3)
        return locality_gate(long, short, logits, self.weight)


def test_export_keeps_the_operator_whole():
    model, x = Model(), torch.randn(2, 5, 8)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {1: torch.export.Dim("length", min=2, max=64)}})
    assert "mmvssm.locality_gate" in str(program.graph)
    other = torch.randn(2, 11, 8)
    assert relative_error(program.module()(other), model(other)) < 1e-6


def test_compile_without_graph_breaks():
    model, x = Model(), torch.randn(2, 5, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    got = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
    assert all(relative_error(g, w) < 1e-5 for g, w in zip(got, want, strict=True))


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    inputs = [t.requires_grad_() for t in Gate(2, 3, 2, 8, bias=True).inputs(torch.float32)]
    want = torch.autograd.grad(locality_gate(*inputs).sum(), inputs)
    got = torch.autograd.grad(checkpoint(locality_gate, *inputs, use_reentrant=False).sum(), inputs)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_flop_counter_counts_norms_as_torch_does():
    from torch.utils.flop_counter import FlopCounterMode

    inputs = [t.requires_grad_() for t in Gate(2, 3, 2, 8, bias=True).inputs(torch.float32)]
    with FlopCounterMode(display=False) as counter:
        locality_gate(*inputs).sum().backward()
    assert counter.get_total_flops() == 0


def test_meta_tensors():
    y = locality_gate(*(t.to("meta") for t in Gate(2, 3, 2, 8, bias=True).inputs(torch.float16)))
    assert (y.shape, y.dtype) == ((2, 3, 2, 8), torch.float16)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_empty(backend):
    inputs = [torch.zeros(0, 3, 2, 8).half() for _ in range(3)]
    y = locality_gate(*inputs, torch.ones(8), backend=backend)
    assert (y.shape, y.dtype) == ((0, 3, 2, 8), torch.float16)


BAD = {
    "long": (torch.zeros(8), r"long must have shape \(heads, V\), but its shape is \(8,\)"),
    "x": (torch.zeros(2, 3, 1, 8), r"x must have shape \(2, 3, 2, 8\), but its shape is \(2, 3, 1, 8\)"),
    "logits": (torch.zeros(2, 3, 2, 8, device="meta"), "logits must be on cpu like the first argument"),
    "weight": (torch.zeros(7), r"weight must have shape \(8\), but its shape is \(7,\)"),
    "bias": (torch.zeros(8), r"bias must have shape \(16\), but its shape is \(8,\)"),
    "eps": (0.0, "eps must be greater than 0, but it is 0.0"),
    "type of long": ([1.0], "long must be a tensor, but it is list"),
    "dtype of x": (torch.zeros(2, 3, 2, 8, dtype=torch.int32), "x must be float16, .* but it is torch.int32"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    arguments = {k: torch.zeros(2, 3, 2, 8) for k in ("long", "x", "logits")} | {"weight": torch.ones(8)}
    value, sentence = BAD[name]
    arguments[name.split(" of ")[-1]] = value
    with pytest.raises((ValueError, TypeError), match=sentence):
        locality_gate(**arguments)


def test_what_the_kernels_cannot_serve(monkeypatch):
    from mmvssm_kernels import dispatch

    monkeypatch.setattr(dispatch, "available_backends", lambda device: ("triton", "torch"))
    monkeypatch.setattr(dispatch, "triton_importable", lambda: True)
    wide = torch.randn(1, 1, 1, 2049)
    assert locality_gate(wide, wide, wide, torch.ones(2049)).isfinite().all()
    with pytest.raises(ValueError, match="heads of at most 2048 channels, not 2049; use 'auto' or 'torch'"):
        locality_gate(wide, wide, wide, torch.ones(2049), backend="triton")
    inputs = Gate(1, 2, 1, 4).inputs(torch.float64)
    with pytest.raises(ValueError, match="float64"):
        locality_gate(inputs[0].float(), *inputs[1:], backend="triton")


@pytest.mark.gpu
def test_one_kernel_serves_all_lengths_and_repeats_exactly():
    from mmvssm_kernels.locality_gate.triton_bwd import locality_gate_bwd_kernel
    from mmvssm_kernels.locality_gate.triton_fwd import locality_gate_fwd_kernel

    device, compiled = torch.cuda.current_device(), []
    for length in (1, 49, 196, 197, 4096):
        inputs = [t.requires_grad_() for t in Gate(2, length, 3, 64, bias=True).inputs(torch.float16, "cuda")]
        runs = [torch.autograd.grad(locality_gate(*inputs, silu=True).float().sum(), inputs) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
        compiled.append([len(k.device_caches[device][0]) for k in (locality_gate_fwd_kernel, locality_gate_bwd_kernel)])
    assert all(counts == compiled[0] for counts in compiled)
