"""Orders of the scans and weights of the tokens, checked against what the operators compute."""

import pytest
import torch

from mmvssm.analysis.scan_attention import activation_maps, scan_weights
from mmvssm.analysis.scan_orders import scan_orders
from mmvssm.models import Vim, VMamba
from mmvssm.models.mixers import SS2D
from mmvssm_kernels import bidirectional_gla, selective_scan_2d

from .micro import MICRO

H, W = 3, 4


def arguments_of(mixer):
    return mixer.x_proj_weight, mixer.dt_proj_weight, mixer.dt_proj_bias, mixer.A_log, mixer.D


def seen_by(order, cell):
    """Cells that a direction visits up to a cell."""
    (sequence,) = (s for s in order.sequences if cell in s)
    return {c for c in sequence[: sequence.index(cell) + 1] if c >= 0}


@pytest.mark.parametrize("direction", range(4))
def test_orders_of_vmamba_are_those_of_the_operator(direction):
    """With the outputs of the other directions switched off, a cell depends on those visited before, and only those."""
    torch.manual_seed(0)
    mixer = SS2D(4, d_state=1).double()
    with torch.no_grad():
        mixer.D.zero_()
        mixer.x_proj_weight[[k for k in range(4) if k != direction], -1] = 0.0  # C
    x = torch.randn(1, 4, H, W, dtype=torch.double, requires_grad=True)
    y = selective_scan_2d(x, *arguments_of(mixer))
    order = scan_orders("vmamba", H, W)[direction]
    for cell in range(H * W):
        (gradient,) = torch.autograd.grad(y[0, :, cell // W, cell % W].sum(), x, retain_graph=True)
        seen = gradient[0].abs().sum(0).flatten().nonzero().flatten().tolist()
        assert set(seen) == seen_by(order, cell)


@pytest.mark.parametrize("family", ["vig", "vigh"])
@pytest.mark.parametrize("direction", [0, 1])
def test_orders_of_vig_are_those_of_the_operator(family, direction):
    """A strong decay in one direction leaves a cell what it sees in the other."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, H * W, 1, 2, dtype=torch.double)
    v = torch.randn(1, H * W, 1, 3, dtype=torch.double, requires_grad=True)
    gates = [torch.full_like(q, -1e3 if d != direction else -0.1) for d in (0, 1)]
    y = bidirectional_gla(q, k, v, *gates)
    order = scan_orders(family, H, W)[direction]
    for cell in range(H * W):
        (gradient,) = torch.autograd.grad(y[0, cell].sum(), v, retain_graph=True)
        assert set(gradient.abs().sum((0, 2, 3)).nonzero().flatten().tolist()) == seen_by(order, cell)


def test_order_of_vim_is_that_of_the_network():
    """In a network that scans forward, a patch depends on those before, the convolution included."""
    torch.manual_seed(0)
    arch = dict(embed_dims=16, depth=1, d_state=2)
    net = Vim(arch, img_size=48, directions="forward", with_cls_token=False, out_indices=(0,)).double().eval()
    x = torch.randn(1, 3, 48, 64, dtype=torch.double, requires_grad=True)
    (features,) = net(x)
    order = scan_orders("vim", H, W, cls_token=None)[0]
    for cell in (0, 5, 11):
        (gradient,) = torch.autograd.grad(features[0, 0, cell // W, cell % W], x, retain_graph=True)
        patches = torch.nn.functional.avg_pool2d(gradient.abs().sum(1, keepdim=True), 16)
        assert set(patches.flatten().nonzero().flatten().tolist()) == seen_by(order, cell)


def test_class_tokens_of_vim():
    forward, backward = scan_orders("vim", H, W)
    assert forward.sequences[0] == (*range(6), -2, *range(6, 12))
    assert backward.sequences[0] == forward.sequences[0][::-1]
    assert scan_orders("vim", 1, 3, cls_token="double")[0].sequences == ((-2, 0, 1, 2, -2),)
    assert scan_orders("vim", 1, 3, cls_token="head")[0].sequences == ((-2, 0, 1, 2),)


def test_windows_of_mambavision():
    (order,) = scan_orders("mambavision", 3, 5, window_size=2)
    assert order.window_width == 2
    assert order.sequences == (
        (0, 1, 5, 6), (2, 3, 7, 8), (4, -1, 9, -1), (10, 11, -1, -1), (12, 13, -1, -1), (14, -1, -1, -1),
    )  # fmt: skip
    (order,) = scan_orders("mambavision", 3, 5, window_size=4, fit_windows=True)
    assert [len(s) for s in order.sequences] == [9, 9]
    (order,) = scan_orders("mambavision", 3, 5, window_size=None)
    assert order.sequences == (tuple(range(15)),)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("swin", 3, 4), "family must be one of 'vmamba'"),
        (("vim", 0, 4), "a grid of 0 x 4"),
        (("mambavision", 3, 4, 0), "windows of 0"),
        (("vim", 3, 4, 2, False, "tail"), "cls_token must be"),
    ],
)
def test_bad_orders(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        scan_orders(*arguments)


@pytest.mark.parametrize(("state", "ratio"), [(1, 1.0), (3, 2.0)])
def test_weights_add_up_to_the_output_of_the_operator(state, ratio):
    torch.manual_seed(0)
    mixer = SS2D(4, ratio, d_state=state).double()
    u = torch.randn(int(4 * ratio), H, W, dtype=torch.double)
    y = selective_scan_2d(u[None], *arguments_of(mixer))[0]
    skip = mixer.D.unflatten(0, (4, -1)).sum(0)
    orders = scan_orders("vmamba", H, W)
    for cell in (0, 6, 11):
        row, column = divmod(cell, W)
        weights = scan_weights(mixer, u, (row, column))
        torch.testing.assert_close((weights * u).sum((0, 2, 3)) + skip * u[:, row, column], y[:, row, column])
        for order, found in zip(orders, weights.abs().sum(1).flatten(1), strict=True):
            assert set(found.nonzero().flatten().tolist()) == seen_by(order, cell)


def test_maps_of_a_network():
    torch.manual_seed(0)
    net = VMamba(dict(embed_dims=8, depths=(2, 1)), out_indices=(0, 1)).eval()
    image = torch.randn(1, 3, 32, 48)
    maps = activation_maps(net, image, 0, (2, 5))
    assert maps.shape == (4, 8, 12)
    assert (maps[:, 2, 5] > 0).all()
    assert maps[0, 3:].abs().max() == maps[2, :2].abs().max() == 0
    assert not torch.equal(maps, activation_maps(net, image, 0, (2, 5), block=0))
    assert not net.stages[0].blocks[0].mixer.act._forward_hooks


def test_bad_maps():
    net = VMamba(dict(embed_dims=8, depths=(1, 1)), out_indices=(1,)).eval()
    image = torch.zeros(1, 3, 16, 16)
    for arguments, sentence in (
        ((net, image, 2, (0, 0)), "stage must be one of the 2 stages of VMamba, got 2"),
        ((net, image, 0, (0, 4)), r"row and column of the 4 x 4 map, got \(0, 4\)"),
        ((net, image, 0, (0, 0), 1), "stage 0 has 1 blocks, there is no block 1"),
        ((MICRO["vigh"](), image, 0, (0, 0)), "made for VMamba, and ViGH is none"),
        ((MICRO["vim"](), image, 0, (0, 0)), "Vim"),
    ):
        with pytest.raises(ValueError, match=sentence):
            activation_maps(*arguments)
