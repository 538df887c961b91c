_base_ = "./vmamba-tiny-s2l5_8xb128_in1k.py"

model = dict(backbone=dict(arch="tiny-0220"))
