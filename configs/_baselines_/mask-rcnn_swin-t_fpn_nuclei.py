_base_ = "../_base_/from_scratch/mask-rcnn_fpn_nuclei.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="SwinTransformer",
        embed_dims=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        drop_path_rate=0.1,
        out_indices=(0, 1, 2, 3),
    ),
)
