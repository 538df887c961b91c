"""Multi-stage features of many images, written to files: `extract_features` and the readers of what it writes."""

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import nn

from mmvssm.apis import zoo
from mmvssm.apis.feature_images import (
    ImageEntry,
    ImageLoading,
    LoadedImage,
    PlannedBatches,
    Preprocessing,
    find_images,
    preprocessing_of,
)
from mmvssm.apis.feature_store import (
    FAILURES,
    FORMATS,
    FeatureFile,
    FeatureStore,
    content_cells,
    read_features,
    read_manifest,
)
from mmvssm.version import __version__

__all__ = ["ExportSummary", "FeatureFile", "extract_features", "read_features", "read_manifest"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
POOLS = ("avg", "max")
RANDOM = "random"


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
    model: str | os.PathLike,
    images: str | os.PathLike | Sequence[str | os.PathLike],
    out: str | os.PathLike,
    checkpoint: str | os.PathLike | None = None,
    out_indices: int | Sequence[int] | None = None,
    *,
    pool: str | None = None,
    size: int | Sequence[int] | None = None,
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
    """Compute a backbone's feature maps of images and write one file per image, with a manifest.

    Called again after an interruption, of whatever kind, with the same arguments, it goes on where it was, and the
    result is the same as without.

    Args:
        model: A name from `list_models`, a short one, or the path of a config file.
        images: An image, a folder (with its subfolders), a pattern ('a/**/*.jpg'), a COCO annotation file (.json) or a
            list of images.
        out: Folder to write, new or of an earlier call with the same settings.
        checkpoint: Path or URL of weights, ours or the authors', of the backbone or a model around it; or 'random' for
            random weights (always the same), to try things out.
        out_indices: Stages to write; None for those of the config, which is the last one alone in a classifier.
        pool: 'avg' or 'max' writes vectors (C,) over the image without its padding; None writes maps (C, H, W).
        size: None keeps every image's own size. A number is the new length of the short edge, a pair the new (height,
            width).
        pad_divisor: Pad to multiples of it, at the right and below; None for the config's `pad_size_divisor`, or 1.
        format: 'npz' or 'safetensors'.
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
        FileNotFoundError: There is no such config, checkpoint or image.
        ImportError: The library of the config, or safetensors, is not installed.
    """
    size = _check_arguments(pool, size, pad_divisor, format, dtype, batch_size, num_workers, visualize)
    config = _read_config(model)
    preprocessing = preprocessing_of(config, size, pad_divisor)
    entries = find_images(images, image_root, exclude=out)
    if checkpoint is None:
        raise ValueError("checkpoint must be a path or URL of weights, or 'random' to try things out with random ones.")
    device = _to_device(device)
    sha256 = _sha256(checkpoint)
    backbone = _build_backbone(config, checkpoint, out_indices, device)

    constant = {  # the part of the records that is the same for all images
        "pool": pool,
        "dtype": str(DTYPES[dtype]).removeprefix("torch."),
        "preprocessing": preprocessing.as_dict(),
        "model": Path(config.filename).stem,
        "checkpoint": os.fspath(checkpoint),
        "checkpoint_sha256": sha256,
        "version": __version__,
    }
    settings = {
        **{key: value for key, value in constant.items() if key != "checkpoint"},
        "stages": backbone.out_indices,
        "format": format,
        "batch_size": batch_size,  # rounding depends on it
        "device": device.type,  # likewise
        "backbone": json.dumps(config.model.backbone.to_dict(), sort_keys=True, default=str),
    }
    summary = ExportSummary(Path(out))
    with FeatureStore(out, settings, format) as store:
        _check_origin(entries, store)
        summary.reused = sum(entry.name in store.done for entry in entries)
        batches = PlannedBatches(
            entries, preprocessing, batch_size, {n: r["original_size"] for n, r in store.done.items()}
        )
        loader = torch.utils.data.DataLoader(
            ImageLoading(entries, preprocessing), batch_sampler=batches, collate_fn=list, num_workers=num_workers
        )
        started = time.perf_counter()
        with _Progress("images", len(entries), summary.reused, progress) as bar:
            for items in loader:
                before = len(summary.failures)
                todo = _without_failures(items, store, summary)
                written = 0
                if todo:
                    readable = [item for item in items if item.pixels is not None]
                    written = _process(
                        readable, backbone, preprocessing, device, DTYPES[dtype], constant, store, summary
                    )
                    summary.written += written
                bar.advance(written + len(summary.failures) - before)
        summary.seconds = time.perf_counter() - started
        lines = "".join(json.dumps({"image": n, "error": e}) + "\n" for n, e in summary.failures.items())
        store.replace(FAILURES, lambda file: file.write(lines.encode()))
        if visualize:
            _draw_sheets(entries, preprocessing, store, progress)
    return summary


def _check_arguments(
    pool: Any, size: Any, pad_divisor: Any, format: Any, dtype: Any, batch_size: Any, num_workers: Any, visualize: Any
) -> int | tuple[int, int] | None:
    """Raises ValueError for what is not allowed; returns the size as an integer or a pair."""
    for name, value, allowed in (("format", format, FORMATS), ("dtype", dtype, DTYPES), ("pool", pool, (None, *POOLS))):
        if value not in tuple(allowed):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    if pad_divisor is not None and (not isinstance(pad_divisor, int) or pad_divisor < 1):
        raise ValueError(f"pad_divisor must be a positive integer or None, got {pad_divisor!r}")
    if dtype == "bf16" and format == "npz":
        raise ValueError(
            "dtype='bf16' cannot be written as npz, since NumPy has no such type: use format='safetensors'"
        )
    if visualize and pool is not None:
        raise ValueError(f"visualize=True needs maps, but pool={pool!r} leaves none: leave one of the two out")
    if size is None:
        return None
    numbers = [size] if isinstance(size, int) else list(size) if isinstance(size, Sequence) else []
    if len(numbers) not in (1, 2) or not all(type(n) is int and n > 0 for n in numbers):
        raise ValueError(f"size must be None, a positive integer or a pair (height, width) of them, got {size!r}")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def _to_device(device: str | torch.device | None) -> torch.device:
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device must be such as 'cpu' or 'cuda:0', got {device!r}") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={str(found)!r}: torch finds {torch.cuda.device_count()} CUDA GPUs here")
    return found


