"""The authors' layouts under our names."""

import json

import pytest
import torch

from mmvssm.checkpoints import convert_official, unwrap
from mmvssm.checkpoints.convert import describe_backbone
from mmvssm.checkpoints.families import get_family
from mmvssm.checkpoints.unpickle import StandIn
from mmvssm.models.backbones import VMamba
from tests.checkpoints.official_files import GENERATIONS, vmamba_file
from tests.helpers import shared_dir

FILES = [("v0", "current"), ("v0", "legacy"), ("v0", "single-file"), ("v2", "current"), ("v2", "single-file")]
WRAPPERS = {
    "plain": lambda sd: sd,
    "model": lambda sd: {"model": sd, "epoch": 3},
    "training": lambda sd: {"model": scaled(sd), "model_ema": sd, "optimizer": {"state": {}}, "max_accuracy": 82.6},
    "empty ema": lambda sd: {"model": sd, "model_ema": None},
    "timm": lambda sd: {"state_dict": scaled(sd), "state_dict_ema": sd, "arch": "vssm"},
    "distributed": lambda sd: {"state_dict": prefixed(sd, "module.")},
    "distributed ema": lambda sd: {"model": scaled(sd), "model_ema": prefixed(sd, "module.")},
    "compiled": lambda sd: prefixed(sd, "_orig_mod."),
    "hugging face": lambda sd: prefixed(sd, "model."),
    "prefixes twice": lambda sd: {"model": prefixed(sd, "module.model.")},
    "nested": lambda sd: {"model": {"state_dict": sd}},
    "averaged model": lambda sd: {"model_ema": {**prefixed(sd, "module."), "n_averaged": torch.tensor(7)}},
    "runner": lambda sd: {"meta": {"epoch": 1}, "state_dict": prefixed(sd, "backbone."), "message_hub": {}},
    "runner ema": lambda sd: {
        "meta": {},
        "state_dict": prefixed(sd, "backbone."),
        "ema_state_dict": {**prefixed(scaled(sd), "module.backbone."), "steps": torch.tensor(7)},
    },
}


def prefixed(state_dict, prefix):
    return {prefix + k: v for k, v in state_dict.items()}


def scaled(state_dict):
    """Other weights with the same names."""
    return {k: v + 1 for k, v in state_dict.items()}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def small_backbone(generation, **kwargs):
    with torch.device("meta"):
        return VMamba(GENERATIONS[generation], **kwargs)


def backbone_part(converted):
    return {k.removeprefix("backbone."): v for k, v in converted.items() if k.startswith("backbone.")}


@pytest.mark.parametrize(("generation", "dialect"), FILES)
class TestDialects:
    def test_names_and_shapes_fit_the_backbone(self, generation, dialect):
        converted = convert_official(vmamba_file(generation, dialect))
        expected = small_backbone(generation, out_indices=(3,)).state_dict()
        got = backbone_part(converted)
        assert got.keys() == expected.keys()
        assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in expected.items()}
        assert {k for k in converted if not k.startswith("backbone.")} == {"head.fc.weight", "head.fc.bias"}

    def test_dense_files_have_four_output_norms(self, generation, dialect):
        converted = convert_official(vmamba_file(generation, dialect, dense=True))
        assert backbone_part(converted).keys() == small_backbone(generation).state_dict().keys()

    def test_all_dialects_hold_the_same_network(self, generation, dialect):
        assert_same(
            convert_official(vmamba_file(generation, dialect)), convert_official(vmamba_file(generation, "current"))
        )

    def test_linear_weights_stored_as_convolutions(self, generation, dialect):
        assert_same(
            convert_official(vmamba_file(generation, dialect, conv_linear=True)),
            convert_official(vmamba_file(generation, dialect)),
        )

    @pytest.mark.parametrize("wrapper", WRAPPERS)
    def test_wrappers(self, generation, dialect, wrapper):
        dense = wrapper.startswith("runner")
        tensors = vmamba_file(generation, dialect, dense)
        assert_same(convert_official(WRAPPERS[wrapper](tensors)), convert_official(tensors))

    def test_converting_twice_changes_nothing(self, generation, dialect):
        once = convert_official(vmamba_file(generation, dialect))
        assert_same(convert_official(once), once)
        bare = backbone_part(once)
        assert_same(convert_official(bare), prefixed(bare, "backbone."))


