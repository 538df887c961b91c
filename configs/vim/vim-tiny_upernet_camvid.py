_base_ = "../_base_/from_scratch/upernet_camvid.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.Vim",
        arch="tiny",
        img_size=352,
        with_cls_token=False,
        out_norm="each",
        drop_path_rate=0.1,
        out_indices=(5, 11, 17, 23),
    ),
    neck=dict(type="mmvssm.DeconvPyramid", in_channels=[192, 192, 192, 192]),
    decode_head=dict(in_channels=[192, 192, 192, 192]),
    auxiliary_head=dict(in_channels=192),
)
