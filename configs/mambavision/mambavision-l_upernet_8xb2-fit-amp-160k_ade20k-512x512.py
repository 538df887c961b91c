_base_ = "./mambavision-b_upernet_8xb2-fit-amp-160k_ade20k-512x512.py"

checkpoint_file = "https://huggingface.co/nvidia/MambaVision-L-1K/resolve/main/mambavision_large_1k.pth.tar"
model = dict(
    backbone=dict(arch="l", init_cfg=dict(checkpoint=checkpoint_file)),
    decode_head=dict(in_channels=[196, 392, 784, 1568]),
    auxiliary_head=dict(in_channels=784),
)
