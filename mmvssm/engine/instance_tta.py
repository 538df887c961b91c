"""Test-time augmentation for detectors with a mask head, which MMDetection's own model refuses.

MMEngine finds ``mmvssm.InstanceTTAModel`` once this module is imported, as ``tools/test.py --tta`` does. It is not
imported with the backbones, because it needs mmdet.
"""

from collections.abc import Sequence

import torch
from mmcv.ops import batched_nms
from mmdet.models.test_time_augs import DetTTAModel
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

from mmvssm.registry import MODELS

# Direction of a flip -> axes of (N, H, W) masks.
_AXES = {"horizontal": (2,), "vertical": (1,), "diagonal": (1, 2)}


@MODELS.register_module()
class InstanceTTAModel(DetTTAModel):
    """Merges boxes and masks of several views (flips, sizes) of an image.

    The boxes of all views, turned back, go through non-maximum suppression together, as in ``DetTTAModel``; each box
    that stays keeps the mask that its own view predicted. Detectors without masks are merged as there.

    Args:
        tta_cfg: ``nms`` (settings of ``batched_nms``) and ``max_per_img``.
        module: The detector, or its config.
        **kwargs: Further arguments of :class:`mmengine.model.BaseTTAModel`.

    Example:
        >>> tta_model = dict(
        ...     type="mmvssm.InstanceTTAModel",
        ...     tta_cfg=dict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=100),
        ... )
    """

    def _merge_single_sample(self, data_samples: Sequence[DetDataSample]) -> DetDataSample:
        views = [sample.pred_instances for sample in data_samples]
        if "masks" not in views[0]:
            return super()._merge_single_sample(data_samples)
        bboxes, scores = self.merge_aug_bboxes(
            [view.bboxes for view in views],
            [view.scores for view in views],
            [sample.metainfo for sample in data_samples],
        )
        labels = torch.cat([view.labels for view in views])
        masks = torch.cat([unflip(sample.pred_instances.masks, sample.metainfo) for sample in data_samples])
        merged = data_samples[0]
        if len(bboxes) == 0:
            return merged
        kept, order = batched_nms(bboxes, scores, labels, self.tta_cfg.nms)
        kept, order = kept[: self.tta_cfg.max_per_img], order[: self.tta_cfg.max_per_img]
        merged.pred_instances = InstanceData(
            bboxes=kept[:, :4], scores=kept[:, 4], labels=labels[order], masks=masks[order]
        )
        return merged


def unflip(masks: torch.Tensor, metainfo: dict) -> torch.Tensor:
    """Masks (N, H, W) of a view, turned back as its ``flip`` and ``flip_direction`` say."""
    return masks.flip(_AXES[metainfo["flip_direction"]]) if metainfo["flip"] else masks
