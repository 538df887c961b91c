"""Samples of the three libraries' data sets as pictures."""

import cv2
import numpy as np
import pytest

from tests.helpers import ROOT
from tests.tools.conftest import in_fresh_state, load_tool

CONFIGS = ROOT / "configs" / "vmamba"


@pytest.fixture
def browse():
    return in_fresh_state(load_tool("analysis_tools/browse_dataset").main)


def pictures(folder):
    return [cv2.imread(str(path)) for path in sorted(folder.glob("*.png"))]


def test_classification(browse, class_folders, tmp_path, capsys):
    config = str(CONFIGS / "vmamba-tiny-s1l8_tinyimagenet20.py")
    argv = [config, "--data-root", str(class_folders), "--out", str(tmp_path), "--count", "3", "--shuffle"]
    assert browse([*argv, "--part", "val"]) == 0
    assert "3 of 40 samples of CustomDataset" in capsys.readouterr().out
    assert len(pictures(tmp_path)) == 3
    assert min(picture.shape[0] for picture in pictures(tmp_path)) >= 224
    names = {path.name for path in tmp_path.iterdir()}
    assert browse([*argv, "--part", "val", "--seed", "1"]) == 0
    assert {path.name for path in tmp_path.iterdir()} > names


def test_detection(browse, coco, tmp_path):
    config = str(CONFIGS / "mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py")
    argv = [config, "--data-root", f"{coco}/", "--out", str(tmp_path / "a"), "--count", "1"]
    assert browse(argv) == 0
    (picture,) = pictures(tmp_path / "a")
    assert max(picture.shape) >= 800  # as it enters the network
    # The mask is painted on the object, which is brighter than the ground.
    assert np.ptp(picture.reshape(-1, 3).mean(1)) > 60


def test_segmentation(browse, ade20k, tmp_path):
    config = str(CONFIGS / "vmamba-tiny-s1l8_upernet_4xb4-160k_ade20k-512x512.py")
    argv = [config, "--data-root", str(ade20k), "--out", str(tmp_path), "--count", "5"]
    assert browse(argv) == 0
    found = pictures(tmp_path)
    assert len(found) == 2  # there are no more
    assert all(128 <= max(picture.shape) <= 512 for picture in found)  # resized at random, cropped to 512
    assert all(np.ptp(picture.astype(int).sum(2)) > 100 for picture in found)


def test_colours_are_those_of_the_file(browse, tmp_path):
    """A red image stays red, whichever order of channels the pipeline gives."""
    import torch

    tool = load_tool("analysis_tools/browse_dataset")
    red = np.zeros((4, 5, 3), np.uint8)
    red[..., 0] = 200
    rgb, bgr = (torch.from_numpy(np.ascontiguousarray(a)).permute(2, 0, 1) for a in (red, red[..., ::-1]))
    assert (tool.picture_of(rgb, True) == red).all()
    assert (tool.picture_of(bgr, False) == red).all()
    assert tool.picture_of(rgb.float() / 100 - 1, True).max() == 255


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--count", "0"], "--count must be at least 1"),
        (["--cfg-options", "val_dataloader=None", "--part", "val"], "no val_dataloader"),
        (["--data-root", "/nowhere"], "/nowhere"),
    ],
)
def test_mistakes(browse, tmp_path, capsys, options, sentence):
    config = str(CONFIGS / "vmamba-tiny-s1l8_tinyimagenet20.py")
    assert browse([config, "--out", str(tmp_path), *options]) == 2
    lines = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert len(lines) == 1
    assert sentence in lines[0]
