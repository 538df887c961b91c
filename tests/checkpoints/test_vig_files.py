"""ViG and ViG-H files in the authors' layout: names, wrappers, loading, sentences."""

import json
import re

import pytest
import torch
from mmengine.model import BaseModule
from torch import nn

from mmvssm.checkpoints import convert_official, load_into
from mmvssm.checkpoints.convert import describe_backbone
from mmvssm.checkpoints.families import get_family
from mmvssm.models import ViG, ViGH
from tests.checkpoints.official_files import vmamba_file
from tests.checkpoints.test_convert import WRAPPERS, assert_same, backbone_part, prefixed
from tests.helpers import shared_dir

PLAIN = dict(embed_dims=8, depth=2, head_dims=4, mlp_multiple=8)
PYRAMID = dict(embed_dims=8, depths=(1, 2, 1, 1), head_dims=4, mlp_multiple=8)
CLASSES = 5
KINDS = ("plain", "pyramid")


def official_file(
    kind: str, dense: bool = False, old: bool = False, conv_linear: bool = False, grid: int = 14, seed: int = 0
) -> dict:
    """State dict of a tiny network in the authors' layout, written down independently of the converter.

    Args:
        kind: 'plain' or 'pyramid'.
        dense: With output norms and without classifier (pyramid).
        old: Older names of the pyramid.
        conv_linear: Linear weights as 1x1 convolutions.
        grid: Side of the grid of the position embedding.
        seed: Of the values.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}

    def add(name, *shape, linear=False):
        value = torch.randn(shape, generator=generator)
        tensors[name] = value[..., None, None] if linear and conv_linear else value

    def add_pair(name, width, *rest, linear=False):
        add(f"{name}.weight", width, *rest, linear=linear)
        add(f"{name}.bias", width)

    def add_mixer(place, width):
        add(f"{place}.in_proj.0.weight", width, 1, 3, 3)
        add(f"{place}.qkv_proj.weight", 2 * width, width, linear=True)
        add(f"{place}.gk_proj.0.weight", 16, width, linear=True)
        add_pair(f"{place}.gk_proj.1", width, 16, linear=True)
        add_pair(f"{place}.g_proj", width, width, linear=True)
        add(f"{place}.g_norm.weight", 4)
        add(f"{place}.l_norm.weight", 4)
        add(f"{place}.o_proj.weight", width, width, linear=True)

    if kind == "plain":
        add("pos_embed", 1, grid * grid, 8)
        add_pair("patch_embed.proj.0", 4, 3, 9, 9)
        add_pair("patch_embed.proj.1", 4)
        add_pair("patch_embed.proj.3", 8, 4, 3, 3)
        add_pair("patch_embed.proj.4", 8)
        for i in range(2):
            add(f"blocks.{i}.attn_norm.weight", 8)
            add_mixer(f"blocks.{i}.attn", 8)
            add(f"blocks.{i}.mlp_norm.weight", 8)
            add(f"blocks.{i}.mlp.gate_proj.weight", 48, 8, linear=True)
            add(f"blocks.{i}.mlp.down_proj.weight", 8, 24, linear=True)
        add("norm.weight", 8)
        add_pair("head", CLASSES, 8, linear=True)
        return tensors

    add_pair("patch_embed.proj" if old else "patch_embed.0", 4, 3, 3, 3)
    add_pair("patch_embed.norm" if old else "patch_embed.2", 4)
    add_pair("patch_embed.5", 8, 4, 3, 3)
    add_pair("patch_embed.7", 8)
    for stage, depth in enumerate(PYRAMID["depths"]):
        width = 8 * 2**stage
        hidden = {8: 24, 16: 48, 32: 88, 64: 176}[width]  # 8/3 of the width, up to a multiple of 8
        for j in range(depth):
            block = f"layers.{stage}.blocks.{j}"
            add_pair(f"{block}.ln_1" if old else f"{block}.norm", width)
            add_mixer(f"{block}.self_attention" if old else f"{block}.op", width)
            add_pair(f"{block}.norm2", width)
            add(f"{block}.mlp.fc1.weight", 2 * hidden, width, linear=True)
            add(f"{block}.mlp.fc2.weight", width, hidden, linear=True)
        if stage < 3:
            add_pair(f"layers.{stage}.downsample.1", 2 * width, width, 3, 3)
            add_pair(f"layers.{stage}.downsample.3", 2 * width)
    if dense:
        for stage in range(4):
            add_pair(f"outnorm{stage}", 8 * 2**stage)
    else:
        add_pair("norm" if old else "classifier.norm", 64)
        add_pair("head" if old else "classifier.head", CLASSES, 64, linear=True)
    return tensors


def backbone(kind: str, **kwargs):
    return ViG(PLAIN, **kwargs) if kind == "plain" else ViGH(PYRAMID, **kwargs)


@pytest.mark.parametrize("kind", KINDS)
class TestConversion:
    def test_names_and_shapes_fit_the_backbone(self, kind):
        converted = convert_official(official_file(kind))
        expected = backbone(kind, out_indices=(-1,)).state_dict()
        assert {k: v.shape for k, v in backbone_part(converted).items()} == {k: v.shape for k, v in expected.items()}
        assert {k for k in converted if not k.startswith("backbone.")} == {"head.fc.weight", "head.fc.bias"}

    def test_linear_weights_stored_as_convolutions(self, kind):
        assert_same(convert_official(official_file(kind, conv_linear=True)), convert_official(official_file(kind)))

    @pytest.mark.parametrize("wrapper", WRAPPERS)
    def test_wrappers(self, kind, wrapper):
        tensors = official_file(kind, dense=kind == "pyramid" and wrapper.startswith("runner"))
        if wrapper.startswith("runner"):  # heads stand outside the backbone there
            tensors = {k: v for k, v in tensors.items() if not k.startswith("head.")}
        assert_same(convert_official(WRAPPERS[wrapper](tensors)), convert_official(tensors))

    def test_converting_twice_changes_nothing(self, kind):
        once = convert_official(official_file(kind))
        assert_same(convert_official(once), once)
        bare = backbone_part(once)
        assert_same(convert_official(bare), prefixed(bare, "backbone."))

    def test_a_damaged_file_keeps_its_names_visible(self, kind):
        tensors = official_file(kind)
        lost = next(k for k in tensors if k.endswith("g_proj.weight"))
        del tensors[lost]
        place = lost.removesuffix("g_proj.weight")
        converted = convert_official(tensors)
        assert f"backbone.{place}qkv_proj.weight" in converted
        assert f"backbone.{place}gk_proj.0.weight" in converted
        with pytest.raises(ValueError, match=r"does not fit this ViGH?\. Tensors missing in the file: 1 .*in_proj"):
            load_into(backbone(kind, out_indices=(-1,)), tensors)

    def test_unknown_names_stay_visible(self, kind):
        extra = {"blocks.0.attn.lower_bound", "layers.0.blocks.0.op.extra", "cls_token", "patch_embed.proj.9.weight"}
        tensors = official_file(kind) | {k: torch.ones(1) for k in extra}
        added = set(convert_official(tensors)) - set(convert_official(official_file(kind)))
        assert added == {f"backbone.{k}" for k in extra}


class TestRenaming:
    """Single tensors, followed by hand."""

    def test_places_of_the_plain_family(self):
        official = official_file("plain")
        ours = convert_official(official)
        for theirs, name in {
            "patch_embed.proj.3.weight": "patch_embed.conv2.weight",
            "patch_embed.proj.4.bias": "patch_embed.norm2.bias",
            "blocks.1.attn_norm.weight": "blocks.1.norm1.weight",
            "blocks.1.attn.in_proj.0.weight": "blocks.1.mixer.conv.weight",
            "blocks.1.attn.gk_proj.1.bias": "blocks.1.mixer.decay_proj.bias",
            "blocks.1.attn.g_proj.bias": "blocks.1.mixer.gate.bias",
            "blocks.1.attn.l_norm.weight": "blocks.1.mixer.gate.norm.weight",
            "blocks.1.mlp.gate_proj.weight": "blocks.1.mlp.fc1.weight",
            "norm.weight": "norm.weight",
        }.items():
            assert torch.equal(ours[f"backbone.{name}"], official[theirs]), name
        assert torch.equal(ours["head.fc.weight"], official["head.weight"])
        parts = [official[f"blocks.1.attn.{leaf}.weight"] for leaf in ("qkv_proj", "g_proj", "gk_proj.0")]
        assert torch.equal(ours["backbone.blocks.1.mixer.in_proj.weight"], torch.cat(parts))
        # Row 2, column 5 of the grid.
        assert torch.equal(ours["backbone.pos_embed"][0, 2, 5], official["pos_embed"][0, 2 * 14 + 5])

    def test_places_of_the_pyramid(self):
        official = official_file("pyramid")
        ours = convert_official(official)
        for theirs, name in {
            "patch_embed.5.weight": "patch_embed.conv2.weight",
            "patch_embed.2.bias": "patch_embed.norm1.bias",
            "layers.1.blocks.1.norm.weight": "stages.1.blocks.1.norm1.weight",
            "layers.1.blocks.1.norm2.bias": "stages.1.blocks.1.norm2.bias",
            "layers.1.blocks.1.op.g_norm.weight": "stages.1.blocks.1.mixer.g_norm.weight",
            "layers.0.downsample.1.weight": "stages.1.downsample.conv.weight",
            "layers.2.downsample.3.bias": "stages.3.downsample.norm.bias",
            "classifier.norm.weight": "norm3.weight",
        }.items():
            assert torch.equal(ours[f"backbone.{name}"], official[theirs]), name

    def test_older_names_hold_the_same_network(self):
        assert_same(convert_official(official_file("pyramid", old=True)), convert_official(official_file("pyramid")))

    def test_the_norm_of_dense_prediction_wins(self):
        official = official_file("pyramid") | official_file("pyramid", dense=True)
        official["outnorm3.weight"] = torch.full((64,), 7.0)
        assert torch.equal(convert_official(official)["backbone.norm3.weight"], torch.full((64,), 7.0))

    @pytest.mark.parametrize("kind", KINDS)
    def test_official_names_lead_back(self, kind):
        """The reverse table is the inverse of the conversion but for what became one tensor here."""
        family = get_family("vig")
        official = official_file(kind, dense=True)
        names = backbone_part(convert_official(official))
        joined = {n for n in official if re.search(r"\.(g_proj\.weight|gk_proj\.0\.weight)$", n)}
        heads = {"head.weight", "head.bias"} & set(official)
        assert {family.official_name(n, names) for n in names} == set(official) - joined - heads


class Classifier(BaseModule):
    """The names of mmpretrain's classifier, without mmpretrain."""

    def __init__(self, kind):
        super().__init__()
        self.backbone = backbone(kind, out_indices=(-1,))
        self.head = nn.Module()
        self.head.fc = nn.Linear(8 if kind == "plain" else 64, CLASSES)


