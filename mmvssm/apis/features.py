"""Multi-stage features of many images, written to files: `extract_features` and the readers of what it writes."""

import errno
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from mmvssm.apis.feature_files import FORMATS, FeatureFile, Stage, content_cells, read_features
from mmvssm.apis.feature_images import ImageLoading, LoadedImage, PlannedBatches, Preprocessing, preprocessing_of
from mmvssm.apis.feature_network import (
    FeatureNetwork,
    build_network,
    describe_network,
    forward_batch,
    hash_checkpoint,
    name_of,
    read_config,
)
from mmvssm.apis.feature_progress import Progress
from mmvssm.apis.feature_sources import SPLITS, ImageEntry, find_images, find_images_of_dataset
from mmvssm.apis.feature_store import FAILURES, FeatureStore, read_manifest
from mmvssm.apis.zoo import resolve_checkpoint
from mmvssm.version import __version__

__all__ = ["ExportSummary", "FeatureFile", "extract_features", "read_features", "read_manifest"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
POOLS = ("avg", "max")


@dataclass
class ExportSummary:
    """What an export did.

    Attributes:
        folder: Where the features are.
        written: Images whose features were computed.
        reused: Images that were finished before.
        failures: Name of the image -> why it has no features.
        seconds: Duration of the computing.
    """

    folder: Path
    written: int = 0
    reused: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def images_per_second(self) -> float:
        return self.written / self.seconds if self.seconds else 0.0


def extract_features(
    model: str | os.PathLike | Config,
    images: str | os.PathLike | Sequence[str | os.PathLike] | None,
    out: str | os.PathLike,
    checkpoint: str | os.PathLike | None = None,
    out_indices: int | Sequence[int] | None = None,
    *,
    neck: bool | int | Sequence[int] = False,
    dataset: str | None = None,
    pool: str | None = None,
    map_size: int | Sequence[int] | None = None,
    size: int | Sequence[int] | None = None,
    max_size: int | None = None,
    pad_divisor: int | None = None,
    format: str = "npz",
    dtype: str = "fp32",
    batch_size: int = 8,
    num_workers: int = 2,
    device: str | torch.device | None = None,
    image_root: str | os.PathLike | None = None,
    visualize: bool = False,
    progress: bool = True,
) -> ExportSummary:
    """Compute the feature maps that a backbone, and its neck, give for images; write one file per image and a manifest.

    Called again after an interruption, of whatever kind, with the same arguments, it goes on where it was, and the
    result is the same as without.

    Args:
        model: A name from `list_models`, a short one, the path of a config file, or an MMEngine config.
        images: An image, a folder (with its subfolders), a pattern ('a/**/*.jpg'), a COCO annotation file (.json) or a
            list of images; None with `dataset`.
        out: Folder to write, new or of an earlier call with the same settings.
        checkpoint: Path or URL of weights, ours or the authors', of the backbone or a model around it; 'official' for
            the file that the authors published for a model of the zoo; or 'random' for random weights (always the
            same), to try things out.
        out_indices: Stages to write; None for those of the config, which is the last one alone in a classifier. An
            empty sequence writes levels of the neck alone.
        neck: True also writes all levels of the config's neck, such as the FPN of a detector or the pyramid of a plain
            backbone; a number or numbers write these levels. The checkpoint must have the neck's weights.
        dataset: 'train', 'val' or 'test' takes the images of the config's data set of that name.
        pool: 'avg' or 'max' writes vectors (C,) over the image without its padding; None writes maps (C, H, W).
        map_size: Resizes the maps, without the cells of the padding, to this (height, width) of cells, or to a square:
            bilinear, antialiased where they become smaller. None leaves them as they are.
        size: None keeps every image's own size. A number is the new length of the short edge, a pair the new (height,
            width).
        max_size: Images whose long edge would be longer are made smaller, in their proportions.
        pad_divisor: Pad to multiples of it, at the right and below; None for the config's `pad_size_divisor`, or 1.
        format: 'npz', 'safetensors' or 'hdf5'.
        dtype: 'fp32', or 'fp16' or 'bf16' for mixed precision and files half as large. 'bf16' needs 'safetensors'.
        batch_size: Images of equal size that are computed together, at most.
        num_workers: Processes that load images; 0 loads in this one.
        device: Default: the GPU if there is one, else the CPU.
        image_root: Folder that the names in a COCO file are relative to; that of the file by default.
        visualize: Also draw a sheet for every image, with the activation energy and the first three principal
            components of every stage, see docs/features.md.
        progress: Show the progress on stderr.

    Returns:
        Counts, and the images that could not be read, which are passed over. `read_manifest(out)` gives the records of
        the others, `read_features(out / record['file'])` their tensors.

    Raises:
        ValueError: An argument is not allowed, the checkpoint does not fit, the folder is being written by another run
            or holds features of other settings, or other files.
        TypeError: An argument is of another kind.
        FileNotFoundError: There is no such config, checkpoint, image or data set.
        ImportError: The library of the config, or the package of the format, is not installed.

    Example:
        >>> import mmvssm
        >>> from mmvssm.apis.features import read_features, read_manifest
        >>> mmvssm.extract_features("vmamba-tiny-s1l8", "photos", "out", "vmamba.pth", (0, 1, 2, 3))
        >>> for record in read_manifest("out"):
        ...     maps = read_features(f"out/{record['file']}").tensors  # stage -> (C, H, W)
    """
    _check_choices(format=(format, FORMATS), dtype=(dtype, DTYPES), pool=(pool, (None, *POOLS)))
    _check_choices(dataset=(dataset, (None, *SPLITS)))
    _check_counts(batch_size, num_workers, max_size, pad_divisor)
    size, map_size = _to_size("size", size), _to_size("map_size", map_size)
    map_size = (map_size, map_size) if isinstance(map_size, int) else map_size
    _check_outputs(out_indices, neck)
    _check_combinations(images, dataset, image_root, pool, map_size, size, max_size, dtype, format, visualize)
    config = read_config(model)
    preprocessing = preprocessing_of(config, size, max_size, pad_divisor)
    if dataset is None:
        entries = find_images(images, image_root, exclude=out)
    else:
        entries = find_images_of_dataset(config, dataset)
    if checkpoint is None:
        raise ValueError(
            "checkpoint must be a path or URL of weights, 'official' for the authors' or 'random' to try things out."
        )
    checkpoint = resolve_checkpoint(name_of(model, config), checkpoint)
    device = _to_device(device)
    sha256 = hash_checkpoint(checkpoint)
    network = build_network(config, checkpoint, out_indices, neck, device)

    constant = {  # the part of the records that is the same for all images
        "pool": pool,
        "map_size": map_size,
        "dtype": str(DTYPES[dtype]).removeprefix("torch."),
        "preprocessing": preprocessing.as_dict(),
        "model": Path(config.filename or "config").stem,
        "checkpoint": os.fspath(checkpoint),
        "checkpoint_sha256": sha256,
        "version": __version__,
    }
    settings = {
        **{key: value for key, value in constant.items() if key != "checkpoint"},
        "stages": network.outputs,
        "format": format,
        "batch_size": batch_size,  # rounding depends on it
        "device": device.type,  # likewise
        **describe_network(config, network.neck is not None),
    }
    origins = {entry.name: os.path.abspath(entry.path) for entry in entries}
    with FeatureStore(out, settings, format, origins) as store:
        del origins
        run = _Run(network, preprocessing, device, DTYPES[dtype], constant, store)
        run.compute(entries, batch_size, num_workers, progress)
        if visualize:
            _draw_sheets(entries, preprocessing, store, progress)
    return run.summary


@dataclass
class _Run:
    """An export while it computes."""

    network: FeatureNetwork
    preprocessing: Preprocessing
    device: torch.device
    dtype: torch.dtype
    constant: dict[str, Any]
    store: FeatureStore

    def __post_init__(self) -> None:
        self.summary = ExportSummary(self.store.folder)

    def compute(self, entries: Sequence[ImageEntry], batch_size: int, num_workers: int, progress: bool) -> None:
        """Write the features of all images that have none yet, and the list of those that cannot have any."""
        summary, done = self.summary, self.store.done
        summary.reused = sum(entry.name in done for entry in entries)
        loader = torch.utils.data.DataLoader(
            ImageLoading(self.preprocessing),
            batch_sampler=PlannedBatches(entries, self.preprocessing, batch_size, done),
            collate_fn=list,
            num_workers=num_workers,
        )
        started = time.perf_counter()
        with Progress("images", len(entries), summary.reused, progress) as bar:
            for items in loader:
                before = summary.written + len(summary.failures)
                for item in items:
                    if item.pixels is None and item.entry.name not in done:
                        summary.failures[item.entry.name] = item.error or "unreadable"
                if any(item.pixels is not None and item.entry.name not in done for item in items):
                    self._compute_batch([item for item in items if item.pixels is not None])
                bar.advance(summary.written + len(summary.failures) - before)
        summary.seconds = time.perf_counter() - started
        lines = "".join(json.dumps({"image": n, "error": e}) + "\n" for n, e in summary.failures.items())
        self.store.replace(FAILURES, lambda file: file.write(lines.encode()))

    def _compute_batch(self, items: Sequence[LoadedImage]) -> None:
        """Compute a batch and write those of its images that are not finished yet."""
        # One shape, unless a file changed between planning and loading.
        for shape in dict.fromkeys(item.pixels.shape for item in items):
            group = [item for item in items if item.pixels.shape == shape]
            todo = [item for item in group if item.entry.name not in self.store.done]
            x = self.preprocessing.to_input(torch.stack([item.pixels for item in group]).to(self.device))
            try:
                maps = forward_batch(self.network, x, self.dtype)
            except ValueError as error:  # a size that the network refuses
                self.summary.failures.update({item.entry.name: str(error) for item in todo})
                continue
            for i, item in enumerate(group):
                if item.entry.name not in self.store.done:
                    self._write(item, tuple(x.shape[2:]), [m[i] for m in maps])

    def _write(self, item: LoadedImage, network_size: tuple[int, int], maps: Sequence[torch.Tensor]) -> None:
        name, content_size = item.entry.name, tuple(item.pixels.shape[1:])
        tensors: dict[Stage, torch.Tensor] = {}
        stages = []
        for stage, stride, features in zip(self.network.outputs, self.network.strides, maps, strict=True):
            tensors[stage], more = self._reduced(features, content_size, stride)
            shape = list(tensors[stage].shape)
            stages.append({"stage": stage, "stride": stride, "channels": shape[0], "shape": shape, **more})
        broken = [stage for stage, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if broken:
            dtype = str(self.dtype).removeprefix("torch.")
            self.summary.failures[name] = f"features of stage {broken[0]} are not finite in {dtype}"
            return
        record = {
            "image": name,
            "path": os.path.abspath(item.entry.path),
            "file": self.store.file_of(name),
            "original_size": item.original_size,
            "content_size": content_size,
            "network_size": network_size,
            "stages": stages,
            **self.constant,
        }
        try:
            self.store.write(record, tensors)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            self.summary.failures[name] = f"its name is too long for {record['file']}"
            return
        self.summary.written += 1

    def _reduced(
        self, features: torch.Tensor, content_size: tuple[int, int], stride: int
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """A map (C, H, W), pooled or resized where that is wanted, and what its record says of that."""
        pool, map_size = self.constant["pool"], self.constant["map_size"]
        if pool is None and map_size is None:
            return features, {}
        rows, columns = content_cells(features.shape[1:], content_size, stride)
        cells = features[:, :rows, :columns]
        if pool == "max":
            return cells.flatten(1).amax(1), {}
        if pool == "avg":
            return cells.flatten(1).float().mean(1).to(features.dtype), {}
        resized = torch.nn.functional.interpolate(
            cells[None].float(), size=map_size, mode="bilinear", align_corners=False, antialias=True
        )
        return resized[0].to(features.dtype), {"resized_from": [rows, columns]}


def _check_choices(**choices: tuple[Any, Any]) -> None:
    for name, (value, allowed) in choices.items():
        if value not in tuple(allowed):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _check_counts(batch_size: Any, num_workers: Any, max_size: Any, pad_divisor: Any) -> None:
    for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
        if type(value) is not int or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    for name, value in (("max_size", max_size), ("pad_divisor", pad_divisor)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} must be a positive integer or None, got {value!r}")


def _check_outputs(out_indices: Any, neck: Any) -> None:
    numbers = [neck] if isinstance(neck, int) else neck
    if not isinstance(numbers, Sequence) or isinstance(numbers, str) or not all(isinstance(n, int) for n in numbers):
        raise TypeError(f"neck must be True, False, a level or a sequence of levels, got {neck!r}")
    if isinstance(out_indices, Sequence) and not out_indices and neck is False:
        raise ValueError(f"out_indices={out_indices!r} leaves nothing to write: name stages, or give neck=True")
    if not numbers:
        raise ValueError("neck names no levels: give True for all, False for none")


def _to_size(name: str, size: Any) -> int | tuple[int, int] | None:
    if size is None:
        return None
    numbers = [size] if isinstance(size, int) else list(size) if isinstance(size, Sequence) else []
    if len(numbers) not in (1, 2) or not all(type(n) is int and n > 0 for n in numbers):
        raise ValueError(f"{name} must be None, a positive integer or a pair (height, width) of them, got {size!r}")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def _check_combinations(
    images: Any,
    dataset: Any,
    image_root: Any,
    pool: Any,
    map_size: Any,
    size: Any,
    max_size: Any,
    dtype: Any,
    format: Any,
    visualize: Any,
) -> None:
    if (images is None) == (dataset is None):
        raise ValueError(
            "images must be given, or dataset='train', 'val' or 'test' for those of the config"
            if images is None
            else f"dataset={dataset!r} brings its images along: give images=None, or leave dataset out"
        )
    if dataset is not None and image_root is not None:
        raise ValueError(f"image_root={os.fspath(image_root)!r} is for COCO files (.json) only")
    if pool is not None and map_size is not None:
        raise ValueError(f"map_size={map_size} needs maps, but pool={pool!r} leaves none: leave one of the two out")
    if isinstance(size, tuple) and max_size is not None:
        raise ValueError(f"max_size={max_size} has no meaning beside size={size}, which gives both edges")
    if dtype == "bf16" and format != "safetensors":
        raise ValueError(
            f"dtype='bf16' cannot be written as {format}, which has no such type: use format='safetensors'"
        )
    if visualize and pool is not None:
        raise ValueError(f"visualize=True needs maps, but pool={pool!r} leaves none: leave one of the two out")


def _to_device(device: str | torch.device | None) -> torch.device:
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device must be such as 'cpu' or 'cuda:0', got {device!r}") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={str(found)!r}: torch finds {torch.cuda.device_count()} CUDA GPUs here")
    return found


def _draw_sheets(
    entries: Sequence[ImageEntry], preprocessing: Preprocessing, store: FeatureStore, progress: bool
) -> None:
    """Draw the sheets that are not there yet, from the written features."""
    from mmvssm.apis.feature_sheets import draw_sheet

    there = [entry for entry in entries if entry.name in store.done]
    missing = [entry for entry in there if not (store.folder / _sheet_name(entry)).is_file()]
    with Progress("sheets", len(there), len(there) - len(missing), progress) as bar:
        for entry in missing:
            features = read_features(store.folder / store.file_of(entry.name))
            pixels, _ = preprocessing.load(entry.path)
            sheet = draw_sheet(pixels.flip(0) if preprocessing.channel_order == "bgr" else pixels, features)
            store.replace(_sheet_name(entry), lambda file, sheet=sheet: sheet.save(file, format="PNG"))
            bar.advance(1)


def _sheet_name(entry: ImageEntry) -> str:
    return f"sheets/{entry.name}.png"
