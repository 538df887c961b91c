"""MambaVision on a CUDA GPU: agreement with the CPU, half precision, odd sizes, graphs. Run with ``pytest -m gpu``."""

import copy

import pytest
import torch

from mmvssm.models import MambaVision

pytestmark = pytest.mark.gpu

SMALL = {
    "plain": dict(embed_dims=32, stem_dims=16, depths=(1, 1, 2, 2), num_heads=(4, 4), window_size=(4, 3)),
    # As in the large variants: widths, step ranks and heads that are multiples of 2 or 1 only.
    "awkward": dict(embed_dims=28, depths=(1, 1, 3, 2), num_heads=(4, 8), window_size=(7, 5), layer_scale=0.5),
}


@pytest.fixture(autouse=True)
def no_tf32():
    """TF32 in products and convolutions would hide errors of the same size."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def make(name, **kwargs):
    torch.manual_seed(0)
    return MambaVision(SMALL[name], **kwargs)


def run(net, x, dtype=None):
    """Outputs and parameter gradients of a weighted sum of the outputs, on the CPU."""
    with torch.autocast(x.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        outs = net(x)
    # Means, so that gradients of float16 runs stay in range without a loss scaler.
    sum(
        (out.float() * torch.linspace(-1, 1, out.numel(), device=x.device).view_as(out)).mean() for out in outs
    ).backward()
    return [out.detach().float().cpu() for out in outs], {k: p.grad.cpu() for k, p in net.named_parameters()}


def is_cancelled(key):
    """Whether the parameter is the bias of a convolution that a batch norm in training mode follows."""
    return key.endswith(("conv1.bias", "conv2.bias"))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("fit", [False, True])
@pytest.mark.parametrize("size", [(64, 96), (75, 107), (33, 200)])
def test_agrees_with_the_cpu(name, size, fit):
    net, x = make(name, norm_eval=True, fit_windows=fit), torch.randn(2, 3, *size)
    want, want_grads = run(net, x)
    got, got_grads = run(copy.deepcopy(net).cuda(), x.cuda())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    # The gradients of biases in front of batch norms vanish: all that is left of them is float32's rounding of sums.
    rounding = 1e-5 * max(gradient.abs().max() for gradient in want_grads.values())
    for key, gradient in want_grads.items():
        limit = rounding if is_cancelled(key) else 1e-3 * gradient.abs().max() + 1e-8
        assert (got_grads[key] - gradient).abs().max() < limit, key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SMALL)
def test_autocast(name, dtype):
    net, x = make(name, norm_eval=True).cuda(), torch.randn(2, 3, 75, 107, device="cuda")
    want, _ = run(copy.deepcopy(net), x)
    got, grads = run(net, x, dtype)
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() < 0.03 * b.norm()
    assert all(g.isfinite().all() for g in grads.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_batch_norms_under_autocast(dtype):
    net = make("plain").cuda().to(memory_format=torch.channels_last).train()
    _, grads = run(net, torch.randn(4, 3, 64, 96, device="cuda"), dtype)
    assert all(g.isfinite().all() for g in grads.values())
    assert all(t.isfinite().all() for t in net.buffers())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("windows", [None, "map", (112, 56)])
@pytest.mark.parametrize("size", [(1, 1), (1, 640), (75, 107), (33, 200)])
def test_odd_sizes_are_finite(size, windows, dtype):
    net = MambaVision("t", window_size=windows).cuda().eval()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        outs = net(torch.randn(1, 3, *size, device="cuda"))
    assert all(out.isfinite().all() for out in outs)


@torch.no_grad()
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights(name, dtype):
    net, x = make(name).cuda().eval(), torch.randn(1, 3, 64, 96, device="cuda")
    for a, b in zip(copy.deepcopy(net).to(dtype)(x.to(dtype)), net(x), strict=True):
        assert a.dtype == dtype
        assert (a.float() - b).norm() < 0.05 * b.norm()


@torch.no_grad()
@pytest.mark.parametrize("arch", ["t", "l"])
def test_head_widths_of_the_published_variants(arch):
    """Attention heads of 40 and 49 channels: what torch picks for half precision agrees with float32."""
    net = MambaVision(arch, out_indices=(3,)).cuda().eval().fuse_batch_norms()
    x = torch.randn(2, 3, 224, 224, device="cuda")
    want = net(x)[0]
    with torch.autocast("cuda", torch.float16):
        got = net(x)[0]
    assert (got - want).norm() < 0.03 * want.norm()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fused_batch_norms(dtype):
    net, x = make("plain").cuda().eval(), torch.randn(2, 3, 64, 96, device="cuda")
    fused = copy.deepcopy(net).fuse_batch_norms()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        for a, b in zip(fused(x), net(x), strict=True):
            assert (a - b).norm() < (1e-4 if dtype == torch.float32 else 0.01) * b.norm()


@torch.no_grad()
def test_cuda_graph():
    """No synchronisation and nothing that depends on values: a captured graph gives what the network gives."""
    net = make("plain").cuda().eval().fuse_batch_norms()
    x, other = (torch.randn(2, 3, 64, 96, device="cuda") for _ in range(2))
    with torch.autocast("cuda", torch.float16, cache_enabled=False):
        want = [out.clone() for out in net(other)]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                net(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = net(x)
    x.copy_(other)
    graph.replay()
    for a, b in zip(outs, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
