_base_ = "./cascade-mask-rcnn_vim-tiny_simfpn_ms-crop-3x_coco.py"

checkpoint_file = "https://huggingface.co/hustvl/Vim-base-midclstok/resolve/main/vim_b_midclstok_81p9acc.pth"
model = dict(backbone=dict(arch="base", init_cfg=dict(checkpoint=checkpoint_file)), neck=dict(in_channels=[768]))
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.7))
