"""MambaVision's parameters: initialisation, files, groups for the optimiser; arguments and images that are refused."""

import copy

import pytest
import torch
from mmengine.model import BaseModule
from torch import nn

from mmvssm.models import MambaVision
from mmvssm.models.mixers import MambaVisionMixer

from .common import (
    STOCK_INIT,
    check_layer_depth,
    check_second_initialisation,
)
from .small_mambavision import SMALL, make


@pytest.fixture(params=SMALL)
def name(request):
    return request.param


# ---------------------------------------------------------------------- initialisation


class Model(BaseModule):
    """A model as the libraries build it: one init_cfg over everything."""

    def __init__(self, model_init_cfg, **kwargs):
        super().__init__(model_init_cfg)
        arch = dict(embed_dims=32, depths=(1, 1, 3, 2), num_heads=(2, 4), layer_scale=1e-5)
        self.backbone = MambaVision(arch, **kwargs)
        self.head = nn.Linear(256, 10)


def initialised(seed=0, **kwargs):
    torch.manual_seed(seed)
    model = Model(STOCK_INIT, **kwargs)
    with torch.no_grad():  # whatever a rule or a script has left in them
        for module in model.modules():
            if isinstance(module, MambaVisionMixer):
                for parameter in (module.A_log, module.D, module.dt_proj.bias, module.dt_proj.weight):
                    parameter.fill_(7)
    before = copy.deepcopy(model.state_dict())
    model.init_weights()
    return model, before


@pytest.mark.parametrize("backbone_init", [None, STOCK_INIT])
@pytest.mark.parametrize("dt_init", ["mamba", "zero"])
def test_scan_parameters_survive_a_stock_init_cfg(backbone_init, dt_init):
    model, before = initialised(init_cfg=backbone_init, dt_init=dt_init)
    mixers = [m for m in model.modules() if isinstance(m, MambaVisionMixer)]
    assert len(mixers) == 3
    for mixer in mixers:
        inner, rank = mixer.dt_proj.weight.shape
        dt = nn.functional.softplus(2 * mixer.dt_proj.bias)  # as it enters the scan
        if dt_init == "mamba":
            assert dt.min() >= 0.99e-3
            assert dt.max() <= 0.101
            assert dt.std() > 0.01
            assert 0.8 * rank**-0.5 < mixer.dt_proj.weight.abs().max() <= rank**-0.5
        else:
            assert (mixer.dt_proj.bias == 0).all()
            assert mixer.dt_proj.weight.std().item() == pytest.approx(0.02, rel=0.15)
        torch.testing.assert_close(mixer.A_log, torch.arange(1.0, 9).log().expand(inner, 8))
        assert (mixer.D == 1).all()
        for projection in (mixer.in_proj, mixer.out_proj, mixer.x_proj):
            assert projection.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.bias is not None and "dt_proj" not in name:
            assert (module.bias == 0).all()
        elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
        elif isinstance(module, nn.Conv2d):
            assert torch.equal(module.weight, before[f"{name}.weight"]), "convolutions keep the framework's default"
    for name, parameter in model.named_parameters():
        if "gamma" in name:
            assert (parameter == 1e-5).all()
        elif "conv_weight" in name:
            assert torch.equal(parameter, before[name])
            assert 0.5 < parameter.abs().max() <= 3**-0.5


def test_initialisation_is_deterministic():
    a, b, c = (initialised(seed)[0].state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(a[k], b[k]) for k in a)
    for leaf in ("in_proj.weight", "dt_proj.bias"):
        key = f"backbone.stages.2.blocks.0.mixer.{leaf}"
        assert not torch.equal(a[key], c[key])


def test_second_initialisation_changes_nothing():
    model, _ = initialised()
    check_second_initialisation(model)


def test_pretrained_file(tmp_path, name):
    net = make(name)
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "model.pth")
    init = dict(type="Pretrained", checkpoint=str(tmp_path / "model.pth"), prefix="backbone.")
    for init_cfg in (init, [*STOCK_INIT, init]):
        other = MambaVision(SMALL[name], init_cfg=init_cfg)
        other.init_weights()
        assert other.init_cfg == init_cfg
        assert all(torch.equal(v, net.state_dict()[k]) for k, v in other.state_dict().items())


def test_pretrained_file_of_another_variant(tmp_path):
    torch.save(make("scaled").state_dict(), tmp_path / "model.pth")
    other = MambaVision(SMALL["plain"], init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "model.pth")))
    with pytest.raises(ValueError, match="does not fit"):
        other.init_weights()


# ---------------------------------------------------------------------- parameter groups


