_base_ = "./vim-small_upernet_4xb4-160k_ade20k-512x512.py"

# Ours: the authors published no segmentation model of this size. No rotation, as the weights were trained without.
checkpoint_file = "https://huggingface.co/hustvl/Vim-base-midclstok/resolve/main/vim_b_midclstok_81p9acc.pth"
model = dict(
    backbone=dict(arch="base", rope=False, rope_residual=False, init_cfg=dict(checkpoint=checkpoint_file)),
    neck=dict(in_channels=[768, 768, 768, 768]),
    decode_head=dict(in_channels=[768, 768, 768, 768], channels=512),
    auxiliary_head=dict(in_channels=768),
)
