"""The ViG and ViG-H backbones: surface, sizes, training behaviour. Reference outputs are in test_vig_golden.py."""

import copy
import functools

import pytest
import torch
from mmengine.model import BaseModule
from torch import nn

from mmvssm.models import ViG, ViGH
from mmvssm.models.backbones import vig
from mmvssm.models.mixers import BidirectionalGLA, bidirectional_gla

from .common import (
    check_batch_independence,
    check_checkpointing,
    check_checkpointing_stores_less,
    check_state_dict_round_trip,
    image,
    total,
)

# Published parameter counts, with the classifier of 1000 classes.
PARAMETERS = {
    (ViG, "tiny"): 5_834_536,
    (ViG, "small"): 22_615_144,
    (ViG, "base"): 89_022_184,
    (ViGH, "tiny"): 28_600_680,
    (ViGH, "small"): 50_051_688,
    (ViGH, "base"): 88_904_360,
}
SMALL = {
    "plain": (ViG, dict(embed_dims=16, depth=4, head_dims=8, conv_act="silu", out_act="silu", mlp_multiple=16)),
    "pyramid": (ViGH, dict(embed_dims=16, depths=(1, 1, 2, 1), head_dims=8, mlp_multiple=8)),
}
STOCK_INIT = [
    dict(type="TruncNormal", layer="Linear", std=0.02, bias=0.0),
    dict(type="Constant", layer="LayerNorm", val=1.0, bias=0.0),
]


def make(name="pyramid", **kwargs):
    torch.manual_seed(0)
    family, arch = SMALL[name]
    kwargs.setdefault("out_indices", (0, 1, 2, 3))
    net = family(arch, **({"img_size": 64} if name == "plain" else {}), **kwargs)
    with torch.no_grad():  # larger than at the start of training, so that every branch shows in the output
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return net


@pytest.fixture(params=SMALL)
def name(request):
    return request.param


# ---------------------------------------------------------------------- variants


@pytest.mark.parametrize(("family", "arch"), PARAMETERS)
def test_parameter_count(family, arch):
    with torch.device("meta"):
        net = family(arch, out_indices=(-1,))
        head = nn.Linear(net.out_channels[-1], 1000)
    assert sum(p.numel() for p in (*net.parameters(), *head.parameters())) == PARAMETERS[family, arch]


def test_all_published_variants_are_listed():
    assert {(family, arch) for family in (ViG, ViGH) for arch in family.arch_zoo} == set(PARAMETERS)


def test_arch_dict_equals_name():
    with torch.device("meta"):
        pairs = [
            (ViG("small"), ViG(dict(embed_dims=384))),
            (ViGH("base"), ViGH(dict(embed_dims=[128, 256, 512, 1024], depths=[2, 2, 17, 2]))),
        ]
    for a, b in pairs:
        assert {k: v.shape for k, v in a.state_dict().items()} == {k: v.shape for k, v in b.state_dict().items()}


# ---------------------------------------------------------------------- outputs


