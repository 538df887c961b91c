_base_ = "./mask-rcnn_vmamba-small-s1l20_fpn_1x_coco.py"

checkpoint_file = "https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/vssm1_base_0229s_ckpt_epoch_225.pth"
model = dict(
    backbone=dict(arch="base-s1l20", drop_path_rate=0.6, init_cfg=dict(checkpoint=checkpoint_file)),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
