_base_ = "./mask-rcnn_mambavision-l2_fpn_1x_coco.py"

checkpoint_file = (
    "https://huggingface.co/nvidia/MambaVision-L2-512-21K/resolve/main/mambavision_L2_21k_240m_512.pth.tar"
)
model = dict(backbone=dict(arch="l2-512-21k", init_cfg=dict(checkpoint=checkpoint_file)))