def test_no_weight_decay():
    net = make("scaled")
    names = net.no_weight_decay()
    assert names <= {k for k, _ in net.named_parameters()}
    assert names == {
        f"stages.{i}.blocks.{j}.mixer.{leaf}"
        for i, j in ((2, 0), (2, 1), (3, 0))
        for leaf in ("A_log", "D", "dt_proj.bias")
    }


@pytest.mark.parametrize(
    ("parameter", "depth"),
    [
        ("backbone.patch_embed.conv1.weight", 0),
        ("backbone.stages.0.blocks.0.norm1.weight", 1),
        ("backbone.stages.1.downsample.weight", 1),
        ("backbone.stages.1.blocks.2.conv2.bias", 4),
        ("backbone.stages.2.downsample.weight", 4),
        ("backbone.stages.2.blocks.7.mlp.fc1.weight", 12),
        ("backbone.stages.3.blocks.3.mixer.qkv.weight", 16),
        ("backbone.norm0.weight", 17),
        ("backbone.batch_norm3.weight", 17),
        ("head.fc.weight", 17),
    ],
)
def test_layer_depth(parameter, depth):
    with torch.device("meta"):
        net = MambaVision("t")
    check_layer_depth(net, parameter, (depth, 18))


# ---------------------------------------------------------------------- bad input


def arch(**changes):
    return dict(arch={**SMALL["plain"], **changes})


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (dict(arch="tiny"), ValueError, r"no arch 'tiny'; known: t, t2, .*l3-512-21k"),
        (dict(arch=dict(dim=80, depths=(1, 1, 1, 1))), ValueError, "unknown keys 'dim'; known keys: embed_dims"),
        (dict(arch=dict(embed_dims=16)), ValueError, "lacks the keys 'depths'"),
        (arch(depths=(1, 1)), ValueError, r"depths=\(1, 1\) must be 4 positive integers"),
        (arch(depths=(1, 1, 0, 1)), ValueError, "depths=.* must be 4 positive integers"),
        (arch(num_heads=(2, 4, 8, 16)), ValueError, "num_heads=.* must be 2 positive integers"),
        (arch(num_heads=(3, 4)), ValueError, "num_heads=3 does not divide the width 32"),
        (arch(embed_dims="wide"), ValueError, "embed_dims='wide' must be a positive integer"),
        (arch(stem_dims=0), ValueError, "stem_dims=0 must be a positive integer"),
        (arch(mlp_ratio="4"), TypeError, "mlp_ratio='4' must be a number"),
        (arch(mlp_ratio=0), ValueError, "mlp_ratio=0 leaves no hidden channels"),
        (arch(layer_scale="small"), TypeError, "layer_scale='small' must be a number, or None"),
        (arch(d_state=0), ValueError, "d_state=0 must be a positive integer"),
        (arch(window_size=(8, 8, 14, 7)), ValueError, r"window_size=\(8, 8, 14, 7\) must be .* a pair"),
        (dict(window_size="image"), ValueError, "window_size='image' must be a positive integer or 'map'"),
        (dict(window_size=0), ValueError, "window_size=0 must be a positive integer"),
        (dict(window_size=(14, 7.0)), ValueError, r"window_size=\(14, 7.0\)"),
        (dict(fit_windows="yes"), TypeError, "fit_windows='yes' must be True or False"),
        (dict(out_norm="ln2d"), ValueError, "out_norm='ln2d' is unknown; choose one of 'auto', 'ln', 'bn', 'none'"),
        (dict(dt_init="random"), ValueError, "dt_init='random' is unknown; choose one of 'mamba', 'zero'"),
        (dict(layer_scale=1e-5, depth=50), TypeError, "no argument 'layer_scale', 'depth'; known.*drop_path_rate"),
        (dict(out_indices=(0, 4)), ValueError, r"out_indices=\(0, 4\) must hold stages in -4..3"),
        (dict(frozen_stages=5), ValueError, r"frozen_stages=5 must be in -1..4"),
        (dict(drop_path_rate=1.0), ValueError, r"drop_path_rate=1.0 must be in \[0, 1\)"),
        (dict(drop_path_rate="0.1"), TypeError, "drop_path_rate='0.1' must be a number"),
        (dict(in_channels=0), ValueError, "in_channels=0 must be a positive integer"),
    ],
)
def test_bad_arguments(arguments, error, sentence):
    with pytest.raises(error, match=sentence), torch.device("meta"):
        MambaVision(**arguments)


def test_odd_width_of_a_mixer():
    with pytest.raises(ValueError, match="half of the channels is scanned, so the width 15 must be even"):
        MambaVisionMixer(15)
    with pytest.raises(ValueError, match="dt_rank=0 must be a positive integer or 'auto'"):
        MambaVisionMixer(16, dt_rank=0)


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
