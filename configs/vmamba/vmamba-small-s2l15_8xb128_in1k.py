_base_ = "./vmamba-tiny-s2l5_8xb128_in1k.py"

model = dict(backbone=dict(arch="small-s2l15", drop_path_rate=0.3))
