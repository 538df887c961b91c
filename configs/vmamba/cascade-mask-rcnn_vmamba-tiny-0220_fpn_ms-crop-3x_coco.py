_base_ = "./cascade-mask-rcnn_vmamba-tiny-s2l5_fpn_ms-crop-3x_coco.py"

checkpoint_file = "https://github.com/MzeroMiko/VMamba/releases/download/%2320240220/vssmtiny_dp02_ckpt_epoch_258.pth"
model = dict(backbone=dict(arch="tiny-0220", init_cfg=dict(checkpoint=checkpoint_file)))