def _read_config(model: str | os.PathLike) -> Config:
    """The config of a zoo name or file, without what would download weights."""
    name = os.fspath(model)
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise FileNotFoundError(f"There is no config file {name}.")
        path = Path(name)
    else:
        path = zoo.config_path(name)
    config = Config.fromfile(path)
    if "backbone" not in config.get("model", {}):
        raise ValueError(f"{path} has no model.backbone: it is no config of a model that this function can use.")
    zoo._drop_pretrained(config.model)
    return config


def _build_backbone(
    config: Config,
    checkpoint: str | os.PathLike,
    out_indices: int | Sequence[int] | None,
    device: torch.device,
) -> nn.Module:
    part = config.model.backbone
    part.pop("out_type", None)  # a classifier's backbone may be set to give a vector
    if out_indices is not None:
        part.out_indices = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for 'random'
        backbone = zoo._build(config, part)
        if not hasattr(backbone, "out_indices") or not hasattr(backbone, "out_strides"):
            raise ValueError(f"{config.filename}: {type(backbone).__name__} is no backbone of this project.")
        if backbone.in_channels != 3:
            raise ValueError(f"{config.filename}: the backbone takes {backbone.in_channels} channels, images have 3.")
        return zoo._finish(backbone, None if checkpoint == RANDOM else checkpoint, device).requires_grad_(False)


def _sha256(checkpoint: str | os.PathLike) -> str | None:
    """Of the file, which is downloaded if it is a URL; None for random weights."""
    from mmvssm.checkpoints.reader import download

    path = os.fspath(checkpoint)
    if path == RANDOM:
        return None
    if path.startswith(("http://", "https://")):
        path = download(path)
    path = path.removeprefix("file://")
    if not Path(path).expanduser().is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    with Path(path).expanduser().open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_origin(entries: Sequence[ImageEntry], store: FeatureStore) -> None:
    """Features of an image of the same name from elsewhere must not be taken for those of this one."""
    for entry in entries:
        known = store.done.get(entry.name)
        if known is not None and known["path"] != os.path.abspath(entry.path):
            raise ValueError(
                f"{store.folder} holds features of {known['path']} under the name {entry.name}, which would now be "
                f"{os.path.abspath(entry.path)}. Give another folder."
            )


def _without_failures(items: Sequence[LoadedImage], store: FeatureStore, summary: ExportSummary) -> list[LoadedImage]:
    """Notes the images that could not be read; returns those that still have to be written."""
    for item in items:
        if item.pixels is None and item.entry.name not in store.done:
            summary.failures[item.entry.name] = item.error or "unreadable"
    return [item for item in items if item.pixels is not None and item.entry.name not in store.done]


