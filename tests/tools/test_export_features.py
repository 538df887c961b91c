"""The command line of the feature export: exit codes, sentences, options."""

import json

import pytest
from PIL import Image

from mmvssm.apis.features import read_features, read_manifest
from tests.apis.feature_inputs import CONFIG, save_noise
from tests.tools.conftest import load_tool


@pytest.fixture
def export():
    return load_tool("export_features").main


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "micro.py").write_text(CONFIG)
    (tmp_path / "in").mkdir()
    save_noise(tmp_path / "in" / "a.png", (40, 56))
    save_noise(tmp_path / "in" / "b.png", (40, 56), 1)
    return tmp_path


COMMON = ["--out", "out", "--checkpoint", "random", "--device", "cpu", "--num-workers", "0"]


def test_options_reach_the_export(export, workplace, capsys):
    options = ["--stages", "0", "-1", "--size", "32", "--pad-divisor", "16", "--dtype", "fp16", "--visualize"]
    assert export(["micro.py", "in", *COMMON, *options]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("out: 2 images written (")
    assert "0 finished before, 0 skipped" in printed.out
    assert "2/2 images, " in printed.err
    assert "images/s" in printed.err
    for record in read_manifest("out"):
        assert [s["stage"] for s in record["stages"]] == [0, 3]
        assert (record["content_size"], record["network_size"]) == ([32, 45], [32, 48])
        assert record["dtype"] == "float16"
        assert read_features(f"out/{record['file']}").tensors[3].shape == (64, 1, 2)
        assert Image.open(f"out/sheets/{record['image']}.png").width > 3 * 224
    assert export(["micro.py", "in", *COMMON, *options, "--quiet"]) == 0
    printed = capsys.readouterr()
    assert "0 images written (0.0 images/s), 2 finished before" in printed.out
    assert not printed.err


def test_several_images_and_pooling(export, workplace):
    assert export(["micro.py", "in/a.png", "in/b.png", *COMMON, "--pool", "max"]) == 0
    assert [r["stages"][0]["shape"] for r in read_manifest("out")] == [[16], [16]]


def test_unreadable_image(export, workplace, capsys):
    (workplace / "in" / "c.png").write_text("no image")
    assert export(["micro.py", "in", *COMMON]) == 3
    printed = capsys.readouterr()
    assert "skipped c.png: UnidentifiedImageError" in printed.err
    assert "2 images written" in printed.out
    assert "1 skipped" in printed.out
    assert json.loads((workplace / "out" / "failures.jsonl").read_text())["image"] == "c.png"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["absent.py", "in", *COMMON], "There is no config file absent.py"),
        (["vmamba-tiny-s1l9", "in", *COMMON], "There is no model named 'vmamba-tiny-s1l9'"),
        (["micro.py", "absent", *COMMON], "There are no images in absent"),
        (["micro.py", "in", *COMMON, "--size", "1", "2", "3"], "--size takes one number"),
        (["micro.py", "in", *COMMON, "--dtype", "bf16"], "use format='safetensors'"),
        (["micro.py", "in", *COMMON, "--stages", "9"], "out_indices=(9,) must hold stages in -4..3"),
        (["micro.py", "in", "--checkpoint", "absent.pth", "--out", "out"], "There is no checkpoint absent.pth"),
        (["micro.py", "in", "--checkpoint", "random", "--out", "in"], "holds other files (a.png, ...)"),
    ],
    ids=lambda value: None if isinstance(value, list) else value[:30],
)
def test_mistakes(export, workplace, capsys, argv, sentence):
    assert export(argv) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert sentence in line
    assert not (workplace / "out").exists()


def test_required_arguments(export, capsys):
    with pytest.raises(SystemExit) as ended:
        export(["vmamba-tiny-s1l8", "in"])
    assert ended.value.code == 2
    assert "--out, --checkpoint" in capsys.readouterr().err
