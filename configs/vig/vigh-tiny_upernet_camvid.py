_base_ = "../_base_/from_scratch/upernet_camvid.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.ViGH",
        arch="tiny",
        drop_path_rate=0.1,
        out_indices=(0, 1, 2, 3),
    ),
)
