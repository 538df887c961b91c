"""Vim against stored outputs and gradients of the official code (float64 runs on deterministic weights)."""

import numpy as np
import pytest
import torch

import mmvssm
from mmvssm.models import Vim
from mmvssm.models.layers import GridRope, resize_position_embedding
from mmvssm.models.mixers import BidirectionalMamba
from tests.helpers import golden_fill

from .golden import filled, image_of
from .vim_golden import DIRECTIONS, Classifier, convert, dense_model, read_arrays, read_keys

ARCHS = {
    "vim_tiny": "tiny",
    "vim_tiny_plus": "tiny-plus",
    "vim_small": "small",
    "vim_small_plus": "small-plus",
    "vim_base": "base",
}
DENSE = ("vim_tiny_seg", "vim_small_seg", "vim_tiny_det", "vim_small_det", "vim_base_det")
OPTIONS = (
    "base",
    "bimamba_v1",
    "if_bimamba_flag",
    "bimamba_none",
    "no_divide",
    "layer_scale",
    "alternate_bidirectional",
    "alternate_bidirectional_rope",
    "flip_always",
    "flip_always_head_cls",
    "flip_always_rope",
    "cls_head",
    "cls_double",
    "cls_double_and_middle",
    "pool_mean",
    "pool_none",
    "pool_max",
    "pool_all",
    "rope_head_cls",
    "rope_residual_nocls",
    "rope_residual_middle_cls",
    "rope_residual_nocls_96",
    "layer_norm",
    "unfused",
    "unfused_layer_norm",
    "stride8",
    "stride8_patch8",
    "d_state8",
    "no_pos_embed",
    "ssm_cfg",
)
TOLERANCE = 3e-5  # absolute, float32; the reference's own float32 run differs by up to 2e-5
GRADIENT_TOLERANCE = 1e-4  # relative to the largest value of the array


def tolerance(hyper: dict) -> float:
    """Rotation tables are rounded to float32 where they are made, which 24 blocks amplify."""
    return 1e-4 if hyper["if_rope"] else TOLERANCE


def compare(value: torch.Tensor, want: np.ndarray, output: dict, limit: float, name: str) -> None:
    assert list(value.shape) == output["shape"], name
    error = np.abs(value[:, :: output["channel_stride"]].numpy() - want).max()
    assert error < limit, f"{name}: {error}"


@pytest.mark.parametrize("variant", ["vim_tiny", "vim_tiny_plus"])
@torch.no_grad()
def test_classifiers(variant):
    keys = read_keys(variant)
    arrays, (record,) = read_arrays(variant)
    feature, logits = Classifier(keys["hyperparameters"], keys["shapes"])(image_of(record))
    for name, value in {"feature": feature, "logits": logits}.items():
        compare(value, arrays[f"{record['case']}/{name}"], record["outputs"][name], TOLERANCE, name)


@pytest.mark.parametrize("option", OPTIONS)
@torch.no_grad()
def test_options(option):
    keys = read_keys("options")
    assert set(keys) == set(OPTIONS)
    arrays, records = read_arrays("options")
    record = next(r for r in records if r["case"] == option)
    hyper = record["hyperparameters"]
    feature, logits = Classifier(hyper, keys[option]["shapes"])(image_of(record))
    for name, value in {"feature": feature, "logits": logits}.items():
        compare(value, arrays[f"{option}/{name}"], record["outputs"][name], tolerance(hyper), name)


@pytest.mark.parametrize(
    ("variant", "case"),
    [
        ("vim_tiny_seg", "sq64_b2"),
        ("vim_tiny_seg", "rect64x96_b2"),
        ("vim_tiny_seg", "odd75x107"),
        ("vim_tiny_seg", "sq64_residual"),
        ("vim_tiny_det", "sq64_b2"),
        ("vim_tiny_det", "rect64x96_b2"),
        ("vim_tiny_det", "odd75x107"),
        ("vim_tiny_det", "sq64_nodivide"),
    ],
)
@torch.no_grad()
def test_dense_features_and_pyramids(variant, case):
    arrays, records = read_arrays(variant)
    record = next(r for r in records if r["case"] == case)
    hyper = record["hyperparameters"]
    backbone, neck = dense_model(read_keys(variant), hyper)
    maps = backbone(image_of(record))
    levels = neck(maps)
    if "out_feature" in hyper:
        got = {"last_feat": maps[-1], **{f"p{i + 2}": level for i, level in enumerate(levels)}}
    else:
        got = {f"plain{i}": x for i, x in enumerate(maps)} | {f"out{i}": level for i, level in enumerate(levels)}
    assert set(got) == set(record["outputs"])
    for name, value in got.items():
        compare(value, arrays[f"{case}/{name}"], record["outputs"][name], tolerance(hyper), name)