def _process(
    items: Sequence[LoadedImage],
    backbone: nn.Module,
    preprocessing: Preprocessing,
    device: torch.device,
    dtype: torch.dtype,
    constant: dict[str, Any],
    store: FeatureStore,
    summary: ExportSummary,
) -> int:
    """Compute a batch and write those of its images that are not finished yet; returns how many."""
    written = 0
    # One shape, unless a file changed between planning and loading.
    for shape in dict.fromkeys(item.pixels.shape for item in items):
        group = [item for item in items if item.pixels.shape == shape]
        try:
            network_size, maps = _forward(group, backbone, preprocessing, device, dtype)
        except ValueError as error:  # a size that the network refuses
            summary.failures.update(
                {item.entry.name: str(error) for item in group if item.entry.name not in store.done}
            )
            continue
        for i, item in enumerate(group):
            if item.entry.name in store.done:
                continue
            content_size = tuple(item.pixels.shape[1:])
            tensors, stages = {}, []
            for stage, stride, batch in zip(backbone.out_indices, backbone.out_strides, maps, strict=True):
                tensors[stage] = _pooled(batch[i], constant["pool"], content_size, stride)
                shape_of_stage = list(tensors[stage].shape)
                stages.append(
                    {"stage": stage, "stride": stride, "channels": shape_of_stage[0], "shape": shape_of_stage}
                )
            broken = [stage for stage, tensor in tensors.items() if not torch.isfinite(tensor).all()]
            if broken:
                name = str(dtype).removeprefix("torch.")
                summary.failures[item.entry.name] = f"features of stage {broken[0]} are not finite in {name}"
                continue
            record = {
                "image": item.entry.name,
                "path": os.path.abspath(item.entry.path),
                "file": f"features/{item.entry.name}.{store.format}",
                "original_size": item.original_size,
                "content_size": content_size,
                "network_size": network_size,
                "stages": stages,
                **constant,
            }
            store.write(record, tensors)
            written += 1
    return written


@torch.inference_mode()
def _forward(
    items: Sequence[LoadedImage],
    backbone: nn.Module,
    preprocessing: Preprocessing,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[tuple[int, int], list[torch.Tensor]]:
    """Network size, and one map (B, C, H, W) on the CPU per stage."""
    x = preprocessing.to_input(torch.stack([item.pixels for item in items]).to(device))
    mixed = torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
    try:
        with mixed:
            maps = backbone(x)
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"Out of memory with a batch of {tuple(x.shape)}: give a smaller batch_size or size."
        ) from error
    return tuple(x.shape[2:]), [m.to("cpu", dtype) for m in maps]


def _pooled(features: torch.Tensor, pool: str | None, content_size: tuple[int, int], stride: int) -> torch.Tensor:
    """(C, H, W) as it is, or (C,) over the cells that are not padding."""
    if pool is None:
        return features
    rows, columns = content_cells(features.shape[1:], content_size, stride)
    cells = features[:, :rows, :columns].flatten(1)
    return cells.amax(1) if pool == "max" else cells.float().mean(1).to(features.dtype)


def _draw_sheets(
    entries: Sequence[ImageEntry], preprocessing: Preprocessing, store: FeatureStore, progress: bool
) -> None:
    """Draw the sheets that are not there yet, from the written features."""
    from mmvssm.apis.feature_sheets import draw_sheet

    there = [entry for entry in entries if entry.name in store.done]
    missing = [entry for entry in there if not (store.folder / _sheet_name(entry)).is_file()]
    with _Progress("sheets", len(there), len(there) - len(missing), progress) as bar:
        for entry in missing:
            features = read_features(store.folder / store.done[entry.name]["file"])
            pixels, _ = preprocessing.load(entry.path)
            sheet = draw_sheet(pixels.flip(0) if preprocessing.channel_order == "bgr" else pixels, features)
            store.replace(_sheet_name(entry), lambda file, sheet=sheet: sheet.save(file, format="PNG"))
            bar.advance(1)


def _sheet_name(entry: ImageEntry) -> str:
    return f"sheets/{entry.name}.png"


class _Progress:
    """A bar with images per second; a line every half minute where output is no terminal.

    Args:
        what: Noun for the things that are counted.
        total: How many there are.
        done: How many of them were finished before; not counted in the speed.
        show: Whether to show anything.
    """

    def __init__(self, what: str, total: int, done: int, show: bool):
        self.what, self.total, self.done, self.show = what, total, done, show
        self._new = 0
        self._started = self._told = time.perf_counter()

    def __enter__(self) -> "_Progress":
        self._bar = self._open() if self.show and sys.stderr.isatty() else None
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.show:
            self._tell()

    def advance(self, count: int) -> None:
        self._new += count
        self.done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, speed=self._speed())
        elif self.show and time.perf_counter() - self._told > 30:
            self._tell()

    def _open(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        speed = TextColumn("{task.fields[speed]}")
        bar = Progress(
            TextColumn(self.what), BarColumn(), MofNCompleteColumn(), speed, TimeRemainingColumn(),
            console=Console(stderr=True),
        )  # fmt: skip
        self._task = bar.add_task(self.what, total=self.total, completed=self.done, speed="")
        bar.start()
        return bar

    def _speed(self) -> str:
        seconds = time.perf_counter() - self._started
        return f"{self._new / seconds:.1f} {self.what}/s" if seconds else ""

    def _tell(self) -> None:
        self._told = time.perf_counter()
        print(f"{self.done}/{self.total} {self.what}, {self._speed()}", file=sys.stderr, flush=True)
