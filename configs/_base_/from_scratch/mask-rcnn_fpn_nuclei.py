# Mask R-CNN from scratch on the nuclei of the 2018 Data Science Bowl: everything but the backbone.
# The leaves that inherit this differ in nothing else, so that backbones can be compared.
_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "mmdet::_base_/default_runtime.py"]

# Without pretrained weights the pyramid and the heads need normalisation.
norm_cfg = dict(type="GN", num_groups=32, requires_grad=True)
model = dict(
    neck=dict(in_channels=[96, 192, 384, 768], norm_cfg=norm_cfg),
    # A nucleus is about 16 pixels wide and images are enlarged twice: half the stock anchor size.
    rpn_head=dict(anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_head=dict(type="Shared4Conv1FCBBoxHead", conv_out_channels=256, norm_cfg=norm_cfg, num_classes=1),
        mask_head=dict(norm_cfg=norm_cfg, num_classes=1),
    ),
    # Up to 313 nuclei in an image.
    train_cfg=dict(rpn_proposal=dict(nms_pre=2000, max_per_img=2000)),
    test_cfg=dict(rpn=dict(nms_pre=2000, max_per_img=2000), rcnn=dict(max_per_img=400)),
)

data_root = "{{$MMVSSM_DATA:data}}/nuclei/"
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomResize", scale=(512, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(512, 512), allow_negative_crop=True),
    dict(type="FilterAnnotations", min_gt_bbox_wh=(1, 1), keep_empty=False),
    dict(type="RandomFlip", prob=[0.3, 0.3], direction=["horizontal", "vertical"]),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(512, 512), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip", "flip_direction"),
    ),
]
dataset = dict(type="CocoDataset", data_root=data_root, metainfo=dict(classes=("nucleus",), palette=[(220, 20, 60)]))
train_dataloader = dict(
    batch_size=8,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        ann_file="annotations/instances_train.json",
        data_prefix=dict(img="train/"),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=train_pipeline,
        **dataset,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        ann_file="annotations/instances_val.json",
        data_prefix=dict(img="val/"),
        test_mode=True,
        pipeline=test_pipeline,
        **dataset,
    ),
)
test_dataloader = val_dataloader
# pycocotools reads AP at 100 detections and AP50 / AP75 at the last of these numbers.
val_evaluator = dict(
    type="CocoMetric",
    ann_file=data_root + "annotations/instances_val.json",
    metric=["bbox", "segm"],
    proposal_nums=(100, 300, 500),
)
test_evaluator = val_evaluator

# A shorter run: --cfg-options train_cfg.max_iters=800 param_scheduler.0.end=100 \
#     param_scheduler.1.milestones="[600,736]"
train_cfg = dict(type="IterBasedTrainLoop", max_iters=2500, val_interval=100000)  # evaluated at the end only
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=300),
    dict(type="MultiStepLR", by_epoch=False, milestones=[1875, 2300], gamma=0.1),
]
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-4, betas=(0.9, 0.999), weight_decay=0.05),
    # No weight decay on norms, biases and what the backbone names; Swin's position table has to be named here.
    constructor="mmvssm.LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(custom_keys={"relative_position_bias_table": dict(decay_mult=0.0)}),
    clip_grad=dict(max_norm=5.0),
)
auto_scale_lr = dict(enable=False, base_batch_size=8)

default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(by_epoch=False, interval=-1),  # the last one only
)
log_processor = dict(by_epoch=False)
