_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "../_base_/schedules/coco_adamw_1x.py",
    "mmdet::_base_/default_runtime.py",
]
# Ours: the authors published no detection setting. This is Swin's and VMamba's.
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
