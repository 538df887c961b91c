_base_ = [
    "mmseg::_base_/models/upernet_swin.py",
    "mmseg::_base_/datasets/ade20k.py",
    "../_base_/schedules/ade20k_adamw_160k.py",
    "mmseg::_base_/default_runtime.py",
]
# Ours: the authors published no segmentation setting. This is Swin's and VMamba's.
checkpoint_file = "https://huggingface.co/hustvl/ViG/resolve/main/vig_h_t_82p8acc.pth"
model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        _delete_=True,
        type="mmvssm.ViGH",
        arch="tiny",
        drop_path_rate=0.2,
        out_indices=(0, 1, 2, 3),
        init_cfg=dict(type="Pretrained", checkpoint=checkpoint_file, prefix="backbone."),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768], num_classes=150),
    auxiliary_head=dict(in_channels=384, num_classes=150),
)
optim_wrapper = dict(paramwise_cfg=dict(preset="default"))
