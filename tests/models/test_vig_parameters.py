"""Parameters of ViG and ViG-H: initialisation, files, optimiser groups; arguments and images that are refused."""

import copy

import pytest
import torch
from mmengine.model import BaseModule
from torch import nn

from mmvssm.models import ViG, ViGH
from mmvssm.models.mixers import BidirectionalGLA

from .common import (
    STOCK_INIT,
    check_layer_depth,
    check_second_initialisation,
)
from .small_vig import SMALL, make


@pytest.fixture(params=SMALL)
def name(request):
    return request.param


# ---------------------------------------------------------------------- initialisation


class Model(BaseModule):
    """A model as the libraries build it: one init_cfg over everything."""

    def __init__(self, model_init_cfg, name, **kwargs):
        super().__init__(model_init_cfg)
        arch = dict(embed_dims=64, depth=3) if name == "plain" else dict(embed_dims=64, depths=(1, 2))
        self.backbone = (ViG if name == "plain" else ViGH)(arch, out_indices=(-1,), **kwargs)
        self.head = nn.Linear(64, 10)


def initialised(name, seed=0, **kwargs):
    torch.manual_seed(seed)
    model = Model(STOCK_INIT, name, **kwargs)
    with torch.no_grad():  # whatever a rule or a script has left in them
        for mixer in (m for m in model.modules() if isinstance(m, BidirectionalGLA)):
            for parameter in (mixer.conv.weight, mixer.in_proj.weight, mixer.decay_proj.weight, mixer.gate.bias):
                parameter.fill_(7)
    before = copy.deepcopy(model.state_dict())
    model.init_weights()
    return model, before


def bound(fan_in, fan_out):
    return 2**-2.5 * (6 / (fan_in + fan_out)) ** 0.5


@pytest.mark.parametrize("backbone_init", [None, STOCK_INIT])
def test_published_initialisation_survives_a_stock_init_cfg(name, backbone_init):
    model, before = initialised(name, init_cfg=backbone_init)
    mixers = [m for m in model.modules() if isinstance(m, BidirectionalGLA)]
    assert len(mixers) == 3
    for mixer in mixers:
        C = mixer.out_proj.in_features
        assert 0.9 * bound(9, 9 * C) < mixer.conv.weight.abs().max() <= bound(9, 9 * C)
        assert (mixer.gate.bias == 0).all()
        assert (mixer.decay_proj.bias == 0).all()
        parts = {
            "qkv": (mixer.in_proj.weight[: 2 * C], bound(C, 2 * C)),
            "g": (mixer.in_proj.weight[2 * C : 3 * C], bound(C, C)),
            "code": (mixer.in_proj.weight[3 * C :], bound(C, 16)),
            "decays": (mixer.decay_proj.weight, bound(16, C)),
            "out": (mixer.out_proj.weight, bound(C, C)),
        }
        for part, (weight, limit) in parts.items():
            if name == "plain":
                assert 0.95 * limit < weight.abs().max() <= limit, part
            else:
                assert weight.std().item() == pytest.approx(0.02, rel=0.1), part
        for norm in (mixer.g_norm, mixer.gate.norm):
            assert (norm.weight == 1).all()
    for key, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and not key.endswith("mixer.conv"):
            assert torch.equal(module.weight, before[f"{key}.weight"]), (
                "other convolutions keep the framework's default"
            )
        elif isinstance(module, nn.Linear) and ".mlp." in key:
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
    if name == "plain":
        assert torch.equal(model.backbone.pos_embed, before["backbone.pos_embed"])
        assert model.backbone.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)


def test_initialisation_is_deterministic(name):
    a, b, c = (initialised(name, seed)[0].state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(a[k], b[k]) for k in a)
    keys = [k for k in a if k.endswith(("in_proj.weight", "mixer.conv.weight", "pos_embed"))]
    assert len(keys) >= 6
    assert not any(torch.equal(a[k], c[k]) for k in keys)


def test_default_initialisation_of_the_plain_family_is_not_truncated():
    torch.manual_seed(0)
    net = ViG(dict(embed_dims=128, depth=2))
    net.init_weights()
    weight = net.blocks[1].mlp.fc1.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert weight.abs().max() > 0.075  # 3.75 standard deviations


def test_second_initialisation_changes_nothing(name):
    model, _ = initialised(name)
    check_second_initialisation(model)


def test_pretrained_file(tmp_path, name):
    net = make(name)
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "model.pth")
    init = dict(type="Pretrained", checkpoint=str(tmp_path / "model.pth"), prefix="backbone.")
    for init_cfg in (init, [*STOCK_INIT, init]):
        other = make(name, init_cfg=init_cfg)
        other.init_weights()
        assert all(torch.equal(v, net.state_dict()[k]) for k, v in other.state_dict().items())


# ---------------------------------------------------------------------- parameter groups


def test_no_weight_decay():
    assert make("plain").no_weight_decay() == {"pos_embed"}
    assert make("pyramid").no_weight_decay() == set()


