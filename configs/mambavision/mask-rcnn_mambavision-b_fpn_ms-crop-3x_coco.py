_base_ = "./mask-rcnn_mambavision-t_fpn_ms-crop-3x_coco.py"

checkpoint_file = "https://huggingface.co/nvidia/MambaVision-B-1K/resolve/main/mambavision_base_1k.pth.tar"
model = dict(
    backbone=dict(arch="b", drop_path_rate=0.3, init_cfg=dict(checkpoint=checkpoint_file)),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
