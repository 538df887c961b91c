"""What is published: the entries of the metafiles, with results, addresses and checksums of the authors' files.

`model-index.yml` names the metafile of each family; both are in OpenMMLab's format, which mim, mmpretrain and MMEngine
read too. Fields of our own are described in `docs/zoo.md`. Nothing here imports torch or touches the network.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

PACKAGE = Path(__file__).resolve().parents[1]
# Task of a result in a metafile -> ours. Instance segmentation is a result of detectors.
_TASKS = {
    "Image Classification": "classification",
    "Object Detection": "detection",
    "Instance Segmentation": "detection",
    "Semantic Segmentation": "segmentation",
}


@dataclass(frozen=True)
class ModelInfo:
    """A published model, or a published file of it.

    Attributes:
        name: Stem of its config; where a config has several files, a suffix tells the further ones apart.
        config: Its config.
        family: Title of the family.
        input_size: (height, width) that `flops` stands for.
        parameters: Number of parameter elements, counted by us.
        flops: Operations, a multiply-add counted once, by us.
        results: Published figures, e.g. {'Top 1 Accuracy': 82.6}, of all tasks of the model.
        tasks: Those of `results`: 'classification', 'detection', 'segmentation'.
        weights: Address of the authors' file, or None where they published none.
        file_name: Name under which it is published and kept in the cache.
        sha256: Checksum of the file, where it is known.
        license: Licence of the weights.
        published: Size and cost as the authors give them, where that differs from our count.
        suspect: Published figures that are doubtful, each with the reason.
        paper: Address of the paper.
        code: Address of the authors' code.
    """

    name: str
    config: Path
    family: str
    input_size: tuple[int, int] | None = None
    parameters: int | None = None
    flops: int | None = None
    results: Mapping[str, float] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    weights: str | None = None
    file_name: str | None = None
    sha256: str | None = None
    license: str | None = None
    published: Mapping[str, Any] = field(default_factory=dict)
    suspect: Sequence[Mapping[str, Any]] = ()
    paper: str | None = None
    code: str | None = None


def root() -> Path:
    """The folder of `model-index.yml` and `configs`: the source checkout, or their copies in the installed package.

    Raises:
        FileNotFoundError: Neither is there.
    """
    for folder in (PACKAGE / ".mim", PACKAGE.parent):
        if (folder / "configs").is_dir():
            return folder
    raise FileNotFoundError(f"The configs of mmvssm were not found beside {PACKAGE}; install the package again.")


@functools.cache
def published_models() -> dict[str, ModelInfo]:
    """All entries of the metafiles, name -> entry, in their order."""
    folder = root()
    found: dict[str, ModelInfo] = {}
    for file in _read(folder / "model-index.yml")["Import"]:
        content = _read(folder / file)
        collections = {c["Name"]: c for c in content["Collections"]}
        for entry in content["Models"]:
            found[entry["Name"]] = _info(entry, collections[entry["In Collection"]], folder)
    return found


def find_published(name: str) -> ModelInfo | None:
    """The entry of a name (upper and lower case are the same, as in the libraries), or None."""
    models = published_models()
    return models.get(name) or next((m for n, m in models.items() if n.lower() == str(name).lower()), None)


def sha256_of(url: str) -> str | None:
    """The checksum that the metafiles give for the file at `url`, or None."""
    address = url.partition("?")[0]
    return next((m.sha256 for m in published_models().values() if m.weights == address), None)


def is_published(url: str) -> bool:
    """Whether a metafile names `url`; such files have names of their own."""
    return any(m.weights == url.partition("?")[0] for m in published_models().values())


def _read(path: str | os.PathLike) -> dict:
    return yaml.load(Path(path).read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _info(entry: dict, collection: dict, folder: Path) -> ModelInfo:
    metadata, file, results = entry.get("Metadata", {}), entry.get("Weights File", {}), entry.get("Results", [])
    size = metadata.get("Input Size")
    return ModelInfo(
        name=entry["Name"],
        config=folder / entry["Config"],
        family=collection["Name"],
        input_size=tuple(map(int, size.split(" x "))) if size else None,
        parameters=metadata.get("Parameters"),
        flops=metadata.get("FLOPs"),
        results={key: value for result in results for key, value in result["Metrics"].items()},
        tasks=tuple(dict.fromkeys(_TASKS[result["Task"]] for result in results)),
        weights=entry.get("Weights"),
        file_name=file.get("Name"),
        sha256=file.get("SHA256"),
        license=file.get("License"),
        published=entry.get("Published", {}),
        suspect=tuple(entry.get("Suspect", ())),
        paper=collection["Paper"]["URL"],
        code=collection["Code"]["URL"],
    )
