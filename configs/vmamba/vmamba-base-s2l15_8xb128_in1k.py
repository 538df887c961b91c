_base_ = "./vmamba-small-s2l15_8xb128_in1k.py"

model = dict(backbone=dict(arch="base-s2l15", drop_path_rate=0.6), head=dict(in_channels=1024))
