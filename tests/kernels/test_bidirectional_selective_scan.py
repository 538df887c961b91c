"""Vim's inner block on a CPU: published values, gradients, plumbing and errors; its grid is in ``cases.py``."""

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmvssm_kernels import ScanParameters, bidirectional_selective_scan, selective_scan
from mmvssm_kernels.testing import BidirectionalScan, bidirectional_scan_of_list, relative_error

from ..helpers import shared_dir

CASE = BidirectionalScan(2, 4, 6, 2, 3)
# Keys of a published mixer, in the order of ScanParameters.
KEYS = ("conv1d{}.weight", "conv1d{}.bias", "x_proj{}.weight", "dt_proj{}.weight", "dt_proj{}.bias", "A{}_log", "D{}")


def leaves(case, dtype=torch.float32, device="cpu"):
    return [t.requires_grad_() for t in case.inputs(dtype, device)]


def parameters_of(inputs):
    return [ScanParameters(*inputs[i : i + 7]) for i in range(1, len(inputs), 7)]


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_against_published_mixers(backend):
    """Whole mixers, in_proj to out_proj, values and gradients (vim/op_mixer.npz)."""
    arrays = np.load(shared_dir("golden", "vim", "op_mixer.npz"))
    sys.path.insert(0, str(shared_dir("golden")))
    try:
        from fill import fill, normal
    finally:
        sys.path.pop(0)
    checked = 0
    for case in (json.loads(text) for text in arrays["meta"]):
        if case["bimamba_type"] not in ("v2", "none"):
            continue  # v1 shares all but A between the directions: a matter of the mixer
        name = case["case"]
        weights = {k: torch.from_numpy(v).double().requires_grad_() for k, v in fill(case["shapes"]).items()}
        x = torch.from_numpy(arrays[f"{name}/x"]).double().requires_grad_()
        both = case["bimamba_type"] == "v2"
        directions = [
            ScanParameters(weights[KEYS[0].format(s)].squeeze(1), *(weights[k.format(s)] for k in KEYS[1:]))
            for s in (("", "_b") if both else ("",))
        ]
        scale = 0.5 if both and case["if_divide_out"] else 1.0
        xz = x @ weights["in_proj.weight"].T
        y = bidirectional_selective_scan(xz, directions[0], directions[1] if both else None, scale, backend=backend)
        y = y @ weights["out_proj.weight"].T
        want = torch.from_numpy(arrays[f"{name}/y"])
        assert (y - want).abs().max() <= 1e-12 * max(1.0, want.abs().max()), name
        grads = {k.split("grad:")[1]: arrays[k] for k in arrays.files if k.startswith(f"{name}/grad:")}
        if grads:
            (y * torch.from_numpy(normal("loss:y", y.shape))).mean().backward()
        for key, grad in grads.items():
            got = x.grad if key == "x" else weights[key].grad
            assert relative_error(got, torch.from_numpy(grad)) < 1e-10, (name, key)
        checked += 1
    assert checked >= 4


def test_against_the_one_direction_operator():
    """The same from two selective scans of flipped copies; selective_scan has golden tests of its own."""
    inputs = BidirectionalScan(2, 6, 11, 3, 4).inputs(torch.float64)
    xz, (forward, backward) = inputs[0], parameters_of(inputs)
    x, z = xz.transpose(1, 2).chunk(2, dim=1)

    def direction(x, p):
        u = F.silu(F.conv1d(x, p.conv_weight[:, None], p.conv_bias, padding=3, groups=6)[..., : x.shape[2]])
        r, B, C = (p.x_proj_weight @ u).split([3, 4, 4], dim=1)
        delta = p.dt_proj_weight @ r
        return selective_scan(u, delta, -p.A_log.exp(), B, C, p.D, delta_bias=p.dt_proj_bias, delta_softplus=True)

    y = direction(x, forward) + direction(x.flip(-1), backward).flip(-1)
    want = (0.5 * y * F.silu(z)).transpose(1, 2)
    assert relative_error(bidirectional_selective_scan(xz, forward, backward, 0.5), want) < 1e-13


