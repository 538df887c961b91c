_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "../_base_/schedules/coco_adamw_1x.py",
    "mmdet::_base_/default_runtime.py",
]
# Ours: the authors published no Mask R-CNN. Windows that fit the map, and batch statistics of ImageNet.
checkpoint_file = "https://huggingface.co/nvidia/MambaVision-T-1K/resolve/main/mambavision_tiny_1k.pth.tar"
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.MambaVision",
        arch="t",
        window_size=(32, 16),
        fit_windows=True,
        drop_path_rate=0.2,
        norm_eval=True,
        out_indices=(0, 1, 2, 3),
        init_cfg=dict(type="Pretrained", checkpoint=checkpoint_file, prefix="backbone."),
    ),
    neck=dict(in_channels=[80, 160, 320, 640]),
)
optim_wrapper = dict(paramwise_cfg=dict(preset="default"))
