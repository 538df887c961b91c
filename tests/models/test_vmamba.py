"""The VMamba backbone: surface, sizes, training behaviour. Reference outputs are in test_vmamba_golden.py."""

import copy
import functools

import pytest
import torch
from mmengine.model import BaseModule
from torch import nn

from mmvssm.models import VMamba
from mmvssm.models.mixers import SS2D, ss2d

from .common import (
    STOCK_INIT,
    check_batch_independence,
    check_checkpointing,
    check_checkpointing_stores_less,
    check_gradients_of_unfrozen,
    check_layer_depth,
    check_no_gradients_behind,
    check_second_initialisation,
    check_state_dict_round_trip,
    enlarge,
    image,
    total,
)

# Published parameter counts, with the classifier of 1000 classes.
PARAMETERS = {
    "tiny-s1l8": 30_249_064,
    "tiny-s2l5": 30_705_832,
    "small-s2l15": 50_147_752,
    "small-s1l20": 49_012_840,
    "base-s2l15": 88_557_800,
    "base-s1l20": 86_614_504,
    "tiny-0220": 32_484_904,
    "v0-tiny": 22_893_448,
    "v0-small": 44_417_416,
    "v0-base": 76_254_056,
}
SMALL = {
    "v2": dict(embed_dims=16, depths=(1, 1, 2, 1)),
    "gated": dict(embed_dims=16, depths=(1, 1, 2, 1), ssm_ratio=2.0, gated=True, d_state=2),
    "v0": {**VMamba.arch_zoo["v0-tiny"], "embed_dims": 16, "depths": (1, 1, 2, 1), "d_state": 4, "drop_path_rate": 0.0},
}


def make(name="v2", **kwargs) -> VMamba:
    torch.manual_seed(0)
    net = VMamba(SMALL[name], **kwargs)
    return enlarge(net)


@pytest.fixture(params=SMALL)
def name(request):
    return request.param


# ---------------------------------------------------------------------- variants


@pytest.mark.parametrize("arch", PARAMETERS)
def test_parameter_count(arch):
    with torch.device("meta"):
        net = VMamba(arch, out_indices=(3,))
        head = nn.Linear(net.out_channels[-1], 1000)
    assert sum(p.numel() for p in (*net.parameters(), *head.parameters())) == PARAMETERS[arch]


def test_all_published_variants_are_listed():
    assert set(VMamba.arch_zoo) == set(PARAMETERS)


def test_arch_dict_equals_name():
    with torch.device("meta"):
        a, b = VMamba("small-s2l15"), VMamba(dict(embed_dims=96, depths=[2, 2, 15, 2], ssm_ratio=2.0))
        c = VMamba(dict(embed_dims=(96, 192, 384, 768), depths=(2, 2, 15, 2), ssm_ratio=2.0))
    shapes = [{k: v.shape for k, v in net.state_dict().items()} for net in (a, b, c)]
    assert shapes[0] == shapes[1] == shapes[2]


# ---------------------------------------------------------------------- outputs


