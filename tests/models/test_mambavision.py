"""The MambaVision backbone: surface, windows, sizes, training. Reference outputs are in test_mambavision_golden.py."""

import copy
import functools

import pytest
import torch
from mmengine.model import BaseModule
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmvssm.models import MambaVision
from mmvssm.models.layers import WindowGrid, merge_windows, partition_windows
from mmvssm.models.mixers import MambaVisionMixer, SelfAttention, mambavision

from .common import (
    check_batch_independence,
    check_checkpointing,
    check_checkpointing_stores_less,
    check_state_dict_round_trip,
    image,
    total,
)

# Measured on the published networks, with the classifier of 1000 classes.
PARAMETERS = {
    "t": 31_794_248,
    "t2": 35_104_008,
    "s": 50_140_584,
    "b": 97_685_288,
    "l": 227_961_048,
    "l2": 241_554_824,
    "b-21k": 97_685_288,
    "l-21k": 227_961_048,
    "l2-512-21k": 241_554_824,
    "l3-256-21k": 739_570_472,
    "l3-512-21k": 739_570_472,
}
SMALL = {
    "plain": dict(embed_dims=8, stem_dims=8, depths=(1, 1, 2, 2), num_heads=(2, 4), window_size=(4, 3)),
    "scaled": dict(
        embed_dims=8, stem_dims=8, depths=(1, 1, 3, 2), num_heads=(2, 2), window_size=(4, 3), layer_scale=0.5
    ),
}
STOCK_INIT = [
    dict(type="TruncNormal", layer="Linear", std=0.02, bias=0.0),
    dict(type="Constant", layer="LayerNorm", val=1.0, bias=0.0),
]


def make(name="plain", **kwargs) -> MambaVision:
    torch.manual_seed(0)
    net = MambaVision(SMALL[name], **kwargs)
    with torch.no_grad():  # larger than at the start of training, so that every branch shows in the output
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        for norm in batch_norms(net):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 1.5)
    return net


