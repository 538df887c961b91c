"""Files of features, one per image with all its stages: their geometry, how they are written and read.

A file holds the maps as `stage<i>` and `neck<i>`, (C, H, W) or pooled (C,), and under the name `mmvssm` a JSON text
with the record that also stands in the manifest. All formats open without this package: `numpy.load`,
`safetensors.safe_open`, `h5py.File`.
"""

import importlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

SUFFIXES = {"npz": ".npz", "safetensors": ".safetensors", "hdf5": ".h5"}
FORMATS = tuple(SUFFIXES)
_PACKAGES = {"safetensors": "safetensors", "hdf5": "h5py"}
_META = "mmvssm"

Stage = int | str
"""A stage of the backbone by its number, or a level of the neck by its name, such as 'neck0'."""


@dataclass(frozen=True)
class FeatureFile:
    """Features of one image, with what is needed to find their places in it.

    The image was resized from `original_size` to `content_size`, and padded at the right and below to `network_size`.
    All sizes are (height, width); points are (x, y), with (0, 0) the upper left corner of the upper left pixel.

    Attributes:
        record: The image's record in the manifest.
        tensors: Stage (an integer) or level of the neck ('neck0') -> map of shape (C, H, W), over the padded input
            unless the maps were resized, or pooled vector (C,).
    """

    record: dict[str, Any]
    tensors: dict[Stage, torch.Tensor]

    @property
    def stages(self) -> tuple[Stage, ...]:
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

    def stride(self, stage: Stage) -> int:
        """Pixels of the network's input from one cell to the next of what the network gives (see `extent`)."""
        return self._entry(stage)["stride"]

    def extent(self, stage: Stage) -> tuple[int, int]:
        """Height and width, in pixels of the network's input, of the area that a map covers from the upper left on.

        As many cells of the stride's size as the network gives: often a little more than the input, since networks
        round up. A resized map divides the area of the cells that touch the image among its own.
        """
        rows, columns = self._entry(stage).get("resized_from") or self._map(stage).shape[1:]
        return rows * self.stride(stage), columns * self.stride(stage)

    def content(self, stage: Stage) -> torch.Tensor:
        """The map of a stage without the cells that lie in the padding altogether, (C, H', W')."""
        tensor = self._map(stage)
        if "resized_from" in self._entry(stage):  # they were left out before
            return tensor
        rows, columns = content_cells(tensor.shape[1:], self.content_size, self.stride(stage))
        return tensor[:, :rows, :columns]

    def cell_boxes(self, stage: Stage) -> torch.Tensor:
        """Box (x1, y1, x2, y2) of every cell of a stage in pixels of the original image, float64 (H, W, 4).

        A cell covers as many pixels of the network's input as the stride says; cells of the last row and column may
        reach beyond the image, since networks round up, and those in the padding lie outside.
        """
        cells, extent = self._map(stage).shape[1:], self.extent(stage)
        y, x = (torch.arange(n + 1, dtype=torch.float64) * (e / n) for n, e in zip(cells, extent, strict=True))
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

    def _entry(self, stage: Stage) -> dict[str, Any]:
        for entry in self.record["stages"]:
            if entry["stage"] == stage:
                return entry
        raise ValueError(f"stage must be one of {self.stages}, got {stage!r}")

    def _map(self, stage: Stage) -> torch.Tensor:
        if stage not in self.tensors:
            raise ValueError(f"stage must be one of {self.stages}, got {stage!r}")
        if self.tensors[stage].ndim != 3:
            raise ValueError(f"stage {stage} is pooled ({self.record['pool']}): it has no cells, only a vector")
        return self.tensors[stage]


