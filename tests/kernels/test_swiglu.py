"""The gate of SwiGLU on a CPU: what the grid of all operators (cases.py) does not cover."""

import pytest
import torch
import torch.nn.functional as F

from mmvssm_kernels import swiglu
from mmvssm_kernels.testing import SwiGlu, relative_error


def test_is_the_formula():
    (x,) = SwiGlu(2, 5, 12).inputs(torch.float64)
    assert relative_error(swiglu(x), F.silu(x[..., :12]) * x[..., 12:]) < 1e-14


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 4, 6)])
def test_any_number_of_axes(shape):
    x = torch.randn(shape)
    y = swiglu(x)
    assert y.shape == (*shape[:-1], 3)
    assert relative_error(y, swiglu(x, backend="reference")) < 1e-6


def test_gradcheck():
    assert torch.autograd.gradcheck(swiglu, [SwiGlu(1, 3, 4).inputs(torch.float64)[0].requires_grad_()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    tolerances = {} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    x = SwiGlu(2, 3, 8).inputs(dtype)[0].requires_grad_()
    torch.library.opcheck(torch.ops.mmvssm.swiglu.default, (x, "auto"), **tolerances)


LAYOUTS = {
    "transposed": lambda: torch.randn(2, 6, 5).transpose(1, 2),
    "slice of channels": lambda: torch.randn(2, 5, 12)[..., 6:],
    "slice of tokens": lambda: torch.randn(2, 7, 6)[:, 1:6],
    "every second channel": lambda: torch.randn(2, 5, 12)[..., ::2],
    "one row for all": lambda: torch.randn(6).expand(2, 5, 6),
}


def strided_and_dense(layout, device="cpu", backend="auto"):
    with torch.device(device):
        strided = LAYOUTS[layout]()
        upstream = torch.randn(2, 3, 5).transpose(1, 2)
    results = []
    for x in (strided, strided.clone(memory_format=torch.contiguous_format)):
        x = x.detach().requires_grad_()
        y = swiglu(x, backend=backend)
        assert y.is_contiguous()
        results.append((y, *torch.autograd.grad(y, x, upstream)))
    return zip(*results, strict=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    assert all(relative_error(got, want) < 1e-6 for got, want in strided_and_dense(layout))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_on_a_gpu(layout):
    assert all(relative_error(got, want) < 1e-6 for got, want in strided_and_dense(layout, "cuda", "triton"))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_does_not_reach_inside(backend):
    (x,) = SwiGlu(2, 3, 8).inputs(torch.float32)
    want = swiglu(x, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(swiglu(x, backend=backend), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounds_once(dtype):
    """Computed in float32: of the exact result nothing but the last rounding is lost."""
    (x,) = SwiGlu(2, 3, 64).inputs(dtype)
    assert torch.equal(swiglu(x), swiglu(x.float()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_extreme_values_stay_finite(dtype):
    x = torch.tensor([[-1e4, 1.0], [1e4, 1.0], [-1e4, -1e4], [0.0, 1e4]], dtype=dtype).requires_grad_()
    y = swiglu(x)
    y.sum().backward()
    assert y.flatten().tolist() == pytest.approx([0.0, 1e4, 0.0, 0.0], rel=1e-3)
    assert x.grad.isfinite().all()


def test_export_and_compile_keep_the_operator_whole():
    model, x = torch.nn.Sequential(torch.nn.Linear(4, 12), Gated()), torch.randn(2, 5, 4)
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({1: length},))
    assert "mmvssm.swiglu" in str(program.graph)
    other = torch.randn(2, 9, 4)
    assert relative_error(program.module()(other), model(other)) < 1e-6
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    got = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
    assert all(relative_error(g, w) < 1e-5 for g, w in zip(got, want, strict=True))


class Gated(torch.nn.Module):
    """The operator as a module."""

    def forward(self, x):
        return swiglu(x)


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    x = SwiGlu(2, 3, 8).inputs(torch.float32)[0].requires_grad_()
    checkpoint(swiglu, x, use_reentrant=False).sum().backward()
    got = x.grad.clone()
    x.grad = None
    swiglu(x).sum().backward()
    assert torch.equal(got, x.grad)


def test_flop_counter_counts_activations_as_torch_does():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        swiglu(SwiGlu(2, 3, 8).inputs(torch.float32)[0].requires_grad_()).sum().backward()
    assert counter.get_total_flops() == 0


def test_meta_tensors():
    y = swiglu(torch.empty(2, 3, 8, dtype=torch.float16, device="meta"))
    assert (y.shape, y.dtype) == ((2, 3, 4), torch.float16)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_empty(backend):
    assert swiglu(torch.zeros(0, 3, 8).half(), backend=backend).shape == (0, 3, 4)


@pytest.mark.parametrize(
    ("x", "error", "sentence"),
    [
        ([1.0], TypeError, "x must be a tensor, but it is list"),
        (torch.zeros(2, 7), ValueError, r"x must have an even number of channels \(last axis\), but it has 7"),
        (torch.zeros(2, 0), ValueError, r"x must have at least one channel \(last axis\), but it has 0"),
        (torch.zeros(2, 8, dtype=torch.int32), ValueError, "x must be float16, .* but it is torch.int32"),
        (torch.tensor(1.0), ValueError, "x must have shape"),
    ],
)
def test_bad_arguments(x, error, sentence):
    with pytest.raises(error, match=sentence):
        swiglu(x)


@pytest.mark.gpu
def test_one_kernel_serves_all_lengths():
    from mmvssm_kernels.swiglu.triton_bwd import swiglu_bwd_kernel
    from mmvssm_kernels.swiglu.triton_fwd import swiglu_fwd_kernel

    device, compiled = torch.cuda.current_device(), []
    for length in (1, 49, 196, 197, 4096):
        swiglu(SwiGlu(2, length, 512).inputs(torch.float16, "cuda")[0].requires_grad_()).float().sum().backward()
        compiled.append([len(k.device_caches[device][0]) for k in (swiglu_fwd_kernel, swiglu_bwd_kernel)])
    assert all(counts == compiled[0] for counts in compiled)
