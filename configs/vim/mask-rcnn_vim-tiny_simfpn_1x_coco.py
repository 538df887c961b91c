_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "../_base_/schedules/coco_adamw_1x.py",
    "mmdet::_base_/default_runtime.py",
]

# Ours: the authors published no Mask R-CNN. No rotary embedding, as the weights were trained without.
checkpoint_file = "https://huggingface.co/hustvl/Vim-tiny-midclstok/resolve/main/vim_t_midclstok_76p1acc.pth"
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.Vim",
        arch="tiny",
        img_size=1024,
        with_cls_token=False,
        out_norm=None,
        drop_path_rate=0.1,
        out_indices=(23,),
        init_cfg=dict(type="Pretrained", checkpoint=checkpoint_file, prefix="backbone."),
    ),
    neck=dict(_delete_=True, type="mmvssm.SimpleFeaturePyramid", in_channels=[192]),
)
optim_wrapper = dict(paramwise_cfg=dict(preset="default", layer_decay_rate=0.837))
