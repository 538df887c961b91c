_base_ = "./mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py"

checkpoint_file = "https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth"
# The three v0 models were trained with the drop path rate that the Swin config left behind, 0.2.
model = dict(backbone=dict(arch="v0-tiny", init_cfg=dict(checkpoint=checkpoint_file)))
