# 100 epochs of COCO at a total batch of 64, as ViTDet and the Vim authors trained, counted in iterations.
max_iters = 184375
train_cfg = dict(type="IterBasedTrainLoop", max_iters=max_iters, val_interval=5000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type="MultiStepLR", by_epoch=False, begin=0, end=max_iters, milestones=[163889, 177546], gamma=0.1),
]
optim_wrapper = dict(
    type="AmpOptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1),
    constructor="mmvssm.LayerDecayOptimWrapperConstructor",
    # The published groups: norms outside the blocks and the position embedding are left out, everything else decays.
    paramwise_cfg=dict(
        layer_decay_rate=0.7,
        bias_decay_mult=1.0,
        flat_decay_mult=1.0,
        custom_keys={"backbone.layers": dict(decay_mult=1.0)},
    ),
)
# `base_batch_size` = (8 GPUs) x (8 samples per GPU)
auto_scale_lr = dict(enable=False, base_batch_size=64)
