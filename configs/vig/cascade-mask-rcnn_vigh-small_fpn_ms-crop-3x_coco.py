_base_ = "./cascade-mask-rcnn_vigh-tiny_fpn_ms-crop-3x_coco.py"

checkpoint_file = "https://huggingface.co/hustvl/ViG/resolve/main/vig_h_s_83p8acc.pth"
model = dict(backbone=dict(arch="small", drop_path_rate=0.3, init_cfg=dict(checkpoint=checkpoint_file)))
