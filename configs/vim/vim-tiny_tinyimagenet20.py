_base_ = "../_base_/from_scratch/classifier_tinyimagenet20.py"

# 16 x 16 patches, about as many as at 224 pixels.
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.Vim",
        arch=dict(embed_dims=192, patch_size=4),
        img_size=64,
        out_type="cls_token",
        drop_path_rate=0.05,
        out_indices=(23,),
    ),
    neck=None,
    head=dict(in_channels=192),
)
