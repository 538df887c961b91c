_base_ = "./cascade-mask-rcnn_vmamba-tiny-s1l8_fpn_ms-crop-3x_coco.py"

checkpoint_file = "https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth"
# As in the Mask R-CNN of the v0 models, the drop path rate is 0.2 for all three.
model = dict(backbone=dict(arch="v0-tiny", init_cfg=dict(checkpoint=checkpoint_file)))
