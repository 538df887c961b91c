"""Vim's parameters: initialisation, files, groups for the optimiser; arguments and images that are refused."""

import copy
import math

import pytest
import torch
from mmengine.model import BaseModule
from torch import nn

from mmvssm.models import Vim
from mmvssm.models.mixers import BidirectionalMamba

from .common import (
    STOCK_INIT,
    check_layer_depth,
    check_second_initialisation,
)
from .small_vim import SMALL, VARIANTS, make


@pytest.fixture(params=VARIANTS)
def name(request):
    return request.param


# ---------------------------------------------------------------------- initialisation


class Model(BaseModule):
    """A model as the libraries build it: one init_cfg over everything."""

    def __init__(self, model_init_cfg, **kwargs):
        super().__init__(model_init_cfg)
        self.backbone = Vim(dict(embed_dims=32, depth=3, patch_size=8, d_state=4), img_size=32, **kwargs)
        self.head = nn.Linear(32, 10)


def initialised(model_init_cfg=STOCK_INIT, seed=0, **kwargs):
    torch.manual_seed(seed)
    model = Model(model_init_cfg, **kwargs)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():  # whatever a rule or a script has left in them
        for name, parameter in model.named_parameters():
            if "_scan." in name:
                parameter.fill_(7)
    model.init_weights()
    return model, before


@pytest.mark.parametrize("model_init", [None, STOCK_INIT], ids=["published", "stock"])
@pytest.mark.parametrize("backbone_init", [None, STOCK_INIT], ids=["published", "stock"])
@pytest.mark.parametrize("dt_init", ["mamba", "official"])
def test_scan_parameters_survive_a_stock_init_cfg(model_init, backbone_init, dt_init):
    model, before = initialised(model_init, init_cfg=backbone_init, dt_init=dt_init)
    mixers = [m for m in model.modules() if isinstance(m, BidirectionalMamba)]
    assert len(mixers) == 3
    for mixer in mixers:
        for scan in (mixer.forward_scan, mixer.backward_scan):
            inner, rank = scan.dt_proj_weight.shape
            dt = nn.functional.softplus(scan.dt_proj_bias)
            if dt_init == "official" and scan is mixer.backward_scan:
                torch.testing.assert_close(dt, torch.full_like(dt, math.log(2)))
            else:
                assert dt.min() >= 0.99e-3
                assert dt.max() <= 0.101
                assert dt.std() > 0.01
            assert 0.8 * rank**-0.5 < scan.dt_proj_weight.abs().max() <= rank**-0.5
            assert 0.9 * inner**-0.5 < scan.x_proj_weight.abs().max() <= inner**-0.5
            assert 0.45 < scan.conv_weight.abs().max() <= 0.5
            assert 0.4 < scan.conv_bias.abs().max() <= 0.5
            torch.testing.assert_close(scan.A_log, torch.tensor([1.0, 2, 3, 4]).log().expand(inner, 4))
            assert (scan.D == 1).all()
        for layer, published in ((mixer.in_proj, 32**-0.5), (mixer.out_proj, (64 * 3) ** -0.5)):
            if model_init is backbone_init is None:
                assert 0.95 * published < layer.weight.abs().max() <= published
            else:
                assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for key in ("pos_embed", "cls_token", "patch_embed.projection.weight", "patch_embed.projection.bias"):
        assert torch.equal(model.state_dict()[f"backbone.{key}"], before[f"backbone.{key}"])


def test_embeddings_start_as_published():
    torch.manual_seed(0)
    net = Vim(dict(embed_dims=64, depth=1, patch_size=8), img_size=64)
    assert net.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert net.cls_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert net.patch_embed.projection.weight.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.05)
    assert not net.patch_embed.projection.bias.any()


def test_initialisation_is_deterministic():
    a, b, c = (initialised(seed=seed)[0].state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["backbone.pos_embed"], c["backbone.pos_embed"])


def test_second_initialisation_changes_nothing():
    model, _ = initialised()
    check_second_initialisation(model)


def test_pretrained_file(tmp_path, name):
    net = make(name)
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "model.pth")
    init = dict(type="Pretrained", checkpoint=str(tmp_path / "model.pth"), prefix="backbone.")
    other = Vim(SMALL, **VARIANTS[name], init_cfg=init)
    other.init_weights()
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in other.state_dict().items())


# ---------------------------------------------------------------------- parameter groups


def test_no_weight_decay():
    names = make("class token").no_weight_decay()
    assert names == {"pos_embed", "cls_token"} | {
        f"layers.{i}.mixer.{direction}_scan.{leaf}"
        for i in range(4)
        for direction in ("forward", "backward")
        for leaf in ("A_log", "D", "dt_proj_bias")
    }
    shared = make("shared").no_weight_decay()
    assert {"layers.0.mixer.backward_A_log", "layers.0.mixer.forward_scan.A_log"} <= shared
    for variant in VARIANTS:
        net = make(variant)
        assert net.no_weight_decay() <= {k for k, _ in net.named_parameters()}


@pytest.mark.parametrize(
    ("parameter", "depth"),
    [
        ("backbone.patch_embed.projection.weight", 0),
        ("backbone.pos_embed", 0),
        ("backbone.cls_token", 0),
        ("backbone.cls_token_tail", 0),
        ("backbone.layers.0.norm.weight", 1),
        ("backbone.layers.1.mixer.backward_scan.D", 2),
        ("backbone.layers.23.mixer.out_proj.weight", 24),
        ("backbone.norm.weight", 25),
        ("backbone.norm5.weight", 25),
        ("neck.levels.0.0.weight", 25),
    ],
)
def test_layer_depth(parameter, depth):
    with torch.device("meta"):
        net = Vim("tiny")
    check_layer_depth(net, parameter, (depth, 26))


