import itertools
import math

import pytest
import torch

from mmvssm.compat.roi_align import roi_align, roi_align_backward


def bilinear(plane, y, x):
    """Value of a (H, W) nested list at a real position; 0 more than one pixel outside, the border value within."""
    height, width = len(plane), len(plane[0])
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    fy, fx = y - y0, x - x0
    top = plane[y0][x0] * (1 - fx) + plane[y0][x1] * fx
    bottom = plane[y1][x0] * (1 - fx) + plane[y1][x1] * fx
    return top * (1 - fy) + bottom * fy


def definition(features, rois, output_size, scale, ratio, aligned):
    """RoIAlign sample by sample."""
    rows, cols = output_size
    out = torch.zeros(len(rois), features.shape[1], rows, cols, dtype=torch.float64)
    planes = features.tolist()
    for k, (image, *box) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (c * scale - (0.5 if aligned else 0) for c in box)
        w, h = x2 - x1, y2 - y1
        if not aligned:
            w, h = max(w, 1.0), max(h, 1.0)
        bin_h, bin_w = h / rows, w / cols
        n_y = ratio or max(0, math.ceil(bin_h))
        n_x = ratio or max(0, math.ceil(bin_w))
        for c, p, q in itertools.product(range(features.shape[1]), range(rows), range(cols)):
            total = 0.0
            for i, j in itertools.product(range(n_y), range(n_x)):
                y = y1 + bin_h * (p + (i + 0.5) / n_y)
                x = x1 + bin_w * (q + (j + 0.5) / n_x)
                total += bilinear(planes[int(image)][c], y, x)
            out[k, c, p, q] = total / max(n_y * n_x, 1)
    return out


BOXES = torch.tensor(
    [
        [0, 4.3, 8.1, 40.7, 33.3],  # inside
        [1, -30.0, -20.0, 25.0, 18.0],  # over the corner
        [1, 50.0, 30.0, 200.0, 90.0],  # over the other corner, large
        [0, 300.0, 300.0, 320.0, 310.0],  # outside
        [0, 10.0, 10.0, 10.0, 10.0],  # a point
        [1, 20.0, 20.0, 12.0, 15.0],  # corners swapped
        [0, 0.0, 0.0, 72.0, 44.0],  # everything
    ],
    dtype=torch.float64,
)


def features(dtype=torch.float64, size=(11, 18)):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("output_size", [(7, 7), (2, 5), (1, 1)])
def test_equals_the_definition(output_size, aligned, ratio):
    expected = definition(features(), BOXES, output_size, 0.25, ratio, aligned)
    torch.testing.assert_close(
        roi_align(features(), BOXES, output_size, 0.25, ratio, aligned), expected, rtol=0, atol=1e-12
    )
    single = roi_align(features(torch.float32), BOXES.float(), output_size, 0.25, ratio, aligned)
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=1e-5)


def test_map_of_one_pixel():
    x = features(size=(1, 1))
    torch.testing.assert_close(roi_align(x, BOXES, (2, 2), 1 / 32), definition(x, BOXES, (2, 2), 1 / 32, 0, True))


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_backward_is_the_gradient(aligned, ratio):
    """Against autograd of the definition's linear map, made explicit by unit inputs."""
    shape = (2, 1, 4, 5)
    units = torch.eye(40, dtype=torch.float64).view(40, *shape)
    columns = [definition(unit, BOXES, (2, 3), 0.1, ratio, aligned).flatten() for unit in units]
    grad = torch.randn(len(BOXES), 1, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = (torch.stack(columns) @ grad.flatten()).view(shape)
    got = roi_align_backward(grad, BOXES, shape, 0.1, ratio, aligned)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_backward_equals_autograd():
    x = features().requires_grad_()
    pooled = roi_align(x, BOXES, (7, 7), 0.25)
    grad = torch.randn_like(pooled)
    (expected,) = torch.autograd.grad(pooled, x, grad)
    torch.testing.assert_close(roi_align_backward(grad, BOXES, tuple(x.shape), 0.25), expected)


def test_no_regions():
    none = BOXES[:0]
    assert roi_align(features(), none, (7, 7), 0.25).shape == (0, 3, 7, 7)
    assert roi_align_backward(torch.zeros(0, 3, 7, 7), none, (2, 3, 11, 18), 0.25).abs().sum() == 0


def test_many_regions_are_split(monkeypatch):
    boxes = BOXES.repeat(20, 1)
    whole = roi_align(features(), boxes, (7, 7), 0.25)
    whole_grad = roi_align_backward(whole, boxes, (2, 3, 11, 18), 0.25)
    monkeypatch.setattr("mmvssm.compat.roi_align._MAX_TAPS", 1000)
    torch.testing.assert_close(roi_align(features(), boxes, (7, 7), 0.25), whole)
    torch.testing.assert_close(roi_align_backward(whole, boxes, (2, 3, 11, 18), 0.25), whole_grad)


def test_regions_that_are_not_finite_give_nan_and_no_gradient():
    boxes = BOXES.clone()
    boxes[1, 2], boxes[4, 3] = math.nan, math.inf
    good = [0, 2, 3, 5, 6]
    pooled = roi_align(features(), boxes, (2, 2), 0.25)
    assert pooled[[1, 4]].isnan().all()
    torch.testing.assert_close(pooled[good], roi_align(features(), BOXES[good], (2, 2), 0.25))
    grad = torch.ones(len(boxes), 3, 2, 2, dtype=torch.float64)
    expected = roi_align_backward(grad[good], BOXES[good], (2, 3, 11, 18), 0.25)
    torch.testing.assert_close(roi_align_backward(grad, boxes, (2, 3, 11, 18), 0.25), expected)


def test_bfloat16_is_computed_in_float32():
    x, boxes = features(torch.bfloat16), BOXES.bfloat16()
    pooled = roi_align(x, boxes, (7, 7), 0.25)
    assert pooled.dtype == torch.bfloat16
    torch.testing.assert_close(pooled, roi_align(x.float(), boxes.float(), (7, 7), 0.25).bfloat16(), rtol=0, atol=0)
