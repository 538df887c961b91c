_base_ = "./mambavision-l_32xb128_in1k.py"

model = dict(backbone=dict(arch="l2"))