def content_cells(cells: Sequence[int], content: Sequence[int], stride: int) -> tuple[int, int]:
    """Rows and columns of a map of `cells` that touch the unpadded part of the input."""
    # -(-a // b): rounded up, in integers.
    return tuple(min(n, -(-c // stride)) for n, c in zip(cells, content, strict=True))


def read_features(path: str | os.PathLike, stages: Stage | Sequence[Stage] | None = None) -> FeatureFile:
    """Read a file written by `extract_features`.

    Args:
        path: The .npz, .safetensors or .h5 file.
        stages: Read these alone, such as `3` or `(3, 'neck0')`; None for all.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is of another kind, or damaged, or has no such stage.
        ImportError: The package for its format is not installed.
    """
    path = Path(os.fspath(path))
    format = next((f for f, suffix in SUFFIXES.items() if suffix == path.suffix), None)
    if format is None:
        raise ValueError(f"path must end in {', '.join(SUFFIXES.values())}, got {path}")
    if not path.is_file():
        raise FileNotFoundError(f"There is no feature file {path}.")
    require_package(format)
    wanted = None if stages is None else (stages,) if isinstance(stages, (int, str)) else tuple(stages)
    try:
        record, tensors = _READERS[format](path, wanted)
    except Exception as error:  # what the readers raise for damaged files is of many kinds
        raise ValueError(f"{path} is no feature file, or damaged ({type(error).__name__}: {error}).") from error
    if wanted is not None and (absent := [stage for stage in wanted if stage not in tensors]):
        there = tuple(entry["stage"] for entry in record["stages"])
        raise ValueError(f"stages must be among {there} in {path}, got {absent[0]!r}")
    return FeatureFile(record, tensors)


def write_features(
    file: BinaryIO, format: str, record: Mapping[str, Any], tensors: Mapping[Stage, torch.Tensor]
) -> None:
    """Write one image's features; the same bytes for the same contents.

    Args:
        file: Open for writing.
        format: One of `FORMATS`.
        record: The image's record, as JSON types.
        tensors: Stage -> tensor on the CPU.
    """
    text = json.dumps(record)
    named = {_tensor_name(stage): tensor.contiguous() for stage, tensor in tensors.items()}
    if format == "npz":
        np.savez(file, **{name: tensor.numpy() for name, tensor in named.items()}, **{_META: np.array(text)})
    elif format == "safetensors":
        from safetensors.torch import save

        file.write(save(named, {_META: text}))
    else:
        import h5py

        # Made in memory: the library writes here and there in a file, while a sink must only be appended to.
        with h5py.File("features.h5", "w", driver="core", backing_store=False) as image:
            for name, tensor in named.items():
                image.create_dataset(name, data=tensor.numpy(), track_times=False)
            image.attrs[_META] = text
            image.flush()
            file.write(image.id.get_file_image())


def require_package(format: str) -> None:
    """Raises ImportError, with the remedy, if the package for a format is not installed."""
    package = _PACKAGES.get(format)
    if package is not None:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise ImportError(f"format={format!r} needs the package {package}: pip install {package}") from error


def _tensor_name(stage: Stage) -> str:
    return f"stage{stage}" if isinstance(stage, int) else stage


def _chosen(record: dict[str, Any], wanted: Sequence[Stage] | None) -> list[Stage]:
    return [e["stage"] for e in record["stages"] if wanted is None or e["stage"] in wanted]


def _read_npz(path: Path, wanted: Sequence[Stage] | None) -> tuple[dict, dict[Stage, torch.Tensor]]:
    with np.load(path) as arrays:
        record = json.loads(str(arrays[_META]))
        return record, {s: torch.from_numpy(arrays[_tensor_name(s)]) for s in _chosen(record, wanted)}


def _read_safetensors(path: Path, wanted: Sequence[Stage] | None) -> tuple[dict, dict[Stage, torch.Tensor]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()[_META])
        return record, {s: file.get_tensor(_tensor_name(s)) for s in _chosen(record, wanted)}


def _read_hdf5(path: Path, wanted: Sequence[Stage] | None) -> tuple[dict, dict[Stage, torch.Tensor]]:
    import h5py

    with h5py.File(path) as file:
        record = json.loads(file.attrs[_META])
        return record, {s: torch.from_numpy(file[_tensor_name(s)][()]) for s in _chosen(record, wanted)}


_READERS = {"npz": _read_npz, "safetensors": _read_safetensors, "hdf5": _read_hdf5}
