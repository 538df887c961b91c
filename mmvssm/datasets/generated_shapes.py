"""Data set for MMDetection over the generated shapes."""

from typing import ClassVar

from mmdet.datasets import CocoDataset

from mmvssm.registry import DATASETS

from .shapes import CLASSES, PALETTE, write_shapes


@DATASETS.register_module()
class GeneratedShapes(CocoDataset):
    """COCO data set that writes itself: discs, boxes, triangles, stars and rings on cluttered backgrounds.

    On first use the images and the annotation file are written below ``data_root`` (see :func:`write_shapes` for
    the layout); later runs with the same arguments read them. Stock pipelines and ``CocoMetric`` work as with COCO.

    Args:
        data_root: Folder for the data.
        split: Name of the split. Images of different splits differ.
        num_images: Number of images.
        image_size: Side of the square images, or (height, width).
        seed: Seed of the images.
        **kwargs: Further arguments of :class:`mmdet.datasets.CocoDataset` (``pipeline``, ``filter_cfg``,
            ``test_mode``, ``lazy_init`` ...); ``ann_file`` and ``data_prefix`` follow from the split.

    Example:
        >>> dataset = GeneratedShapes("data/shapes", num_images=8, pipeline=[dict(type="LoadImageFromFile")])
        >>> dataset[0]["img"].shape
        (128, 128, 3)
    """

    METAINFO: ClassVar[dict] = dict(classes=CLASSES, palette=list(PALETTE))

    def __init__(
        self,
        data_root: str,
        split: str = "train",
        num_images: int = 1000,
        image_size: int | tuple[int, int] = 128,
        seed: int = 0,
        **kwargs,
    ) -> None:
        for name in ("ann_file", "data_prefix"):
            if name in kwargs:
                raise TypeError(f"GeneratedShapes finds {name} from data_root and split; it must not be given")
        self.recipe = dict(num_images=num_images, size=image_size, seed=seed, split=split)
        self.shapes_root = data_root
        super().__init__(
            data_root=data_root,
            ann_file=f"annotations/instances_{split}.json",
            data_prefix=dict(img=f"{split}/"),
            **kwargs,
        )

    def load_data_list(self) -> list[dict]:
        """Writes the data when they are missing, then reads the annotation file as ``CocoDataset`` does."""
        write_shapes(self.shapes_root, **self.recipe)
        return super().load_data_list()
