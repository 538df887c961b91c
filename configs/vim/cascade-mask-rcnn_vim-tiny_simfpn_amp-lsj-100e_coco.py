_base_ = [
    "../_base_/models/cascade-mask-rcnn_simfpn.py",
    "../_base_/datasets/coco_instance_lsj.py",
    "../_base_/schedules/coco_adamw_lsj-100e.py",
    "mmdet::_base_/default_runtime.py",
]

# The authors' detector and recipe. Their starting weights were trained with the rotary embedding and are no longer
# offered; those below were not. Without it:
# --cfg-options model.backbone.rope=False model.backbone.rope_residual=False
checkpoint_file = "https://huggingface.co/hustvl/Vim-tiny-midclstok/resolve/main/vim_t_midclstok_76p1acc.pth"
model = dict(
    backbone=dict(
        type="mmvssm.Vim",
        arch="tiny",
        img_size=1024,
        with_cls_token=False,
        out_norm=None,
        rope=True,
        rope_residual=True,
        drop_path_rate=0.1,
        out_indices=(23,),
        init_cfg=dict(type="Pretrained", checkpoint=checkpoint_file, prefix="backbone."),
    ),
    neck=dict(in_channels=[192]),
)

default_hooks = dict(checkpoint=dict(by_epoch=False, interval=5000, max_keep_ckpts=2))
log_processor = dict(by_epoch=False)
