_base_ = "mmpretrain::resnet/resnet50_8xb32_in1k.py"
model = dict(
    backbone=dict(_delete_=True, type="mmvssm.VMamba", arch="tiny-s1l8", out_indices=(3,)),
    head=dict(in_channels=768),
)
