"""Feature export: which images it works on."""

import json

import pytest
from mmengine.config import Config

import mmvssm
from mmvssm.apis.feature_sources import find_images, find_images_of_dataset
from mmvssm.apis.features import read_features, read_manifest

from .feature_inputs import FPN, QUICK, save_noise


class TestInput:
    def test_pattern_list_and_single(self, photos):
        assert [e.name for e in find_images(str(photos / "**" / "a.png"))] == ["a.png", "more/a.png"]
        listed = [photos / "more" / "b.png", photos / "a.png"]
        assert [e.name for e in find_images(listed)] == ["more/b.png", "a.png"]
        assert [e.name for e in find_images(photos / "more" / "b.png")] == ["b.png"]

    def test_coco(self, config, photos, tmp_path):
        file = tmp_path / "instances.json"
        file.write_text(json.dumps({"images": [{"file_name": "more/c.png"}, {"file_name": "a.png"}]}))
        summary = mmvssm.extract_features(config, file, tmp_path / "out", image_root=photos, **QUICK)
        assert summary.written == 2
        assert [r["image"] for r in read_manifest(tmp_path / "out")] == ["more/c.png", "a.png"]

    @pytest.mark.parametrize(
        ("text", "error", "sentence"),
        [
            ("[]", ValueError, "is no COCO file"),
            ("{", ValueError, "is no COCO file"),
            ('{"images": [{"file_name": "../a.png"}]}', ValueError, "inside image_root"),
            ('{"images": []}', FileNotFoundError, "no images"),
        ],
    )
    def test_bad_coco(self, tmp_path, text, error, sentence):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(error, match=sentence):
            find_images(tmp_path / "a.json")

    def test_nothing_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no images in"):
            find_images(tmp_path)
        with pytest.raises(FileNotFoundError, match="no images in"):
            find_images(tmp_path / "absent.jpg")
        with pytest.raises(FileNotFoundError, match="no COCO file"):
            find_images(tmp_path / "absent.json")
        save_noise(tmp_path / "a.png", (4, 4))
        with pytest.raises(ValueError, match=r"image_root=.* is for COCO files"):
            find_images(tmp_path, image_root=tmp_path)
        with pytest.raises(TypeError, match="images must be a path, a pattern or a list of paths, got dict"):
            find_images({"a": 1})

    def test_output_inside_the_input(self, config, tmp_path):
        save_noise(tmp_path / "a.png", (32, 32))
        for reused in (0, 1):
            summary = mmvssm.extract_features(config, tmp_path, tmp_path / "out", visualize=True, **QUICK)
            assert (summary.written, summary.reused) == (1 - reused, reused)

    def test_names_as_odd_as_file_systems_allow(self, config, tmp_path):
        """Blanks, brackets, quotes, line breaks, other scripts, bytes that are no text; one name in two folders."""
        names = ["a b.png", "[x]*?.png", 'it\'s "one".png', "two\nlines.png", "日本語 é.png", "..png", "#%41.PNG"]
        names += ["x/same.png", "y/same.png", b"\xff\xfe.png".decode(errors="surrogateescape")]
        for i, name in enumerate(names):
            (tmp_path / "in é [1]" / name).parent.mkdir(parents=True, exist_ok=True)
            with (tmp_path / "in é [1]" / name).open("wb") as file:
                save_noise(file, (8, 8), i, format="PNG")
        summary = mmvssm.extract_features(config, tmp_path / "in é [1]", tmp_path / "o [1]", visualize=True, **QUICK)
        assert (summary.written, summary.failures) == (len(names), {})
        records = {record["image"]: record for record in read_manifest(tmp_path / "o [1]")}
        assert sorted(records) == sorted(names)
        for name, record in records.items():
            assert read_features(tmp_path / "o [1]" / record["file"]).record == record
            assert (tmp_path / "o [1]" / "sheets" / f"{name}.png").is_file()
        again = mmvssm.extract_features(config, tmp_path / "in é [1]", tmp_path / "o [1]", **QUICK)
        assert (again.written, again.reused) == (0, len(names))

    def test_name_too_long_for_its_features(self, config, tmp_path):
        name = 246 * "x" + ".png"
        save_noise(tmp_path / name, (8, 8))
        summary = mmvssm.extract_features(config, tmp_path, tmp_path / "out", format="safetensors", **QUICK)
        assert list(summary.failures) == [name]
        assert "is too long" in summary.failures[name]


