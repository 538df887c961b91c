_base_ = "./mask-rcnn_vig-tiny_simfpn_ms-crop-3x_coco.py"

checkpoint_file = "https://huggingface.co/hustvl/ViG/resolve/main/vig_b_82p6acc.pth"
model = dict(
    backbone=dict(arch="base", drop_path_rate=0.3, init_cfg=dict(checkpoint=checkpoint_file)),
    neck=dict(in_channels=[768]),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=0.05))
