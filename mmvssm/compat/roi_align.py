"""RoIAlign (average mode) in plain torch, with the results of ``mmcv._ext``.

A bin of a region averages g_h x g_w bilinear samples. Bilinear weights, bounds checks and the average are products of a
vertical and a horizontal part, so each axis is prepared alone: 2 g taps (a pixel row and its weight) per bin. All pairs
of taps of a bin are then summed by one weighted ``embedding_bag`` over the feature map seen as a table of pixels. The
gradient is the same sum read the other way: per pixel, over the bins that it contributed to.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Upper bound for the taps (pixel, weight, bin) that are laid out at once.
_MAX_TAPS = 4_000_000


def roi_align(
    features: Tensor,
    rois: Tensor,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """Average bilinear samples of regions; differentiable with respect to ``features``.

    Args:
        features (Tensor): (N, C, H, W), any floating dtype; computed in float32 (float64 stays).
        rois (Tensor): (K, 5): image index, x1, y1, x2, y2 in image coordinates.
        output_size (tuple[int, int]): Bins per region, vertical and horizontal.
        spatial_scale (float): Feature map size / image size.
        sampling_ratio (int): Samples per bin and axis; 0 takes ceil(extent of the bin in pixels).
        aligned (bool): Shift by half a pixel; otherwise regions are at least one pixel wide and high.

    Returns:
        Tensor: (K, C, *output_size) in the dtype of ``features``. NaN for regions with a coordinate that is not finite.
    """
    n_images, channels, height, width = features.shape
    pixels = features.to(_compute_dtype(features)).permute(0, 2, 3, 1).reshape(n_images * height * width, channels)
    finite = torch.isfinite(rois).all(1).nonzero().squeeze(1)
    bins_per_roi = output_size[0] * output_size[1]
    pooled = pixels.new_zeros(len(finite) * bins_per_roi, channels)
    for bins, index, weight in _taps(
        rois[finite].to(pixels.dtype), (height, width), output_size, spatial_scale, sampling_ratio, aligned
    ):
        sums = F.embedding_bag(index, pixels, per_sample_weights=weight, mode="sum")
        pooled = pooled.index_copy(0, bins, sums)
    out = pixels.new_full((len(rois), bins_per_roi, channels), torch.nan)
    out = out.index_copy(0, finite, pooled.view(len(finite), bins_per_roi, channels))
    return out.view(len(rois), *output_size, channels).permute(0, 3, 1, 2).to(features.dtype)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    feature_shape: tuple[int, int, int, int],
    spatial_scale: float,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """Gradient of :func:`roi_align` with respect to the features.

    Args:
        grad_output (Tensor): (K, C, rows, columns).
        rois (Tensor): (K, 5), as in the forward call; the same holds for the other arguments.
        feature_shape (tuple[int, int, int, int]): (N, C, H, W).
        spatial_scale (float): As in the forward call.
        sampling_ratio (int): As in the forward call.
        aligned (bool): As in the forward call.

    Returns:
        Tensor: ``feature_shape`` in the dtype of ``grad_output``.
    """
    n_images, channels, height, width = feature_shape
    output_size = tuple(grad_output.shape[2:])
    grads = grad_output.to(_compute_dtype(grad_output)).permute(0, 2, 3, 1)
    finite = torch.isfinite(rois).all(1)
    grads = grads[finite].reshape(-1, channels)
    out = grads.new_zeros(n_images * height * width, channels)
    for bins, index, weight in _taps(
        rois[finite].to(grads.dtype), (height, width), output_size, spatial_scale, sampling_ratio, aligned
    ):
        matter = weight != 0
        pixel, order = index[matter].sort()
        pixel, amount = torch.unique_consecutive(pixel, return_counts=True)
        tap_bins = bins[:, None].expand_as(index)[matter][order]
        first = amount.cumsum(0) - amount
        sums = F.embedding_bag(tap_bins, grads, first, per_sample_weights=weight[matter][order], mode="sum")
        out.index_add_(0, pixel, sums)
    return out.view(n_images, height, width, channels).permute(0, 3, 1, 2).to(grad_output.dtype)


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _taps(
    rois: Tensor,
    map_size: tuple[int, int],
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The pixels that each bin reads and their weights, region group by region group.

    Args:
        rois (Tensor): (K, 5) with finite coordinates, in the dtype of the computation.
        map_size (tuple[int, int]): H, W of the feature map.
        output_size (tuple[int, int]): As in :func:`roi_align`, like the other arguments.
        spatial_scale (float): Same.
        sampling_ratio (int): Same.
        aligned (bool): Same.

    Yields:
        tuple[Tensor, Tensor, Tensor]: Number of the bin (b,) below K * rows * cols, index (b, t) into the table of
        N * H * W pixels, weight (b, t). Every bin comes exactly once.
    """
    height, width = map_size
    rows, cols = output_size
    corners = rois[:, 1:] * spatial_scale - (0.5 if aligned else 0.0)
    start = corners[:, [1, 0]]  # y, x
    extent = corners[:, [3, 2]] - start
    if not aligned:
        extent = extent.clamp(min=1)
    bin_size = extent / extent.new_tensor([rows, cols])
    samples = torch.full_like(bin_size, sampling_ratio) if sampling_ratio > 0 else bin_size.ceil().clamp(min=0)
    samples = samples.long()
    bin_of_roi = torch.arange(rows * cols, device=rois.device)

    for chunk, laid_h, laid_w in _groups(samples, rows * cols):
        y, weight_y = _axis_taps(start[chunk, 0], bin_size[chunk, 0], samples[chunk, 0], laid_h, rows, height)
        x, weight_x = _axis_taps(start[chunk, 1], bin_size[chunk, 1], samples[chunk, 1], laid_w, cols, width)
        row = rois[chunk, 0].long()[:, None, None] * height + y
        # (chunk, rows, cols, 2 * laid_h, 2 * laid_w)
        index = row[:, :, None, :, None] * width + x[:, None, :, None, :]
        weight = weight_y[:, :, None, :, None] * weight_x[:, None, :, None, :]
        bins = chunk[:, None] * (rows * cols) + bin_of_roi
        taps = 4 * laid_h * laid_w
        yield bins.flatten(), index.reshape(-1, taps), weight.reshape(-1, taps)


