"""Layers and initialisation functions."""

import math

import pytest
import torch
from torch import nn

from mmvssm.models.layers import (
    Conv2d,
    DropPath,
    Linear,
    LocalityGate,
    PatchMerging,
    SwiGLU,
    build_activation,
    conv_channel_last,
    converted,
    drop_casts,
    drop_path_rates,
    swiglu_width,
)
from mmvssm.models.layers.converted import weights_converted
from mmvssm.models.layers.patch_embed import image_to_channel_last
from mmvssm.models.mixers.ssm_init import init_A_log_, init_D_, init_dt_proj_, init_x_proj_, inverse_softplus


def test_patch_merging_order():
    """Channels of the gathered 2x2 neighbourhood: (0, 0), (1, 0), (0, 1), (1, 1) as (row, column)."""
    merge = PatchMerging(1, 4)
    merge.norm = nn.Identity()
    nn.init.eye_(merge.reduction.weight)
    x = torch.arange(6.0).reshape(1, 2, 3, 1)  # rows 0 1 2 and 3 4 5
    assert merge(x)[0, 0].tolist() == [[0, 3, 1, 4], [2, 5, 0, 0]]
    merge.odd_size = "crop"
    assert merge(x)[0, 0].tolist() == [[0, 3, 1, 4]]


@pytest.mark.parametrize(
    ("dtype", "in_autocast"),
    [(torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16), (torch.float64, torch.float64)],
)
def test_image_is_copied_once(dtype, in_autocast):
    image = torch.randn(2, 3, 4, 5, dtype=dtype)
    want = image.permute(0, 2, 3, 1)
    plain = image_to_channel_last(image)
    with torch.autocast("cpu", torch.bfloat16):
        converted = image_to_channel_last(image)
    assert plain.is_contiguous()
    assert converted.is_contiguous()
    assert torch.equal(plain, want)
    assert plain.dtype == dtype
    assert torch.equal(converted, want.to(in_autocast))
    assert converted.dtype == in_autocast


