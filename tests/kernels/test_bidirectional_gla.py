"""Bidirectional gated linear attention on a CPU: published arrays, gradients, plumbing and errors."""

import numpy as np
import pytest
import torch

from mmvssm_kernels import bidirectional_gla
from mmvssm_kernels.testing import BidirectionalGla, bidirectional_gla_of_list, relative_error

from ..helpers import shared_dir

CASE = BidirectionalGla(2, 7, 2, 3, 4, norm=True)


def tensors(case=CASE, dtype=torch.float32) -> dict:
    names = ("q", "k", "v", "gf", "gb", "norm_weight")
    return dict(zip(names, (t.requires_grad_() for t in case.inputs(dtype)), strict=False))


def golden_cases(name):
    arrays = np.load(shared_dir("golden", "vig", name))
    cases = sorted({key.split("/")[0] for key in arrays.files if "/" in key})
    assert cases
    for case in cases:
        yield {key.split("/", 1)[1]: arrays[key] for key in arrays.files if key.startswith(case + "/")}


@pytest.mark.parametrize("name", ["op_bigla.npz", "op_bigla_edge.npz"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_golden(name, backend):
    for arrays in golden_cases(name):
        # The arrays are (B, heads, L, width): the operator gets strided views of them.
        views = {n: torch.from_numpy(a.astype(np.float32)).requires_grad_() for n, a in arrays.items()}
        inputs = {n: views[n] for n in ("q", "k", "v", "gf", "gb")}
        out = bidirectional_gla(*(t.transpose(1, 2) for t in inputs.values()), backend=backend).transpose(1, 2)
        assert (out - views["o_fw"] - views["o_bw"]).abs().max() < 2e-5
        for n, got in zip(inputs, torch.autograd.grad(out, inputs.values(), views["do"]), strict=True):
            want = views[f"d{n}"]
            assert (got - want).abs().max() <= 1e-4 * want.abs().max(), n


@pytest.mark.parametrize("case", [CASE, BidirectionalGla(1, 35, 1, 2, 3, decay=-1.0)], ids=["norm", "decays"])
def test_gradcheck(case):
    inputs = [t.requires_grad_() for t in case.inputs(torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: bidirectional_gla_of_list(*t, **case.options()), inputs, fast_mode=True)


@pytest.mark.parametrize("norm", [False, True])
def test_opcheck(norm):
    q, k, v, gf, gb, *weight = tensors(CASE._replace(norm=norm)).values()
    arguments = (q, k, v, gf, gb, *(weight or [None]), 0.5, 16.0, 1e-6, torch.float32, True, "auto")
    torch.library.opcheck(torch.ops.mmvssm.bidirectional_gla.default, arguments)


def test_states_may_decay_to_nothing():
    inputs = tensors(BidirectionalGla(1, 40, 1, 3, 4, decay=-1.0))
    for gate in ("gf", "gb"):
        inputs[gate] = torch.full_like(inputs[gate], -1e30, requires_grad=True)
    out = bidirectional_gla(**inputs)
    own = 3**-0.5 * 2 * (inputs["q"] * inputs["k"]).sum(-1, keepdim=True) * inputs["v"]
    assert relative_error(out, own) < 1e-6
    grads = torch.autograd.grad(out.sum(), inputs.values())
    assert all(torch.isfinite(g).all() for g in grads)
    assert grads[3].count_nonzero() == grads[4].count_nonzero() == 0


def test_gates_without_effect_get_no_gradient():
    inputs = tensors(BidirectionalGla(1, 45, 2, 3, 4))
    out = bidirectional_gla(**inputs, gate_normalizer=16)
    dgf, dgb = torch.autograd.grad(out.square().sum(), (inputs["gf"], inputs["gb"]))
    assert dgf[:, 0].count_nonzero() == dgb[:, -1].count_nonzero() == 0
    assert dgf[:, 1:].all()
    assert dgb[:, :-1].all()


def test_directions_mirror_each_other():
    inputs = tensors()
    mirrored = {n: t if n == "norm_weight" else t.flip(1) for n, t in inputs.items()}
    mirrored["gf"], mirrored["gb"] = mirrored["gb"], mirrored["gf"]
    want = bidirectional_gla(**inputs, gate_normalizer=16)
    assert relative_error(bidirectional_gla(**mirrored, gate_normalizer=16).flip(1), want) < 1e-6


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gate_logits_and_norm_are_what_they_say(backend):
    inputs = tensors()
    weight = inputs.pop("norm_weight")
    got = bidirectional_gla(**inputs, gate_normalizer=4, norm_weight=weight, norm_eps=0.1, backend=backend)
    for gate in ("gf", "gb"):
        inputs[gate] = torch.nn.functional.logsigmoid(inputs[gate]) / 4
    want = torch.nn.functional.rms_norm(bidirectional_gla(**inputs, backend=backend), (4,), weight, 0.1)
    assert relative_error(got, want) < 1e-6


def test_a_merge_factor_in_the_scale_acts_through_eps():
    inputs = tensors()
    outs = [bidirectional_gla(**inputs, scale=scale, norm_eps=eps) for scale in (1, 0.25) for eps in (1e-12, 1.0)]
    assert relative_error(outs[0], outs[2]) < 1e-6
    assert relative_error(outs[1], outs[3]) > 1e-2


def test_views_of_a_projection():
    projected = torch.randn(2, 9, 2 * (3 + 3 + 4 + 3 + 3))
    views = [t.unflatten(-1, (2, -1)) for t in projected.split([6, 6, 8, 6, 6], dim=-1)]
    copies = [t.contiguous() for t in views]
    assert torch.equal(bidirectional_gla(*views, gate_normalizer=16), bidirectional_gla(*copies, gate_normalizer=16))


def test_output_dtype_and_small_values():
    inputs = {n: (t * 1e-3).half().detach() for n, t in tensors(CASE._replace(norm=False)).items()}
    assert bidirectional_gla(**inputs, gate_normalizer=16).dtype == torch.float16
    # Of order 1e-9, which float16 cannot hold; the norm sees the float32 sum.
    wide = bidirectional_gla(**inputs, gate_normalizer=16, out_dtype=torch.float32)
    assert wide.dtype == torch.float32
    normed = bidirectional_gla(**inputs, gate_normalizer=16, norm_weight=torch.ones(4), norm_eps=1e-30)
    assert relative_error(normed, torch.nn.functional.rms_norm(wide, (4,), eps=1e-30)) < 1e-3


def test_what_is_held_for_backward():
    def held(run):
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            run()
        return sum(sizes.values())

    inputs = tensors(BidirectionalGla(2, 50, 2, 3, 4))
    weight = torch.ones(4)
    size = sum(t.nbytes for t in inputs.values())
    assert held(lambda: bidirectional_gla(**inputs, gate_normalizer=16)) == size
    normed = inputs["v"].nbytes + inputs["v"][..., 0].nbytes + weight.nbytes
    assert held(lambda: bidirectional_gla(**inputs, gate_normalizer=16, norm_weight=weight)) == size + normed


class Mixer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4))

    def forward(self, q, k, v, gf, gb):
        return bidirectional_gla(q, k, v, gf, gb, gate_normalizer=16, norm_weight=self.weight) * 2


def test_export_and_compile_keep_the_operator_whole():
    model, inputs = Mixer(), tuple(t.detach() for t in tensors(CASE._replace(norm=False)).values())
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(model, inputs, dynamic_shapes={n: {1: length} for n in ("q", "k", "v", "gf", "gb")})
    assert "mmvssm.bidirectional_gla" in str(program.graph)
    other = tuple(t.detach() for t in tensors(CASE._replace(norm=False, length=35)).values())
    assert relative_error(program.module()(*other), model(*other)) < 1e-6
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(*inputs).square().sum(), model.weight)
    (want,) = torch.autograd.grad(model(*inputs).square().sum(), model.weight)
    assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_does_not_reach_inside(backend):
    inputs = tensors()
    want = bidirectional_gla(**inputs, gate_normalizer=16, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = bidirectional_gla(**inputs, gate_normalizer=16, backend=backend)
    assert torch.equal(got, want)


def test_flop_counter():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        bidirectional_gla(**tensors(), gate_normalizer=16)
    assert counter.get_total_flops() == 2 * 2 * 2 * (2 * 7 * 2 * 3 * 4)


def test_meta_and_empty():
    inputs = {n: t.detach().to("meta") for n, t in tensors(dtype=torch.bfloat16).items()}
    out = bidirectional_gla(**inputs, gate_normalizer=16)
    assert (out.shape, out.dtype) == ((2, 7, 2, 4), torch.bfloat16)
    inputs = {n: t if n == "norm_weight" else t[:0] for n, t in tensors().items()}
    assert bidirectional_gla(**inputs).shape == (0, 7, 2, 4)


BAD = {
    "q": (lambda t: t[0], r"q must have shape \(B, L, heads, K\), but its shape is \(7, 2, 3\)"),
    "k": (lambda t: t[:, :3], r"k must have shape \(2, 7, 2, 3\), but its shape is \(2, 3, 2, 3\)"),
    "v": (lambda t: t[..., :0], "v must have at least one value"),
    "gf": (lambda t: t.int(), "gf must be float16, bfloat16, float32 or float64, but it is torch.int32"),
    "gb": (lambda t: t.to("meta"), "gb must be on cpu like the first argument, but it is on meta"),
    "norm_weight": (lambda t: t[:1], r"norm_weight must have shape \(4\)"),
}
BAD_OPTIONS = {
    "norm_eps": (0.0, "norm_eps must be positive, but it is 0.0"),
    "gate_normalizer": (-16, "gate_normalizer must be positive, but it is -16"),
    "out_dtype": (torch.int8, "out_dtype must be float16, bfloat16, float32 or float64, but it is torch.int8"),
    "backend": ("cuda", "backend must be one of auto, triton, torch, reference, but it is 'cuda'"),
}


@pytest.mark.parametrize("name", [*BAD, *BAD_OPTIONS])
def test_bad_arguments(name):
    arguments = tensors()
    spoil, sentence = BAD.get(name) or BAD_OPTIONS[name]
    arguments[name] = spoil(arguments[name]) if name in BAD else spoil
    with pytest.raises((ValueError, TypeError), match=sentence):
        bidirectional_gla(**arguments)


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_nothing_to_attend_to(axis):
    arguments = {n: t.narrow(axis, 0, 0) for n, t in tensors(CASE._replace(norm=False)).items()}
    with pytest.raises(ValueError, match="q must have at least one"):
        bidirectional_gla(**arguments)


@pytest.mark.gpu
class TestOnGpu:
    """What the shared grids of test_gpu.py do not cover."""

    def views(self, length, dtype=torch.float16):
        widths = [3 * width for width in (32, 32, 64, 32, 32)]
        projected = torch.randn(2, length, sum(widths), device="cuda", dtype=dtype)
        return [t.unflatten(-1, (3, -1)).requires_grad_() for t in projected.split(widths, dim=-1)]

    @pytest.mark.parametrize("length", [40, 4096])
    def test_views_of_a_projection(self, length):
        views = self.views(length)
        copies = [t.detach().contiguous().requires_grad_() for t in views]
        outs = [bidirectional_gla(*t, gate_normalizer=16, backend="triton") for t in (views, copies)]
        assert torch.equal(*outs)
        upstream = torch.randn_like(outs[0])
        grads = [torch.autograd.grad(o, t, upstream) for o, t in zip(outs, (views, copies), strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

    def test_cuda_graph_capture(self):
        inputs = [t.detach() for t in self.views(196)]
        want = bidirectional_gla(*inputs, gate_normalizer=16)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = bidirectional_gla(*inputs, gate_normalizer=16)
        got.fill_(float("nan"))
        graph.replay()
        assert torch.equal(got, want)

    def test_one_kernel_serves_all_lengths(self):
        from mmvssm_kernels.bidirectional_gla.triton_fwd import bidirectional_gla_fwd_kernel as kernel

        compiled = set()
        for length in (1000, 1001, 1024, 3137):
            bidirectional_gla(*self.views(length), gate_normalizer=16, backend="triton")
            compiled.add(len(kernel.device_caches[torch.cuda.current_device()][0]))
        assert len(compiled) == 1

    @pytest.mark.parametrize("name", ["op_bigla.npz", "op_bigla_edge.npz"])
    def test_golden(self, name):
        for arrays in golden_cases(name):
            tensors = {n: torch.from_numpy(a.astype(np.float32)).cuda().requires_grad_() for n, a in arrays.items()}
            inputs = [tensors[n] for n in ("q", "k", "v", "gf", "gb")]
            out = bidirectional_gla(*(t.transpose(1, 2) for t in inputs), backend="triton").transpose(1, 2)
            assert (out - tensors["o_fw"] - tensors["o_bw"]).abs().max() < 2e-5
            grads = torch.autograd.grad(out, inputs, tensors["do"])
            for n, got in zip(("dq", "dk", "dv", "dgf", "dgb"), grads, strict=True):
                assert (got - tensors[n]).abs().max() <= 1e-4 * tensors[n].abs().max(), n
