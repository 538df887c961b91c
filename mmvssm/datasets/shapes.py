"""Generated instance segmentation: textured shapes on cluttered backgrounds, written as a COCO folder.

Everything comes from a seed, so nothing has to be downloaded: image ``i`` of a split is a pure function of
``(seed, split, i, size)``. Class is told by outline alone; colour, texture, size, rotation and place are random.
"""

import json
import os
import zlib
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask

CLASSES = ("disc", "box", "triangle", "star", "ring")
PALETTE = ((230, 60, 60), (60, 130, 250), (250, 190, 40), (60, 190, 90), (180, 80, 220))

# Goes into the annotation file. Raise it when a change alters pixels, so that folders of older code are rewritten.
GENERATOR = "mmvssm.datasets.write_shapes 1"

_MIN_SIZE = 32
_MAX_INSTANCES = 5
# A shape stays annotated only while at least this part of it can be seen.
_MIN_VISIBLE = 0.6
# Outlines are drawn this many times larger and averaged down, for smooth edges.
_SUPERSAMPLING = 4


def _polygon(radii: list[float], start: float = 0.0) -> np.ndarray:
    """Closed outline (n, 2) through points at equal angles and the given radii."""
    angles = start + np.arange(len(radii)) * (2 * np.pi / len(radii))
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.asarray(radii)[:, None]


# Outlines with radius about 1. Two outlines in one entry: the inner one is a hole (even-odd filling).
_OUTLINES = {
    "disc": [_polygon([0.9] * 48)],
    "box": [_polygon([1.1] * 4, np.pi / 4)],
    "triangle": [_polygon([1.2] * 3)],
    "star": [_polygon([1.25, 0.5] * 5)],
    "ring": [_polygon([1.0] * 48), _polygon([0.55] * 48)],
}


