"""Loading into backbones and whole models: the rules, the report, the sentences."""

import logging

import pytest
import torch
from mmengine.model import BaseModule
from torch import nn

from mmvssm.checkpoints import convert_official, load_into
from mmvssm.checkpoints.families import get_family
from mmvssm.models.backbones import VMamba
from tests.checkpoints.official_files import CLASSES, GENERATIONS, vmamba_file
from tests.checkpoints.test_convert import backbone_part, prefixed


def backbone(generation="v2", **kwargs):
    return VMamba(GENERATIONS[generation], **kwargs)


class Classifier(BaseModule):
    """The names of mmpretrain's classifier, without mmpretrain."""

    def __init__(self, generation="v2", classes=CLASSES):
        super().__init__()
        self.backbone = backbone(generation, out_indices=(3,))
        self.head = nn.Module()
        self.head.fc = nn.Linear(64, classes)


class Detector(BaseModule):
    def __init__(self):
        super().__init__()
        self.backbone = backbone()
        self.neck = nn.BatchNorm2d(4)


@pytest.fixture
def classifier_file(tmp_path):
    path = tmp_path / "classifier.pth"
    torch.save({"model": vmamba_file("v2", "current")}, path)
    return path


def assert_loaded(module, expected, except_for=()):
    for name, value in module.state_dict().items():
        if not name.startswith(tuple(except_for)) or not except_for:
            assert torch.equal(value, expected[name]), name


class TestBackbone:
    def test_classifier_into_one_output(self, classifier_file):
        net = backbone(out_indices=(3,))
        report = load_into(net, classifier_file)
        assert_loaded(net, backbone_part(convert_official(vmamba_file("v2", "current"))))
        assert report.fits
        assert set(report.matched) == set(net.state_dict())
        assert report.left_out == ["head.fc.weight", "head.fc.bias"]
        assert "left out: head." in report.summary()

    def test_classifier_into_four_outputs_loads_no_output_norm(self, classifier_file):
        """All or none: the trained norm of the last stage alone would scale one level differently."""
        net = backbone()
        report = load_into(net, classifier_file)
        assert_loaded(net, backbone_part(convert_official(vmamba_file("v2", "current"))), except_for=["norm"])
        for i in range(4):
            norm = getattr(net, f"norm{i}")
            assert torch.equal(norm.weight, torch.ones_like(norm.weight))
            assert not norm.bias.any()
        assert len(report.kept) == 8
        assert "has not all output norms of the model (2 of 8 tensors), so none is loaded" in report.summary()

    @pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 3), (3,)])
    def test_dense_file(self, out_indices):
        net = backbone(out_indices=out_indices)
        tensors = prefixed(vmamba_file("v2", "current", dense=True), "backbone.")
        report = load_into(net, {"state_dict": tensors | {"neck.a": torch.ones(1), "roi_head.b": torch.ones(1)}})
        assert_loaded(net, backbone_part(convert_official(tensors)))
        assert not report.kept
        assert {"neck.a", "roi_head.b"} <= set(report.left_out)
        assert len(report.left_out) == 2 + 2 * (4 - len(out_indices))

    @pytest.mark.parametrize("prefix", [None, "backbone.", "model.backbone."])
    def test_prefix_is_optional(self, tmp_path, prefix):
        """The same setting works for official classification files, official dense files and our own."""
        official = vmamba_file("v0", "legacy", dense=True)
        ours = convert_official(official)
        for content in (official, {"state_dict": prefixed(official, "backbone.")}, {"state_dict": ours}):
            net = backbone("v0")
            assert load_into(net, content, prefix=prefix).fits
            assert_loaded(net, backbone_part(ours))

    def test_prefix_picks_one_of_several(self):
        ours, other = (convert_official(vmamba_file("v2", "current", dense=True, seed=s)) for s in (1, 2))
        net = backbone()
        report = load_into(net, prefixed(ours, "student.") | prefixed(other, "teacher."), prefix="teacher.backbone.")
        assert_loaded(net, backbone_part(other))
        assert "Not part of the backbone, left out: student." in report.summary()

    def test_pretrained_init_cfg(self, classifier_file):
        init = dict(type="Pretrained", checkpoint=str(classifier_file), prefix="backbone.")
        net = backbone(init_cfg=init)
        net.init_weights()
        assert_loaded(net, backbone_part(convert_official(vmamba_file("v2", "current"))), except_for=["norm"])

    def test_pretrained_init_cfg_with_a_wrong_file(self, classifier_file):
        net = backbone("v0", init_cfg=dict(type="Pretrained", checkpoint=str(classifier_file), prefix="backbone."))
        with pytest.raises(ValueError, match=r"classifier.pth does not fit this VMamba"):
            net.init_weights()

    def test_wrapped_model(self, classifier_file):
        net = backbone(out_indices=(3,))
        wrapped = nn.parallel.DataParallel(net)
        load_into(wrapped, classifier_file)
        assert_loaded(net, backbone_part(convert_official(vmamba_file("v2", "current"))))

    def test_half_precision_files_keep_the_dtype_of_the_model(self):
        net = backbone(out_indices=(3,))
        tensors = {k: v.half() for k, v in vmamba_file("v2", "current").items()}
        load_into(net, tensors)
        assert {v.dtype for v in net.state_dict().values()} == {torch.float32}
        assert torch.equal(net.patch_embed.conv1.weight, tensors["patch_embed.0.weight"].float())


