"""Vim files in the authors' layouts: names, wrappers, class rows, loading, sentences."""

import argparse
import json

import pytest
import torch
from mmengine.model import BaseModule
from torch import nn
from torch.nn import functional as F

from mmvssm.checkpoints import convert_official, load_into
from mmvssm.checkpoints.convert import describe_backbone
from mmvssm.checkpoints.families import get_family
from mmvssm.models import DeconvPyramid, SimpleFeaturePyramid, Vim
from tests.checkpoints.official_files import vmamba_file
from tests.checkpoints.test_convert import WRAPPERS, assert_same, backbone_part, prefixed, scaled
from tests.helpers import shared_dir

ARCH = dict(embed_dims=8, depth=2, patch_size=4, d_state=3)
CLASSES = 5
TYPES = {"v2": "separate", "v1": "shared", "none": "forward"}
TOKENS = {"middle": ["cls_token"], "head": ["cls_token"], "double": ["cls_token_head", "cls_token_tail"], None: []}


def official_file(
    position: str | None = "middle",
    bimamba_type: str = "v2",
    grid: int = 4,
    head: bool = True,
    rope: bool = False,
    gamma: bool = False,
    layer_norm: bool = False,
    seed: int = 0,
) -> dict:
    """State dict of a tiny network in the authors' layout, written down independently of the converter."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}

    def add(name, *shape):
        tensors[name] = torch.randn(shape, generator=generator)

    def add_norm(name):
        add(f"{name}.weight", 8)
        if layer_norm:
            add(f"{name}.bias", 8)

    for name in TOKENS[position]:
        add(name, 1, 1, 8)
    add("pos_embed", 1, grid * grid + len(TOKENS[position]), 8)
    add("patch_embed.proj.weight", 8, 3, 4, 4)
    add("patch_embed.proj.bias", 8)
    for block in range(2):
        mixer = f"layers.{block}.mixer"
        add(f"{mixer}.in_proj.weight", 32, 8)
        for suffix in ["", "_b"] if bimamba_type == "v2" else [""]:
            add(f"{mixer}.A_b_log" if suffix else f"{mixer}.A_log", 16, 3)
            add(f"{mixer}.D{suffix}", 16)
            add(f"{mixer}.conv1d{suffix}.weight", 16, 1, 4)
            add(f"{mixer}.conv1d{suffix}.bias", 16)
            add(f"{mixer}.x_proj{suffix}.weight", 7, 16)
            add(f"{mixer}.dt_proj{suffix}.weight", 16, 1)
            add(f"{mixer}.dt_proj{suffix}.bias", 16)
        if bimamba_type == "v1":
            add(f"{mixer}.A_b_log", 16, 3)
        add(f"{mixer}.out_proj.weight", 8, 16)
        if gamma:
            add(f"{mixer}.gamma", 8)
        add_norm(f"layers.{block}.norm")
    add_norm("norm_f")
    if rope:
        add("rope.freqs_cos", grid * grid, 8)
        add("rope.freqs_sin", grid * grid, 8)
    if head:
        add("head.weight", CLASSES, 8)
        add("head.bias", CLASSES)
    return tensors


def segmentor_file(grid: int = 8) -> dict:
    """Backbone, pyramid and part of the heads of an authors' segmentor; the class token is gone, the norm is not."""
    tensors = official_file(None, head=False, grid=grid, rope=True)
    generator = torch.Generator().manual_seed(1)
    for name in ("fpn1.0", "fpn1.3", "fpn2.0"):
        tensors[f"{name}.weight"] = torch.randn(8, 8, 2, 2, generator=generator)
        tensors[f"{name}.bias"] = torch.randn(8, generator=generator)
    for leaf in ("weight", "bias", "running_mean", "running_var"):
        tensors[f"fpn1.1.{leaf}"] = torch.rand(8, generator=generator)
    tensors["fpn1.1.num_batches_tracked"] = torch.tensor(7)
    return prefixed(tensors, "backbone.") | {"decode_head.conv_seg.bias": torch.ones(3)}


