_base_ = "./mask-rcnn_mambavision-b_fpn_1x_coco.py"

checkpoint_file = "https://huggingface.co/nvidia/MambaVision-B-21K/resolve/main/mambavision_base_21k.pth.tar"
model = dict(backbone=dict(arch="b-21k", init_cfg=dict(checkpoint=checkpoint_file)))
