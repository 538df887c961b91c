_base_ = "../_base_/from_scratch/mask-rcnn_fpn_car-parts.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.MambaVision",
        arch="t",
        window_size=(32, 16),
        fit_windows=True,
        drop_path_rate=0.1,
        out_indices=(0, 1, 2, 3),
    ),
    neck=dict(in_channels=[80, 160, 320, 640]),
)
