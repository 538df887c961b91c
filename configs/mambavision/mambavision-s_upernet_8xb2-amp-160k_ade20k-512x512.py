_base_ = "./mambavision-t_upernet_16xb1-amp-160k_ade20k-512x512.py"

checkpoint_file = "https://huggingface.co/nvidia/MambaVision-S-1K/resolve/main/mambavision_small_1k.pth.tar"
# The map of a crop is 32 x 32: windows of 160 mean 25 times as many tokens.
model = dict(
    backbone=dict(arch="s", window_size=(160, 56), init_cfg=dict(checkpoint=checkpoint_file)),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(optimizer=dict(lr=6e-5))
# `base_batch_size` = (8 GPUs) x (2 samples per GPU)
auto_scale_lr = dict(base_batch_size=16)
