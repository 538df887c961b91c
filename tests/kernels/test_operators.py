"""The operators on a CPU: values, gradients, plumbing and errors."""

import subprocess
import sys

import pytest
import torch

import mmvssm_kernels
from mmvssm_kernels import selective_scan, selective_scan_2d, use_backend
from mmvssm_kernels.testing import OPERATORS, Scan, Scan2d, check_operator, relative_error

from .cases import SHORT, WITH_OUT_DTYPE, case_id


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SHORT, ids=case_id)
def test_torch_backend_against_recurrence(case, dtype):
    check_operator(OPERATORS[type(case)], case, dtype)


@pytest.mark.parametrize("length", [300, 1000, 1003])
@pytest.mark.parametrize("reverse", [False, True])
def test_chunked_recurrence(length, reverse):
    from mmvssm_kernels.selective_scan.torch_scan import linear_recurrence_

    decay, value = torch.rand(length, 3, 2, dtype=torch.float64), torch.randn(length, 3, 2, dtype=torch.float64)
    want, state = torch.empty_like(value), torch.zeros(3, 2, dtype=torch.float64)
    for t in range(length - 1, -1, -1) if reverse else range(length):
        state = want[t] = decay[t] * state + value[t]
    assert relative_error(linear_recurrence_(decay, value.clone(), reverse), want) < 1e-14


@pytest.mark.parametrize(
    "case",
    [Scan(1, 2, 3, 2, gate=True), Scan(1, 2, 4, 1, reverse=True, softplus=False), Scan2d(1, 2, 2, 3, 1, 1)],
    ids=case_id,
)
def test_gradcheck(case):
    inputs = [t.requires_grad_() if t is not None else None for t in case.inputs(torch.float64)]
    operator = OPERATORS[type(case)]
    assert torch.autograd.gradcheck(lambda *tensors: operator(*tensors, **case.options()), inputs)


@pytest.mark.parametrize("missing", ["D", "z", "delta_bias"])
def test_optional_arguments_are_neutral(missing):
    u, delta, A, B, C, D, _, bias = Scan(1, 4, 9, 2, gate=True).inputs(torch.float32)
    arguments = {"D": D, "z": None, "delta_bias": bias}
    neutral = {"D": torch.zeros(4), "z": None, "delta_bias": torch.zeros(4)}
    with_none = selective_scan(u, delta, A, B, C, **(arguments | {missing: None}), delta_softplus=True)
    with_neutral = selective_scan(u, delta, A, B, C, **(arguments | {missing: neutral[missing]}), delta_softplus=True)
    assert relative_error(with_none, with_neutral) < 1e-6


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", WITH_OUT_DTYPE, ids=case_id)
def test_dtype_of_the_output_is_free(case, backend):
    """float32 out of 16-bit inputs keeps what rounding would lose."""
    inputs = [None if t is None else t.requires_grad_() for t in case.inputs(torch.bfloat16)]
    operator, leaves = OPERATORS[type(case)], [t for t in inputs if t is not None]
    exact = [None if t is None else t.detach().double() for t in inputs]
    want = operator(*exact, **case.options(), backend="reference")
    got = operator(*inputs, **case.options(), out_dtype=torch.float32, backend=backend)
    got, want = (t[0] if isinstance(t, tuple) else t for t in (got, want))
    assert got.dtype == torch.float32
    assert relative_error(got, want) < 1e-5
    grads = torch.autograd.grad(got, leaves, torch.randn_like(got))
    assert [g.dtype for g in grads] == [t.dtype for t in leaves]
    with pytest.raises(ValueError, match=r"out_dtype must be float16, .* or float64, but it is torch.int8"):
        operator(*inputs, **case.options(), out_dtype=torch.int8)
    with pytest.raises(TypeError, match=r"out_dtype must be a torch.dtype, but it is str"):
        operator(*inputs, **case.options(), out_dtype="float32")


def test_three_and_four_dimensional_weights_agree():
    u, delta, A, B, C, *_ = Scan(2, 4, 9, 3).inputs(torch.float32)
    assert torch.equal(selective_scan(u, delta, A, B, C), selective_scan(u, delta, A, B[:, 0], C[:, 0]))


@pytest.mark.parametrize("case", [Scan(2, 4, 6, 2, gate=True), Scan2d(1, 4, 3, 5, 2, 1)], ids=case_id)
def test_opcheck(case):
    inputs = [None if t is None else t.requires_grad_() for t in case.inputs(torch.float32)]
    if isinstance(case, Scan):
        torch.library.opcheck(
            torch.ops.mmvssm.selective_scan.default, (*inputs, True, False, True, inputs[0].dtype, "auto")
        )
    else:
        torch.library.opcheck(torch.ops.mmvssm.selective_scan_2d.default, (*inputs, torch.float32, "auto"))


