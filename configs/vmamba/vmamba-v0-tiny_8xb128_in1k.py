_base_ = "./vmamba-tiny-s1l8_8xb128_in1k.py"

model = dict(backbone=dict(arch="v0-tiny", drop_path_rate=0.1))
# The released weights are those of the model itself: this run kept no moving average.
custom_hooks = []
