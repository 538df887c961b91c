"""The Vim backbone: surface, sizes, training behaviour. Reference outputs are in test_vim_golden.py."""

import copy
import functools
import math
import pickle
import weakref

import pytest
import torch
from mmengine.model import BaseModule
from torch import nn

from mmvssm.models import Vim
from mmvssm.models.layers import GridCache, class_indices, insert_class_rows, split_class_rows
from mmvssm.models.mixers import BidirectionalMamba, bidirectional_mamba

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
    "tiny": 7_148_008,
    "tiny-plus": 7_250_344,
    "small": 25_796_584,
    "small-plus": 26_001_256,
    "base": 97_598_440,
}
SMALL = dict(embed_dims=16, depth=4, patch_size=8, d_state=4)
DENSE = dict(with_cls_token=False, out_indices=(0, 1, 3), img_size=32)
VARIANTS = {
    "dense": dict(DENSE),
    "class token": dict(img_size=32, out_type="cls_token"),
    "mixer outputs": dict(DENSE, feature="mixer", out_norm="each"),
    "rope": dict(DENSE, rope=True, rope_residual=True, out_norm=None),
    "shared": dict(img_size=32, directions="shared", layer_scale=0.5, norm="layer"),
    "alternate": dict(img_size=32, directions="forward", alternate=True, cls_token="double", out_indices=(1, 3)),
}
STOCK_INIT = [
    dict(type="TruncNormal", layer="Linear", std=0.02, bias=0.0),
    dict(type="Constant", layer="LayerNorm", val=1.0, bias=0.0),
]


def make(name="dense", arch=SMALL, **kwargs) -> Vim:
    torch.manual_seed(0)
    net = Vim(arch, **{**VARIANTS[name], **kwargs})
    with torch.no_grad():  # larger than at the start of training, so that every branch shows in the output
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return net


@pytest.fixture(params=VARIANTS)
def name(request):
    return request.param


# ---------------------------------------------------------------------- variants


@pytest.mark.parametrize("arch", PARAMETERS)
def test_parameter_count(arch):
    with torch.device("meta"):
        net = Vim(arch, out_type="cls_token")
        head = nn.Linear(net.out_channels[-1], 1000)
    assert sum(p.numel() for p in (*net.parameters(), *head.parameters())) == PARAMETERS[arch]


def test_all_published_variants_are_listed():
    assert set(Vim.arch_zoo) == set(PARAMETERS)


def test_arch_dict_equals_name():
    with torch.device("meta"):
        a, b = Vim("tiny-plus"), Vim(dict(embed_dims=192, depth=24, patch_size=16, stride=8))
    assert {k: v.shape for k, v in a.state_dict().items()} == {k: v.shape for k, v in b.state_dict().items()}


# ---------------------------------------------------------------------- outputs


