# Classification from scratch of 20 Tiny ImageNet classes at 64 x 64: everything but the backbone.
_base_ = ["mmpretrain::_base_/models/swin_transformer/tiny_224.py", "mmpretrain::_base_/default_runtime.py"]

model = dict(
    head=dict(num_classes=20, cal_acc=False),
    train_cfg=dict(augments=[dict(type="Mixup", alpha=0.2)]),
)
data_preprocessor = dict(num_classes=20, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)

data_root = "{{$MMVSSM_DATA:data}}/tinyimagenet20"
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="RandomCrop", crop_size=64, padding=8),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="PackInputs"),
]
test_pipeline = [dict(type="LoadImageFromFile"), dict(type="PackInputs")]
train_dataloader = dict(
    batch_size=128,
    num_workers=4,
    persistent_workers=True,
    pin_memory=True,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(type="CustomDataset", data_root=data_root, data_prefix="train", pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=4,
    persistent_workers=True,
    pin_memory=True,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="CustomDataset", data_root=data_root, data_prefix="val", pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="Accuracy", topk=(1, 5))
test_evaluator = val_evaluator

# 60 epochs of 55 iterations, 5 of them warm-up.
# A shorter run: --cfg-options train_cfg.max_iters=1100 param_scheduler.0.end=110 param_scheduler.1.begin=110
# (the cosine always ends with the run).
train_cfg = dict(type="IterBasedTrainLoop", max_iters=3300, val_interval=100000)  # evaluated at the end only
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=275),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=False, begin=275),
]
optim_wrapper = dict(
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05),
    # No weight decay on norms, biases and what the backbone names; Swin's position table has to be named here.
    constructor="mmvssm.LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(custom_keys={"relative_position_bias_table": dict(decay_mult=0.0)}),
    clip_grad=dict(max_norm=5.0),
)
auto_scale_lr = dict(base_batch_size=128)

default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(by_epoch=False, interval=-1),  # the last one only
)
log_processor = dict(by_epoch=False)