@pytest.mark.parametrize("directions", [1, 2])
def test_gradcheck(directions):
    inputs = leaves(BidirectionalScan(1, 2, 3, 2, 2, directions=directions), torch.float64)
    assert torch.autograd.gradcheck(lambda *t: bidirectional_scan_of_list(*t, scale=0.5), inputs)


def test_frozen_inputs_get_no_gradient():
    inputs = leaves(CASE)
    inputs[0].requires_grad_(False)
    inputs[4].requires_grad_(False)
    bidirectional_scan_of_list(*inputs).sum().backward()
    assert inputs[0].grad is None
    assert inputs[4].grad is None
    assert all(t.grad is not None for i, t in enumerate(inputs) if i not in (0, 4))


def test_shared_parameters_add_their_gradients():
    inputs = leaves(CASE)
    forward = parameters_of(inputs)[0]
    bidirectional_selective_scan(inputs[0], forward, forward).sum().backward()
    got = forward.A_log.grad.clone()
    copies = [t.detach().clone().requires_grad_() for t in (inputs[0], *forward, *forward)]
    bidirectional_scan_of_list(*copies).sum().backward()
    assert relative_error(got, copies[6].grad + copies[13].grad) < 1e-6


@pytest.mark.parametrize("layout", ["channel_first", "sliced", "expanded"])
def test_strides(layout):
    xz, *rest = CASE.inputs(torch.float32)
    if layout == "channel_first":
        strided = xz.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "sliced":
        strided = torch.cat([xz, xz], dim=1)[:, ::2]
    else:
        strided = xz[:1].expand_as(xz)
    strided.requires_grad_()
    dense = strided.detach().contiguous().requires_grad_()
    got, want = (bidirectional_scan_of_list(t, *rest) for t in (strided, dense))
    assert torch.equal(got, want)
    assert got.is_contiguous()
    (got_grad,), (want_grad,) = (
        torch.autograd.grad(y, t, torch.ones_like(y)) for y, t in ((got, strided), (want, dense))
    )
    assert torch.equal(got_grad, want_grad)


@pytest.mark.parametrize("keep_states", [False, True])
def test_opcheck(keep_states):
    xz, *parameters = leaves(CASE)
    operator = torch.ops.mmvssm.bidirectional_selective_scan.default
    # What is kept has no gradient and, on a CPU, no defined content: only shapes can be compared.
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    tests += [] if keep_states else ["test_aot_dispatch_dynamic"]
    torch.library.opcheck(operator, (xz, parameters, 0.5, keep_states, xz.dtype, "auto"), test_utils=tests)


class Model(torch.nn.Module):
    """One block with parameters, for tracing."""

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.ParameterList(CASE.inputs(torch.float32)[1:])

    def forward(self, xz):
        return bidirectional_scan_of_list(xz, *self.weights, scale=0.5) * 2


def test_export_keeps_the_operator_whole():
    model, xz = Model(), torch.randn(2, 6, 8)
    program = torch.export.export(model, (xz,), dynamic_shapes={"xz": {1: torch.export.Dim("length", min=2, max=99)}})
    assert "mmvssm.bidirectional_selective_scan" in str(program.graph)
    other = torch.randn(2, 13, 8)
    assert relative_error(program.module()(other), model(other)) < 1e-6


def test_compile_without_graph_breaks():
    model, xz = Model(), torch.randn(2, 6, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(xz), model(xz)) < 1e-6
    compiled(xz).sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(xz).sum().backward()
    assert all(relative_error(g, p.grad) < 1e-5 for g, p in zip(got, model.parameters(), strict=True))


def test_flop_counter_sees_the_block():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        bidirectional_scan_of_list(*CASE.inputs(torch.float32))
    per_channel = (9 * 3 + 1) + 2 * (2 + 2 * 3 + 2) + 2 * 4  # scan, projections, convolution
    assert counter.get_total_flops() == 2 * 6 * 2 * 4 * per_channel


