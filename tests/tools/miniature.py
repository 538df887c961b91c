"""Miniature data sets of generated images, and options that shrink models, so that whole runs take seconds on a CPU."""

import json
from pathlib import Path

import cv2
import numpy as np

# A VMamba of four blocks; the arch of the config is replaced as a whole.
TINY_ARCH = (
    "model.backbone.arch._delete_=True",
    "model.backbone.arch.embed_dims=8",
    "model.backbone.arch.depths=1,1,1,1",
    "model.backbone.drop_path_rate=0",
)
WIDTHS = "[8,16,32,64]"
LOADERS = tuple(f"{name}_dataloader.num_workers=0" for name in ("train", "val", "test"))

CLASSIFIER = (*TINY_ARCH, *LOADERS, "model.head.in_channels=64", "train_dataloader.batch_size=4")
SEGMENTOR = (
    *TINY_ARCH,
    *LOADERS,
    f"model.decode_head.in_channels={WIDTHS}",
    "model.decode_head.channels=8",
    "model.auxiliary_head.in_channels=32",
    "model.auxiliary_head.channels=8",
    "train_dataloader.batch_size=2",
)
DETECTOR = (
    *TINY_ARCH,
    *LOADERS,
    f"model.neck.in_channels={WIDTHS}",
    "model.neck.out_channels=16",
    "model.rpn_head.in_channels=16",
    "model.rpn_head.feat_channels=16",
    "model.roi_head.bbox_roi_extractor.out_channels=16",
    "model.roi_head.mask_roi_extractor.out_channels=16",
    "model.roi_head.bbox_head.in_channels=16",
    "model.roi_head.bbox_head.fc_out_channels=16",
    "model.roi_head.mask_head.in_channels=16",
    "model.roi_head.mask_head.conv_out_channels=16",
    "model.roi_head.mask_head.num_convs=1",
    "model.train_cfg.rpn_proposal.max_per_img=20",
    "model.train_cfg.rcnn.sampler.num=16",
    "model.test_cfg.rpn.max_per_img=20",
    "train_dataloader.batch_size=2",
)


def _image(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.integers(0, 60, (size, size, 3), dtype=np.uint8)


def make_class_folders(root: Path, classes: int = 20, per_class: int = 2, size: int = 64) -> Path:
    """``{train,val}/<class>/<class>_<n>.png``, a grey level for each class, and lists ``meta/{train,val}.txt``."""
    rng = np.random.default_rng(0)
    (root / "meta").mkdir(parents=True)
    for part in ("train", "val"):
        lines = [f"class{label:02d}/{label}_{n}.png {label}\n" for label in range(classes) for n in range(per_class)]
        (root / "meta" / f"{part}.txt").write_text("".join(lines))
        for label in range(classes):
            folder = root / part / f"class{label:02d}"
            folder.mkdir(parents=True)
            for n in range(per_class):
                cv2.imwrite(str(folder / f"{label}_{n}.png"), _image(rng, size) + np.uint8(label * 9))
    return root


def make_ade20k(root: Path, images: int = 2, size: int = 64) -> Path:
    """The folders of ADEChallengeData2016: a bright square (class 3) on a dark ground (class 1)."""
    rng = np.random.default_rng(0)
    for part in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / kind / part).mkdir(parents=True)
        for n in range(images):
            image, labels = _image(rng, size), np.full((size, size), 1, np.uint8)
            image[16:48, 8 + n : 40 + n] += 150
            labels[16:48, 8 + n : 40 + n] = 3
            cv2.imwrite(str(root / "images" / part / f"{n}.jpg"), image)
            cv2.imwrite(str(root / "annotations" / part / f"{n}.png"), labels)
    return root


def make_coco(root: Path, images: int = 2, size: int = 64) -> Path:
    """The folders of COCO 2017 with one bright rectangle (a person, category 1) per image."""
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    # mmdet counts the categories: all 80 have to be there, with COCO's own gaps.
    gaps = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    ids = [i for i in range(1, 91) if i not in gaps]
    from mmdet.datasets import CocoDataset

    names = CocoDataset.METAINFO["classes"]
    for part in ("train2017", "val2017"):
        (root / part).mkdir()
        content = {"images": [], "annotations": [], "categories": []}
        content["categories"] = [{"id": i, "name": name} for i, name in zip(ids, names, strict=True)]
        for n in range(images):
            image = _image(rng, size)
            x, y, w, h = 10 + 4 * n, 12, 36, 40
            image[y : y + h, x : x + w] += 150
            cv2.imwrite(str(root / part / f"{n}.jpg"), image)
            content["images"].append({"id": n, "file_name": f"{n}.jpg", "width": size, "height": size})
            outline = [x, y, x + w, y, x + w, y + h, x, y + h]
            content["annotations"].append(
                {
                    "id": n + 1,
                    "image_id": n,
                    "category_id": 1,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "segmentation": [outline],
                    "iscrowd": 0,
                }
            )
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return root
