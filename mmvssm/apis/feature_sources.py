"""Which images the feature export works on: files, folders, patterns, COCO files, data sets of a config."""

import contextlib
import copy
import glob
import io
import json
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmvssm.apis.zoo import TASKS

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
SPLITS = ("train", "val", "test")


class ImageEntry(NamedTuple):
    """An image of the input: its file, and its name relative to the input's root, with slashes."""

    path: str
    name: str


def find_images(
    source: str | os.PathLike | Sequence[str | os.PathLike],
    image_root: str | os.PathLike | None = None,
    exclude: str | os.PathLike | None = None,
) -> list[ImageEntry]:
    """The images that an input stands for.

    Args:
        source: An image, a folder (searched with its subfolders), a pattern such as 'a/**/*.jpg', a COCO annotation
            file (.json), or a list of images.
        image_root: Folder that the names in a COCO file are relative to; the file's own folder by default.
        exclude: Folder whose files are passed over (that of the output, which may lie in that of the input).

    Returns:
        In the order of the COCO file or list, else sorted; without repetitions.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: The COCO file or a name in it is not usable, or `image_root` is given for another input.
        TypeError: `source` is none of these.
    """
    if not isinstance(source, (str, os.PathLike)):
        if not isinstance(source, Sequence) or not all(isinstance(p, (str, os.PathLike)) for p in source):
            raise TypeError(f"images must be a path, a pattern or a list of paths, got {type(source).__name__}")
        entries = _relative_to_common([Path(os.fspath(p)).expanduser() for p in source])
    else:
        path = Path(os.fspath(source)).expanduser()
        if path.suffix.lower() == ".json" and not path.is_dir():
            return _find_in_coco(path, image_root)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
            entries = [ImageEntry(str(p), p.relative_to(path).as_posix()) for p in found]
        elif path.is_file():
            entries = [ImageEntry(str(path), path.name)]
        else:
            found = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
            entries = _relative_to_common([p for p in found if p.suffix.lower() in EXTENSIONS and p.is_file()])
    if image_root is not None:
        raise ValueError(f"image_root={os.fspath(image_root)!r} is for COCO files (.json) only")
    if exclude is not None:
        inside = Path(exclude).resolve()
        others = [e for e in entries if inside not in Path(e.path).resolve().parents]
        entries = others or entries  # nothing else: the folder of the images was given for the output, which is refused
    if not entries:
        raise FileNotFoundError(
            f"There are no images in {source!s} (an image, a folder, a pattern or a COCO .json; images end in "
            f"{', '.join(EXTENSIONS)})."
        )
    return list(dict.fromkeys(entries))


def find_images_of_dataset(config: Config, split: str) -> list[ImageEntry]:
    """The image files of a data set of a config, as its library lists them (filters included), without repetitions.

    Args:
        config: The config; its data set is built in its default scope, without the pipeline.
        split: 'train', 'val' or 'test', for the data set of `<split>_dataloader`.

    Raises:
        FileNotFoundError: The annotations or the images are not there.
        ValueError: There is no such split, the data set cannot be built, or it keeps no image files.
        ImportError: The library of the config is not installed.
    """
    if split not in SPLITS:
        raise ValueError(f"dataset must be one of {', '.join(map(repr, SPLITS))}, got {split!r}")
    part = (config.get(f"{split}_dataloader") or {}).get("dataset")
    if not part:
        there = [s for s in SPLITS if (config.get(f"{s}_dataloader") or {}).get("dataset")]
        raise ValueError(
            f"dataset={split!r}: {config.filename} has no {split}_dataloader with a data set; it has "
            f"{', '.join(map(repr, there)) or 'none at all'}"
        )
    what = f"the {part.get('type')} of {split}_dataloader in {config.filename}"
    infos = _list_infos(config, split, part, what)
    paths = [info.get("img_path") for info in infos]
    if not paths:
        raise FileNotFoundError(f"There are no images in {what}.")
    if not all(isinstance(path, str) for path in paths):
        raise ValueError(f"dataset={split!r}: {what} does not keep its images in files (it has no img_path)")
    return list(dict.fromkeys(_relative_to_common([Path(path) for path in paths])))


def _list_infos(config: Config, split: str, part: dict, what: str) -> list[dict[str, Any]]:
    scope = config.get("default_scope", "mmengine")
    if scope not in TASKS:
        raise ValueError(f"default_scope must be one of {sorted(TASKS)}, got {scope!r} in {config.filename}.")
    try:
        registry = import_module(f"{scope}.registry").DATASETS
    except ModuleNotFoundError as error:
        raise ImportError(
            f'{config.filename} needs {scope} ({error}); install it with: pip install "mmvssm[openmmlab]".'
        ) from error
    part = copy.deepcopy(part)
    _empty_pipelines(part)
    try:
        # pycocotools prints what it does.
        with DefaultScope.overwrite_default_scope(scope), contextlib.redirect_stdout(io.StringIO()):
            dataset = registry.build(part)
            dataset.full_init()
        return [dataset.get_data_info(i) for i in range(len(dataset))]
    except FileNotFoundError as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(f"Something is missing for {what}: {reason}") from error
    except Exception as error:  # of many kinds: assertions, keys, whatever the library's parsing meets
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"dataset={split!r}: {what} cannot be built ({reason})") from error


def _empty_pipelines(node: Any) -> None:
    """Transforms are not needed for the list of the images, and theirs may need what is not installed."""
    if isinstance(node, dict):
        if "pipeline" in node:
            node["pipeline"] = []
        for child in node.values():
            _empty_pipelines(child)
    elif isinstance(node, (list, tuple)):
        for child in node:
            _empty_pipelines(child)


def _relative_to_common(paths: list[Path]) -> list[ImageEntry]:
    if not paths:
        return []
    absolute = [os.path.abspath(p) for p in paths]
    root = os.path.commonpath([os.path.dirname(p) for p in absolute])
    return [ImageEntry(str(p), Path(os.path.relpath(a, root)).as_posix()) for p, a in zip(paths, absolute, strict=True)]


def _find_in_coco(path: Path, image_root: str | os.PathLike | None) -> list[ImageEntry]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no COCO file {path}.")
    try:
        names = [image["file_name"] for image in json.loads(path.read_text(encoding="utf-8"))["images"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no COCO file: it must be JSON with images, each with a file_name.") from error
    root = Path(image_root).expanduser() if image_root is not None else path.parent
    if not root.is_dir():
        raise FileNotFoundError(f"image_root={str(root)!r} is no folder.")
    entries = []
    for name in names:
        clean = os.path.normpath(str(name))
        if os.path.isabs(clean) or clean.startswith(os.pardir):
            raise ValueError(f"{path} names {name!r}; names of images must lie inside image_root, {root}.")
        entries.append(ImageEntry(str(root / clean), Path(clean).as_posix()))
    if not entries:
        raise FileNotFoundError(f"There are no images in {path}.")
    return list(dict.fromkeys(entries))
