_base_ = [
    "mmpretrain::_base_/models/swin_transformer/tiny_224.py",
    "mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py",
    "mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py",
    "mmpretrain::_base_/default_runtime.py",
]

# Swin's classifier (global average pooling, linear head, label smoothing inside mixup / cutmix), another backbone.
model = dict(
    backbone=dict(_delete_=True, type="mmvssm.ViGH", arch="tiny", drop_path_rate=0.2, out_indices=(3,)),
)

train_dataloader = dict(batch_size=128)
val_dataloader = dict(batch_size=128)
test_dataloader = dict(batch_size=128)

optim_wrapper = dict(
    type="AmpOptimWrapper",
    optimizer=dict(lr=1.6e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
    constructor="mmvssm.LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(_delete_=True, preset="official"),
)
# Both parts advance by iteration; the warm-up starts at 1e-6.
param_scheduler = [
    dict(type="LinearLR", start_factor=6.25e-4, by_epoch=True, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, begin=20, end=300, convert_to_iter_based=True),
]
custom_hooks = [dict(type="EMAHook", momentum=1e-4, priority="ABOVE_NORMAL")]
