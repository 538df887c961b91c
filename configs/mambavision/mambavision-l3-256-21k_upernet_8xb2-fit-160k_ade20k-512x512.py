_base_ = "./mambavision-b_upernet_8xb2-fit-amp-160k_ade20k-512x512.py"

checkpoint_file = (
    "https://huggingface.co/nvidia/MambaVision-L3-256-21K/resolve/main/mambavision_L3_21k_740m_256.pth.tar"
)
model = dict(
    backbone=dict(arch="l3-256-21k", drop_path_rate=0.5, init_cfg=dict(checkpoint=checkpoint_file)),
    decode_head=dict(in_channels=[256, 512, 1024, 2048]),
    auxiliary_head=dict(in_channels=1024),
)
# In float32: the authors found mixed precision unstable at this size.
optim_wrapper = dict(type="OptimWrapper")
