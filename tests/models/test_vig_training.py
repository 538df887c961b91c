"""Training of ViG and ViG-H: gradients, checkpointing, freezing, stochastic depth, precision, tracing."""

import functools
import weakref

import pytest
import torch
from torch import nn

from mmvssm.models import ViG, ViGH
from mmvssm.models.backbones.vig import ViGBlock
from mmvssm.models.mixers import BidirectionalGLA, bidirectional_gla

from .common import (
    check_checkpointing,
    check_checkpointing_stores_less,
    check_gradients_of_unfrozen,
    check_no_gradients_behind,
    check_state_dict_round_trip,
    image,
    total,
)
from .small_vig import SMALL, make


@pytest.fixture(params=SMALL)
def name(request):
    return request.param


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
    later = ("blocks.2", "blocks.3", "norm.") if name == "plain" else ("stages.2", "stages.3")
    check_no_gradients_behind(make(name, out_indices=(0, 1)).train(), later)


def test_checkpointing_gives_the_same_values_and_gradients(name):
    check_checkpointing(functools.partial(make, name))


def test_checkpointing_behind_a_frozen_stem(name):
    check_gradients_of_unfrozen(make(name, with_cp=True, frozen_stages=1).train())


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
@torch.no_grad()
def test_inference_frees_what_a_block_has_used(name):
    net, seen, alive = make(name).eval(), [], []
    blocks = [m for m in net.modules() if isinstance(m, ViGBlock)]

    def enters(block, args):
        seen.append([weakref.ref(t) for t in args[0] if t is not None])

    def leaves(mlp, args, result):
        alive.append([ref() is not None for ref in seen[-1]])

    for block in blocks:
        block.register_forward_pre_hook(enters)
        block.mlp.register_forward_hook(leaves)
    net(image(1, 3, 64, 64))
    assert len(alive) == len(blocks)
    # The first block of a stage is left out: its stream is the residual already, which norms pass on as it is.
    behind_another = [found for found in alive if len(found) == 2]
    assert behind_another
    assert not any(map(any, behind_another))


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
