_base_ = "./cascade-mask-rcnn_mambavision-t_fpn_ms-crop-3x_coco.py"

checkpoint_file = "https://huggingface.co/nvidia/MambaVision-S-1K/resolve/main/mambavision_small_1k.pth.tar"
model = dict(
    backbone=dict(arch="s", init_cfg=dict(checkpoint=checkpoint_file)),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
