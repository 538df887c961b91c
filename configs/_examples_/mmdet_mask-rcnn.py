_base_ = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"
model = dict(
    backbone=dict(_delete_=True, type="mmvssm.VMamba", arch="tiny-s1l8", out_indices=(0, 1, 2, 3)),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
