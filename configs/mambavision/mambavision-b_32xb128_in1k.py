_base_ = "./mambavision-t_32xb128_in1k.py"

model = dict(backbone=dict(arch="b", drop_path_rate=0.3), head=dict(in_channels=1024))

optim_wrapper = dict(optimizer=dict(weight_decay=0.075))
param_scheduler = [
    dict(type="LinearLR", start_factor=2e-4, by_epoch=True, end=35, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=5e-6, by_epoch=True, begin=0, end=310, convert_to_iter_based=True),
]
