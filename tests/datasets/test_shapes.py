"""The generated data: same seed, same bytes; a valid COCO folder; masks, boxes and areas that agree."""

import json

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmvssm.datasets import write_shapes
from mmvssm.datasets.shapes import CLASSES, render_shapes

NUM_IMAGES = 24


@pytest.fixture(scope="module")
def ann_file(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"), NUM_IMAGES, size=(96, 128), seed=3)


def folder_bytes(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_same_seed_same_bytes(ann_file, tmp_path):
    write_shapes(tmp_path, NUM_IMAGES, size=(96, 128), seed=3)
    assert folder_bytes(tmp_path) == folder_bytes(ann_file.parents[1])


def test_first_images_do_not_depend_on_the_number(ann_file, tmp_path):
    write_shapes(tmp_path, 2, size=(96, 128), seed=3)
    for name in ("train/000000000001.png", "train/000000000002.png"):
        assert (tmp_path / name).read_bytes() == (ann_file.parents[1] / name).read_bytes()


@pytest.mark.parametrize("change", [dict(seed=4), dict(split="val")])
def test_other_seed_or_split_has_other_images(ann_file, tmp_path, change):
    other = write_shapes(tmp_path, NUM_IMAGES, size=(96, 128), **{"seed": 3, **change})
    images = {path.read_bytes() for path in ann_file.parents[1].rglob("*.png")}
    others = {path.read_bytes() for path in other.parents[1].rglob("*.png")}
    assert len(images) == len(others) == NUM_IMAGES
    assert not images & others


def test_images_and_every_class_are_there(ann_file):
    coco = COCO(ann_file)
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    assert {ann["category_id"] for ann in coco.dataset["annotations"]} == set(coco.getCatIds())
    for info in coco.loadImgs(coco.getImgIds()):
        image = cv2.imread(str(ann_file.parents[1] / "train" / info["file_name"]))
        assert image.shape == (info["height"], info["width"], 3) == (96, 128, 3)
        assert image.std() > 10
        assert coco.getAnnIds(imgIds=info["id"])


def test_areas_boxes_and_masks_agree(ann_file):
    coco = COCO(ann_file)
    for ann in coco.dataset["annotations"]:
        mask = coco.annToMask(ann).astype(bool)
        assert mask.shape == (96, 128)
        assert ann["area"] == mask.sum() > 0
        rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
        x, y, width, height = ann["bbox"]
        assert (x, y, x + width - 1, y + height - 1) == (columns[0], rows[0], columns[-1], rows[-1])


def test_visible_masks_are_disjoint_and_some_shapes_are_occluded(ann_file):
    coco = COCO(ann_file)
    overlapping_boxes = 0
    for image_id in coco.getImgIds():
        anns = coco.loadAnns(coco.getAnnIds(imgIds=image_id))
        assert sum(coco.annToMask(ann).astype(int) for ann in anns).max() == 1
        boxes = [ann["bbox"] for ann in anns]
        overlapping_boxes += int((coco_mask.iou(boxes, boxes, [0] * len(boxes)) > 0).sum() - len(boxes))
    assert overlapping_boxes > 0


def test_masks_follow_the_pixels():
    """Inside a mask the image differs from the same scene without the shapes; outside it does not."""
    seed = [0, 7]
    image, _, masks = render_shapes(np.random.default_rng(seed), 96, 96)
    from mmvssm.datasets import shapes

    background = shapes._background(np.random.default_rng(seed), 96, 96)
    difference = np.abs(image.astype(float) - background).mean(axis=2)
    covered = masks.any(axis=0)
    interior = cv2.erode(covered.astype(np.uint8), np.ones((3, 3))).astype(bool)
    outside = ~cv2.dilate(covered.astype(np.uint8), np.ones((3, 3))).astype(bool)
    assert difference[interior].mean() > 30
    assert difference[outside].mean() < 6  # noise with a standard deviation of 5


def test_ground_truth_scored_against_itself_is_perfect(ann_file):
    truth = COCO(ann_file)
    keys = ("image_id", "category_id", "bbox", "segmentation")
    found = truth.loadRes([{**{k: ann[k] for k in keys}, "score": 1.0} for ann in truth.dataset["annotations"]])
    for kind in ("bbox", "segm"):
        evaluation = COCOeval(truth, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert evaluation.stats[0] == pytest.approx(1.0)


def test_kept_when_complete_and_rewritten_when_the_recipe_changes(tmp_path):
    ann_file = write_shapes(tmp_path, 2, size=64)
    image = tmp_path / "train" / "000000000001.png"
    before = image.stat().st_mtime_ns
    write_shapes(tmp_path, 2, size=64)
    assert image.stat().st_mtime_ns == before
    write_shapes(tmp_path, 3, size=48)
    assert cv2.imread(str(image)).shape == (48, 48, 3)
    assert len(json.loads(ann_file.read_text())["images"]) == 3
    assert not list(tmp_path.rglob(".*")), "partial files are left"


def test_interrupted_writing_is_taken_up_again(tmp_path):
    ann_file = write_shapes(tmp_path, 2, size=64)
    expected = folder_bytes(tmp_path)
    ann_file.unlink()  # it is written last
    (tmp_path / "train" / "000000000002.png").write_bytes(b"")
    write_shapes(tmp_path, 2, size=64)
    assert folder_bytes(tmp_path) == expected


def test_foreign_annotations_are_left_alone(tmp_path):
    foreign = tmp_path / "annotations" / "instances_train.json"
    foreign.parent.mkdir()
    foreign.write_text('{"info": {"description": "COCO 2017"}}')
    with pytest.raises(ValueError, match="was not written by write_shapes; choose another root"):
        write_shapes(tmp_path, 2)
    assert "COCO 2017" in foreign.read_text()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(num_images=0), "num_images must be a positive integer, got 0"),
        (dict(num_images=2.0), "num_images must be a positive integer, got 2.0"),
        (dict(size=8), "size must be one or two .* of at least 32, got 8"),
        (dict(size=(64, 64, 3)), "size must be one or two"),
        (dict(size="64"), "size must be one or two"),
        (dict(seed=-1), "seed must be a non-negative integer, got -1"),
        (dict(split="../val"), "split must be a plain folder name"),
        (dict(split=""), "split must be a plain folder name"),
    ],
)
def test_wrong_arguments(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        write_shapes(tmp_path, **{"num_images": 1, **wrong})
    assert not list(tmp_path.iterdir())
