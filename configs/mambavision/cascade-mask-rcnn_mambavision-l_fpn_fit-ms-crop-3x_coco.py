_base_ = "./cascade-mask-rcnn_mambavision-b_fpn_fit-ms-crop-3x_coco.py"

checkpoint_file = "https://huggingface.co/nvidia/MambaVision-L-1K/resolve/main/mambavision_large_1k.pth.tar"
model = dict(
    backbone=dict(arch="l", init_cfg=dict(checkpoint=checkpoint_file)),
    neck=dict(in_channels=[196, 392, 784, 1568]),
)
