_base_ = [
    "mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py",
    "../_base_/datasets/coco_instance_ms-crop.py",
    "../_base_/schedules/coco_adamw_3x.py",
    "mmdet::_base_/default_runtime.py",
]
# Ours: the authors published no detection setting. The 1x setting on the 3x schedule, with mmdet's stock cascade.
checkpoint_file = "https://huggingface.co/hustvl/ViG/resolve/main/vig_t_77p2acc.pth"
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.ViG",
        arch="tiny",
        drop_path_rate=0.1,
        out_indices=(11,),
        init_cfg=dict(type="Pretrained", checkpoint=checkpoint_file, prefix="backbone."),
    ),
    neck=dict(_delete_=True, type="mmvssm.SimpleFeaturePyramid", in_channels=[192], out_channels=256, num_outs=5),
)
optim_wrapper = dict(
    optimizer=dict(lr=2e-4, weight_decay=0.01),
    paramwise_cfg=dict(preset="default", layer_decay_rate=0.85),
)
