_base_ = "./vim-tiny_8xb128_in1k.py"

model = dict(backbone=dict(arch="small", drop_path_rate=0.05), head=dict(in_channels=384))

train_dataloader = dict(batch_size=64)
val_dataloader = dict(batch_size=64)
test_dataloader = dict(batch_size=64)
optim_wrapper = dict(optimizer=dict(weight_decay=0.05))  # the learning rate is 1e-3 for this batch, too
auto_scale_lr = dict(base_batch_size=512)
