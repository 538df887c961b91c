_base_ = "./mambavision-t_upernet_8xb2-fit-amp-160k_ade20k-512x512.py"

checkpoint_file = "https://huggingface.co/nvidia/MambaVision-S-1K/resolve/main/mambavision_small_1k.pth.tar"
model = dict(
    backbone=dict(arch="s", drop_path_rate=0.2, init_cfg=dict(checkpoint=checkpoint_file)),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
