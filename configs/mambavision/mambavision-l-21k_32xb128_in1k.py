_base_ = "./mambavision-l_32xb128_in1k.py"

# For evaluation: how the authors fine-tuned after ImageNet-21k is not published, so the schedule is that of "l".
model = dict(backbone=dict(arch="l-21k"))
