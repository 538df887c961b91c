"""The ViG and ViG-H backbones: variants, outputs, position embedding. Reference outputs are in test_vig_golden.py."""

import pytest
import torch
from torch import nn

from mmvssm.models import ViG, ViGH
from mmvssm.models.backbones import vig

from .common import (
    check_batch_independence,
    image,
)
from .small_vig import SMALL, make

# Published parameter counts, with the classifier of 1000 classes.
PARAMETERS = {
    (ViG, "tiny"): 5_834_536,
    (ViG, "small"): 22_615_144,
    (ViG, "base"): 89_022_184,
    (ViGH, "tiny"): 28_600_680,
    (ViGH, "small"): 50_051_688,
    (ViGH, "base"): 88_904_360,
}


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