def _smooth_noise(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """Blobs (H, W) in [0, 1], about ``cells`` of them along each side."""
    coarse = rng.random((cells + 1, cells + 1), dtype=np.float32)
    return np.clip(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Pattern (H, W) in [0, 1] for the inside of a shape: gradient, stripes, checks or blobs."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle = rng.uniform(0, np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    period = rng.uniform(6, 14)
    match rng.integers(4):
        case 0:
            return (along - along.min()) / (np.ptp(along) + 1e-6)
        case 1:
            return (np.sin(along * (2 * np.pi / period)) > 0).astype(np.float32)
        case 2:
            return (np.sin(along * (2 * np.pi / period)) * np.sin(across * (2 * np.pi / period)) > 0).astype(np.float32)
        case _:
            return _smooth_noise(rng, height, width, max(height, width) // 8)


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Cluttered background (H, W, 3) uint8: blobs of two muted colours, then thin strokes of any colour."""
    dark, bright = rng.uniform(30, 130, 3), rng.uniform(100, 210, 3)
    mix = 0.6 * _smooth_noise(rng, height, width, 5) + 0.4 * _smooth_noise(rng, height, width, 24)
    image = (dark + mix[..., None] * (bright - dark)).round().astype(np.uint8)
    for _ in range(max(1, height * width // 1600)):
        start = rng.uniform(0, 1, 2) * (width, height)
        bend = start + rng.normal(0, 20, 2)
        line = np.stack([start, bend, bend + rng.normal(0, 20, 2)]).round().astype(np.int32)
        colour, thickness = rng.uniform(20, 235, 3), int(rng.integers(1, 3))
        cv2.polylines(image, [line], False, colour.tolist(), thickness, cv2.LINE_AA)
    return image


def _coverage(name: str, centre: np.ndarray, scale: np.ndarray, angle: float, height: int, width: int) -> np.ndarray:
    """Part of each pixel that the shape covers, (H, W) float32 in [0, 1]."""
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    outlines = [
        (((outline * scale) @ rotation.T + centre) * _SUPERSAMPLING).round().astype(np.int32)
        for outline in _OUTLINES[name]
    ]
    canvas = np.zeros((height * _SUPERSAMPLING, width * _SUPERSAMPLING), np.uint8)
    cv2.fillPoly(canvas, outlines, 255)
    return cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def render_shapes(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Draws one image.

    Args:
        rng: Source of all randomness.
        height: Image height in pixels.
        width: Image width in pixels.

    Returns:
        The image (H, W, 3) uint8 in BGR, the class index of each of the n shapes, and their visible masks
        (n, H, W) bool. Masks do not overlap: what a later shape hides is missing from the earlier ones.
    """
    image = _background(rng, height, width).astype(np.float32)
    short = min(height, width)
    labels: list[int] = []
    masks: list[np.ndarray] = []
    areas: list[int] = []
    wanted = int(rng.integers(2, _MAX_INSTANCES + 1))
    # A few tries that fall on top of other shapes are thrown away, hence the fixed number of tries.
    for _ in range(4 * wanted):
        if len(labels) == wanted:
            break
        label = int(rng.integers(len(CLASSES)))
        radius = short * rng.uniform(0.09, 0.22)
        scale = radius * rng.uniform(0.85, 1.15, 2)
        centre = rng.uniform(0.6 * radius, np.array([width, height]) - 0.6 * radius)
        alpha = _coverage(CLASSES[label], centre, scale, rng.uniform(0, 2 * np.pi), height, width)
        mask = alpha > 0.5
        remaining = [old & ~mask for old in masks]
        if any(part.sum() < _MIN_VISIBLE * area for part, area in zip(remaining, areas, strict=True)):
            continue
        # Two colours of the texture, both told apart from what lies below.
        below = image[mask].mean(axis=0)
        colours = rng.uniform(0, 255, (8, 3))
        colours = colours[np.argsort(-np.abs(colours - below).sum(axis=1), kind="stable")[:2]]
        paint = colours[0] + _texture(rng, height, width)[..., None] * 0.6 * (colours[1] - colours[0])
        image += alpha[..., None] * (paint.astype(np.float32) - image)
        labels.append(label)
        masks = [*remaining, mask]
        areas.append(int(mask.sum()))
    image += rng.normal(0, 5, image.shape).astype(np.float32)
    return np.clip(image.round(), 0, 255).astype(np.uint8), labels, np.array(masks, bool).reshape(-1, height, width)


def _checked_size(size: int | tuple[int, int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(side, int) and side >= _MIN_SIZE for side in pair):
        raise ValueError(f"size must be one or two (height, width) integers of at least {_MIN_SIZE}, got {size!r}")
    return pair


def _write(path: Path, data: bytes) -> None:
    """Writes whole files only: another process of the same run may be writing or reading the same path."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_bytes(data)
    part.replace(path)


def write_shapes(
    root: str | Path, num_images: int, size: int | tuple[int, int] = 128, seed: int = 0, split: str = "train"
) -> Path:
    """Writes one split of the generated data as a COCO folder, unless it is there already.

    Layout: ``<root>/<split>/000000000001.png`` ... and ``<root>/annotations/instances_<split>.json`` with masks as
    run-length codes of what is visible. Different splits never share an image, the same seed or not.

    Args:
        root: Folder to write to; made when missing.
        num_images: Number of images.
        size: Side of the square images, or (height, width).
        seed: Any non-negative integer; the same arguments give the same bytes.
        split: Name of the split.

    Returns:
        Path of the annotation file.

    Raises:
        ValueError: If an argument is out of range, or if the annotation file exists and was not written by this
            function (one that it wrote with other arguments is replaced).

    Example:
        >>> write_shapes("data/shapes", num_images=8, size=128)
        PosixPath('data/shapes/annotations/instances_train.json')
    """
    height, width = _checked_size(size)
    if not isinstance(num_images, int) or num_images < 1:
        raise ValueError(f"num_images must be a positive integer, got {num_images!r}")
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be a non-negative integer, got {seed!r}")
    if not split or Path(split).name != split:
        raise ValueError(f"split must be a plain folder name such as 'train', got {split!r}")

    info = dict(description=GENERATOR, num_images=num_images, height=height, width=width, seed=seed, split=split)
    ann_file = Path(root) / "annotations" / f"instances_{split}.json"
    if ann_file.exists():
        found = json.loads(ann_file.read_text()).get("info", {})
        if found == info:
            return ann_file
        if not str(found.get("description", "")).startswith(GENERATOR.split()[0]):
            raise ValueError(f"{ann_file} was not written by write_shapes; choose another root than {str(root)!r}")
        ann_file.unlink(missing_ok=True)

    image_dir = ann_file.parents[1] / split
    ann_file.parent.mkdir(parents=True, exist_ok=True)
    image_dir.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index in range(num_images):
        rng = np.random.default_rng([seed, zlib.crc32(split.encode()), index])
        image, labels, masks = render_shapes(rng, height, width)
        file_name = f"{index + 1:012d}.png"
        _write(image_dir / file_name, cv2.imencode(".png", image)[1].tobytes())
        images.append(dict(id=index + 1, file_name=file_name, height=height, width=width))
        for label, mask in zip(labels, masks, strict=True):
            rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=index + 1,
                    category_id=label + 1,
                    bbox=coco_mask.toBbox(rle).tolist(),
                    area=int(coco_mask.area(rle)),
                    iscrowd=0,
                    segmentation=dict(size=rle["size"], counts=rle["counts"].decode()),
                )
            )
    categories = [dict(id=index + 1, name=name) for index, name in enumerate(CLASSES)]
    content = dict(info=info, images=images, annotations=annotations, categories=categories)
    # Last, so that an annotation file means a complete split.
    _write(ann_file, json.dumps(content).encode())
    return ann_file
