"""The data set in MMDetection: registry, stock pipeline, stock metric."""

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.evaluation import CocoMetric
from mmengine.registry import DATASETS, DefaultScope

PIPELINE = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs"),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    with DefaultScope.overwrite_default_scope("mmdet"):
        return DATASETS.build(
            dict(
                type="mmvssm.GeneratedShapes",
                data_root=str(tmp_path_factory.mktemp("shapes")),
                split="val",
                num_images=6,
                image_size=96,
                pipeline=PIPELINE,
                test_mode=True,
            )
        )


def test_sample_has_image_boxes_and_masks(dataset):
    assert len(dataset) == 6
    assert dataset.metainfo["classes"] == ("disc", "box", "triangle", "star", "ring")
    sample = dataset[0]
    assert sample["inputs"].shape == (3, 96, 96)
    instances = sample["data_samples"].gt_instances
    assert len(instances) >= 2
    boxes = instances.bboxes.tensor if hasattr(instances.bboxes, "tensor") else instances.bboxes
    for mask, (x1, y1, x2, y2) in zip(instances.masks.masks, boxes.int().tolist(), strict=True):
        inside = np.zeros_like(mask)
        inside[y1:y2, x1:x2] = 1
        assert mask.any()
        assert not (mask & ~inside.astype(bool)).any()


def test_coco_metric_gives_ground_truth_a_perfect_score(dataset):
    metric = CocoMetric(ann_file=dataset.ann_file, metric=["bbox", "segm"])
    metric.dataset_meta = dataset.metainfo
    for index in range(len(dataset)):
        sample = dataset[index]["data_samples"]
        truth = sample.gt_instances
        boxes = truth.bboxes.tensor if hasattr(truth.bboxes, "tensor") else truth.bboxes
        found = dict(
            bboxes=boxes,
            labels=truth.labels,
            scores=torch.ones(len(truth)),
            masks=torch.from_numpy(truth.masks.masks.astype(bool)),
        )
        metric.process({}, [dict(img_id=sample.img_id, ori_shape=sample.ori_shape, pred_instances=found)])
    scores = metric.evaluate(size=len(dataset))
    assert scores["coco/bbox_mAP"] == pytest.approx(1.0)
    assert scores["coco/segm_mAP"] == pytest.approx(1.0)


def test_paths_cannot_be_given(tmp_path):
    with pytest.raises(TypeError, match="finds ann_file from data_root and split"):
        DATASETS.build(dict(type="mmvssm.GeneratedShapes", data_root=str(tmp_path), ann_file="a.json"))


def test_lazy_initialisation_writes_nothing(tmp_path):
    lazy = DATASETS.build(
        dict(type="mmvssm.GeneratedShapes", data_root=str(tmp_path), num_images=2, image_size=64, lazy_init=True)
    )
    assert not list(tmp_path.iterdir())
    lazy.full_init()
    assert len(lazy) == 2
