_base_ = "./mambavision-l_upernet_8xb2-fit-amp-160k_ade20k-512x512.py"

checkpoint_file = "https://huggingface.co/nvidia/MambaVision-L2-1K/resolve/main/mambavision_large2_1k.pth.tar"
model = dict(backbone=dict(arch="l2", init_cfg=dict(checkpoint=checkpoint_file)))
