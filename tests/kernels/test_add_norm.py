"""Add + norm on a CPU: what the grid of all operators (cases.py) does not cover."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmvssm_kernels import add_norm
from mmvssm_kernels.testing import AddNorm, relative_error

from ..helpers import golden_fill, shared_dir
from .cases import case_id


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_is_the_norm_of_torch(norm):
    x, residual, weight, bias = AddNorm(2, 5, 24, bias=True).inputs(torch.float32)
    scale = torch.tensor([0.0, 1.25])
    y, r = add_norm(x, residual, weight, bias if norm == "layer" else None, 1e-3, norm, scale)
    want = residual + scale[:, None, None] * x
    assert torch.equal(r, want)
    if norm == "rms":
        assert relative_error(y, F.rms_norm(want, (24,), weight, 1e-3)) < 1e-6
    else:
        assert relative_error(y, F.layer_norm(want, (24,), weight, bias, 1e-3)) < 1e-6


@pytest.mark.parametrize("shape", [(3, 6), (2, 3, 6), (2, 1, 3, 6)])
def test_any_number_of_axes(shape):
    x, residual, weight = torch.randn(shape), torch.randn(shape), torch.randn(6)
    scale = torch.rand(shape[0])
    for got, want in zip(
        add_norm(x, residual, weight, scale=scale),
        add_norm(x, residual, weight, scale=scale, backend="reference"),
        strict=True,
    ):
        assert got.shape == shape
        assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize(
    "case",
    [AddNorm(2, 3, 4, drop=True), AddNorm(2, 3, 4, "layer", bias=True), AddNorm(2, 2, 3, residual=False, bias=True)],
    ids=case_id,
)
def test_gradcheck(case):
    inputs = [None if t is None else t.requires_grad_() for t in case.inputs(torch.float64)]
    scale = torch.tensor([0.5, 1.25], dtype=torch.float64) if case.drop else None
    assert torch.autograd.gradcheck(lambda *tensors: add_norm(*tensors, norm=case.norm, scale=scale), inputs)


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_the_results_unused(used):
    inputs = [t.requires_grad_() for t in AddNorm(2, 3, 8).inputs(torch.float32)[:3]]
    upstream = torch.randn(2, 3, 8)
    got, want = (
        torch.autograd.grad(add_norm(*inputs, backend=b)[used], inputs, upstream, allow_unused=b == "reference")
        for b in ("torch", "reference")
    )
    for g, w in zip(got, want, strict=True):
        assert relative_error(g, torch.zeros_like(g) if w is None else w) < 1e-5


@pytest.mark.parametrize(
    "case",
    [
        AddNorm(2, 3, 8),
        AddNorm(2, 3, 8, "layer", bias=True, drop=True),
        AddNorm(2, 3, 8, "layer", alone=True),  # in float32: a norm alone, without a stream
    ],
    ids=case_id,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(case, dtype):
    inputs = [None if t is None else t.requires_grad_() for t in case.inputs(dtype)]
    scale = torch.tensor([0.0, 1.25]) if case.drop else None
    options = (1e-5, case.norm, scale, torch.float32, dtype, "auto")
    tolerances = {} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.library.opcheck(torch.ops.mmvssm.add_norm.default, (*inputs, *options), **tolerances)


class TestNormAlone:
    def test_stream_is_the_input(self):
        x, _, weight, _ = AddNorm(2, 3, 8).inputs(torch.float32)
        assert add_norm(x, None, weight)[1] is x
        assert add_norm(x.half(), None, weight, residual_dtype=torch.float16)[1].dtype == torch.float16

    def test_stream_is_new_where_it_differs(self):
        x, _, weight, _ = AddNorm(2, 3, 8).inputs(torch.float32)
        assert torch.equal(
            add_norm(x, None, weight, scale=torch.tensor([0.0, 2.0]))[1], x * torch.tensor([[[0.0]], [[2.0]]])
        )
        assert add_norm(x.half(), None, weight)[1].dtype == torch.float32

    @pytest.mark.parametrize("layout", ["dense", "transposed"])
    def test_gradients_of_both_results_add_up(self, layout):
        x = torch.randn(2, 5, 6) if layout == "dense" else torch.randn(2, 6, 5).transpose(1, 2)
        x, weight = x.requires_grad_(), torch.randn(6, requires_grad=True)
        upstream = torch.randn(2, 5, 6)
        results = []
        for backend in ("torch", "reference"):
            y, r = add_norm(x, None, weight, norm="layer", backend=backend)
            results.append(torch.autograd.grad((y * upstream).sum() + (r * upstream.sin()).sum(), (x, weight)))
        for got, want in zip(*results, strict=True):
            assert relative_error(got, want) < 1e-5


LAYOUTS = {
    "transposed": lambda: torch.randn(2, 6, 5).transpose(1, 2),
    "slice of channels": lambda: torch.randn(2, 5, 12)[..., 6:],
    "slice of tokens": lambda: torch.randn(2, 7, 6)[:, 1:6],
    "every second channel": lambda: torch.randn(2, 5, 12)[..., ::2],
    "one row for all": lambda: torch.randn(6).expand(2, 5, 6),
    "one number for all": lambda: torch.randn(1).expand(2, 5, 6),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    tensors = [LAYOUTS[layout](), LAYOUTS[layout](), torch.randn(12)[::2]]
    dense = [t.clone(memory_format=torch.contiguous_format).requires_grad_() for t in tensors]
    strided = [t.detach().requires_grad_() for t in tensors]
    upstream = [torch.randn(1, 5, 1).expand(2, 5, 6), torch.randn(2, 6, 5).transpose(1, 2)]
    results = []
    for inputs in (strided, dense):
        outputs = add_norm(*inputs)
        assert all(t.is_contiguous() for t in outputs)
        results.append([*outputs, *torch.autograd.grad(outputs, inputs, upstream)])
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) < 1e-6


class TestDtypes:
    def test_residual_stream_is_float32_by_default(self):
        x, residual, weight, _ = AddNorm(2, 3, 8).inputs(torch.bfloat16)
        y, r = add_norm(x, residual, weight)
        assert (y.dtype, r.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(r, residual + x.float())

    def test_float64_stays_float64(self):
        y, r = add_norm(*AddNorm(2, 3, 8).inputs(torch.float64))
        assert (y.dtype, r.dtype) == (torch.float64, torch.float64)

    def test_norm_sees_the_sum_before_it_is_rounded(self):
        x, residual = torch.full((1, 1, 4), 1e-3), torch.tensor([[[1.0, -1.0, 1.0, -1.0]]])
        y, r = add_norm(x, residual, torch.ones(4), norm="layer", eps=1e-12, residual_dtype=torch.bfloat16)
        assert torch.equal(r, residual.bfloat16())
        assert relative_error(y, residual) < 1e-5
        y, _ = add_norm(x, residual, torch.ones(4), residual_dtype=torch.bfloat16)
        assert relative_error(y, F.rms_norm(residual + x, (4,))) < 1e-5

    def test_gradients_come_in_the_dtypes_of_the_inputs(self):
        x, residual, weight, bias = AddNorm(2, 3, 8, bias=True).inputs(torch.float16)
        inputs = [t.requires_grad_() for t in (x, residual.half(), weight.half(), bias)]
        outputs = add_norm(*inputs)
        grads = torch.autograd.grad(outputs, inputs, [torch.ones_like(t) for t in outputs])
        assert [g.dtype for g in grads] == [torch.float16, torch.float16, torch.float16, torch.float32]

    @pytest.mark.parametrize("backend", ["auto", "reference"])
    def test_dtype_of_the_norm_is_free(self, backend):
        x, residual, weight, _ = AddNorm(2, 3, 8).inputs(torch.float32)
        y, r = add_norm(x, residual, weight, out_dtype=torch.float16, backend=backend)
        assert (y.dtype, r.dtype) == (torch.float16, torch.float32)
        assert torch.equal(y, add_norm(x, residual, weight, backend=backend)[0].half())

    @pytest.mark.parametrize("backend", ["torch", "reference"])
    def test_autocast_does_not_reach_inside(self, backend):
        inputs = AddNorm(2, 3, 8).inputs(torch.float32)
        want = add_norm(*inputs, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            got = add_norm(*inputs, backend=backend)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


class Model(torch.nn.Module):
    """Two blocks of the residual stream with parameters, for tracing."""

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.randn(8) for _ in range(2))
        self.mixer = torch.nn.Linear(8, 8)

    def forward(self, x):
        residual = None
        for weight in self.weights:
            x, residual = add_norm(x, residual, weight)
            x = self.mixer(x)
        return x + residual


def test_export_keeps_the_operator_whole():
    model, x = Model(), torch.randn(1, 5, 8)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {1: torch.export.Dim("length", min=2, max=64)}})
    assert str(program.graph).count("mmvssm.add_norm") == 2
    other = torch.randn(1, 11, 8)
    assert relative_error(program.module()(other), model(other)) < 1e-6


def test_compile_without_graph_breaks():
    model, x = Model(), torch.randn(2, 5, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    got = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
    assert all(relative_error(g, w) < 1e-5 for g, w in zip(got, want, strict=True))


def test_flop_counter_counts_norms_as_torch_does():
    from torch.utils.flop_counter import FlopCounterMode

    inputs = [t.requires_grad_() for t in AddNorm(2, 3, 8).inputs(torch.float32)[:3]]
    with FlopCounterMode(display=False) as counter:
        add_norm(*inputs)[0].sum().backward()
    assert counter.get_total_flops() == 0


def test_meta_tensors():
    x, residual, weight, _ = (None if t is None else t.to("meta") for t in AddNorm(2, 3, 8).inputs(torch.float16))
    y, r = add_norm(x, residual, weight)
    assert (y.shape, y.dtype) == ((2, 3, 8), torch.float16)
    assert (r.shape, r.dtype) == ((2, 3, 8), torch.float32)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)])
def test_empty(shape, backend):
    y, r = add_norm(torch.zeros(shape).half(), None, torch.ones(8), backend=backend)
    assert (y.shape, y.dtype) == (shape, torch.float16)
    assert (r.shape, r.dtype) == (shape, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_on_a_gpu(layout):
    with torch.device("cuda"):
        inputs = [LAYOUTS[layout](), LAYOUTS[layout](), torch.randn(12)[::2]]
    exact = [t.cpu().double().requires_grad_() for t in inputs]
    inputs = [t.requires_grad_() for t in inputs]
    upstream = [torch.randn(1, 5, 1).expand(2, 5, 6), torch.randn(2, 6, 5).transpose(1, 2)]
    got = add_norm(*inputs, backend="triton")
    want = add_norm(*exact, backend="reference")
    gradients = torch.autograd.grad(got, inputs, [t.cuda() for t in upstream])
    exact_gradients = torch.autograd.grad(want, exact, [t.double() for t in upstream])
    for g, w in zip((*got, *gradients), (*want, *exact_gradients), strict=True):
        assert relative_error(g, w) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_norm_alone_from_float32_on_a_gpu(out_dtype):
    """As behind the scan of VMamba, from a map whose channels are adjacent and whose pixels are sliced."""
    x = torch.randn(2, 50, 200, device="cuda")[:, 1:, :96].requires_grad_()
    weight, bias = (
        torch.randn(96, device="cuda", requires_grad=True),
        torch.randn(96, device="cuda", requires_grad=True),
    )
    exact = [t.detach().cpu().double().requires_grad_() for t in (x, weight, bias)]
    got, stream = add_norm(x, None, weight, bias, norm="layer", out_dtype=out_dtype, backend="triton")
    want, _ = add_norm(exact[0], None, *exact[1:], norm="layer", backend="reference")
    assert stream is x
    assert got.dtype == out_dtype
    upstream = torch.randn_like(got)
    grads = torch.autograd.grad(got, (x, weight, bias), upstream)
    exact_grads = torch.autograd.grad(want, exact, upstream.cpu().double())
    assert relative_error(got, want) < 1e-2
    assert all(relative_error(g, w) < 1e-5 for g, w in zip(grads, exact_grads, strict=True))


@pytest.mark.gpu
def test_one_kernel_serves_all_lengths():
    from mmvssm_kernels.add_norm.triton_bwd import add_norm_bwd_kernel
    from mmvssm_kernels.add_norm.triton_fwd import add_norm_fwd_kernel

    device, compiled = torch.cuda.current_device(), []
    for length in (1, 49, 196, 197, 4096):
        inputs = [t.requires_grad_() for t in AddNorm(2, length, 192).inputs(torch.float16, "cuda")[:3]]
        sum(t.float().sum() for t in add_norm(*inputs)).backward()
        compiled.append([len(k.device_caches[device][0]) for k in (add_norm_fwd_kernel, add_norm_bwd_kernel)])
    assert all(counts == compiled[0] for counts in compiled)


@pytest.mark.gpu
@pytest.mark.parametrize("residual_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_residual_stream_on_a_gpu(residual_dtype):
    x, residual, weight, _ = AddNorm(2, 9, 192).inputs(torch.float16, "cuda")
    inputs = [t.requires_grad_() for t in (x, residual.to(residual_dtype), weight)]
    results = {}
    for backend in ("triton", "reference"):
        outputs = add_norm(*inputs, residual_dtype=residual_dtype, backend=backend)
        torch.manual_seed(0)
        upstream = [torch.randn_like(t) for t in outputs]
        results[backend] = [*outputs, *torch.autograd.grad(outputs, inputs, upstream)]
    for got, want in zip(results["triton"], results["reference"], strict=True):
        assert got.dtype == want.dtype
        assert relative_error(got, want) < 1e-2


BAD = {
    "x": (torch.zeros(8), r"x must have shape \(B, D\), but its shape is \(8,\)"),
    "channels": (torch.zeros(2, 3, 0), r"x must have at least one channel \(last axis\), but it has 0"),
    "residual": (torch.zeros(2, 1, 8), r"residual must have shape \(2, 3, 8\), but its shape is \(2, 1, 8\)"),
    "weight": (torch.zeros(7), r"weight must have shape \(8\), but its shape is \(7,\)"),
    "bias": (torch.zeros(8, device="meta"), "bias must be on cpu like the first argument, but it is on meta"),
    "eps": (0.0, "eps must be greater than 0, but it is 0.0"),
    "norm": ("batch", "norm must be one of 'rms', 'layer', but it is 'batch'"),
    "scale": (torch.zeros(3), r"scale must have shape \(2\), but its shape is \(3,\)"),
    "gradient of scale": (torch.zeros(2, requires_grad=True), "scale must not require a gradient"),
    "residual_dtype": (torch.int32, "residual_dtype must be float16, .* or float64, but it is torch.int32"),
    "out_dtype": (torch.int32, "out_dtype must be float16, .* or float64, but it is torch.int32"),
    "type of residual_dtype": ("float32", "residual_dtype must be a torch.dtype, but it is str"),
    "type of x": ([1.0], "x must be a tensor, but it is list"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    arguments = {"x": torch.zeros(2, 3, 8), "residual": None, "weight": torch.ones(8)}
    value, sentence = BAD[name]
    arguments["x" if name == "channels" else name.split(" of ")[-1]] = value
    with pytest.raises((ValueError, TypeError), match=sentence):
        add_norm(**arguments)


def test_rows_that_the_kernels_cannot_hold(monkeypatch):
    from mmvssm_kernels import dispatch

    monkeypatch.setattr(dispatch, "available_backends", lambda device: ("triton", "torch"))
    monkeypatch.setattr(dispatch, "triton_importable", lambda: True)
    long, stream = torch.randn(1, 1, 8193), torch.randn(1, 1, 4, dtype=torch.float64)
    assert torch.equal(add_norm(long, None, long[0, 0])[1], long)
    with pytest.raises(ValueError, match="rows of at most 8192 channels, not 8193; use 'auto' or 'torch'"):
        add_norm(long, None, long[0, 0], backend="triton")
    with pytest.raises(ValueError, match="the kernels compute in float32, not float64"):
        add_norm(stream.float(), stream, torch.ones(4), backend="triton")


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_golden(backend):
    """Values and gradients of the published implementation."""
    arrays = np.load(shared_dir("golden", "vim", "op_add_norm.npz"))
    normal = golden_fill().normal
    for meta in map(json.loads, arrays["meta"]):
        case = meta["case"]
        tensors = {n: f"{case}/{n}" for n in ("x", "residual", "weight", "bias")}
        tensors = {n: torch.from_numpy(arrays[k]).double() if k in arrays else None for n, k in tensors.items()}
        inputs = {n: None if t is None else t.requires_grad_() for n, t in tensors.items()}
        results = add_norm(**inputs, eps=meta["eps"], norm=case.split("_")[0], backend=backend)
        loss = 0
        for name, tensor in zip(("y", "residual_out"), results, strict=True):
            assert relative_error(tensor, torch.from_numpy(arrays[f"{case}/{name}"])) < 1e-12
            loss = loss + (tensor * torch.from_numpy(normal(f"loss:{name}", tensor.shape))).mean()
        loss.backward()
        for name, tensor in inputs.items():
            if tensor is not None:
                assert relative_error(tensor.grad, torch.from_numpy(arrays[f"{case}/grad:{name}"])) < 1e-12
