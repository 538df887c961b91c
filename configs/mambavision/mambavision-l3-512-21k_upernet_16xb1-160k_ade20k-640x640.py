_base_ = [
    "mmseg::_base_/models/upernet_swin.py",
    "mmseg::_base_/datasets/ade20k_640x640.py",
    "../_base_/schedules/ade20k_adamw_160k.py",
    "mmseg::_base_/default_runtime.py",
]

checkpoint_file = (
    "https://huggingface.co/nvidia/MambaVision-L3-512-21K/resolve/main/mambavision_L3_21k_740m_512.pth.tar"
)
model = dict(
    data_preprocessor=dict(size=(640, 640)),
    backbone=dict(
        _delete_=True,
        type="mmvssm.MambaVision",
        arch="l3-512-21k",
        window_size=(64, 32),
        drop_path_rate=0.2,  # as really built, see mambavision-t
        out_indices=(0, 1, 2, 3),
        init_cfg=dict(type="Pretrained", checkpoint=checkpoint_file, prefix="backbone."),
    ),
    decode_head=dict(in_channels=[256, 512, 1024, 2048], num_classes=150),
    auxiliary_head=dict(in_channels=1024, num_classes=150),
)
train_dataloader = dict(batch_size=1)
# In float32: the authors found mixed precision unstable.
optim_wrapper = dict(optimizer=dict(lr=8e-5, weight_decay=0.05))
# `base_batch_size` = (16 GPUs) x (1 sample per GPU)
auto_scale_lr = dict(base_batch_size=16)