class TestRenaming:
    """Single tensors, followed by hand."""

    def test_places(self):
        official = vmamba_file("v2", "current")
        ours = convert_official(official)
        for theirs, name in {
            "patch_embed.5.weight": "backbone.patch_embed.conv2.weight",
            "patch_embed.7.bias": "backbone.patch_embed.norm2.bias",
            "layers.2.blocks.1.norm.weight": "backbone.stages.2.blocks.1.norm1.weight",
            "layers.2.blocks.1.norm2.weight": "backbone.stages.2.blocks.1.norm2.weight",
            "layers.2.blocks.1.op.A_logs": "backbone.stages.2.blocks.1.mixer.A_log",
            "layers.2.blocks.1.op.dt_projs_bias": "backbone.stages.2.blocks.1.mixer.dt_proj_bias",
            "layers.0.downsample.1.weight": "backbone.stages.1.downsample.conv.weight",
            "layers.0.downsample.3.weight": "backbone.stages.1.downsample.norm.weight",
            "classifier.norm.weight": "backbone.norm3.weight",
            "classifier.head.weight": "head.fc.weight",
        }.items():
            assert torch.equal(ours[name], official[theirs]), name

    def test_the_norm_of_dense_prediction_wins(self):
        official = vmamba_file("v2", "current") | vmamba_file("v2", "current", dense=True)
        official["outnorm3.weight"] = torch.full((64,), 7.0)
        assert torch.equal(convert_official(official)["backbone.norm3.weight"], torch.full((64,), 7.0))

    def test_other_parts_of_a_detector_keep_their_names(self):
        detector = prefixed(vmamba_file("v0", "legacy", dense=True), "backbone.")
        heads = {"neck.lateral_convs.0.conv.weight": torch.ones(2), "roi_head.bbox_head.fc_cls.bias": torch.ones(3)}
        converted = convert_official({"state_dict": detector | heads, "meta": {}})
        assert {k: v for k, v in converted.items() if not k.startswith("backbone.")} == heads
        assert backbone_part(converted).keys() == small_backbone("v0").state_dict().keys()

    def test_unknown_names_stay_visible(self):
        tensors = vmamba_file("v2", "current") | {
            "pos_embed": torch.ones(1),
            "layers.0.blocks.0.op.extra": torch.ones(1),
            "layers.0.blocks.0.gamma.weight": torch.ones(1),
            "layers.0.downsample.9.weight": torch.ones(1),
            "patch_embed.9.weight": torch.ones(1),
        }
        extra = set(convert_official(tensors)) - set(convert_official(vmamba_file("v2", "current")))
        assert extra == {f"backbone.{k}" for k in tensors if k not in vmamba_file("v2", "current")}

    @pytest.mark.parametrize("generation", GENERATIONS)
    def test_official_names_lead_back(self, generation):
        """The reverse table, used by the weight-decay rules, is the inverse of the conversion."""
        family = get_family("vmamba")
        official = vmamba_file(generation, "current", dense=True)
        names = backbone_part(convert_official(official))
        assert {family.official_name(n, names) for n in names} == set(official)


class TestErrors:
    def test_unknown_family(self):
        with pytest.raises(ValueError, match=r"family must be one of \[.*'vmamba'.*\] or None, got 'resnet'"):
            convert_official(vmamba_file("v2", "current"), family="resnet")

    def test_foreign_tensors(self):
        with pytest.raises(ValueError, match=r"do not follow the names of any known family .*layer1.conv.weight"):
            convert_official({"layer1.conv.weight": torch.ones(1), "fc.bias": torch.ones(1)})
        with pytest.raises(ValueError, match="do not follow the names of the family 'vmamba'"):
            convert_official({"layer1.conv.weight": torch.ones(1), "fc.bias": torch.ones(1)}, family="vmamba")

    def test_another_family(self, monkeypatch):
        from mmvssm.checkpoints import families

        class Other(families.Family):
            name, title = "other", "Other"

            def is_official(self, names):
                return any(n.startswith("rows.") for n in names)

            is_ours = is_official

            def convert(self, state_dict):
                return state_dict, []

            def describe(self, backbone):
                return "small", "Other small"

        real = families.get_family
        monkeypatch.setitem(families._FILES, "other", "other")
        monkeypatch.setattr(families, "get_family", lambda name: Other() if name == "other" else real(name))
        monkeypatch.setattr("mmvssm.checkpoints.convert.get_family", families.get_family)
        with pytest.raises(
            ValueError, match=r"are of Other small; family='vmamba' was asked for \(use family='other'\)"
        ):
            convert_official({"rows.0": torch.ones(1), "rows.1": torch.ones(1)}, family="vmamba")

    @pytest.mark.parametrize("content", [{}, [], {"model": {}}, {"epoch": 1}, None, {"loss": torch.ones(1)}])
    def test_no_weights(self, content):
        with pytest.raises(ValueError, match="No weights found"):
            convert_official(content)


def test_state_dict_in_a_foreign_dict_class():
    foreign = StandIn("some_library.StateDict")
    foreign.items.update({"module.a.b": torch.ones(1), "module.c": torch.zeros(1)})
    assert unwrap({"state_dict": foreign}).keys() == {"a.b", "c"}


def test_raw_weights_on_request():
    raw, averaged = {"a.b": torch.zeros(1)}, {"a.b": torch.ones(1)}
    assert unwrap({"model": raw, "model_ema": averaged})["a.b"] == 1
    assert unwrap({"model": raw, "model_ema": averaged}, prefer_ema=False)["a.b"] == 0


@pytest.mark.parametrize("arch", VMamba.arch_zoo)
class TestReleasedVariants:
    """All ten, by the names and shapes of the authors' files."""

    @staticmethod
    def tensors(arch, dense):
        variant = f"vanilla_vmamba_{arch[3:]}" if arch.startswith("v0-") else f"vmamba_{arch.replace('-', '_')}"
        keys = json.loads(shared_dir("golden", "vmamba", f"{variant}.keys.json").read_text())
        shapes = {k: s for k, s in keys["shapes"].items() if not dense or k not in keys["backbone_missing"]}
        if dense:
            shapes |= keys["backbone_extra"]
        return {k: torch.empty(s, device="meta") for k, s in shapes.items()}

    @pytest.mark.parametrize("dense", [False, True], ids=["classifier", "dense"])
    def test_strict_fit_and_recognition(self, arch, dense):
        converted = convert_official({"model": self.tensors(arch, dense)})
        with torch.device("meta"):
            backbone = VMamba(arch, out_indices=(0, 1, 2, 3) if dense else (3,))
        backbone.load_state_dict(backbone_part(converted), strict=True)
        assert ("head.fc.weight" in converted) is not dense
        assert describe_backbone(converted, get_family("vmamba")) == (arch, f"VMamba {arch}")
