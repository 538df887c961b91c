"""The pyramids of plain backbones: shapes, equations, training, bad input. Reference outputs: test_vim_golden.py."""

from itertools import pairwise

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from torch.nn import functional as F

from mmvssm.models import DeconvPyramid, SimpleFeaturePyramid
from mmvssm.models.layers import LayerNorm2d


def maps(count=4, width=8, size=(5, 7), batch=2):
    return [torch.randn(batch, width, *size) for _ in range(count)]


def grids(size, stride):
    """Grids of strides 4, 8, 16, 32 for a map of ``stride``: multiplied, or floor-divided down to one cell."""
    scale = [(stride // s, 1) if s <= stride else (1, s // stride) for s in (4, 8, 16, 32)]
    return [tuple(max(side * up // down, 1) for side in size) for up, down in scale]


@pytest.mark.parametrize("stride", [16, 8, 4])
@pytest.mark.parametrize("size", [(5, 7), (4, 4), (1, 1), (1, 9)])
@pytest.mark.parametrize("kind", [DeconvPyramid, SimpleFeaturePyramid])
def test_shapes(kind, size, stride):
    inputs = maps(4 if kind is DeconvPyramid else 1, size=size)
    neck = kind([8] * len(inputs), stride=stride).eval()
    outs = neck(inputs)
    expected = grids(size, stride)
    width = 8
    if kind is SimpleFeaturePyramid:
        width = 256
        expected.append(tuple(-(-side // 2) for side in expected[-1]))
    assert [tuple(out.shape) for out in outs] == [(2, width, *grid) for grid in expected]
    assert all(out.isfinite().all() and out.is_contiguous() for out in outs)


def test_deconvolution_pyramid_is_what_it_says():
    neck, (a, b, c, d) = DeconvPyramid([8, 8, 8, 8]).eval(), maps()
    first, norm, _, second = neck.levels[0]
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    x = F.conv_transpose2d(a, first.weight, first.bias, stride=2)
    x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-5)
    x = F.conv_transpose2d(F.gelu(x), second.weight, second.bias, stride=2)
    outs = neck((a, b, c, d))
    torch.testing.assert_close(outs[0], x)
    torch.testing.assert_close(outs[1], neck.levels[1][0](b))
    assert torch.equal(outs[2], c)
    assert torch.equal(outs[3], F.max_pool2d(d, 2))


def test_one_map_feeds_all_levels():
    (x,) = maps(1)
    one, four = DeconvPyramid(8).eval(), DeconvPyramid([8, 8, 8, 8]).eval()
    four.load_state_dict(one.state_dict())
    assert one.in_channels == [8]
    assert one.out_channels == four.out_channels == [8] * 4
    for a, b in zip(one([x]), four([x] * 4), strict=True):
        assert torch.equal(a, b)


def test_levels_of_different_widths():
    outs = DeconvPyramid([4, 8, 12, 16]).eval()([torch.randn(1, c, 4, 4) for c in (4, 8, 12, 16)])
    assert [out.shape[1] for out in outs] == [4, 8, 12, 16]


@pytest.mark.parametrize("num_outs", [4, 5, 6])
def test_further_levels_are_every_second_cell(num_outs):
    outs = SimpleFeaturePyramid(8, out_channels=16, num_outs=num_outs)(maps(1, size=(8, 8)))
    assert len(outs) == num_outs
    for finer, coarser in pairwise(outs[3:]):
        assert torch.equal(coarser, finer[:, :, ::2, ::2])


@pytest.mark.parametrize(
    "neck",
    [
        DeconvPyramid([8] * 4),
        DeconvPyramid([8] * 4, norm="LN"),
        SimpleFeaturePyramid(8, 16),
        SimpleFeaturePyramid(8, 16, norm="BN", stride=8),
    ],
)
def test_every_parameter_gets_a_gradient(neck):
    inputs = [x.requires_grad_() for x in maps(len(neck.in_channels))]
    sum((out * torch.randn_like(out)).sum() for out in neck(inputs)).backward()
    assert all(p.grad is not None and p.grad.any() for p in neck.parameters())
    assert all(x.grad.any() for x in inputs)


@pytest.mark.parametrize("kind", [DeconvPyramid, SimpleFeaturePyramid])
def test_bfloat16_autocast(kind):
    inputs = maps(4 if kind is DeconvPyramid else 1)
    neck = kind([8] * len(inputs)).eval()
    want = neck(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        outs = neck(inputs)
    for a, b in zip(outs, want, strict=True):
        assert (a.float() - b).norm() < 0.03 * b.norm() + 1e-6


def test_layer_norm_of_maps():
    norm, x = LayerNorm2d(8), torch.randn(2, 8, 3, 4)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    centred = x - x.mean(1, keepdim=True)
    want = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), want * norm.weight[:, None, None] + norm.bias[:, None, None])


@pytest.mark.parametrize("scope", ["mmengine", "mmdet", "mmseg"])
def test_found_under_any_scope(scope):
    with DefaultScope.overwrite_default_scope(scope):
        assert isinstance(MODELS.build(dict(type="mmvssm.DeconvPyramid", in_channels=8)), DeconvPyramid)
        pyramid = MODELS.build(dict(type="mmvssm.SimpleFeaturePyramid", in_channels=[8]))
        assert isinstance(pyramid, SimpleFeaturePyramid)


def test_norm_for_the_heads_of_the_libraries():
    from mmcv.cnn import ConvModule

    module = ConvModule(4, 8, 3, padding=1, norm_cfg=dict(type="mmvssm.LN2d"))
    assert isinstance(module.norm, LayerNorm2d)
    assert isinstance(module.norm, nn.LayerNorm)  # initialisation rules and weight decay go by it


@pytest.mark.parametrize(
    ("kind", "arguments", "sentence"),
    [
        (DeconvPyramid, dict(in_channels=[8, 8]), r"in_channels=\[8, 8\] must be the widths of 1 or 4 maps"),
        (DeconvPyramid, dict(in_channels=[8, 8, 8, 0]), "must hold positive integers"),
        (DeconvPyramid, dict(in_channels=8, stride=32), r"stride=32 must be .* one of \(4, 8, 16\)"),
        (DeconvPyramid, dict(in_channels=8, norm="GN"), "norm='GN' is unknown; choose one of 'SyncBN', 'BN', 'LN'"),
        (SimpleFeaturePyramid, dict(in_channels=[8, 8]), "must be the width of one map"),
        (SimpleFeaturePyramid, dict(in_channels=6), "must be divisible by 4"),
        (SimpleFeaturePyramid, dict(in_channels=8, num_outs=3), "num_outs=3 must be an integer of at least 4"),
        (SimpleFeaturePyramid, dict(in_channels=8, out_channels=0), "out_channels=0 must be a positive integer"),
        (SimpleFeaturePyramid, dict(in_channels=8, norm=None), "norm=None is unknown"),
    ],
)
def test_bad_arguments(kind, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        kind(**arguments)


def test_bad_maps():
    with pytest.raises(ValueError, match=r"C = \[8\], got shapes \[\(2, 8, 5, 7\), \(2, 8, 5, 7\)\]"):
        SimpleFeaturePyramid(8)(maps(2))
    with pytest.raises(ValueError, match=r"C = \[8, 8, 8, 8\], got shapes \[\(2, 6, 5, 7\)"):
        DeconvPyramid([8] * 4)(maps(4, width=6))
    with pytest.raises(ValueError, match=r"got shapes \[\(2, 8\)\]"):
        SimpleFeaturePyramid(8)([torch.zeros(2, 8)])
