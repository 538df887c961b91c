_base_ = "../_base_/from_scratch/mask-rcnn_fpn_nuclei.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.ViG",
        arch="tiny",
        img_size=512,
        drop_path_rate=0.1,
        out_indices=(11,),
    ),
    neck=dict(_delete_=True, type="mmvssm.SimpleFeaturePyramid", in_channels=[192], out_channels=256, num_outs=5),
)
