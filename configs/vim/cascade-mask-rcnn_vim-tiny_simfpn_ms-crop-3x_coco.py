_base_ = [
    "mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py",
    "../_base_/datasets/coco_instance_ms-crop.py",
    "../_base_/schedules/coco_adamw_3x.py",
    "mmdet::_base_/default_runtime.py",
]

# The backbone is that of the authors' detectors, which rotate the residual stream before every block; their starting
# weights were trained with that rotation and are no longer offered, those below were not. Without it:
# --cfg-options model.backbone.rope=False model.backbone.rope_residual=False
# The recipe is ours; theirs is cascade-mask-rcnn_vim-tiny_simfpn_amp-lsj-100e_coco.py.
checkpoint_file = "https://huggingface.co/hustvl/Vim-tiny-midclstok/resolve/main/vim_t_midclstok_76p1acc.pth"
model = dict(
    backbone=dict(
        _delete_=True,
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
    neck=dict(_delete_=True, type="mmvssm.SimpleFeaturePyramid", in_channels=[192]),
)
optim_wrapper = dict(paramwise_cfg=dict(preset="default", layer_decay_rate=0.837))
