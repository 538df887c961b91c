_base_ = "mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512.py"
model = dict(
    backbone=dict(_delete_=True, type="mmvssm.VMamba", arch="tiny-s1l8", out_indices=(0, 1, 2, 3)),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
    pretrained=None,
)
