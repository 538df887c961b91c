_base_ = "./mask-rcnn_mambavision-b_fpn_1x_coco.py"

checkpoint_file = (
    "https://huggingface.co/nvidia/MambaVision-L3-256-21K/resolve/main/mambavision_L3_21k_740m_256.pth.tar"
)
model = dict(
    backbone=dict(arch="l3-256-21k", drop_path_rate=0.5, init_cfg=dict(checkpoint=checkpoint_file)),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
)
