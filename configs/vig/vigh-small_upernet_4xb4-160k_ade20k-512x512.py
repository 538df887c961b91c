_base_ = "./vigh-tiny_upernet_4xb4-160k_ade20k-512x512.py"

checkpoint_file = "https://huggingface.co/hustvl/ViG/resolve/main/vig_h_s_83p8acc.pth"
model = dict(backbone=dict(arch="small", drop_path_rate=0.3, init_cfg=dict(checkpoint=checkpoint_file)))
