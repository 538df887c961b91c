_base_ = "./mambavision-b_upernet_8xb2-fit-amp-160k_ade20k-512x512.py"

checkpoint_file = "https://huggingface.co/nvidia/MambaVision-B-21K/resolve/main/mambavision_base_21k.pth.tar"
model = dict(backbone=dict(arch="b-21k", init_cfg=dict(checkpoint=checkpoint_file)))
