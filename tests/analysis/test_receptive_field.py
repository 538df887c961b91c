"""Effective receptive fields: of layers whose field is known, and of every family."""

import pytest
import torch
from torch import nn

from mmvssm.analysis import ReceptiveField, effective_receptive_field

from .micro import MICRO


class Maps(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return (self.layers(x),)


def mean_filter(size, stride=1):
    conv = nn.Conv2d(3, 1, size, stride, padding=size // 2, bias=False)
    nn.init.constant_(conv.weight, 1.0)
    return conv


def test_field_of_a_convolution():
    field = effective_receptive_field(Maps(mean_filter(5)), [torch.rand(2, 3, 20, 31), torch.rand(1, 3, 20, 31)])
    expected = torch.zeros(20, 31, dtype=torch.float64)
    expected[8:13, 13:18] = 3.0  # colours
    torch.testing.assert_close(field.contribution, expected)
    assert field.centre == (10, 15)
    assert [field.side(share) for share in (0.03, 0.3, 0.99)] == [1, 3, 5]
    assert field.summary((0.3, 0.99)) == {
        "0.3": dict(side=3, side_share=3 / 31, area_share=9 / 620),
        "0.99": dict(side=5, side_share=5 / 31, area_share=25 / 620),
    }


def test_two_convolutions_look_more_at_the_middle():
    field = effective_receptive_field(Maps(mean_filter(3), mean_filter_of_one()), [torch.rand(1, 3, 15, 15)])
    row = field.contribution[7, 5:10] / field.contribution[7, 7]
    torch.testing.assert_close(row, torch.tensor([1, 2, 3, 2, 1], dtype=torch.float64) / 3)
    assert (field.contribution > 0).sum() == 25


def mean_filter_of_one():
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    nn.init.constant_(conv.weight, 1.0)
    return conv


def test_centre_is_that_of_the_cell():
    net = Maps(nn.Conv2d(3, 4, 8, 8))
    assert effective_receptive_field(net, [torch.rand(1, 3, 64, 40)]).centre == (36, 20)  # of 8 and 5 rows
    field = effective_receptive_field(net, [torch.rand(8, 3, 64, 40)], "abs")
    assert (field.contribution > 0).nonzero().aminmax(dim=0)[0].tolist() == [32, 16]
    assert field.side(0.99) in (7, 9)


def test_rectification():
    conv = nn.Conv2d(3, 1, (1, 3), padding=(0, 1), bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([-1.0, 4.0, 2.0]).expand(3, -1)[None, :, None])
    images = [torch.ones(1, 3, 5, 7)]
    assert effective_receptive_field(Maps(conv), images).contribution[2, 2:5].tolist() == [0, 12, 6]
    assert effective_receptive_field(Maps(conv), images, "abs").contribution[2, 2:5].tolist() == [3, 12, 6]


def test_square_beyond_the_border():
    contribution = torch.ones(4, 40, dtype=torch.float64)
    field = ReceptiveField(contribution, (2, 20))
    assert field.side(0.5) == 21
    assert field.summary((0.5,))["0.5"]["area_share"] == 21 / 40
    assert field.summary((0.99,))["0.99"]["side_share"] == 1.0
    assert ReceptiveField(torch.zeros(4, 4), (2, 2)).side(0.5) == 0


@pytest.mark.parametrize("family", MICRO)
def test_families(family):
    """Behind an output norm, too, the gradient is more than rounding; parameters get none."""
    torch.manual_seed(0)
    net = MICRO[family]()
    net.init_weights()
    net.eval()
    field = effective_receptive_field(net, [torch.randn(2, 3, 64, 64)])
    assert field.contribution.shape == (64, 64)
    y, x = field.centre
    near, far = field.contribution[y - 4 : y + 4, x - 4 : x + 4].mean(), field.contribution[:8, :8].mean()
    assert near > far
    assert near > 1e-6
    assert all(p.grad is None for p in net.parameters())


def test_bad_arguments():
    net = Maps(mean_filter(3))
    with pytest.raises(ValueError, match="rectify must be one of 'relu', 'abs', got 'square'"):
        effective_receptive_field(net, [], "square")
    with pytest.raises(ValueError, match="no images"):
        effective_receptive_field(net, [])
    with pytest.raises(ValueError, match="images must have one size"):
        effective_receptive_field(net, [torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 9)])
    with pytest.raises(ValueError, match="share must be between 0 and 1, got 1"):
        ReceptiveField(torch.ones(3, 3), (1, 1)).side(1)