class Model(torch.nn.Module):
    """One scan with parameters, for tracing."""

    def __init__(self):
        super().__init__()
        _, *weights = Scan2d(1, 4, 3, 5, 2, 1).inputs(torch.float32)
        self.weights = torch.nn.ParameterList(weights)

    def forward(self, x):
        return selective_scan_2d(x, *self.weights) * 2


def test_export_keeps_the_operator_whole():
    model, x = Model(), torch.randn(1, 4, 3, 5)
    size = {2: torch.export.Dim("height", min=2, max=64), 3: torch.export.Dim("width", min=2, max=64)}
    program = torch.export.export(model, (x,), dynamic_shapes={"x": size})
    assert "mmvssm.selective_scan_2d" in str(program.graph)
    for other in (torch.randn(1, 4, 7, 6), torch.randn(1, 4, 40, 50)):  # one segment of the kernels, and many
        assert relative_error(program.module()(other), model(other)) < 1e-6


def test_compile_without_graph_breaks():
    model, x = Model(), torch.randn(1, 4, 3, 5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(x), model(x)) < 1e-6
    compiled(x).sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    assert all(relative_error(g, p.grad) < 1e-5 for g, p in zip(got, model.parameters(), strict=True))


def test_flop_counter_sees_the_scans():
    from torch.utils.flop_counter import FlopCounterMode

    case = Scan2d(2, 6, 4, 5, 3, 2)
    with FlopCounterMode(display=False) as counter:
        selective_scan_2d(*case.inputs(torch.float32))
    tokens = 2 * 4 * 5
    assert counter.get_total_flops() == tokens * 4 * 6 * ((9 * 2 + 1) + 2 * (3 + 2 * 2 + 3))


def test_meta_tensors():
    inputs = [t.to("meta") for t in Scan2d(2, 6, 4, 5, 3, 2).inputs(torch.float16)]
    out = selective_scan_2d(*inputs)
    assert out.shape == (2, 6, 4, 5)
    assert out.dtype == torch.float32


def test_empty_batch():
    inputs = Scan2d(1, 6, 4, 5, 3, 2).inputs(torch.float16)
    assert selective_scan_2d(inputs[0][:0], *inputs[1:]).shape == (0, 6, 4, 5)
    u, delta, A, B, C, *_ = Scan(1, 4, 9, 3).inputs(torch.float32)
    assert selective_scan(u[:0], delta[:0], A, B[:0], C[:0]).shape == (0, 4, 9)