@pytest.mark.parametrize("size", [(64, 64), (75, 107), (33, 200), (1, 640), (1, 1), (640, 2)])
def test_shapes_of_the_pyramid(size):
    net = make().eval()
    with torch.no_grad():
        outs = net(image(1, 3, *size))
    grid = tuple(-(-side // 4) for side in size)
    for i, out in enumerate(outs):
        assert out.shape == (1, 16 * 2**i, *grid)
        assert out.is_contiguous()
        assert out.isfinite().all()
        grid = tuple(-(-side // 2) for side in grid)


@pytest.mark.parametrize(
    ("size", "grid"),
    [((64, 64), (4, 4)), ((75, 107), (5, 7)), ((65, 200), (4, 13)), ((7, 7), (1, 1)), ((7, 640), (1, 40))],
)
def test_shapes_of_the_plain_family(size, grid):
    net = make("plain").eval()
    with torch.no_grad():
        outs = net(image(1, 3, *size))
    for out in outs:
        assert out.shape == (1, 16, *grid)
        assert out.is_contiguous()
        assert out.isfinite().all()
    assert net.patch_embed.grid(size) == grid


@torch.no_grad()
def test_long_sequences():
    """More than 65,000 tokens in the first stage of the pyramid."""
    net = ViGH(dict(embed_dims=4, depths=(1,), head_dims=4, mlp_multiple=4), out_indices=(0,)).eval()
    (out,) = net(image(1, 3, 4 * 260, 4 * 253))
    assert out.shape == (1, 4, 260, 253)
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("given", "indices"), [((0, 1, 2, 3), (0, 1, 2, 3)), ([1, 3], (1, 3)), ((3,), (3,)), ((-1,), (3,)), (2, (2,))]
)
@torch.no_grad()
def test_out_indices(name, given, indices):
    net, every = make(name, out_indices=given).eval(), make(name).eval()
    every.load_state_dict(net.state_dict(), strict=False)
    x = image(1, 3, 64, 96)
    outs, all_outs = net(x), every(x)
    plain = name == "plain"
    assert net.out_indices == indices
    assert net.out_channels == tuple(16 if plain else 16 * 2**i for i in indices)
    assert net.out_strides == tuple(16 if plain else 4 * 2**i for i in indices)
    parts = {"pos_embed", "blocks", "norm"} if plain else {"stages", *(f"norm{i}" for i in indices)}
    assert {k.split(".")[0] for k in net.state_dict()} == {"patch_embed", *parts}
    for out, i in zip(outs, indices, strict=True):
        torch.testing.assert_close(out, all_outs[i])


@torch.no_grad()
def test_final_norm_is_for_the_last_block_alone():
    net, x = make("plain").eval(), image(1, 3, 64, 96)
    streams = []
    for block in net.blocks:
        block.register_forward_hook(lambda module, inputs, stream: streams.append(stream.total()))
    outs = net(x)
    for i, (out, stream) in enumerate(zip(outs, streams, strict=True)):
        if i == 3:
            stream = nn.functional.rms_norm(stream, (16,), net.norm.weight, 1e-6)
        torch.testing.assert_close(out, stream.permute(0, 3, 1, 2))


@torch.no_grad()
def test_batch_independence(name):
    check_batch_independence(make(name).eval())


@torch.no_grad()
def test_channels_last_input_is_the_same(name):
    net, x = make(name).eval(), image(2, 3, 40, 56)
    for a, b in zip(net(x), net(x.to(memory_format=torch.channels_last)), strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_other_input_channels(name):
    assert make(name, in_channels=5).eval()(image(1, 5, 32, 32))[0].shape[:2] == (1, 16)


@torch.no_grad()
@pytest.mark.parametrize(("name", "side"), [("plain", 64), ("pyramid", 32)])
def test_both_directions_reach_every_token(name, side):
    """A pixel at the end changes the first token of the first map, and one at the start the last."""
    net, x = make(name).eval(), image(1, 3, side, side)
    first = net(x)[0]
    for corner, other in ((0, -1), (-1, 0)):
        changed = x.clone()
        changed[..., corner, corner] += 3
        assert (net(changed)[0] - first)[..., other, other].abs().max() > 1e-6


# ---------------------------------------------------------------------- position embedding


def test_position_embedding_has_the_grid_of_img_size():
    with torch.device("meta"):
        shapes = [ViG("tiny", img_size=size).pos_embed.shape for size in (224, (75, 107), 512)]
    assert shapes == [(1, 14, 14, 192), (1, 5, 7, 192), (1, 32, 32, 192)]
    with torch.device("meta"):
        shapes = [{k: v.shape for k, v in ViGH("tiny", img_size=s).state_dict().items()} for s in (None, 64, (64, 96))]
    assert shapes[0] == shapes[1] == shapes[2]


@torch.no_grad()
def test_position_embedding_at_other_sizes():
    net = make("plain").eval()
    pos = torch.arange(4.0)[:, None] * 10 + torch.arange(4.0)  # rows and columns are told apart
    net.pos_embed.copy_(pos[None, :, :, None].expand(1, 4, 4, 16))
    assert torch.equal(net._position_embedding((4, 4)), net.pos_embed)
    wide = net._position_embedding((4, 8))
    want = nn.functional.interpolate(pos[None, None], (4, 8), mode="bicubic", align_corners=False)[0, 0]
    torch.testing.assert_close(wide[0, ..., 3], want)
    assert net._position_embedding((1, 1)).shape == (1, 1, 1, 16)
    torch.testing.assert_close(vig.resize_position_embedding(net.pos_embed, (4, 4)), net.pos_embed, rtol=0, atol=0)


# ---------------------------------------------------------------------- training


def test_every_parameter_gets_a_gradient(name):
    """Distributed training waits for every parameter that asks for a gradient."""
    net = make(name).train()
    total(net(image(2, 3, 64, 96))).backward()
    assert [k for k, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_gradients_in_eval_mode(name):
    """Behind frozen parts, for heat maps, for distillation: they are those of training at the same merge factor."""
    net = make(name, **({"eval_merge": 0.5} if name == "plain" else {}))
    results = []
    for mode in (True, False):
        x = image(2, 3, 40, 56).requires_grad_()
        total(net.train(mode)(x)).backward()
        results.append((x.grad, [p.grad.clone() for p in net.parameters()]))
        net.zero_grad()
    torch.testing.assert_close(results[0], results[1])
    assert results[0][0].abs().max() > 0


def test_merge_factor(monkeypatch):
    """1/2 in training; in evaluation 1/4 for the plain family, unless asked otherwise, and 1/2 for the pyramid."""
    scales = []

    def record(*args, scale, **kwargs):
        scales.append(scale)
        return attention(*args, scale=scale, **kwargs)

    attention = bidirectional_gla.bidirectional_gla
    monkeypatch.setattr(bidirectional_gla, "bidirectional_gla", record)
    key = 4**-0.5
    for net, evaluating in ((make("plain"), 0.25), (make("plain", eval_merge=0.5), 0.5), (make("pyramid"), 0.5)):
        scales.clear()
        net.train()(image(1, 3, 32, 32))
        assert set(scales) == {0.5 * key}
        scales.clear()
        net.eval()(image(1, 3, 32, 32))
        assert set(scales) == {evaluating * key}


def test_parts_after_the_last_output_hold_no_gradients(name):
    net = make(name, out_indices=(0, 1)).train()
    total(net(image(2, 3, 32, 48))).backward()
    asking = {k: p for k, p in net.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in asking.values())
    later = ("blocks.2", "blocks.3", "norm.") if name == "plain" else ("stages.2", "stages.3")
    assert not any(k.startswith(later) for k in asking)
    assert any(k.startswith(later) for k in net.state_dict())


def test_checkpointing_gives_the_same_values_and_gradients(name):
    check_checkpointing(functools.partial(make, name))


def test_checkpointing_behind_a_frozen_stem(name):
    net = make(name, with_cp=True, frozen_stages=1).train()
    total(net(image(1, 3, 32, 32))).backward()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())


def test_checkpointing_stores_less(name):
    check_checkpointing_stores_less(functools.partial(make, name), 128)


@pytest.mark.parametrize("frozen_stages", [-1, 0, 2, 4])
def test_frozen_stages(name, frozen_stages):
    net = make(name, frozen_stages=frozen_stages, drop_path_rate=0.3)
    plain = name == "plain"
    frozen = ["patch_embed.", "pos_embed"] if frozen_stages >= 0 else []
    for i in range(frozen_stages):
        frozen += [f"blocks.{i}."] if plain else [f"stages.{i}.", f"norm{i}."]
    if plain and frozen_stages == 4:
        frozen += ["norm."]
    for _ in range(2):
        assert {k for k, p in net.named_parameters() if not p.requires_grad} == {
            k for k, _ in net.named_parameters() if k.startswith(tuple(frozen))
        }
        parts = net.blocks if plain else net.stages
        assert [part.training for part in parts] == [i >= frozen_stages for i in range(4)]
        assert net.patch_embed.training == (frozen_stages < 0)
        net.eval()
        net.train()


def test_norm_eval_is_accepted(name):
    assert make(name, norm_eval=True).train().training


def test_drop_path_rates():
    net = make("plain", drop_path_rate=0.3)
    assert [b.drop_path.drop_prob for b in net.blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    net = make("pyramid", drop_path_rate=0.4)
    rates = [block.drop_path.drop_prob for stage in net.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    with torch.device("meta"):
        assert ViG("base").blocks[11].drop_path.drop_prob == pytest.approx(0.5)
        assert ViGH("base").stages[3].blocks[1].drop_path.drop_prob == pytest.approx(0.6)
        assert ViGH("base", drop_path_rate=0.0).stages[3].blocks[1].drop_path.drop_prob == 0


def test_drop_path_acts_in_training_only(name):
    net, x = make(name, drop_path_rate=0.9), image(4, 3, 32, 32)
    net.eval()
    torch.testing.assert_close(net(x)[3], net(x)[3])
    net.train()
    assert not torch.allclose(net(x)[3], net(x)[3])


@torch.no_grad()
def test_dropped_branches_leave_the_stream_alone():
    """With every branch of a block dropped, the block is the identity; kept ones are rescaled."""
    net = make("plain", drop_path_rate=0.5).train()
    block = net.blocks[3]
    x = image(64, 1, 1, 16)
    torch.manual_seed(1)
    out = block(x).total()
    kept = (out != x).flatten(1).any(1)
    assert 0.6 < kept.float().mean() < 0.9  # three of four keep at least one of two branches
    block.drop_path.drop_prob = 0.0
    y, residual, _ = block(x)
    both = out - x
    want = (y + residual) - x
    # Where only the mixer's branch survived, the result is twice that branch.
    mixed = block.mixer(block.norm1(x)[0])
    only_mixer = ((both - 2 * mixed).abs().amax((1, 2, 3)) < 1e-5).sum()
    assert 8 <= only_mixer <= 24
    assert not torch.allclose(both[kept], want[kept])


def test_state_dict_round_trip(tmp_path, name):
    net, other = make(name).eval(), make(name).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    check_state_dict_round_trip(net, other, tmp_path)


# ---------------------------------------------------------------------- precision


def test_bfloat16_autocast(name):
    net, x = make(name), image(2, 3, 40, 56)
    with torch.no_grad():
        want = net.train()(x)
    with torch.autocast("cpu", torch.bfloat16):
        outs = net(x)
        loss = total(out.float() for out in outs)
    loss.backward()
    for a, b in zip(outs, want, strict=True):
        assert (a - b).norm() < 0.03 * b.norm()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights(name, dtype):
    net, x = make(name).eval(), image(2, 3, 40, 56)
    want = net(x)
    for a, b in zip(net.to(dtype)(x.to(dtype)), want, strict=True):
        assert a.dtype == dtype
        assert (a.float() - b).norm() < 0.05 * b.norm()


@torch.no_grad()
def test_float64(name):
    net, x = make(name).eval(), image(2, 3, 40, 56)
    want = net(x)
    for a, b in zip(net.double()(x.double()), want, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a.float(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [ViG, ViGH])
def test_fresh_models_train_in_float16(family):
    """At the start the attention's result is far below the smallest float16; its share must not vanish."""
    torch.manual_seed(0)
    mixer = BidirectionalGLA(192, head_dims=64 if family is ViG else 32, xavier_init=family is ViG)
    if family is ViGH:
        for linear in (mixer.in_proj, mixer.decay_proj, mixer.out_proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
    mixer.gate.bias.data.fill_(20.0)  # the gate shows the long context alone
    x = image(1, 5, 7, 192)
    want = mixer(x)
    total([want]).backward()
    gradient = mixer.in_proj.weight.grad[:192].clone()  # of queries and keys
    assert gradient.abs().max() > 0
    mixer.zero_grad()
    with torch.autocast("cpu", torch.float16):
        out = mixer(x)
    assert (out - want).norm() < 0.01 * want.norm()  # 0.0035 at most when written
    (64 * total([out.float()])).backward()  # a scaled loss, as with the gradient scaler
    assert (mixer.in_proj.weight.grad[:192] / 64 - gradient).norm() < 0.01 * gradient.norm()  # 0.0009


def test_meta_device(name):
    """Shapes without arithmetic, as the FLOP counter uses it."""
    family, arch = SMALL[name]
    with torch.device("meta"):
        outs = family(arch, out_indices=(0, 3))(torch.empty(1, 3, 64, 96))
    want = [(1, 16, 4, 6)] * 2 if name == "plain" else [(1, 16, 16, 24), (1, 128, 2, 3)]
    assert [tuple(out.shape) for out in outs] == want


def test_compiles_without_graph_breaks(name):
    net, x = make(name, out_indices=(0, 1)).train(), image(2, 3, 40, 56)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    results = []
    for run in (net, compiled):
        outs = run(x)
        total(outs).backward()
        results.append((outs, [None if p.grad is None else p.grad.clone() for p in net.parameters()]))
        net.zero_grad()
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_exported_program_serves_other_sizes(name):
    net = make(name, out_indices=(0, 1)).eval()
    size = {2: torch.export.Dim("height", min=32, max=512), 3: torch.export.Dim("width", min=32, max=512)}
    program = torch.export.export(net, (image(1, 3, 75, 64),), dynamic_shapes={"x": size}).module()
    for shape in ((64, 64), (101, 50)):  # the first has the grid of the stored position embedding
        x = image(1, 3, *shape)
        torch.testing.assert_close(program(x), net(x))


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
    before = copy.deepcopy(model.state_dict())
    model.init_weights()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


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
    assert net.get_layer_depth(parameter, "backbone.") == (depth, depths)
    if parameter.startswith("backbone."):
        assert net.get_layer_depth(parameter.removeprefix("backbone.")) == (depth, depths)


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
