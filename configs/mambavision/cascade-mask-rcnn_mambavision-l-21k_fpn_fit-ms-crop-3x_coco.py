_base_ = "./cascade-mask-rcnn_mambavision-l_fpn_fit-ms-crop-3x_coco.py"

checkpoint_file = "https://huggingface.co/nvidia/MambaVision-L-21K/resolve/main/mambavision_large_21k.pth.tar"
model = dict(backbone=dict(arch="l-21k", init_cfg=dict(checkpoint=checkpoint_file)))