class TestWholeModels:
    @pytest.mark.parametrize("dialect", ["current", "single-file"])
    def test_classifier(self, dialect):
        model = Classifier()
        report = load_into(model, {"model": vmamba_file("v2", dialect)})
        assert_loaded(model, convert_official(vmamba_file("v2", "current")))
        assert not report.left_out

    def test_our_own_file(self, tmp_path):
        source, target = Classifier(), Classifier()
        torch.save({"state_dict": source.state_dict(), "meta": {}}, tmp_path / "ours.pth")
        load_into(target, tmp_path / "ours.pth")
        assert_loaded(target, source.state_dict())

    def test_other_number_of_classes(self):
        with pytest.raises(
            ValueError, match=r"head.fc.weight: \(5, 64\) in the file, \(3, 64\) in the model"
        ) as caught:
            load_into(Classifier(classes=3), vmamba_file("v2", "current"))
        assert "to start from the backbone alone" in str(caught.value)

    def test_classifier_file_into_a_detector(self):
        with pytest.raises(ValueError, match=r"missing in the file: \d \(neck.weight") as caught:
            load_into(Detector(), vmamba_file("v2", "current"))
        assert "to start from the backbone alone" in str(caught.value)

    def test_counters_of_batch_norm_may_be_missing(self):
        model = Detector()
        tensors = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
        assert load_into(model, tensors).fits

    def test_foreign_backbone_is_loaded_by_name(self):
        source, target = nn.Linear(2, 2), nn.Linear(2, 2)
        assert load_into(target, {"state_dict": source.state_dict()}).fits
        assert torch.equal(source.weight, target.weight)
        with pytest.raises(ValueError, match="missing in the file: 1"):
            load_into(target, {"weight": source.weight, "extra": source.bias})


