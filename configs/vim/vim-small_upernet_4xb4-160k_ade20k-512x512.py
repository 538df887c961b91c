_base_ = "./vim-tiny_upernet_4xb4-160k_ade20k-512x512.py"

# The model is the authors': here they take the residual stream, rotated before every block. Their starting weights were
# trained with that rotation and are no longer offered; those below were not. Without it:
# --cfg-options model.backbone.rope=False model.backbone.rope_residual=False
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
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.95))
