"""The commands of README and docs do what they say: blocks without a mark are executed, in a folder like a checkout.

Tools run in this process. Words in capitals stand for miniatures, and VMamba tiny-s1l8 has its published widths but one
block per stage. Blocks that need more say so in a comment before them, which is checked here too.
"""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.checkpoints.official_files import vmamba_file
from tests.conftest import _instance_tables
from tests.helpers import ROOT
from tests.test_readme import LINKING_PAGES, NEEDS, blocks, commands
from tests.tools import miniature
from tests.tools.conftest import keep_metafiles, load_tool

# What at least one command of a block looks like that carries a mark.
LOOKS_LIKE = {
    "data": r"tools/(train|test)\.py|MMVSSM_DATA|work_dirs/|SOURCE|FILE|FOLDER|--dataset|--data-root",
    "gpu": r"--amp|dist_|slurm_|benchmark",
    "network": r"^git clone|https?://|^pip|^mim",
    "install": r"^pip|^pre-commit|-m venv|quickstart\.py|\bmim install",
    "tests": r"^pytest|quickstart\.py test|\.ci/run",
}
CONFIG = """
_base_ = "mmvssm::vmamba/vmamba-tiny-s1l8_tinyimagenet20.py"
data_root = {root!r}
loader = dict(num_workers=0, persistent_workers=False, batch_size=2)
train_dataloader = dict(dataset=dict(data_root=data_root), **loader)
val_dataloader = dict(dataset=dict(data_root=data_root, indices=4), **loader)
test_dataloader = val_dataloader
train_cfg = dict(max_iters=1, val_interval=1)
param_scheduler = [dict(type="ConstantLR", factor=1.0, by_epoch=False)]
default_hooks = dict(checkpoint=dict(interval=1))
"""


@pytest.fixture(autouse=True)
def small_vmamba(monkeypatch):
    from mmvssm.models import VMamba

    arch = {**VMamba.arch_zoo["tiny-s1l8"], "depths": (1, 1, 1, 1)}
    monkeypatch.setitem(VMamba.arch_zoo, "tiny-s1l8", arch)


@pytest.fixture(scope="module")
def miniatures(tmp_path_factory):
    """Word that stands for something of the reader's -> a file or folder that takes its place."""
    folder = tmp_path_factory.mktemp("miniatures")
    photos = folder / "photos"
    photos.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 56, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(photos / f"{i}.png")
    images = [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 56} for i in range(2)]
    (folder / "boxes.json").write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    root = miniature.make_class_folders(folder / "classes")
    (folder / "config.py").write_text(CONFIG.format(root=str(root)))
    torch.save({"model": vmamba_file("v2", "current")}, folder / "official.pth")
    return {
        "CONFIG": folder / "config.py",
        "FOLDER": photos,
        "FILE": photos / "0.png",
        "FILE of export_features": folder / "boxes.json",
        "SOURCE": folder / "official.pth",
    }


@pytest.fixture
def checkout(tmp_path, monkeypatch, miniatures):
    """Folder in which the commands run: the parts of the checkout, and what earlier commands of a reader left."""
    for part in ("configs", "docs", "kernels", "mmvssm", "tests", "tools", "README.md"):
        (tmp_path / part).symlink_to(ROOT / part)
    run = tmp_path / "work_dirs" / "first"
    run.mkdir(parents=True)
    (run / "epoch_12.pth").symlink_to(checkpoint_of(str(miniatures["CONFIG"]), miniatures["CONFIG"].parent))
    monkeypatch.chdir(tmp_path)
    keep_metafiles(monkeypatch)
    return tmp_path


def checkpoint_of(model, folder):
    """A file with random weights of a config's or a name's model, as a training run writes it."""
    import mmvssm
    from mmvssm.utils import cli

    file = folder / f"{re.sub(r'[^A-Za-z0-9-]', '_', model)}.pth"
    if not file.exists():
        if model.endswith(".py"):
            net = load_tool("analysis_tools/get_flops").build_model(cli.load_config(model))
        else:
            net = mmvssm.get_model(model)
        torch.save({"meta": {}, "state_dict": net.state_dict()}, file)
    return file


def execute(words, miniatures, monkeypatch):
    """Run one command of a page in the current folder; it has to succeed."""
    while "=" in words[0] and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words[0].partition("=")
        monkeypatch.setenv(name, value)
        words = words[1:]
    if not words:
        return
    if words[0] == "export":
        return execute(words[1:], miniatures, monkeypatch)
    assert words[0] in ("python", "python3"), f"{words[0]} is not executed here: mark the block with what it needs"
    assert words[1].startswith("tools/"), f"{words[1]} is not executed here: mark the block with what it needs"
    tool = Path(words[1]).stem
    words = [str(miniatures.get(f"{word} of {tool}", miniatures.get(word, word))) for word in words]
    for i, word in enumerate(words):
        prefix, name, _ = word.rpartition("CHECKPOINT")
        if name and (not prefix or prefix.endswith("=")):  # CHECKPOINT of the first argument, or MODEL=CHECKPOINT
            words[i] = prefix + str(checkpoint_of(prefix.rstrip("=") or words[2], miniatures["CONFIG"].parent))
    for table in _instance_tables():
        table.clear()  # MMEngine would hand one run's visualizer and logger to the next
    monkeypatch.setattr(sys, "argv", words[1:])
    try:
        status = load_tool(words[1].removeprefix("tools/").removesuffix(".py")).main()
    except SystemExit as end:
        status = end.code
    assert status in (0, None), f"{' '.join(words)} ended with {status}"


@pytest.mark.parametrize(("needs", "text"), [case for case in blocks("bash", LINKING_PAGES) if not case.values[0]])
def test_commands_succeed(needs, text, checkout, miniatures, monkeypatch):
    before = dict(os.environ)
    try:
        for command in commands(text):
            execute(command, miniatures, monkeypatch)
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.mark.parametrize(("needs", "text"), [case for case in blocks("bash", LINKING_PAGES) if case.values[0]])
def test_marks_are_earned(needs, text):
    """A block is left out for what it shows, not for convenience."""
    lines = [" ".join(command) for command in commands(text)]
    for need in needs.split(", "):
        assert need in NEEDS, f"needs: {need} is none of {', '.join(NEEDS)}"
        assert any(re.search(LOOKS_LIKE[need], line) for line in lines), f"nothing here needs {need}"


@pytest.mark.parametrize(
    "line", ["pip install x", "tools/dist_train.sh CONFIG 8", "python tools/misc/print_config.py none.py"]
)
def test_failures_are_seen(line, checkout, miniatures, monkeypatch):
    with pytest.raises(AssertionError):
        execute(commands(line)[0], miniatures, monkeypatch)