def batch_norms(net):
    return [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.fixture(params=SMALL)
def name(request):
    return request.param


# ---------------------------------------------------------------------- variants


@pytest.mark.parametrize("arch", PARAMETERS)
def test_parameter_count(arch):
    with torch.device("meta"):
        net = MambaVision(arch, out_indices=(3,))
        head = nn.Linear(net.out_channels[-1], 1000)
    assert sum(p.numel() for p in (*net.parameters(), *head.parameters())) == PARAMETERS[arch]


def test_all_published_variants_are_listed():
    assert set(MambaVision.arch_zoo) == set(PARAMETERS)


def test_arch_dict_equals_name():
    arch = dict(embed_dims=96, depths=[3, 3, 7, 5], stem_dims=64, num_heads=[8, 16], window_size=[14, 7])
    with torch.device("meta"):
        a, b = MambaVision("s"), MambaVision(arch)
    assert {k: v.shape for k, v in a.state_dict().items()} == {k: v.shape for k, v in b.state_dict().items()}
    assert a.window_size == b.window_size == (14, 7)


def test_scans_come_first():
    with torch.device("meta"):
        net = MambaVision(dict(embed_dims=16, depths=(1, 2, 7, 4)))
    kinds = [[type(block.mixer) for block in stage.blocks] for stage in net.stages[2:]]
    assert kinds == [[MambaVisionMixer] * 4 + [SelfAttention] * 3, [MambaVisionMixer] * 2 + [SelfAttention] * 2]


def test_one_epsilon_differs():
    """1e-4 in the batch norms of the stem, 1e-5 in all other norms."""
    with torch.device("meta"):
        net = MambaVision("b", out_norm="bn")
    eps = {k: m.eps for k, m in net.named_modules() if hasattr(m, "eps")}
    assert {k for k, value in eps.items() if value == 1e-4} == {"patch_embed.norm1", "patch_embed.norm2"}
    assert {value for k, value in eps.items() if not k.startswith("patch_embed")} == {1e-5}


# ---------------------------------------------------------------------- windows


@pytest.mark.parametrize(
    ("size", "window", "fit", "grid"),
    [
        ((14, 14), 14, False, (1, 1, 14, 14)),
        ((5, 7), 14, False, (1, 1, 14, 14)),
        ((15, 28), 14, False, (2, 2, 14, 14)),
        ((5, 7), 14, True, (1, 1, 5, 7)),
        ((15, 28), 14, True, (2, 2, 8, 14)),
        ((50, 84), 32, True, (2, 3, 25, 28)),
        ((1, 1000), 32, True, (1, 32, 1, 32)),
        ((50, 84), None, False, (1, 1, 50, 84)),
    ],
)
def test_grid_of_windows(size, window, fit, grid):
    cover = WindowGrid.cover(*size, window, fit)
    assert tuple(cover) == (*size, *grid)
    assert cover.tokens == grid[2] * grid[3]
    if fit:  # less padding than windows, and no window too large
        assert cover.rows * cover.window_height - size[0] < cover.rows
        assert cover.columns * cover.window_width - size[1] < cover.columns
        assert max(cover.window_height, cover.window_width) <= window


@pytest.mark.parametrize(("window", "fit"), [(2, False), (3, False), (3, True), (8, False), (None, False)])
def test_windows_there_and_back(window, fit):
    x = image(2, 5, 7, 3)
    grid = WindowGrid.cover(5, 7, window, fit)
    tokens = partition_windows(x, grid)
    assert tokens.shape == (2 * grid.rows * grid.columns, grid.tokens, 3)
    torch.testing.assert_close(merge_windows(tokens, grid), x, rtol=0, atol=0)
    assert tokens.sum().item() == pytest.approx(x.sum().item(), abs=1e-4)  # padded with zeros


def test_order_of_windows_and_tokens():
    x = torch.arange(12.0).reshape(1, 3, 4, 1)  # rows 0 1 2 3, 4 5 6 7 and 8 9 10 11
    tokens = partition_windows(x, WindowGrid.cover(3, 4, 2))[..., 0].tolist()
    assert tokens == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 0, 0], [10, 11, 0, 0]]


def test_one_window_is_no_copy():
    x = image(2, 5, 7, 3)
    grid = WindowGrid.cover(5, 7, None)
    assert partition_windows(x, grid).data_ptr() == merge_windows(partition_windows(x, grid), grid).data_ptr()
    assert partition_windows(x, grid).data_ptr() == x.data_ptr()


