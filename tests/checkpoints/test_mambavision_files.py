"""MambaVision: the authors' files in every wrapper, by names written down independently of the converter."""

import argparse
import re

import pytest
import torch
from mmengine.model import BaseModule
from torch import nn

from mmvssm.checkpoints import convert_official, load_into
from mmvssm.checkpoints.convert import describe_backbone
from mmvssm.checkpoints.families import get_family
from mmvssm.models import MambaVision
from tests.checkpoints.test_convert import assert_same, backbone_part, prefixed, scaled
from tests.tools.conftest import load_tool

ARCH = dict(embed_dims=8, stem_dims=4, depths=(1, 2, 3, 2), num_heads=(2, 2), layer_scale=1e-5)
CLASSES = 5


def mambavision_file(dense: bool = False, seed: int = 0) -> dict:
    """State dict of a tiny MambaVision in the authors' layout, with output norms instead of a classifier if dense."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}

    def add(name, *shape):
        tensors[name] = torch.randn(shape, generator=generator)

    def add_norm(name, width, batch=False):
        add(f"{name}.weight", width)
        add(f"{name}.bias", width)
        if batch:
            add(f"{name}.running_mean", width)
            tensors[f"{name}.running_var"] = torch.rand(width, generator=generator) + 0.5
            tensors[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def add_linear(name, rows, columns):
        add(f"{name}.weight", rows, columns)
        add(f"{name}.bias", rows)

    add("patch_embed.conv_down.0.weight", 4, 3, 3, 3)
    add_norm("patch_embed.conv_down.1", 4, batch=True)
    add("patch_embed.conv_down.3.weight", 8, 4, 3, 3)
    add_norm("patch_embed.conv_down.4", 8, batch=True)
    for stage, depth in enumerate((1, 2, 3, 2)):
        width = 8 * 2**stage
        half, rank = width // 2, -(-width // 16)
        for block in range(depth):
            place = f"levels.{stage}.blocks.{block}"
            add_norm(f"{place}.norm1", width, batch=stage < 2)
            add_norm(f"{place}.norm2", width, batch=stage < 2)
            if stage < 2:
                for conv in ("conv1", "conv2"):
                    add(f"{place}.{conv}.weight", width, width, 3, 3)
                    add(f"{place}.{conv}.bias", width)
                continue
            add(f"{place}.gamma_1", width)
            add(f"{place}.gamma_2", width)
            add_linear(f"{place}.mlp.fc1", 4 * width, width)
            add_linear(f"{place}.mlp.fc2", width, 4 * width)
            if block >= (depth + 1) // 2:
                add_linear(f"{place}.mixer.qkv", 3 * width, width)
                add_linear(f"{place}.mixer.proj", width, width)
                continue
            add(f"{place}.mixer.A_log", half, 8)
            add(f"{place}.mixer.D", half)
            add(f"{place}.mixer.in_proj.weight", width, width)
            add(f"{place}.mixer.x_proj.weight", rank + 16, half)
            add_linear(f"{place}.mixer.dt_proj", half, rank)
            add(f"{place}.mixer.out_proj.weight", width, width)
            add(f"{place}.mixer.conv1d_x.weight", half, 1, 3)
            add(f"{place}.mixer.conv1d_z.weight", half, 1, 3)
        if stage < 3:
            add(f"levels.{stage}.downsample.reduction.0.weight", 2 * width, width, 3, 3)
    if dense:
        for stage in range(4):
            add_norm(f"outnorm{stage}", 8 * 2**stage)
    else:
        add_norm("norm", 64, batch=True)
        add_linear("head", CLASSES, 64)
    return tensors


class Classifier(BaseModule):
    """The names of mmpretrain's classifier, without mmpretrain."""

    def __init__(self):
        super().__init__()
        self.backbone = MambaVision(ARCH, out_indices=(3,))
        self.head = nn.Module()
        self.head.fc = nn.Linear(64, CLASSES)


def assert_loaded(module, expected):
    own = module.state_dict()
    assert_same(own, {k: expected[k] for k in own})


def timm_file(tensors: dict) -> dict:
    """What the authors' training saves: the averaged weights beside the raw ones, and their arguments as an object."""
    return {
        "epoch": 309,
        "arch": "mamba_vision_T",
        "state_dict": tensors,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(9)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "version": 2,
        "args": argparse.Namespace(model="mamba_vision_T", lr=5e-3, aa="rand-m9-mstd0.5-inc1"),
        "state_dict_ema": scaled(tensors),
        "metric": 82.3,
    }


