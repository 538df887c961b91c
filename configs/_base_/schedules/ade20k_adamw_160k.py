# 160k iterations of AdamW at total batch 16, as the Swin and VMamba authors trained UperNet.
_base_ = "mmseg::_base_/schedules/schedule_160k.py"

optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    constructor="mmvssm.LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(preset="official"),  # the weight decay of the published runs; "default" is the saner one
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=1500, end=160000, by_epoch=False),
]
# `base_batch_size` = (4 GPUs) x (4 samples per GPU)
auto_scale_lr = dict(enable=False, base_batch_size=16)
