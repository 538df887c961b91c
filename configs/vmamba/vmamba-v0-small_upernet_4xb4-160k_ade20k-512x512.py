_base_ = "./vmamba-v0-tiny_upernet_4xb4-160k_ade20k-512x512.py"

checkpoint_file = "https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/vssmsmall_dp03_ckpt_epoch_238.pth"
model = dict(backbone=dict(arch="v0-small", init_cfg=dict(checkpoint=checkpoint_file)))
