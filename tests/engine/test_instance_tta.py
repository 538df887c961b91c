"""Boxes and masks of several views become one prediction."""

import pytest
import torch

pytest.importorskip("mmdet", reason="needs mmdet")

from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData

from mmvssm.engine.instance_tta import InstanceTTAModel

SHAPE = (8, 10)
FLIPS = {None: (), "horizontal": (2,), "vertical": (1,), "diagonal": (1, 2)}
BOXES = torch.tensor([[1.0, 1.0, 4.0, 3.0], [6.0, 4.0, 9.0, 8.0]])


def drawn(boxes: torch.Tensor) -> torch.Tensor:
    """Each box, filled."""
    masks = torch.zeros(len(boxes), *SHAPE, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int(), strict=True):
        mask[y1:y2, x1:x2] = True
    return masks


def view(direction: str | None, scores: list[float], boxes: torch.Tensor = BOXES, masks: bool = True) -> DetDataSample:
    """What a perfect detector predicts for an image flipped in this direction."""
    width, height = SHAPE[1], SHAPE[0]
    seen = boxes.clone()
    if direction in ("horizontal", "diagonal"):
        seen[:, 0::2] = width - boxes[:, [2, 0]]
    if direction in ("vertical", "diagonal"):
        seen[:, 1::2] = height - boxes[:, [3, 1]]
    sample = DetDataSample(metainfo=dict(ori_shape=SHAPE, flip=direction is not None, flip_direction=direction))
    sample.pred_instances = InstanceData(
        bboxes=seen, scores=torch.tensor(scores), labels=torch.tensor([3, 5][: len(boxes)])
    )
    if masks:
        sample.pred_instances.masks = drawn(boxes).flip(FLIPS[direction]) if direction else drawn(boxes)
    return sample


class Unused(BaseModel):
    """The detector, which is not asked here."""

    def forward(self) -> None:
        raise AssertionError


def merge(*samples: DetDataSample, max_per_img: int = 10):
    settings = ConfigDict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=max_per_img)
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = InstanceTTAModel(module=Unused(), tta_cfg=settings)
    (merged,) = model.merge_preds([list(samples)])
    return merged.pred_instances


@pytest.mark.parametrize("direction", ["horizontal", "vertical", "diagonal"])
def test_the_same_objects_in_both_views_are_one(direction):
    found = merge(view(None, [0.9, 0.2]), view(direction, [0.5, 0.6]))
    assert found.scores.tolist() == pytest.approx([0.9, 0.6])
    assert found.labels.tolist() == [3, 5]
    assert torch.equal(found.bboxes, BOXES)
    assert torch.equal(found.masks, drawn(BOXES))


def test_an_object_of_one_view_stays_and_the_best_are_kept():
    found = merge(view(None, [0.4], BOXES[:1]), view("horizontal", [0.3, 0.8]))
    assert found.labels.tolist() == [5, 3]
    assert torch.equal(found.masks, drawn(BOXES.flip(0)))
    assert merge(view(None, [0.4], BOXES[:1]), view("horizontal", [0.3, 0.8]), max_per_img=1).labels.tolist() == [5]


def test_without_objects_and_without_masks():
    empty = view(None, [], BOXES[:0])
    assert len(merge(empty, view("horizontal", [], BOXES[:0])).masks) == 0
    found = merge(view(None, [0.9, 0.2], masks=False), view("horizontal", [0.5, 0.6], masks=False))
    assert torch.equal(found.bboxes, BOXES)
    assert "masks" not in found
