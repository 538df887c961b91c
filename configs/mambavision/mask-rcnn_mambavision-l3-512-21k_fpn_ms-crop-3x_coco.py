_base_ = "./mask-rcnn_mambavision-l3-256-21k_fpn_ms-crop-3x_coco.py"

checkpoint_file = (
    "https://huggingface.co/nvidia/MambaVision-L3-512-21K/resolve/main/mambavision_L3_21k_740m_512.pth.tar"
)
model = dict(backbone=dict(arch="l3-512-21k", init_cfg=dict(checkpoint=checkpoint_file)))
