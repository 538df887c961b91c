"""MambaVision through the tools: a few iterations and an evaluation in each of the three libraries, on a CPU."""

import math

import pytest

from tests.helpers import ROOT
from tests.tools.conftest import scalars
from tests.tools.test_train_and_test import (
    CLASSIFIER_OPTIONS,
    DETECTOR_OPTIONS,
    SEGMENTOR_OPTIONS,
    every_parameter_was_updated,
)

CONFIGS = ROOT / "configs" / "mambavision"
# Six blocks: a convolutional one in each of the first stages, a scan and attention in each of the others.
ARCH = ("model.backbone.arch.depths=1,1,2,2", "model.backbone.arch.num_heads=2,4")


@pytest.mark.parametrize("kind", ["published", "fitted"])
def test_segmentor(train, ade20k, tmp_path, kind):
    """The published setting, in windows of its proportions, and ours."""
    name = "16xb1-amp" if kind == "published" else "8xb2-fit-amp"
    config = str(CONFIGS / f"mambavision-t_upernet_{name}-160k_ade20k-512x512.py")
    windows = ["model.backbone.window_size=(8,4)"] if kind == "published" else []
    options = [*SEGMENTOR_OPTIONS, *ARCH, *windows, "optim_wrapper.type=OptimWrapper"]
    common = ["--work-dir", str(tmp_path), "--data-root", str(ade20k), "--cfg-options", *options]
    assert train([config, *common]) == 0
    lines = scalars(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert [line for line in lines if "mIoU" in line]
    assert every_parameter_was_updated(tmp_path / "iter_2.pth")


def test_detector(train, coco, tmp_path):
    config = str(CONFIGS / "mask-rcnn_mambavision-t_fpn_1x_coco.py")
    common = ["--work-dir", str(tmp_path), "--data-root", f"{coco}/", "--cfg-options", *DETECTOR_OPTIONS, *ARCH]
    assert train([config, *common]) == 0
    lines = scalars(tmp_path)
    assert [math.isfinite(line["loss"]) for line in lines if "loss" in line] == [True]
    assert [line for line in lines if "coco/segm_mAP" in line]
    assert every_parameter_was_updated(tmp_path / "epoch_1.pth")


def test_classifier(train, class_folders, tmp_path):
    config = str(CONFIGS / "mambavision-t_tinyimagenet20.py")
    options = [*CLASSIFIER_OPTIONS, *ARCH, "train_cfg.max_iters=3"]
    common = ["--work-dir", str(tmp_path), "--data-root", str(class_folders), "--cfg-options", *options]
    assert train([config, *common]) == 0
    lines = scalars(tmp_path)
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert [line for line in lines if "accuracy/top1" in line]
    assert every_parameter_was_updated(tmp_path / "iter_3.pth")
