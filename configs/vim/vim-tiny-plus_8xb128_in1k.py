_base_ = "./vim-tiny_8xb128_in1k.py"

# Fine-tuned from Vim-tiny, whose position embedding is resized. The head starts anew; to keep the classifier as the
# authors did, convert the file with tools/model_converters/convert_official.py, set load_from to the result and
# init_cfg to None.
checkpoint_file = "https://huggingface.co/hustvl/Vim-tiny-midclstok/resolve/main/vim_t_midclstok_76p1acc.pth"
model = dict(
    backbone=dict(arch="tiny-plus", init_cfg=dict(type="Pretrained", checkpoint=checkpoint_file, prefix="backbone.")),
)

optim_wrapper = dict(optimizer=dict(lr=1e-5, weight_decay=1e-8))
param_scheduler = [dict(type="ConstantLR", factor=1.0, by_epoch=True)]
train_cfg = dict(max_epochs=30)
