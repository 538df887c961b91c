"""Whole runs through the tools: train, evaluate, resume, for each of the three libraries."""

import json
import math
import pickle

import pytest
import torch

from tests.helpers import ROOT
from tests.tools import miniature
from tests.tools.conftest import metrics, scalars

CONFIGS = ROOT / "configs" / "vmamba"
CLASSIFIER = str(CONFIGS / "vmamba-tiny-s1l8_tinyimagenet20.py")
SEGMENTOR = str(CONFIGS / "vmamba-tiny-s1l8_upernet_4xb4-160k_ade20k-512x512.py")
DETECTOR = str(CONFIGS / "mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py")

# The stock COCO and ADE20K configs: paths, length and sizes are changed, nothing else.
SEGMENTOR_OPTIONS = (
    *miniature.SEGMENTOR,
    "model.backbone.init_cfg=None",
    "train_cfg.max_iters=2",
    "train_cfg.val_interval=2",
    "default_hooks.checkpoint.interval=2",
    "default_hooks.logger.interval=1",
    "train_dataloader.dataset.pipeline.2.scale=(128,64)",
    "train_dataloader.dataset.pipeline.3.crop_size=(64,64)",
    "model.data_preprocessor.size=(64,64)",
    "val_dataloader.dataset.pipeline.1.scale=(128,64)",
    "test_dataloader.dataset.pipeline.1.scale=(128,64)",
)
DETECTOR_OPTIONS = (
    *miniature.DETECTOR,
    "model.backbone.init_cfg=None",
    "train_cfg.max_epochs=1",
    "default_hooks.logger.interval=1",
    "train_dataloader.dataset.pipeline.2.scale=(128,64)",
    "val_dataloader.dataset.pipeline.1.scale=(128,64)",
    "test_dataloader.dataset.pipeline.1.scale=(128,64)",
    "model.test_cfg.rcnn.score_thr=0.0",
)
CLASSIFIER_OPTIONS = (
    *miniature.CLASSIFIER,
    "param_scheduler.0.end=2",
    "param_scheduler.1.begin=2",
    "default_hooks.logger.interval=1",
    "randomness.seed=0",
)


def every_parameter_was_updated(checkpoint: str) -> bool:
    """AdamW keeps a state for exactly the parameters that had gradients; DDP hangs on the others."""
    optimizer = torch.load(checkpoint, weights_only=False)["optimizer"]
    names = [index for group in optimizer["param_groups"] for index in group["params"]]
    return set(names) == set(optimizer["state"])


def test_segmentor_on_ade20k(train, evaluate, ade20k, tmp_path, capsys):
    common = ["--data-root", str(ade20k), "--cfg-options", *SEGMENTOR_OPTIONS]
    assert train([SEGMENTOR, "--work-dir", str(tmp_path / "run"), *common]) == 0
    lines = scalars(tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)
    (validation,) = [line for line in lines if "mIoU" in line]
    assert every_parameter_was_updated(tmp_path / "run" / "iter_2.pth")

    run = [SEGMENTOR, str(tmp_path / "run" / "iter_2.pth"), "--work-dir", str(tmp_path / "test")]
    assert evaluate([*run, "--out", str(tmp_path / "metrics.json"), "--out-item", "metrics", *common]) == 0
    tested = json.loads((tmp_path / "metrics.json").read_text())
    assert tested["aAcc"] == validation["aAcc"]
    assert tested["mIoU"] == validation["mIoU"]

    scales = "tta_pipeline.1.transforms.0.0.scale_factor=0.5"
    assert evaluate([*run, "--tta", "--out", str(tmp_path / "maps"), *common, scales]) == 0
    assert sorted(f.name for f in (tmp_path / "maps").iterdir()) == ["0.png", "1.png"]


def test_detector_on_coco(train, evaluate, coco, tmp_path, capsys):
    common = ["--data-root", f"{coco}/", "--cfg-options", *DETECTOR_OPTIONS]
    assert train([DETECTOR, "--work-dir", str(tmp_path / "run"), *common]) == 0
    lines = scalars(tmp_path / "run")
    assert [math.isfinite(line["loss"]) for line in lines if "loss" in line] == [True]
    (validation,) = [line for line in lines if "coco/segm_mAP" in line]
    assert every_parameter_was_updated(tmp_path / "run" / "epoch_1.pth")

    run = [DETECTOR, str(tmp_path / "run" / "epoch_1.pth"), "--work-dir", str(tmp_path / "test")]
    out = tmp_path / "predictions.pkl"
    assert evaluate([*run, "--out", str(out), "--show-dir", "pictures", *common]) == 0
    predictions = pickle.loads(out.read_bytes())
    assert len(predictions) == 2
    assert {"bboxes", "scores", "labels", "masks"} <= set(predictions[0]["pred_instances"])
    assert len(list((tmp_path / "test").glob("*/pictures/*.jpg"))) == 2
    assert metrics(tmp_path / "test")["coco/bbox_mAP"] == validation["coco/bbox_mAP"]

    assert evaluate([*run, "--tta", *common]) == 2
    assert "mask head" in capsys.readouterr().err


