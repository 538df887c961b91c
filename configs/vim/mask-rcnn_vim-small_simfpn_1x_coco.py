_base_ = "./mask-rcnn_vim-tiny_simfpn_1x_coco.py"

checkpoint_file = "https://huggingface.co/hustvl/Vim-small-midclstok/resolve/main/vim_s_midclstok_80p5acc.pth"
model = dict(backbone=dict(arch="small", init_cfg=dict(checkpoint=checkpoint_file)), neck=dict(in_channels=[384]))
