_base_ = "./vim-tiny-plus_8xb128_in1k.py"

checkpoint_file = "https://huggingface.co/hustvl/Vim-small-midclstok/resolve/main/vim_s_midclstok_80p5acc.pth"
model = dict(backbone=dict(arch="small-plus", init_cfg=dict(checkpoint=checkpoint_file)), head=dict(in_channels=384))
