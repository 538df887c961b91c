"""Vim in whole runs through the tools: a classifier, a segmentor and a detector, a few iterations each."""

import math

import pytest

from tests.helpers import ROOT
from tests.tools import miniature
from tests.tools.conftest import metrics, scalars
from tests.tools.test_train_and_test import (
    CLASSIFIER_OPTIONS,
    DETECTOR_OPTIONS,
    SEGMENTOR_OPTIONS,
    every_parameter_was_updated,
)

CONFIGS = ROOT / "configs" / "vim"
ARCH = (
    "model.backbone.arch._delete_=True",
    "model.backbone.arch.embed_dims=16",
    "model.backbone.arch.depth=4",
    "model.backbone.arch.patch_size=8",
    "model.backbone.arch.d_state=4",
    "model.backbone.drop_path_rate=0.1",
)
REPLACED = (*miniature.TINY_ARCH, "model.neck.in_channels", "model.head.in", "model.decode_head.in", "model.auxiliary")


def options(of_vmamba, *own: str) -> list[str]:
    """The options of the other family's runs, with another backbone."""
    return [o for o in of_vmamba if not o.startswith(REPLACED)] + [*ARCH, *own]


def losses(work_dir) -> list[float]:
    return [line["loss"] for line in scalars(work_dir) if "loss" in line]


def test_classifier(train, evaluate, class_folders, tmp_path):
    config = str(CONFIGS / "vim-tiny_tinyimagenet20.py")
    own = ("model.backbone.out_indices=3", "model.head.in_channels=16", "train_cfg.max_iters=3")
    common = ["--data-root", str(class_folders), "--cfg-options", *options(CLASSIFIER_OPTIONS, *own)]
    assert train([config, "--work-dir", str(tmp_path / "run"), *common]) == 0
    (validation,) = [line for line in scalars(tmp_path / "run") if "accuracy/top1" in line]
    assert all(map(math.isfinite, losses(tmp_path / "run")))
    checkpoint = str(tmp_path / "run" / "iter_3.pth")
    assert every_parameter_was_updated(checkpoint)
    assert evaluate([config, checkpoint, "--work-dir", str(tmp_path / "test"), *common]) == 0
    assert metrics(tmp_path / "test")["accuracy/top5"] == validation["accuracy/top5"]


@pytest.mark.parametrize("arch", ["tiny", "small"])
def test_segmentor(train, ade20k, tmp_path, arch):
    """The authors' two kinds: outputs of the mixers, and the rotated residual stream."""
    config = str(CONFIGS / f"vim-{arch}_upernet_4xb4-160k_ade20k-512x512.py")
    own = (
        "model.backbone.out_indices=0,1,2,3",
        "model.backbone.img_size=64",
        "model.neck.in_channels=16,16,16,16",
        "model.neck.stride=8",
        "model.decode_head.in_channels=16,16,16,16",
        "model.auxiliary_head.in_channels=16",
        "model.auxiliary_head.channels=8",
        "model.test_cfg.crop_size=64,64",
        "model.test_cfg.stride=48,48",
    )
    common = ["--data-root", str(ade20k), "--cfg-options", *options(SEGMENTOR_OPTIONS, *own)]
    assert train([config, "--work-dir", str(tmp_path), *common]) == 0
    assert len(losses(tmp_path)) == 2
    assert all(map(math.isfinite, losses(tmp_path)))
    assert [line for line in scalars(tmp_path) if "mIoU" in line]
    assert every_parameter_was_updated(tmp_path / "iter_2.pth")


def test_detector(train, coco, tmp_path):
    config = str(CONFIGS / "mask-rcnn_vim-tiny_simfpn_1x_coco.py")
    own = (
        "model.backbone.out_indices=3",
        "model.backbone.img_size=64",
        "model.neck.in_channels=16",
        "model.neck.stride=8",
    )
    common = ["--data-root", f"{coco}/", "--cfg-options", *options(DETECTOR_OPTIONS, *own)]
    assert train([config, "--work-dir", str(tmp_path), *common]) == 0
    assert all(map(math.isfinite, losses(tmp_path)))
    assert [line for line in scalars(tmp_path) if "coco/segm_mAP" in line]
    assert every_parameter_was_updated(tmp_path / "epoch_1.pth")
