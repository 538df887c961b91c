_base_ = "./vim-tiny_upernet_4xb4-160k_ade20k-512x512.py"

# The authors' schedule with the groups that their code really makes: it means to lower the learning rate from block to
# block, but knows blocks by another name, so that only the stem has a lower one; and it decays whatever is no vector.
optim_wrapper = dict(
    optimizer=dict(lr=2e-4, weight_decay=0.1),
    paramwise_cfg=dict(
        layer_decay_rate=1.0,
        custom_keys={
            "backbone.patch_embed": dict(lr_mult=0.92**25),
            "backbone.pos_embed": dict(lr_mult=0.92**25, decay_mult=1.0),
            "A_log": dict(decay_mult=1.0),
        },
    ),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=1500, end=60000, by_epoch=False),
]
train_dataloader = dict(batch_size=8)
train_cfg = dict(max_iters=60000, val_interval=1000)
default_hooks = dict(checkpoint=dict(interval=1000, max_keep_ckpts=2))
# `base_batch_size` = (4 GPUs) x (8 samples per GPU)
auto_scale_lr = dict(enable=False, base_batch_size=32)