def test_output_dtype():
    inputs = Scan2d(1, 6, 4, 5, 3, 2).inputs(torch.bfloat16)
    assert selective_scan_2d(*inputs).dtype == torch.float32
    assert selective_scan_2d(*inputs, out_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert selective_scan(*Scan(1, 4, 9, 3).inputs(torch.bfloat16)).dtype == torch.bfloat16


class TestBackendChoice:
    def test_order_of_precedence(self, monkeypatch):
        from mmvssm_kernels.dispatch import requested_backend

        assert requested_backend("auto") == "auto"
        monkeypatch.setenv("MMVSSM_BACKEND", "reference")
        assert requested_backend("auto") == "reference"
        with use_backend("torch"):
            assert requested_backend("auto") == "torch"
            assert requested_backend("reference") == "reference"

    def test_unknown_names(self, monkeypatch):
        inputs = Scan2d(1, 6, 4, 5, 3, 2).inputs(torch.float32)
        with pytest.raises(
            ValueError, match=r"backend must be one of auto, triton, torch, reference, but it is 'cuda'"
        ):
            selective_scan_2d(*inputs, backend="cuda")
        monkeypatch.setenv("MMVSSM_BACKEND", "fast")
        with pytest.raises(ValueError, match="MMVSSM_BACKEND must be one of"):
            selective_scan_2d(*inputs)

    @pytest.mark.skipif(mmvssm_kernels.dispatch.interpreting(), reason="the interpreter does serve CPU tensors")
    def test_triton_cannot_serve_a_cpu(self):
        with pytest.raises(ValueError, match="Triton"):
            selective_scan_2d(*Scan2d(1, 6, 4, 5, 3, 2).inputs(torch.float32), backend="triton")

    @pytest.mark.parametrize(
        ("tensor", "sentence"),
        [
            (torch.zeros(1, dtype=torch.float64), "the kernels compute in float32, not float64"),
            (torch.zeros(1).expand(65536), "batches of at most 65535, not 65536"),
        ],
    )
    def test_torch_serves_what_the_kernels_cannot(self, monkeypatch, tensor, sentence):
        from mmvssm_kernels import dispatch

        monkeypatch.setattr(dispatch, "available_backends", lambda device: ("triton", "torch"))
        monkeypatch.setattr(dispatch, "triton_importable", lambda: True)
        assert dispatch.run("op", "auto", tensor, lambda: "triton", lambda: "torch") == "torch"
        assert dispatch.run("op", "auto", torch.zeros(65535), lambda: "triton", lambda: "torch") == "triton"
        with pytest.raises(ValueError, match=sentence):
            dispatch.run("op", "triton", tensor, lambda: "triton", lambda: "torch")

    @pytest.mark.parametrize("backend", ["torch", "reference"])
    def test_autocast_does_not_reach_inside(self, backend):
        case = Scan2d(1, 6, 4, 5, 3, 2)
        inputs = [t.requires_grad_() for t in case.inputs(torch.float32)]
        want = selective_scan_2d(*inputs, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            got = selective_scan_2d(*inputs, backend=backend)
            if backend == "torch":  # the reference is differentiated by autograd, which autocast does concern
                grads = torch.autograd.grad(got.sum(), inputs)
        assert torch.equal(got, want)
        if backend == "reference":
            grads = torch.autograd.grad(got.sum(), inputs)
        for grad, exact in zip(grads, torch.autograd.grad(want.sum(), inputs), strict=True):
            assert torch.equal(grad, exact)

    def test_kernel_that_does_not_compile_falls_back_once(self, monkeypatch):
        from mmvssm_kernels import dispatch

        monkeypatch.setattr(dispatch, "available_backends", lambda device: ("triton", "torch"))
        monkeypatch.setattr(dispatch, "triton_importable", lambda: True)
        monkeypatch.setattr(dispatch, "_broken", set())
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "test GPU")

        def fails():
            raise RuntimeError("PassManager::run failed")

        def run(backend="auto"):
            return dispatch.run("op", backend, torch.zeros(1), fails, lambda: "torch")

        with pytest.warns(UserWarning, match="does not compile on test GPU"):
            assert run() == "torch"
        assert run() == "torch"
        with pytest.raises(RuntimeError, match="PassManager"):
            run("triton")


BAD_SCANS = {
    "u": (lambda t: t[0], r"u must have shape \(B, D, L\), but its shape is \(4, 9\)"),
    "delta": (lambda t: t[:, :3], r"delta must have shape \(1, 4, 9\), but its shape is \(1, 3, 9\)"),
    "A": (lambda t: t[:, :0], r"A must have at least one state"),
    "B": (lambda t: t.expand(1, 3, 3, 9), "B must have a number of groups"),
    "C": (lambda t: t.int(), "C must be float16, bfloat16, float32 or float64, but it is torch.int32"),
    "D": (lambda t: t.to("meta"), "D must be on cpu like the first argument, but it is on meta"),
    "z": (lambda t: [1.0], "z must be a tensor, but it is list"),
    "delta_bias": (lambda t: t[:1], r"delta_bias must have shape \(4\)"),
}


@pytest.mark.parametrize("name", BAD_SCANS)
def test_bad_selective_scan_arguments(name):
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    arguments = dict(zip(names, Scan(1, 4, 9, 3, gate=True).inputs(torch.float32), strict=True))
    spoil, sentence = BAD_SCANS[name]
    arguments[name] = spoil(arguments[name])
    with pytest.raises((ValueError, TypeError), match=sentence):
        selective_scan(**arguments)


BAD_SCANS_2D = {
    "x": (lambda t: t[:, :, :0], "x must have at least one row"),
    "x_proj_weight": (lambda t: t[:, 1:], r"x_proj_weight must have shape \(4, 7, 6\), but its shape is \(4, 6, 6\)"),
    "dt_proj_weight": (lambda t: t[:2], r"dt_proj_weight must have shape \(4, 6, R\)"),
    "dt_proj_bias": (lambda t: t.flatten(), r"dt_proj_bias must have shape \(4, 6\)"),
    "A_log": (lambda t: t[1:], r"A_log must have shape \(24, N\)"),
    "D": (lambda t: t[1:], r"D must have shape \(24\)"),
}


@pytest.mark.parametrize("name", BAD_SCANS_2D)
def test_bad_selective_scan_2d_arguments(name):
    names = ("x", "x_proj_weight", "dt_proj_weight", "dt_proj_bias", "A_log", "D")
    arguments = dict(zip(names, Scan2d(1, 6, 4, 5, 3, 2).inputs(torch.float32), strict=True))
    spoil, sentence = BAD_SCANS_2D[name]
    arguments[name] = spoil(arguments[name])
    with pytest.raises((ValueError, TypeError), match=sentence):
        selective_scan_2d(**arguments)


def test_import_needs_torch_alone():
    code = "import sys, mmvssm_kernels; print({'triton', 'mmengine', 'mmcv', 'einops', 'mmvssm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
