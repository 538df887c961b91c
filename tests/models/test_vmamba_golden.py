"""VMamba against stored outputs and gradients of the official code (float64 runs on deterministic weights).

About 15 seconds on two cores, most of it the two real networks.
"""

import numpy as np
import pytest
import torch

from mmvssm.models import VMamba

from .golden import classifier, convert, dense_backbone, golden_fill, image_of, read_arrays, read_keys

MINIATURES = ("micro_v0", "micro_v05_noz", "micro_v05_gated", "micro_v05_nozact", "micro_v05_noz_oact")
NETWORKS = (*MINIATURES, "vmamba_tiny_s1l8", "vanilla_vmamba_tiny")
GRADIENTS = (*MINIATURES, "vmamba_tiny_s1l8")
OFFICIAL = {
    "vmamba_tiny_s1l8": "tiny-s1l8",
    "vmamba_tiny_s2l5": "tiny-s2l5",
    "vmamba_small_s2l15": "small-s2l15",
    "vmamba_small_s1l20": "small-s1l20",
    "vmamba_base_s2l15": "base-s2l15",
    "vmamba_base_s1l20": "base-s1l20",
    "vmamba_tiny_0220": "tiny-0220",
    "vanilla_vmamba_tiny": "v0-tiny",
    "vanilla_vmamba_small": "v0-small",
    "vanilla_vmamba_base": "v0-base",
}
FEATURE_TOLERANCE = 3e-5  # absolute, float32
GRADIENT_TOLERANCE = 1e-4  # relative to the largest value of the array


@pytest.mark.parametrize("variant", NETWORKS)
def test_features_and_logits(variant):
    keys = read_keys(variant)
    arrays, records = read_arrays(variant)
    net, logits = dense_backbone(keys), classifier(keys)
    cases = {record["case"]: image_of(record) for record in records}
    with torch.no_grad():
        got = {case: net(x) for case, x in cases.items() if not case.startswith("logits")}
        for record in records:
            case, output = record["case"], record["output"]
            value = logits(cases[case]) if output == "logits" else got[case][int(output.removeprefix("stage"))]
            assert list(value.shape) == record["full_shape"]
            error = np.abs(value[:, :: record["channel_stride"]].numpy() - arrays[f"{case}/{output}"]).max()
            assert error < FEATURE_TOLERANCE, f"{case}/{output}: {error}"


@pytest.mark.parametrize("variant", GRADIENTS)
def test_gradients(variant):
    keys = read_keys(variant)
    arrays, records = read_arrays(f"{variant}.grads")
    net = dense_backbone(keys)
    case, image = next((r["case"], image_of(r)) for r in records if "image" in r)
    image.requires_grad_()
    loss = sum(
        (out * torch.from_numpy(golden_fill().normal(f"loss:stage{i}", out.shape))).mean()
        for i, out in enumerate(net(image))
    )
    loss.backward()

    # The same conversion that renamed the parameters renames the names themselves.
    shapes = {**keys["shapes"], **keys["backbone_extra"]}
    codes = list(shapes)
    renamed, _ = convert({name: torch.full(shape, float(i)) for i, (name, shape) in enumerate(shapes.items())})
    gradients = {codes[int(v.flatten()[0])]: net.get_parameter(k).grad for k, v in renamed.items()}

    compared = {f"{case}/grad_image": (image.grad.numpy(), 1)}
    for record in records:
        if "parameter" in record:
            value = gradients[record["parameter"]].numpy()
            compared[f"{case}/grad/{record['parameter']}"] = value, record["first_axis_stride"]
    assert set(compared) == {name for name in arrays if "/grad" in name}
    for name, (value, stride) in compared.items():
        want = arrays[name]
        error = np.abs(value[::stride] - want).max() / np.abs(want).max()
        assert error < GRADIENT_TOLERANCE, f"{name}: {error}"
    assert abs(loss.item() - float(arrays[f"{case}/loss"])) < 1e-6


@pytest.mark.parametrize("variant", OFFICIAL)
def test_official_names_and_shapes(variant):
    """Every tensor of the official network has its place, of the right shape, in the arch of the same name."""
    keys = read_keys(variant)
    with torch.device("meta"):
        net = VMamba(OFFICIAL[variant])
        tensors = {k: torch.empty(shape) for k, shape in {**keys["shapes"], **keys["backbone_extra"]}.items()}
    backbone, head = convert(tensors)
    assert {k: v.shape for k, v in backbone.items()} == {k: v.shape for k, v in net.state_dict().items()}
    norms = sum(v.numel() for k, v in backbone.items() if k.startswith(("norm0.", "norm1.", "norm2.")))
    total = sum(v.numel() for v in (*backbone.values(), *head.values()))
    assert total - norms == keys["num_params"]


def test_reference_sees_a_wrong_direction():
    """The tolerance is tight enough to notice two exchanged scan directions."""
    keys = read_keys("micro_v05_noz")
    arrays, records = read_arrays("micro_v05_noz")
    net = dense_backbone(keys)
    with torch.no_grad():
        weight = net.stages[0].blocks[0].mixer.x_proj_weight
        weight.copy_(weight[[0, 2, 1, 3]])
        record = next(r for r in records if r["output"] == "stage0")
        out = net(image_of(record))[0][:, :: record["channel_stride"]]
    assert np.abs(out.numpy() - arrays[f"{record['case']}/stage0"]).max() > 100 * FEATURE_TOLERANCE
