"""ViG and ViG-H on a CUDA GPU: the CPU's values, half precision, sizes, CUDA graphs. Run with ``pytest -m gpu``."""

import copy

import pytest
import torch

from mmvssm.models import ViG, ViGH

pytestmark = pytest.mark.gpu

# Heads as in the published models.
SMALL = {
    "plain": (ViG, dict(embed_dims=128, depth=4, conv_act="silu", out_act="silu")),
    "pyramid": (ViGH, dict(embed_dims=32, depths=(1, 1, 2, 1))),
}


@pytest.fixture(autouse=True)
def no_tf32():
    """TF32 in products and convolutions would hide errors of the same size."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(params=SMALL)
def name(request):
    return request.param


def make(name):
    torch.manual_seed(0)
    family, arch = SMALL[name]
    net = family(arch, out_indices=(0, 1, 2, 3))
    with torch.no_grad():  # larger than at the start of training, so that the attention shows in the output
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return net


def run(net, x, dtype=None):
    """Outputs and parameter gradients of a weighted sum of the outputs, on the CPU."""
    with torch.autocast(x.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        outs = net(x)
    # Means, so that gradients of float16 runs stay in range without a loss scaler.
    sum(
        (out.float() * torch.linspace(-1, 1, out.numel(), device=x.device).view_as(out)).mean() for out in outs
    ).backward()
    return [out.detach().float().cpu() for out in outs], {k: p.grad.cpu() for k, p in net.named_parameters()}


@pytest.mark.parametrize("size", [(64, 96), (75, 107), (33, 200), (224, 224)])
def test_agrees_with_the_cpu(name, size):
    net, x = make(name), torch.randn(2, 3, *size)
    want, want_grads = run(net, x)
    got, got_grads = run(copy.deepcopy(net).cuda(), x.cuda())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for key, gradient in want_grads.items():
        assert (got_grads[key] - gradient).abs().max() < 1e-3 * gradient.abs().max() + 1e-8, key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name, dtype):
    net, x = make(name).cuda(), torch.randn(2, 3, 75, 107, device="cuda")
    want, _ = run(copy.deepcopy(net), x)
    got, grads = run(net, x, dtype)
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() < 0.05 * b.norm()
    assert all(g.isfinite().all() for g in grads.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", [ViG, ViGH])
def test_fresh_networks_train_in_half_precision(family, dtype):
    """As initialised, with the gradient scaler: finite losses that fall, and no step skipped after the first ones."""
    torch.manual_seed(0)
    net = family("tiny", out_indices=(-1,), drop_path_rate=0.0)
    net._dump_init_info = lambda *_: None  # mmengine's log of every parameter
    net.init_weights()
    net.cuda().train()
    head = torch.nn.Linear(net.out_channels[0], 10).cuda()
    x, labels = torch.randn(16, 3, 224, 224, device="cuda"), torch.arange(16, device="cuda") % 10
    # Without warm-up a rate of 1e-3 throws ViG-H off in float32 on a CPU, too.
    optimizer = torch.optim.AdamW([*net.parameters(), *head.parameters()], lr=2e-4)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    losses = []
    for _ in range(20):
        with torch.autocast("cuda", dtype):
            loss = torch.nn.functional.cross_entropy(head(net(x)[0].mean((2, 3))).float(), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert all(torch.isfinite(torch.tensor(losses)))
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.isfinite().all() for p in net.parameters())
    if dtype == torch.float16:
        assert scaler.get_scale() >= 2**12  # 65536 at the start; halved once for every skipped step


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(7, 7), (7, 640), (75, 107), (33, 200), (800, 1333)])
@pytest.mark.parametrize("family", [ViG, ViGH])
def test_sizes_are_finite(family, size, dtype):
    """One patch, rows of patches, odd sizes, and 66,800 tokens in the first stage of the pyramid."""
    net = family("tiny").cuda().eval()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        outs = net(torch.randn(1, 3, *size, device="cuda"))
    assert all(out.isfinite().all() for out in outs)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights(name, dtype):
    net, x = make(name).cuda().eval(), torch.randn(1, 3, 64, 96, device="cuda")
    for a, b in zip(copy.deepcopy(net).to(dtype)(x.to(dtype)), net(x), strict=True):
        assert a.dtype == dtype
        assert (a.float() - b).norm() < 0.08 * b.norm()


@torch.no_grad()
@pytest.mark.parametrize("size", [(224, 224), (160, 224)])
def test_cuda_graph(name, size):
    """Nothing waits for the GPU or depends on values, so that a whole pass can be captured and replayed."""
    net = make(name).cuda().eval()
    x = torch.randn(2, 3, *size, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.autocast("cuda", torch.float16, cache_enabled=False):
        for _ in range(2):
            net(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.autocast("cuda", torch.float16, cache_enabled=False), torch.cuda.graph(graph):
        captured = net(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    with torch.autocast("cuda", torch.float16, cache_enabled=False):
        want = net(x)
    for a, b in zip(captured, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
