_base_ = "./vmamba-tiny-s1l8_upernet_4xb4-160k_ade20k-512x512.py"

checkpoint_file = "https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth"
# The three v0 models were trained with the drop path rate that the Swin config left behind, 0.3.
model = dict(backbone=dict(arch="v0-tiny", drop_path_rate=0.3, init_cfg=dict(checkpoint=checkpoint_file)))
