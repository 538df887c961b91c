"""Vim on a CUDA GPU: agreement with the CPU, half precision, odd sizes, CUDA graphs. Run with ``pytest -m gpu``."""

import copy

import pytest
import torch

from mmvssm.models import Vim

pytestmark = pytest.mark.gpu

SMALL = dict(embed_dims=64, depth=4, patch_size=8)
VARIANTS = {
    "dense": dict(with_cls_token=False, out_indices=(0, 3)),
    "class token": dict(out_type="cls_token"),
    "rope": dict(with_cls_token=False, rope=True, rope_residual=True, out_norm=None),
    "mixer outputs": dict(with_cls_token=False, feature="mixer", out_norm="each", residual_in_fp32=False),
    "shared": dict(directions="shared", norm="layer"),
}


@pytest.fixture(autouse=True)
def no_tf32():
    """TF32 in products and convolutions would hide errors of the same size."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def make(name, **kwargs) -> Vim:
    torch.manual_seed(0)
    return Vim(SMALL, img_size=64, **VARIANTS[name], **kwargs)


def run(net, x, dtype=None):
    """Outputs and parameter gradients of a weighted sum of the outputs, on the CPU."""
    with torch.autocast(x.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        outs = net(x)
    # Means, so that gradients of float16 runs stay in range without a loss scaler.
    sum(
        (out.float() * torch.linspace(-1, 1, out.numel(), device=x.device).view_as(out)).mean() for out in outs
    ).backward()
    return [out.detach().float().cpu() for out in outs], {k: p.grad.cpu() for k, p in net.named_parameters()}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("size", [(64, 64), (75, 107), (33, 200)])
def test_agrees_with_the_cpu(name, size):
    net, x = make(name), torch.randn(2, 3, *size)
    want, want_grads = run(net, x)
    got, got_grads = run(copy.deepcopy(net).cuda(), x.cuda())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for key, gradient in want_grads.items():
        assert (got_grads[key] - gradient).abs().max() < 1e-3 * gradient.abs().max() + 1e-8, key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", VARIANTS)
def test_autocast(name, dtype):
    net, x = make(name).cuda(), torch.randn(2, 3, 75, 107, device="cuda")
    want, _ = run(copy.deepcopy(net), x)
    got, grads = run(net, x, dtype)
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() < 0.03 * b.norm()
    assert all(g.isfinite().all() for g in grads.values())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", ["tiny", "small-plus"])
@pytest.mark.parametrize("size", [(1, 1), (1, 640), (75, 107), (1024, 2048)])
def test_odd_and_large_sizes_are_finite(size, arch, dtype):
    net = Vim(arch, with_cls_token=False).cuda().eval()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        outs = net(torch.randn(1, 3, *size, device="cuda"))
    assert all(out.isfinite().all() for out in outs)


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights(name, dtype):
    net, x = make(name).cuda().eval(), torch.randn(1, 3, 64, 96, device="cuda")
    for a, b in zip(copy.deepcopy(net).to(dtype)(x.to(dtype)), net(x), strict=True):
        assert a.dtype == dtype
        assert (a.float() - b).norm() < 0.05 * b.norm()


@torch.no_grad()
@pytest.mark.parametrize("name", ["class token", "rope"])
@pytest.mark.parametrize("warm", [True, False], ids=["warmed up at this size", "not"])
def test_inference_in_a_cuda_graph(name, warm):
    """The graph keeps giving what eager mode gives, also after other sizes have been seen."""
    net = make(name).cuda().eval()
    x = torch.randn(2, 3, 40, 72, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.autocast("cuda", torch.float16):
        for _ in range(3):
            net(x if warm else torch.randn(2, 3, 64, 64, device="cuda"))
    torch.cuda.current_stream().wait_stream(stream)
    if not warm:  # kernels are compiled per shape; what is kept for a grid may still be made while capturing
        with torch.autocast("cuda", torch.float16):
            make(name).cuda().eval()(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.autocast("cuda", torch.float16):
        captured = net(x)
    for size in range(48, 48 + 8 * 40, 8):
        net(torch.randn(1, 3, size, 64, device="cuda"))
    x.copy_(torch.randn_like(x))
    graph.replay()
    with torch.autocast("cuda", torch.float16):
        for a, b in zip(captured, net(x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_training_step_in_a_cuda_graph():
    net = make("dense", drop_path_rate=0.1).cuda().train()
    x = torch.randn(2, 3, 64, 64, device="cuda")

    def step():
        net.zero_grad(set_to_none=False)
        with torch.autocast("cuda", torch.float16):
            outs = net(x)
        sum(out.float().square().mean() for out in outs).backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    assert any(p.grad.any() for p in net.parameters())
