_base_ = "./cascade-mask-rcnn_vig-tiny_simfpn_ms-crop-3x_coco.py"

checkpoint_file = "https://huggingface.co/hustvl/ViG/resolve/main/vig_s_81p7acc.pth"
model = dict(
    backbone=dict(arch="small", drop_path_rate=0.2, init_cfg=dict(checkpoint=checkpoint_file)),
    neck=dict(in_channels=[384]),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=0.05))
