_base_ = [
    "mmseg::_base_/models/upernet_swin.py",
    "mmseg::_base_/datasets/ade20k.py",
    "../_base_/schedules/ade20k_adamw_160k.py",
    "mmseg::_base_/default_runtime.py",
]
# Ours. Windows that fit: the map of a crop is one window, without padding. Batch statistics of ImageNet.
checkpoint_file = "https://huggingface.co/nvidia/MambaVision-T-1K/resolve/main/mambavision_tiny_1k.pth.tar"
model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        _delete_=True,
        type="mmvssm.MambaVision",
        arch="t",
        window_size=(32, 16),
        fit_windows=True,
        drop_path_rate=0.2,
        norm_eval=True,
        out_indices=(0, 1, 2, 3),
        init_cfg=dict(type="Pretrained", checkpoint=checkpoint_file, prefix="backbone."),
    ),
    decode_head=dict(in_channels=[80, 160, 320, 640], num_classes=150),
    auxiliary_head=dict(in_channels=320, num_classes=150),
)
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(type="AmpOptimWrapper", paramwise_cfg=dict(preset="default"))