def test_meta_and_empty():
    inputs = [t.to("meta") for t in CASE.inputs(torch.float16)]
    out = bidirectional_scan_of_list(*inputs)
    assert out.shape == (2, 6, 4)
    assert out.dtype == torch.float16
    xz, *rest = CASE.inputs(torch.float32)
    assert bidirectional_scan_of_list(xz[:0], *rest).shape == (0, 6, 4)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_does_not_reach_inside(backend):
    inputs = CASE.inputs(torch.float32)
    want = bidirectional_scan_of_list(*inputs, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = bidirectional_scan_of_list(*inputs, backend=backend)
    assert torch.equal(got, want)


def test_more_taps_than_the_kernels_take(monkeypatch):
    """auto leaves such a convolution to torch; an explicit choice of the kernels is an error."""
    from mmvssm_kernels import dispatch

    monkeypatch.setattr(dispatch, "available_backends", lambda device: ("triton", "torch"))
    monkeypatch.setattr(dispatch, "triton_importable", lambda: True)
    inputs = CASE._replace(width=17).inputs(torch.float32)
    with pytest.raises(ValueError, match="the kernels take at most 16 taps, not 17"):
        bidirectional_scan_of_list(*inputs, backend="triton")
    want = bidirectional_scan_of_list(*inputs, backend="reference")
    assert relative_error(bidirectional_scan_of_list(*inputs), want) < 1e-5


BAD = {
    "xz rank": (dict(xz=lambda t: t[0]), ValueError, r"xz must have shape \(B, L, 2E\), but its shape is \(6, 8\)"),
    "xz odd": (dict(xz=lambda t: t[..., 1:]), ValueError, "even number of channels, but axis 2 has 7"),
    "xz length": (dict(xz=lambda t: t[:, :0]), ValueError, "xz must have at least one token"),
    "tuple": (dict(forward=lambda p: p[:3]), TypeError, "forward must be a ScanParameters of 7 tensors .* length 3"),
    "type": (dict(backward=lambda p: p.D), TypeError, "backward must be a ScanParameters .*, but it is Tensor"),
    "scale": (dict(scale=lambda s: "half"), TypeError, "scale must be a number, but it is str"),
    "alike": (
        dict(backward=lambda p: p._replace(conv_weight=p.conv_weight[:, :2])),
        ValueError,
        r"backward.conv_weight must have the shape \(4, 4\) of forward.conv_weight, but its shape is \(4, 2\)",
    ),
}
BAD_MEMBERS = {
    "conv_weight": (lambda t: t[:, None], r"conv_weight must have shape \(4, W\), but its shape is \(4, 1, 4\)"),
    "conv_bias": (lambda t: t[1:], r"conv_bias must have shape \(4\)"),
    "x_proj_weight": (lambda t: t[1:], r"x_proj_weight must have shape \(8, 4\), but its shape is \(7, 4\)"),
    "dt_proj_weight": (lambda t: t[:, :0], "dt_proj_weight must have at least one rank"),
    "dt_proj_bias": (lambda t: t.int(), "dt_proj_bias must be float16, bfloat16, float32 or float64"),
    "A_log": (lambda t: t[:, :0], "A_log must have at least one state"),
    "D": (lambda t: t.to("meta"), "D must be on cpu like the first argument, but it is on meta"),
}


def arguments():
    inputs = CASE.inputs(torch.float32)
    forward, backward = parameters_of(inputs)
    return dict(xz=inputs[0], forward=forward, backward=backward, scale=0.5)


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    changes, kind, sentence = BAD[name]
    given = arguments()
    given |= {key: spoil(given[key]) for key, spoil in changes.items()}
    with pytest.raises(kind, match=sentence):
        bidirectional_selective_scan(**given)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", BAD_MEMBERS)
def test_bad_members(name, direction):
    spoil, sentence = BAD_MEMBERS[name]
    given = arguments()
    given[direction] = given[direction]._replace(**{name: spoil(getattr(given[direction], name))})
    with pytest.raises(ValueError, match=f"{direction}.{sentence}"):
        bidirectional_selective_scan(**given)
