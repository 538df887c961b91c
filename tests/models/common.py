"""Inputs and checks that the tests of all backbones share."""

import copy

import torch

STOCK_INIT = [
    dict(type="TruncNormal", layer="Linear", std=0.02, bias=0.0),
    dict(type="Constant", layer="LayerNorm", val=1.0, bias=0.0),
]


@torch.no_grad()
def enlarge(net):
    """Parameters larger than at the start of training, so that every branch shows in the output. Returns ``net``."""
    for parameter in net.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return net


def image(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def total(outs):
    return sum((out * image(*out.shape, seed=i)).sum() for i, out in enumerate(outs))


def check_batch_independence(net):
    """An image gives the same alone and among others."""
    x = image(3, 3, 40, 56)
    for together, alone in zip(net(x), net(x[1:2]), strict=True):
        torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


def check_checkpointing(make, size=(32, 48)):
    """``with_cp`` changes no output, gradient or buffer. ``make`` takes keyword arguments; returns both networks."""
    nets = [make(drop_path_rate=0.5, with_cp=with_cp).train() for with_cp in (False, True)]
    results = []
    for net in nets:
        x = image(4, 3, *size).requires_grad_()
        torch.manual_seed(7)  # the same branches are dropped
        outs = net(x)
        total(outs).backward()
        results.append((outs, x.grad, [p.grad for p in net.parameters()], list(net.buffers())))
    torch.testing.assert_close(results[0], results[1])
    return nets


def check_checkpointing_stores_less(make, side=64):
    def stored(with_cp):
        sizes = []
        net = make(with_cp=with_cp).train()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            net(image(2, 3, side, side))
        return sum(sizes)

    assert stored(True) < 0.7 * stored(False)


def check_state_dict_round_trip(net, other, folder):
    """``other``, with different weights, computes what ``net`` does once it has its state dict."""
    torch.save(net.state_dict(), folder / "net.pth")
    other.load_state_dict(torch.load(folder / "net.pth", weights_only=True), strict=True)
    x = image(1, 3, 32, 48)
    for a, b in zip(net(x), other(x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def check_no_gradients_behind(net, later):
    """Parts named ``later``, behind the last output, are kept but ask for no gradients; the others get theirs."""
    total(net(image(2, 3, 32, 48))).backward()
    asking = {k: p for k, p in net.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in asking.values())
    assert not any(k.startswith(later) for k in asking)
    assert all(any(k.startswith(part) for k in net.state_dict()) for part in later)


def check_gradients_of_unfrozen(net, side=32):
    """Just what is not frozen gets a gradient."""
    total(net(image(1, 3, side, side))).backward()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())


def check_second_initialisation(model):
    """``init_weights`` of an initialised model changes nothing."""
    before = copy.deepcopy(model.state_dict())
    model.init_weights()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def check_layer_depth(net, parameter, depths):
    """Depth and number of depths of a detector's parameter, and of the same one of the backbone alone."""
    assert net.get_layer_depth(parameter, "backbone.") == depths
    if parameter.startswith("backbone."):
        assert net.get_layer_depth(parameter.removeprefix("backbone.")) == depths
