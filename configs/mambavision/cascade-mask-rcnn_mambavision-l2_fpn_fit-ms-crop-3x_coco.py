_base_ = "./cascade-mask-rcnn_mambavision-l_fpn_fit-ms-crop-3x_coco.py"

checkpoint_file = "https://huggingface.co/nvidia/MambaVision-L2-1K/resolve/main/mambavision_large2_1k.pth.tar"
model = dict(backbone=dict(arch="l2", init_cfg=dict(checkpoint=checkpoint_file)))
