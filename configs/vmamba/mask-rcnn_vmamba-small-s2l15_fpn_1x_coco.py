_base_ = "./mask-rcnn_vmamba-tiny-s2l5_fpn_1x_coco.py"

checkpoint_file = "https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/vssm_small_0229_ckpt_epoch_222.pth"
model = dict(backbone=dict(arch="small-s2l15", drop_path_rate=0.3, init_cfg=dict(checkpoint=checkpoint_file)))