@pytest.mark.parametrize("dense", [False, True])
def test_names_and_shapes_fit_the_backbone(dense):
    converted = convert_official(mambavision_file(dense))
    with torch.device("meta"):
        expected = MambaVision(ARCH, out_indices=(0, 1, 2, 3) if dense else (3,)).state_dict()
    assert {k: v.shape for k, v in backbone_part(converted).items()} == {k: v.shape for k, v in expected.items()}
    outside = {k for k in converted if not k.startswith("backbone.")}
    assert outside == (set() if dense else {"head.fc.weight", "head.fc.bias"})
    assert_same(convert_official(converted), converted)
    assert_same(convert_official(backbone_part(converted)), prefixed(backbone_part(converted), "backbone."))


def test_places():
    official = mambavision_file()
    ours = convert_official(official)
    for theirs, name in {
        "patch_embed.conv_down.3.weight": "patch_embed.conv2.weight",
        "patch_embed.conv_down.4.running_var": "patch_embed.norm2.running_var",
        "levels.0.downsample.reduction.0.weight": "stages.1.downsample.weight",
        "levels.1.blocks.1.norm2.running_mean": "stages.1.blocks.1.norm2.running_mean",
        "levels.2.blocks.0.gamma_2": "stages.2.blocks.0.gamma2",
        "levels.2.blocks.1.mixer.dt_proj.bias": "stages.2.blocks.1.mixer.dt_proj.bias",
        "levels.3.blocks.1.mixer.qkv.weight": "stages.3.blocks.1.mixer.qkv.weight",
        "norm.running_mean": "batch_norm3.running_mean",
    }.items():
        assert torch.equal(ours[f"backbone.{name}"], official[theirs]), name
    both = [official[f"levels.2.blocks.0.mixer.conv1d_{branch}.weight"] for branch in "xz"]
    assert torch.equal(ours["backbone.stages.2.blocks.0.mixer.conv_weight"], torch.cat(both)[:, 0])


def test_official_names_lead_back():
    """The reverse table, used by the weight-decay rules; only the second of their two convolutions has no name here."""
    family = get_family("mambavision")
    for dense in (False, True):
        official = mambavision_file(dense)
        names = backbone_part(convert_official(official))
        expected = {k for k in official if not k.startswith("head.") and "conv1d_z" not in k}
        assert {family.official_name(n, names) for n in names} == expected


def test_unknown_names_stay_visible():
    tensors = mambavision_file()
    extra = {
        "pos_embed": torch.ones(1),
        "levels.0.blocks.0.gamma.weight": torch.ones(1),
        "levels.2.blocks.0.mixer.conv1d_x.bias": torch.ones(1),
        "levels.0.downsample.norm.weight": torch.ones(1),
        "patch_embed.conv_down.2.weight": torch.ones(1),
    }
    assert set(convert_official(tensors | extra)) - set(convert_official(tensors)) == {f"backbone.{k}" for k in extra}
    del tensors["levels.2.blocks.0.mixer.conv1d_z.weight"]
    converted = convert_official(tensors)
    assert "backbone.levels.2.blocks.0.mixer.conv1d_x.weight" in converted
    assert "backbone.stages.2.blocks.0.mixer.conv_weight" not in converted


def test_counters_may_be_absent():
    """Some tools drop the integers; nothing that is computed depends on them."""
    tensors = {k: v for k, v in mambavision_file().items() if v.is_floating_point()}
    net = Classifier()
    assert load_into(net, tensors).fits
    assert int(net.backbone.batch_norm3.num_batches_tracked) == 0


def test_timm_file(tmp_path):
    """`state_dict` is what the authors' evaluation reads; the averaged weights on request."""
    tensors = mambavision_file()
    torch.save(timm_file(tensors), tmp_path / "mambavision_tiny_1k.pth.tar")
    net = Classifier()
    for prefer_ema, expected in ((None, tensors), (False, tensors), (True, scaled(tensors))):
        report = load_into(net, tmp_path / "mambavision_tiny_1k.pth.tar", prefer_ema=prefer_ema)
        assert report.fits
        assert_loaded(net, convert_official(expected))
    assert_same(convert_official(timm_file(tensors)), convert_official(tensors))
    assert_same(convert_official(timm_file(tensors), prefer_ema=True), convert_official(scaled(tensors)))


def test_averaged_weights_of_our_own_runs():
    """MMEngine's EMAHook puts the average under `state_dict`: what is read there is the average."""
    averaged = prefixed(backbone_part(convert_official(mambavision_file(dense=True))), "backbone.")
    raw = {**prefixed(scaled(averaged), "module."), "steps": torch.tensor(7)}
    run = {"meta": {}, "state_dict": averaged, "ema_state_dict": raw, "message_hub": {}}
    net = MambaVision(ARCH)
    load_into(net, run)
    assert_loaded(net, backbone_part(averaged))
    load_into(net, run, prefer_ema=False)
    assert_loaded(net, backbone_part(scaled(averaged)))


