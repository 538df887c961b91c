"""Mistakes on the command line: one sentence on stderr, exit code 2, no traceback."""

import pickle
import subprocess
import sys

import pytest
import torch

from tests.helpers import ROOT
from tests.tools import miniature, shrink
from tests.tools.conftest import load_tool

CONFIGS = ROOT / "configs" / "vmamba"
CLASSIFIER = str(CONFIGS / "vmamba-tiny-s1l8_tinyimagenet20.py")
IN1K = str(CONFIGS / "vmamba-tiny-s1l8_8xb128_in1k.py")
TINY = ("--cfg-options", *shrink.flags(CLASSIFIER))


def folders(data_root, work_dir) -> list[str]:
    return ["--data-root", str(data_root), "--work-dir", str(work_dir)]


def sentence(capsys, code: int) -> str:
    """The one line on stderr."""
    assert code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


TRAIN_MISTAKES = {
    "missing config": (["configs/none.py"], ["configs/none.py not found"]),
    "misspelt config": (
        [str(CONFIGS / "mask-rcnn_vmamba-tiny-s1l8_fpn_1x_cocoo.py")],
        ["not found", "did you mean", "mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py"],
    ),
    "option of nothing": (
        [CLASSIFIER, "--cfg-options", "optim_warpper.clip_grad=None"],
        ["did you mean optim_wrapper"],
    ),
    "option through a value": ([CLASSIFIER, "--cfg-options", "model.backbone.arch.depths=1"], ["--cfg-options"]),
    "unknown arch": ([CLASSIFIER, "--cfg-options", "model.backbone.arch=tiny"], ["no arch 'tiny'", "tiny-s1l8"]),
    "unknown backbone argument": (
        [CLASSIFIER, "--cfg-options", "model.backbone.drop_pathrate=0.1"],
        ["'drop_pathrate'", "drop_path_rate"],
    ),
    "unknown model argument": ([CLASSIFIER, "--cfg-options", "model.bakbone.arch=tiny"], ["'bakbone'"]),
    "unknown backbone": ([CLASSIFIER, "--cfg-options", "model.backbone.type=mmvssm.VMambo"], ["VMambo", "registry"]),
    "missing data": ([CLASSIFIER, "--data-root", "/nowhere", *TINY], ["/nowhere"]),
    "missing checkpoint": ([CLASSIFIER, "--resume", "/nowhere/iter_1.pth"], ["/nowhere/iter_1.pth not found"]),
    "amp without a GPU": ([CLASSIFIER, "--amp"], ["needs a GPU", "--amp"]),
    "amp config without a GPU": ([IN1K], ["needs a GPU", "optim_wrapper.type=OptimWrapper"]),
    "amp with another wrapper": (
        [CLASSIFIER, "--amp", "--cfg-options", "optim_wrapper.type=ApexOptimWrapper"],
        ["ApexOptimWrapper"],
    ),
    "no base batch size": (
        [CLASSIFIER, "--auto-scale-lr", "--cfg-options", "auto_scale_lr=None"],
        ["auto_scale_lr.base_batch_size"],
    ),
    "no scope": ([CLASSIFIER, "--cfg-options", "default_scope=mmrotate"], ["default_scope", "'mmdet' (detection)"]),
}


@pytest.mark.parametrize("mistake", TRAIN_MISTAKES)
def test_train_says_what_is_wrong(train, tmp_path, capsys, mistake):
    if "GPU" in mistake and torch.cuda.is_available():
        pytest.skip("this machine has a GPU, on which mixed precision works")
    argv, expected = TRAIN_MISTAKES[mistake]
    told = sentence(capsys, train([argv[0], "--work-dir", str(tmp_path), *argv[1:]]))
    for part in expected:
        assert part in told


