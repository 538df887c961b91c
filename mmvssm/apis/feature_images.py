"""Images of the feature export: how they are prepared, loaded, and in which batches they run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from PIL import Image, ImageOps

from mmvssm.apis.feature_sources import ImageEntry

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class LoadedImage(NamedTuple):
    """What a loading worker hands on: pixels, uint8 (3, H, W), or the reason why there are none."""

    entry: ImageEntry
    original_size: tuple[int, int]
    pixels: torch.Tensor | None
    error: str | None = None


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before the network.

    Attributes:
        mean: Subtracted, per channel in the network's order; None for nothing.
        std: Divided by, likewise.
        channel_order: 'rgb' or 'bgr', the order in which the network takes the channels.
        interpolation: Of the resizing, if there is any.
        size: None keeps the original size, a number is the new length of the short edge, a pair the new height and
            width.
        max_size: Longest long edge; an image that would exceed it is made smaller, in its proportions. None for none.
        pad_divisor: Height and width are padded with zeros (of normalised pixels), at the right and below, to multiples
            of it.
    """

    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    channel_order: str
    interpolation: str = "bilinear"
    size: int | tuple[int, int] | None = None
    max_size: int | None = None
    pad_divisor: int = 1

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def content_size(self, height: int, width: int) -> tuple[int, int]:
        """Size to which an image of this size is brought, before padding."""
        if isinstance(self.size, tuple):
            return self.size
        scale = 1.0 if self.size is None else self.size / min(height, width)
        if self.max_size is not None:
            scale = min(scale, self.max_size / max(height, width))
        return tuple(max(1, int(n * scale + 0.5)) for n in (height, width))

    def network_size(self, height: int, width: int) -> tuple[int, int]:
        """Size in which an image of this size enters the network."""
        return tuple(-(-n // self.pad_divisor) * self.pad_divisor for n in self.content_size(height, width))

    def load(self, path: str) -> tuple[torch.Tensor, tuple[int, int]]:
        """Read and resize an image.

        Returns:
            Pixels, uint8 (3, H, W) in the network's channel order, and the original (height, width).

        Raises:
            OSError, SyntaxError, ValueError: What Pillow says of files that it cannot read.
        """
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)  # as OpenCV does it, which is what the libraries load with
            original = (image.height, image.width)
            image = _to_rgb(image)
        height, width = self.content_size(*original)
        if (height, width) != original:
            image = image.resize((width, height), _RESAMPLING[self.interpolation])
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return (pixels.flip(0) if self.channel_order == "bgr" else pixels).contiguous(), original

    def to_input(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalise and pad a batch: uint8 (B, 3, H, W) -> float32 (B, 3, H', W')."""
        x = pixels.float()
        if self.mean is not None:
            mean, std = (torch.tensor(v, device=x.device).view(-1, 1, 1) for v in (self.mean, self.std))
            x = (x - mean) / std
        rows, columns = (-n % self.pad_divisor for n in x.shape[2:])
        return torch.nn.functional.pad(x, (0, columns, 0, rows)) if rows or columns else x


def preprocessing_of(
    config: Config,
    size: int | tuple[int, int] | None = None,
    max_size: int | None = None,
    pad_divisor: int | None = None,
) -> Preprocessing:
    """The preprocessing of a config: from its data preprocessor, else from a Normalize step of its test pipeline.

    Raises:
        ValueError: Neither says anything about mean and channel order.
    """
    top = config.get("data_preprocessor") or {}
    part = {**top, **(config.model.get("data_preprocessor") or {})}
    steps = list(_flat(config.get("test_pipeline") or _pipeline_of_loader(config)))
    normalise = part if part.get("mean") is not None else None
    if normalise is None:
        normalise = next((s for s in steps if str(s.get("type", "")).endswith("Normalize")), None)
    if normalise is None and not part:
        raise ValueError(
            f"{config.filename} says nothing of preprocessing: it needs a data_preprocessor with mean, std and the "
            "channel order, or a Normalize step in its test_pipeline."
        )
    normalise = normalise if normalise is not None else part
    # Loading gives BGR, and each of these flags turns the order around. The Normalize step does so by default.
    default = normalise is not part
    flags = [normalise.get(key, default and key == "to_rgb") for key in ("to_rgb", "bgr_to_rgb", "rgb_to_bgr")]
    mean, std = normalise.get("mean"), normalise.get("std")
    resize = next((s for s in steps if str(s.get("type", "")).endswith(("Resize", "ResizeEdge"))), {})
    interpolation = resize.get("interpolation", "bilinear")
    return Preprocessing(
        mean=None if mean is None else tuple(float(v) for v in mean),
        std=None if mean is None else tuple(float(v) for v in (std or (1.0, 1.0, 1.0))),
        channel_order="rgb" if any(flags) else "bgr",
        interpolation=interpolation if interpolation in _RESAMPLING else "bilinear",
        size=size,
        max_size=max_size,
        pad_divisor=int(pad_divisor if pad_divisor is not None else part.get("pad_size_divisor") or 1),
    )


def _pipeline_of_loader(config: Config) -> Sequence[Mapping]:
    dataset = (config.get("test_dataloader") or {}).get("dataset") or {}
    while "pipeline" not in dataset and isinstance(dataset.get("dataset"), Mapping):
        dataset = dataset["dataset"]
    return dataset.get("pipeline") or ()


def _flat(steps: Sequence) -> Iterator[Mapping]:
    """The steps of a pipeline, with those inside wrappers."""
    for step in steps:
        if isinstance(step, Mapping):
            yield step
            yield from _flat(step.get("transforms") or ())
        elif isinstance(step, (list, tuple)):
            yield from _flat(step)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits: Pillow would clip them to 8
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    return image.convert("RGB")


def original_size(path: str) -> tuple[int, int]:
    """(height, width) of an upright image, from the beginning of its file."""
    with Image.open(path) as image:
        # Not image.getexif(), which for PNG decodes the whole image, in search of an entry behind the pixels.
        turned = Image.Image.getexif(image).get(0x0112, 1) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


class ImageLoading(torch.utils.data.Dataset):
    """Loads images; one that cannot be read becomes a reason instead of an exception.

    Its keys are the entries themselves, which the batches hand over. Workers that held the list of all images would
    copy it page by page, since reading a Python object writes its reference count.
    """

    def __init__(self, preprocessing: Preprocessing):
        self.preprocessing = preprocessing

    def __getitem__(self, entry: ImageEntry) -> LoadedImage:
        try:
            pixels, original = self.preprocessing.load(entry.path)
        except Exception as error:  # decoders raise almost anything for damaged files
            return LoadedImage(entry, (0, 0), None, _reason(error))
        return LoadedImage(entry, original, pixels)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, Image.DecompressionBombError):
        return (
            f"it has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels; raise PIL.Image.MAX_IMAGE_PIXELS if it is right"
        )
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class PlannedBatches:
    """Images in batches of equal network size, in an order that depends on nothing but the images.

    Rounding differs between batches of different composition, so an interrupted run must meet the batches that it would
    have met. Therefore all images are planned, the finished ones too, and a batch is left out only as a whole. The
    planning goes window by window: it looks at the headers of one window ahead and remembers nothing.

    Args:
        entries: All images.
        preprocessing: Gives the network size.
        batch_size: Images in a batch, at most.
        done: Name -> original size of what is finished.
    """

    def __init__(
        self,
        entries: Sequence[ImageEntry],
        preprocessing: Preprocessing,
        batch_size: int,
        done: Mapping[str, tuple[int, int]],
    ):
        self.entries = entries
        self.preprocessing = preprocessing
        self.batch_size = batch_size
        self.done = done

    def __iter__(self) -> Iterator[list[ImageEntry]]:
        window = max(256, 16 * self.batch_size)
        for start in range(0, len(self.entries), window):
            groups: dict[tuple[int, int] | None, list[ImageEntry]] = {}
            for entry in self.entries[start : start + window]:
                groups.setdefault(self._size(entry), []).append(entry)
            for group in groups.values():
                for batch in _batched(group, self.batch_size):
                    if any(entry.name not in self.done for entry in batch):
                        yield batch

    def _size(self, entry: ImageEntry) -> tuple[int, int] | None:
        known = self.done.get(entry.name)
        try:
            return self.preprocessing.network_size(*(known or original_size(entry.path)))
        except Exception:  # the loading will say why
            return None


def _batched(items: list[ImageEntry], size: int) -> Iterator[list[ImageEntry]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