def test_hugging_face_file(tmp_path):
    import safetensors.torch as safetensors

    tensors = mambavision_file()
    safetensors.save_file(prefixed(tensors, "model."), tmp_path / "model.safetensors")
    net = Classifier()
    assert load_into(net, tmp_path / "model.safetensors").fits
    assert_loaded(net, convert_official(tensors))


@pytest.mark.parametrize("prefix", [None, "backbone."])
def test_detection_file(tmp_path, prefix):
    tensors = mambavision_file(dense=True)
    heads = {"neck.lateral_convs.0.conv.weight": torch.ones(2), "roi_head.bbox_head.0.fc_cls.bias": torch.ones(3)}
    content = {"meta": {"epoch": 36}, "state_dict": {**prefixed(tensors, "backbone."), **heads}}
    torch.save(content, tmp_path / "model.pth")
    net = MambaVision(ARCH)
    report = load_into(net, tmp_path / "model.pth", prefix=prefix)
    assert report.fits
    assert not report.kept
    assert_loaded(net, backbone_part(convert_official(tensors)))
    converted = convert_official(content)
    assert {k: v for k, v in converted.items() if not k.startswith("backbone.")} == heads


def test_encoder_prefix():
    """The authors' loaders also know files whose network is called `encoder`."""
    tensors = mambavision_file()
    converted = convert_official({"state_dict": {**prefixed(tensors, "encoder."), "decoder.weight": torch.ones(2)}})
    assert_same(backbone_part(converted), backbone_part(convert_official(tensors)))


def test_classifier_into_a_dense_backbone():
    """Its batch norm is no substitute for the layer norms, not even where the names of its tensors would do."""
    for out_indices, out_norm in (((0, 1, 2, 3), "auto"), ((3,), "ln")):
        net = MambaVision(ARCH, out_indices=out_indices, out_norm=out_norm)
        report = load_into(net, mambavision_file())
        assert report.fits
        assert set(report.kept) == {f"norm{i}.{p}" for i in out_indices for p in ("weight", "bias")}
        assert (net.norm3.weight == 1).all()
        assert not net.norm3.bias.any()
        batch_norm = {k for k in report.left_out if k.startswith("batch_norm3.")}
        assert len(batch_norm) == 5


def test_dense_file_into_a_classifier_backbone():
    net = MambaVision(ARCH, out_indices=(3,))
    report = load_into(net, mambavision_file(dense=True))
    assert report.fits
    assert all(k.startswith("batch_norm3.") for k in report.kept)
    assert (net.batch_norm3.weight == 1).all()


def test_anything_else_is_an_error():
    for change in ("missing", "unexpected", "mismatched"):
        tensors = mambavision_file()
        if change == "missing":
            del tensors["levels.2.blocks.1.mixer.D"]
        elif change == "unexpected":
            tensors["levels.2.blocks.1.mixer.E"] = torch.ones(1)
        else:
            tensors["levels.2.blocks.1.mixer.D"] = torch.ones(3)
        with pytest.raises(ValueError, match=r"mixer\.[DE]"):
            load_into(MambaVision(ARCH, out_indices=(3,)), tensors)


def test_sentence_names_the_variant():
    with torch.device("meta"):
        tiny = {f"backbone.{k}": v for k, v in MambaVision("t2", out_indices=(3,)).state_dict().items()}
    with pytest.raises(ValueError, match=r"holds MambaVision t2, the model is a MambaVision .*arch='t2'"):
        load_into(MambaVision(ARCH, out_indices=(3,)), tiny)


@pytest.mark.parametrize("arch", MambaVision.arch_zoo)
def test_recognition(arch):
    """Variants that differ in their windows or training data only are named together."""
    with torch.device("meta"):
        state = MambaVision(arch).state_dict()
    same = {
        a: sorted(b for b, other in MambaVision.arch_zoo.items() if comparable(other) == comparable(s))
        for a, s in MambaVision.arch_zoo.items()
    }
    found, words = describe_backbone(state, get_family("mambavision"))
    assert found in same[arch]
    assert sorted(re.sub("^MambaVision ", "", words).split(" or ")) == same[arch]


def comparable(settings: dict) -> dict:
    return {k: v for k, v in settings.items() if k in ("embed_dims", "depths")}


@pytest.mark.parametrize(
    ("option", "averaged"), [([], False), (["--raw-weights"], False), (["--averaged-weights"], True)]
)
def test_conversion_tool(tmp_path, option, averaged):
    tensors = mambavision_file()
    torch.save(timm_file(tensors), tmp_path / "official.pth.tar")
    tool = load_tool("model_converters/convert_official")
    tool.main([str(tmp_path / "official.pth.tar"), str(tmp_path / "ours.pth"), *option])
    written = torch.load(tmp_path / "ours.pth", weights_only=True)
    assert_same(written["state_dict"], convert_official(scaled(tensors) if averaged else tensors))
    assert written["meta"]["family"] == "mambavision"