@pytest.mark.parametrize(
    ("variant", "config"),
    [
        ("vim_tiny_seg", "vim-tiny_upernet_4xb4-160k_ade20k-512x512"),
        ("vim_tiny_det", "cascade-mask-rcnn_vim-tiny_simfpn_amp-lsj-100e_coco"),
    ],
)
@torch.no_grad()
def test_dense_configs_reproduce_the_authors_features(variant, config):
    """Backbone and neck as the configs have them, on an image whose size is no multiple of the patch.

    The other schedules have the same models, see the tests of the recipes.
    """
    arrays, records = read_arrays(variant)
    record = next(r for r in records if r["case"] == "odd75x107")
    hyper = record["hyperparameters"]
    model = mmvssm.get_model(config, img_size=hyper["img_size"])
    reference, neck = dense_model(read_keys(variant), hyper)
    model.backbone.load_state_dict(reference.state_dict(), strict=True)
    model.neck.load_state_dict(neck.state_dict(), strict=True)
    maps = model.backbone(image_of(record))
    levels = model.neck(maps)
    outputs = {"last_feat": maps[-1], "p2": levels[0], "p5": levels[3]}
    if variant.endswith("seg"):
        outputs = {"plain1": maps[1], "out0": levels[0], "out3": levels[3]}
    for name, value in outputs.items():
        compare(value, arrays[f"odd75x107/{name}"], record["outputs"][name], tolerance(hyper), name)


def check_gradients(model: Classifier, shapes: dict, record: dict, arrays: dict) -> None:
    """Every stored gradient of one case, of the image and of parameters."""
    case = record["case"]
    image = image_of(record).requires_grad_()
    logits = model(image)[1]
    loss = (logits * torch.from_numpy(golden_fill().normal("loss:logits", logits.shape))).mean()
    loss.backward()
    # The same conversion that renamed the parameters renames the names themselves.
    codes = list(shapes)
    parts = convert({name: torch.full(shape, float(i)) for i, (name, shape) in enumerate(shapes.items())})
    gradients = {"image": image.grad}
    for owner, renamed in ((model.backbone, parts["backbone"]), (model.head, parts["head.fc"])):
        for name, value in renamed.items():
            official = codes[int(value.flatten()[0])]
            gradients[official] = owner.get_parameter(name).grad.reshape(shapes[official])
    stored = [name for name in arrays if name.startswith(f"{case}/grad:")]
    assert len(stored) > 15
    for name in stored:
        want = arrays[name]
        error = np.abs(gradients[name.removeprefix(f"{case}/grad:")].numpy() - want).max() / np.abs(want).max()
        assert error < GRADIENT_TOLERANCE, f"{name}: {error}"
    assert abs(loss.item() - float(arrays[f"{case}/loss"])) < 1e-6


def test_gradients_of_the_classifier():
    keys = read_keys("vim_tiny")
    arrays, (record,) = read_arrays("vim_tiny_grad")
    check_gradients(Classifier(keys["hyperparameters"], keys["shapes"]), keys["shapes"], record, arrays)


@pytest.mark.parametrize("option", ["base", "bimamba_v1", "alternate_bidirectional", "rope_residual_nocls"])
def test_gradients_of_options(option):
    keys = read_keys("options")[option]
    arrays, records = read_arrays("options_grad")
    record = next(r for r in records if r["case"] == option)
    check_gradients(Classifier(keys["hyperparameters"], keys["shapes"]), keys["shapes"], record, arrays)


@pytest.mark.parametrize("variant", ARCHS)
def test_official_names_and_shapes(variant):
    """Every tensor of the official network has its place, of the right shape, in the arch of the same name."""
    keys = read_keys(variant)
    with torch.device("meta"):
        net = Vim(ARCHS[variant], out_type="cls_token")
        parts = convert({k: torch.empty(shape) for k, shape in keys["shapes"].items()})
    assert {k: v.shape for k, v in parts["backbone"].items()} == {k: v.shape for k, v in net.state_dict().items()}
    assert sum(v.numel() for part in parts.values() for v in part.values()) == keys["num_params"]


@pytest.mark.parametrize("variant", DENSE)
def test_official_names_and_shapes_of_dense_models(variant):
    keys = read_keys(variant)
    hyper = keys["hyperparameters"]
    with torch.device("meta"):
        shapes = keys["shapes"] | keys["constant_buffers"]
        parts = convert({k: torch.empty(shape) for k, shape in shapes.items()})
        net = Vim(
            dict(embed_dims=hyper["embed_dim"]),
            img_size=hyper["img_size"],
            with_cls_token=False,
            out_norm="shared" if "norm.weight" in parts["backbone"] else None,
        )
    assert {k: v.shape for k, v in parts["backbone"].items()} == {k: v.shape for k, v in net.state_dict().items()}
    trained = {k: v for part in parts.values() for k, v in part.items() if "running_" not in k}
    assert sum(v.numel() for v in trained.values()) == keys["num_params"]


