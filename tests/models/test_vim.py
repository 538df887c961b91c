"""The Vim backbone: variants, outputs, position embedding. Reference outputs are in test_vim_golden.py."""

import pytest
import torch
from torch import nn

from mmvssm.models import Vim
from mmvssm.models.layers import GridCache, class_indices, insert_class_rows, split_class_rows

from .common import (
    check_batch_independence,
    image,
    total,
)
from .small_vim import SMALL, VARIANTS, make

# Published parameter counts, with the classifier of 1000 classes.
PARAMETERS = {
    "tiny": 7_148_008,
    "tiny-plus": 7_250_344,
    "small": 25_796_584,
    "small-plus": 26_001_256,
    "base": 97_598_440,
}


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
