"""The built-in main job, shortened to two iterations, and what it says to mistakes."""

import json

import cv2
import pytest
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from tests.tools.conftest import in_fresh_state, load_tool

SMALL = (
    "train_dataloader.dataset.num_images=4",
    "train_dataloader.num_workers=0",
    "val_dataloader.dataset.num_images=2",
    "val_dataloader.num_workers=0",
    "model.train_cfg.rpn_proposal.max_per_img=20",
    "model.test_cfg.rpn.max_per_img=10",
    "model.test_cfg.rcnn.score_thr=0.0",
)


@pytest.fixture
def demo():
    return in_fresh_state(load_tool("demo").main)


def run(demo, folder, *arguments):
    return demo(["--work-dir", str(folder), "--device", "cpu", *arguments, "--cfg-options", *SMALL])


def test_trains_evaluates_and_draws(demo, tmp_path, capsys):
    assert run(demo, tmp_path, "--iters", "2", "--seed", "1") == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "demo.json").read_text())
    for kind in ("bbox", "segm"):
        assert 0 <= result["metrics"][f"coco/{kind}_mAP_50"] <= 1
        assert f"{result['metrics'][f'coco/{kind}_mAP_50']:.3f}" in printed
    assert set(result["seconds"]) == {"training", "evaluating", "everything"}
    assert "training 2/2" in printed
    assert len(printed.splitlines()) < 40, "the log belongs into the work folder"

    picture = cv2.imread(str(tmp_path / "predictions.jpg"))
    assert min(picture.shape[:2]) > 500
    colourful = (picture.max(axis=2).astype(int) - picture.min(axis=2)) > 60
    assert colourful.mean() > 0.02, "no ground truth mask was drawn"

    assert "Iter(train)" in (tmp_path / "console.log").read_text() or list(tmp_path.glob("*/*.log"))
    weights = torch.load(tmp_path / "iter_2.pth", map_location="cpu", weights_only=False)["state_dict"]
    assert any(name.startswith("backbone.stages.0.blocks.0.mixer.") for name in weights)
    assert (tmp_path / "data" / "val" / "000000000002.png").exists()


def test_same_seed_gives_the_same_weights(demo, tmp_path):
    weights = []
    for name in ("a", "b"):
        assert run(demo, tmp_path / name, "--iters", "1", "--seed", "5") == 0
        weights.append(torch.load(tmp_path / name / "iter_1.pth", weights_only=False)["state_dict"])
    for key in ("backbone.stages.0.blocks.0.mixer.in_proj.weight", "roi_head.bbox_head.fc_cls.weight"):
        torch.testing.assert_close(weights[0][key], weights[1][key])


def test_seed_reaches_the_runner():
    tool = load_tool("demo")
    assert tool.configure(tool.parse_args(["--seed", "5", "--device", "cpu"])).randomness.seed == 5


@pytest.mark.parametrize("iters", [1, 7, 100, 5000])
def test_schedule_is_stretched(iters):
    tool = load_tool("demo")
    cfg = tool.configure(tool.parse_args(["--iters", str(iters), "--device", "cpu"]))
    assert cfg.train_cfg.max_iters == cfg.train_cfg.val_interval == iters
    assert cfg.param_scheduler[-1].end == iters
    assert all(scheduler.begin < scheduler.end <= iters for scheduler in cfg.param_scheduler)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--iters", "0"], "must be a positive integer, got '0'"),
        (["--iters", "many"], "must be a positive integer, got 'many'"),
        (["--seed", "-1"], "must be an integer from 0"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_wrong_arguments(demo, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        demo(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, so that asking for it is no mistake")
def test_missing_gpu(demo, tmp_path, capsys):
    assert demo(["--work-dir", str(tmp_path / "new"), "--device", "cuda"]) == 2
    assert "--device cuda: torch finds no CUDA GPU here" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_unknown_option(demo, tmp_path, capsys):
    assert demo(["--work-dir", str(tmp_path), "--cfg-options", "trian_cfg.max_iters=3"]) == 2
    assert "did you mean train_cfg?" in capsys.readouterr().err


def test_work_dir_is_a_file(demo, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    assert demo(["--work-dir", str(file)]) == 2
    assert str(file) in capsys.readouterr().err
