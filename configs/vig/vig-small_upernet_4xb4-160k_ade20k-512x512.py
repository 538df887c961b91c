_base_ = "./vig-tiny_upernet_4xb4-160k_ade20k-512x512.py"

checkpoint_file = "https://huggingface.co/hustvl/ViG/resolve/main/vig_s_81p7acc.pth"
model = dict(
    backbone=dict(arch="small", drop_path_rate=0.2, init_cfg=dict(checkpoint=checkpoint_file)),
    neck=dict(in_channels=[384, 384, 384, 384]),
    decode_head=dict(in_channels=[384, 384, 384, 384]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(optimizer=dict(lr=6e-5), paramwise_cfg=dict(layer_decay_rate=0.85))
