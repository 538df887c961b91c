_base_ = [
    "mmseg::_base_/models/upernet_swin.py",
    "mmseg::_base_/datasets/ade20k.py",
    "../_base_/schedules/ade20k_adamw_160k.py",
    "mmseg::_base_/default_runtime.py",
]

checkpoint_file = "https://huggingface.co/nvidia/MambaVision-T-1K/resolve/main/mambavision_tiny_1k.pth.tar"
model = dict(
    data_preprocessor=dict(size=(512, 512)),
    # The windows are larger than the map of a crop, which is padded to them. The drop path rate is the one that was
    # really built, whatever the authors' configs say; their batch norms train, with the one image of a GPU.
    backbone=dict(
        _delete_=True,
        type="mmvssm.MambaVision",
        arch="t",
        window_size=(64, 32),
        drop_path_rate=0.2,
        out_indices=(0, 1, 2, 3),
        init_cfg=dict(type="Pretrained", checkpoint=checkpoint_file, prefix="backbone."),
    ),
    decode_head=dict(in_channels=[80, 160, 320, 640], num_classes=150),
    auxiliary_head=dict(in_channels=320, num_classes=150),
)
train_dataloader = dict(batch_size=1)
optim_wrapper = dict(type="AmpOptimWrapper", optimizer=dict(lr=5e-5))
# `base_batch_size` = (16 GPUs) x (1 sample per GPU)
auto_scale_lr = dict(base_batch_size=16)