@pytest.mark.parametrize("kind", KINDS)
class TestLoading:
    @pytest.mark.parametrize("content", ["model", "state_dict", "bare"])
    def test_whole_classifier(self, tmp_path, kind, content):
        tensors = official_file(kind)
        torch.save(tensors if content == "bare" else {content: tensors}, tmp_path / "official.pth")
        model = Classifier(kind)
        report = load_into(model, tmp_path / "official.pth")
        assert report.fits
        assert len(report.matched) == len(model.state_dict())
        assert_same(model.state_dict(), convert_official(tensors))

    def test_backbone_leaves_the_classifier_out(self, kind):
        net = backbone(kind, out_indices=(0, 1))
        report = load_into(net, {"model": official_file(kind)})
        assert report.fits
        assert {"head.fc.weight", "head.fc.bias"} <= set(report.left_out)
        if kind == "pyramid":
            assert len(report.kept) == 4
            assert (net.norm1.weight == 1).all()

    def test_pretrained_init_cfg(self, tmp_path, kind):
        torch.save({"model": official_file(kind)}, tmp_path / "official.pth")
        init = dict(type="Pretrained", checkpoint=str(tmp_path / "official.pth"), prefix="backbone.")
        net = backbone(kind, out_indices=(-1,), init_cfg=init)
        net.init_weights()
        assert_same(net.state_dict(), backbone_part(convert_official(official_file(kind))))

    def test_a_file_of_another_family(self, kind):
        net = backbone(kind, out_indices=(-1,))
        before = {k: v.clone() for k, v in net.state_dict().items()}
        with pytest.raises(ValueError, match=r"These tensors are of a VMamba .*family='vig' was asked for"):
            load_into(net, vmamba_file("v2", "current"))
        assert_same(net.state_dict(), before)


