"""The configs of docs/custom_dataset.md, word for word, train and are evaluated on miniatures of what they describe."""

import math
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT
from tests.test_readme import blocks
from tests.tools import miniature, shrink
from tests.tools.conftest import metrics, scalars
from tests.tools.test_train_and_test import every_parameter_was_updated

PAGE = ROOT / "docs" / "custom_dataset.md"


def make_instances(root: Path, names: tuple[str, ...]) -> None:
    for part in ("train", "val"):
        miniature.make_rectangles(root / part, root / f"{part}.json", dict(enumerate(names)))


# data set -> a maker of its miniature, its classes, the checkpoint of the run, a metric
TASKS = {
    "balloons": (
        lambda root: make_instances(root, ("balloon", "string")),
        ("balloon", "string"),
        "epoch_1.pth",
        "coco/segm_mAP",
    ),
    "cells": (lambda root: make_instances(root, ("cell",)), ("cell",), "epoch_1.pth", "coco/bbox_mAP"),
    "cracks": (lambda root: miniature.make_camvid(root, label=1), ("wall", "crack"), "iter_1.pth", "mIoU"),
    "flowers": (
        lambda root: miniature.make_class_folders(root, names=("daisy", "rose", "tulip")),
        ("daisy", "rose", "tulip"),
        "epoch_1.pth",
        "accuracy/top1",
    ),
}


def test_every_config_of_the_page_is_run():
    named = [name for _, text in configs_of_the_page() for name in TASKS if f"data/{name}" in text]
    assert named == list(TASKS)


def configs_of_the_page() -> list[tuple[str, str]]:
    return [param.values for param in blocks("python", [PAGE])]


@pytest.mark.parametrize("name", TASKS)
def test_own_data(train, evaluate, tmp_path, monkeypatch, name):
    make, classes, checkpoint, metric = TASKS[name]
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "data" / name)
    (text,) = [text for _, text in configs_of_the_page() if f"data/{name}" in text]
    Path("mine.py").write_text(text)
    options = ["--cfg-options", *shrink.flags(tmp_path / "mine.py"), "optim_wrapper.type=OptimWrapper"]

    assert train(["mine.py", "--work-dir", "run", *options]) == 0
    lines = scalars(Path("run"))
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)
    (validation,) = [line for line in lines if metric in line]
    assert every_parameter_was_updated(f"run/{checkpoint}")
    meta = torch.load(f"run/{checkpoint}", weights_only=False)["meta"]
    assert tuple(meta["dataset_meta"]["classes"]) == classes

    assert evaluate(["mine.py", f"run/{checkpoint}", "--work-dir", "test", *options]) == 0
    assert metrics(Path("test"))[metric] == validation[metric]