def _groups(samples: Tensor, bins: int) -> Iterator[tuple[Tensor, int, int]]:
    """Regions that are laid out with the same number of samples per bin.

    Region sizes differ, so the numbers are rounded up to a few values; what is laid out too much has weight 0.

    Args:
        samples (Tensor): (K, 2) int64 samples per bin, vertical and horizontal.
        bins (int): Bins per region.

    Yields:
        tuple[Tensor, int, int]: Indices of the regions, laid-out samples per bin, vertical and horizontal.
    """
    sizes = samples.new_tensor([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64])
    place = torch.searchsorted(sizes, samples).clamp(max=len(sizes) - 1)
    laid = torch.maximum(sizes[place], samples)
    kinds, which = torch.unique(laid, dim=0, return_inverse=True)
    for number, (laid_h, laid_w) in enumerate(kinds.tolist()):
        members = (which == number).nonzero().squeeze(1)
        at_once = max(1, _MAX_TAPS // (4 * laid_h * laid_w * bins))
        for chunk in members.split(at_once):
            yield chunk, laid_h, laid_w


def _axis_taps(
    start: Tensor, bin_size: Tensor, samples: Tensor, laid: int, bins: int, size: int
) -> tuple[Tensor, Tensor]:
    """Pixels and weights along one axis.

    Args:
        start (Tensor): (K,) start of the region.
        bin_size (Tensor): (K,) extent of a bin.
        samples (Tensor): (K,) samples per bin that count.
        laid (int): Samples per bin that are laid out, at least ``samples``.
        bins (int): Bins along the axis.
        size (int): Pixels along the axis.

    Returns:
        tuple[Tensor, Tensor]: Pixel index and weight, both (K, bins, 2 * laid); weights include the average.
    """
    step = torch.arange(laid, device=start.device)
    count = samples.clamp(min=1).to(start.dtype)[:, None]
    inside_bin = (step + 0.5) * bin_size[:, None] / count  # (K, laid)
    number = torch.arange(bins, device=start.device, dtype=start.dtype)
    first = start[:, None] + number * bin_size[:, None]  # (K, bins)
    position = first[:, :, None] + inside_bin[:, None, :]  # (K, bins, laid)
    matters = (step < samples[:, None])[:, None, :] & (position >= -1) & (position <= size)
    position = position.clamp(0, size - 1)
    low = position.floor()
    part = position - low
    low = low.long()
    high = (low + 1).clamp(max=size - 1)
    share = matters / count[:, None]
    return torch.cat([low, high], -1), torch.cat([share * (1 - part), share * part], -1)
