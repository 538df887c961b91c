_base_ = "./mambavision-l2_upernet_8xb2-fit-amp-160k_ade20k-512x512.py"

checkpoint_file = (
    "https://huggingface.co/nvidia/MambaVision-L2-512-21K/resolve/main/mambavision_L2_21k_240m_512.pth.tar"
)
model = dict(backbone=dict(arch="l2-512-21k", init_cfg=dict(checkpoint=checkpoint_file)))
