_base_ = "./cascade-mask-rcnn_vmamba-tiny-s1l8_fpn_ms-crop-3x_coco.py"

checkpoint_file = "https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/vssm1_small_0229s_ckpt_epoch_240.pth"
model = dict(backbone=dict(arch="small-s1l20", drop_path_rate=0.3, init_cfg=dict(checkpoint=checkpoint_file)))
