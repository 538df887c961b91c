"""Files of exported features: one per image with all its stages, a manifest, and what keeps a folder consistent.

A feature file holds the maps as `stage<i>`, (C, H, W) or pooled (C,), and under the name `mmvssm` a JSON text with the
record that also stands in the manifest. Both formats open without this package: `numpy.load`, `safetensors.safe_open`.
"""

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch

FORMATS = ("npz", "safetensors")
MANIFEST = "manifest.jsonl"
SETTINGS = "settings.json"
FAILURES = "failures.jsonl"
_LOCK = ".lock"
_UNFINISHED = ".unfinished"  # the only temporary name, since a folder has one writer
_META = "mmvssm"
_open_folders: set[Path] = set()  # locks of the operating system do not keep out the process that holds them


@dataclass(frozen=True)
class FeatureFile:
    """Features of one image, with what is needed to find their places in it.

    The image was resized from `original_size` to `content_size`, and padded at the right and below to `network_size`.
    All sizes are (height, width); points are (x, y), with (0, 0) the upper left corner of the upper left pixel.

    Attributes:
        record: The image's record in the manifest.
        tensors: Stage -> map of shape (C, H, W) over the padded input, or pooled vector (C,).
    """

    record: dict[str, Any]
    tensors: dict[int, torch.Tensor]

    @property
    def stages(self) -> tuple[int, ...]:
        return tuple(self.tensors)

    @property
    def original_size(self) -> tuple[int, int]:
        return tuple(self.record["original_size"])

    @property
    def content_size(self) -> tuple[int, int]:
        return tuple(self.record["content_size"])

    @property
    def network_size(self) -> tuple[int, int]:
        return tuple(self.record["network_size"])

    @property
    def scale(self) -> tuple[float, float]:
        """Network pixels for one original pixel, in x and y."""
        (height, width), (content_height, content_width) = self.original_size, self.content_size
        return content_width / width, content_height / height

    @property
    def padding(self) -> tuple[int, int]:
        """Rows added below and columns added at the right."""
        return tuple(n - c for n, c in zip(self.network_size, self.content_size, strict=True))

    def stride(self, stage: int) -> int:
        """Pixels of the network's input from one cell of a stage to the next."""
        for entry in self.record["stages"]:
            if entry["stage"] == stage:
                return entry["stride"]
        raise ValueError(f"stage must be one of {self.stages}, got {stage!r}")

    def content(self, stage: int) -> torch.Tensor:
        """The map of a stage without the cells that lie in the padding altogether, (C, H', W')."""
        tensor = self._map(stage)
        rows, columns = content_cells(tensor.shape[1:], self.content_size, self.stride(stage))
        return tensor[:, :rows, :columns]

    def cell_boxes(self, stage: int) -> torch.Tensor:
        """Box (x1, y1, x2, y2) of every cell of a stage in pixels of the original image, float64 (H, W, 4).

        A cell covers as many pixels of the network's input as the stride says; cells of the last row and column may
        reach beyond the image, since networks round up, and those in the padding lie outside.
        """
        rows, columns = self._map(stage).shape[1:]
        y, x = (torch.arange(n + 1, dtype=torch.float64) * self.stride(stage) for n in (rows, columns))
        top, left = torch.meshgrid(y[:-1], x[:-1], indexing="ij")
        bottom, right = torch.meshgrid(y[1:], x[1:], indexing="ij")
        return self.to_original(torch.stack([left, top, right, bottom], dim=-1))

    def to_original(self, points: torch.Tensor) -> torch.Tensor:
        """Points (..., 2) or boxes (..., 4) of the network's input in pixels of the original image."""
        return points / self._factors(points)

    def to_network(self, points: torch.Tensor) -> torch.Tensor:
        """Points (..., 2) or boxes (..., 4) of the original image in pixels of the network's input."""
        return points * self._factors(points)

    def _factors(self, points: torch.Tensor) -> torch.Tensor:
        if points.shape[-1:] not in ((2,), (4,)):
            raise ValueError(f"points must have 2 (x, y) or 4 (boxes) values last, got shape {tuple(points.shape)}")
        dtype = points.dtype if points.is_floating_point() else torch.float32
        return torch.tensor(self.scale * (points.shape[-1] // 2), dtype=dtype, device=points.device)

    def _map(self, stage: int) -> torch.Tensor:
        if stage not in self.tensors:
            raise ValueError(f"stage must be one of {self.stages}, got {stage!r}")
        if self.tensors[stage].ndim != 3:
            raise ValueError(f"stage {stage} is pooled ({self.record['pool']}): it has no cells, only a vector")
        return self.tensors[stage]


def read_features(path: str | os.PathLike) -> FeatureFile:
    """Read a file written by `extract_features`.

    Args:
        path: The .npz or .safetensors file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is of another kind, or damaged.
        ImportError: It is a .safetensors file and safetensors is not installed.
    """
    path = Path(os.fspath(path))
    if path.suffix[1:] not in FORMATS:
        raise ValueError(f"path must end in {' or '.join('.' + f for f in FORMATS)}, got {path}")
    if not path.is_file():
        raise FileNotFoundError(f"There is no feature file {path}.")
    try:
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                text = str(arrays[_META])
                tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != _META}
        else:
            with _safetensors().safe_open(path, framework="pt") as file:
                text = file.metadata()[_META]
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        record = json.loads(text)
        return FeatureFile(record, {s["stage"]: tensors[f"stage{s['stage']}"] for s in record["stages"]})
    except ImportError:
        raise
    except Exception as error:  # what the readers raise for damaged files is of many kinds
        raise ValueError(f"{path} is no feature file, or damaged ({type(error).__name__}: {error}).") from error


def read_manifest(folder: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """The records of a folder of features, one per finished image; `record['file']` is relative to the folder.

    Raises:
        FileNotFoundError: The folder holds no features.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no features: {MANIFEST} is not there.")
    return _records(path)


def content_cells(cells: Sequence[int], content: Sequence[int], stride: int) -> tuple[int, int]:
    """Rows and columns of a map of `cells` that touch the unpadded part of the input."""
    # -(-a // b): rounded up, in integers.
    return tuple(min(n, -(-c // stride)) for n, c in zip(cells, content, strict=True))


class FeatureStore:
    """The folder of an export while it is written: locked, with settings that cannot change, resumable.

    Every file is written under a temporary name and renamed, and only then entered in the manifest. So whatever kills
    the process, a file with its final name is whole; one that is not yet in the manifest is written again.

    Args:
        folder: Made if need be. A folder that already holds something other than an export is refused.
        settings: All that the contents depend on, as JSON types.
        format: 'npz' or 'safetensors'.

    Raises:
        ValueError: Another run writes into the folder, it holds features of other settings, or other files.
        OSError: The file system has no locks.
        ImportError: safetensors is not installed.
    """

    def __init__(self, folder: str | os.PathLike, settings: Mapping[str, Any], format: str):
        self.folder = Path(folder)
        self.format = format
        self.settings = json.loads(json.dumps(settings))
        self.done: dict[str, dict[str, Any]] = {}
        if format == "safetensors":
            _safetensors()

    def __enter__(self) -> "FeatureStore":
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"out={str(self.folder)!r} is a file; give a folder.")
        self._refuse_foreign()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        try:
            self._open()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        if getattr(self, "_manifest", None) is not None:
            self._manifest.close()
        (self.folder / _UNFINISHED).unlink(missing_ok=True)
        _open_folders.discard(self.folder.resolve())
        self._lock_file.close()  # lets go of the lock; the file itself stays, or a third run could lock a new one

    def write(self, record: dict[str, Any], tensors: Mapping[int, torch.Tensor]) -> None:
        """Write the features of one image (on the CPU) and enter it in the manifest."""
        text = json.dumps(record)
        named = {f"stage{stage}": tensor.contiguous() for stage, tensor in tensors.items()}
        if self.format == "npz":
            arrays = {name: tensor.numpy() for name, tensor in named.items()}
            self.replace(record["file"], lambda file: np.savez(file, **arrays, **{_META: np.array(text)}))
        else:
            from safetensors.torch import save

            data = save(named, {_META: text})
            self.replace(record["file"], lambda file: file.write(data))
        self._manifest.write((text + "\n").encode())
        self._manifest.flush()
        self.done[record["image"]] = _needed_for_resuming(record)

    def replace(self, name: str, write: Any) -> None:
        """Let `write(binary file)` make the file `name` of the folder, all or nothing."""
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / _UNFINISHED
        with unfinished.open("wb") as file:
            write(file)
        os.replace(unfinished, target)

    def _refuse_foreign(self) -> None:
        if self.folder.exists() and not (self.folder / SETTINGS).exists():
            others = sorted(p.name for p in self.folder.iterdir() if p.name not in (_LOCK, _UNFINISHED))
            if others and not (self.folder / SETTINGS).exists():  # another run may have made it just now
                raise ValueError(
                    f"out={str(self.folder)!r} holds other files ({others[0]}, ...) and no {SETTINGS}; "
                    "give a new or empty folder."
                )

    def _lock(self) -> None:
        busy = f"Another run is writing into {self.folder}; wait for it, or give another folder."
        if self.folder.resolve() in _open_folders:
            raise ValueError(busy)
        self._lock_file = (self.folder / _LOCK).open("a+b")
        try:
            _take(self._lock_file)
        except OSError as error:
            self._lock_file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise ValueError(busy) from error
            raise OSError(f"{self.folder} cannot be locked ({error.strerror}); give one on another disk.") from error
        _open_folders.add(self.folder.resolve())

    def _open(self) -> None:
        self._manifest: BinaryIO | None = None
        path = self.folder / SETTINGS
        if path.exists():
            self._compare_settings(json.loads(path.read_text(encoding="utf-8")))
        else:
            text = json.dumps(self.settings, indent=2) + "\n"
            self.replace(SETTINGS, lambda file: file.write(text.encode()))
        manifest = self.folder / MANIFEST
        manifest.touch()
        _cut_torn_line(manifest)
        for record in _records(manifest):
            # A feature file that was removed is made again; its line then stands twice, with the same contents.
            if (self.folder / record["file"]).is_file():
                self.done[record["image"]] = _needed_for_resuming(record)
        self._manifest = manifest.open("ab")

    def _compare_settings(self, there: dict[str, Any]) -> None:
        differing = [k for k in {**there, **self.settings} if there.get(k) != self.settings.get(k)]
        if differing:
            details = "; ".join(f"{k} is {there.get(k)!r} there, {self.settings.get(k)!r} now" for k in differing)
            raise ValueError(f"{self.folder} holds features of other settings ({details}). Give another folder.")


def _needed_for_resuming(record: dict[str, Any]) -> dict[str, Any]:
    """What stays in memory of every finished image."""
    return {key: record[key] for key in ("file", "path", "original_size")}


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines only: the last one may be in the making."""
    seen: set[str] = set()
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                record = json.loads(line)
                if record["image"] not in seen:
                    seen.add(record["image"])
                    yield record


def _cut_torn_line(path: Path) -> None:
    """Remove what a killed run left of its last line."""
    with path.open("r+b") as file:
        whole = 0
        for line in file:
            if line.endswith(b"\n"):
                whole += len(line)
        file.truncate(whole)


def _take(file: BinaryIO) -> None:
    """Lock a file without waiting; the system lets go of it when the process ends, however it ends.

    Raises:
        OSError: Another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        # Not flock: forked loading workers would share that lock and outlive a killed run by seconds.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _safetensors() -> Any:
    try:
        import safetensors
    except ModuleNotFoundError as error:
        raise ImportError("format='safetensors' needs the package safetensors: pip install safetensors") from error
    return safetensors
