_base_ = [
    "mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py",
    "../_base_/datasets/coco_instance_ms-crop.py",
    "../_base_/schedules/coco_adamw_3x.py",
    "mmdet::_base_/default_runtime.py",
]

checkpoint_file = "https://huggingface.co/nvidia/MambaVision-T-1K/resolve/main/mambavision_tiny_1k.pth.tar"
# Four convolutions and one layer before the predictions, which are one box for each class, compared after decoding.
bbox_head = dict(
    type="ConvFCBBoxHead",
    num_shared_convs=4,
    num_shared_fcs=1,
    in_channels=256,
    conv_out_channels=256,
    fc_out_channels=1024,
    roi_feat_size=7,
    num_classes=80,
    reg_class_agnostic=False,
    reg_decoded_bbox=True,
    norm_cfg=dict(type="SyncBN", requires_grad=True),
    loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    loss_bbox=dict(type="GIoULoss", loss_weight=10.0),
)
bbox_coder = dict(type="DeltaXYWHBBoxCoder", target_means=[0.0, 0.0, 0.0, 0.0])
model = dict(
    # The windows are larger than most maps, which are padded to them. The drop path rate is the one that was really
    # built, whatever the authors' configs say; their batch norms train, with the two images of a GPU.
    backbone=dict(
        _delete_=True,
        type="mmvssm.MambaVision",
        arch="t",
        window_size=(112, 56),
        drop_path_rate=0.2,
        out_indices=(0, 1, 2, 3),
        init_cfg=dict(type="Pretrained", checkpoint=checkpoint_file, prefix="backbone."),
    ),
    neck=dict(in_channels=[80, 160, 320, 640]),
    roi_head=dict(
        bbox_head=[
            dict(bbox_coder=dict(target_stds=[0.1, 0.1, 0.2, 0.2], **bbox_coder), **bbox_head),
            dict(bbox_coder=dict(target_stds=[0.05, 0.05, 0.1, 0.1], **bbox_coder), **bbox_head),
            dict(bbox_coder=dict(target_stds=[0.033, 0.033, 0.067, 0.067], **bbox_coder), **bbox_head),
        ]
    ),
)
