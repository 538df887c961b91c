_base_ = "./cascade-mask-rcnn_mambavision-t_fpn_fit-ms-crop-3x_coco.py"

checkpoint_file = "https://huggingface.co/nvidia/MambaVision-T2-1K/resolve/main/mambavision_tiny2_1k.pth.tar"
model = dict(backbone=dict(arch="t2", init_cfg=dict(checkpoint=checkpoint_file)))
