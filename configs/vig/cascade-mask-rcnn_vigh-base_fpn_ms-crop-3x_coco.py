_base_ = "./cascade-mask-rcnn_vigh-tiny_fpn_ms-crop-3x_coco.py"

checkpoint_file = "https://huggingface.co/hustvl/ViG/resolve/main/vig_h_b_84p2acc.pth"
model = dict(
    backbone=dict(arch="base", drop_path_rate=0.5, init_cfg=dict(checkpoint=checkpoint_file)),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
