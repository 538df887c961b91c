"""Counting of operations: hand-calculated layers, both conventions, whole models, the command line."""

import pytest
import torch
from torch import nn

from mmvssm.analysis import count_flops, count_parameters, model_cost
from mmvssm.models import VMamba
from mmvssm_kernels import (
    ScanParameters,
    add_norm,
    bidirectional_gla,
    bidirectional_selective_scan,
    causal_conv1d,
    locality_gate,
    selective_scan,
    selective_scan_2d,
    swiglu,
)
from tests.helpers import ROOT

B, D, H, W, N, R = 2, 6, 5, 7, 3, 4


def both(run, model: nn.Module | None = None) -> tuple[int, int]:
    model = nn.Identity() if model is None else model
    return tuple(count_flops(run, model, convention).total for convention in ("papers", "hardware"))


@pytest.mark.parametrize(
    ("layer", "shape", "multiply_adds", "others"),
    [
        (nn.Linear(8, 3), (B, 5, 8), B * 5 * 8 * 3, 0),
        (nn.Conv2d(4, 6, 3, padding=1), (B, 4, H, W), B * 6 * 4 * 9 * H * W, 0),
        (nn.Conv2d(4, 4, 3, stride=2, groups=4), (1, 4, 9, 7), 4 * 9 * 4 * 3, 0),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 5, 3), 4 * 6 * 4 * 15, 0),
        (nn.LayerNorm(8), (B, 5, 8), 0, 5 * B * 5 * 8),
        (nn.LayerNorm(8, elementwise_affine=False), (B, 5, 8), 0, 4 * B * 5 * 8),
        (nn.GroupNorm(2, 4), (B, 4, H, W), 0, 5 * B * 4 * H * W),
        (nn.BatchNorm2d(4).eval(), (B, 4, H, W), 0, 2 * B * 4 * H * W),
        (nn.AdaptiveAvgPool2d(1), (B, 4, H, W), 0, B * 4 * H * W),
        (nn.AdaptiveAvgPool2d(2), (B, 4, H, W), 0, B * 4 * H * W),
        (nn.Upsample(scale_factor=2, mode="bilinear"), (B, 4, H, W), 0, B * 4 * 4 * H * W),
        (nn.GELU(), (B, 4), 0, 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_layers(layer, shape, multiply_adds, others):
    x = torch.randn(shape)
    assert both(lambda: layer(x), layer) == (multiply_adds + others, 2 * multiply_adds + others)


def test_selective_scan():
    u, delta = torch.randn(B, D, 11), torch.rand(B, D, 11)
    A, weights = -torch.rand(D, N), torch.randn(B, N, 11)
    expected = (9 * N + 1) * B * D * 11
    assert both(lambda: selective_scan(u, delta, A, weights, weights)) == (expected, expected)


def test_selective_scan_2d():
    x = torch.randn(B, D, H, W)
    arguments = (torch.randn(4, R + 2 * N, D), torch.randn(4, D, R), torch.randn(4, D), torch.rand(4 * D, N))
    scan = (9 * N + 1) * 4 * B * D * H * W
    projections = 4 * B * H * W * (D * (R + 2 * N) + R * D)
    counts = both(lambda: selective_scan_2d(x, *arguments, torch.ones(4 * D)))
    assert counts == (scan + projections, scan + 2 * projections)


@pytest.mark.parametrize("directions", [1, 2])
def test_bidirectional_selective_scan(directions):
    shapes = (D, 4), (D,), (R + 2 * N, D), (D, R), (D,), (D, N), (D,)
    parameters = ScanParameters(*map(torch.rand, shapes))
    backward = parameters if directions == 2 else None
    tokens = directions * B * 11
    multiply_adds = tokens * D * (4 + R + 2 * N + R)
    counts = both(lambda: bidirectional_selective_scan(torch.randn(B, 11, 2 * D), parameters, backward))
    scan = (9 * N + 1) * tokens * D
    assert counts == (scan + multiply_adds, scan + 2 * multiply_adds)


@pytest.mark.parametrize("norm", [False, True])
def test_bidirectional_gla(norm):
    heads, keys, values, length = 3, 4, 8, 11
    q, v = torch.randn(B, length, heads, keys), torch.randn(B, length, heads, values)
    weight = torch.ones(values) if norm else None
    multiply_adds = 4 * B * length * heads * keys * values
    extra = 4 * B * length * heads * values if norm else 0
    counts = both(lambda: bidirectional_gla(q, q, v, q, q, gate_normalizer=16, norm_weight=weight))
    assert counts == (multiply_adds + extra, 2 * multiply_adds + extra)


@pytest.mark.parametrize(("norm", "operations"), [("rms", 4), ("layer", 5)])
def test_add_norm(norm, operations):
    x, weight = torch.randn(B, 5, 8), torch.ones(8)
    expected = operations * B * 5 * 8
    assert both(lambda: add_norm(x, x, weight, norm=norm)) == (expected, expected)


@pytest.mark.parametrize("grad", [False, True])
def test_softmax_attention(grad):
    """Two products: queries with keys, and the result with values."""
    q, k, v = torch.randn(B, 3, 11, 8), torch.randn(B, 3, 7, 8), torch.randn(B, 3, 7, 8)
    multiply_adds = 2 * B * 3 * 11 * 7 * 8
    counts = both(lambda: nn.functional.scaled_dot_product_attention(q.requires_grad_(grad), k, v))
    assert counts == (multiply_adds, 2 * multiply_adds)


def test_causal_conv1d():
    multiply_adds = B * 6 * 11 * 3
    counts = both(lambda: causal_conv1d(torch.randn(B, 6, 11), torch.randn(6, 3), padding="same"))
    assert counts == (multiply_adds, 2 * multiply_adds)


def test_gates():
    """The norm inside counts, activations and products do not."""
    x = torch.randn(B, 5, 2, 8)
    assert both(lambda: locality_gate(x, x, x, torch.ones(8))) == (4 * B * 5 * 16,) * 2
    assert both(lambda: swiglu(x)) == (0, 0)


def test_counts_of_modules_add_up():
    model = nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6)))
    count = count_flops(lambda: model(torch.zeros(3, 4)), model)
    assert count.by_module == {"": 240, "0": 60, "1": 180, "1.0": 90, "1.1": 90}
    assert count.total == sum(count.by_operator.values()) == 240