@pytest.mark.parametrize("size", [(32, 32), (75, 107), (33, 200), (1, 640), (1, 1), (8, 9)])
@torch.no_grad()
def test_shapes(size, name):
    net = make(name).eval()
    outs = net(image(2, 3, *size))
    grid = tuple(-(-side // 8) for side in size)
    for out in outs:
        assert out.shape == ((2, 16) if net.out_type == "cls_token" else (2, 16, *grid))
        assert out.is_contiguous()
        assert out.isfinite().all()
    assert net.out_channels == (16,) * len(outs)
    assert net.out_strides == (8,) * len(outs)


@pytest.mark.parametrize(
    ("size", "grid"), [((16, 16), (3, 3)), ((17, 24), (4, 5)), ((1, 8), (1, 1)), ((9, 12), (2, 2))]
)
@torch.no_grad()
def test_overlapping_patches(size, grid):
    net = make(arch={**SMALL, "stride": 4}).eval()
    assert [out.shape[2:] for out in net(image(1, 3, *size))] == [grid] * 3
    assert net.out_strides == (4, 4, 4)


@torch.no_grad()
def test_padding_is_at_the_bottom_and_right():
    net, x = make().eval(), image(1, 3, 21, 30)
    padded = torch.zeros(1, 3, 24, 32)
    padded[:, :, :21, :30] = x
    for a, b in zip(net(x), net(padded), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("feature", ["stream", "mixer"])
@pytest.mark.parametrize("out_norm", ["shared", "last", "each", None])
@pytest.mark.parametrize(
    ("given", "blocks"), [((0, 1, 2, 3), (0, 1, 2, 3)), ([1, 3], (1, 3)), ((2,), (2,)), (-1, (3,)), ((0, -2), (0, 2))]
)
@torch.no_grad()
def test_out_indices(given, blocks, out_norm, feature):
    """Whatever else is returned, a block's feature is the same; 'last' norms the last one only."""
    net = make(rope=True, feature=feature, out_norm=out_norm, out_indices=given, img_size=32).eval()
    assert net.out_indices == blocks
    every = make(rope=True, feature=feature, out_norm=None, out_indices=(0, 1, 2, 3), img_size=32).eval()
    every.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("norm")}, strict=True)
    x = image(2, 3, 32, 40)
    maps = every(x)
    for out, i in zip(net(x), blocks, strict=True):
        want = maps[i].permute(0, 2, 3, 1)
        if out_norm == "each":
            want = getattr(net, f"norm{i}")(want)
        elif out_norm == "shared" or (out_norm == "last" and i == blocks[-1]):
            want = net.norm(want)[0]
        torch.testing.assert_close(out, want.permute(0, 3, 1, 2), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_stream_is_the_sum_of_tokens_and_mixer_outputs():
    stream = make(out_indices=(0, 1, 2, 3), out_norm=None).eval()
    mixer = make(out_indices=(0, 1, 2, 3), out_norm=None, feature="mixer").eval()
    x = image(1, 3, 32, 32)
    tokens, grid = stream._embed(x)
    expected = tokens.transpose(1, 2).unflatten(2, grid)
    for out, addition in zip(stream(x), mixer(x), strict=True):
        expected = expected + addition
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("position", ["middle", "head", "double"])
@torch.no_grad()
def test_readouts_agree(position):
    """All read-outs are parts of the tokens."""
    arguments = dict(img_size=32, cls_token=position, with_cls_token=True, out_indices=-1)
    x = image(2, 3, 24, 40)
    tokens = make(**arguments, out_type="raw").eval()(x)[0]
    indices = class_indices(position, 15)
    patches, rows = split_class_rows(tokens, indices)
    assert tokens.shape == (2, 15 + len(indices), 16)
    results = {kind: make(**arguments, out_type=kind).eval()(x)[0] for kind in ("featmap", "cls_token", "avg_featmap")}
    torch.testing.assert_close(results["featmap"], patches.transpose(1, 2).unflatten(2, (3, 5)))
    torch.testing.assert_close(results["cls_token"], torch.cat(rows, 1).mean(1))
    torch.testing.assert_close(results["avg_featmap"], patches.mean(1))
    torch.testing.assert_close(make(**arguments, out_type="last_token").eval()(x)[0], tokens[:, -1])
    torch.testing.assert_close(insert_class_rows(patches, rows, indices), tokens)


@pytest.mark.parametrize(
    ("position", "patches", "indices"),
    [("middle", 4, (2,)), ("middle", 5, (2,)), ("middle", 1, (0,)), ("head", 4, (0,)), ("double", 4, (0, 5))],
)
def test_places_of_class_tokens(position, patches, indices):
    assert class_indices(position, patches) == indices


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
    assert make(in_channels=5).eval()(image(1, 5, 32, 32))[0].shape == (1, 16, 4, 4)


# ---------------------------------------------------------------------- position embedding


@pytest.mark.parametrize("with_cls_token", [False, True])
@torch.no_grad()
def test_position_embedding_is_resized_without_its_class_row(with_cls_token):
    net = make(with_cls_token=with_cls_token).eval()
    patches, rows = split_class_rows(net.pos_embed, class_indices("middle" if with_cls_token else None, 16))
    maps = patches.transpose(1, 2).unflatten(2, (4, 4))
    maps = nn.functional.interpolate(maps, size=(3, 7), mode="bicubic", align_corners=False)
    want = maps.flatten(2).transpose(1, 2)
    got, got_rows = split_class_rows(
        net._position_embedding((3, 7)), class_indices("middle" if with_cls_token else None, 21)
    )
    torch.testing.assert_close(got, want)
    assert all(torch.equal(a, b) for a, b in zip(got_rows, rows, strict=True))
    assert net._position_embedding((4, 4)) is net.pos_embed


def test_position_embedding_learns_at_other_sizes():
    net = make().train()
    total(net(image(1, 3, 40, 24))).backward()
    assert net.pos_embed.grad.any()


@torch.no_grad()
def test_resized_position_embedding_is_kept_and_renewed():
    net, x = make().eval(), image(1, 3, 40, 24)
    first = net(x)[0]
    kept = net._position_embedding((5, 3))
    assert net._position_embedding((5, 3)) is kept
    net.pos_embed.add_(1)  # as an optimiser or load_state_dict does
    changed = net(x)[0]
    assert not torch.allclose(first, changed)
    net.pos_embed.data.copy_(net.pos_embed.data - 1)  # as EMAHook does, which no version counter notices
    net.eval()
    torch.testing.assert_close(net(x)[0], first)


def test_what_inference_has_kept_does_not_hinder_training():
    net = make("rope")
    with torch.inference_mode():
        net.eval()(image(1, 3, 40, 24))
    total(net.train()(image(1, 3, 40, 24))).backward()
    assert net.pos_embed.grad is not None


def test_grid_cache_is_bounded():
    cache, made = GridCache(limit=2), []

    def get(key):
        return cache.get(key, lambda: made.append(key) or torch.tensor(key), torch.device("cpu"))

    assert [get(key).item() for key in (1, 2, 1, 3, 1, 2)] == [1, 2, 1, 3, 1, 2]
    assert made == [1, 2, 3, 2]


# ---------------------------------------------------------------------- training


def test_every_parameter_gets_a_gradient(name):
    """Distributed training waits for every parameter that asks for a gradient."""
    net = make(name).train()
    total(net(image(2, 3, 32, 48))).backward()
    without = [k for k, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("out_norm", ["shared", "each", None])
def test_blocks_after_the_last_output_hold_no_gradients(out_norm):
    net = make(out_indices=(0, 1), out_norm=out_norm).train()
    total(net(image(2, 3, 32, 48))).backward()
    asking = {k: p for k, p in net.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in asking.values())
    assert not any(k.startswith(("layers.2", "layers.3")) for k in asking)
    assert any(k.startswith("layers.3") for k in net.state_dict())


def test_checkpointing_gives_the_same_values_and_gradients(name):
    check_checkpointing(functools.partial(make, name))


def test_checkpointing_behind_a_frozen_stem():
    net = make(with_cp=True, frozen_stages=1).train()
    total(net(image(1, 3, 32, 32))).backward()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())


def test_checkpointing_stores_less():
    check_checkpointing_stores_less(make)


@pytest.mark.parametrize("frozen_stages", [-1, 0, 2, 4])
@pytest.mark.parametrize("out_norm", ["shared", "each"])
def test_frozen_stages(frozen_stages, out_norm):
    net = make(frozen_stages=frozen_stages, with_cls_token=True, out_norm=out_norm, drop_path_rate=0.3)
    frozen = ["patch_embed.", "pos_embed", "cls_token"] if frozen_stages >= 0 else []
    for i in range(frozen_stages):
        frozen += [f"layers.{i}.", f"norm{i}."]
    frozen += ["norm."] if frozen_stages == 4 else []
    for _ in range(2):
        assert {k for k, p in net.named_parameters() if not p.requires_grad} == {
            k for k, _ in net.named_parameters() if k.startswith(tuple(frozen))
        }
        assert [block.training for block in net.layers] == [i >= frozen_stages for i in range(4)]
        assert net.patch_embed.training == (frozen_stages < 0)
        net.eval()
        net.train()


def test_drop_path_rates():
    net = make(drop_path_rate=0.3)
    assert [block.drop_path.drop_prob for block in net.layers] == pytest.approx([0.0, 0.0, 0.1, 0.2])
    assert net.drop_path.drop_prob == pytest.approx(0.3)
    with torch.device("meta"):
        assert Vim("small").drop_path.drop_prob == pytest.approx(0.05)
        assert Vim("small", drop_path_rate=0.0).drop_path.drop_prob == 0


def test_drop_path_drops_whole_samples():
    """With a rate near one the stream after the first blocks is that of the tokens and the first mixer."""
    net = make(drop_path_rate=0.999, out_norm=None, out_indices=(0, 1, 2)).train()
    torch.manual_seed(0)
    first, second, third = net(image(64, 3, 16, 16))
    unchanged = [((a - b).flatten(1).abs().amax(1) == 0).float().mean() for a, b in ((first, second), (second, third))]
    assert all(share > 0.2 for share in unchanged)
    net.eval()
    torch.testing.assert_close(net(image(1, 3, 16, 16))[2], net(image(1, 3, 16, 16))[2])


def test_learns():
    """A small classifier tells eight images apart."""
    torch.manual_seed(0)
    model = nn.Sequential(Vim(SMALL, img_size=32, out_type="cls_token"), nn.Linear(16, 8)).train()
    x, labels = image(8, 3, 32, 32), torch.arange(8)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model[1](model[0](x)[0]), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > 1.5
    assert losses[-1] < 0.1


def test_state_dict_round_trip(tmp_path, name):
    net, other = make(name).eval(), Vim(SMALL, **VARIANTS[name]).eval()
    check_state_dict_round_trip(net, other, tmp_path)


def test_copies_are_independent():
    """Averaged models are deep copies; their position embedding is their own."""
    net, x = make("rope").eval(), image(1, 3, 40, 24)
    net(x)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(net(x)[0], other(x)[0], rtol=0, atol=0)
        other.load_state_dict({k: torch.zeros_like(v) for k, v in net.state_dict().items()})
        assert not other(x)[0].any()
        assert net(x)[0].any()


@torch.no_grad()
def test_flip_reverses_the_tokens():
    """Reversing the sequence exchanges the two directions, and a map comes back the right way round."""
    net = make(flip_ratio=2.0).eval()
    exchanged = make().eval()
    state = {}
    for name, tensor in net.state_dict().items():
        other = {"forward_scan": "backward_scan", "backward_scan": "forward_scan"}
        part = next((p for p in other if p in name), None)
        state[name.replace(part, other[part]) if part else name] = tensor
    exchanged.load_state_dict(state)
    for a, b in zip(net(image(1, 3, 24, 32)), exchanged(image(1, 3, 24, 32)), strict=True):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------- precision


@pytest.mark.parametrize("residual_in_fp32", [True, False])
def test_bfloat16_autocast(name, residual_in_fp32):
    net, x = make(name, residual_in_fp32=residual_in_fp32), image(2, 3, 40, 56)
    with torch.no_grad():
        want = net.eval()(x)
    net.train()
    with torch.autocast("cpu", torch.bfloat16):
        outs = net(x)
        loss = total(out.float() for out in outs)
    loss.backward()
    for a, b in zip(outs, want, strict=True):
        assert (a - b).norm() < 0.05 * b.norm()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("residual_in_fp32", [True, False])
@torch.no_grad()
def test_residual_stream_under_autocast(residual_in_fp32):
    seen = []
    net = make(residual_in_fp32=residual_in_fp32).eval()
    for block in net.layers:
        block.register_forward_hook(lambda module, inputs, outputs: seen.append([t.dtype for t in outputs]))
    with torch.autocast("cpu", torch.bfloat16):
        net(image(1, 3, 32, 32))
    half, single = torch.bfloat16, torch.float32
    assert seen[0] == [half, single]  # the tokens themselves are float32
    assert seen[1:] == [[half, single if residual_in_fp32 else half]] * 3


@torch.no_grad()
def test_inference_holds_no_more_than_it_needs():
    net, seen, alive, copies = make().eval(), [], [], []

    def enters(block, args):
        seen.extend(weakref.ref(t) for t in args[0] if t is not None)

    def projected(in_proj, args, xz):
        # Of the branch and the stream that came into the block, and what its norm made of them, the last is still held
        # by this call.
        seen.append(weakref.ref(args[0]))
        alive.append(sum(ref() is not None for ref in seen[:-1]))
        copies.append(torch.is_autocast_cache_enabled())

    for block in net.layers[1:]:
        block.register_forward_pre_hook(enters)
        block.mixer.in_proj.register_forward_hook(projected)
    with torch.autocast("cpu", torch.bfloat16):
        net(image(1, 3, 32, 32))
        assert torch.is_autocast_cache_enabled()
    assert len(seen) == 9
    assert alive == [0, 0, 0]
    assert copies == [False] * 3


@torch.no_grad()
def test_bfloat16_weights(name):
    net, x = make(name).eval(), image(2, 3, 40, 56)
    want = net(x)
    for a, b in zip(net.bfloat16()(x.bfloat16()), want, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b).norm() < 0.05 * b.norm()


@torch.no_grad()
def test_float64(name):
    net, x = make(name).eval(), image(2, 3, 40, 56)
    want = net(x)
    for a, b in zip(net.double()(x.double()), want, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a.float(), b, rtol=1e-4, atol=1e-5)


def test_meta_device(name):
    """Shapes without arithmetic, as the FLOP counter uses it."""
    with torch.device("meta"):
        net = Vim(SMALL, **VARIANTS[name])
        outs = net(torch.empty(1, 3, 64, 96))
    assert {tuple(out.shape) for out in outs} == {(1, 16) if net.out_type == "cls_token" else (1, 16, 8, 12)}


def test_nothing_of_a_traced_shape_is_kept():
    from torch._subclasses.fake_tensor import FakeTensorMode

    net = make("rope").eval()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        net(torch.empty(1, 3, 40, 24))
    out = net(image(1, 3, 40, 24))[0]
    assert type(out.detach()) is torch.Tensor
    assert out.isfinite().all()


@pytest.mark.parametrize("directions", ["separate", "forward"])
def test_the_inner_block_is_one_operator(monkeypatch, directions):
    calls = []

    def record(xz, forward, backward, scale):
        calls.append((tuple(xz.shape), backward is not None, scale))
        return scan(xz, forward, backward, scale)

    scan = bidirectional_mamba.bidirectional_selective_scan
    monkeypatch.setattr(bidirectional_mamba, "bidirectional_selective_scan", record)
    BidirectionalMamba(8, directions=directions)(image(1, 5, 8))
    assert calls == [((1, 5, 32), directions == "separate", 0.5 if directions == "separate" else 1.0)]


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
    before = copy.deepcopy(model.state_dict())
    model.init_weights()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


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
    assert net.get_layer_depth(parameter, "backbone.") == (depth, 26)
    if parameter.startswith("backbone."):
        assert net.get_layer_depth(parameter.removeprefix("backbone.")) == (depth, 26)


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
