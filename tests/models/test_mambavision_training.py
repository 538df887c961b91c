"""Training of MambaVision: gradients, checkpointing, freezing, stochastic depth, precision."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmvssm.models import MambaVision
from mmvssm.models.mixers import MambaVisionMixer, mambavision

from .common import (
    check_checkpointing,
    check_checkpointing_stores_less,
    check_gradients_of_unfrozen,
    check_no_gradients_behind,
    check_state_dict_round_trip,
    image,
    total,
)
from .small_mambavision import SMALL, batch_norms, make


@pytest.fixture(params=SMALL)
def name(request):
    return request.param


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
    check_no_gradients_behind(make(out_indices=(0, 1)).train(), ("stages.2", "stages.3"))


def test_checkpointing_gives_the_same_values_and_gradients(name):
    _, saving = check_checkpointing(functools.partial(make, name), (64, 48))
    assert all(int(norm.num_batches_tracked) == 1 for norm in batch_norms(saving))


def test_checkpointing_behind_a_frozen_stem():
    check_gradients_of_unfrozen(make(with_cp=True, frozen_stages=1).train(), side=64)


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
