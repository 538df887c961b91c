# Cascade Mask R-CNN on a simple feature pyramid, as ViTDet (https://arxiv.org/abs/2203.16527) has it: two convolutions
# in the region proposal network, four in box and mask heads, LayerNorm over channels. Leaves add the backbone.
_base_ = "mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py"

norm_cfg = dict(type="mmvssm.LN2d")
box_head = dict(
    type="Shared4Conv1FCBBoxHead",
    in_channels=256,
    conv_out_channels=256,
    fc_out_channels=1024,
    norm_cfg=norm_cfg,
    roi_feat_size=7,
    num_classes=80,
    reg_class_agnostic=True,
    loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    loss_bbox=dict(type="SmoothL1Loss", beta=1.0, loss_weight=1.0),
)
model = dict(
    data_preprocessor=dict(
        pad_size_divisor=32,
        batch_augments=[dict(type="BatchFixedSizePad", size=(1024, 1024), pad_mask=True)],
    ),
    backbone=dict(_delete_=True),
    neck=dict(_delete_=True, type="mmvssm.SimpleFeaturePyramid"),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=[
            dict(
                bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0, 0.0, 0.0, 0.0], target_stds=list(stds)),
                **box_head,
            )
            for stds in ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
        ],
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)
