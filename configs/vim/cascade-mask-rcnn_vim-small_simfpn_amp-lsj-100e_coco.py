_base_ = "./cascade-mask-rcnn_vim-tiny_simfpn_amp-lsj-100e_coco.py"

checkpoint_file = "https://huggingface.co/hustvl/Vim-small-midclstok/resolve/main/vim_s_midclstok_80p5acc.pth"
model = dict(backbone=dict(arch="small", init_cfg=dict(checkpoint=checkpoint_file)), neck=dict(in_channels=[384]))
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.837))
