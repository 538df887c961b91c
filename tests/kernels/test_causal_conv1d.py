"""Depthwise convolution on a CPU: what the grid of all operators (cases.py) does not cover."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmvssm_kernels import causal_conv1d, dispatch
from mmvssm_kernels.testing import Conv1d, check_operator, relative_error

from ..helpers import golden_fill, shared_dir
from .cases import case_id


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("padding", ["causal", "same"])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8])
def test_every_width_order_and_padding(width, padding, reverse):
    check_operator(causal_conv1d, Conv1d(2, 3, 6, width, reverse=reverse, padding=padding), torch.float64)


def test_order_of_the_taps():
    x, taps = torch.zeros(1, 1, 7), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    x[0, 0, 3] = 1
    assert causal_conv1d(x, taps)[0, 0].tolist() == [0, 0, 0, 4, 3, 2, 1]
    assert causal_conv1d(x, taps, reverse=True)[0, 0].tolist() == [1, 2, 3, 4, 0, 0, 0]
    assert causal_conv1d(x, taps[:, :3], padding="same")[0, 0].tolist() == [0, 0, 3, 2, 1, 0, 0]
    assert causal_conv1d(x, taps[:, :3], padding="same", reverse=True)[0, 0].tolist() == [0, 0, 1, 2, 3, 0, 0]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("width", [3, 4])
def test_same_padding_is_that_of_torch(width):
    x, weight, bias = torch.randn(2, 6, 9), torch.randn(6, width), torch.randn(6)
    want = F.conv1d(x, weight[:, None], bias, padding="same", groups=6)
    assert relative_error(causal_conv1d(x, weight, bias, padding="same"), want) < 1e-6


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradcheck(activation, reverse):
    case = Conv1d(2, 3, 5, 3, bias=activation is not None, activation=activation, reverse=reverse)
    inputs = [None if t is None else t.requires_grad_() for t in case.inputs(torch.float64)]
    assert torch.autograd.gradcheck(lambda *tensors: causal_conv1d(*tensors, **case.options()), inputs)


@pytest.mark.parametrize(
    "case", [Conv1d(2, 4, 6), Conv1d(2, 4, 6, 3, bias=False, reverse=True, channel_last=False)], ids=case_id
)
def test_opcheck(case):
    inputs = [None if t is None else t.requires_grad_() for t in case.inputs(torch.float32)]
    options = (*case.options().values(), torch.float32, "auto")
    torch.library.opcheck(torch.ops.mmvssm.causal_conv1d.default, (*inputs, *options))


LAYOUTS = {
    "channel-last": lambda: torch.randn(2, 9, 6).transpose(1, 2),
    "slice of a projection": lambda: torch.randn(2, 9, 12)[..., 6:].transpose(1, 2),
    "every second token": lambda: torch.randn(2, 18, 6)[:, ::2].transpose(1, 2),
    "channel-first": lambda: torch.randn(2, 6, 9),
    "slice of channels": lambda: torch.randn(2, 12, 9)[:, :6],
    "one row for the batch": lambda: torch.randn(1, 6, 9).expand(2, 6, 9),
    "one token for the sequence": lambda: torch.randn(2, 6, 1).expand(2, 6, 9),
    "strided both ways": lambda: torch.randn(2, 12, 18)[:, ::2, ::2],
}

TOKENS_ADJACENT = ("channel-first", "slice of channels", "one row for the batch")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    x, weight, bias = LAYOUTS[layout](), torch.randn(4, 6).T, torch.randn(12)[::2]
    dense = [t.clone(memory_format=torch.contiguous_format).requires_grad_() for t in (x, weight, bias)]
    strided = [t.detach().requires_grad_() for t in (x, weight, bias)]
    got, want = (causal_conv1d(*inputs, activation="silu", reverse=True) for inputs in (strided, dense))
    assert got.is_contiguous() == (layout in TOKENS_ADJACENT)
    assert got.is_contiguous() or got.transpose(1, 2).is_contiguous()
    upstream = torch.randn(2, 1, 9).expand(2, 6, 9)
    gradients = [torch.autograd.grad(y, t, upstream) for y, t in ((got, strided), (want, dense))]
    for g, w in zip((got, *gradients[0]), (want, *gradients[1]), strict=True):
        assert relative_error(g, w) < 1e-6
    assert gradients[0][0].stride() == got.stride()


def test_float32_sums_for_half_precision():
    x, weight = torch.full((1, 1, 4), 0.1, dtype=torch.float16), torch.tensor([[2048.0, 1.0, -2048.0, 1.0]])
    y = causal_conv1d(x, weight)
    assert y.dtype == torch.float16
    assert relative_error(y[..., 3], 2 * x[..., 3]) < 1e-3  # half-precision sums would lose the ones


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_does_not_reach_inside(backend):
    inputs = Conv1d(1, 4, 9).inputs(torch.float32)
    want = causal_conv1d(*inputs, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(causal_conv1d(*inputs, backend=backend), want)


class Model(torch.nn.Module):
    """The convolution of Vim with parameters, for tracing."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv1d(6, 6, 4, groups=6)

    def forward(self, x):
        x = x[..., :6].transpose(1, 2)
        return causal_conv1d(x, self.conv.weight[:, 0], self.conv.bias, "silu", reverse=True) * 2