def detector_file(grid: int = 16, prefix: str = "backbone.") -> dict:
    """Trunk and pyramid of an authors' detector; neither class token nor final norm."""
    trunk = official_file(None, head=False, grid=grid, rope=True)
    del trunk["norm_f.weight"]
    tensors = prefixed(trunk, "net.")
    generator = torch.Generator().manual_seed(1)

    def add_convolution(name, rows, columns, kernel):
        tensors[f"{name}.weight"] = torch.randn(rows, columns, kernel, kernel, generator=generator)
        add_pair(f"{name}.norm", rows)

    def add_pair(name, *shape):
        tensors[f"{name}.weight"] = torch.randn(shape, generator=generator)
        tensors[f"{name}.bias"] = torch.randn(shape[1] if len(shape) > 1 else shape[0], generator=generator)

    add_pair("simfp_2.0", 8, 4, 2, 2)
    add_pair("simfp_2.1", 4)
    add_pair("simfp_2.3", 4, 2, 2, 2)
    add_pair("simfp_3.0", 8, 4, 2, 2)
    for level, first, width in ((2, 4, 2), (3, 1, 4), (4, 0, 8), (5, 1, 8)):
        add_convolution(f"simfp_{level}.{first}", 6, width, 1)
        add_convolution(f"simfp_{level}.{first + 1}", 6, 6, 3)
    return prefixed(tensors, prefix) | {"roi_heads.mask_head.predictor.bias": torch.ones(3)}


class Classifier(BaseModule):
    """The names of mmpretrain's classifier, without mmpretrain."""

    def __init__(self, classes=CLASSES, **kwargs):
        super().__init__()
        self.backbone = Vim(ARCH, **{"img_size": 16, "out_type": "cls_token", **kwargs})
        self.head = nn.Module()
        self.head.fc = nn.Linear(8, classes)


def dense(**kwargs) -> Vim:
    return Vim(ARCH, **{"img_size": 16, "with_cls_token": False, "out_norm": None, "out_indices": (0, 1), **kwargs})


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize("bimamba_type", TYPES)
@pytest.mark.parametrize("position", TOKENS)
@pytest.mark.parametrize("options", [{}, dict(gamma=True, layer_norm=True, rope=True)], ids=["plain", "options"])
def test_names_and_shapes_fit_the_backbone(position, bimamba_type, options):
    official = official_file(position, bimamba_type, **options)
    converted = convert_official({"model": official})
    net = Vim(
        ARCH,
        img_size=16,
        with_cls_token=position is not None,
        cls_token=position or "middle",
        directions=TYPES[bimamba_type],
        layer_scale=1.0 if options else None,
        norm="layer" if options else "rms",
    )
    net.load_state_dict(backbone_part(converted), strict=True)
    assert {k for k in converted if not k.startswith("backbone.")} == {"head.fc.weight", "head.fc.bias"}
    family = get_family("vim")
    own = backbone_part(converted)
    tables = {"rope.freqs_cos", "rope.freqs_sin", "head.weight", "head.bias"}
    assert {family.official_name(n, own) for n in own} == set(official) - tables


def test_places():
    official = official_file()
    ours = convert_official(official)
    for theirs, name in {
        "patch_embed.proj.weight": "backbone.patch_embed.projection.weight",
        "pos_embed": "backbone.pos_embed",
        "cls_token": "backbone.cls_token",
        "layers.1.norm.weight": "backbone.layers.1.norm.weight",
        "layers.1.mixer.A_log": "backbone.layers.1.mixer.forward_scan.A_log",
        "layers.1.mixer.A_b_log": "backbone.layers.1.mixer.backward_scan.A_log",
        "layers.1.mixer.dt_proj_b.bias": "backbone.layers.1.mixer.backward_scan.dt_proj_bias",
        "layers.1.mixer.D_b": "backbone.layers.1.mixer.backward_scan.D",
        "norm_f.weight": "backbone.norm.weight",
        "head.bias": "head.fc.bias",
    }.items():
        assert torch.equal(ours[name], official[theirs]), name
    taps = ours["backbone.layers.0.mixer.backward_scan.conv_weight"]
    assert torch.equal(taps, official["layers.0.mixer.conv1d_b.weight"][:, 0])


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers(wrapper):
    """Where the authors' wrappers hold an average too, the weights themselves are taken."""
    both = wrapper in ("training", "timm", "distributed ema")
    official = official_file()
    expected = convert_official(scaled(official) if both else official)
    assert_same(convert_official(WRAPPERS[wrapper](official)), expected)


def test_converting_twice_changes_nothing():
    for file in (official_file(), segmentor_file(), detector_file()):
        once = convert_official(file)
        assert_same(convert_official(once), once)


def test_unknown_names_stay_visible():
    extra = {"layers.0.mixer.extra": torch.ones(1), "simfp_9.0.weight": torch.ones(1), "rope.scale": torch.ones(1)}
    converted = convert_official(official_file() | extra)
    assert set(converted) - set(convert_official(official_file())) == {f"backbone.{k}" for k in extra}


