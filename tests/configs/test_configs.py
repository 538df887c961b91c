"""Every config parses and builds, and its parts fit each other."""

import copy
import re

import pytest
import torch

from mmvssm import list_models
from mmvssm.models import BaseBackbone
from tests.configs.conftest import FAMILIES, config_files, parsed
from tests.helpers import ROOT

OURS = config_files(*FAMILIES, "_examples_")
BASELINES = config_files("_baselines_")
TASKS = {"mmpretrain": "classification", "mmdet": "detection", "mmseg": "segmentation"}


def build(cfg, device: str):
    """The config's model; on the meta device nothing is computed and no memory is taken."""
    from mmengine.registry import MODELS, DefaultScope

    model = copy.deepcopy(cfg.model)
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device(device):
        return MODELS.build(model)


def check_channels(model, scope: str) -> None:
    """What the neck or the heads expect is what the backbone gives."""
    widths = list(model.backbone.out_channels)
    pyramid = getattr(model, "neck", None)
    if type(pyramid).__module__.startswith("mmvssm."):  # a plain backbone: all maps have one stride
        assert list(pyramid.in_channels) == widths
        assert set(model.backbone.out_strides) == {model.backbone.patch_embed.stride}
        widths = pyramid.out_channels
    if scope == "mmpretrain":
        assert model.head.fc.in_features == widths[-1]
        assert len(widths) == 1
    elif scope == "mmdet":
        if isinstance(widths, list):
            assert list(model.neck.in_channels) == widths
            assert tuple(model.backbone.out_strides) == (4, 8, 16, 32)
        else:
            assert model.rpn_head.in_channels == widths
        assert tuple(model.rpn_head.prior_generator.strides[0]) == (4, 4)
    else:
        assert list(model.decode_head.in_channels) == widths
        assert model.auxiliary_head.in_channels == widths[2]
        assert model.decode_head.num_classes == model.auxiliary_head.num_classes


@pytest.mark.parametrize("file", OURS, ids=lambda file: file.stem)
def test_builds(file):
    cfg = parsed(file)
    plain = file.with_name(file.name.replace("amp-", ""))
    if plain != file and plain.exists():  # the same but for the precision, and the other file is built
        other = parsed(plain).to_dict()
        assert other["optim_wrapper"].pop("type") == "OptimWrapper"
        other["optim_wrapper"]["type"] = "AmpOptimWrapper"
        assert cfg.to_dict() == other
    else:
        model = build(cfg, "meta")
        check_channels(model, cfg.default_scope)
        assert isinstance(model.backbone, BaseBackbone)
        assert cfg.model.backbone.type == f"mmvssm.{type(model.backbone).__name__}"
    assert cfg.optim_wrapper.get("type", "OptimWrapper") in ("OptimWrapper", "AmpOptimWrapper")
    assert file.parent.name == "_examples_" or "base_batch_size" in cfg.auto_scale_lr
    assert "custom_imports" not in cfg


@pytest.mark.parametrize("file", BASELINES, ids=lambda file: file.stem)
def test_baseline_differs_in_the_backbone_only(file):
    ours = next(f for f in OURS if f.stem == file.stem.replace("swin-t", "vmamba-tiny-s1l8"))
    ours, baseline = parsed(ours), parsed(file)
    contents = []
    for cfg in (ours, baseline):
        content = cfg.to_dict()
        backbone = content["model"].pop("backbone")
        contents.append(content)
        assert "init_cfg" not in backbone
    assert contents[0] == contents[1]
    assert ours.model.backbone.drop_path_rate == baseline.model.backbone.drop_path_rate
    build(baseline, "cpu")


@pytest.mark.parametrize("file", config_files(*FAMILIES), ids=lambda file: file.stem)
def test_file_name_says_what_the_config_is(file):
    cfg = parsed(file)
    if isinstance(cfg.model.backbone.arch, str):
        assert f"-{cfg.model.backbone.arch}_" in file.stem
    if "_in1k" not in file.stem:  # there the authors' choice counts, see the tests of the recipes
        assert (cfg.optim_wrapper.get("type") == "AmpOptimWrapper") == ("amp-" in file.stem)
    if "x_coco" in file.stem:
        assert cfg.train_cfg.max_epochs == (12 if "_1x_" in file.stem else 36)
    if "xb" in file.stem:
        gpus, batch = next(part for part in file.stem.split("_") if "xb" in part).split("-")[0].split("xb")
        assert cfg.train_dataloader.batch_size == int(batch)
        assert cfg.auto_scale_lr.base_batch_size == int(gpus) * int(batch)
    assert file.stem in list_models(task=TASKS[cfg.default_scope])


def test_every_config_is_documented():
    """By a pattern in the table of recipes; and no pattern is empty."""
    table = (ROOT / "docs" / "train.md").read_text().split("## Configs")[1].split("\n## ")[0]
    patterns = re.findall(r"^\| `(\S+)` \|", table, re.MULTILINE)
    files = config_files(*FAMILIES)
    for pattern in patterns:
        assert [file for file in files if file.match(f"{pattern}.py")], pattern
    for file in files:
        assert any(file.match(f"{pattern}.py") for pattern in patterns), file.name


@pytest.mark.parametrize("name", ["mmdet_mask-rcnn", "mmseg_upernet", "mmpretrain_classifier"])
def test_examples_of_the_readme(name):
    """The README shows these files; they are the stock config but for the backbone and what is fed by it."""
    text = next(f for f in OURS if f.stem == name).read_text()
    assert text in (ROOT / "README.md").read_text()
    override = text.split("model = dict(\n")[1].rstrip().rstrip(")")
    assert len(override.strip().splitlines()) <= 5


def test_data_folder_follows_the_environment(monkeypatch):
    from mmengine.config import Config

    monkeypatch.setenv("MMVSSM_DATA", "/elsewhere")
    for name in ("mask-rcnn_vmamba-tiny-s1l8_fpn_car-parts", "vmamba-tiny-s1l8_upernet_camvid"):
        cfg = Config.fromfile(next(f for f in OURS if f.stem == name))
        assert cfg.train_dataloader.dataset.data_root.startswith("/elsewhere/c")
        assert cfg.val_evaluator.get("ann_file", "/elsewhere/").startswith("/elsewhere/")
