_base_ = "../_base_/from_scratch/mask-rcnn_fpn_car-parts.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.Vim",
        arch="tiny",
        img_size=512,
        with_cls_token=False,
        out_norm="each",
        drop_path_rate=0.1,
        out_indices=(23,),
    ),
    neck=dict(_delete_=True, type="mmvssm.SimpleFeaturePyramid", in_channels=[192]),
)
