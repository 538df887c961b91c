# Mask R-CNN from scratch on DSMLR car parts (18 classes, 512 x 512): everything but the backbone.
_base_ = "./mask-rcnn_fpn_nuclei.py"

classes = (
    "back_bumper",
    "back_glass",
    "back_left_door",
    "back_left_light",
    "back_right_door",
    "back_right_light",
    "front_bumper",
    "front_glass",
    "front_left_door",
    "front_left_light",
    "front_right_door",
    "front_right_light",
    "hood",
    "left_mirror",
    "right_mirror",
    "tailgate",
    "trunk",
    "wheel",
)
# Hues spread evenly; neighbours in the list are far apart.
palette = [
    (230, 25, 75),
    (60, 180, 75),
    (255, 225, 25),
    (0, 130, 200),
    (245, 130, 48),
    (145, 30, 180),
    (70, 240, 240),
    (240, 50, 230),
    (210, 245, 60),
    (250, 190, 212),
    (0, 128, 128),
    (220, 190, 255),
    (170, 110, 40),
    (255, 250, 200),
    (128, 0, 0),
    (170, 255, 195),
    (128, 128, 0),
    (0, 0, 128),
]

# Objects are few and large here: the stock anchors and limits again.
model = dict(
    rpn_head=dict(anchor_generator=dict(scales=[8])),
    roi_head=dict(bbox_head=dict(num_classes=18), mask_head=dict(num_classes=18)),
    train_cfg=dict(rpn_proposal=dict(max_per_img=1000)),
    test_cfg=dict(rpn=dict(nms_pre=1000, max_per_img=1000), rcnn=dict(max_per_img=100)),
)

data_root = "{{$MMVSSM_DATA:data}}/car_parts/"
# Left and right parts are classes of their own, so nothing may be mirrored.
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomResize", scale=(512, 512), ratio_range=(0.5, 1.5), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(512, 512), allow_negative_crop=True),
    dict(type="FilterAnnotations", min_gt_bbox_wh=(1, 1), keep_empty=False),
    dict(type="PackDetInputs"),
]
metainfo = dict(_delete_=True, classes=classes, palette=palette)
train_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val.json", proposal_nums=(100, 300, 1000))
test_evaluator = val_evaluator

# A shorter run: --cfg-options train_cfg.max_iters=1000 param_scheduler.0.end=100 \
#     param_scheduler.1.milestones="[750,920]"
train_cfg = dict(max_iters=3000)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=200),
    dict(type="MultiStepLR", by_epoch=False, milestones=[2250, 2760], gamma=0.1),
]
