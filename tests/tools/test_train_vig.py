"""ViG and ViG-H through the tools: the COCO, ADE20K and Tiny ImageNet configs train and evaluate, in miniature."""

import math

import pytest

from tests.helpers import ROOT
from tests.tools import miniature
from tests.tools.conftest import scalars
from tests.tools.test_train_and_test import (
    CLASSIFIER_OPTIONS,
    DETECTOR_OPTIONS,
    SEGMENTOR_OPTIONS,
    every_parameter_was_updated,
)

CONFIGS = ROOT / "configs" / "vig"
# The plain models keep their depth, so that the configs' taps stay where they are.
ARCHS = {
    "vigh": ("model.backbone.arch.head_dims=4", "model.backbone.arch.mlp_multiple=8"),
    "vig": (
        "model.backbone.arch._delete_=True",
        "model.backbone.arch.embed_dims=8",
        "model.backbone.arch.head_dims=4",
        "model.backbone.arch.mlp_multiple=8",
        "model.backbone.drop_path_rate=0",
    ),
}
SEGMENTOR_WIDTHS = (
    "model.neck.in_channels=[8,8,8,8]",
    "model.decode_head.in_channels=[8,8,8,8]",
    "model.auxiliary_head.in_channels=8",
)


def options(family: str, common: tuple[str, ...], widths: tuple[str, ...]) -> list[str]:
    """The options of VMamba's runs with the family's arch and, for the plain one, its widths."""
    if family == "vigh":
        return [*common, *ARCHS["vigh"]]
    ours = {option.partition("=")[0] for option in widths}
    kept = [o for o in common if o not in miniature.TINY_ARCH and o.partition("=")[0] not in ours]
    return [*kept, *ARCHS["vig"], *widths]


def check(work_dir, checkpoint: str, metric: str) -> None:
    lines = scalars(work_dir)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)
    (validation,) = [line for line in lines if metric in line]
    assert math.isfinite(validation[metric])
    assert every_parameter_was_updated(work_dir / checkpoint)


@pytest.mark.parametrize("family", ARCHS)
def test_segmentor(train, ade20k, tmp_path, family):
    config = CONFIGS / f"{family}-tiny_upernet_4xb4-160k_ade20k-512x512.py"
    given = options(family, SEGMENTOR_OPTIONS, SEGMENTOR_WIDTHS)
    run = [str(config), "--work-dir", str(tmp_path), "--data-root", str(ade20k)]
    assert train([*run, "--cfg-options", *given]) == 0
    check(tmp_path, "iter_2.pth", "mIoU")


@pytest.mark.parametrize("family", ARCHS)
def test_detector(train, coco, tmp_path, family):
    pyramid = "fpn" if family == "vigh" else "simfpn"
    config = CONFIGS / f"mask-rcnn_{family}-tiny_{pyramid}_1x_coco.py"
    given = options(family, DETECTOR_OPTIONS, ("model.neck.in_channels=[8]",))
    run = [str(config), "--work-dir", str(tmp_path), "--data-root", f"{coco}/"]
    assert train([*run, "--cfg-options", *given]) == 0
    check(tmp_path, "epoch_1.pth", "coco/segm_mAP")


@pytest.mark.parametrize("family", ARCHS)
def test_classifier(train, class_folders, tmp_path, family):
    config = CONFIGS / f"{family}-tiny_tinyimagenet20.py"
    given = options(family, CLASSIFIER_OPTIONS, ("model.head.in_channels=8",))
    run = [str(config), "--work-dir", str(tmp_path), "--data-root", str(class_folders)]
    assert train([*run, "--cfg-options", *given, "train_cfg.max_iters=3"]) == 0
    check(tmp_path, "iter_3.pth", "accuracy/top1")
