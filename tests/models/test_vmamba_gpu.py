"""VMamba on a CUDA GPU: agreement with the CPU, half precision, odd sizes. Run with ``pytest -m gpu``."""

import copy

import pytest
import torch

from mmvssm.models import VMamba

pytestmark = pytest.mark.gpu

SMALL = {
    "v2": dict(embed_dims=32, depths=(1, 1, 2, 1)),
    "gated": dict(embed_dims=32, depths=(1, 1, 2, 1), ssm_ratio=2.0, gated=True, d_state=2),
    "v0": {**VMamba.arch_zoo["v0-tiny"], "embed_dims": 32, "depths": (1, 1, 2, 1), "drop_path_rate": 0.0},
}


@pytest.fixture(autouse=True)
def no_tf32():
    """TF32 in products and convolutions would hide errors of the same size."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def make(name):
    torch.manual_seed(0)
    return VMamba(SMALL[name])


def run(net, x, dtype=None):
    """Outputs and parameter gradients of a weighted sum of the outputs, on the CPU."""
    with torch.autocast(x.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        outs = net(x)
    # Means, so that gradients of float16 runs stay in range without a loss scaler.
    sum(
        (out.float() * torch.linspace(-1, 1, out.numel(), device=x.device).view_as(out)).mean() for out in outs
    ).backward()
    return [out.detach().float().cpu() for out in outs], {k: p.grad.cpu() for k, p in net.named_parameters()}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(64, 96), (75, 107), (33, 200)])
def test_agrees_with_the_cpu(name, size):
    net, x = make(name), torch.randn(2, 3, *size)
    want, want_grads = run(net, x)
    got, got_grads = run(copy.deepcopy(net).cuda(), x.cuda())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for key, gradient in want_grads.items():
        assert (got_grads[key] - gradient).abs().max() < 1e-3 * gradient.abs().max() + 1e-8, key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SMALL)
def test_autocast(name, dtype):
    net, x = make(name).cuda(), torch.randn(2, 3, 75, 107, device="cuda")
    want, _ = run(copy.deepcopy(net), x)
    got, grads = run(net, x, dtype)
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() < 0.03 * b.norm()
    assert all(g.isfinite().all() for g in grads.values())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(1, 1), (1, 640), (75, 107), (33, 200)])
def test_odd_sizes_are_finite(size, dtype):
    net = VMamba("tiny-s1l8").cuda().eval()
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
