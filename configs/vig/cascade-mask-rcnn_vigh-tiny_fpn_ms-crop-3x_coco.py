_base_ = [
    "mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py",
    "../_base_/datasets/coco_instance_ms-crop.py",
    "../_base_/schedules/coco_adamw_3x.py",
    "mmdet::_base_/default_runtime.py",
]
# Ours: the authors published no detection setting. This is that of Mask R-CNN with mmdet's stock cascade.
checkpoint_file = "https://huggingface.co/hustvl/ViG/resolve/main/vig_h_t_82p8acc.pth"
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.ViGH",
        arch="tiny",
        drop_path_rate=0.2,
        out_indices=(0, 1, 2, 3),
        init_cfg=dict(type="Pretrained", checkpoint=checkpoint_file, prefix="backbone."),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(paramwise_cfg=dict(preset="default"))
