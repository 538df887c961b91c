# 12 epochs of AdamW, batch 8 x 2, as the Swin and VMamba authors trained Mask R-CNN.
_base_ = "mmdet::_base_/schedules/schedule_1x.py"

train_cfg = dict(max_epochs=12)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor="mmvssm.LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(preset="official"),  # the weight decay of the published runs; "default" is the saner one
)
