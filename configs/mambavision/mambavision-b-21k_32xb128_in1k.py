_base_ = "./mambavision-b_32xb128_in1k.py"

# For evaluation: how the authors fine-tuned after ImageNet-21k is not published, so the schedule is that of "b".
model = dict(backbone=dict(arch="b-21k"))