@pytest.mark.parametrize(
    ("family", "parameter", "depth"),
    [
        (ViG, "backbone.patch_embed.conv1.weight", 0),
        (ViG, "backbone.pos_embed", 0),
        (ViG, "backbone.blocks.0.norm1.weight", 1),
        (ViG, "backbone.blocks.11.mixer.gate.bias", 12),
        (ViG, "backbone.norm.weight", 13),
        (ViG, "neck.levels.0.0.weight", 13),
        (ViGH, "backbone.patch_embed.conv1.weight", 0),
        (ViGH, "backbone.stages.0.blocks.1.mixer.gate.bias", 2),
        (ViGH, "backbone.stages.1.downsample.conv.weight", 2),
        (ViGH, "backbone.stages.3.blocks.1.norm2.weight", 11),
        (ViGH, "backbone.norm3.weight", 12),
        (ViGH, "head.fc.weight", 12),
    ],
)
def test_layer_depth(family, parameter, depth):
    with torch.device("meta"):
        net = family("tiny")
    depths = 14 if family is ViG else 13
    check_layer_depth(net, parameter, (depth, depths))


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("family", "arguments", "error", "sentence"),
    [
        (ViG, dict(arch="vig-t"), ValueError, "ViG has no arch 'vig-t'; known: tiny, small, base, or a dict"),
        (ViGH, dict(arch="vig-h-t"), ValueError, "ViGH has no arch 'vig-h-t'; known: tiny, small, base, or a dict"),
        (ViG, dict(arch=3), TypeError, "arch must be a name or a dict, got int"),
        (ViG, dict(arch=dict(embed_dim=16)), ValueError, "unknown keys 'embed_dim'; known keys: embed_dims, depth"),
        (ViGH, dict(arch=dict(embed_dims=64)), ValueError, "lacks the keys 'depths'"),
        (ViGH, dict(arch=dict(embed_dims=(32, 64), depths=(1,))), ValueError, "2 widths but 1 depths"),
        (ViG, dict(arch=dict(embed_dims=100)), ValueError, "embed_dims=100 must be a multiple of head_dims=64"),
        (ViG, dict(arch=dict(embed_dims=64.0)), ValueError, "embed_dims=64.0 must be a positive integer"),
        (ViG, dict(arch=dict(embed_dims=63, head_dims=21)), ValueError, "head_dims=21 must be an even positive number"),
        (ViG, dict(arch=dict(embed_dims=64, depth=0)), ValueError, "depth=0 must be a positive integer"),
        (ViG, dict(arch=dict(embed_dims=64, mlp_multiple=0)), ValueError, "mlp_multiple=0 must be a positive integer"),
        (ViG, dict(arch=dict(embed_dims=64, conv_act="swish")), ValueError, "conv_act='swish' is unknown; choose one"),
        (ViG, dict(arch=dict(embed_dims=64, out_act="swish")), ValueError, "out_act='swish' is unknown"),
        (ViG, dict(use_out_gate=True), TypeError, "no argument 'use_out_gate'; known.*eval_merge"),
        (ViGH, dict(eval_merge=0.5), TypeError, "no argument 'eval_merge'; known"),
        (ViG, dict(eval_merge=0), ValueError, "eval_merge=0 must be a positive number"),
        (ViG, dict(img_size=None), ValueError, "img_size=None must be at least 7"),
        (ViG, dict(img_size=(6, 64)), ValueError, r"img_size=\(6, 64\) must be at least 7"),
        (ViG, dict(out_indices=(0, 12)), ValueError, r"out_indices=\(0, 12\) must hold stages in -12..11"),
        (ViG, dict(frozen_stages=13), ValueError, "frozen_stages=13 must be in -1..12"),
        (ViGH, dict(frozen_stages=5), ValueError, "frozen_stages=5 must be in -1..4"),
        (ViGH, dict(drop_path_rate=1.5), ValueError, r"drop_path_rate=1.5 must be in \[0, 1\)"),
        (ViG, dict(drop_path_rate="0.1"), TypeError, "drop_path_rate='0.1' must be a number"),
    ],
)
def test_bad_arguments(family, arguments, error, sentence):
    with pytest.raises(error, match=sentence), torch.device("meta"):
        family(**arguments)


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        ("pyramid", (3, 32, 32), r"shape \(B, 3, H, W\), got \(3, 32, 32\)"),
        ("pyramid", (1, 4, 32, 32), "in_channels=3, got an input of 4 channels"),
        ("pyramid", (1, 3, 0, 32), "at least 1 x 1 pixels, got 0 x 32"),
        ("plain", (1, 3, 6, 32), "at least 7 x 7 pixels, got 6 x 32"),
    ],
)
def test_bad_images(name, shape, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(name)(torch.zeros(shape))


def test_integer_images(name):
    with pytest.raises(ValueError, match=r"floating-point images, got torch\.uint8"):
        make(name)(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
