_base_ = "../_base_/from_scratch/mask-rcnn_fpn_nuclei.py"

# A nucleus is as small as a patch of 16 pixels: patches of 8.
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvssm.Vim",
        arch=dict(embed_dims=192, patch_size=8),
        img_size=512,
        with_cls_token=False,
        out_norm="each",
        drop_path_rate=0.1,
        out_indices=(23,),
    ),
    neck=dict(_delete_=True, type="mmvssm.SimpleFeaturePyramid", in_channels=[192], stride=8),
)
