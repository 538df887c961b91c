_base_ = "../_base_/from_scratch/classifier_tinyimagenet20.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.ViG",
        arch="tiny",
        img_size=64,
        drop_path_rate=0.05,
        out_indices=(11,),
    ),
    head=dict(in_channels=192),
)
