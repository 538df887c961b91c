"""Pictures of exported features: a sheet per image, at the resolution of the network's input."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from mmvssm.apis.feature_files import FeatureFile, Stage

MIN_EDGE, MAX_EDGE = 224, 1024  # of a panel: smaller images are enlarged by a whole factor, larger ones reduced
COLUMNS = 5  # of panels: more would be too wide to be read on a screen
_MAX_CELLS = 16384  # that the principal components are computed from
_BACKGROUND, _INK, _FAINT = (255, 255, 255), (20, 20, 20), (110, 110, 110)


def draw_sheet(image: torch.Tensor, features: FeatureFile) -> Image.Image:
    """Draw the input beside two maps of every stage, its activation energy above its principal components.

    The energy of a cell is the root mean square over its channels (around the mean of the cells, where a layer norm has
    made it the same everywhere; the label says so); black is the least of the stage in this image, yellow the most, and
    the label gives both. The principal components are those of the cells of this image and stage;
    the first three become red, green and blue, so colours can be compared within a panel only. Maps are interpolated
    bilinearly to the input; padding is cut off.

    Args:
        image: The input without padding, uint8 (3, H, W), RGB.
        features: Its maps.

    Returns:
        The sheet, with five panels side by side and further ones below. Panels have the size of the input, enlarged by
        a whole factor until the long edge has at least 224 pixels, or reduced until it has at most 1024.
    """
    height, width = image.shape[1:]
    long_edge = max(height, width)
    factor = -(-MIN_EDGE // long_edge) if long_edge < MIN_EDGE else min(1.0, MAX_EDGE / long_edge)
    panel = (max(1, round(width * factor)), max(1, round(height * factor)))
    how = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS

    panels: list[tuple[str, str, Image.Image | None]] = []
    for stage in features.stages:
        energy, name, least, most = energy_map(features, stage)
        components, share = pca_map(features, stage)
        label = _stage_label(features, stage)
        panels.append((label, f"{name}: {least:.3g} to {most:.3g}", _coloured(energy)))
        panels.append((label, f"PCA-RGB, {share:.0%} of the variance", _rgb(components)))
    original = " x ".join(map(str, features.original_size))
    subtitle = f"{height} x {width} (height x width), original {original}"
    panels = [("input", subtitle, _rgb(image / 255)), ("", "", None), *panels]

    font = _font(min(28, max(13, max(panel) // 28)))
    line, margin = round(1.35 * font.size), round(0.6 * font.size)
    column = margin + max(
        panel[0], *(_text_width(text, font) for first, second, _ in panels for text in (first, second))
    )
    row = margin + 2 * line + panel[1]
    count = len(panels) // 2
    columns, bands = min(COLUMNS, count), -(-count // COLUMNS)
    legend = _legend_lines(features, font, column - margin)
    below = max(row, (len(legend) + 2) * line + margin)  # the legend may be higher than a flat panel
    band = row + below
    sheet = Image.new("RGB", (margin + columns * column, margin + bands * band), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for i, (first, second, picture) in enumerate(panels):
        x = margin + i // 2 % COLUMNS * column
        y = margin + i // 2 // COLUMNS * band + i % 2 * row
        if picture is None:
            _write_legend(sheet, draw, legend, (x, y), font, line)
            continue
        draw.text((x, y), first, _INK, font)
        draw.text((x, y + line), second, _FAINT, font)
        sheet.paste(picture.resize(panel, how), (x, y + 2 * line))
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
    name = f"stage {stage}" if isinstance(stage, int) else stage.replace("neck", "neck level ")
    resized = " (resized)" if "resized_from" in entry else ""
    return f"{name}: {channels} channels, {rows} x {columns} cells{resized}, stride {entry['stride']}"


def _legend_lines(features: FeatureFile, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """What the features are of, each line cut to the width."""
    record = features.record
    sha256 = record["checkpoint_sha256"]
    lines = [record["image"], record["model"], f"weights {sha256[:12]}" if sha256 else "random weights"]
    lines.append(
        record["dtype"] + (f", padded to {' x '.join(map(str, features.network_size))}" * any(features.padding))
    )
    cut = []
    for text in lines:
        text = "".join(c if c.isprintable() else "?" for c in text)  # names of files may hold what is no text
        while len(text) > 1 and _text_width(text, font) > width:
            text = text[:-2] + "…"
        cut.append(text)
    return cut


def _write_legend(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    lines: list[str],
    corner: tuple[int, int],
    font: ImageFont.FreeTypeFont,
    line: int,
) -> None:
    """The lines, and the colours of the energy from its least to its greatest value."""
    x, y = corner
    for text in lines:
        draw.text((x, y), text, _FAINT, font)
        y += line
    least, most = "energy: least ", " most"
    width = 6 * font.size
    draw.text((x, y + line // 2), least, _FAINT, font)
    x += _text_width(least, font)
    bar = _coloured(torch.linspace(0, 1, width).expand(font.size, width))
    sheet.paste(bar, (x, y + line // 2 + line // 8))
    draw.text((x + width, y + line // 2), most, _FAINT, font)


def _text_width(text: str, font: ImageFont.FreeTypeFont) -> int:
    return int(font.getlength(text)) + 1


def _font(size: int) -> ImageFont.FreeTypeFont:
    from matplotlib import font_manager

    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)