class TestPositionEmbedding:
    @pytest.mark.parametrize("size", [224, 512, (96, 160), (7, 7)])
    def test_resized_to_the_grid_of_the_model(self, size):
        net = backbone("plain", img_size=size, out_indices=(-1,))
        official = official_file("plain")
        report = load_into(net, {"model": official})
        height, width = net.pos_embed.shape[1:3]
        assert report.resized == ([] if size == 224 else ["pos_embed"])
        maps = official["pos_embed"].view(1, 14, 14, 8).permute(0, 3, 1, 2)
        want = nn.functional.interpolate(maps, (height, width), mode="bicubic", align_corners=False)
        want = want.permute(0, 2, 3, 1) if size != 224 else maps.permute(0, 2, 3, 1)
        torch.testing.assert_close(net.pos_embed.detach(), want)

    def test_from_one_rectangle_to_another(self):
        """Our files know their grid, so 4 x 6 and 6 x 4 are told apart."""
        source, target = backbone("plain", img_size=(64, 96)), backbone("plain", img_size=(96, 64))
        report = load_into(target, source.state_dict())
        assert report.resized == ["pos_embed"]
        maps = source.pos_embed.detach().permute(0, 3, 1, 2)
        want = nn.functional.interpolate(maps, (6, 4), mode="bicubic").permute(0, 2, 3, 1)
        torch.testing.assert_close(target.pos_embed.detach(), want)

    def test_of_no_square_is_an_error(self):
        official = official_file("plain")
        official["pos_embed"] = official["pos_embed"][:, :195]
        with pytest.raises(ValueError, match=r"of another shape: 1 \(pos_embed: \(1, 195, 8\) in the file"):
            load_into(backbone("plain"), official)