def test_config_that_does_not_parse(train, tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text("model = dict(type='A'\n")
    assert f"config {config} cannot be read: SyntaxError" in sentence(capsys, train([str(config)]))


def test_missing_base_config(train, tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text("_base_ = 'mmpretrain::resnet/resnet51.py'\n")
    assert "resnet51" in sentence(capsys, train([str(config)]))


def test_unknown_optimiser_option(train, class_folders, tmp_path, capsys):
    options = [*TINY, "optim_wrapper.paramwise_cfg.presett=official"]
    told = sentence(capsys, train([CLASSIFIER, *folders(class_folders, tmp_path), *options]))
    assert "'presett'" in told


def test_wrong_channel_count_is_told_at_the_first_batch(train, class_folders, tmp_path, capsys):
    options = [*TINY, "model.backbone.in_channels=4"]
    told = sentence(capsys, train([CLASSIFIER, *folders(class_folders, tmp_path), *options]))
    assert "in_channels=4" in told


def test_missing_image_in_a_worker(train, class_folders, tmp_path, capsys):
    broken = tmp_path / "broken"
    miniature.make_class_folders(broken, classes=20, per_class=1)
    options = [*TINY, "train_dataloader.num_workers=1", "train_dataloader.dataset.ann_file=list.txt"]
    (broken / "list.txt").write_text("class00/0_0.png 0\nclass00/missing.png 0\n" * 4)
    told = sentence(capsys, train([CLASSIFIER, "--work-dir", str(tmp_path), "--data-root", str(broken), *options]))
    assert "missing.png" in told


def test_traceback_on_request(train, tmp_path, monkeypatch):
    monkeypatch.setenv("MMVSSM_TRACEBACK", "1")
    with pytest.raises(Exception, match="no arch 'tiny'"):
        train([CLASSIFIER, "--work-dir", str(tmp_path), "--cfg-options", "model.backbone.arch=tiny"])


def test_failures_of_a_running_job_keep_their_traceback():
    from mmvssm.utils import cli

    def tool():
        cli._phase.phase = cli._Phase.running
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        cli.run_tool(tool)


class Malicious:
    """Creates a file when it is unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def write_checkpoint(kind: str, path, tmp_path) -> None:
    """A file that is no checkpoint of the classifier."""
    if kind == "truncated":
        torch.save({"state_dict": {"a.b": torch.zeros(1000), "a.c": torch.zeros(3)}}, path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "foreign":
        torch.save(
            {"state_dict": {"layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1), "fc.bias": torch.zeros(9)}}, path
        )
    elif kind == "text":
        path.write_text("<!doctype html><html>404</html>")
    elif kind == "malicious":
        path.write_bytes(pickle.dumps({"state_dict": Malicious(tmp_path / "executed")}))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("missing", ["checkpoint", "not found"]),
        ("truncated", ["truncated"]),
        ("foreign", ["does not fit"]),
        ("text", ["web page"]),
        ("malicious", ["file.pth"]),
    ],
)
def test_evaluation_refuses_a_bad_checkpoint(evaluate, class_folders, tmp_path, capsys, kind, expected):
    path = tmp_path / "file.pth"
    write_checkpoint(kind, path, tmp_path)
    run = [CLASSIFIER, str(path), "--work-dir", str(tmp_path / "run"), "--data-root", str(class_folders), *TINY]
    told = sentence(capsys, evaluate(run))
    for part in expected:
        assert part in told
    assert not (tmp_path / "executed").exists()


def test_evaluation_refuses_weights_of_another_arch(train, evaluate, class_folders, tmp_path, capsys):
    common = ["--data-root", str(class_folders), *TINY]
    short = ["train_cfg.max_iters=1", "param_scheduler.0.end=1", "param_scheduler.1.begin=0"]
    assert train([CLASSIFIER, "--no-validate", "--work-dir", str(tmp_path), *common, *short]) == 0
    other = [*common, "model.backbone.arch.depths=1,1,2,1"]
    capsys.readouterr()
    told = sentence(capsys, evaluate([CLASSIFIER, str(tmp_path / "iter_1.pth"), "--work-dir", str(tmp_path), *other]))
    assert "does not fit" in told


def test_scripts_run_by_path_and_leave_no_traceback(tmp_path):
    """As a user starts it: another folder, an exit code, one sentence."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "train.py"), "none.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == "error: config none.py not found"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("script", ["dist_train", "dist_test", "slurm_train", "slurm_test"])
def test_launch_scripts(tmp_path, script):
    """They find their own folder and hand everything on; the launcher is replaced by one that prints."""
    launcher = "srun" if script.startswith("slurm") else "torchrun"
    (tmp_path / launcher).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / launcher).chmod(0o755)
    path = ROOT / "tools" / f"{script}.sh"
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "GPUS": "2"}
    needed = {
        "dist_train": ["c.py", "2"],
        "dist_test": ["c.py", "w.pth", "2"],
        "slurm_train": ["part", "job", "c.py", "work"],
        "slurm_test": ["part", "job", "c.py", "w.pth"],
    }[script]
    usage = subprocess.run(["bash", path, "c.py"], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert usage.returncode == 2
    assert usage.stderr.startswith("usage: ")

    command = ["bash", path, *needed, "--cfg-options", "a.b=c d"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    tool = str(ROOT / "tools" / ("train.py" if "train" in script else "test.py"))
    start = words.index(tool)
    expected = {
        "dist_train": ["c.py", "--launcher", "pytorch"],
        "dist_test": ["c.py", "w.pth", "--launcher", "pytorch"],
        "slurm_train": ["c.py", "--work-dir", "work", "--launcher", "slurm"],
        "slurm_test": ["c.py", "w.pth", "--launcher", "slurm"],
    }[script]
    assert words[start + 1 :] == [*expected, "--cfg-options", "a.b=c d"]
    assert ("--nproc-per-node=2" in words) == (launcher == "torchrun")


def test_print_config(capsys, tmp_path):
    main = load_tool("misc/print_config").main
    saved = tmp_path / "whole.py"
    argv = [
        CLASSIFIER,
        "--data-root",
        "/elsewhere",
        "--cfg-options",
        "train_cfg.max_iters=7",
        "--save-path",
        str(saved),
    ]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "max_iters=7" in text
    assert "data_root='/elsewhere'" in text
    assert "data_root='data/tinyimagenet20'" not in text

    from mmengine import Config

    assert Config.fromfile(saved).model.backbone.arch == "tiny-s1l8"
    assert "--save-path" in sentence(capsys, main([CLASSIFIER, "--save-path", "whole.txt"]))