def test_classifier_on_folders(train, evaluate, class_folders, tmp_path, capsys):
    common = ["--data-root", str(class_folders), "--cfg-options", *CLASSIFIER_OPTIONS]
    run = [CLASSIFIER, "--work-dir", str(tmp_path / "run"), *common]
    assert train([*run, "train_cfg.max_iters=3"]) == 0
    (validation,) = [line for line in scalars(tmp_path / "run") if "accuracy/top1" in line]
    assert every_parameter_was_updated(tmp_path / "run" / "iter_3.pth")

    test = [CLASSIFIER, str(tmp_path / "run" / "iter_3.pth"), "--work-dir", str(tmp_path / "test")]
    out = tmp_path / "predictions.pkl"
    assert evaluate([*test, "--out", str(out), *common]) == 0
    assert metrics(tmp_path / "test")["accuracy/top5"] == validation["accuracy/top5"]
    assert len(pickle.loads(out.read_bytes())) == 40
    assert evaluate([*test, "--show-dir", str(tmp_path / "shown"), "--interval", "20", *common]) == 0
    assert len(list((tmp_path / "shown").iterdir())) == 2

    assert evaluate([*test, "--tta", "--out", str(tmp_path / "tta.json"), "--out-item", "metrics", *common]) == 0
    assert "accuracy/top1" in json.loads((tmp_path / "tta.json").read_text())
    assert evaluate([*test, "--tta", "--show-dir", "shown", *common]) == 2
    assert "--show-dir" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["path", "auto"])
def test_resuming_gives_the_same_curve(train, class_folders, tmp_path, how):
    options = [*CLASSIFIER_OPTIONS, "model.train_cfg=None", "train_cfg.max_iters=4"]
    options += ["default_hooks.checkpoint.interval=2", "default_hooks.checkpoint.max_keep_ckpts=5"]
    common = ["--no-validate", "--data-root", str(class_folders), "--cfg-options", *options]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train([CLASSIFIER, "--work-dir", str(whole), *common]) == 0

    checkpoint = whole / "iter_2.pth"
    if how == "path":
        resume = ["--resume", str(checkpoint)]
    else:
        resume = ["--resume"]
        resumed.mkdir()
        (resumed / "iter_2.pth").write_bytes(checkpoint.read_bytes())
        (resumed / "last_checkpoint").write_text(str(resumed / "iter_2.pth"))
    assert train([CLASSIFIER, *resume, "--work-dir", str(resumed), *common]) == 0

    losses = [[(line["step"], line["loss"], line["lr"]) for line in scalars(d)] for d in (whole, resumed)]
    assert [step for step, *_ in losses[0]] == [1, 2, 3, 4]
    assert losses[1] == losses[0][2:]
    states = [torch.load(d / "iter_4.pth", weights_only=False)["state_dict"] for d in (whole, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("example", ["mmdet_mask-rcnn", "mmseg_upernet", "mmpretrain_classifier"])
def test_stock_configs_train_with_a_short_override(train, coco, ade20k, class_folders, tmp_path, example):
    """The three snippets of the README, run as they are but for sizes."""
    config = ROOT / "configs" / "_examples_" / f"{example}.py"
    work_dir = ["--work-dir", str(tmp_path)]
    if example == "mmdet_mask-rcnn":
        root, options = f"{coco}/", DETECTOR_OPTIONS
    elif example == "mmseg_upernet":
        root, options = str(ade20k), (*SEGMENTOR_OPTIONS, "optim_wrapper.optimizer.lr=0.001")
    else:
        root = str(class_folders)
        options = (
            *miniature.CLASSIFIER,
            "train_cfg.max_epochs=1",
            "default_hooks.logger.interval=1",
            "train_dataloader.dataset.indices=8",
            "train_dataloader.dataset.pipeline.1.scale=64",
            "val_dataloader.dataset.pipeline.2.crop_size=64",
        )
    options = [option for option in options if "init_cfg" not in option]
    assert "custom_imports" not in config.read_text()
    assert train([str(config), *work_dir, "--no-validate", "--data-root", root, "--cfg-options", *options]) == 0
    losses = [line["loss"] for line in scalars(tmp_path)]
    assert len(losses) in (1, 2)
    assert all(math.isfinite(loss) for loss in losses)
