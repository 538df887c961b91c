_base_ = "./vig-tiny_8xb128_in1k.py"

model = dict(backbone=dict(arch="small", drop_path_rate=0.2), head=dict(in_channels=384))
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=0.1))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, begin=20, end=300, convert_to_iter_based=True),
]
