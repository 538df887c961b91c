"""The Triton kernels on a GPU, against the float64 recurrence, with fresh random inputs."""

import pytest
import torch

from mmvssm_kernels import cast_together
from mmvssm_kernels.testing import (
    OPERATORS,
    TOLERANCES,
    BidirectionalGla,
    BidirectionalScan,
    Scan,
    Scan2d,
    check_operator,
    poisoned_memory,
    relative_error,
)

from .cases import LARGE, SHORT, WITH_OUT_DTYPE, case_id, laid_out_as_in_models

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def representable(case, dtype) -> bool:
    """Whether 16 bits can show the gradients within the bounds.

    - Step sizes of softplus(-20) = 2e-9 have gradients of that size: below float16's smallest number, 6e-8.
    - One token of Vim's block has gradients of the step sizes' weights among the numbers below 6e-5, which have fewer
      bits: the exact ones, rounded, are beyond the bound in one of six draws.
    - With two tokens of normalised attention the norm takes nearly all of the gradient away, and what it needs for
      that, the normalised output, is kept in 16 bits: beyond the bound in one of thirty draws, with any backend.
    - One channel of Vim's block has one step size's bias, whose gradient is one sum of terms of either sign: beyond
      bfloat16's bound in one of twenty-five draws.
    """
    if dtype == torch.bfloat16:
        return not (isinstance(case, BidirectionalScan) and case.channels == 1)
    if dtype != torch.float16:
        return True
    if getattr(case, "step", None) == -20.0:
        return False
    if isinstance(case, BidirectionalScan):
        return case.length > 1
    return not (isinstance(case, BidirectionalGla) and case.norm and case.length <= 2)


SCANS_2D = [case for case in LARGE if isinstance(case, Scan2d)]
CHECKS = [(case, dtype) for case in SHORT + LARGE for dtype in DTYPES if representable(case, dtype)]


@pytest.mark.parametrize(("case", "dtype"), CHECKS, ids=lambda v: case_id(v) if isinstance(v, tuple) else str(v))
def test_against_float64(case, dtype):
    with poisoned_memory():
        check_operator(OPERATORS[type(case)], case, dtype, "cuda", "triton")


def run(case, inputs, backend="triton"):
    inputs = [None if t is None else t.detach().requires_grad_() for t in inputs]
    outputs = OPERATORS[type(case)](*inputs, **case.options(), backend=backend)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    torch.manual_seed(1)
    upstream = [torch.randn_like(t) for t in outputs]
    return outputs + list(torch.autograd.grad(outputs, [t for t in inputs if t is not None], upstream))


@pytest.mark.parametrize("case", SHORT + LARGE, ids=case_id)
def test_two_runs_agree_bit_for_bit(case):
    inputs = case.inputs(torch.float16, "cuda")
    for first, second in zip(run(case, inputs), run(case, inputs), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded"])
@pytest.mark.parametrize("case", [c for c in SCANS_2D if c.state == 1][-3:], ids=case_id)
def test_strides(case, layout):
    inputs = case.inputs(torch.float32, "cuda")
    x = inputs[0]
    if layout == "sliced":
        x = torch.cat([x, x], dim=1)[:, : x.shape[1]]
    elif layout == "transposed":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    else:
        x = x[:1].expand_as(x)
    dense = [x.contiguous(), *inputs[1:]]
    for got, want in zip(run(case, [x, *inputs[1:]]), run(case, dense), strict=True):
        assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", [Scan(2, 72, 45, 8), Scan(2, 40, 77, 16, 2, True, True)], ids=case_id)
def test_scan_of_inputs_laid_out_as_in_models(case, dtype):
    inputs = case.inputs(dtype, "cuda")
    for got, want in zip(run(case, laid_out_as_in_models(inputs)), run(case, inputs), strict=True):
        assert relative_error(got, want) < TOLERANCES[dtype][1]


@pytest.mark.parametrize("case", WITH_OUT_DTYPE, ids=case_id)
def test_dtype_of_the_output_is_free(case):
    inputs = case.inputs(torch.bfloat16, "cuda")
    exact = [None if t is None else t.double() for t in inputs]
    got = OPERATORS[type(case)](*inputs, **case.options(), out_dtype=torch.float32, backend="triton")
    want = OPERATORS[type(case)](*exact, **case.options(), backend="reference")
    got, want = (t[0] if isinstance(t, tuple) else t for t in (got, want))
    assert got.dtype == torch.float32
    assert relative_error(got, want) < TOLERANCES[torch.bfloat16][0]


def test_cuda_graph_capture():
    case = SCANS_2D[-3]
    inputs = case.inputs(torch.float16, "cuda")
    operator = OPERATORS[type(case)]
    want = operator(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = operator(*inputs)
    got.fill_(float("nan"))
    graph.replay()
    assert torch.equal(got, want)


def test_one_kernel_serves_all_image_sizes():
    from mmvssm_kernels.selective_scan_2d.triton_fwd import selective_scan_2d_fwd_kernel as kernel

    device = torch.cuda.current_device()
    operator, case = OPERATORS[Scan2d], SCANS_2D[-1]
    compiled = []
    for height, width in ((50, 76), (51, 77), (48, 80), (63, 67)):
        operator(*case._replace(height=height, width=width).inputs(torch.float16, "cuda"))
        compiled.append(len(kernel.device_caches[device][0]))
    assert len(set(compiled)) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cast_together(dtype):
    shapes = [(384, 192), (1,), (2049,), (0,), (192, 1, 3, 3), (1000, 100), (2047,), (12,), (7, 5), (2048,)]
    tensors = [torch.randn(shape, device="cuda") for shape in shapes]
    with poisoned_memory():
        copies = cast_together(tensors, dtype, backend="triton")
    assert all(torch.equal(copy, tensor.to(dtype)) for copy, tensor in zip(copies, tensors, strict=True))
