_base_ = "./vigh-tiny_upernet_4xb4-160k_ade20k-512x512.py"

checkpoint_file = "https://huggingface.co/hustvl/ViG/resolve/main/vig_h_b_84p2acc.pth"
model = dict(
    backbone=dict(arch="base", drop_path_rate=0.5, init_cfg=dict(checkpoint=checkpoint_file)),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
