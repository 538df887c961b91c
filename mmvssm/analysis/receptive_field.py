"""Effective receptive fields: which pixels the centre of a feature map looks at.

The measure is that of "Scaling Up Your Kernels to 31x31" (https://arxiv.org/abs/2203.06717), which the VMamba paper
(https://arxiv.org/abs/2401.10166) uses for its pictures: the gradient of the central feature with respect to the image.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

RECTIFY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu": torch.relu, "abs": torch.abs}
THRESHOLDS = (0.2, 0.3, 0.5, 0.99)


@dataclass
class ReceptiveField:
    """What the centre of a feature map looks at.

    Attributes:
        contribution: Of every pixel, float64 (H, W), not negative.
        centre: Row and column of the pixel in the middle of the central cell. (A map of even height has no row in the
            middle; the one below the middle is taken.)
    """

    contribution: torch.Tensor
    centre: tuple[int, int]

    def side(self, share: float) -> int:
        """Side in pixels of the smallest square around the centre that holds a share of the contribution.

        Args:
            share: In (0, 1).

        Returns:
            An odd number, also where the square reaches beyond the image; 0 if nothing contributes.

        Raises:
            ValueError: If the share is out of range.
        """
        if not 0 < share < 1:
            raise ValueError(f"share must be between 0 and 1, got {share}")
        rows, columns = (abs(torch.arange(n) - c) for n, c in zip(self.contribution.shape, self.centre, strict=True))
        distance = torch.maximum(rows[:, None], columns[None])  # of the square around the centre that a pixel lies on
        rings = torch.zeros(int(distance.max()) + 1, dtype=torch.float64)
        rings.index_add_(0, distance.flatten(), self.contribution.double().flatten())
        if rings.sum() <= 0:
            return 0
        return 2 * int((rings.cumsum(0) < share * rings.sum()).sum()) + 1

    def summary(self, thresholds: Sequence[float] = THRESHOLDS) -> dict[str, dict[str, float]]:
        """Sizes at several thresholds.

        Returns:
            Threshold as text -> ``side`` in pixels, ``side_share`` of the longer side of the image, and ``area_share``,
            the part of the image that the square covers, both at most 1. Small ones mean that the centre looks at its
            neighbourhood.
        """
        H, W = self.contribution.shape
        found = {}
        for threshold in thresholds:
            side = self.side(threshold)
            area = min(side, H) * min(side, W) / (H * W)
            found[f"{threshold:g}"] = dict(side=side, side_share=min(1.0, side / max(H, W)), area_share=area)
        return found


def effective_receptive_field(
    backbone: nn.Module, batches: Iterable[torch.Tensor], rectify: str = "relu"
) -> ReceptiveField:
    """Contribution of every pixel to the centre of the last map, averaged over images.

    Of the map's central position the positive channels are summed. (Behind a layer norm the sum of all channels is the
    same for every image, and its gradient nothing but rounding.) The gradient of that sum with respect to the image is
    rectified, then summed over the colours.

    Args:
        backbone: Takes (B, 3, H, W), gives a tuple of maps (B, C, h, w), the last of which counts. It is used as it is:
            call ``eval()`` first. Its parameters are left without gradients.
        batches: Normalised images, all of one size (H, W), on the device of the backbone.
        rectify: 'relu' lets only positive gradients count, 'abs' all by their size.

    Raises:
        ValueError: If ``rectify`` is unknown, there are no images, or they differ in size.
    """
    if rectify not in RECTIFY:
        raise ValueError(f"rectify must be one of {', '.join(map(repr, RECTIFY))}, got {rectify!r}")
    found, count, centre = None, 0, (0, 0)
    for images in batches:
        x = images.detach().requires_grad_()
        features = backbone(x)[-1]
        cell = [n // 2 for n in features.shape[2:]]
        (gradient,) = torch.autograd.grad(features[:, :, cell[0], cell[1]].relu().sum(), x)
        contribution = RECTIFY[rectify](gradient).double().sum((0, 1)).cpu()
        if found is not None and found.shape != contribution.shape:
            raise ValueError(f"images must have one size, got {tuple(found.shape)} and {tuple(contribution.shape)}")
        found = contribution if found is None else found + contribution
        count += len(images)
        centre = tuple(int((c + 0.5) * N / n) for c, n, N in zip(cell, features.shape[2:], x.shape[2:], strict=True))
    if found is None:
        raise ValueError("there are no images to average over")
    return ReceptiveField(found / count, centre)