@pytest.mark.parametrize("case", ["dim32_grid4", "dim24_grid6", "dim32_grid14"])
def test_rotary_embedding(case):
    arrays, records = read_arrays("op_rope")
    record = next(r for r in records if r["case"] == case)
    rope, grid = GridRope(record["dim"], record["pt_hw_seq_len"]), (record["grid"], record["grid"])
    value = {name: torch.from_numpy(arrays[f"{case}/{name}"]) for name in ("cos", "sin", "x", "y")}
    for got, want in zip(rope.tables(grid, torch.device("cpu")), (value["cos"], value["sin"]), strict=True):
        torch.testing.assert_close(got.repeat_interleave(2, 1), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(rope(value["x"].float(), grid), value["y"].float(), rtol=0, atol=1e-5)
    plus_one = torch.from_numpy(arrays[f"{case}/x_plus_one"]).float()
    want = torch.from_numpy(arrays[f"{case}/y_plus_one"]).float()
    torch.testing.assert_close(rope(plus_one, grid, class_tokens=1), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["plain_14_to_27", "plain_14_to_32", "plain_14_to_6"])
def test_resized_position_embedding(case):
    arrays, records = read_arrays("op_pos_embed")
    record = next(r for r in records if r["case"] == case)
    grid, new_grid = ((record[key], record[key]) for key in ("source", "target"))
    rows, want = (torch.from_numpy(arrays[f"{case}/{name}"]) for name in ("in", "out"))
    torch.testing.assert_close(resize_position_embedding(rows, None, grid, None, new_grid), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        "v2_div2_L1",
        "v2_div2_L7",
        "v2_div2_L49",
        "v2_div2_L131",
        "v2_L7",
        "v1_L7",
        "v1_div2_L49",
        "none_L7",
        "none_L49",
    ],
)
def test_mixers(case):
    """In float64, where only the equations count."""
    arrays, records = read_arrays("op_mixer")
    record = next(r for r in records if r["case"] == case)
    mixer = BidirectionalMamba(
        record["d_model"], directions=DIRECTIONS[record["bimamba_type"]], divide_out=record["if_divide_out"]
    ).double()
    # The names of the first mixer of a network, with the stem by which a file is recognised.
    names = {f"layers.0.mixer.{name}": shape for name, shape in record["shapes"].items()}
    stem = {"patch_embed.proj.weight": torch.zeros(1, 1, 1, 1)}
    tensors = {f"layers.0.mixer.{name}": tensor for name, tensor in filled(record["shapes"]).items()}
    parts = convert(stem | tensors)["backbone"]
    prefix = "layers.0.mixer."
    mixer.load_state_dict({k.removeprefix(prefix): v for k, v in parts.items() if k.startswith(prefix)}, strict=True)
    x = torch.from_numpy(arrays[f"{case}/x"]).double().requires_grad_()
    y = mixer(x)
    # What is stored is rounded to float32.
    torch.testing.assert_close(y, torch.from_numpy(arrays[f"{case}/y"]).double(), rtol=1e-6, atol=1e-6)
    stored = {name.split("/grad:")[1]: value for name, value in arrays.items() if name.startswith(f"{case}/grad:")}
    assert bool(stored) == ("L7" in case or "L49" in case)
    (y * torch.from_numpy(golden_fill().normal("loss:y", y.shape))).mean().backward()
    codes = {name: torch.full(shape, float(i)) for i, (name, shape) in enumerate(names.items())}
    renamed = convert(stem | codes)["backbone"]
    official = list(record["shapes"])
    gradients = {"x": x.grad}
    for name, code in renamed.items():
        if name.startswith(prefix):
            leaf = official[int(code.flatten()[0])]
            gradients[leaf] = mixer.get_parameter(name.removeprefix(prefix)).grad.reshape(record["shapes"][leaf])
    for name, want in stored.items():
        error = np.abs(gradients[name].numpy() - want).max() / np.abs(want).max()
        assert error < 1e-6, f"{name}: {error}"


def test_reference_sees_a_wrong_class_row():
    """The tolerance is tight enough to notice an embedding that is off by one row."""
    keys = read_keys("options")["base"]
    arrays, records = read_arrays("options")
    record = next(r for r in records if r["case"] == "base")
    model = Classifier(keys["hyperparameters"], keys["shapes"])
    with torch.no_grad():
        model.backbone.pos_embed.copy_(model.backbone.pos_embed.roll(1, 1))
        error = np.abs(model(image_of(record))[1].numpy() - arrays["base/logits"]).max()
    assert error > 100 * TOLERANCE
