_base_ = "./vim-tiny_upernet_4xb8-60k_ade20k-512x512.py"

checkpoint_file = "https://huggingface.co/hustvl/Vim-small-midclstok/resolve/main/vim_s_midclstok_80p5acc.pth"
model = dict(
    backbone=dict(
        arch="small",
        feature="stream",
        rope=True,
        rope_residual=True,
        residual_in_fp32=True,
        init_cfg=dict(checkpoint=checkpoint_file),
    ),
    neck=dict(in_channels=[384, 384, 384, 384]),
    decode_head=dict(in_channels=[384, 384, 384, 384], channels=384),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(
        custom_keys={
            "backbone.patch_embed": dict(lr_mult=0.95**25),
            "backbone.pos_embed": dict(lr_mult=0.95**25, decay_mult=1.0),
        }
    ),
)
