"""The MambaVision backbone: variants, windows, outputs, batch norms. Reference outputs: test_mambavision_golden.py."""

import copy

import pytest
import torch
from torch import nn

from mmvssm.models import MambaVision
from mmvssm.models.layers import WindowGrid, merge_windows, partition_windows
from mmvssm.models.mixers import MambaVisionMixer, SelfAttention

from .common import (
    check_batch_independence,
    image,
    total,
)
from .small_mambavision import SMALL, batch_norms, make

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
