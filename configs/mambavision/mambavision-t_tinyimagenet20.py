_base_ = "../_base_/from_scratch/classifier_tinyimagenet20.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.MambaVision",
        arch="t",
        window_size=(32, 16),
        fit_windows=True,
        drop_path_rate=0.05,
        out_indices=(3,),
    ),
    head=dict(in_channels=640),
)
