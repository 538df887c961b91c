_base_ = "../_base_/from_scratch/mask-rcnn_fpn_nuclei.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.ViGH",
        arch="tiny",
        drop_path_rate=0.1,
        out_indices=(0, 1, 2, 3),
    ),
)
