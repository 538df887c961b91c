_base_ = "./vmamba-small-s2l15_upernet_4xb4-160k_ade20k-512x512.py"

checkpoint_file = "https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/vssm_base_0229_ckpt_epoch_237.pth"
model = dict(
    backbone=dict(arch="base-s2l15", drop_path_rate=0.6, init_cfg=dict(checkpoint=checkpoint_file)),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