@pytest.mark.parametrize("size", [(64, 64), (75, 107), (33, 200), (1, 640), (1, 1), (640, 2)])
def test_shapes_of_convolutional_stem(size):
    net = make().eval()
    with torch.no_grad():
        outs = net(image(1, 3, *size))
    grid = tuple(-(-side // 4) for side in size)
    for i, out in enumerate(outs):
        assert out.shape == (1, 16 * 2**i, *grid)
        assert out.is_contiguous()
        assert out.isfinite().all()
        grid = tuple(-(-side // 2) for side in grid)


@pytest.mark.parametrize("odd_size", ["pad", "crop"])
@pytest.mark.parametrize("size", [(64, 64), (75, 107), (33, 200)])
def test_shapes_of_patch_stem(size, odd_size):
    net = make("v0", odd_size=odd_size).eval()
    with torch.no_grad():
        outs = net(image(1, 3, *size))
    grid = tuple(side // 4 for side in size)
    for i, out in enumerate(outs):
        assert out.shape == (1, 16 * 2**i, *grid)
        assert out.isfinite().all()
        grid = tuple(-(-side // 2) if odd_size == "pad" else side // 2 for side in grid)


def test_patch_stem_takes_one_patch():
    assert [out.shape[2:] for out in make("v0").eval()(image(1, 3, 4, 7))] == [(1, 1)] * 4


def test_padding_and_cropping_agree_on_even_grids():
    pad, crop = make("v0", odd_size="pad").eval(), make("v0", odd_size="crop").eval()
    for a, b in zip(pad(image(1, 3, 64, 96)), crop(image(1, 3, 64, 96)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("given", "stages"), [((0, 1, 2, 3), (0, 1, 2, 3)), ([1, 3], (1, 3)), ((3,), (3,)), ((-1,), (3,)), (2, (2,))]
)
def test_out_indices(given, stages):
    net = make(out_indices=given).eval()
    every = make().eval()
    every.load_state_dict(net.state_dict(), strict=False)
    x = image(1, 3, 64, 64)
    outs = net(x)
    assert net.out_indices == stages
    assert net.out_channels == tuple(16 * 2**i for i in stages)
    assert net.out_strides == tuple(4 * 2**i for i in stages)
    assert {k.split(".")[0] for k in net.state_dict()} == {"patch_embed", "stages", *(f"norm{i}" for i in stages)}
    for out, i in zip(outs, stages, strict=True):
        want = every(x)[i] if i in stages else None
        assert out.shape == (1, 16 * 2**i, 16 // 2**i, 16 // 2**i)
        norm = getattr(every, f"norm{i}")
        norm.load_state_dict(getattr(net, f"norm{i}").state_dict())
        torch.testing.assert_close(out, want)


@torch.no_grad()
def test_batch_independence(name):
    check_batch_independence(make(name).eval())


@torch.no_grad()
def test_channels_last_input_is_the_same():
    net, x = make().eval(), image(2, 3, 40, 56)
    for a, b in zip(net(x), net(x.to(memory_format=torch.channels_last)), strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_other_input_channels():
    assert make(in_channels=5).eval()(image(1, 5, 32, 32))[0].shape == (1, 16, 8, 8)


def test_img_size_is_accepted_and_unused():
    shapes = [{k: v.shape for k, v in make(img_size=size).state_dict().items()} for size in (None, 64, (64, 96))]
    assert shapes[0] == shapes[1] == shapes[2]


# ---------------------------------------------------------------------- training


def test_every_parameter_gets_a_gradient(name):
    """Distributed training waits for every parameter that asks for a gradient."""
    net = make(name).train()
    total(net(image(2, 3, 32, 48))).backward()
    without = [k for k, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_stages_after_the_last_output_hold_no_gradients():
    check_no_gradients_behind(make(out_indices=(0, 1)).train(), ("stages.2", "stages.3"))


def test_checkpointing_gives_the_same_values_and_gradients(name):
    check_checkpointing(functools.partial(make, name))


def test_checkpointing_behind_a_frozen_stem():
    check_gradients_of_unfrozen(make(with_cp=True, frozen_stages=1).train())


def test_checkpointing_stores_less():
    check_checkpointing_stores_less(make)


@pytest.mark.parametrize("frozen_stages", [-1, 0, 2, 4])
def test_frozen_stages(frozen_stages):
    net = make(frozen_stages=frozen_stages, drop_path_rate=0.3)
    frozen = ["patch_embed."] if frozen_stages >= 0 else []
    for i in range(frozen_stages):
        frozen += [f"stages.{i}.", f"norm{i}."]
    for _ in range(2):
        assert {k for k, p in net.named_parameters() if not p.requires_grad} == {
            k for k, _ in net.named_parameters() if k.startswith(tuple(frozen))
        }
        assert [stage.training for stage in net.stages] == [i >= frozen_stages for i in range(4)]
        assert net.patch_embed.training == (frozen_stages < 0)
        net.eval()
        net.train()


def test_norm_eval_is_accepted():
    assert make(norm_eval=True).train().training


def test_drop_path_rates():
    net = VMamba(SMALL["v2"], drop_path_rate=0.4)
    rates = [block.drop_path.drop_prob for stage in net.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    with torch.device("meta"):
        assert VMamba("base-s2l15").stages[3].blocks[1].drop_path.drop_prob == pytest.approx(0.6)
        assert VMamba("base-s2l15", drop_path_rate=0.0).stages[3].blocks[1].drop_path.drop_prob == 0


def test_drop_path_acts_in_training_only():
    net, x = make(drop_path_rate=0.9), image(4, 3, 32, 32)
    net.eval()
    torch.testing.assert_close(net(x)[3], net(x)[3])
    net.train()
    assert not torch.allclose(net(x)[3], net(x)[3])


def test_state_dict_round_trip(tmp_path, name):
    net, other = make(name).eval(), VMamba(SMALL[name]).eval()
    check_state_dict_round_trip(net, other, tmp_path)


# ---------------------------------------------------------------------- precision


def test_bfloat16_autocast(name):
    net, x = make(name), image(2, 3, 40, 56)
    with torch.no_grad():
        want = net.eval()(x)
    net.train()
    with torch.autocast("cpu", torch.bfloat16):
        outs = net(x)
        loss = total(out.float() for out in outs)
    loss.backward()
    for a, b in zip(outs, want, strict=True):
        assert (a - b).norm() < 0.03 * b.norm()  # 0.013 at most when written
    assert all(p.grad.isfinite().all() for p in net.parameters())


@torch.no_grad()
def test_bfloat16_weights(name):
    net, x = make(name).eval(), image(2, 3, 40, 56)
    want = net(x)
    for a, b in zip(net.bfloat16()(x.bfloat16()), want, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b).norm() < 0.05 * b.norm()  # 0.015 at most when written


@torch.no_grad()
def test_float64(name):
    net, x = make(name).eval(), image(2, 3, 40, 56)
    want = net(x)
    for a, b in zip(net.double()(x.double()), want, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a.float(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("fp32_core", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_precision_of_the_scan_under_autocast(monkeypatch, fp32_core, dtype):
    seen = []

    def record(x, *args, **kwargs):
        seen.append(x.dtype)
        return scan(x, *args, **kwargs)

    scan = ss2d.selective_scan_2d
    monkeypatch.setattr(ss2d, "selective_scan_2d", record)
    with torch.autocast("cpu", torch.bfloat16):
        SS2D(8, fp32_core=fp32_core)(image(1, 4, 4, 8))
    assert seen == [dtype]


def test_meta_device(name):
    """Shapes without arithmetic, as the FLOP counter uses it."""
    with torch.device("meta"):
        outs = VMamba(SMALL[name])(torch.empty(1, 3, 64, 96))
    assert [tuple(out.shape) for out in outs] == [(1, 16 * 2**i, 16 // 2**i, 24 // 2**i) for i in range(4)]


# ---------------------------------------------------------------------- initialisation


class Model(BaseModule):
    """A model as the libraries build it: one init_cfg over everything."""

    def __init__(self, model_init_cfg, **kwargs):
        super().__init__(model_init_cfg)
        self.backbone = VMamba(dict(embed_dims=32, depths=(1, 2), d_state=4, ssm_ratio=2.0, gated=True), **kwargs)
        self.head = nn.Linear(64, 10)


def initialised(seed=0, **kwargs):
    torch.manual_seed(seed)
    model = Model(STOCK_INIT, **{"out_indices": (0, 1), **kwargs})
    with torch.no_grad():  # whatever a rule or a script has left in them
        for module in model.modules():
            if isinstance(module, SS2D):
                for parameter in (module.A_log, module.D, module.dt_proj_bias, module.dt_proj_weight):
                    parameter.fill_(7)
    before = copy.deepcopy(model.state_dict())
    model.init_weights()
    return model, before


@pytest.mark.parametrize("backbone_init", [None, STOCK_INIT])
def test_scan_parameters_survive_a_stock_init_cfg(backbone_init):
    model, before = initialised(init_cfg=backbone_init)
    mixers = [m for m in model.modules() if isinstance(m, SS2D)]
    assert len(mixers) == 3
    for mixer in mixers:
        inner, rank = mixer.dt_proj_weight.shape[1:]
        dt = nn.functional.softplus(mixer.dt_proj_bias)
        assert dt.min() >= 0.99e-3
        assert dt.max() <= 0.101
        assert dt.std() > 0.01
        assert 0.8 * rank**-0.5 < mixer.dt_proj_weight.abs().max() <= rank**-0.5
        assert 0.9 * inner**-0.5 < mixer.x_proj_weight.abs().max() <= inner**-0.5
        torch.testing.assert_close(mixer.A_log, torch.tensor([1.0, 2, 3, 4]).log().expand(4 * inner, 4))
        assert (mixer.D == 1).all()
        assert mixer.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert mixer.out_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            assert (module.bias == 0).all()
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
        elif isinstance(module, nn.Conv2d):
            assert torch.equal(module.weight, before[f"{name}.weight"]), "convolutions keep the framework's default"


def test_initialisation_is_deterministic():
    a, b, c = (initialised(seed)[0].state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(
        a["backbone.stages.0.blocks.0.mixer.in_proj.weight"], c["backbone.stages.0.blocks.0.mixer.in_proj.weight"]
    )
    assert not torch.equal(
        a["backbone.stages.0.blocks.0.mixer.dt_proj_bias"], c["backbone.stages.0.blocks.0.mixer.dt_proj_bias"]
    )


def test_default_initialisation_is_the_published_one():
    torch.manual_seed(0)
    net = VMamba(SMALL["v2"])
    net.init_weights()
    mlp = net.stages[3].blocks[0].mlp
    assert mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert (mlp.fc1.bias == 0).all()


def test_second_initialisation_changes_nothing():
    model, _ = initialised()
    check_second_initialisation(model)


def test_pretrained_file(tmp_path, name):
    net = make(name)
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "model.pth")
    init = dict(type="Pretrained", checkpoint=str(tmp_path / "model.pth"), prefix="backbone.")
    for init_cfg in (init, [*STOCK_INIT, init]):
        other = VMamba(SMALL[name], init_cfg=init_cfg)
        other.init_weights()
        assert other.init_cfg == init_cfg
        assert all(torch.equal(v, net.state_dict()[k]) for k, v in other.state_dict().items())


def test_pretrained_config_with_a_typo():
    net = VMamba(SMALL["v2"], init_cfg=dict(type="Pretrained", checkpoint="model.pth", prefx="backbone."))
    with pytest.raises(ValueError, match=r"takes checkpoint and, if wanted, prefix .* got .*prefx"):
        net.init_weights()


def test_pretrained_file_of_another_variant(tmp_path):
    torch.save(make("gated").state_dict(), tmp_path / "model.pth")
    other = VMamba(SMALL["v2"], init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "model.pth")))
    with pytest.raises(ValueError, match="does not fit"):
        other.init_weights()


# ---------------------------------------------------------------------- parameter groups


def test_no_weight_decay():
    net = make()
    names = net.no_weight_decay()
    assert names <= {k for k, _ in net.named_parameters()}
    assert names == {
        f"stages.{i}.blocks.{j}.mixer.{leaf}"
        for i, depth in enumerate((1, 1, 2, 1))
        for j in range(depth)
        for leaf in ("A_log", "D", "dt_proj_bias")
    }


@pytest.mark.parametrize(
    ("parameter", "depth"),
    [
        ("backbone.patch_embed.conv1.weight", 0),
        ("backbone.stages.0.blocks.0.norm1.weight", 1),
        ("backbone.stages.0.blocks.1.mixer.D", 2),
        ("backbone.stages.1.downsample.conv.weight", 2),
        ("backbone.stages.1.blocks.0.norm1.weight", 3),
        ("backbone.stages.2.downsample.norm.bias", 4),
        ("backbone.stages.2.blocks.7.mlp.fc1.weight", 12),
        ("backbone.stages.3.blocks.1.norm2.weight", 14),
        ("backbone.norm0.weight", 15),
        ("backbone.norm3.weight", 15),
        ("head.fc.weight", 15),
    ],
)
def test_layer_depth(parameter, depth):
    with torch.device("meta"):
        net = VMamba("tiny-s1l8")
    check_layer_depth(net, parameter, (depth, 16))


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (dict(arch="tiny"), ValueError, r"no arch 'tiny'; known: tiny-s1l8, .*v0-base"),
        (dict(arch=3), TypeError, "arch must be a name or a dict, got int"),
        (dict(arch=dict(embed_dim=16, depths=(1,))), ValueError, "unknown keys 'embed_dim'; known keys: embed_dims"),
        (dict(arch=dict(embed_dims=16)), ValueError, "lacks the keys 'depths'"),
        (dict(arch=dict(embed_dims=(16, 32), depths=(1, 1, 1))), ValueError, "2 widths but 3 depths"),
        (dict(arch=dict(embed_dims=16, depths=(1, 0))), ValueError, "depths=.* positive integers"),
        (dict(arch=dict(embed_dims=16, depths=3)), ValueError, "depths=3 .* positive integers"),
        (dict(arch=dict(embed_dims="wide", depths=(1,))), ValueError, "embed_dims='wide'"),
        (dict(arch=dict(embed_dims=15, depths=(1,))), ValueError, "embed_dims=15 must be even"),
        (dict(arch=dict(embed_dims=16, depths=(1,), stem="conv2")), ValueError, "stem='conv2' is unknown"),
        (dict(arch=dict(embed_dims=16, depths=(1,), downsample="v3")), ValueError, "downsample='v3' is unknown"),
        (dict(arch=dict(embed_dims=16, depths=(1,), ssm_ratio=0)), ValueError, "ssm_ratio=0 leaves no inner channels"),
        (dict(arch=dict(embed_dims=16, depths=(1,), d_state=0)), ValueError, "d_state=0 must be a positive integer"),
        (dict(window_size=7, num_heads=3), TypeError, "no argument 'window_size', 'num_heads'; known.*drop_path_rate"),
        (dict(out_indices=(0, 4)), ValueError, r"out_indices=\(0, 4\) must hold stages in -4..3"),
        (dict(out_indices=()), ValueError, "at least one"),
        (dict(out_indices=(1, 0)), ValueError, "increasing"),
        (dict(out_indices=(3, -1)), ValueError, "without repetition"),
        (dict(out_indices="all"), TypeError, "sequence of integers"),
        (dict(frozen_stages=5), ValueError, r"frozen_stages=5 must be in -1..4"),
        (dict(frozen_stages=-2), ValueError, "frozen_stages=-2"),
        (dict(frozen_stages=1.0), TypeError, "frozen_stages=1.0 must be an integer"),
        (dict(in_channels=0), ValueError, "in_channels=0 must be a positive integer"),
        (dict(img_size=(3, 4, 5)), ValueError, "img_size="),
        (dict(drop_path_rate=1.5), ValueError, r"drop_path_rate=1.5 must be in \[0, 1\)"),
        (dict(arch=dict(embed_dims=16, depths=(1,), ssm_ratio="2")), TypeError, "ssm_ratio='2' must be a number"),
        (dict(arch=dict(embed_dims=16, depths=(1,), mlp_ratio=-1)), ValueError, "mlp_ratio=-1 must not be negative"),
        (dict(drop_path_rate="0.1"), TypeError, "drop_path_rate='0.1' must be a number"),
        (dict(dt_rank=0), ValueError, "dt_rank=0"),
        (dict(d_conv=4), ValueError, "d_conv=4 must be an odd number"),
        (dict(ssm_act="swish"), ValueError, "ssm_act='swish' is unknown; choose one of None, 'gelu'"),
        (dict(mlp_act="swish"), ValueError, "mlp_act='swish'"),
        (dict(gate_act="swish"), ValueError, "gate_act='swish'"),
        (dict(arch=dict(embed_dims=16, depths=(1,), gated="noz")), TypeError, "gated='noz' must be True or False"),
        (dict(odd_size="wrap"), ValueError, "odd_size='wrap' is unknown"),
    ],
)
def test_bad_arguments(arguments, error, sentence):
    with pytest.raises(error, match=sentence), torch.device("meta"):
        VMamba(**arguments)


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        ("v2", (3, 32, 32), r"shape \(B, 3, H, W\), got \(3, 32, 32\)"),
        ("v2", (1, 4, 32, 32), "in_channels=3, got an input of 4 channels"),
        ("v2", (1, 3, 0, 32), "at least 1 x 1 pixels, got 0 x 32"),
        ("v0", (1, 3, 3, 32), "at least 4 x 4 pixels, got 3 x 32"),
    ],
)
def test_bad_images(name, shape, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(name)(torch.zeros(shape))


def test_integer_images():
    with pytest.raises(ValueError, match=r"floating-point images, got torch\.uint8"):
        make()(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_grids_that_end_before_the_last_stage():
    with pytest.raises(ValueError, match="grid of at least 2 x 2, got 1 x 4"):
        make("v0", odd_size="crop")(image(1, 3, 8, 32))
    net = VMamba(dict(embed_dims=16, depths=(1, 1, 1), downsample="conv2"), out_indices=(0, 1, 2))
    with pytest.raises(ValueError, match="grid of at least 2 x 2, got 1 x 4"):
        net(image(1, 3, 8, 32))
