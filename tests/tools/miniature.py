"""Miniatures of the data sets that the configs name, generated, so that whole runs take seconds on a CPU."""

import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np


def _image(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.integers(0, 60, (*shape, 3), dtype=np.uint8)


def make_class_folders(
    root: Path, classes: int = 20, per_class: int = 2, size: int = 64, names: Sequence[str] | None = None
) -> Path:
    """``{train,val}/<class>/<number>_<n>.png``, a grey level for each class, and lists ``meta/{train,val}.txt``."""
    rng = np.random.default_rng(0)
    names = [f"class{label:02d}" for label in range(classes)] if names is None else names
    (root / "meta").mkdir(parents=True)
    for part in ("train", "val"):
        lines = []
        for label, name in enumerate(names):
            (root / part / name).mkdir(parents=True)
            for n in range(per_class):
                file = f"{name}/{label}_{n}.png"
                cv2.imwrite(str(root / part / file), _image(rng, (size, size)) + np.uint8(label * 9))
                lines.append(f"{file} {label}\n")
        (root / "meta" / f"{part}.txt").write_text("".join(lines))
    return root


def make_ade20k(root: Path, images: int = 2, size: int = 64) -> Path:
    """The folders of ADEChallengeData2016: a bright square (class 3) on a dark ground (class 1)."""
    rng = np.random.default_rng(0)
    for part in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / kind / part).mkdir(parents=True)
        for n in range(images):
            image, labels = _image(rng, (size, size)), np.full((size, size), 1, np.uint8)
            image[16:48, 8 + n : 40 + n] += 150
            labels[16:48, 8 + n : 40 + n] = 3
            cv2.imwrite(str(root / "images" / part / f"{n}.jpg"), image)
            cv2.imwrite(str(root / "annotations" / part / f"{n}.png"), labels)
    return root


def make_camvid(root: Path, images: int = 2, label: int = 3) -> Path:
    """The folders of CamVid as the configs read them, 60 x 45 pixels: no multiple of 32, like the 360 rows there.

    A bright rectangle (class ``label``) on a dark ground (class 0).
    """
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for folder in ("img_dir", "ann_dir"):
            (root / folder / part).mkdir(parents=True)
        for n in range(images):
            image, labels = _image(rng, (45, 60)), np.zeros((45, 60), np.uint8)
            image[20:40, 8 + n : 40 + n] += 150
            labels[20:40, 8 + n : 40 + n] = label
            cv2.imwrite(str(root / "img_dir" / part / f"{n}.jpg"), image)
            cv2.imwrite(str(root / "ann_dir" / part / f"{n}.png"), labels)
    return root


def make_coco(root: Path, images: int = 2, size: int = 64) -> Path:
    """The folders of COCO 2017 with one bright rectangle (a person, category 1) per image."""
    from mmdet.datasets import CocoDataset

    # mmdet counts the categories: all 80 have to be there, with COCO's own gaps.
    gaps = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    ids = [i for i in range(1, 91) if i not in gaps]
    categories = dict(zip(ids, CocoDataset.METAINFO["classes"], strict=True))
    for part in ("train2017", "val2017"):
        make_rectangles(root / part, root / "annotations" / f"instances_{part}.json", categories, images, size)
    return root


def make_rectangles(folder: Path, ann_file: Path, categories: dict[int, str], images: int = 2, size: int = 64) -> None:
    """Images with one bright rectangle of the first category each, and their annotations in COCO's format."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    ann_file.parent.mkdir(parents=True, exist_ok=True)
    content = {"images": [], "annotations": []}
    content["categories"] = [{"id": i, "name": name} for i, name in categories.items()]
    for n in range(images):
        image = _image(rng, (size, size))
        x, y, w, h = 10 + 4 * n, 12, 36, 40
        image[y : y + h, x : x + w] += 150
        cv2.imwrite(str(folder / f"{n}.jpg"), image)
        content["images"].append({"id": n, "file_name": f"{n}.jpg", "width": size, "height": size})
        content["annotations"].append(
            {
                "id": n + 1,
                "image_id": n,
                "category_id": next(iter(categories)),
                "bbox": [x, y, w, h],
                "area": w * h,
                "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                "iscrowd": 0,
            }
        )
    ann_file.write_text(json.dumps(content))


def make_everything(root: Path) -> Path:
    """``data`` with a miniature of every data set that the configs name, where they look for it; returns ``root``."""
    from tests.configs.conftest import CONFIGS, parsed

    data = root / "data"
    make_class_folders(data / "imagenet", classes=2, per_class=1)
    make_class_folders(data / "tinyimagenet20", per_class=1)
    make_ade20k(data / "ade" / "ADEChallengeData2016")
    make_camvid(data / "camvid")
    make_coco(data / "coco")
    for name in ("nuclei", "car-parts"):
        cfg = parsed(CONFIGS / "_baselines_" / f"mask-rcnn_swin-t_fpn_{name}.py")
        categories = dict(enumerate(cfg.train_dataloader.dataset.metainfo.classes, start=1))
        folder = root / cfg.train_dataloader.dataset.data_root
        for part in ("train", "val"):
            make_rectangles(folder / part, folder / "annotations" / f"instances_{part}.json", categories)
    return root