@torch.no_grad()
@pytest.mark.parametrize("windows", [(4, 2), [4, "map"], "map", 8])
def test_one_window_without_padding_is_the_same_in_every_mode(windows):
    """A 64 x 64 image has maps of 4 x 4 and 2 x 2."""
    net = make(window_size=(4, 2)).eval()
    want = net(image(2, 3, 64, 64))
    other = make(window_size=windows, fit_windows=True).eval()
    for a, b in zip(other(image(2, 3, 64, 64)), want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@torch.no_grad()
def test_padding_takes_part():
    """It is not masked: larger windows give another function, on purpose."""
    x = image(1, 3, 64, 64)
    exact, padded = make(window_size="map").eval()(x), make(window_size=(5, 3)).eval()(x)
    torch.testing.assert_close(exact[1], padded[1])
    assert (exact[2] - padded[2]).abs().max() > 1e-3


@torch.no_grad()
def test_windows_do_not_see_each_other():
    """A stage of its own, since convolutions lie between the stages."""
    stage = make(window_size=(2, 2)).stages[2].eval()
    stage.downsample = None
    x = image(1, 32, 4, 6)
    y = x.clone()
    y[:, :, :2, :2] += 1  # the first of six windows
    changed = (stage(x) - stage(y)).abs().amax((0, 1)) > 0
    assert changed[:2, :2].all()
    assert changed.sum() == 4


# ---------------------------------------------------------------------- outputs


@pytest.mark.parametrize("windows", [None, "map", "fit"])
@pytest.mark.parametrize("size", [(64, 64), (75, 107), (33, 200), (1, 640), (1, 1), (640, 2)])
@torch.no_grad()
def test_shapes(size, windows):
    net = make(window_size="map" if windows == "map" else None, fit_windows=windows == "fit").eval()
    grid = tuple(-(-side // 4) for side in size)
    for i, out in enumerate(net(image(1, 3, *size))):
        assert out.shape == (1, 8 * 2**i, *grid)
        assert out.is_contiguous()
        assert out.isfinite().all()
        grid = tuple(-(-side // 2) for side in grid)


@pytest.mark.parametrize(
    ("given", "stages"), [((0, 1, 2, 3), (0, 1, 2, 3)), ([1, 3], (1, 3)), ((-2,), (2,)), (2, (2,))]
)
def test_out_indices(given, stages):
    net = make(out_indices=given).eval()
    every = make().eval()
    every.load_state_dict(net.state_dict(), strict=False)
    x = image(1, 3, 64, 64)
    outs = net(x)
    assert net.out_indices == stages
    assert net.out_channels == tuple(8 * 2**i for i in stages)
    assert net.out_strides == tuple(4 * 2**i for i in stages)
    assert {k.split(".")[0] for k in net.state_dict()} == {"patch_embed", "stages", *(f"norm{i}" for i in stages)}
    for out, i in zip(outs, stages, strict=True):
        getattr(every, f"norm{i}").load_state_dict(getattr(net, f"norm{i}").state_dict())
        torch.testing.assert_close(out, every(x)[i])


@pytest.mark.parametrize(
    ("out_norm", "out_indices", "names"),
    [
        ("auto", (3,), {"batch_norm3"}),
        ("auto", (2, 3), {"norm2", "norm3"}),
        ("ln", (3,), {"norm3"}),
        ("bn", (0, 3), {"batch_norm0", "batch_norm3"}),
        ("none", (0, 3), set()),
    ],
)
def test_output_norms(out_norm, out_indices, names):
    net = make(out_norm=out_norm, out_indices=out_indices).eval()
    bare = make(out_norm="none", out_indices=out_indices).eval()
    bare.load_state_dict({k: v for k, v in net.state_dict().items() if "norm" not in k.split(".")[0]}, strict=True)
    assert {k.split(".")[0] for k in net.state_dict()} == {"patch_embed", "stages", *names}
    x = image(2, 3, 64, 64)
    for i, out, raw in zip(out_indices, net(x), bare(x), strict=True):
        assert out.is_contiguous()
        if f"norm{i}" in names:
            norm = getattr(net, f"norm{i}")
            raw = nn.functional.layer_norm(raw.movedim(1, -1), (raw.shape[1],), norm.weight, norm.bias).movedim(-1, 1)
        elif f"batch_norm{i}" in names:
            raw = getattr(net, f"batch_norm{i}")(raw)
        torch.testing.assert_close(out, raw)


@torch.no_grad()
def test_batch_independence(name):
    check_batch_independence(make(name).eval())


@torch.no_grad()
def test_memory_layout():
    """The same for both layouts of the image; channels stay last from the stem to the last convolution."""
    net, x = make(out_norm="none").eval(), image(2, 3, 40, 56)
    seen = []
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, args, out: seen.extend([args[0], out]))
    for a, b in zip(net(x), net(x.to(memory_format=torch.channels_last)), strict=True):
        torch.testing.assert_close(a, b)
    # Cropped maps have gaps, but their channels are adjacent all the same.
    assert len(seen) == 2 * 2 * (2 + 4 + 3)
    assert all(t.stride(1) == 1 for t in seen)


@torch.no_grad()
def test_other_input_channels():
    assert make(in_channels=5).eval()(image(1, 5, 32, 32))[0].shape == (1, 8, 8, 8)


def test_img_size_is_accepted_and_unused():
    shapes = [{k: v.shape for k, v in make(img_size=size).state_dict().items()} for size in (None, 64, (64, 96))]
    assert shapes[0] == shapes[1] == shapes[2]


# ---------------------------------------------------------------------- batch norms


@torch.no_grad()
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_fused_batch_norms_give_the_same(name, memory_format):
    net = make(name).eval()
    x = image(2, 3, 75, 107).to(memory_format=memory_format)
    want = net(x)
    assert net.fuse_batch_norms() is net
    assert batch_norms(net) == []
    assert not net.training
    state = copy.deepcopy(net.state_dict())
    for a, b in zip(net(x), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    net.fuse_batch_norms()
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    with pytest.raises(ValueError, match="has removed the batch norms"):
        net.train()
    assert net.patch_embed.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert not any("norm" in k for k in net.state_dict() if k.startswith(("patch_embed", "stages.0", "stages.1")))


@torch.no_grad()
def test_fusing_keeps_the_norm_of_a_classifier():
    net = make(out_indices=(3,)).eval()
    want = net(image(2, 3, 64, 64))[0]
    torch.testing.assert_close(net.fuse_batch_norms()(image(2, 3, 64, 64))[0], want, rtol=1e-4, atol=1e-5)
    assert [k for k, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)] == ["batch_norm3"]


@torch.no_grad()
def test_fusing_half_weights_is_done_in_float32():
    net = make().eval()
    half = copy.deepcopy(net).bfloat16().fuse_batch_norms()
    block, fused = net.stages[0].blocks[0], half.stages[0].blocks[0]
    factor = block.norm1.weight.bfloat16().float() * (block.norm1.running_var.bfloat16().float() + 1e-5).rsqrt()
    want = block.conv1.weight.bfloat16().float() * factor.view(-1, 1, 1, 1)
    assert torch.equal(fused.conv1.weight, want.bfloat16())
    assert fused.conv1.bias.dtype == torch.float32
    outs = half(image(1, 3, 64, 64).bfloat16())
    assert {out.dtype for out in outs} == {torch.bfloat16}


def test_norm_eval():
    assert all(m.training for m in batch_norms(make().train()))
    net = make(norm_eval=True).train()
    assert net.training
    assert len(batch_norms(net)) == 6
    assert not any(m.training for m in batch_norms(net))
    before = copy.deepcopy(net.state_dict())
    total(net(image(2, 3, 64, 64))).backward()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is not None for p in net.parameters())


def test_batch_norms_train_by_default():
    net = make().train()
    before = copy.deepcopy(net.state_dict())
    net(image(2, 3, 64, 64))
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if k.endswith(("running_mean", "running_var", "num_batches_tracked"))}


@pytest.mark.parametrize("library", ["torch", "mmengine"])
def test_synchronised_batch_norm(library):
    from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm

    net = make().eval()
    x, want = image(2, 3, 40, 56), None
    with torch.no_grad():
        want = net(x)
    convert = nn.SyncBatchNorm.convert_sync_batchnorm if library == "torch" else convert_sync_batchnorm
    net = convert(net)
    synchronised = [m for m in net.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert [m.eps for m in synchronised] == [1e-4] * 2 + [1e-5] * 4
    with torch.no_grad():
        for a, b in zip(revert_sync_batchnorm(net).eval()(x), want, strict=True):
            torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------- training


def test_every_parameter_gets_a_gradient(name):
    """Distributed training waits for every parameter that asks for a gradient."""
    net = make(name, out_indices=(3,)).train()
    total(net(image(2, 3, 64, 96))).backward()
    # What a batch norm subtracts again has no influence.
    cancelled = {f"stages.{i}.blocks.0.conv{j}.bias" for i in (0, 1) for j in (1, 2)}
    without = {k for k, p in net.named_parameters() if p.grad is None or (k not in cancelled and not p.grad.any())}
    assert without == set()


def test_stages_after_the_last_output_hold_no_gradients():
    net = make(out_indices=(0, 1)).train()
    total(net(image(2, 3, 32, 48))).backward()
    asking = {k: p for k, p in net.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in asking.values())
    assert not any(k.startswith(("stages.2", "stages.3")) for k in asking)
    assert any(k.startswith("stages.3") for k in net.state_dict())


def test_checkpointing_gives_the_same_values_and_gradients(name):
    _, saving = check_checkpointing(functools.partial(make, name), (64, 48))
    assert all(int(norm.num_batches_tracked) == 1 for norm in batch_norms(saving))


def test_checkpointing_behind_a_frozen_stem():
    net = make(with_cp=True, frozen_stages=1).train()
    total(net(image(1, 3, 64, 64))).backward()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())


def test_checkpointing_stores_less():
    check_checkpointing_stores_less(make)


@pytest.mark.parametrize("out_norm", ["ln", "bn", "none"])
@pytest.mark.parametrize("frozen_stages", [-1, 0, 2, 4])
def test_frozen_stages(frozen_stages, out_norm):
    net = make(frozen_stages=frozen_stages, drop_path_rate=0.3, out_norm=out_norm)
    frozen = ["patch_embed."] if frozen_stages >= 0 else []
    for i in range(frozen_stages):
        frozen += [f"stages.{i}.", f"norm{i}.", f"batch_norm{i}."]
    for _ in range(2):
        assert {k for k, p in net.named_parameters() if not p.requires_grad} == {
            k for k, _ in net.named_parameters() if k.startswith(tuple(frozen))
        }
        assert [stage.training for stage in net.stages] == [i >= frozen_stages for i in range(4)]
        assert net.patch_embed.training == net.patch_embed.norm1.training == (frozen_stages < 0)
        net.eval()
        net.train()


def test_drop_path_rates():
    net = MambaVision(SMALL["plain"], drop_path_rate=0.5)
    rates = [block.drop_path.drop_prob for stage in net.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    with torch.device("meta"):
        assert MambaVision("l3-256-21k").stages[3].blocks[9].drop_path.drop_prob == pytest.approx(0.5)
        assert MambaVision("b", drop_path_rate=0.0).stages[3].blocks[4].drop_path.drop_prob == 0


def test_drop_path_acts_in_training_only():
    net, x = make(drop_path_rate=0.9, norm_eval=True), image(4, 3, 64, 64)
    net.eval()
    torch.testing.assert_close(net(x)[3], net(x)[3])
    net.train()
    assert not torch.allclose(net(x)[3], net(x)[3])


def test_drop_path_drops_windows_one_by_one():
    torch.manual_seed(0)
    stage = make(drop_path_rate=0.9, window_size=(2, 2)).stages[3].train()
    stage.downsample = None
    x = image(1, 64, 16, 16)
    same = (stage(x) == x).all(1).view(8, 2, 8, 2)  # a window with both branches of both blocks dropped is unchanged
    windows = same.all(3).all(1)
    assert (windows == same.any(3).any(1)).all()
    assert 0 < windows.sum() < windows.numel()


def test_state_dict_round_trip(tmp_path, name):
    net, other = make(name).eval(), MambaVision(SMALL[name]).eval()
    check_state_dict_round_trip(net, other, tmp_path)


@torch.no_grad()
def test_inference_and_training_paths_of_the_mixer_agree():
    """Without gradients the scan's output takes the place of its input; with them it is put beside z."""
    torch.manual_seed(0)
    mixer, x = MambaVisionMixer(16), image(2, 9, 16)
    with torch.enable_grad():
        want = mixer(x).detach()
    assert torch.equal(mixer(x), want)
    assert torch.equal(mixer(x), want)


# ---------------------------------------------------------------------- precision


def test_bfloat16_autocast(name):
    net, x = make(name, norm_eval=True), image(2, 3, 75, 56)
    with torch.no_grad():
        want = net.eval()(x)
    net.train()
    with torch.autocast("cpu", torch.bfloat16):
        outs = net(x)
        loss = total(out.float() for out in outs)
    loss.backward()
    for a, b in zip(outs, want, strict=True):
        assert (a - b).norm() < 0.03 * b.norm()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_dtype_of_the_stream_under_autocast():
    """Half, without passes in float32 between; float32 with layer scale, whose small factors half would not hold."""
    seen = {}

    def hook(block, args, output):
        seen[block.has_layer_scale] = [t.dtype for t in output[:2]]

    for name in SMALL:
        net = make(name).eval()
        net.stages[2].blocks[0].register_forward_hook(hook)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            outs = net(image(1, 3, 64, 64))
        assert {out.dtype for out in outs[:2]} == {torch.bfloat16}
    assert seen == {False: [torch.bfloat16] * 2, True: [torch.float32] * 2}


@torch.no_grad()
def test_bfloat16_weights(name):
    net, x = make(name).eval(), image(2, 3, 75, 56)
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


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_precision_of_the_scan(monkeypatch, weights):
    """Rates, skip and step bias are float32 whatever the network is in; the tokens are as the projections give them."""
    seen = []

    def record(u, delta, A, B, C, D, **kwargs):
        seen.append([t.dtype for t in (u, delta, B, C, A, D, kwargs["delta_bias"])])
        return scan(u, delta, A, B, C, D, **kwargs)

    scan = mambavision.selective_scan
    monkeypatch.setattr(mambavision, "selective_scan", record)
    with torch.autocast("cpu", torch.bfloat16):
        MambaVisionMixer(16).to(weights)(image(1, 4, 16).to(weights))
    assert seen == [[torch.bfloat16] * 4 + [torch.float32] * 3]


def test_dt_bias_enters_twice():
    """softplus(W dt + 2 b): weights were trained so. Doubling the bias in a plain scan gives the same."""
    torch.manual_seed(0)
    mixer, x = MambaVisionMixer(16), image(1, 5, 16)
    seen = {}
    scan = mambavision.selective_scan
    try:
        mambavision.selective_scan = lambda *args, **kwargs: seen.update(kwargs, delta=args[1]) or scan(*args, **kwargs)
        mixer(x)
    finally:
        mambavision.selective_scan = scan
    hidden = nn.functional.silu(
        nn.functional.conv1d(mixer.in_proj(x).mT, mixer.conv_weight[:, None], padding=1, groups=16)
    ).mT
    dt = mixer.dt_proj(mixer.x_proj(hidden[..., :8])[..., : mixer.splits[0]])
    torch.testing.assert_close(seen["delta"].mT + seen["delta_bias"], dt + mixer.dt_proj.bias)
    assert seen["delta_softplus"]


def test_meta_device(name):
    """Shapes without arithmetic, as the FLOP counter uses it."""
    with torch.device("meta"):
        outs = MambaVision(SMALL[name])(torch.empty(1, 3, 64, 96))
    assert [tuple(out.shape) for out in outs] == [(1, 8 * 2**i, 16 // 2**i, 24 // 2**i) for i in range(4)]


def test_flop_counter_sees_everything():
    """Convolutions, projections, scans and attention of T at 224, against the measured 4.46 G multiply-adds."""
    with torch.device("meta"):
        net = MambaVision("t", out_indices=(3,)).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(torch.empty(1, 3, 224, 224))
    by_name = {str(k): v for k, v in counter.get_flop_counts()["Global"].items()}
    assert any("selective_scan" in k for k in by_name)
    macs = sum(v for k, v in by_name.items() if any(part in k for part in ("mm", "convolution"))) / 2e9
    assert macs == pytest.approx(4.46, abs=0.15)  # attention is a matrix product on this device: 0.1 more


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
    before = copy.deepcopy(model.state_dict())
    model.init_weights()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


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
    assert net.get_layer_depth(parameter, "backbone.") == (depth, 18)


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
