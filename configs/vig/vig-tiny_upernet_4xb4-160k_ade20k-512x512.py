_base_ = [
    "mmseg::_base_/models/upernet_swin.py",
    "mmseg::_base_/datasets/ade20k.py",
    "../_base_/schedules/ade20k_adamw_160k.py",
    "mmseg::_base_/default_runtime.py",
]
# Ours: the authors published no segmentation setting. The schedule is the one that ViT-Adapter and Vision-RWKV use for
# plain backbones of this size; instead of an adapter four taps are rescaled to the strides of a pyramid.
checkpoint_file = "https://huggingface.co/hustvl/ViG/resolve/main/vig_t_77p2acc.pth"
model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        _delete_=True,
        type="mmvssm.ViG",
        arch="tiny",
        img_size=512,
        drop_path_rate=0.1,
        out_indices=(2, 5, 8, 11),
        init_cfg=dict(type="Pretrained", checkpoint=checkpoint_file, prefix="backbone."),
    ),
    neck=dict(type="mmvssm.DeconvPyramid", in_channels=[192, 192, 192, 192]),
    decode_head=dict(in_channels=[192, 192, 192, 192], num_classes=150),
    auxiliary_head=dict(in_channels=192, num_classes=150),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
optim_wrapper = dict(
    optimizer=dict(lr=12e-5),
    paramwise_cfg=dict(preset="default", layer_decay_rate=0.95),
)
