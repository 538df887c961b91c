_base_ = "./vmamba-v0-small_upernet_4xb4-160k_ade20k-512x512.py"

checkpoint_file = "https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/vssmbase_dp06_ckpt_epoch_241.pth"
model = dict(
    backbone=dict(arch="v0-base", init_cfg=dict(checkpoint=checkpoint_file)),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
