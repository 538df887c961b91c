"""Bias, activation and residual sum on a CPU: what the grid of all operators (cases.py) does not cover."""

import pytest
import torch
import torch.nn.functional as F

from mmvssm_kernels import bias_activation
from mmvssm_kernels.testing import BiasActivation, bias_activation_of_list, relative_error

FORMULAS = {None: lambda t: t, "relu": F.relu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}


@pytest.mark.parametrize("activation", FORMULAS)
@pytest.mark.parametrize("residual", [False, True])
def test_is_the_formula(activation, residual):
    x, bias, added = BiasActivation(2, 5, 12, activation, residual).inputs(torch.float64)
    want = FORMULAS[activation](x + bias) + (added if residual else 0)
    assert relative_error(bias_activation(x, bias, activation, added), want) < 1e-14


def test_on_a_channels_last_map():
    """The views that a convolution's result needs cost nothing, and the result is channels_last again."""
    x = torch.randn(2, 6, 3, 5).contiguous(memory_format=torch.channels_last)
    residual, bias = torch.randn(2, 6, 3, 5), torch.randn(6)
    y = bias_activation(x.permute(0, 2, 3, 1), bias, "relu", residual.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, F.relu(x + bias[:, None, None]) + residual)


@pytest.mark.parametrize("activation", FORMULAS)
def test_gradcheck(activation):
    tensors = [t.requires_grad_() for t in BiasActivation(1, 3, 4, activation, True).inputs(torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: bias_activation_of_list(*t, activation=activation), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    tolerances = {} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    x, bias, residual = (t.requires_grad_() for t in BiasActivation(2, 3, 8, residual=True).inputs(dtype))
    operator = torch.ops.mmvssm.bias_activation.default
    torch.library.opcheck(operator, (x, bias, "gelu_tanh", residual, "auto"), **tolerances)


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 4, 6)])
def test_any_number_of_axes(shape):
    x, bias = torch.randn(shape, requires_grad=True), torch.randn(6, requires_grad=True)
    y = bias_activation(x, bias, "relu")
    assert relative_error(y, bias_activation(x, bias, "relu", backend="reference")) < 1e-6
    assert [g.shape for g in torch.autograd.grad(y.sum(), (x, bias))] == [x.shape, bias.shape]


@pytest.mark.parametrize("layout", ["transposed", "sliced", "every second", "expanded"])
def test_strides(layout):
    x = {
        "transposed": lambda: torch.randn(2, 6, 5).transpose(1, 2),
        "sliced": lambda: torch.randn(2, 5, 12)[..., 6:],
        "every second": lambda: torch.randn(2, 5, 12)[..., ::2],
        "expanded": lambda: torch.randn(6).expand(2, 5, 6),
    }[layout]()
    bias = torch.randn(12)[::2]
    y = bias_activation(x, bias, "gelu_tanh", x)
    assert y.is_contiguous()
    assert relative_error(y, bias_activation(x.contiguous(), bias.contiguous(), "gelu_tanh", x.contiguous())) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounds_once(dtype):
    x, bias, residual = BiasActivation(2, 3, 64, residual=True).inputs(dtype)
    exact = bias_activation(x.float(), bias, "gelu_tanh", residual.float())
    assert torch.equal(bias_activation(x, bias, "gelu_tanh", residual), exact.to(dtype))


def test_dtypes_may_differ():
    """The result has the dtype of x, whatever bias, residual and autocast are."""
    x, bias, residual = BiasActivation(2, 3, 8, residual=True).inputs(torch.float32)
    want = bias_activation(x.bfloat16(), bias, None, residual)
    assert want.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(bias_activation(x.bfloat16(), bias, None, residual), want)


def test_not_a_number_is_not_hidden():
    x = torch.tensor([[float("nan"), float("inf"), -1.0]])
    got = bias_activation(x, torch.zeros(3), "relu")[0].tolist()
    assert got[0] != got[0]
    assert got[1:] == [float("inf"), 0.0]


def test_flop_counter_counts_activations_as_torch_does():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        bias_activation(torch.randn(2, 3, 8), torch.zeros(8), "relu")
    assert counter.get_total_flops() == 0


def test_meta_and_empty_tensors():
    y = bias_activation(torch.empty(2, 3, 8, dtype=torch.float16, device="meta"), torch.empty(8, device="meta"))
    assert (y.shape, y.dtype) == ((2, 3, 8), torch.float16)
    for backend in ("auto", "reference"):
        assert bias_activation(torch.zeros(0, 3, 8), torch.zeros(8), backend=backend).shape == (0, 3, 8)


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        (dict(x=[1.0]), TypeError, "x must be a tensor, but it is list"),
        (dict(x=torch.zeros(2, 0)), ValueError, r"x must have at least one channel \(last axis\), but it has 0"),
        (dict(bias=torch.zeros(5)), ValueError, r"bias must have shape \(8\), but its shape is \(5,?\)"),
        (dict(bias=None), TypeError, "bias must be a tensor, but it is NoneType"),
        (dict(residual=torch.zeros(1, 3, 8)), ValueError, r"residual must have shape \(2, 3, 8\)"),
        (dict(activation="gelu"), ValueError, "activation must be one of None, 'relu', 'gelu_tanh', but it is 'gelu'"),
        (dict(backend="cuda"), ValueError, "backend must be one of auto"),
    ],
)
def test_bad_arguments(changes, error, sentence):
    with pytest.raises(error, match=sentence):
        bias_activation(**{"x": torch.zeros(2, 3, 8), "bias": torch.zeros(8), **changes})
