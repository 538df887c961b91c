import pytest
import torch

from mmvssm.compat.nms import nms


def greedy(boxes, scores, threshold, offset):
    """The definition: take the best box left, drop what overlaps it by more than the threshold, repeat."""
    left = sorted(range(len(boxes)), key=lambda i: -scores[i])
    kept = []
    while left:
        best = left.pop(0)
        kept.append(best)
        left = [i for i in left if not iou(boxes[best], boxes[i], offset) > threshold]
    return kept


def iou(a, b, offset):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + offset)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + offset)
    area = sum((c[2] - c[0] + offset) * (c[3] - c[1] + offset) for c in (a, b))
    union = area - width * height
    return width * height / union if union else float("nan")


def random_boxes(count, seed=0, spread=100.0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * spread
    size = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 40
    scores = torch.randperm(count, generator=generator).double() / max(count, 1)  # no ties
    return torch.cat([corner, corner + size], 1), scores


@pytest.mark.parametrize("count", [0, 1, 2, 37, 512, 513, 1300])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
def test_equals_the_definition(count, offset, threshold):
    boxes, scores = random_boxes(count)
    expected = greedy(boxes.tolist(), scores.tolist(), threshold, offset)
    assert nms(boxes, scores, threshold, offset).tolist() == expected


def test_chain_of_overlaps_keeps_every_second_box():
    """Box i overlaps i + 1 only; the fixed point must not drop what a dropped box overlaps."""
    start = torch.arange(700, dtype=torch.float32) * 6
    boxes = torch.stack([start, torch.zeros(700), start + 10, torch.full((700,), 10.0)], 1)
    scores = torch.linspace(1, 0, 700)
    assert nms(boxes, scores, 0.2).tolist() == list(range(0, 700, 2))


def test_identical_and_empty_boxes():
    boxes = torch.tensor([[0.0, 0, 10, 10]] * 5 + [[3.0, 3, 3, 3]] * 2)
    scores = torch.tensor([0.1, 0.9, 0.3, 0.2, 0.5, 0.8, 0.7])
    assert nms(boxes, scores, 0.5).tolist() == [1, 5, 6]  # boxes without area overlap nothing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_dtypes_are_computed_in_float32(dtype):
    boxes, scores = random_boxes(200)
    boxes, scores = boxes.to(dtype), torch.arange(200).flip(0).float()
    assert nms(boxes, scores, 0.4).tolist() == greedy(boxes.float().tolist(), scores.tolist(), 0.4, 0)
