_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "../_base_/schedules/coco_adamw_1x.py",
    "mmdet::_base_/default_runtime.py",
]

checkpoint_file = "https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth"
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.VMamba",
        arch="tiny-s1l8",
        drop_path_rate=0.2,
        out_indices=(0, 1, 2, 3),
        init_cfg=dict(type="Pretrained", checkpoint=checkpoint_file, prefix="backbone."),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