COCO = """
default_scope = 'mmdet'
val_dataloader = dict(dataset=dict(
    type='CocoDataset', data_root={root!r}, ann_file='instances.json', data_prefix=dict(img=''),
    pipeline=[dict(type='NoSuchTransform')], test_mode=True))
train_dataloader = dict(dataset=dict(type='RepeatDataset', times=2, dataset=val_dataloader['dataset']))
test_dataloader = dict(dataset=dict(type='ConcatDataset', datasets=[val_dataloader['dataset']]))
"""
SEGMENTATION = """
default_scope = 'mmseg'
val_dataloader = dict(dataset=dict(
    type='BaseSegDataset', data_root={root!r}, data_prefix=dict(img_path='', seg_map_path=''), img_suffix='.png',
    metainfo=dict(classes=['a']), pipeline=[dict(type='LoadImageFromFile'), dict(type='PackSegInputs')]))
"""
CLASSIFICATION = """
default_scope = 'mmpretrain'
val_dataloader = dict(dataset=dict(type='CustomDataset', data_root={root!r}, with_label=False, pipeline=[]))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three images, two of them in a COCO file."""
    root = tmp_path_factory.mktemp("root")
    for i, name in enumerate(["a.png", "b.png", "sub/c.png"]):
        (root / name).parent.mkdir(exist_ok=True)
        save_noise(root / name, (32, 40), i)
    images = [{"id": i, "file_name": n, "height": 32, "width": 40} for i, n in enumerate(["sub/c.png", "a.png"])]
    (root / "instances.json").write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    return root


class TestDatasetOfConfig:
    def read(self, text, root, tmp_path):
        (tmp_path / "c.py").write_text(text.format(root=str(root)))
        return Config.fromfile(tmp_path / "c.py")

    @pytest.mark.parametrize("split", ["train", "val", "test"])
    def test_detection(self, root, tmp_path, split):
        """Through wrappers, each image once."""
        found = find_images_of_dataset(self.read(COCO, root, tmp_path), split)
        assert [e.name for e in found] == ["sub/c.png", "a.png"]
        assert found[1].path == str(root / "a.png")

    @pytest.mark.parametrize("text", [SEGMENTATION, CLASSIFICATION], ids=["segmentation", "classification"])
    def test_other_libraries(self, root, tmp_path, text):
        found = find_images_of_dataset(self.read(text, root, tmp_path), "val")
        assert sorted(e.name for e in found) == ["a.png", "b.png", "sub/c.png"]

    def test_export(self, root, tmp_path):
        text = COCO.format(root=str(root)) + FPN
        (tmp_path / "c.py").write_text(text)
        mmvssm.extract_features(tmp_path / "c.py", None, tmp_path / "out", dataset="val", **QUICK)
        assert [r["image"] for r in read_manifest(tmp_path / "out")] == ["sub/c.png", "a.png"]

    def test_refused(self, root, tmp_path):
        config = self.read(SEGMENTATION, root, tmp_path)
        with pytest.raises(ValueError, match=r"c\.py has no test_dataloader with a data set; it has 'val'"):
            find_images_of_dataset(config, "test")
        with pytest.raises(ValueError, match="dataset must be one of 'train', 'val', 'test', got 'valid'"):
            find_images_of_dataset(config, "valid")
        config.val_dataloader.dataset.type = "NoSuchDataset"
        with pytest.raises(ValueError, match=r"dataset='val': the NoSuchDataset of .* cannot be built"):
            find_images_of_dataset(config, "val")
        with pytest.raises(FileNotFoundError, match=r"missing for the CocoDataset of val_dataloader .*instances\.json"):
            find_images_of_dataset(self.read(COCO, tmp_path / "absent", tmp_path), "val")

    def test_images_that_are_no_files(self, tmp_path, monkeypatch):
        from mmpretrain.datasets import CustomDataset

        config = self.read(CLASSIFICATION, tmp_path, tmp_path)
        monkeypatch.setattr(CustomDataset, "load_data_list", lambda self: [dict(img=0, gt_label=0)])
        with pytest.raises(ValueError, match="does not keep its images in files"):
            find_images_of_dataset(config, "val")
