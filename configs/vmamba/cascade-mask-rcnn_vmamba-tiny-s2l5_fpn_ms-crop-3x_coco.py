_base_ = "./cascade-mask-rcnn_vmamba-tiny-s1l8_fpn_ms-crop-3x_coco.py"

checkpoint_file = "https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/vssm_tiny_0230_ckpt_epoch_262.pth"
model = dict(backbone=dict(arch="tiny-s2l5", init_cfg=dict(checkpoint=checkpoint_file)))
