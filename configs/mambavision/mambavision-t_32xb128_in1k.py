_base_ = [
    "mmpretrain::_base_/models/swin_transformer/tiny_224.py",
    "mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py",
    "mmpretrain::_base_/default_runtime.py",
]

# Swin's classifier (global average pooling, linear head, label smoothing inside mixup / cutmix), another backbone.
# It ends with its own batch norm, and its step sizes start as in the authors' runs.
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.MambaVision",
        arch="t",
        drop_path_rate=0.2,
        out_indices=(3,),
        dt_init="zero",
    ),
    head=dict(in_channels=640),
)

test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="ResizeEdge", scale=224, edge="short", backend="pillow", interpolation="bicubic"),
    dict(type="CenterCrop", crop_size=224),
    dict(type="PackInputs"),
]
train_dataloader = dict(batch_size=128)
val_dataloader = dict(batch_size=128, dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(batch_size=128, dataset=dict(pipeline=test_pipeline))

optim_wrapper = dict(
    type="AmpOptimWrapper",
    optimizer=dict(type="Lamb", lr=5e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
    constructor="mmvssm.LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(preset="official"),
)
# Warm-up from 1e-6; the cosine counts from the first epoch, as the authors', so that the two are multiplied at first.
# The last 10 epochs stay at the minimum.
param_scheduler = [
    dict(type="LinearLR", start_factor=2e-4, by_epoch=True, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=5e-6, by_epoch=True, begin=0, end=310, convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs=320, val_interval=1)
val_cfg = {}
test_cfg = {}
custom_hooks = [
    dict(type="EMAHook", momentum=2e-4, priority="ABOVE_NORMAL"),
    dict(type="SyncBuffersHook"),  # batch statistics are averaged over the GPUs once an epoch
]
# `base_batch_size` = (32 GPUs) x (128 samples per GPU)
auto_scale_lr = dict(base_batch_size=4096)