class TestErrors:
    @pytest.mark.parametrize(("has", "wanted"), [("small-s2l15", "tiny-s1l8"), ("v0-tiny", "tiny-s2l5")])
    def test_wrong_variant_is_named(self, has, wanted):
        with torch.device("meta"):
            file = VMamba(has, out_indices=(3,)).state_dict()
            model = VMamba(wanted)
        with pytest.raises(ValueError, match=f"it holds VMamba {has}, the model is VMamba {wanted}") as caught:
            load_into(model, file)
        assert f"Build the model with arch={has!r} to load this file." in str(caught.value)

    def test_unnamed_variant_is_described(self):
        with pytest.raises(ValueError, match=r"does not fit this VMamba: it holds a VMamba of widths") as caught:
            load_into(backbone("v0"), vmamba_file("v2", "current"))
        sentence = str(caught.value)
        assert "(8, 16, 32, 64), depths (1, 1, 2, 1), ssm_ratio 2, d_state 1, not gated, with MLP" in sentence
        assert "d_state 3, gated, without MLP" in sentence

    def test_another_number_of_input_channels(self):
        with pytest.raises(ValueError, match=r"conv1.weight: \(4, 3, 3, 3\) in the file, \(4, 1, 3, 3\) in the model"):
            load_into(backbone(in_channels=1), vmamba_file("v2", "current"))

    def test_missing_tensor(self):
        tensors = vmamba_file("v2", "current")
        del tensors["layers.2.blocks.1.op.Ds"]
        with pytest.raises(ValueError, match=r"missing in the file: 1 \(stages.2.blocks.1.mixer.D\)"):
            load_into(backbone(), tensors)

    def test_left_over_tensor(self):
        tensors = vmamba_file("v2", "current") | {"pos_embed": torch.ones(1)}
        with pytest.raises(ValueError, match=r"without a place in the model: 1 \(pos_embed\)"):
            load_into(backbone(), tensors)

    def test_a_file_that_does_not_fit_changes_nothing(self):
        net = backbone()
        before = {k: v.clone() for k, v in net.state_dict().items()}
        with pytest.raises(ValueError, match="does not fit"):
            load_into(net, vmamba_file("v2", "current") | {"pos_embed": torch.ones(1)})
        assert_loaded(net, before)

    def test_foreign_file(self, tmp_path):
        torch.save({"conv1.weight": torch.ones(1), "fc.bias": torch.ones(1)}, tmp_path / "resnet.pth")
        with pytest.raises(ValueError, match=r"resnet.pth does not fit a VMamba: .* do not follow the names"):
            load_into(backbone(), tmp_path / "resnet.pth")

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
            load_into(backbone(), tmp_path / "absent.pth")


class TestLenient:
    def test_reports_instead(self):
        net = backbone()
        tensors = vmamba_file("v2", "current") | {"pos_embed": torch.ones(1)}
        del tensors["layers.2.blocks.1.op.Ds"]
        report = load_into(net, tensors, strict=False)
        assert not report.fits
        assert report.missing == ["stages.2.blocks.1.mixer.D"]
        assert report.unexpected == ["pos_embed"]
        assert torch.equal(net.patch_embed.conv1.weight, tensors["patch_embed.0.weight"])

    def test_nothing_in_common_is_still_an_error(self):
        with pytest.raises(ValueError, match="without a place"):
            load_into(nn.Linear(1, 1), {"a": torch.ones(1), "b": torch.ones(1)}, strict=False)


def test_resizing_goes_through_the_family(monkeypatch):
    """Position embeddings and the like: the family brings them to size, and the report counts them."""
    family = get_family("vmamba")
    monkeypatch.setattr(
        type(family), "resize", lambda self, name, tensor, shape: tensor[:, :1] if "conv1.weight" in name else None
    )
    net = backbone(in_channels=1, out_indices=(3,))
    report = load_into(net, vmamba_file("v2", "current"))
    assert report.resized == ["patch_embed.conv1.weight"]
    assert "1 resized" in report.summary()


def test_coverage_is_logged(classifier_file):
    from mmengine.logging import MMLogger

    logger = MMLogger.get_instance("coverage", log_level="INFO")
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    net = backbone(out_indices=(3,))
    load_into(net, classifier_file)
    count = len(net.state_dict())
    assert lines == [
        f"Loaded a VMamba of widths (8, 16, 32, 64), depths (1, 1, 2, 1), ssm_ratio 2, d_state 1, not gated, with MLP, "
        f"conv stem, conv3 downsampling (none of the named ones) from {classifier_file}: {count} tensors matched, "
        "0 missing, 0 unexpected, 0 of another shape, 0 resized, 2 left out. Not part of the backbone, left out: head."
    ]
