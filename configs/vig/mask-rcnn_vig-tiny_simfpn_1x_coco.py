_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "../_base_/schedules/coco_adamw_1x.py",
    "mmdet::_base_/default_runtime.py",
]
# Ours: the authors published no detection setting. The schedule is the one that ViT-Adapter and Vision-RWKV use for
# plain backbones of this size; instead of an adapter a simple pyramid rescales the last map.
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
