_base_ = [
    "mmpretrain::_base_/models/swin_transformer/tiny_224.py",
    "mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py",
    "mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py",
    "mmpretrain::_base_/default_runtime.py",
]

# The class token goes to the linear head. Each part draws its published initialisation itself.
model = dict(
    backbone=dict(
        _delete_=True, type="mmvssm.Vim", arch="tiny", out_type="cls_token", drop_path_rate=0.0, out_indices=(23,)
    ),
    neck=None,
    head=dict(in_channels=192, init_cfg=dict(_delete_=True, type="TruncNormal", layer="Linear", std=0.02, bias=0.0)),
    init_cfg=None,
)

# Every image comes three times in an epoch of unchanged length.
train_dataloader = dict(batch_size=128, sampler=dict(_delete_=True, type="RepeatAugSampler", num_repeats=3))
val_dataloader = dict(batch_size=128)
test_dataloader = dict(batch_size=128)

# Float32 and no clipping, as published.
optim_wrapper = dict(
    optimizer=dict(lr=1e-3, weight_decay=0.1),
    constructor="mmvssm.LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(_delete_=True, preset="official"),
)
# Both parts advance by iteration; the warm-up starts at 1e-6.
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, begin=5, end=300, convert_to_iter_based=True),
]
# An average is kept as well, but the published numbers are those of the weights themselves.
custom_hooks = [
    dict(type="EMAHook", momentum=4e-5, evaluate_on_ema=False, evaluate_on_origin=True, priority="ABOVE_NORMAL")
]