def test_export_keeps_the_operator_whole():
    model, x = Model(), torch.randn(1, 5, 12)
    size = {1: torch.export.Dim("length", min=2, max=64)}
    program = torch.export.export(model, (x,), dynamic_shapes={"x": size})
    assert "mmvssm.causal_conv1d" in str(program.graph)
    other = torch.randn(1, 11, 12)
    assert relative_error(program.module()(other), model(other)) < 1e-6


def test_compile_without_graph_breaks():
    model, x = Model(), torch.randn(2, 5, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    got = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
    assert all(relative_error(g, w) < 1e-5 for g, w in zip(got, want, strict=True))


def test_flop_counter_sees_the_convolution():
    from torch.utils.flop_counter import FlopCounterMode

    inputs = [t.requires_grad_() for t in Conv1d(2, 6, 9, 3).inputs(torch.float32)]
    with FlopCounterMode(display=False) as counter:
        causal_conv1d(*inputs).sum().backward()
    assert counter.get_total_flops() == 3 * (2 * 2 * 6 * 9 * 3)


def test_meta_tensors():
    out = causal_conv1d(*(t.to("meta") for t in Conv1d(2, 6, 9).inputs(torch.float16)))
    assert out.shape == (2, 6, 9)
    assert out.dtype == torch.float16


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_empty_batch(backend):
    x, weight, bias = Conv1d(1, 6, 9).inputs(torch.float16)
    out = causal_conv1d(x[:0], weight, bias, backend=backend)
    assert out.shape == (0, 6, 9)
    assert out.dtype == torch.float16


def test_torch_serves_wide_windows_and_large_batches(monkeypatch):
    monkeypatch.setattr(dispatch, "available_backends", lambda device: ("triton", "torch"))
    monkeypatch.setattr(dispatch, "triton_importable", lambda: True)
    x, weight, bias = Conv1d(1, 3, 4, 5).inputs(torch.float32)
    assert torch.equal(causal_conv1d(x, weight, bias), causal_conv1d(x, weight, bias, backend="torch"))
    with pytest.raises(ValueError, match="but the kernels take at most 4 taps, not 5; use 'auto' or 'torch'"):
        causal_conv1d(x, weight, bias, backend="triton")
    many = torch.zeros(1).expand(65536)
    assert dispatch.run("op", "auto", many, lambda: "triton", lambda: "torch", max_batch=None) == "triton"


@pytest.mark.skipif(not dispatch.triton_importable(), reason="Triton has no wheels for this platform")
def test_kernels_read_channel_last_memory_where_it_is():
    from mmvssm_kernels.causal_conv1d.triton_launch import token_major

    for layout in ("channel-last", "slice of a projection", "every second token"):
        x = LAYOUTS[layout]()
        assert token_major(x) is x
    x = LAYOUTS["channel-first"]()
    assert torch.equal(token_major(x), x)
    assert token_major(x).stride(1) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_on_a_gpu(layout):
    with torch.device("cuda"):  # moving a strided tensor there would make it dense
        inputs = [LAYOUTS[layout](), torch.randn(4, 6).T, torch.randn(12)[::2]]
    exact = [t.cpu().double().requires_grad_() for t in inputs]
    inputs = [t.requires_grad_() for t in inputs]
    upstream = torch.randn(2, 1, 9).expand(2, 6, 9)
    got = causal_conv1d(*inputs, activation="silu", backend="triton")
    want = causal_conv1d(*exact, activation="silu", backend="reference")
    gradients = torch.autograd.grad(got, inputs, upstream.cuda())
    exact_gradients = torch.autograd.grad(want, exact, upstream.double())
    assert got.is_contiguous() == (layout in TOKENS_ADJACENT)
    for g, w in zip((got, *gradients), (want, *exact_gradients), strict=True):
        assert relative_error(g, w) < 1e-5


@pytest.mark.gpu
def test_one_kernel_serves_all_lengths_and_orders():
    from mmvssm_kernels.causal_conv1d.triton_bwd import causal_conv1d_bwd_kernel
    from mmvssm_kernels.causal_conv1d.triton_fwd import causal_conv1d_fwd_kernel

    device, compiled = torch.cuda.current_device(), []
    for length in (49, 196, 197, 4096):
        for options in ({}, {"reverse": True}, {"padding": "same"}):
            case = Conv1d(2, 64, length, **options)
            inputs = [t.requires_grad_() for t in case.inputs(torch.float16, "cuda")]
            causal_conv1d(*inputs, **case.options()).sum().backward()
            kernels = (causal_conv1d_fwd_kernel, causal_conv1d_bwd_kernel)
            compiled.append([len(kernel.device_caches[device][0]) for kernel in kernels])
    assert all(counts == compiled[0] for counts in compiled)


@pytest.mark.gpu
def test_cuda_graph_capture():
    case = Conv1d(2, 64, 197)
    inputs = case.inputs(torch.float16, "cuda")
    want = causal_conv1d(*inputs, **case.options())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = causal_conv1d(*inputs, **case.options())
    got.fill_(float("nan"))
    graph.replay()
    assert torch.equal(got, want)


BAD = {
    "x": (lambda t: t[0], r"x must have shape \(B, D, L\), but its shape is \(4, 9\)"),
    "length": (None, r"x must have at least one token \(axis 2\), but it has 0"),
    "weight": (lambda t: t[:, None], r"weight must have shape \(4, W\), but its shape is \(4, 1, 4\)"),
    "width": (None, r"weight must have at least one tap \(axis 1\), but it has 0"),
    "bias": (lambda t: t.to("meta"), "bias must be on cpu like the first argument, but it is on meta"),
    "activation": (lambda t: "relu", "activation must be one of None, 'silu', but it is 'relu'"),
    "padding": (lambda t: 3, "padding must be one of 'causal', 'same', but it is 3"),
    "backend": (lambda t: "cuda", "backend must be one of auto, triton, torch, reference, but it is 'cuda'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    arguments = dict(zip(("x", "weight", "bias"), Conv1d(1, 4, 9).inputs(torch.float32), strict=True))
    spoil, sentence = BAD[name]
    if name == "length":
        arguments["x"] = arguments["x"][..., :0]
    elif name == "width":
        arguments["weight"] = arguments["weight"][:, :0]
    else:
        arguments[name] = spoil(arguments.get(name))
    with pytest.raises(ValueError, match=sentence):
        causal_conv1d(**arguments)


def test_no_tensor():
    with pytest.raises(TypeError, match="weight must be a tensor, but it is list"):
        causal_conv1d(torch.zeros(1, 2, 3), [[1.0, 2.0]])


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_golden(backend):
    """Values and gradients of the published implementation."""
    arrays = np.load(shared_dir("golden", "vim", "op_causal_conv1d.npz"))
    normal = golden_fill().normal
    for meta in map(json.loads, arrays["meta"]):
        names = ("x", "weight", "bias")
        inputs = [torch.from_numpy(arrays[f"{meta['case']}/{n}"]).double().requires_grad_() for n in names]
        y = causal_conv1d(*inputs, activation=meta["activation"], reverse=meta["reverse"], backend=backend)
        (y * torch.from_numpy(normal("loss:y", y.shape))).mean().backward()
        assert relative_error(y, torch.from_numpy(arrays[f"{meta['case']}/y"])) < 1e-12
        for name, tensor in zip(names, inputs, strict=True):
            assert relative_error(tensor.grad, torch.from_numpy(arrays[f"{meta['case']}/grad:{name}"])) < 1e-12