class Twice(nn.Module):
    """Uses a weight twice and tells how autocast treats it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    @drop_casts
    def forward(self, x):
        return self.layer(self.layer(x)), torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("grad", [False, True])
def test_casts_are_kept_for_gradients_only(grad):
    net, x = Twice(), torch.randn(2, 3)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        y, kept = net(x)
        assert torch.is_autocast_cache_enabled()
    assert kept is grad
    assert y.dtype == torch.bfloat16
    with torch.set_grad_enabled(grad):  # without autocast nothing is touched
        assert net(x)[1] is True


@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (1, 1, 1, 3), (2, 1, 6, 3)])
def test_channel_last_convolution(shape):
    conv, x = nn.Conv2d(3, 4, 3, padding=1), torch.randn(shape)
    out = conv_channel_last(conv, x)
    assert out.is_contiguous()
    torch.testing.assert_close(out, conv(x.permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1))


def test_drop_path_keeps_the_mean():
    torch.manual_seed(0)
    drop = DropPath(0.25).train()
    out = drop(torch.ones(4000, 2, 3))
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (out == out[:, :1, :1]).all()  # a sample is dropped as a whole
    assert out.mean() == pytest.approx(1, abs=0.05)
    assert drop.eval()(out) is out


def test_factors_of_drop_path():
    """The same as :meth:`DropPath.forward`, as factors for an operator that multiplies by itself."""
    drop = DropPath(0.25).train()
    scale = drop.sample_scale(torch.ones(4000, 2, dtype=torch.bfloat16))
    assert scale.shape == (4000,)
    assert scale.dtype == torch.float32
    assert scale.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert scale.mean() == pytest.approx(1, abs=0.05)
    assert drop.eval().sample_scale(scale) is None
    assert DropPath(0.0).train().sample_scale(scale) is None


def test_drop_path_rates():
    assert drop_path_rates(0.3, (1, 2, 1)) == [[0.0], pytest.approx([0.1, 0.2]), [pytest.approx(0.3)]]
    assert drop_path_rates(0.3, (1,)) == [[0.0]]


def test_activation_names():
    assert isinstance(build_activation(None), nn.Identity)
    x = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(build_activation("gelu")(x), x * 0.5 * (1 + torch.erf(x / math.sqrt(2))))
    with pytest.raises(ValueError, match="out_act='tanh' is not an activation; choose one of None, 'gelu'"):
        build_activation("tanh", "out_act")


def test_inverse_softplus():
    y = torch.tensor([1e-4, 1e-3, 0.1, 5.0])
    torch.testing.assert_close(nn.functional.softplus(inverse_softplus(y)), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scan_initialisation(dtype):
    torch.manual_seed(0)
    A_log = init_A_log_(torch.empty(8, 16, dtype=dtype))
    torch.testing.assert_close(A_log[3].exp(), torch.arange(1.0, 17).to(dtype), rtol=2e-2, atol=0)
    weight, bias = torch.empty(4, 64, 9, dtype=dtype), torch.empty(4, 64, dtype=dtype)
    init_dt_proj_(weight, bias, dt_floor=0.01)
    assert weight.abs().max() <= 1 / 3
    steps = nn.functional.softplus(bias.float())
    assert steps.min() == pytest.approx(0.01, rel=2e-2)  # the floor acts: draws begin at 0.001
    assert steps.max() <= 0.102
    assert init_x_proj_(torch.empty(4, 5, 16, dtype=dtype)).abs().max() <= 0.25
    assert (init_D_(torch.empty(8, dtype=dtype)) == 1).all()


def test_swiglu_widths():
    """Those of the released weights: multiples of 256 in the plain family, of 32 in the pyramid."""
    assert [swiglu_width(C, 256) for C in (192, 384, 768)] == [512, 1024, 2048]
    assert [swiglu_width(C, 32) for C in (96, 192, 384, 768)] == [256, 512, 1024, 2048]
    assert [swiglu_width(C, 32) for C in (128, 256, 512, 1024)] == [352, 704, 1376, 2752]


def test_weights_are_converted_together():
    """In inference under autocast, and with the results of autocast's own conversion."""
    block = nn.Sequential(Conv2d(4, 4, 3, groups=4), nn.Flatten(2), Linear(4, 6), Linear(6, 5, bias=False))
    x = torch.randn(2, 4, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        want = block(x)
        dtypes = lambda: {converted._converted(p).dtype for p in block.parameters()}  # noqa: E731
        with weights_converted(block):
            assert dtypes() == {torch.float32}  # gradients want the parameters themselves
        with torch.no_grad():
            with weights_converted(block):
                assert dtypes() == {torch.bfloat16}
                assert torch.equal(block(x), want)
            assert dtypes() == {torch.float32}
            with pytest.raises(RuntimeError), weights_converted(block):
                block(x[:, :3])
            assert dtypes() == {torch.float32}
    with torch.no_grad(), weights_converted(block):
        assert dtypes() == {torch.float32}


def test_which_weights_are_not_converted():
    conv = Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    linear = Linear(4, 4, bias=False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), weights_converted(nn.ModuleList([conv, linear])):
        assert converted._converted(conv.weight) is conv.weight  # its layout would be lost
        assert converted._converted(linear.weight).dtype == torch.bfloat16
        linear.weight.data = torch.ones(5, 4)  # as when shards are put together
        assert linear(torch.ones(1, 4)).tolist() == [[4.0] * 5]


def test_swiglu():
    mlp, x = SwiGLU(6, 8), torch.randn(2, 5, 7, 6)
    a, b = mlp.fc1(x)[..., :8], mlp.fc1(x)[..., 8:]
    torch.testing.assert_close(mlp(x), mlp.fc2(nn.functional.silu(a) * b))


@pytest.mark.parametrize("act", [None, "silu", "gelu", "relu"])
def test_locality_gate(act):
    gate = LocalityGate(32, 8, eps=1e-3, act=act)
    nn.init.normal_(gate.norm.weight)
    nn.init.normal_(gate.bias)
    long, x, logits = torch.randn(3, 2, 5, 4, 8).unbind()
    s = (logits + gate.bias.view(4, 8)).sigmoid()
    want = s * long + (1 - s) * nn.functional.rms_norm(x, (8,), gate.norm.weight, 1e-3)
    torch.testing.assert_close(gate(long, x, logits), build_activation(act)(want))
    with pytest.raises(ValueError, match="out_act='tanh' is not an activation"):
        LocalityGate(32, 8, act="tanh")
