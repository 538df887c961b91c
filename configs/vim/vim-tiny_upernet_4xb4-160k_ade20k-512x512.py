_base_ = [
    "mmseg::_base_/models/upernet_swin.py",
    "mmseg::_base_/datasets/ade20k.py",
    "../_base_/schedules/ade20k_adamw_160k.py",
    "mmseg::_base_/default_runtime.py",
]

# The model is the authors': outputs of the mixers, without class token and norm. The schedule is that of the other
# families; theirs is vim-tiny_upernet_4xb8-60k_ade20k-512x512.py.
checkpoint_file = "https://huggingface.co/hustvl/Vim-tiny-midclstok/resolve/main/vim_t_midclstok_76p1acc.pth"
model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        _delete_=True,
        type="mmvssm.Vim",
        arch="tiny",
        img_size=512,
        with_cls_token=False,
        feature="mixer",
        out_norm=None,
        residual_in_fp32=False,
        drop_path_rate=0.1,
        out_indices=(5, 11, 17, 23),
        init_cfg=dict(type="Pretrained", checkpoint=checkpoint_file, prefix="backbone."),
    ),
    neck=dict(type="mmvssm.DeconvPyramid", in_channels=[192, 192, 192, 192]),
    decode_head=dict(in_channels=[192, 192, 192, 192], channels=192, num_classes=150),
    auxiliary_head=dict(in_channels=192, num_classes=150),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
optim_wrapper = dict(
    optimizer=dict(lr=1e-4, weight_decay=0.05), paramwise_cfg=dict(preset="default", layer_decay_rate=0.92)
)
