_base_ = "./mambavision-t_upernet_16xb1-amp-160k_ade20k-512x512.py"

checkpoint_file = "https://huggingface.co/nvidia/MambaVision-B-1K/resolve/main/mambavision_base_1k.pth.tar"
model = dict(
    backbone=dict(arch="b", init_cfg=dict(checkpoint=checkpoint_file)),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