@pytest.mark.parametrize("with_heads", [True, False])
def test_segmentor(with_heads):
    official = segmentor_file()
    if not with_heads:
        official = {k.removeprefix("backbone."): v for k, v in official.items() if k.startswith("backbone.")}
    converted = convert_official({"state_dict": official, "meta": {}})
    net, neck = dense(img_size=32), DeconvPyramid([8] * 4)
    net.load_state_dict(backbone_part(converted), strict=True)  # the norm that the authors never use has no place
    neck.load_state_dict({k.removeprefix("neck."): v for k, v in converted.items() if k.startswith("neck.")})
    prefix = "backbone." if with_heads else ""
    assert torch.equal(neck.levels[0][3].weight, official[f"{prefix}fpn1.3.weight"])
    assert torch.equal(neck.levels[1][0].bias, official[f"{prefix}fpn2.0.bias"])
    assert ("decode_head.conv_seg.bias" in converted) == with_heads


@pytest.mark.parametrize("prefix", ["backbone.", ""])
def test_detector(prefix):
    official = detector_file(prefix=prefix)
    converted = convert_official({"model": official})
    net, neck = dense(img_size=64, out_indices=-1), SimpleFeaturePyramid(8, out_channels=6)
    net.load_state_dict(backbone_part(converted), strict=True)
    neck.load_state_dict({k.removeprefix("neck."): v for k, v in converted.items() if k.startswith("neck.")})
    for theirs, ours in {
        "simfp_2.3.weight": "levels.0.3.weight",
        "simfp_2.1.bias": "levels.0.1.bias",
        "simfp_2.5.weight": "levels.0.5.conv.weight",
        "simfp_3.1.norm.weight": "levels.1.1.norm.weight",
        "simfp_4.0.weight": "levels.2.0.conv.weight",
        "simfp_5.2.norm.bias": "levels.3.2.norm.bias",
    }.items():
        assert torch.equal(neck.state_dict()[ours], official[prefix + theirs])
    assert "roi_heads.mask_head.predictor.bias" in converted


# ---------------------------------------------------------------------- loading


def test_training_state(tmp_path):
    """What was published: optimiser, arguments and an average beside the weights, of which the numbers are."""
    official = official_file()
    state = {
        "model": official,
        "model_ema": scaled(official),
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-5}]},
        "lr_scheduler": {"t_initial": 300},
        "epoch": 299,
        "scaler": {"scale": 1.0},
        "args": argparse.Namespace(model="vim_tiny", lr=1e-3),
    }
    torch.save(state, tmp_path / "vim.pth")
    model = Classifier()
    report = load_into(model, tmp_path / "vim.pth")
    assert report.fits
    assert_same(model.state_dict(), convert_official(official))
    assert_same(convert_official(state), convert_official(official))
    load_into(model, tmp_path / "vim.pth", prefer_ema=True)
    assert_same(model.state_dict(), convert_official(scaled(official)))


def test_average_of_our_own_runs_is_taken_as_saved():
    """MMEngine's EMAHook saves the average as `state_dict`, which is what it has evaluated."""
    ours = convert_official(official_file())
    file = {"meta": {}, "state_dict": ours, "ema_state_dict": prefixed(scaled(ours), "module."), "message_hub": {}}
    model = Classifier()
    load_into(model, file)
    assert_same(model.state_dict(), ours)


@pytest.mark.parametrize("position", ["middle", "head", "double"])
@pytest.mark.parametrize("size", [16, 32, (16, 28), 20])
def test_class_row_is_removed_at_its_true_place(position, size):
    official = official_file(position)
    net = dense(img_size=size, cls_token=position)
    report = load_into(net, official)
    removed = {"middle": [8], "head": [0], "double": [0, 17]}[position]
    rows = official["pos_embed"][0][[i for i in range(16 + len(removed)) if i not in removed]]
    maps = F.interpolate(rows.T.reshape(1, 8, 4, 4), size=net.patch_grid, mode="bicubic", align_corners=False)
    torch.testing.assert_close(net.pos_embed, maps.flatten(2).transpose(1, 2))
    assert report.fits
    assert report.resized == ["pos_embed"]
    assert set(TOKENS[position]) <= set(report.left_out)
    assert "cls_token" in report.summary()


