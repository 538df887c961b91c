"""Whole runs through the tools: train, evaluate, resume, for each of the three libraries."""

import json
import math
import pickle

import pytest
import torch

from tests.helpers import ROOT
from tests.tools import shrink
from tests.tools.conftest import metrics, scalars

CONFIGS = ROOT / "configs" / "vmamba"
CLASSIFIER = str(CONFIGS / "vmamba-tiny-s1l8_tinyimagenet20.py")
SEGMENTOR = str(CONFIGS / "vmamba-tiny-s1l8_upernet_4xb4-160k_ade20k-512x512.py")
DETECTOR = str(CONFIGS / "mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py")
SEGMENTOR_OPTIONS = (
    *shrink.flags(SEGMENTOR),
    "train_cfg.max_iters=2",
    "train_cfg.val_interval=2",
    "default_hooks.checkpoint.interval=2",
)
DETECTOR_OPTIONS = shrink.flags(DETECTOR)
CLASSIFIER_OPTIONS = (*shrink.flags(CLASSIFIER), "randomness.seed=0")


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

    merged = tmp_path / "merged.pkl"
    assert evaluate([*run, "--tta", "--out", str(merged), *common]) == 0
    for sample, single in zip(pickle.loads(merged.read_bytes()), predictions, strict=True):
        found = sample["pred_instances"]
        assert len(found["scores"]) == len(found["masks"])
        assert len(found["scores"]) > len(single["pred_instances"]["scores"])  # untrained: each view sees others


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
    options = [*CLASSIFIER_OPTIONS, "model.train_cfg=None", "model.backbone.drop_path_rate=0", "train_cfg.max_iters=4"]
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
