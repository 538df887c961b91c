_base_ = "./mambavision-t_32xb128_in1k.py"

model = dict(backbone=dict(arch="l", drop_path_rate=0.3), head=dict(in_channels=1568))

optim_wrapper = dict(optimizer=dict(weight_decay=0.12))