@pytest.mark.parametrize("position", ["middle", "head", "double"])
@pytest.mark.parametrize("size", [16, 32, (16, 28)])
def test_class_row_passes_unchanged_to_another_size(position, size):
    official = official_file(position)
    model = Classifier(img_size=size, cls_token=position)
    report = load_into(model, official)
    before = {"middle": [8], "head": [0], "double": [0, 17]}[position]
    patches = model.backbone.patch_grid[0] * model.backbone.patch_grid[1]
    after = {"middle": [patches // 2], "head": [0], "double": [0, patches + 1]}[position]
    assert torch.equal(model.backbone.pos_embed[0, after], official["pos_embed"][0, before])
    assert report.resized == ([] if size == 16 else ["backbone.pos_embed"])


@pytest.mark.parametrize("out_norm", ["shared", "each", None])
def test_classifier_into_a_dense_backbone(out_norm):
    net = dense(out_norm=out_norm)
    report = load_into(net, official_file())
    assert report.fits
    expected = backbone_part(convert_official(official_file()))
    for name, value in net.state_dict().items():
        if name.startswith("norm") and out_norm == "each":
            assert torch.equal(value, torch.ones(8) if "weight" in name else torch.zeros(8))
        elif name != "pos_embed":
            assert torch.equal(value, expected[name]), name


def test_dense_file_with_heads_into_a_backbone():
    net = dense(img_size=32)
    report = load_into(net, segmentor_file(grid=8))
    assert report.fits
    assert not report.resized
    assert "Not part of the backbone, left out: decode_head, neck." in report.summary()


def test_state_dicts_adapt_without_the_loader():
    """MMEngine's own loading and torch's: another image size, and a classifier's weights in a dense backbone."""
    state = backbone_part(convert_official(official_file()))
    loaded, torchs = dense(img_size=32), dense(img_size=32)
    load_into(loaded, official_file())
    torchs.load_state_dict(state, strict=True)
    assert_same(torchs.state_dict(), loaded.state_dict())
    wrapped = nn.ModuleDict({"backbone": dense(img_size=32), "other": nn.Linear(1, 1)})
    wrapped.load_state_dict(prefixed(state, "backbone.") | prefixed(wrapped.other.state_dict(), "other."))
    assert_same(wrapped.backbone.state_dict(), loaded.state_dict())
    assert "cls_token" in state, "what was passed in is not changed"


def test_stride_of_fine_tuning():
    """Overlapping patches from a file without overlap: the embedding is resized to the denser grid."""
    model = Classifier()
    model.backbone = Vim({**ARCH, "stride": 2}, img_size=16, out_type="cls_token")
    report = load_into(model, official_file())
    assert report.resized == ["backbone.pos_embed"]
    assert model.backbone.pos_embed.shape == (1, 50, 8)


# ---------------------------------------------------------------------- what does not fit


def test_file_without_class_token_into_a_classifier():
    with pytest.raises(ValueError, match=r"missing in the file: 1 \(backbone.cls_token\)"):
        load_into(Classifier(), official_file(None))


def test_two_class_tokens_into_one():
    with pytest.raises(ValueError, match="cls_token"):
        load_into(Classifier(), official_file("double"))


def test_rows_that_are_no_square():
    file = official_file(None, head=False)
    file["pos_embed"] = torch.zeros(1, 15, 8)
    with pytest.raises(ValueError, match=r"pos_embed: \(1, 15, 8\) in the file, \(1, 16, 8\) in the model"):
        load_into(dense(), file)


@pytest.mark.parametrize(("has", "wanted"), [("small", "tiny"), ("tiny", "base")])
def test_wrong_variant_is_named(has, wanted):
    with torch.device("meta"):
        file, model = Vim(has).state_dict(), Vim(wanted)
    with pytest.raises(ValueError, match=f"it holds Vim {has}, the model is Vim {wanted}") as caught:
        load_into(model, file)
    assert f"Build the model with arch={has!r} to load this file." in str(caught.value)


def test_unnamed_variant_is_described():
    with torch.device("meta"):
        model = Vim("tiny")
    with pytest.raises(ValueError, match="it holds a Vim of width 8, depth 2, inner width 16, d_state 3, patch size 4"):
        load_into(model, official_file())


def test_another_family():
    with pytest.raises(ValueError, match=r"These tensors are of Vim.*use family='vim'|of a Vim .*use family='vim'"):
        convert_official(official_file(), family="vmamba")
    with pytest.raises(ValueError, match="family='vim' was asked for"):
        convert_official(vmamba_file("v2", "current"), family="vim")


@pytest.mark.parametrize("arch", Vim.arch_zoo)
def test_released_variants(arch):
    """All five, by the names and shapes of the authors' files."""
    name = f"vim_{arch.replace('-', '_')}"
    keys = json.loads(shared_dir("golden", "vim", f"{name}.keys.json").read_text())
    tensors = {k: torch.empty(s, device="meta") for k, s in keys["shapes"].items()}
    converted = convert_official({"model": tensors})
    with torch.device("meta"):
        backbone = Vim(arch, out_type="cls_token")
    backbone.load_state_dict(backbone_part(converted), strict=True)
    assert describe_backbone(converted, get_family("vim")) == (arch, f"Vim {arch}")
    assert describe_backbone(backbone.state_dict(), get_family("vim")) == (arch, f"Vim {arch}")
