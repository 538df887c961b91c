"""The command line of the feature export: exit codes, sentences, options."""

import json

import pytest
from PIL import Image

from mmvssm.apis.features import read_features, read_manifest
from tests.apis.feature_inputs import CONFIG, FPN, save_noise
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


def test_dataset_neck_and_changed_config(export, workplace, capsys):
    """Images of the config's data set, under another root; options before the images; levels alone."""
    images = [{"id": 0, "file_name": "b.png", "height": 40, "width": 56}]
    (workplace / "in" / "val.json").write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    dataset = "dict(type='CocoDataset', data_root='elsewhere/', ann_file='val.json', data_prefix=dict(img=''))"
    (workplace / "fpn.py").write_text(f"{FPN}\nval_dataloader = dict(dataset={dataset})")
    changes = ["--data-root", "in", "--cfg-options", "model.neck.num_outs=3"]
    levels = ["--stages", "--neck", "-1", "--map-size", "2", "3", "--max-size", "28", "--format", "hdf5"]
    assert export(["fpn.py", "--dataset", "val", *COMMON, *changes, *levels]) == 0
    (record,) = read_manifest("out")
    assert (record["image"], record["content_size"]) == ("b.png", [20, 28])
    features = read_features(f"out/{record['file']}")
    assert features.stages == ("neck2",)
    assert features.tensors["neck2"].shape == (4, 2, 3)
    assert capsys.readouterr().out.startswith("out: 1 images written")


def test_images_behind_options(export, workplace):
    assert export(["micro.py", *COMMON, "--pool", "avg", "in/a.png"]) == 0
    with pytest.raises(SystemExit):
        export(["micro.py", "in", *COMMON, "--pools", "avg"])


def test_interrupted_from_the_keyboard(export, workplace, capsys, monkeypatch):
    from mmvssm.apis import features

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(features, "forward_batch", interrupt)
    assert export(["micro.py", "in", *COMMON]) == 130
    assert "interrupted; the same command continues" in capsys.readouterr().err


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
        (["micro.py", *COMMON], "give images (files, a folder, a pattern, a COCO file), or --dataset"),
        (["micro.py", "in", *COMMON, "--dataset", "val"], "dataset='val' brings its images along"),
        (["micro.py", "--dataset", "val", *COMMON], "micro.py has no val_dataloader with a data set"),
        (["micro.py", "in", *COMMON, "--neck"], "GlobalAveragePooling gives no maps"),
        (["micro.py", "in", *COMMON, "--stages"], "leaves nothing to write"),
        (["micro.py", "in", *COMMON, "--size", "1", "2", "3"], "--size takes one number (the short edge)"),
        (["micro.py", "in", *COMMON, "--map-size", "1", "2", "3"], "--map-size takes one number (a square)"),
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