def released(family: type, arch: str, dense: bool = False) -> dict:
    """The authors' names and shapes of a released variant, on the meta device."""
    variant = f"vig-h-{arch[0]}" if family is ViGH else f"vig-{arch[0]}"
    keys = json.loads(shared_dir("golden", "vig", f"{variant}.keys.json").read_text())
    shapes = {k: s for k, s in keys["shapes"].items() if not dense or k not in keys["backbone_dropped"]}
    shapes |= keys["backbone_extra_shapes"] if dense else {}
    return {k: torch.empty(s, device="meta") for k, s in shapes.items()}


@pytest.mark.parametrize("arch", ["tiny", "small", "base"])
@pytest.mark.parametrize(("family", "dense"), [(ViG, False), (ViGH, False), (ViGH, True)])
class TestReleasedVariants:
    """All six, by the names and shapes of the authors' files."""

    def test_strict_fit_and_recognition(self, arch, family, dense):
        converted = convert_official({"model": released(family, arch, dense)})
        with torch.device("meta"):
            net = family(arch, out_indices=(0, 1, 2, 3) if dense else (-1,))
        net.load_state_dict(backbone_part(converted), strict=True)
        assert ("head.fc.weight" in converted) is not dense
        title = "ViG-H" if family is ViGH else "ViG"
        assert describe_backbone(converted, get_family("vig")) == (arch, f"{title} {arch}")


class TestSentences:
    def test_another_variant(self):
        with torch.device("meta"):
            net = ViG("small")
        with pytest.raises(
            ValueError,
            match=r"it holds ViG tiny, the model is ViG small\. Build the model with type='mmvssm\.ViG', arch='tiny'",
        ):
            load_into(net, {"model": released(ViG, "tiny")})

    def test_the_other_kind(self):
        with torch.device("meta"):
            net = ViG("tiny")
        with pytest.raises(
            ValueError,
            match=r"it holds ViG-H base, the model is ViG tiny\. Build .* with type='mmvssm\.ViGH', arch='base'",
        ):
            load_into(net, {"model": released(ViGH, "base")})

    def test_a_variant_of_ones_own(self):
        with pytest.raises(
            ValueError, match=r"holds a ViG-H of widths \(8, 16, 32, 64\), depths \(1, 2, 1, 1\), head_"
        ):
            load_into(backbone("plain"), official_file("pyramid"))
