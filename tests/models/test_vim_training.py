"""Training of Vim: gradients, checkpointing, freezing, stochastic depth, precision."""

import copy
import functools
import pickle
import weakref

import pytest
import torch
from torch import nn

from mmvssm.models import Vim
from mmvssm.models.mixers import BidirectionalMamba, bidirectional_mamba

from .common import (
    check_checkpointing,
    check_checkpointing_stores_less,
    check_gradients_of_unfrozen,
    check_no_gradients_behind,
    check_state_dict_round_trip,
    image,
    total,
)
from .small_vim import SMALL, VARIANTS, make


@pytest.fixture(params=VARIANTS)
def name(request):
    return request.param


# ---------------------------------------------------------------------- training


def test_every_parameter_gets_a_gradient(name):
    """Distributed training waits for every parameter that asks for a gradient."""
    net = make(name).train()
    total(net(image(2, 3, 32, 48))).backward()
    without = [k for k, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("out_norm", ["shared", "each", None])
def test_blocks_after_the_last_output_hold_no_gradients(out_norm):
    check_no_gradients_behind(make(out_indices=(0, 1), out_norm=out_norm).train(), ("layers.2", "layers.3"))


def test_checkpointing_gives_the_same_values_and_gradients(name):
    check_checkpointing(functools.partial(make, name))


def test_checkpointing_behind_a_frozen_stem():
    check_gradients_of_unfrozen(make(with_cp=True, frozen_stages=1).train())


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
