_base_ = "./vig-tiny_8xb128_in1k.py"

model = dict(backbone=dict(arch="base", drop_path_rate=0.5), head=dict(in_channels=768))
train_dataloader = dict(batch_size=64)