def test_groups_of_the_optimiser():
    from mmengine.optim import build_optim_wrapper

    import mmvssm.engine  # noqa: F401

    model = Model(None)
    config = dict(
        optimizer=dict(type="AdamW", lr=1.0, weight_decay=0.1),
        constructor="mmvssm.LayerDecayOptimWrapperConstructor",
        paramwise_cfg=dict(layer_decay_rate=0.5),
    )
    names = {id(p): name for name, p in model.named_parameters()}
    groups = build_optim_wrapper(model, config).optimizer.param_groups
    settings = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert settings["backbone.pos_embed"] == settings["backbone.cls_token"] == (0.5**4, 0.0)
    assert settings["backbone.patch_embed.projection.weight"] == (0.5**4, 0.1)
    assert settings["backbone.layers.0.mixer.in_proj.weight"] == (0.5**3, 0.1)
    assert settings["backbone.layers.2.mixer.backward_scan.A_log"] == (0.5, 0.0)
    assert settings["backbone.layers.2.norm.weight"] == (0.5, 0.0)
    assert settings["backbone.norm.weight"] == (1.0, 0.0)
    assert settings["head.weight"] == (1.0, 0.1)


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (dict(arch="vim_tiny"), ValueError, r"no arch 'vim_tiny'; known: tiny, tiny-plus, small, small-plus, base, or"),
        (dict(arch=dict(embed_dim=16)), ValueError, "unknown keys 'embed_dim'; known keys: embed_dims, depth"),
        (dict(arch=dict(depth=4)), ValueError, "lacks the keys 'embed_dims'"),
        (dict(arch=dict(embed_dims=0)), ValueError, "embed_dims=0 must be a positive integer"),
        (dict(arch=dict(embed_dims=16, depth=2.0)), ValueError, "depth=2.0 must be a positive integer"),
        (dict(arch=dict(embed_dims=16, patch_size=0)), ValueError, "patch_size=0 must be a positive integer"),
        (dict(arch=dict(embed_dims=16, stride=17)), ValueError, r"stride=17 must be an integer in 1..patch_size=16"),
        (dict(arch=dict(embed_dims=16, d_state=0)), ValueError, "d_state=0 must be a positive integer"),
        (dict(arch=dict(embed_dims=16, d_conv=0)), ValueError, "d_conv=0 must be a positive integer"),
        (dict(arch=dict(embed_dims=16, dt_rank="half")), ValueError, "dt_rank='half'"),
        (dict(arch=dict(embed_dims=16, expand=0)), ValueError, "expand=0 leaves no inner channels"),
        (dict(final_pool_type="mean"), TypeError, "no argument 'final_pool_type'; known.*out_type"),
        (dict(out_indices=(0, 24)), ValueError, r"out_indices=\(0, 24\) must hold stages in -24..23"),
        (dict(frozen_stages=25), ValueError, r"frozen_stages=25 must be in -1..24"),
        (dict(img_size=None), ValueError, "img_size=None"),
        (dict(img_size=(3, 4, 5)), ValueError, "img_size="),
        (dict(drop_path_rate=1.0), ValueError, r"drop_path_rate=1.0 must be in \[0, 1\)"),
        (dict(drop_rate="0.1"), TypeError, "drop_rate='0.1' must be a number"),
        (dict(out_type="tokens"), ValueError, "out_type='tokens' is unknown; choose one of 'featmap', 'cls_token'"),
        (dict(feature="residual"), ValueError, "feature='residual' is unknown"),
        (dict(out_norm="all"), ValueError, "out_norm='all' is unknown; choose one of 'shared', 'last', 'each', None"),
        (dict(cls_token="tail"), ValueError, "cls_token='tail' is unknown"),
        (dict(norm="batch"), ValueError, "norm='batch' is unknown; choose one of 'rms', 'layer'"),
        (dict(directions="v2"), ValueError, "directions='v2' is unknown; choose one of 'separate'"),
        (dict(dt_init="zero"), ValueError, "dt_init='zero' is unknown"),
        (dict(out_type="cls_token", with_cls_token=False), ValueError, "needs a class token"),
        (dict(rope_residual=True), ValueError, "needs rope=True"),
        (dict(rope=True, arch=dict(embed_dims=18)), ValueError, "divisible by 4, got 18"),
        (dict(alternate=True), ValueError, "needs directions='forward' and an even depth, got 'separate'"),
        (dict(alternate=True, directions="forward", out_indices=(2,)), ValueError, "must be odd with alternate=True"),
    ],
)
def test_bad_arguments(arguments, error, sentence):
    with pytest.raises(error, match=sentence), torch.device("meta"):
        Vim(**arguments)


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((3, 32, 32), r"shape \(B, 3, H, W\), got \(3, 32, 32\)"),
        ((1, 4, 32, 32), "in_channels=3, got an input of 4 channels"),
        ((1, 3, 0, 32), "at least 1 x 1 pixels, got 0 x 32"),
    ],
)
def test_bad_images(shape, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()(torch.zeros(shape))
