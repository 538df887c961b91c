"""The table of speeds, in small on the CPU."""

import json

import pytest

from tests.tools.conftest import load_tool


@pytest.fixture
def tool(monkeypatch):
    """The tool with models that take no time."""
    from torch import nn

    tool = load_tool("analysis_tools/benchmark_models")

    def build(name, size, device):
        if name.startswith("timm:missing"):
            return real(name, size, device)
        built.append((name, size, device))
        return nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten())

    real, built = tool.build, []
    tool.built = built
    monkeypatch.setattr(tool, "build", build)
    return tool


def test_table_file_and_picture(tool, tmp_path, capsys):
    table, picture = tmp_path / "speed.json", tmp_path / "speed.png"
    options = ["--sizes", "16", "32", "--modes", "inference", "training", "--dtype", "fp32", "--repeats", "1"]
    options += ["--batch-size", "2", "--device", "cpu", "--attention", "fused", "plain"]
    argv = ["vim-tiny", "timm:deit_tiny_patch16_224", *options, "--json", str(table), "--plot", str(picture)]
    assert tool.main(argv) == 0
    rows = json.loads(table.read_text())["rows"]
    measured = [(r["mode"], r["size"], r["model"], r["attention"]) for r in rows]
    kinds = [("vim-tiny", None), ("timm:deit_tiny_patch16_224", "fused"), ("timm:deit_tiny_patch16_224", "plain")]
    assert measured == [
        (mode, size, *kind) for mode in ("inference", "training") for size in (16, 32) for kind in kinds
    ]
    assert all(r["images_per_second"] > 0 and r["batch"] == 2 for r in rows)
    assert set(tool.built) == {(name, size, "cpu") for name, _ in kinds for size in (16, 32)}
    assert picture.stat().st_size > 10_000
    assert len(capsys.readouterr().out.splitlines()) == 12


def test_batch_shrinks_with_the_image_and_until_it_fits(tool, monkeypatch):
    import torch

    from mmvssm import analysis

    tried = []

    def measure_speed(model, images, *_):
        tried.append(len(images))
        if len(images) > 4:
            raise torch.OutOfMemoryError("too much")
        return analysis.Speed(1.0, 1.0, 1.0)

    monkeypatch.setattr(analysis, "measure_speed", measure_speed)
    assert tool.main(["vim-tiny", "--sizes", "896", "--device", "cpu"]) == 0
    assert tried == [8, 4]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["vim-tiny", "--graph", "--device", "cpu"], "--graph needs a GPU"),
        (["timm:missing_network", "--device", "cpu"], "timm"),
    ],
)
def test_mistakes(tool, capsys, options, sentence):
    assert tool.main(options) == 2
    assert sentence in capsys.readouterr().err
