_base_ = "./vig-tiny_upernet_4xb4-160k_ade20k-512x512.py"

checkpoint_file = "https://huggingface.co/hustvl/ViG/resolve/main/vig_b_82p6acc.pth"
model = dict(
    backbone=dict(arch="base", drop_path_rate=0.3, init_cfg=dict(checkpoint=checkpoint_file)),
    neck=dict(in_channels=[768, 768, 768, 768]),
    decode_head=dict(in_channels=[768, 768, 768, 768]),
    auxiliary_head=dict(in_channels=768),
)
optim_wrapper = dict(optimizer=dict(lr=6e-5), paramwise_cfg=dict(layer_decay_rate=0.8))
