_base_ = "./cascade-mask-rcnn_vmamba-v0-tiny_fpn_ms-crop-3x_coco.py"

checkpoint_file = "https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/vssmsmall_dp03_ckpt_epoch_238.pth"
model = dict(backbone=dict(arch="v0-small", init_cfg=dict(checkpoint=checkpoint_file)))
