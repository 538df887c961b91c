_base_ = "./cascade-mask-rcnn_vmamba-v0-small_fpn_ms-crop-3x_coco.py"

checkpoint_file = "https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/vssmbase_dp06_ckpt_epoch_241.pth"
model = dict(
    backbone=dict(arch="v0-base", init_cfg=dict(checkpoint=checkpoint_file)),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
