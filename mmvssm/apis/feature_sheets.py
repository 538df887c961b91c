"""Pictures of exported features: a sheet per image, at the resolution of the network's input."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from mmvssm.apis.feature_files import FeatureFile, Stage

MIN_EDGE, MAX_EDGE = 224, 1024  # of a panel: smaller images are enlarged by a whole factor, larger ones reduced
_MARGIN = 8
_MAX_CELLS = 16384  # that the principal components are computed from
_BACKGROUND, _INK, _FAINT = (255, 255, 255), (20, 20, 20), (110, 110, 110)


def draw_sheet(image: torch.Tensor, features: FeatureFile) -> Image.Image:
    """Draw the input beside two rows of maps: activation energy and principal components of every stage.

    The energy of a cell is the root mean square over its channels (around the mean of the cells, where a layer norm has
    made it the same everywhere; the label says so); black is the least of the stage in this image, yellow the most, and
    the label gives both. The principal components are those of the cells of this image and stage;
    the first three become red, green and blue, so colours can be compared within a panel only. Maps are interpolated
    bilinearly to the input; padding is cut off.

    Args:
        image: The input without padding, uint8 (3, H, W), RGB.
        features: Its maps.

    Returns:
        The sheet. Panels have the size of the input, enlarged by a whole factor until the long edge has at least 224
        pixels, or reduced until it has at most 1024.
    """
    height, width = image.shape[1:]
    long_edge = max(height, width)
    factor = -(-MIN_EDGE // long_edge) if long_edge < MIN_EDGE else min(1.0, MAX_EDGE / long_edge)
    panel = (max(1, round(width * factor)), max(1, round(height * factor)))
    how = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
    font = _font(13)
    texts = [_stage_label(features, stage) for stage in features.stages]
    longest = _text_width("energy around the mean: 0.123 to 0.123", font)
    column = max(panel[0], *(_text_width(text, font) for text in texts), longest) + _MARGIN
    label_height = 2 * 17 + 2
    row = label_height + panel[1] + _MARGIN
    sheet = Image.new("RGB", (_MARGIN + column * (1 + len(texts)), _MARGIN + 2 * row), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)

    def place(i: int, j: int, picture: Image.Image, first: str, second: str) -> None:
        x, y = _MARGIN + j * column, _MARGIN + i * row
        draw.text((x, y), first, _INK, font)
        draw.text((x, y + 17), second, _FAINT, font)
        sheet.paste(picture.resize(panel, how), (x, y + label_height))

    rgb = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    place(0, 0, rgb, "input", f"{width} x {height} of {features.original_size[1]} x {features.original_size[0]}")
    _write_legend(draw, features, (_MARGIN, _MARGIN + row), font, column - _MARGIN)
    for j, stage in enumerate(features.stages, start=1):
        energy, name, least, most = energy_map(features, stage)
        components, share = pca_map(features, stage)
        place(0, j, _coloured(energy), texts[j - 1], f"{name}: {least:.3g} to {most:.3g}")
        place(1, j, _rgb(components), texts[j - 1], f"PCA-RGB, {share:.0%} of the variance")
    return sheet


def energy_map(features: FeatureFile, stage: Stage) -> tuple[torch.Tensor, str, float, float]:
    """Root mean square over the channels of a stage, at input resolution and scaled to 0..1.

    Behind a layer norm without trained scale it is the same everywhere; then the mean over the cells is subtracted
    first.

    Returns:
        Float32 (H, W) of the input without padding, the name of what is shown, and its least and greatest value.
    """
    name = "energy"
    whole, inside = features.tensors[stage].float(), features.content(stage).float()
    energy = inside.square().mean(0).sqrt()
    if energy.max() - energy.min() < 0.01 * energy.max():
        name = "energy around the mean"
        mean = inside.mean((1, 2), keepdim=True)
        whole, energy = whole - mean, (inside - mean).square().mean(0).sqrt()
    least, most = energy.min().item(), energy.max().item()
    scaled = (whole.square().mean(0, keepdim=True).sqrt() - least) / max(most - least, 1e-12)
    return _to_input(scaled.clamp(0, 1), features, stage)[0], name, least, most


def pca_map(features: FeatureFile, stage: Stage) -> tuple[torch.Tensor, float]:
    """First three principal components of the cells of a stage, at input resolution, each scaled to 0..1.

    Returns:
        Float32 (3, H, W) of the input without padding, and the components' share of the variance.
    """
    cells = features.content(stage).flatten(1).T  # (cells, C)
    sample = cells[:: -(-len(cells) // _MAX_CELLS)].double()
    mean = sample.mean(0)
    sample = sample - mean
    _, values, axes = torch.linalg.svd(sample, full_matrices=False)
    axes = axes[:3]
    # The sign of a component is arbitrary; this makes it the same everywhere.
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    axes = axes * torch.where(largest < 0, -1.0, 1.0)
    total = values.square().sum().item()
    share = values[:3].square().sum().item() / total if total > 0 else 0.0
    if len(axes) < 3:  # fewer than three cells or channels
        axes = torch.cat([axes, axes.new_zeros(3 - len(axes), axes.shape[1])])
    # Not the extremes: a single cell could take all the contrast.
    low, high = (torch.quantile(sample @ axes.T, q, dim=0).float() for q in (0.01, 0.99))
    whole, mean, axes = features.tensors[stage].float(), mean.float(), axes.float()
    projected = torch.einsum("chw,kc->khw", whole - mean[:, None, None], axes)
    scaled = (projected - low[:, None, None]) / (high - low).clamp_min(1e-12)[:, None, None]
    return _to_input(scaled.clamp(0, 1), features, stage), share


def _to_input(maps: torch.Tensor, features: FeatureFile, stage: Stage) -> torch.Tensor:
    """(K, h, w) over the padded input -> float32 (K, H, W) of the input without padding."""
    size = features.extent(stage)  # networks round up: often a little more than the input
    enlarged = torch.nn.functional.interpolate(maps[None].float(), size=size, mode="bilinear", align_corners=False)
    height, width = features.content_size
    short = (max(0, width - size[1]), max(0, height - size[0]))  # those that round down see less than the input
    enlarged = torch.nn.functional.pad(enlarged, (0, short[0], 0, short[1]), mode="replicate")
    return enlarged[0, :, :height, :width]


def _coloured(values: torch.Tensor) -> Image.Image:
    from matplotlib import colormaps

    return Image.fromarray((colormaps["inferno"](values.numpy())[..., :3] * 255 + 0.5).astype(np.uint8))


def _rgb(values: torch.Tensor) -> Image.Image:
    return Image.fromarray((values.permute(1, 2, 0).numpy() * 255 + 0.5).astype(np.uint8))


def _stage_label(features: FeatureFile, stage: Stage) -> str:
    entry = next(s for s in features.record["stages"] if s["stage"] == stage)
    channels, rows, columns = entry["shape"]
    return f"stage {stage}: {channels} x {rows} x {columns}, stride {entry['stride']}"


def _write_legend(
    draw: ImageDraw.ImageDraw, features: FeatureFile, corner: tuple[int, int], font: ImageFont.FreeTypeFont, width: int
) -> None:
    record = features.record
    sha256 = record["checkpoint_sha256"]
    lines = [record["image"], record["model"], f"weights {sha256[:12]}" if sha256 else "random weights"]
    lines += [record["dtype"], f"padded to {features.network_size[1]} x {features.network_size[0]}"]
    for i, line in enumerate(lines):
        while len(line) > 1 and _text_width(line, font) > width:
            line = line[:-2] + "…"
        draw.text((corner[0], corner[1] + 17 * i), line, _FAINT, font)


def _text_width(text: str, font: ImageFont.FreeTypeFont) -> int:
    return int(font.getlength(text)) + 1


def _font(size: int) -> ImageFont.FreeTypeFont:
    from matplotlib import font_manager

    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)