def test_containers_that_are_never_called_hold_the_sum_of_their_parts():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x):
            return self.parts[1](self.parts[0](x))

    model = Parts()
    count = count_flops(lambda: model(torch.zeros(1, 4)), model)
    assert count.by_module == {"": 32, "parts": 32, "parts.0": 16, "parts.1": 16}


def test_nothing_is_computed_and_the_model_is_left_as_it_was():
    model = VMamba(dict(embed_dims=8, depths=(1, 1, 1, 1)))
    cost = model_cost(model, (4096, 4096))  # minutes and gigabytes, if it were run
    assert cost.flops.total > 5e9
    assert model.training
    assert not any(type(p).__name__ == "FakeTensor" for p in model.parameters())
    assert cost.parameters == count_parameters(model) == sum(p.numel() for p in model.parameters())


def test_cost_is_linear_in_the_tokens():
    model = VMamba(dict(embed_dims=8, depths=(1, 1, 1, 1)))
    small, wide = (model_cost(model, shape).flops.total for shape in ((64, 96), (64, 192)))
    assert wide == 2 * small


@pytest.mark.parametrize("shape", [(64,), (3, 64, 64, 1), (0, 64), (64.0, 64)])
def test_bad_shape(shape):
    with pytest.raises(ValueError, match="shape must be"):
        model_cost(VMamba(dict(embed_dims=8, depths=(1, 1, 1, 1))), shape)


def test_bad_convention():
    with pytest.raises(ValueError, match="convention must be one of"):
        count_flops(lambda: None, nn.Identity(), "macs")


def test_command_line_for_every_task(capsys):
    """Whole models of the three libraries; the published detector and segmentor figures hold."""
    from tests.tools.conftest import load_tool

    main = load_tool("analysis_tools/get_flops").main
    folder = ROOT / "configs" / "vmamba"
    for stem, expected in {
        "vmamba-tiny-s1l8_8xb128_in1k": "multiply-add=1  4,905,609,984 (4.906 G",
        "mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco": "(271.",  # 271 G
        "vmamba-tiny-s1l8_upernet_4xb4-160k_ade20k-512x512": "(948.",  # 949 G with the resizing of the result
    }.items():
        assert main([str(folder / f"{stem}.py")]) == 0
        assert expected in capsys.readouterr().out
    assert main([str(folder / "vmamba-tiny-s1l8_8xb128_in1k.py"), "--shape", "75", "107"]) == 0
    assert "3 x 75 x 107" in capsys.readouterr().out
    assert main([str(folder / "vmamba-tiny-s1l8_8xb128_in1k.py"), "--shape", "1", "2", "3"]) == 2
    assert "--shape" in capsys.readouterr().err


def test_command_line_writes_json_and_takes_names(tmp_path, capsys):
    import json

    from tests.tools.conftest import load_tool

    main = load_tool("analysis_tools/get_flops").main
    assert main(["vmamba-tiny-s1l8", "--shape", "64", "--depth", "1", "--json", str(tmp_path / "f.json")]) == 0
    found = json.loads((tmp_path / "f.json").read_text())
    assert [row["module"] for row in found["modules"]] == ["", "backbone", "neck", "head"]
    whole, *parts = found["modules"]
    for key in ("parameters", "multiply_add_1", "multiply_add_2"):
        assert found[key] == whole[key] == sum(part[key] for part in parts)
    for key, operators in found["operators"].items():
        assert sum(operators.values()) == found[key]
        assert operators["mmvssm.selective_scan_2d"] > 0
    assert found["multiply_add_1"] < found["multiply_add_2"] < 2 * found["multiply_add_1"]  # scans and norms count once
    assert "multiply-add=2" in capsys.readouterr().out
    assert main(["vmamba-tinny", "--shape", "64"]) == 2
    assert "did you mean" in capsys.readouterr().err
